"""Load cells from files that the user names, as FILE.py:CLASS.

Such a file is code. It runs only if its name comes from the command line or from a caller: from the
config of a training command, or from --cell of a command that reads a run. The name in a working
directory is only compared with those loaded.
"""

import hashlib
import sys
import traceback
import types
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
from ml_collections import ConfigDict

from lstm_jax import cells
from lstm_jax.config import names_cell_file
from lstm_jax.errors import UserError, one_line
from lstm_jax.run import files

_LIMIT = 2**20  # Of the size of a file, in bytes.


class _Loaded(NamedTuple):
    name: str  # FILE.py:CLASS.
    sha256: str  # Of the file.


# By the name of the class, since the file may have moved.
_LOADED: dict[str, _Loaded] = {}


def settle_cell(config: ConfigDict) -> None:
    """Load the cell that a training config names, and set its checksum in the config.

    Raises:
      UserError: if it is in a file that can't be read or run, or that has no such cell.
    """
    is_own = config.model.cell not in cells.CELLS
    config.model.cell_sha256 = load_cell(config.model.cell) if is_own else ""


def load_cell(name: str) -> str:
    """Run the file of FILE.py:CLASS, make its cell available, and return the file's checksum."""
    file, _, kind = name.rpartition(":")
    if not names_cell_file(name):
        raise UserError(f"the cell {name!r} is not FILE.py:CLASS, as in my_cells.py:MyCell")
    try:
        source = files.read_bytes(Path(file), _LIMIT, follow=True)
    except OSError as error:
        raise UserError(f"can't read the file of the cell {name}: {error.strerror}") from None
    sha256 = hashlib.sha256(source).hexdigest()
    if _LOADED.get(kind) == _Loaded(name, sha256):
        return sha256
    # Under a name of its own, so that it hides no other module. Dataclasses look modules up.
    module = types.ModuleType(f"cell_file_{sha256}")
    module.__file__ = file
    sys.modules[module.__name__] = module
    sys.path.insert(0, str(Path(file).parent))
    try:
        exec(compile(source, file, "exec"), module.__dict__)
    except SyntaxError as error:
        raise UserError(f"cell file {error.filename}, line {error.lineno}: {error.msg}") from None
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if frame.filename == file]
        raise UserError(
            f"cell file {file}, line {(own or frames)[-1].lineno}: {one_line(error)}"
        ) from None
    finally:
        sys.path.pop(0)
    cell = getattr(module, kind, None)
    if not (isinstance(cell, type) and issubclass(cell, nn.Module)):
        found = [
            key
            for key, value in vars(module).items()
            if isinstance(value, type) and value.__module__ == module.__name__
        ]
        raise UserError(
            f"{file} has no flax module {kind}: its classes are {', '.join(found) or 'none'}"
        )
    cells.add_cell(name, cell)
    _LOADED[kind] = _Loaded(name, sha256)
    return sha256


def use_loaded_cell(config: ConfigDict, workdir: Path) -> None:
    """Set the cell in the config of a run to the loaded one of this name, if it is of a file.

    Warn if the file has changed since the run was trained. Raise `UserError` if no file with such a
    class was loaded.
    """
    name = config.model.cell
    if name in cells.CELLS:
        return
    loaded = _LOADED.get(get_class_name(config))
    if loaded is None:
        raise UserError(
            f"the model in {workdir} has the cell {name}. This file is code, which runs only if "
            f"you name it: add --cell {name}"
        )
    if loaded.sha256 != config.model.cell_sha256:
        print(
            f"warning: {loaded.name} has changed since the model in {workdir} was trained with it: "
            "it may compute something else",
            file=sys.stderr,
        )
    config.model.cell = loaded.name


def get_class_name(config: ConfigDict) -> str:
    """Return the name of the cell's class, without its file, or the name in `cells.CELLS`."""
    return str(config.model.cell.rpartition(":")[2])
