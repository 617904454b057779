"""The optimizer and its learning rate, as the `optimizer` fields of a config say."""

import jax
import optax
from ml_collections import ConfigDict

OPTIMIZERS = ("adam", "sgd")
SCHEDULES = ("constant", "cosine", "linear", "step")
# At each step of the schedule "step" the learning rate is multiplied by this.
_STEP_FACTOR = 0.1


def make(optimizer: ConfigDict, total_steps: int) -> optax.GradientTransformation:
    """Clipping by the global norm, then Adam (Kingma & Ba 2015) or SGD with momentum.

    Weight decay is of kernels and the embedding, not of biases. In Adam it is decoupled from the
    gradient (AdamW, Loshchilov & Hutter 2019), in SGD part of it.
    """
    norm, decay = optimizer.max_gradient_norm, optimizer.weight_decay
    # The state has the same structure either way, so that clipping can be changed in a run.
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
    falling = max(total_steps - warmup_steps, 1)
    steps = [round(share * total_steps) - warmup_steps for share in optimizer.step_at]
    after = {
        "constant": optax.constant_schedule(peak),
        "cosine": optax.cosine_decay_schedule(peak, falling),
        "linear": optax.linear_schedule(peak, 0.0, falling),
        "step": optax.piecewise_constant_schedule(peak, {s: _STEP_FACTOR for s in steps}),
    }[optimizer.schedule]
    warmup = optax.linear_schedule(0.0, peak, warmup_steps)
    return optax.join_schedules([warmup, after], [warmup_steps])


def _matrices(params: optax.Params) -> optax.Params:
    return jax.tree.map(lambda array: array.ndim > 1, params)
