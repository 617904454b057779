"""Test that a profiled run leaves a trace."""

from pathlib import Path

import pytest
from ml_collections import ConfigDict

from lstm_jax import training


@pytest.mark.slow
def test_a_profiled_run_leaves_a_trace(tiny_config: ConfigDict, tmp_path: Path) -> None:
    tiny_config.profile, tiny_config.max_steps = True, 9  # It traces steps 4 to 8.
    assert training.train(tiny_config, tmp_path) == 0
    (trace,) = tmp_path.glob("plugins/profile/*/*.xplane.pb")
    content = trace.read_bytes()
    assert b"train_step" in content and b"step_num" in content  # The functions, and the steps.
