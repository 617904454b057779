"""Fill the data of a page into its template, which is a file of a package."""

import json
from collections.abc import Mapping
from importlib import resources
from typing import Any


def fill_page(package: str, name: str, data: Mapping[str, Any]) -> bytes:
    """Return the template `name` of a package with `data` in place of `null/*data*/`."""
    template = resources.files(package).joinpath(name).read_text(encoding="utf-8")
    # ASCII without "<" is safe in a script.
    in_script = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    return template.replace("null/*data*/", in_script).encode()
