"""Define the residual block around a cell, which is itself a cell."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lstm_jax.cells.base import Inputs, Outputs, Reset, run_cell
from lstm_jax.matmul import matmul

_WIDTH = 4  # The kernel size of the convolution.
_EXPANSION = 2  # The ratio of the MLP's hidden units to hidden_size.


class BlockCarry(NamedTuple):
    """The carry of a block."""

    before: Float[Array, "batch 3 hidden"]  # The last inputs of the convolution.
    cell: Any  # The carry of the cell.


class Block(nn.Module):
    """A block with two residual branches, in which recent papers use a cell.

        x = x P                                         only if input_size is not hidden_size
        u_t = sum of K_j * norm(x)_(t - 3 + j) + b      causal convolution of each feature, j = 0..3
        y = x + cell(u)
        outputs = y + (gelu(norm(y) A) * (norm(y) B)) O     gated MLP
        norm(x) = s * x / sqrt(mean(x ** 2) + 1e-6)     RMSNorm, with separate scales s

    The parts are those of Griffin (De et al. 2024), of xLSTM (Beck et al. 2024) and of the language
    models of minGRU and minLSTM (Feng et al. 2024): normalization before each branch (Zhang &
    Sennrich 2019), a convolution over the last 4 inputs, the cell, a gated MLP (Shazeer 2020). But
    this block is simpler, and the same for each cell; docs/cells.md lists what differs. The MLP has
    2 * hidden_size hidden units, and no normalization follows the last block.
    """

    input_size: int
    hidden_size: int
    cell: nn.Module  # With hidden_size inputs and hidden units.
    dtype: str = "float32"

    def setup(self) -> None:
        size, glorot = self.hidden_size, nn.initializers.glorot_uniform()
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        fan_in = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
        if self.input_size != size:
            self.input_kernel = self.param("input_kernel", glorot, (self.input_size, size))
        self.cell_scale = self.param("cell_scale", ones, (size,))
        self.convolution = self.param("convolution", fan_in, (_WIDTH, size))
        self.convolution_bias = self.param("convolution_bias", zeros, (size,))
        self.mlp_scale = self.param("mlp_scale", ones, (size,))
        self.mlp_kernel = self.param("mlp_kernel", glorot, (size, 2 * _EXPANSION * size))
        self.output_kernel = self.param("output_kernel", glorot, (_EXPANSION * size, size))

    def __call__(self, carry: BlockCarry, inputs: Inputs) -> tuple[BlockCarry, Outputs]:
        x, tail, u = self._convolve(carry, inputs[:, None])
        cell, outputs = self.cell(carry.cell, u[:, 0])
        return BlockCarry(tail, cell), self._add_mlp(x[:, 0] + outputs)

    def run_parallel(
        self, carry: BlockCarry, inputs: Inputs, reset: Reset | None
    ) -> tuple[BlockCarry, Outputs]:
        """Return the last carry and all outputs.

        Only a cell without a parallel form runs step by step.
        """
        x, tail, u = self._convolve(carry, inputs, reset)
        cell, outputs = run_cell(self.cell, carry.cell, u, reset=reset)
        return BlockCarry(tail, cell), self._add_mlp(x + outputs)

    def _convolve(
        self, carry: BlockCarry, inputs: Inputs, reset: Reset | None = None
    ) -> tuple[Outputs, Float[Array, "batch 3 hidden"], Outputs]:
        """Return x, the next inputs to keep for the convolution, and u; see the equations."""
        x, time = inputs, inputs.shape[1]
        if self.input_size != self.hidden_size:
            x = matmul(inputs, self.input_kernel, self.dtype)
        signal = jnp.concatenate([carry.before, normalize_rms(x, self.cell_scale)], axis=1)
        parts, tail = [signal[:, j : j + time] for j in range(_WIDTH)], signal[:, time:]
        if reset is not None:  # A step reads inputs of its document, and the rest is zero.
            document = jnp.cumsum(reset, axis=1)
            documents = jnp.pad(document, ((0, 0), (_WIDTH - 1, 0)))
            parts = [
                jnp.where((documents[:, j : j + time] == document)[..., None], part, 0)
                for j, part in enumerate(parts)
            ]
            tail = jnp.where((documents[:, time:] == document[:, -1:])[..., None], tail, 0)
        taps = [part * self.convolution[j, None, None] for j, part in enumerate(parts)]
        return x, tail, sum(taps, self.convolution_bias[None, None])

    def _add_mlp(self, y: Float[Array, "*batch hidden"]) -> Float[Array, "*batch hidden"]:
        """Return y with the gated MLP added, of one or all steps."""
        sums = matmul(normalize_rms(y, self.mlp_scale), self.mlp_kernel, self.dtype)
        gate, value = jnp.split(sums, 2, axis=-1)
        return y + matmul(nn.gelu(gate) * value, self.output_kernel, self.dtype)

    def initial_carry(self, batch_size: int) -> BlockCarry:
        """Return the carry at the start of a text: zeros, and the first carry of the cell."""
        zeros = jnp.zeros((batch_size, _WIDTH - 1, self.hidden_size))
        return BlockCarry(zeros, self.cell.initial_carry(batch_size))


def normalize_rms(
    x: Float[Array, "*batch features"], scale: Float[Array, " features"]
) -> Float[Array, "*batch features"]:
    """Divide by the root mean square over the last axis, and scale (Zhang & Sennrich 2019)."""
    normalized = x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)
    return normalized * jnp.broadcast_to(scale, x.shape)
