"""Mount small file systems and fill them."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def mounted(directory: Path, *options: str) -> Iterator[Path]:
    """Mount a file system in memory."""
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", *options, "tmpfs", str(directory)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("only root can mount a small file system")
    try:
        yield directory
    finally:
        # Lazily: files of commands that ran in this process may still be open.
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def fill(disk: Path) -> Path:
    """Append to a file until the disk is full, and return the file."""
    filler = disk / "filler"
    with filler.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"\0" * 4096)
    return filler
