"""Test how a run is opened."""

import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from lstm_jax import config as config_lib
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
    for name in (".curves.png.1.partial", ".mine.partial"):
        (tmp_path / name).touch()
    with opening._hold_lock(tmp_path):
        assert {path.name for path in tmp_path.iterdir()} == {".lock", ".mine.partial"}


def test_hidden_dropout_of_one_layer_gives_a_warning(
    tiny_config: ConfigDict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_config.model.num_layers, tiny_config.regularization.hidden_dropout = 1, 0.5
    with opening.open_run(config_lib.complete_config(tiny_config), tmp_path):
        assert "hidden_dropout is between layers" in capsys.readouterr().err
