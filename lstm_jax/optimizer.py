"""Make the optimizer and its learning rate from the `optimizer` fields of a config."""

import functools
from typing import Any

import jax
import optax
from optax import contrib

from lstm_jax.config import OptimizerConfig, OptimizerName, Schedule

# Parameters whose rows are vectors of their own: weights of gates, taps of a convolution.
_VECTORS = "/peepholes", "/convolution"


def make_optimizer(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """Make Adam (Kingma & Ba 2015), Muon or SGD, after clipping by the global norm.

    Weight decay applies to kernels and embeddings, see `_is_matrix`. It is decoupled from the
    gradient and multiplied by the learning rate (Loshchilov & Hutter 2019), except in SGD, where it
    is added to the gradient.

    Muon (Jordan et al. 2024), with Nesterov's momentum, is for the matrices of recurrent layers,
    with Adam for the rest. Its updates are scaled to the root mean square of Adam's (Liu et al.
    2025, "Muon is Scalable for LLM Training"), so that both use one learning rate and weight decay.
    """
    decay: dict[str, Any] = {"weight_decay": config.weight_decay}
    learning_rate, momentum = make_schedule(config, total_steps), config.momentum
    settings = learning_rate, config.b1, config.b2, config.epsilon
    mask = functools.partial(jax.tree_util.tree_map_with_path, _is_matrix)
    labels = functools.partial(jax.tree_util.tree_map_with_path, _name_optimizer)
    adam = optax.adamw(*settings, **decay, mask=mask)
    muon = contrib.muon(learning_rate, beta=momentum, consistent_rms=0.2, **decay)
    sgd = optax.sgd(learning_rate, momentum)
    transformations: dict[OptimizerName, list[optax.GradientTransformation]] = {
        "adam": [adam],
        "muon": [optax.partition({"muon": muon, "adam": adam}, labels)],
        "sgd": [optax.add_decayed_weights(**decay, mask=mask), sgd],
    }
    norm = config.max_gradient_norm
    # The state has the same structure either way, so that a resumed run may change the norm.
    clip = optax.clip_by_global_norm(norm) if norm else optax.identity()
    return optax.chain(clip, *transformations[config.name])


def make_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Make the learning rate as a function of the step: linear warm-up, then `schedule`."""
    peak, warmup_steps = config.learning_rate, config.warmup_steps
    decay_steps = max(total_steps - warmup_steps, 1)
    schedules: dict[Schedule, optax.Schedule] = {
        "constant": optax.constant_schedule(peak),
        "cosine": optax.cosine_decay_schedule(peak, decay_steps),
        "linear": optax.linear_schedule(peak, 0.0, decay_steps),
    }
    warmup = optax.linear_schedule(0.0, peak, warmup_steps)
    return optax.join_schedules([warmup, schedules[config.schedule]], [warmup_steps])


def _is_matrix(path: Any, array: jax.Array) -> bool:
    """Return whether a parameter has two axes or more, and is not one of `_VECTORS`."""
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return array.ndim > 1 and not name.endswith(_VECTORS)


def _name_optimizer(path: Any, array: jax.Array) -> OptimizerName:
    """Return "muon" for a matrix of a recurrent layer, otherwise "adam"."""
    is_other = array.ndim != 2 or path[0].key in ("embedding", "dense")
    return "adam" if is_other or not _is_matrix(path, array) else "muon"
