"""Compare what a config with `minutes` chooses for texts, minutes and machines."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

import runs
from lstm_jax import budget, training
from lstm_jax import config as config_lib
from lstm_jax.config import Config
from lstm_jax.data import texts
from lstm_jax.errors import UserError
from lstm_jax.run import workdir
from lstm_jax.vocabulary import Vocabulary


def open_config(minutes: float, **fields: object) -> Config:
    config = config_lib.load(f"experiments/minutes.py:{minutes}")
    of_text = {"data.units": "characters", "data.fractions": (0.9, 0.05, 0.05)}
    config.update_from_flattened_dict(of_text | fields)
    return config_lib.complete_config(config)


def choose(config: Config, length: int, ms: float = 35, power: float = 1.65) -> Config:
    """Choose on a machine where a step of 256 hidden units and 64 x 48 tokens takes `ms`."""
    seconds = int(60 * config.minutes)

    def measure(config: Config, *unused: Any) -> budget.Speed:
        size, batch_size = config.model.hidden_size, config.batches.batch_size
        step_seconds = ms / 1000 * (size / 256) ** power * batch_size / 64
        step_seconds *= 1.2 if config.regularization.output_dropout else 1
        return budget.Speed(step_seconds, 8.0, seconds)

    lengths = {"train": length, "validation": length // 18, "test": length // 18}
    ids = {name: np.broadcast_to(0, n) for name, n in lengths.items()}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(budget, "measure_speed", measure)
        chosen, line = budget.choose_fields(config, Vocabulary.from_text("a"), ids, deadline=0)
    assert not chosen.open and str(chosen.model.hidden_size) in line
    if chosen.num_epochs == 64:  # It ends before the time.
        return chosen
    # Training, validations and the test take the time.
    step = measure(chosen).step_seconds
    validations = math.ceil(chosen.max_steps / chosen.validate_every_steps)
    evaluated = (validations + 1) * lengths["validation"] / 2.5 / (64 * 48) * ms / 1000
    assert 0.7 * seconds < chosen.max_steps * step + evaluated + 12 < 1.05 * seconds
    return chosen


@pytest.mark.parametrize("power", [1.65, 0.3])  # Of a CPU and, where steps have little work, a GPU.
def test_more_minutes_or_a_faster_machine_train_a_larger_model(power: float) -> None:
    sizes = [choose(open_config(x), 10**6, power=power).model.hidden_size for x in (1, 4, 15, 60)]
    assert sizes == sorted(sizes) and sizes[0] < sizes[2]
    faster = choose(open_config(4), 10**6, ms=5, power=power).model.hidden_size
    assert faster > sizes[1] or faster == sizes[1] == 1024


def test_a_shorter_text_has_smaller_batches_and_more_dropout() -> None:
    chosen = [choose(open_config(4), length) for length in (18_000, 900_000, 30_000_000)]
    assert [config.batches.batch_size for config in chosen] == [16, 64, 64]
    dropout = [config.regularization.output_dropout for config in chosen]
    assert dropout[0] > dropout[1] > dropout[2] == 0
    assert chosen[2].num_epochs == 1
    decay = [config.optimizer.weight_decay for config in chosen]
    assert decay[0] == decay[1] == 0.15 and 0 < decay[2] < 0.01


def test_a_set_field_stays_and_the_others_follow() -> None:
    fields = {"model.hidden_size": 96, "regularization.hidden_dropout": 0.0}
    set_, free = choose(open_config(4, **fields), 10**6), choose(open_config(4), 10**6)
    assert (set_.model.hidden_size, set_.regularization.hidden_dropout) == (96, 0.0)
    assert set_.optimizer.learning_rate > free.optimizer.learning_rate
    assert set_.max_steps > free.max_steps
    assert choose(open_config(4, **{"model.num_layers": 1}), 10**6).model.num_layers == 1
    config = config_lib.complete_config(open_config(4), {"optimizer.learning_rate": 1e-3})
    assert "optimizer.learning_rate" not in config.open
    assert choose(config, 10**6).optimizer.learning_rate == 1e-3


def test_the_characters_and_the_size_of_a_text_choose_its_tokens_and_splits(tmp_path: Path) -> None:
    chosen, start = {}, b"ab" * 1_000_000
    many = start + "".join(map(chr, range(0x4E00, 0x5200))).encode()
    latin1 = start + "é".encode("latin-1")
    contents = {"latin1": latin1, "many": many, "few": "ab é".encode() * 99}
    for name, content in (contents | {"long": b"ab" * 10_000_000}).items():
        (tmp_path / name).write_bytes(content)
        data = open_config(1, **{"data.path": str(tmp_path / name)}).data
        chosen[name] = texts.choose_tokens_and_splits(data)
    kinds = {name: fields["data.units"] for name, fields in chosen.items()}
    assert kinds == {"latin1": "bytes", "many": "bytes", "few": "characters", "long": "characters"}
    assert chosen["few"]["data.fractions"] == (0.9, 0.05, 0.05)
    assert chosen["long"]["data.fractions"] == (0.95, 0.025, 0.025)


def test_a_run_resumes_with_the_fields_that_it_chose(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"data.path": str(text_file), "model.hidden_size": 16, "max_steps": 30}
    config = open_config(0.5, **fields)
    with pytest.raises(runs.KilledError):
        training.train(config, tmp_path / "run", runs.kill_at(20, "train"), quiet=True)
    with monkeypatch.context() as patched:  # Nothing is measured again.
        patched.delattr(budget, "measure_speed")
        run = training.train(config, tmp_path / "run", quiet=True)
    assert run.config.minutes == 0.5 and not run.config.open
    plain = ConfigDict(workdir.load_config(tmp_path / "run").to_dict())
    training.train(plain, tmp_path / "whole", quiet=True)
    runs.assert_same(tmp_path / "whole", tmp_path / "run")
    with pytest.raises(UserError, match="minutes was 0.5 and is 0.6"):
        training.train(open_config(0.6, **fields), tmp_path / "run")


def test_an_initial_model_is_refused(text_file: Path, tmp_path: Path) -> None:
    config: Any = open_config(1, **{"data.path": str(text_file)})
    config = config_lib.complete_config(config, {"init_from": "tiny-shakespeare"})
    with pytest.raises(UserError, match="chooses the sizes of a new model"):
        training.train(config, tmp_path / "run")
    assert not workdir.has_run(tmp_path / "run")
