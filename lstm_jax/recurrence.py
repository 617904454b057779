"""What `LSTMCell` under a scan computes, faster: the recurrence with a backward pass of its own.

What makes it fast:

- Reverse mode through a scan adds up a gradient of the whole recurrent kernel at every step. Here
  the backward loop yields gradients of the gates only, and the kernel's gradient is one matrix
  product over time and batch after it.
- Inside, arrays are feature-major, [features, batch]: XLA's CPU products are fastest as
  [4 * hidden, features] @ [features, batch].
- Inputs, a constant one (for the bias) and the hidden state are stacked, so that one product a step
  gives all gates.
- The backward loop writes each gate's gradient where that gate's activation was. Fresh memory costs
  more time, in page faults, than all elementwise work does.

`benchmarks/train_step.py` measures it.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import rnn

IMPLEMENTATIONS = ("auto", "scan", "fused", "cudnn")


class Kernels(NamedTuple):
    """Parameters of one layer. Along the last axis stand the gates i, f, g, o, as in `LSTMCell`.

    Attributes:
      input: [features, 4 * hidden].
      recurrent: [hidden, 4 * hidden].
      bias: [4 * hidden].
    """

    input: jax.Array
    recurrent: jax.Array
    bias: jax.Array


class LayerCarry(NamedTuple):
    """What one LSTM layer hands on from step to step.

    Attributes:
      cell: float32 [batch, hidden], the cell state c.
      hidden: float32 [batch, hidden], the hidden state h, which is also the layer's output.
    """

    cell: jax.Array
    hidden: jax.Array


class Lookup(NamedTuple):
    """A first layer's inputs: the rows `ids` of an embedding table.

    Attributes:
      table: [vocabulary, features].
      ids: int32 [batch, time].
    """

    table: jax.Array
    ids: jax.Array

    @property
    def rows(self) -> jax.Array:
        """The inputs themselves, [batch, time, features]."""
        return self.table[self.ids]


def choose(implementation: str, dtype: str, plain: bool = True) -> str:
    """What "auto" stands for; others stand for themselves.

    That is "fused", the fastest that was measured, and "scan" for the cells that only it can run.

    Args:
      implementation: one of `IMPLEMENTATIONS`.
      dtype: what products multiply in.
      plain: whether the layers are LSTMs as `LSTMCell` writes them, without layer normalisation.

    Raises:
      ValueError: for "cudnn" on anything but a GPU, and in bfloat16; and for anything but "scan"
        and "auto" where the layers are not plain.
    """
    if not plain:
        if implementation not in ("auto", "scan"):
            raise ValueError(
                f"the recurrence {implementation!r} runs LSTM cells without layer normalisation "
                "only; 'auto' runs any"
            )
        return "scan"
    if implementation == "cudnn":
        if jax.default_backend() != "gpu":
            raise ValueError("the recurrence 'cudnn' needs a GPU; 'auto' works anywhere")
        if dtype != "float32":
            raise ValueError("the recurrence 'cudnn' computes in float32 only")
    return "fused" if implementation == "auto" else implementation


def fused(
    kernels: Kernels,
    inputs: jax.Array | Lookup,
    carry: LayerCarry,
    dtype: str = "float32",
    rematerialize: int = 0,
) -> tuple[jax.Array, LayerCarry]:
    """Runs one layer over time.

    A lookup in a vocabulary not much larger than the embedding is folded into the recurrence: the
    table is multiplied by the input kernel once, and the step's product picks a row of the result
    by a one-hot input. That saves the input's product at every step and [time, 4 * hidden, batch]
    of memory for what it would give.

    Args:
      kernels: the layer's parameters.
      inputs: [batch, time, features], or the lookup that gives them.
      carry: the state before the first step.
      dtype: what matrix products multiply in; they sum in float32, which all else is in.
      rematerialize: if not 0, keep only the state at every so many steps for the backward pass, and
        compute the steps between anew there. Memory then grows with time / rematerialize +
        rematerialize instead of time: it is least at the square root of time.

    Returns:
      Outputs [batch, time, hidden], and the carry after the last step.
    """
    if isinstance(inputs, Lookup) and len(inputs.table) <= 1.5 * inputs.table.shape[1]:
        # The one-hot takes part in two products of this size, the embedded row in three.
        kernels = kernels._replace(input=product(inputs.table, kernels.input, dtype))
        features = _one_hot(inputs.ids.T, inputs.table)
    else:
        rows = inputs.rows if isinstance(inputs, Lookup) else inputs
        features = rows.transpose(1, 2, 0)
    state = LayerCarry(carry.cell.T, carry.hidden.T)
    outputs, state = _in_chunks(kernels, features, state, dtype, rematerialize)
    return outputs.transpose(2, 0, 1), LayerCarry(state.cell.T, state.hidden.T)


def _one_hot(ids: jax.Array, table: jax.Array) -> jax.Array:
    """[..., batch] → [..., vocabulary, batch]."""
    return jax.nn.one_hot(ids, len(table), axis=-2, dtype=table.dtype)


def project(kernels: Kernels, table: jax.Array, dtype: str) -> jax.Array:
    """What each row of an embedding table adds to the gates: [vocabulary, 4 * hidden]."""
    return product(table, kernels.input, dtype) + kernels.bias


def step(
    kernel: jax.Array, inputs: jax.Array, carry: LayerCarry, added: Any = 0.0
) -> tuple[tuple[jax.Array, ...], LayerCarry]:
    """One step, feature-major.

    Args:
      kernel: [4 * hidden, n], `rounded`.
      inputs: [n, batch], the layer's inputs and the hidden state, stacked, `rounded` too.
      carry: [hidden, batch] each.
      added: [4 * hidden, batch], added to the gates before they are activated.

    Returns:
      The activated gates i, f, g, o, and the next carry.
    """
    i, f, g, o = jnp.split(_multiply(kernel, inputs) + added, 4)
    i, f, g, o = _sigmoid(i), _sigmoid(f), jnp.tanh(g), _sigmoid(o)
    cell = f * carry.cell + i * g
    return (i, f, g, o), LayerCarry(cell, o * jnp.tanh(cell))


def product(a: jax.Array, b: jax.Array, dtype: str) -> jax.Array:
    """A @ b, multiplied in `dtype` and summed in float32; "float32" is the arrays' own dtype."""
    return _multiply(rounded(a, dtype), rounded(b, dtype))


