"""Run experiments that take hours, or download their text, on a slice of Tiny Shakespeare."""

import runpy
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from lstm_jax import training
from lstm_jax.run import metrics, workdir

EXPERIMENTS = Path(__file__).parent.parent / "experiments"


def make_small_config(name: str) -> ConfigDict:
    """Return the config of an experiment with a smaller size."""
    config = runpy.run_path(str(EXPERIMENTS / f"{name}.py"))["get_config"]()
    config.model.hidden_size = config.model.embedding_size = 16
    config.batches.batch_size, config.batches.window_length = 8, 32
    config.max_steps = config.log_every_steps
    config.sample.length = 20
    return config


def read_splits(directory: Path) -> set[str]:
    return {row["split"] for row in metrics.read_metrics(directory / workdir.METRICS)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["enwik8", "penn_treebank_words", "shakespeare_gpu"])
def test_an_experiment_trains_and_resumes(name: str, text_file: Path, tmp_path: Path) -> None:
    # enwik8 has names outside ASCII, of which a byte model reads the bytes.
    text = text_file.read_text(encoding="utf-8").replace("Citizen", "Citoyén 市民")
    config = make_small_config(name)
    config.data.path = str(tmp_path / "text")
    Path(config.data.path).write_text(text, encoding="utf-8")
    assert training.train(config, tmp_path / "run") == 0
    config.max_steps *= 2
    assert training.train(config, tmp_path / "run") == 0
    assert read_splits(tmp_path / "run") == {"train", "validation", "test"}
    if config.data.units == "bytes":
        vocabulary = workdir.load_vocabulary(tmp_path / "run")
        assert len(vocabulary.encode("é市")) == 5
