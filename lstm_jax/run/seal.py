"""Seal a checkpoint with checksums, and find later changes."""

from pathlib import Path

from lstm_jax.data import files

SEAL = "SHA256SUMS"
# Written after the checkpoint is sealed, so the seal does not cover it.
VALIDATION = "validation.json"


def seal_checkpoint(checkpoint: Path) -> None:
    """Flush every file of a checkpoint to disk, and write its checksum to SHA256SUMS."""
    paths = [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]
    names = [path.relative_to(checkpoint).as_posix() for path in paths]
    lines = [
        f"{files.hash_file(checkpoint / name, sync=True)}  {name}\n"
        for name in names
        if name not in (SEAL, VALIDATION)
    ]
    files.write_file(checkpoint / SEAL, "".join(lines).encode())


def find_damage(checkpoint: Path) -> str | None:
    """Return how a checkpoint's files differ from those that were sealed; None if they don't.

    Other files are ignored: file managers add some.
    """
    try:
        lines = (checkpoint / SEAL).read_text().splitlines()
        for digest, _, name in (line.partition("  ") for line in lines):
            if files.hash_file(checkpoint / name) != digest:
                return f"{name} has changed"
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(checkpoint)} is missing"
    except OSError as error:
        return f"{Path(error.filename or checkpoint).name}: {error.strerror}"
    except UnicodeDecodeError:
        return f"{SEAL} is not UTF-8"
    return None if lines else f"{SEAL} is empty"