def rounded(x: jax.Array, dtype: str, native: bool = False) -> jax.Array:
    """X as a factor of `product`: what is one many times is best rounded once.

    Args:
      x: any array.
      dtype: what products multiply in.
      native: whether XLA's CPU backend, too, has the products that it will be a factor of.
    """
    if dtype == "float32":
        return x
    if jax.default_backend() == "cpu" and not native:
        # That backend lacks some bfloat16 products and is slow at the others: round to the mantissa
        # of bfloat16 and multiply in float32, which is what other devices compute.
        return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return x.astype(dtype)


def _multiply(a: jax.Array, b: jax.Array) -> jax.Array:
    low = a.dtype == jnp.bfloat16
    return jnp.matmul(a, b, preferred_element_type=jnp.float32 if low else None)


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for products of bfloat16 matrices (AMX, AVX-512)."""
    try:
        features = Path("/proc/cpuinfo").read_text()
        return "amx_bf16" in features or "avx512_bf16" in features
    except OSError:
        return False


def cudnn(
    kernels: Kernels, inputs: jax.Array | Lookup, carry: LayerCarry
) -> tuple[jax.Array, LayerCarry]:
    """`fused` by cuDNN's LSTM, on a GPU, in float32."""
    rows = inputs.rows if isinstance(inputs, Lookup) else inputs
    batch, time, features = rows.shape
    outputs, hidden, cell = rnn.lstm(
        rows,
        carry.hidden[None],
        carry.cell[None],
        cudnn_weights(kernels),
        jnp.full(batch, time, jnp.int32),
        input_size=features,
        hidden_size=carry.hidden.shape[1],
        num_layers=1,
        dropout=0.0,
        bidirectional=False,
    )
    return outputs, LayerCarry(cell[0], hidden[0])


