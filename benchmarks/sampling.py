"""Time sampling in this package and in other libraries.

    python benchmarks/sampling.py
    python benchmarks/sampling.py --num_samples 64

Each reads one token, then repeats `--length` times: draw a token other than "" and "[UNK]" from
softmax(logits / temperature), and read it. The other libraries call the step from Python.
`pip install -e '.[bench]'` installs them; a line is printed for each that is missing.
"""

import argparse
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import peers
import side_by_side
from lstm_jax import generation, model
from lstm_jax.generation import Controls
from side_by_side import Make, Work

TEMPERATURE = 0.8
FIRST_ID = 2


def main() -> None:
    """Measure and print the table."""
    options = side_by_side.parse_options(__doc__, num_samples=1, length=1000)
    contestants: dict[str, Make] = {
        "lstm-jax": _lstm_jax,
        "Flax LSTMCell": functools.partial(_peer, peers.MODELS["Flax LSTMCell"]),
        "PyTorch LSTMCell": _torch,
    }
    measurements = side_by_side.measure(contestants, options)
    tokens = options.num_samples * options.length
    side_by_side.print_table(measurements, "tokens/s", lambda x: f"{tokens / x:,.0f}")


def _mask(options: argparse.Namespace) -> np.ndarray:
    """Return a mask to add to logits that excludes "" and "[UNK]": float32 [vocabulary]."""
    mask = np.zeros(options.vocabulary_size, np.float32)
    mask[:2] = -np.inf
    return mask


def _lstm_jax(options: argparse.Namespace) -> Work:
    lstm = model.LanguageModel(
        options.vocabulary_size,
        options.embedding_size,
        options.hidden_size,
        options.num_layers,
        dtype=options.dtype,
    )
    key = jax.random.key(0)
    params = model.init_params(lstm, key)
    prompts = np.full((options.num_samples, 1), FIRST_ID, np.int32)

    def run() -> np.ndarray:
        given = lstm, params, prompts, key, Controls(TEMPERATURE)
        return np.concatenate([*generation.generate_chunks(*given, length=options.length)], axis=1)

    return Work(run, jax.devices()[0].device_kind)


def _peer(make_model: peers.MakeModel, options: argparse.Namespace) -> Work:
    """Return the work of another JAX library: one jitted step called from Python."""
    mask = _mask(options)
    init, apply, carry = make_model(options, options.num_samples)

    @jax.jit
    def step(params: Any, ids: Any, carry: Any, key: Any) -> Any:
        logits, carry = apply(params, ids[:, None], carry)
        key, draw_key = jax.random.split(key)
        logits = logits[:, 0].astype("float32") / TEMPERATURE + mask
        return jax.random.categorical(draw_key, logits), carry, key

    first = jnp.full(options.num_samples, FIRST_ID)
    key = jax.random.key(0)
    params = init(key, first[:, None], carry)

    def run() -> np.ndarray:
        state = first, carry, key
        drawn = []
        for _ in range(options.length):
            state = step(params, *state)
            drawn.append(state[0])
        return np.stack(jax.device_get(drawn), axis=1)

    return Work(run, jax.devices()[0].device_kind)


def _torch(options: argparse.Namespace) -> Work:
    import torch

    device = side_by_side.torch_device()
    embedding = torch.nn.Embedding(options.vocabulary_size, options.embedding_size, device=device)
    dense = torch.nn.Linear(options.hidden_size, options.vocabulary_size, device=device)
    mask = torch.tensor(_mask(options), device=device)
    first = torch.full((options.num_samples,), FIRST_ID, device=device)
    sizes = [options.embedding_size] + [options.hidden_size] * (options.num_layers - 1)
    cells = [torch.nn.LSTMCell(size, options.hidden_size, device=device) for size in sizes]
    # Parameters in this dtype: autocast would convert all of them again for every token.
    for module in (embedding, *cells, dense):
        module.to(getattr(torch, options.dtype))

    @torch.inference_mode()
    def run() -> np.ndarray:
        states: list[Any] = [None] * len(cells)
        ids, drawn = first, []
        for _ in range(options.length):
            hidden = embedding(ids)
            for i, cell in enumerate(cells):
                states[i] = cell(hidden, states[i])
                hidden = states[i][0]
            probabilities = torch.softmax(dense(hidden).float() / TEMPERATURE + mask, dim=-1)
            ids = torch.multinomial(probabilities, 1)[:, 0]
            drawn.append(ids)
        return torch.stack(drawn, dim=1).cpu().numpy()

    return Work(run, device.type)


if __name__ == "__main__":
    main()
