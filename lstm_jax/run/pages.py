"""Make a page: fill data into its template, which is a file of a package, and write it."""

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

from lstm_jax.data import files
from lstm_jax.errors import name_failure, print_line


def fill_page(package: str, name: str, data: Mapping[str, object]) -> bytes:
    """Return the template `name` of a package with `data` in place of `null/*data*/`."""
    template = resources.files(package).joinpath(name).read_text(encoding="utf-8")
    # ASCII without "<" is safe in a script.
    in_script = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    return template.replace("null/*data*/", in_script).encode()


def write_page(path: Path, flag: str, page: bytes) -> None:
    """Write a page to the path that a flag names, and print its size; raise `UserError`."""
    with name_failure(f"can't write {path} ({flag})"):
        files.write_file(path, page)
    print_line(f"{path} ({len(page) / 1e6:.1f} MB): open it in a browser")
