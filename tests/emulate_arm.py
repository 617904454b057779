"""Run the tests of the recurrence in C with the library compiled for ARM, under emulation.

    python tests/emulate_arm.py

It needs `aarch64-linux-gnu-gcc` and `qemu-aarch64` (Debian's packages gcc-aarch64-linux-gnu,
libc6-dev-arm64-cross and qemu-user). JAX calls the program of call_handlers.c in place of the
library.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import call_handlers
from call_handlers import Call, Program
from lstm_jax.ops import in_c, native

COMPILER, RUNNER = "aarch64-linux-gnu-gcc", ("qemu-aarch64", "-cpu", "max")
PROGRAM = "LSTM_JAX_EMULATED"  # Describes the program to the plugin.
FOLDER = Path(__file__).parent
FILES = "tests/core/test_native.py", "tests/core/test_cross_entropy.py"
TESTS = "agrees_with_its_equations or agree_with_autodiff and C"


def emulate(program: Program) -> None:
    """Let `in_c` call a program instead of the library."""
    library = native.Library("emulated", program.lanes, uses_amx=False)
    dtypes = ["float32", "bfloat16"][: len(program.numbers)]
    native.load_library = lambda: library  # type: ignore[assignment]
    native.list_dtypes = lambda: dtypes

    def call(
        name: str,
        arguments: Sequence[jax.Array],
        *results: jax.ShapeDtypeStruct,
        aliases: dict[int, int] | None = None,
        **attributes: int,
    ) -> Sequence[jax.Array]:
        attributes["parts"] = native.count_threads()

        def run(*arrays: Any) -> list[np.ndarray]:
            inputs = [np.asarray(x) for x in arrays]
            outputs = [np.zeros(x.shape, x.dtype) for x in results]
            for argument, result in (aliases or {}).items():
                outputs[result] = inputs[argument]
            one = Call(name, attributes, inputs, outputs)
            [(message, found)] = program.run([one])
            assert not message, message
            return found

        found: Sequence[jax.Array] = jax.pure_callback(run, results, *arguments)
        return found

    in_c._call = call


def pytest_configure() -> None:
    """Emulate the library in the tests that `main` runs, as a plugin of pytest."""
    path, lanes, *numbers = json.loads(os.environ[PROGRAM])
    emulate(Program([*RUNNER, path], lanes, numbers))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the tests start the program."""
    for item in items:
        item.add_marker(pytest.mark.process)


def main() -> int:
    """Check the functions, and run the tests, without and with ARM's instructions for bfloat16."""
    code = 0
    with tempfile.TemporaryDirectory() as folder:
        for flag, tests in (("", f"({TESTS}) and not bfloat16"), ("-march=armv8.2-a+bf16", TESTS)):
            path = Path(folder, "program")
            command = [COMPILER, *native.FLAGS, "-static", *flag.split()]
            program = call_handlers.compile_program(path, command, *RUNNER)
            assert program.lanes == 4 and len(program.numbers) == (2 if flag else 1)
            call_handlers.check_calls(program)
            described = json.dumps([str(path), program.lanes, *program.numbers])
            command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "emulate_arm"]
            result = subprocess.run(
                [*command, *FILES, "-k", tests],
                cwd=FOLDER.parent,
                env=os.environ | {PROGRAM: described, "PYTHONPATH": str(FOLDER)},
            )
            code |= result.returncode
    return code


if __name__ == "__main__":
    sys.exit(main())
