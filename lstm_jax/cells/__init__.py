"""Define recurrent cells: each computes one step, in plain equations; a scan runs it over time.

A cell is a flax module in its own file, here or anywhere; `cells.base` defines its methods.
docs/cells.md has a table of the cells here, with their numbers of parameters and their sources.

The file of a cell that the user names, as FILE.py:CLASS, is code. It runs only if its name comes
from the command line or from a caller: from the config of a training command, or from --cell of a
command that reads a run. The name in a working directory is only compared with those loaded.
"""

import importlib
import os
import re
import shlex
import sys
import types
from pathlib import Path
from typing import TYPE_CHECKING

from lstm_jax.errors import UserError, name_failure, run_user_code

if TYPE_CHECKING:
    import flax.linen as nn

# The class of each cell, in the module of its name.
CELLS = {
    "lstm": "LSTMCell",
    "peephole": "PeepholeLSTMCell",
    "mogrifier": "MogrifierLSTMCell",
    "multiplicative": "MultiplicativeLSTMCell",
    "gru": "GRUCell",
    "rnn": "RNNCell",
    "minlstm": "MinLSTMCell",
    "mingru": "MinGRUCell",
    "rglru": "RGLRUCell",
    "slstm": "SLSTMCell",
    "mlstm": "MLSTMCell",
}
# Cells of files, by FILE.py:CLASS, in the order in which they were loaded.
LOADED: dict[str, "type[nn.Module]"] = {}


def import_cell(name: str) -> "type[nn.Module]":
    """Return the class of a cell of the package."""
    cell: type[nn.Module] = getattr(importlib.import_module(f"{__name__}.{name}"), CELLS[name])
    return cell


def names_file(name: str) -> bool:
    """Return whether the name of a cell has the form FILE.py:CLASS."""
    return re.fullmatch(r"[^\0]+\.py:\w+", name) is not None


def load_cell(name: str) -> None:
    """Run the file of FILE.py:CLASS and make its cell available; those of the package are.

    Raise `UserError` if the file can't be read or run, or has no such cell.
    """
    import flax.linen as nn  # `config`, which lists the names, does not need Flax.

    if name in CELLS:
        return
    if not names_file(name):
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
    LOADED.pop(name, None)  # The last one loaded is last.
    LOADED[name] = cell


def find_cell(name: str, workdir: Path) -> str:
    """Return the name of the loaded cell of a run; its file may have moved.

    Raise `UserError` if no file with a class of this name was loaded.
    """
    if name in CELLS or name in LOADED:
        return name
    class_name = name.rpartition(":")[2]
    names = [key for key in LOADED if key.endswith(f":{class_name}")]
    if not names:
        raise UserError(
            f"the model in {workdir} has the cell {name}, whose code runs only if you name it: "
            f"--cell {shlex.quote(name)}, cell= in Python, or --config.model.cell"
        )
    return names[-1]
