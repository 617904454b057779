"""The optimizer and its learning rate, from the `optimizer` fields of a config."""

import math

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

SCHEDULES = ("constant", "cosine", "linear", "step")

# The schedule "step" multiplies the learning rate by this at each of `step_at`.
_STEP_FACTOR = 0.1


def make_optimizer(optimizer: ConfigDict, total_steps: int) -> optax.GradientTransformation:
    """Make Adam (Kingma & Ba 2015) or SGD with momentum, after clipping by the global norm.

    Weight decay applies to kernels and the embedding, not to biases. In Adam it is decoupled from
    the gradient (AdamW, Loshchilov & Hutter 2019); in SGD it is added to the gradient.

    Every field but the name may be an array, so that one compiled program serves many values. A
    schedule is then an index into `SCHEDULES`.
    """
    norm = optimizer.max_gradient_norm
    # The state has the same structure either way, so that a resumed run may change the norm.
    if isinstance(norm, jax.Array):
        clip = optax.clip_by_global_norm(jnp.where(norm > 0, norm, jnp.inf))
    else:
        clip = optax.clip_by_global_norm(norm) if norm else optax.identity()
    make = OPTIMIZERS[optimizer.name]
    return optax.chain(clip, *make(optimizer, make_schedule(optimizer, total_steps)))


def _make_adam(
    optimizer: ConfigDict, learning_rate: optax.Schedule
) -> list[optax.GradientTransformation]:
    return [optax.adamw(learning_rate, weight_decay=optimizer.weight_decay, mask=_is_matrix)]


def _make_sgd(
    optimizer: ConfigDict, learning_rate: optax.Schedule
) -> list[optax.GradientTransformation]:
    decay = optax.add_decayed_weights(optimizer.weight_decay, mask=_is_matrix)
    return [decay, optax.sgd(learning_rate, optimizer.momentum)]


# The values of the config field `optimizer.name`, and what follows the clipping of gradients.
OPTIMIZERS = {"adam": _make_adam, "sgd": _make_sgd}


def make_schedule(optimizer: ConfigDict, total_steps: int) -> optax.Schedule:
    """Make the learning rate as a function of the step: linear warm-up, then `schedule`.

    Optax's schedules branch in Python on the number of steps. This one has array operations only,
    so that `warmup_steps` and the schedule itself may be arrays in a population.
    """
    peak, warmup_steps = optimizer.learning_rate, optimizer.warmup_steps
    decay_steps = jnp.maximum(total_steps - warmup_steps, 1)

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        after = jnp.clip(jnp.asarray(count) - warmup_steps, 0, decay_steps)
        drops = [
            jnp.where(count >= round(share * total_steps), _STEP_FACTOR, 1)
            for share in optimizer.step_at
        ]
        rates = {
            "constant": peak,
            "cosine": peak * (0.5 * (1 + jnp.cos(jnp.pi * after / decay_steps))),
            "linear": peak * (1 - after / decay_steps),
            "step": peak * math.prod(drops),
        }
        if isinstance(optimizer.schedule, str):
            rate = rates[optimizer.schedule]
        else:
            rate = jnp.stack([jnp.asarray(rates[name]) for name in SCHEDULES])[optimizer.schedule]
        warmup = peak - peak * (1 - count / jnp.maximum(warmup_steps, 1))
        return jnp.where(count < warmup_steps, warmup, rate)

    return schedule


def _is_matrix(params: optax.Params) -> optax.Params:
    return jax.tree.map(lambda array: array.ndim > 1, params)
