"""Test the cache of compiled programs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import jax
from lstm_jax.devices import setup
setup.use_cache()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
jax.jit(lambda x: x + 1)(1).block_until_ready()
"""


def compile_with(**env: str) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_COMPIL", "XDG_"))}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, env={**environment, **env}
    )
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.process
def test_compiled_programs_are_cached_and_damaged_ones_silently_compiled_again(
    tmp_path: Path,
) -> None:
    cache, named = tmp_path / "cache", tmp_path / "named"
    compile_with(XDG_CACHE_HOME=str(cache))
    entries = list((cache / "lstm-jax" / "compiled").glob("jit_*-cache"))
    for path in entries:
        path.write_bytes(path.read_bytes()[:100])
    assert entries
    compile_with(XDG_CACHE_HOME=str(cache))
    compile_with(XDG_CACHE_HOME=str(cache / "not"), JAX_COMPILATION_CACHE_DIR=str(named))
    assert list(named.glob("jit_*")) and not (cache / "not").exists()
    (tmp_path / "file").touch()
    compile_with(XDG_CACHE_HOME=str(tmp_path / "file"))
