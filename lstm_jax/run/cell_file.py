"""Load cells from files that the user names, as FILE.py:CLASS.

Such a file is code. It runs only if its name comes from the command line or from a caller: from the
config of a training command, or from --cell of a command that reads a run. The name in a working
directory is only compared with those loaded.
"""

import dataclasses
import hashlib
import os
import shlex
import sys
import types
from pathlib import Path

import flax.linen as nn

from lstm_jax import cells
from lstm_jax.config import ModelConfig, names_cell_file
from lstm_jax.errors import UserError, name_failure, run_user_code, warn


def resolve_cell(model: ModelConfig) -> ModelConfig:
    """Load the cell that a training config names; return the fields with its checksum."""
    sha256 = "" if model.cell in cells.CELLS else load_cell(model.cell)
    return dataclasses.replace(model, cell_sha256=sha256)


def load_cell(name: str) -> str:
    """Run the file of FILE.py:CLASS, make its cell available, and return the file's checksum.

    Raise `UserError` if the file can't be read or run, or has no such cell.
    """
    if not names_cell_file(name):
        raise UserError(f"the cell {name!r} is not FILE.py:CLASS, as in my_cells.py:MyCell")
    file, _, class_name = os.path.expanduser(name).rpartition(":")
    with name_failure(f"can't read the file of the cell {name}"):
        source = Path(file).read_bytes()
    sha256 = hashlib.sha256(source).hexdigest()
    # Under a unique name, so that it hides no other module. Dataclasses look modules up.
    module = types.ModuleType(f"cell_file_{sha256}")
    module.__file__ = file
    sys.modules[module.__name__] = module
    with run_user_code("cell file", file):
        exec(compile(source, file, "exec"), module.__dict__)
    cell = getattr(module, class_name, None)
    if not (isinstance(cell, type) and issubclass(cell, nn.Module)):
        raise UserError(f"{file} has no class {class_name} derived from flax.linen.Module")
    cells.LOADED.pop(name, None)  # The last one loaded is last.
    cells.LOADED[name] = cell, sha256
    return sha256


def find_cell(model: ModelConfig, workdir: Path) -> str:
    """Return the name of the loaded cell of a run; the file of the cell may have moved.

    Warn if the file has changed since the run was trained. Raise `UserError` if no file with a
    class of this name was loaded.
    """
    if model.cell in cells.CELLS:
        return model.cell
    class_name = model.cell.rpartition(":")[2]
    names = [name for name in cells.LOADED if name.endswith(f":{class_name}")]
    if not names:
        raise UserError(
            f"the model in {workdir} has the cell {model.cell}, whose code runs only if you name "
            f"it: --cell {shlex.quote(model.cell)}, cell= in Python, or --config.model.cell"
        )
    name = model.cell if model.cell in names else names[-1]
    if cells.LOADED[name][1] != model.cell_sha256:
        warn(
            f"{name} has changed since the model in {workdir} was trained with it: it may compute "
            "something else"
        )
    return name


def list_flags(model: ModelConfig) -> list[str]:
    """Return the flags that a command needs to read a run with this model."""
    return ["--cell", model.cell] if names_cell_file(model.cell) else []
