"""Check the shapes in annotations: pyproject.toml names `check` as jaxtyping's type checker."""

from collections.abc import Callable
from typing import Any

import beartype


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check the arguments and results of a function whose annotations have shapes."""
    has_shapes = "jaxtyping." in str(function.__annotations__)
    return beartype.beartype(function) if has_shapes else function
