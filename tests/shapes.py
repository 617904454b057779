"""Check the shapes in annotations: pyproject.toml names `check` as jaxtyping's type checker."""

from collections.abc import Callable
from typing import Any

import beartype


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check the arguments and results of a function that have shapes in their annotations."""
    hints = function.__annotations__.items()
    function.__annotations__ = {name: hint for name, hint in hints if "jaxtyping." in str(hint)}
    return beartype.beartype(function) if function.__annotations__ else function
