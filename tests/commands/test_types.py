"""Test that mypy sees the types of the public names, in a script of a user."""

import re
from pathlib import Path

import pytest
from mypy import api

ROOT = Path(__file__).parents[2]
# A comment names the error of its line.
SCRIPT = """
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

import lstm_jax
from lstm_jax import generation, layers, nnx_layers, ops

run = lstm_jax.load("runs/quick", dtype="float32")
text: str = run.generate("ROMEO:", length=10, temperature=0.5, top_k=3)
pieces: Iterator[str] = run.stream("ROMEO:")
scores = run.score("ROMEO:")
log_probs: np.ndarray = scores.log_probs
later: list[str] = run.score("JULIET:", "O ").tokens
states: list[np.ndarray] = run.hidden_states("ROMEO:")
state = run.read(run.vocabulary.encode("ROMEO:")[None])
logits: np.ndarray = np.asarray(run.read(np.zeros((1, 1), np.int32), state).logits)
following: list[tuple[str, float]] = run.next("ROMEO", n=5)
config = lstm_jax.config.default()
config.data.path = "my.txt"
rows: list[Mapping[str, Any]] = []
own: lstm_jax.Run = lstm_jax.train(config, "runs/mine", rows.append, quiet=True)
losses: list[float] = [row["loss"] for row in own.metrics]
controls = lstm_jax.Controls(temperature=0.5, top_p=0.9)
try:
    lstm_jax.check_cell(object)  # error: arg-type
except lstm_jax.UserError as error:
    print(error)

number: int = run.generate("ROMEO:")  # error: assignment
run.generate(b"ROMEO:")  # error: arg-type
run.generate("ROMEO:", temperature="hot")  # error: arg-type
run.hidden_states("ROMEO:").shape  # error: attr-defined
lstm_jax.train(config)  # error: call-arg
lstm_jax.sample("ROMEO:")  # error: attr-defined
run.generate("ROMEO:", temprature=1)  # error: call-arg

key, inputs = jax.random.key(0), np.zeros((2, 3, 4), np.float32)
parts = run.model, run.params, run.vocabulary, key
texts: list[str] = next(generation.stream_texts(*parts, length=9, controls=controls))
generation.stream_texts(*parts, length=9, samples=2)  # error: call-arg

gru, lstm = ops.GRUParams.init(key, 4, 5), ops.LSTMParams.init(key, 4, 5)
hidden: ops.HiddenCarry = ops.run(gru, inputs, reset=np.zeros((2, 3)))[0]
both: ops.LSTMCarry = ops.step(lstm, inputs[:, 0], ops.run(lstm, inputs)[0], reset=np.ones(2))[0]
both = ops.run(gru, inputs)[0]  # error: assignment
ops.run(gru, inputs, both)  # error: call-overload
both = ops.step(gru, inputs[:, 0], hidden)[0]  # error: assignment

outputs: jax.Array = layers.LSTM(128, num_layers=2)(inputs, seq_lengths=np.ones(2, int))
carry, outputs = layers.GRU(128)(inputs, return_carry=True)
outputs = nnx_layers.GRU(4, 128, rngs=nnx.Rngs(0))(inputs, initial_carry=carry)
text = layers.LSTM(128)(inputs)  # error: assignment
text = nnx_layers.LSTM(4, 128, rngs=nnx.Rngs(0))(inputs)  # error: assignment
layers.LSTM(128, return_carry=True)  # error: call-arg
nnx_layers.LSTM(4, 128)  # error: call-arg
"""


# Mypy would read these packages for half of its time.
SETTINGS = """
[mypy]
[mypy-jaxlib.*,optax.*,orbax.*,tensorstore.*,absl.*]
follow_imports = skip
"""


@pytest.mark.slow
def test_mypy_names_the_mistakes_of_a_script_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As in an installed package: mypy reads the types only because of py.typed, and the script is
    # not in the directory of the package.
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT)
    Path("script.py").write_text(SCRIPT)
    Path("mypy.ini").write_text(SETTINGS)
    cache = ROOT / ".mypy_cache" / "script"
    flags = ["--strict", "--config-file=mypy.ini", f"--cache-dir={cache}", "--hide-error-context"]
    output, problem, _ = api.run([*flags, "script.py"])
    assert not problem
    errors = re.findall(r"^script\.py:(\d+): error: .*\[(.+)\]$", output, re.MULTILINE)
    lines = enumerate(SCRIPT.splitlines(), start=1)
    expected = [(str(n), line.partition("# error: ")[2]) for n, line in lines if "# error" in line]
    assert errors == expected, output
