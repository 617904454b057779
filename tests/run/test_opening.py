"""Test that one process trains in a working directory."""

import subprocess
import sys
from pathlib import Path

import pytest

from lstm_jax.errors import UserError
from lstm_jax.run import opening

HOLD = """
import sys, time
from pathlib import Path
from lstm_jax.run import opening
with opening._hold_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.process
def test_a_second_process_fails_until_the_first_is_dead(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None and first.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=rf"is training in .* \(process {first.pid} on .* since "):
        opening._hold_lock(tmp_path).__enter__()
    first.kill()
    first.wait()
    with opening._hold_lock(tmp_path):
        pass
