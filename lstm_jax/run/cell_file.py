"""Load cells from files that the user names, as FILE.py:CLASS.

Such a file is code. It runs only if its name comes from the command line or from a caller: from the
config of a training command, or from --cell of a command that reads a run. The name in a working
directory is only compared with those loaded.
"""

import os
import shlex
import sys
import types
from pathlib import Path

import flax.linen as nn

from lstm_jax import cells
from lstm_jax.config import names_cell_file
from lstm_jax.errors import UserError, name_failure, run_user_code


def load_cell(name: str) -> None:
    """Run the file of FILE.py:CLASS and make its cell available; those of the package are.

    Raise `UserError` if the file can't be read or run, or has no such cell.
    """
    if name in cells.CELLS:
        return
    if not names_cell_file(name):
        raise UserError(f"the cell {name!r} is not FILE.py:CLASS, as in my_cells.py:MyCell")
    file, _, class_name = os.path.expanduser(name).rpartition(":")
    with name_failure(f"can't read the file of the cell {name}"):
        source = Path(file).read_bytes()
    # A path as its name hides no other module. Dataclasses look modules up.
    module = types.ModuleType(file)
    module.__file__ = file
    sys.modules[file] = module
    with run_user_code("cell file", file):
        exec(compile(source, file, "exec"), module.__dict__)
    cell = getattr(module, class_name, None)
    if not (isinstance(cell, type) and issubclass(cell, nn.Module)):
        raise UserError(f"{file} has no class {class_name} derived from flax.linen.Module")
    cells.LOADED.pop(name, None)  # The last one loaded is last.
    cells.LOADED[name] = cell


def find_cell(name: str, workdir: Path) -> str:
    """Return the name of the loaded cell of a run; its file may have moved.

    Raise `UserError` if no file with a class of this name was loaded.
    """
    if name in cells.CELLS or name in cells.LOADED:
        return name
    class_name = name.rpartition(":")[2]
    names = [loaded for loaded in cells.LOADED if loaded.endswith(f":{class_name}")]
    if not names:
        raise UserError(
            f"the model in {workdir} has the cell {name}, whose code runs only if you name it: "
            f"--cell {shlex.quote(name)}, cell= in Python, or --config.model.cell"
        )
    return names[-1]
