"""Compile the library: python -m lstm_jax.native."""

import sys

from lstm_jax import native
from lstm_jax.errors import UserError


def main() -> None:
    """Compile the library and print its path."""
    if not native.is_supported():
        print("nothing to compile: this is for processors with AVX-512 BF16 and without AMX")
        return
    try:
        print(native.build_library())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
