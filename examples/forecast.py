"""Forecast the number of sunspots of the next year, and compare with simpler forecasts.

    python examples/forecast.py --steps 100

The data are the yearly numbers of 1700 to 2008 in the package statsmodels. The last 60 years are
held out: nothing was fitted to them, and the settings were chosen with `--until 249`, which omits
them. An LSTM reads all years before and predicts the difference to the next; its forecast is the
mean of several seeds. The naive forecast is the number of this year; the autoregression is a linear
function of the last nine years.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from statsmodels.datasets import sunspots

from lstm_jax import ops

HELD_OUT, LAGS, HIDDEN = 60, 9, 16


def predict(params: dict[str, Any], series: jax.Array) -> jax.Array:
    """Return the forecast after each year of a series [years] but the first, [years - 1]."""
    inputs = jnp.stack([series[1:], jnp.diff(series)], axis=-1)[None]
    _, outputs = ops.lstm(params["lstm"], inputs)
    return series[1:] + outputs[0] @ params["head"]


def fit(key: jax.Array, series: jax.Array, steps: int) -> dict[str, Any]:
    """Fit an LSTM to a series, and return its parameters."""
    keys = jax.random.split(key)
    head = 0.1 * jax.random.normal(keys[1], (HIDDEN,))
    params = {"lstm": ops.LSTMParams.init(keys[0], 2, HIDDEN), "head": head}
    optimizer = optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(3e-3, weight_decay=0.1))

    def compute_loss(params: dict[str, Any]) -> jax.Array:
        errors = predict(params, series)[:-1] - series[2:]
        return (errors[LAGS:] ** 2).mean()

    def step(state: Any, _: None) -> tuple[Any, None]:
        params, opt_state = state
        grads = jax.grad(compute_loss)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    return jax.lax.scan(step, (params, optimizer.init(params)), length=steps)[0][0]


def fit_autoregression(series: np.ndarray, end: int) -> np.ndarray:
    """Return forecasts of the years from LAGS on, with weights fitted to the years before `end`."""
    windows = np.lib.stride_tricks.sliding_window_view(series, LAGS)[:-1]
    rows = np.append(windows, np.ones((len(windows), 1)), axis=1)
    weights = np.linalg.lstsq(rows[: end - LAGS], series[LAGS:end])[0]
    return rows @ weights


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--until", type=int, help="omit all years after the first N", metavar="N")
    arguments = parser.parse_args()
    numbers = sunspots.load_pandas().endog.to_numpy(np.float32)[: arguments.until]
    end = len(numbers) - HELD_OUT
    scale = np.sqrt(numbers[:end]).std()
    series = np.sqrt(numbers) / scale  # Errors grow with the number.
    keys = jax.random.split(jax.random.key(0), arguments.seeds)
    params = jax.vmap(lambda key: fit(key, jnp.asarray(series[:end]), arguments.steps))(keys)
    ours = jax.vmap(predict, (0, None))(params, jnp.asarray(series)).mean(axis=0)[:-1]
    for name, forecast in (
        ("naive", series[:-1]),
        ("autoregression", fit_autoregression(series, end)),
        ("LSTM", np.asarray(ours)),
    ):
        errors = (forecast[-HELD_OUT:] * scale) ** 2 - numbers[-HELD_OUT:]
        print(f"{name}: mean absolute error {np.abs(errors).mean():.1f} sunspots")
