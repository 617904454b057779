"""Run experiments that download their text, and that no page runs, on a slice of another text."""

import runpy
from pathlib import Path

import pytest

from lstm_jax import training
from lstm_jax.run import metrics, workdir

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["penn_treebank", "penn_treebank_words"])
def test_an_experiment_trains_and_resumes(name: str, text_file: Path, tmp_path: Path) -> None:
    config = runpy.run_path(str(EXPERIMENTS / f"{name}.py"))["get_config"]()
    config.model.hidden_size = config.model.embedding_size = 16
    config.batches.batch_size, config.batches.window_length = 8, 32
    config.data.path, config.sample.length = str(text_file), 20
    every = config.log_every_steps
    for config.max_steps in (every, 2 * every):
        assert training.train(config, tmp_path) == 0
    rows = metrics.read_metrics(tmp_path / workdir.METRICS)
    assert {row["split"] for row in rows} == {"train", "validation", "test"}
