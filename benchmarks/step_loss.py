"""Measure how the dtype of generation affects the predictions of a trained model.

    python benchmarks/step_loss.py --workdir runs/quick

Read the first --length tokens of 64 parts of the validation text, one by one, as generation reads
its own text. Print, in nats per token, the loss and the Kullback-Leibler divergence of the
predictions in each dtype from those in float32. int8 needs the library in C, with VNNI.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from frame import parse_flags, print_head, print_row
from lstm_jax import generation
from lstm_jax.data import texts
from lstm_jax.run import workdir

PARTS = 64


def main() -> None:
    """Read the text in each dtype; print a row of the table after each."""
    options = parse_flags(__doc__, workdir=Path, length=600)
    text = texts.read_splits(workdir.load_config(options.workdir).data)["validation"]
    ids = workdir.load_vocabulary(options.workdir).encode(text)
    ids = np.asarray(ids[: len(ids) // PARTS * PARTS]).reshape(PARTS, -1)[:, : options.length]
    print_head("", "loss", "divergence from float32")
    exact = None
    for dtype in ("float32", "bfloat16", "int8"):
        logs = predict(workdir.load_trained(options.workdir, dtype), ids)
        exact = logs if exact is None else exact
        loss = -np.take_along_axis(logs[:-1], ids.T[1:, :, None], axis=2).mean(dtype=np.float64)
        divergence = (np.exp(exact) * (exact - logs)).sum(axis=2).mean(dtype=np.float64)
        print_row(dtype, f"{loss:.4f}", f"{divergence:.1e}")


def predict(trained: workdir.Trained, ids: np.ndarray) -> np.ndarray:
    """Return the log-probabilities after each of ids [parts, time]: [time, parts, vocabulary]."""
    model = trained.model
    arrays = generation.prepare_params(model, trained.params)

    def step(carry: Any, token: jax.Array) -> tuple[Any, jax.Array]:
        logits, carry = model.apply_step(arrays, token, carry)
        return carry, jax.nn.log_softmax(logits)

    _, log_probabilities = jax.lax.scan(step, model.initial_carry(len(ids)), jnp.asarray(ids.T))
    return np.asarray(log_probabilities)


if __name__ == "__main__":
    main()