def cudnn_weights(kernels: Kernels) -> jax.Array:
    """The parameters as cuDNN packs them, flat: kernels transposed, and a second bias of zeros."""
    parts = (kernels.input.T, kernels.recurrent.T, kernels.bias, jnp.zeros_like(kernels.bias))
    return jnp.concatenate([part.reshape(-1) for part in parts])


def _in_chunks(
    kernels: Kernels, inputs: jax.Array, carry: LayerCarry, dtype: str, chunk: int
) -> tuple[jax.Array, LayerCarry]:
    """`_recurrence`, of which the backward pass keeps the carry at every chunk only."""
    if not chunk or chunk >= len(inputs):
        return _recurrence(kernels, inputs, carry, dtype)
    recurrence = jax.checkpoint(functools.partial(_recurrence, dtype=dtype))

    def run_chunk(carry: LayerCarry, inputs: jax.Array) -> tuple[LayerCarry, jax.Array]:
        outputs, carry = recurrence(kernels, inputs, carry)
        return carry, outputs

    whole = len(inputs) - len(inputs) % chunk
    chunks = inputs[:whole].reshape(-1, chunk, *inputs.shape[1:])
    carry, outputs = lax.scan(run_chunk, carry, chunks)
    outputs = outputs.reshape(whole, *outputs.shape[2:])
    if whole < len(inputs):
        carry, rest = run_chunk(carry, inputs[whole:])
        outputs = jnp.concatenate([outputs, rest])
    return outputs, carry


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _recurrence(
    kernels: Kernels, inputs: jax.Array, carry: LayerCarry, dtype: str
) -> tuple[jax.Array, LayerCarry]:
    """The whole of one layer, feature-major.

    Args:
      kernels: the layer's parameters.
      inputs: [time, features, batch].
      carry: [hidden, batch] each.
      dtype: what products multiply in.

    Returns:
      Outputs [time, hidden, batch], and the carry.
    """
    (outputs, carry), _ = _recurrence_forward(kernels, inputs, carry, dtype)
    return outputs, carry


def _recurrence_forward(
    kernels: Kernels, inputs: jax.Array, carry: LayerCarry, dtype: str
) -> tuple[tuple[jax.Array, LayerCarry], tuple[Any, ...]]:
    """Also gives what the backward pass needs: gates and cells, [time, hidden, batch] each."""
    low = _rounding(inputs, dtype)
    # Transposed here, not at every step, and each part by itself: what is to be put together and
    # transposed at once, XLA's CPU backend copies several times more slowly.
    parts = kernels.input.T, kernels.bias[:, None], kernels.recurrent.T
    kernel = jnp.concatenate([low(part) for part in parts], axis=1)
    one = jnp.ones_like(inputs[0, :1])

    def scan_step(carry: LayerCarry, x: jax.Array) -> tuple[LayerCarry, tuple[Any, ...]]:
        stacked = jnp.concatenate([low(part) for part in (x, one, carry.hidden)])
        gates, carry = step(kernel, stacked, carry)
        # Stacked as six arrays: concatenating the gates first costs a slow copy at every step.
        return carry, (carry.hidden, carry.cell, gates)

    last, (outputs, cells, gates) = lax.scan(scan_step, carry, inputs)
    return (outputs, last), (kernels, inputs, carry, outputs, cells, gates)


