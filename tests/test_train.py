import platform
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from ml_collections import ConfigDict

from lstm_jax import batches, evaluate, metrics, train, workdir
from lstm_jax import model as model_lib
from lstm_jax.errors import UserError
from lstm_jax.model import LanguageModel


@pytest.mark.parametrize("kind", ["windows", "streams"])
@pytest.mark.parametrize("stop_after", [37, 70])  # In the first epoch, and at the end of it.
def test_a_run_that_stopped_goes_on_bit_for_bit(
    kind: str,
    stop_after: int,
    tiny_config: ConfigDict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    tiny_config.batches.kind = kind
    assert train.train(tiny_config, whole) == 0

    steps = 0
    make = train.make_train_step

    def make_stopping(*args: Any) -> train.TrainStep:
        step = make(*args)

        def stopping(state: train.TrainState, batch: batches.Batch) -> train.TrainState:
            nonlocal steps
            steps += 1
            if steps == stop_after:
                signal.raise_signal(signal.SIGINT)
            return step(state, batch)

        return stopping

    monkeypatch.setattr(train, "make_train_step", make_stopping)
    assert train.train(tiny_config, stopped) == 130
    assert train.train(tiny_config, stopped) == 0
    runs.assert_same(whole, stopped)


def test_a_run_leaves_all_that_it_promises(trained: Path) -> None:
    names = {path.name for path in trained.iterdir() if "tfevents" not in path.name}
    assert names == {
        "checkpoints",
        "config.json",
        "curves.png",
        "metrics.jsonl",
        "samples.txt",
        "vocabulary.json",
    }
    assert len(list(trained.glob("events.out.tfevents.*"))) >= 1
    rows = metrics.read(trained / workdir.METRICS)
    assert [row["epoch"] for row in rows if row["split"] == "validation"] == [0, 1, 2]
    train_rows = [row for row in rows if row["split"] == "train"]
    assert [row["step"] for row in train_rows] == list(range(10, train_rows[-1]["step"] + 1, 10))
    assert all(row["tokens_per_second"] > 0 for row in train_rows)
    assert train_rows[-1]["loss"] < train_rows[0]["loss"] - 0.5, "it learns"
    assert (trained / workdir.SAMPLES).read_text().count("=== step ") == 3


def test_the_test_loss_is_that_of_the_best_checkpoint(trained: Path) -> None:
    rows = metrics.read(trained / workdir.METRICS)
    validation = {row["step"]: row["loss"] for row in rows if row["split"] == "validation"}
    (test,) = [row for row in rows if row["split"] == "test"]
    assert test["step"] == min(validation, key=lambda step: validation[step])
    loaded = workdir.load(trained)
    text = Path(loaded.config.data.path).read_text(encoding="utf-8")
    ids = loaded.vocabulary.encode(text[19_000:])
    assert evaluate.mean_loss(loaded.model, loaded.params, ids) == pytest.approx(test["loss"])


def test_a_finished_run_says_so_and_can_be_trained_longer(
    tiny_config: ConfigDict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_config.num_epochs = 1
    assert train.train(tiny_config, tmp_path) == 0
    before = (tmp_path / workdir.METRICS).read_bytes()
    capsys.readouterr()
    assert train.train(tiny_config, tmp_path) == 0
    output = capsys.readouterr().out
    assert "is finished, with 1 epochs" in output and "--config.num_epochs=2" in output
    assert (tmp_path / workdir.METRICS).read_bytes() == before
    tiny_config.num_epochs = 2
    assert train.train(tiny_config, tmp_path) == 0
    assert "Going on from step" in capsys.readouterr().out
    assert [row[1] for row in runs.losses(tmp_path)].count("validation") == 3


def test_another_model_or_text_in_the_same_directory_is_refused(
    trained: Path, tiny_config: ConfigDict, tmp_path: Path
) -> None:
    tiny_config.model.hidden_size = 25
    with pytest.raises(UserError, match="model.hidden_size was 24 and is 25"):
        train.train(tiny_config, trained)
    tiny_config.model.hidden_size = 24
    other = tmp_path / "other.txt"
    other.write_text(Path(tiny_config.data.path).read_text() + ".")
    tiny_config.data.path = str(other)
    with pytest.raises(UserError, match="data.sha256 was"):
        train.train(tiny_config, trained)


def test_a_text_too_short_leaves_no_directory(tiny_config: ConfigDict, tmp_path: Path) -> None:
    tiny_config.batches.batch_size = 1000
    with pytest.raises(UserError, match="too short: 1000 streams of 32"):
        train.train(tiny_config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("max_gradient_norm", [0.0, 0.01])
def test_one_step_is_adam_on_the_mean_loss(max_gradient_norm: float) -> None:
    model = LanguageModel(11, 6, 9)
    fields = ConfigDict({"learning_rate": 0.1, "warmup_steps": 0, "schedule": "constant"})
    fields.max_gradient_norm = max_gradient_norm
    optimizer = train.make_optimizer(fields, 10)
    state = train.init_state(model, optimizer, jax.random.key(0), 2)
    before = state.params
    ids = np.random.default_rng(0).integers(0, 11, (2, 8)).astype(np.int32)
    batch = batches.Batch(ids[:, :-1], ids[:, 1:], np.bool_(True))

    def loss(params: model_lib.Params) -> jax.Array:
        logits, _ = model_lib.apply(model, params, batch.inputs, model.initial_carry(2))
        log_probabilities = jax.nn.log_softmax(logits)
        return -jnp.take_along_axis(log_probabilities, batch.targets[..., None], axis=-1).mean()

    gradients = jax.grad(loss)(before)
    norm = np.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(gradients)))
    scale = min(1, max_gradient_norm / norm) if max_gradient_norm else 1
    # Adam's first step, with its moments corrected for their bias, is g / (|g| + 1e-8).
    expected = jax.tree.map(
        lambda p, g: np.asarray(p - 0.1 * scale * g / (np.abs(scale * g) + 1e-8)), before, gradients
    )
    after = train.make_train_step(model, optimizer)(state, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), after.params, expected)
    assert float(after.loss_sum) == pytest.approx(np.log(11), abs=0.05)


def test_the_learning_rate_warms_up_and_decays() -> None:
    fields = ConfigDict(
        {"learning_rate": 1.0, "warmup_steps": 10, "schedule": "cosine", "max_gradient_norm": 0.0}
    )
    optimizer = train.make_optimizer(fields, 110)
    state = optimizer.init(np.zeros(1, np.float32))
    sizes = []
    for _ in range(110):
        # A constant gradient makes Adam's step the learning rate itself.
        update, state = optimizer.update(np.ones(1, np.float32), state)
        sizes.append(-float(update[0]))
    np.testing.assert_allclose(sizes[:11], np.arange(11) / 10, atol=1e-4)
    expected = 0.5 * (1 + np.cos(np.pi * np.arange(100) / 100))
    np.testing.assert_allclose(sizes[10:], expected, atol=1e-4)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is about glibc")
def test_freed_memory_is_kept_for_the_next_step() -> None:
    script = """
import ctypes, resource, sys
from lstm_jax import train
if sys.argv[1] == "keep":
    train.keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
def use(size):
    memory = ctypes.c_void_p(libc.malloc(ctypes.c_size_t(size)))
    ctypes.memset(memory, 1, size)
    libc.free(memory)
use(64 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    use(64 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

    def count(argument: str) -> int:
        command = [sys.executable, "-c", script, argument]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    # 64 MiB are 16,384 pages of 4 KiB, or 32 of 2 MiB.
    assert count("keep") < 32 < count("leave")
