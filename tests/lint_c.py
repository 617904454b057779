"""Compile the library in C with warnings as errors, by each compiler, for each instruction set."""

import platform
import shutil
import subprocess
import sys

from lstm_jax.ops import native

STRICT = ["-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
ARM = "aarch64-linux-gnu-gcc"


def main() -> int:
    """Return 1 if a compiler warns, and print the warnings."""
    code = 0
    for name in filter(shutil.which, ("cc", "gcc", "clang", ARM)):
        is_arm = name == ARM or platform.machine() in ("arm64", "aarch64")
        for features, flags in native.SETS:
            if ("asimd" in features) == is_arm:
                command = native.make_command([*native.FLAGS, *flags.split(), *STRICT], name)
                code |= subprocess.run(command).returncode
    return code


if __name__ == "__main__":
    sys.exit(main())
