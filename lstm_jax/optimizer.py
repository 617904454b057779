"""The optimizer and its learning rate, as the `optimizer` fields of a config say."""

import math

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

OPTIMIZERS = ("adam", "sgd")
SCHEDULES = ("constant", "cosine", "linear", "step")
# At each step of the schedule "step" the learning rate is multiplied by this.
_STEP_FACTOR = 0.1


def make_optimizer(optimizer: ConfigDict, total_steps: int) -> optax.GradientTransformation:
    """Clipping by the global norm, then Adam (Kingma & Ba 2015) or SGD with momentum.

    Weight decay is of kernels and the embedding, not of biases. In Adam it is decoupled from the
    gradient (AdamW, Loshchilov & Hutter 2019), in SGD part of it.

    All of the fields but the name may be arrays, so that one compiled program serves many of their
    values; the schedule is then its index in `SCHEDULES`.
    """
    norm, decay = optimizer.max_gradient_norm, optimizer.weight_decay
    # The state has the same structure either way, so that clipping can be changed in a run.
    if isinstance(norm, jax.Array):
        clip = optax.clip_by_global_norm(jnp.where(norm > 0, norm, jnp.inf))
    else:
        clip = optax.clip_by_global_norm(norm) if norm else optax.identity()
    learning_rate = make_schedule(optimizer, total_steps)
    if optimizer.name == "sgd":
        decayed = optax.add_decayed_weights(decay, mask=_matrices)
        momentum = optax.sgd(learning_rate, momentum=optimizer.momentum)
        return optax.chain(clip, decayed, momentum)
    return optax.chain(clip, optax.adamw(learning_rate, weight_decay=decay, mask=_matrices))


def make_schedule(optimizer: ConfigDict, total_steps: int) -> optax.Schedule:
    """The learning rate at each step: warm-up from zero, then what `schedule` names."""
    peak, warmup_steps = optimizer.learning_rate, optimizer.warmup_steps
    falling = jnp.maximum(total_steps - warmup_steps, 1)

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        after = jnp.clip(jnp.asarray(count) - warmup_steps, 0, falling)
        drops = [
            jnp.where(count >= round(s * total_steps), _STEP_FACTOR, 1) for s in optimizer.step_at
        ]
        shapes = {
            "constant": peak,
            "cosine": peak * (0.5 * (1 + jnp.cos(jnp.pi * after / falling))),
            "linear": peak * (1 - after / falling),
            "step": peak * math.prod(drops),
        }
        if isinstance(optimizer.schedule, str):
            falls = shapes[optimizer.schedule]
        else:
            falls = jnp.stack([jnp.asarray(shapes[name]) for name in SCHEDULES])[optimizer.schedule]
        rises = peak - peak * (1 - count / jnp.maximum(warmup_steps, 1))
        return jnp.where(count < warmup_steps, rises, falls)

    return schedule


def _matrices(params: optax.Params) -> optax.Params:
    return jax.tree.map(lambda array: array.ndim > 1, params)
