"""The ParaGRU cell, a nonlinear recurrence whose steps can be computed at once."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from lstm_jax import ops
from lstm_jax.cells.base import Gates, Inputs, Outputs, Reset, SizedCell, forget_bias
from lstm_jax.ops.gates import HiddenCarry, align

# Newton's method ends when no state has changed by more than this. Its error after a round is about
# the square of that before.
_TOLERANCE = 1e-4


class ParaGRUCell(SizedCell):
    """One step of a ParaGRU (Danieli et al. 2026): a GRU with diagonal recurrent kernels.

        r = sigmoid(x Wr + ar * h + br)         reset gate; ar, az, an are rows of `recurrent_scale`
        z = sigmoid(x Wz + az * h + bz)         update gate
        n = tanh(x Wn + an * (r * h) + bn)      candidate
        h' = (1 - z) * h + z * n

    A unit reads only itself, so the derivative of h' by h is one number a unit. Newton's method
    then solves the equations of all steps at once: each round is a linear recurrence. The paper has
    three rounds; kernels much larger than the initial ones need more, at most one for each step.
    """

    def setup(self) -> None:
        """Declare the parameters; r, z, n are side by side."""
        # Update gates of sigmoid(0) to sigmoid(-4): units keep 2 to 55 steps at first.
        memory = forget_bias(3, jnp.linspace(0.0, -4.0, self.hidden_size))
        self.declare_input_kernel(3, memory)
        uniform = nn.initializers.uniform(1.0)
        self.recurrent_scale = self.param("recurrent_scale", uniform, (3, self.hidden_size))

    def __call__(self, carry: HiddenCarry, inputs: Inputs) -> tuple[HiddenCarry, Outputs]:
        """Return the next carry and the outputs."""
        hidden = _step(carry.hidden, self.project_inputs(inputs), self.recurrent_scale)
        return HiddenCarry(hidden), hidden

    def run_parallel(
        self, carry: HiddenCarry, inputs: Inputs, reset: Reset | None
    ) -> tuple[HiddenCarry, Outputs]:
        """Return the last carry and all outputs.

        Newton's method starts from the steps that read a carry of zeros. One more round, at the
        solution, has the first derivative of the recurrence, but no higher one.
        """
        arrays = carry, self.project_inputs(inputs), self.recurrent_scale
        limit = jnp.maximum(1, jnp.abs(carry.hidden).max())  # Of all states.

        def run_round(
            hidden: jax.Array, carry: HiddenCarry, sums: jax.Array, scale: jax.Array
        ) -> tuple[HiddenCarry, Outputs]:
            """Run h' = a * h + b, which equals a step and its slope at `hidden`."""
            before = jnp.concatenate([carry.hidden[:, None], hidden[:, :-1]], axis=1)
            if reset is not None:
                before = jnp.where(reset[..., None], 0, before)
            before = lax.stop_gradient(before)
            ones = jnp.ones_like(before)
            value, slope = jax.jvp(lambda h: _step(h, sums, scale), (before,), (ones,))
            slope = lax.stop_gradient(slope)
            return ops.linear_scan(slope, value - slope * before, carry, reset=reset)

        def improve(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            hidden, _ = state
            _, after = run_round(hidden, *frozen)
            # Far from the solution, a round may overflow after its first steps.
            after = jnp.clip(jnp.nan_to_num(after), -limit, limit)
            return after, jnp.abs(after - hidden).max()

        frozen = lax.stop_gradient(arrays)
        first = align((_step(jnp.zeros(()), *frozen[1:]), limit))
        hidden, _ = lax.while_loop(lambda state: state[1] > _TOLERANCE, improve, first)
        return run_round(hidden, *arrays)

    def gates(self, carry: HiddenCarry, inputs: Inputs) -> Gates:
        """Return the gates of a step."""
        return _compute_gates(carry.hidden, self.project_inputs(inputs), self.recurrent_scale)


def _compute_gates(hidden: jax.Array, sums: jax.Array, scale: jax.Array) -> Gates:
    """Return the gates for h, x W + b of one or all steps, and the rows ar, az, an."""
    r, z, n = jnp.split(sums, 3, axis=-1)
    scale_r, scale_z, scale_n = jnp.expand_dims(scale, [*range(1, sums.ndim)])
    reset = nn.sigmoid(r + scale_r * hidden)
    candidate = jnp.tanh(n + scale_n * (reset * hidden))
    return {"reset": reset, "update": nn.sigmoid(z + scale_z * hidden), "candidate": candidate}


def _step(hidden: jax.Array, sums: jax.Array, scale: jax.Array) -> jax.Array:
    """Return h' for the arguments of `_compute_gates`."""
    gates = _compute_gates(hidden, sums, scale)
    return hidden + gates["update"] * (gates["candidate"] - hidden)