def _recurrence_backward(
    dtype: str, residuals: tuple[Any, ...], cotangents: tuple[jax.Array, LayerCarry]
) -> tuple[Kernels, jax.Array, LayerCarry]:
    kernels, inputs, first, outputs, cells, gates = residuals
    d_outputs, d_last = cotangents
    steps, features, _ = inputs.shape
    low = _rounding(inputs, dtype)
    recurrent_kernel = low(kernels.recurrent)

    def loop_step(k: jax.Array, state: tuple[Any, ...]) -> tuple[Any, ...]:
        gates, d_gates, d_cell, d_hidden = state
        t = steps - 1 - k
        # Gradients go into the gates' own memory, one step late: written before the next gates are
        # read from the result, XLA sees that it needs no copy. (The first write falls on step T,
        # which is clamped to T - 1, where what it writes came from.)
        gates = tuple(_put(x, d, t + 1) for x, d in zip(gates, d_gates, strict=True))
        i, f, g, o = (_at(gate, t) for gate in gates)
        previous_cell = jnp.where(t == 0, first.cell, _at(cells, jnp.maximum(t - 1, 0)))
        tanh_cell = jnp.tanh(_at(cells, t))
        d_hidden = d_hidden + _at(d_outputs, t)
        d_cell = d_cell + d_hidden * o * (1 - tanh_cell**2)
        d_gates = (
            d_cell * g * i * (1 - i),
            d_cell * previous_cell * f * (1 - f),
            d_cell * i * (1 - g**2),
            d_hidden * tanh_cell * o * (1 - o),
        )
        stacked = jnp.concatenate([low(d) for d in d_gates])
        return gates, d_gates, d_cell * f, _multiply(recurrent_kernel, stacked)

    state = (gates, tuple(gate[-1] for gate in gates), d_last.cell, d_last.hidden)
    gates, d_gates, d_cell, d_hidden = lax.fori_loop(0, steps, loop_step, state)
    pairs = zip(gates, d_gates, strict=True)
    by_gate = [low(_put(gate, d, 0)) for gate, d in pairs]

    previous_hidden = jnp.concatenate([first.hidden[None], outputs[:-1]])
    read = [low(x) for x in (inputs, jnp.ones_like(inputs[:, :1]), previous_hidden)]
    stacked = _flatten(jnp.concatenate(read, axis=1))
    # Time and batch become rows by a copy, for a product without a transposed factor: XLA's CPU
    # backend has fast ones in bfloat16 for those only.
    rows = [d.swapaxes(1, 2).reshape(-1, d.shape[1]) for d in by_gate]
    d_kernel = jnp.concatenate([_multiply(stacked, d) for d in rows], axis=1)
    d_input, d_bias, d_recurrent = jnp.split(d_kernel, [features, features + 1])
    # Where nobody asks for these products, as for one-hot inputs, XLA drops them.
    parts = zip(rows, jnp.split(low(kernels.input.T), 4), strict=True)
    d_inputs = functools.reduce(jnp.add, [_multiply(d, w) for d, w in parts])
    d_inputs = d_inputs.reshape(steps, -1, features).swapaxes(1, 2)
    return Kernels(d_input, d_recurrent, d_bias[0]), d_inputs, LayerCarry(d_cell, d_hidden)


_recurrence.defvjp(_recurrence_forward, _recurrence_backward)


def _rounding(inputs: jax.Array, dtype: str) -> Callable[[jax.Array], jax.Array]:
    """How factors of products are rounded within the recurrence, for inputs as it takes them.

    XLA's CPU backend has no bfloat16 products with a transposed first factor. Here there are none,
    unless the loop is of a single step, which XLA merges with what is around it, or the batch of
    a single text, for which copies that transpose are none.
    """
    steps, _, batch = inputs.shape
    native = multiplies_bfloat16() and steps > 1 and batch > 1
    return lambda x: rounded(x, dtype, native)


def _sigmoid(x: jax.Array) -> jax.Array:
    """On XLA's CPU backend faster than the exponential and the division of `jax.nn.sigmoid`."""
    return 0.5 * jnp.tanh(0.5 * x) + 0.5


def _at(x: jax.Array, t: jax.Array) -> jax.Array:
    return lax.dynamic_index_in_dim(x, t, keepdims=False)


def _put(x: jax.Array, value: jax.Array, t: jax.Array | int) -> jax.Array:
    return lax.dynamic_update_index_in_dim(x, value, t, axis=0)


def _flatten(x: jax.Array) -> jax.Array:
    """[time, features, batch] → [features, time * batch]."""
    return x.swapaxes(0, 1).reshape(x.shape[1], -1)
