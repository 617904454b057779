from pathlib import Path

import pytest

from lstm_jax import workdir
from lstm_jax.errors import UserError


def test_the_best_of_a_run_is_loaded(trained: Path) -> None:
    loaded = workdir.load(trained)
    assert loaded.step > 0
    assert loaded.params["lstm_0"]["recurrent_kernel"].shape == (24, 96)


def test_what_is_missing_or_damaged_is_named(tmp_path: Path, trained: Path) -> None:
    with pytest.raises(UserError, match="no trained model in .*no config.json"):
        workdir.load(tmp_path)
    (tmp_path / workdir.CONFIG).write_text("{")
    with pytest.raises(UserError, match="config.json is damaged"):
        workdir.load(tmp_path)
    (tmp_path / workdir.CONFIG).write_bytes((trained / workdir.CONFIG).read_bytes())
    with pytest.raises(UserError, match="vocabulary.json is missing or damaged"):
        workdir.load(tmp_path)
    (tmp_path / workdir.VOCABULARY).write_bytes((trained / workdir.VOCABULARY).read_bytes())
    with pytest.raises(UserError, match="no checkpoint in .* yet"):
        workdir.load(tmp_path)
