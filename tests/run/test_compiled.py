"""Test the cache of compiled programs."""

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import jax
import pytest

from lstm_jax.devices import compilation_cache

SCRIPT = """
import jax
from lstm_jax.devices import compilation_cache
compilation_cache.use_cache()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
jax.jit(lambda x: x + 1)(1).block_until_ready()
"""


def compile_with(**env: str) -> None:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XDG_"))}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, env={**kept, **env}
    )
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.process
def test_compiled_programs_are_cached_and_damaged_ones_silently_compiled_again(
    tmp_path: Path,
) -> None:
    cache, named = tmp_path / "cache", tmp_path / "named"
    compile_with(XDG_CACHE_HOME=str(cache))
    (by_processor,) = (cache / "lstm-jax").glob("compiled-*")
    entries = list(by_processor.glob("jit_*-cache"))
    for path in entries:
        path.write_bytes(path.read_bytes()[:100])
    assert entries
    compile_with(XDG_CACHE_HOME=str(cache))
    compile_with(XDG_CACHE_HOME=str(cache / "not"), JAX_COMPILATION_CACHE_DIR=str(named))
    assert list(named.glob("jit_*")) and not (cache / "not").exists()
    (tmp_path / "file").touch()
    compile_with(XDG_CACHE_HOME=str(tmp_path / "file"))


def give_away(directory: Path) -> None:
    if os.geteuid() == 0:
        os.chown(directory, 12345, 12345)
    else:
        directory.chmod(0o777)


def replace_by_link(directory: Path) -> None:
    directory.rename(directory.with_name("elsewhere"))
    directory.symlink_to("elsewhere")


@pytest.mark.parametrize(
    "change",
    [give_away, lambda path: path.chmod(0o770), replace_by_link],
    ids=["given", "group", "link"],
)
def test_a_cache_that_others_can_write_is_not_used(
    change: Callable[[Path], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    used: list[str] = []
    monkeypatch.setattr(jax.config, "update", lambda _, directory: used.append(directory))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(warnings, "filterwarnings", lambda *_: None)
    compilation_cache.use_cache()
    (directory,) = (tmp_path / "lstm-jax").iterdir()
    assert used == [str(directory)] and capsys.readouterr().err == ""
    change(directory)
    compilation_cache.use_cache()
    assert used == [str(directory)]
    assert f"others can write to {directory}, so compiled" in capsys.readouterr().err
