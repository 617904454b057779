"""Run the recurrence of `LSTMCell` with a custom VJP: the same results as a scan, faster.

It is fast for these reasons:

- Reverse-mode differentiation of a scan accumulates the gradient of the whole recurrent kernel at
  every step. Here the backward loop computes gradients of the gates only, and one matmul for each
  gate, over time and batch, then computes the gradient of the kernel.
- Arrays are feature-major, [features, batch]: XLA's CPU matmuls are fastest as
  [4 * hidden, features] @ [features, batch].
- Inputs, a row of ones (for the bias) and the hidden state are stacked, so that one matmul a step
  computes all gates.
- The backward loop writes the gradient of each gate into the memory of its activation. Page faults
  of newly allocated memory would take longer than all elementwise operations.

`benchmarks/train_step.py` measures the speed.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lstm_jax.cells.lstm import Kernels, LSTMCarry
from lstm_jax.config import is_plain_lstm
from lstm_jax.matmul import matmul, matmul_rounded, round_factor
from lstm_jax.ops import accelerator, choice, in_c
from lstm_jax.ops.accelerator import Steps, clear
from lstm_jax.ops.gates import LSTM
from lstm_jax.ops.in_c import Int8Kernel
from lstm_jax.ops.processor import is_faster_in_bfloat16


class Lookup(NamedTuple):
    """The inputs of a first layer: the rows `ids` of an embedding table."""

    table: jax.Array  # [vocabulary, features].
    ids: jax.Array  # Int32 [batch, time].


def get_rows(inputs: jax.Array | Lookup) -> jax.Array:
    """Return inputs as an array [batch, time, features]."""
    return inputs.table[inputs.ids] if isinstance(inputs, Lookup) else inputs


def run_fused(
    kernels: Kernels,
    inputs: jax.Array | Lookup,
    carry: LSTMCarry,
    dtype: str = "float32",
    rematerialize: int = 0,
    in_pallas: bool = False,
    starts: jax.Array | None = None,
) -> tuple[jax.Array, LSTMCarry]:
    """Run one LSTM layer over time; return outputs [batch, time, hidden] and the last carry.

    Inputs are [batch, time, features], or the lookup that they come from. A lookup in a vocabulary
    not much larger than the embedding is folded into the recurrence: the table is multiplied by the
    input kernel once, and the matmul of a step selects a row of the result by a one-hot input. So
    the backward pass needs no matmul for the gradient of the inputs.

    If `rematerialize` is not 0, the forward pass stores the state only every `rematerialize` steps,
    and the backward pass recomputes the steps between. Memory then grows with time / rematerialize
    + rematerialize instead of time, and is smallest at the square root of time.

    With `in_pallas`, the loops run in Pallas kernels, on a TPU. Steps where `starts`, bool
    [batch, time], is true read a carry of zeros; in Pallas there are none.
    """
    if isinstance(inputs, Lookup) and len(inputs.table) <= 1.5 * inputs.table.shape[1]:
        # The one-hot input needs two matmuls of this size, the embedded row three.
        kernels = kernels._replace(input=matmul(inputs.table, kernels.input, dtype))
        rows = jax.nn.one_hot(inputs.ids, len(inputs.table), dtype=inputs.table.dtype)
    else:
        rows = get_rows(inputs)
    batch_size, hidden_size = carry.cell.shape
    in_float32 = rows.dtype == carry.cell.dtype == jnp.float32
    starts = None if starts is None else starts.T
    recurrence: Callable[..., tuple[jax.Array, LSTMCarry]] | None = None
    if jax.default_backend() != "cpu":
        loops = accelerator.LOOPS
        if in_pallas:
            from lstm_jax.ops import pallas  # Importing it takes a while.

            loops = pallas.LOOPS
        recurrence = functools.partial(accelerator.run_recurrence, dtype=dtype, loops=loops)
    elif in_float32 and choice.runs_in_c("windows", dtype, hidden_size, batch_size):
        recurrence = functools.partial(in_c.run_recurrence, dtype=dtype)
    if recurrence:
        steps = rows.swapaxes(0, 1), starts
        outputs, carry = _in_chunks(recurrence, kernels, steps, carry, rematerialize)
        return outputs.swapaxes(0, 1), carry
    recurrence = functools.partial(_recurrence, dtype=dtype)
    steps, state = (rows.transpose(1, 2, 0), starts), LSTMCarry(carry.cell.T, carry.hidden.T)
    outputs, state = _in_chunks(recurrence, kernels, steps, state, rematerialize)
    return outputs.transpose(2, 0, 1), LSTMCarry(state.cell.T, state.hidden.T)


def supports_int8(model: Any) -> bool:
    """Return whether the steps of a `LanguageModel` can multiply in 8 bits here."""
    return is_plain_lstm(model) and all(
        choice.runs_in_c("steps", "int8", size) for size in model.sizes[1:]
    )


class StepArrays(NamedTuple):
    """The parameters of a model of LSTM layers, prepared for `apply_step`, with kernels rounded."""

    tokens: jax.Array  # Each token's term in the first layer's gates, [vocabulary, 4 * hidden].
    # [4 * hidden, inputs + hidden], or as the library packs it; for the first layer, no inputs.
    kernels: list[jax.Array | Int8Kernel]
    biases: list[jax.Array]  # Of each layer but the first, [1, 4 * hidden].
    head: jax.Array  # The dense layer's kernel, [vocabulary, hidden].
    head_bias: jax.Array  # [vocabulary].


def prepare_step(model: Any) -> StepArrays:
    """Precompute what is the same at every step, from all parameters of a bound `LanguageModel`.

    If its steps multiply in 8 bits (`int8_steps`), `supports_int8` must allow it.
    """
    first, *others = [cell.kernels() for cell in model.layers]
    kernels = [first.recurrent, *(jnp.concatenate([k.input, k.recurrent]) for k in others)]
    table, head_bias, dtype = model.embedding.embedding, model.dense.bias, model.dtype
    terms = [matmul(table, first.input, dtype, first.bias), *(k.bias[None] for k in others)]
    if model.int8_steps:
        # Outputs are within ±1. With skip connections, layer i reads the sum of i outputs.
        bounds = [max(i, 1) if model.skip_connections else 1 for i in range(len(kernels))]
        quantized = map(functools.partial(in_c.quantize_gates, LSTM), kernels, bounds)
        packed, offsets = map(list, zip(*quantized, strict=True))
        terms = [term + offset[None] for term, offset in zip(terms, offsets, strict=True)]
        # A byte can't be NaN: parameters that are not finite must reach the logits in another way.
        head_bias += 0 * sum(term.sum() for term in terms)
    else:
        packed = [_prepare_kernel(kernel, dtype) for kernel in kernels]
    head = round_factor(model.head_kernel().T, dtype)
    return StepArrays(terms[0], packed, terms[1:], head, head_bias)


def _prepare_kernel(kernel: jax.Array, dtype: str) -> jax.Array:
    depth, width = kernel.shape
    fits = kernel.dtype == jnp.float32 and depth % in_c.NUMBERS_IN_WORD[dtype] == 0
    if fits and choice.runs_in_c("steps", dtype, width // 4):
        return in_c.pack_gates(LSTM, kernel.astype(dtype))
    return round_factor(kernel.T, dtype)


def apply_step(
    model: Any, arrays: StepArrays, ids: jax.Array, carry: Sequence[Any]
) -> tuple[jax.Array, tuple[LSTMCarry, ...]]:
    """Run a `LanguageModel` over one token of each text; see its method `apply_step`."""
    added = [arrays.tokens[ids], *arrays.biases]
    states: list[LSTMCarry] = []
    below: list[jax.Array] = []  # The outputs of the layer below, if there is one.
    for kernel, before, term in zip(arrays.kernels, carry, added, strict=True):
        inputs = [*below, before.hidden]
        if isinstance(kernel, Int8Kernel) or kernel.ndim == 5:
            states.append(in_c.run_step(LSTM, kernel, inputs, before, term))
        else:
            columns = round_factor(jnp.concatenate([x.T for x in inputs]), model.dtype)
            _, after = _step(kernel, columns, LSTMCarry(before.cell.T, before.hidden.T), term.T)
            states.append(LSTMCarry(after.cell.T, after.hidden.T))
        hidden = states[-1].hidden
        below = [sum(below, hidden) if model.skip_connections else hidden]
    logits = matmul(arrays.head, below[0].T, model.dtype).T + arrays.head_bias[None]
    return logits, tuple(states)


def _step(
    kernel: jax.Array, inputs: jax.Array, carry: LSTMCarry, added: jax.Array | float = 0.0
) -> tuple[tuple[jax.Array, ...], LSTMCarry]:
    """Compute one step, feature-major; return the activated gates i, f, g, o and the next carry.

    Inputs [n, batch] are the layer's inputs and the hidden state, stacked. They and the kernel
    [4 * hidden, n] are rounded by `round_factor`. `added` [4 * hidden, batch] is added to the gates
    before their activation.
    """
    i, f, g, o = jnp.split(_multiply(kernel, inputs) + added, 4)
    i, f, g, o = _sigmoid(i), _sigmoid(f), jnp.tanh(g), _sigmoid(o)
    cell = f * carry.cell + i * g
    return (i, f, g, o), LSTMCarry(cell, o * jnp.tanh(cell))


def _in_chunks(
    recurrence: Callable[..., tuple[jax.Array, LSTMCarry]],
    kernels: Kernels,
    steps: Steps,
    carry: LSTMCarry,
    chunk: int,
) -> tuple[jax.Array, LSTMCarry]:
    """Run a recurrence in chunks; the backward pass keeps only the carries between them."""
    time = len(steps[0])
    if not chunk or chunk >= time:
        return recurrence(kernels, steps, carry)
    recurrence = jax.checkpoint(recurrence)

    def run_chunk(carry: LSTMCarry, steps: Steps) -> tuple[LSTMCarry, jax.Array]:
        outputs, carry = recurrence(kernels, steps, carry)
        return carry, outputs

    whole = time - time % chunk
    chunks = jax.tree.map(lambda x: x[:whole].reshape(-1, chunk, *x.shape[1:]), steps)
    carry, outputs = lax.scan(run_chunk, carry, chunks)
    outputs = outputs.reshape(whole, *outputs.shape[2:])
    if whole < time:
        carry, rest = run_chunk(carry, jax.tree.map(lambda x: x[whole:], steps))
        outputs = jnp.concatenate([outputs, rest])
    return outputs, carry


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _recurrence(
    kernels: Kernels, steps: Steps, carry: LSTMCarry, dtype: str
) -> tuple[jax.Array, LSTMCarry]:
    """Run one layer, feature-major: [time, features, batch] → [time, hidden, batch], and the carry.

    The carry is [hidden, batch] before and after.
    """
    return _recurrence_forward(kernels, steps, carry, dtype)[0]


# The kernels, the first carry, and of all steps the starts, columns, cell states and gates.
_Residuals = tuple[Kernels, LSTMCarry, Any, jax.Array, jax.Array, tuple[jax.Array, ...]]


def _recurrence_forward(
    kernels: Kernels, steps: Steps, carry: LSTMCarry, dtype: str
) -> tuple[tuple[jax.Array, LSTMCarry], _Residuals]:
    """Run `_recurrence`; also return the residuals, among them gates, [time, hidden, batch].

    `columns` [features + 1 + hidden, time * batch] are the factors of the matmuls of all steps.
    They are written step by step, because XLA's CPU backend is slow at transposing them later.
    """
    inputs, starts = steps
    low = _rounding(inputs, dtype)
    # Transpose here, not at every step, and each part separately: XLA's CPU backend is several
    # times slower when it concatenates and transposes in one copy.
    parts = kernels.input.T, kernels.bias[:, None], kernels.recurrent.T
    kernel = jnp.concatenate([low(part) for part in parts], axis=1)
    time, _, batch = inputs.shape
    one = jnp.ones_like(inputs[0, :1])
    # Not in bfloat16: the backend can't write a slice of such an array in place.
    columns = jnp.zeros((kernel.shape[1], time * batch), jnp.promote_types(kernel.dtype, "float32"))

    def scan_step(
        state: tuple[LSTMCarry, jax.Array], read: tuple[Any, ...]
    ) -> tuple[tuple[LSTMCarry, jax.Array], tuple[Any, ...]]:
        (carry, columns), (t, x, start) = state, read
        carry = LSTMCarry(*(clear(part, start, axis=0) for part in carry))
        stacked = jnp.concatenate([low(part) for part in (x, one, carry.hidden)])
        columns = lax.dynamic_update_slice(columns, stacked.astype(columns.dtype), (0, t * batch))
        gates, carry = _step(kernel, stacked, carry)
        # The scan stacks six arrays: to concatenate the gates would be a slow copy at every step.
        return (carry, columns), (carry.hidden, carry.cell, gates)

    state, read = (carry, columns), (jnp.arange(time), inputs, starts)
    (last, columns), (outputs, cells, gates) = lax.scan(scan_step, state, read)
    return (outputs, last), (kernels, carry, starts, columns, cells, gates)


def _recurrence_backward(
    dtype: str, residuals: _Residuals, cotangents: tuple[jax.Array, LSTMCarry]
) -> tuple[Kernels, tuple[jax.Array, None], LSTMCarry]:
    kernels, first, starts, columns, cells, gates = residuals
    d_outputs, d_last = cotangents
    steps, features = len(cells), len(kernels.input)
    low = _rounding(cells, dtype)
    recurrent_kernel = low(kernels.recurrent)

    def loop_step(k: jax.Array, state: tuple[Any, ...]) -> tuple[Any, ...]:
        gates, d_gates, d_cell, d_hidden = state
        t = steps - 1 - k
        start = None if starts is None else _at(starts, t)
        # Write the gradients into the memory of the gates one step late, before the next gates are
        # read, so that XLA needs no copy. (The first write, at step T, is clamped to T - 1, where
        # its values came from.)
        gates = tuple(_put(x, d, t + 1) for x, d in zip(gates, d_gates, strict=True))
        i, f, g, o = (_at(gate, t) for gate in gates)
        previous_cell = jnp.where(t == 0, first.cell, _at(cells, jnp.maximum(t - 1, 0)))
        previous_cell = clear(previous_cell, start, axis=0)
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
        d_state = d_cell * f, matmul_rounded(recurrent_kernel, stacked)
        return gates, d_gates, *(clear(d, start, axis=0) for d in d_state)

    state = gates, tuple(gate[-1] for gate in gates), d_last.cell, d_last.hidden
    gates, d_gates, d_cell, d_hidden = lax.fori_loop(0, steps, loop_step, state)
    d_gates = [low(_put(gate, d, 0)) for gate, d in zip(gates, d_gates, strict=True)]

    # Copy the gradients to rows of time and batch: only matmuls without a transposed factor are
    # fast in bfloat16 on XLA's CPU backend.
    rows = [d.swapaxes(1, 2).reshape(-1, d.shape[1]) for d in d_gates]
    d_kernel = jnp.concatenate([matmul_rounded(low(columns), d) for d in rows], axis=1)
    d_input, d_bias, d_recurrent = jnp.split(d_kernel, [features, features + 1])
    # XLA removes these matmuls if their result is unused, as for one-hot inputs.
    pairs = zip(rows, jnp.split(low(kernels.input.T), 4), strict=True)
    d_inputs = functools.reduce(jnp.add, [matmul_rounded(d, w) for d, w in pairs])
    d_inputs = d_inputs.reshape(steps, -1, features).swapaxes(1, 2)
    d_kernels = Kernels(d_input, d_recurrent, d_bias[0])
    return d_kernels, (d_inputs, None), LSTMCarry(d_cell, d_hidden)


_recurrence.defvjp(_recurrence_forward, _recurrence_backward)


def _rounding(inputs: jax.Array, dtype: str) -> Callable[[jax.Array], jax.Array]:
    """Return the function that rounds factors in the recurrence over `inputs`.

    They are multiplied in bfloat16 where that is faster. XLA's CPU backend has no bfloat16 matmuls
    with a transposed first factor. There are none here, unless the loop has a single step, which
    XLA fuses with the code around it, or the batch has a single text, for which XLA removes the
    transposing copies.
    """
    steps, _, batch = inputs.shape
    native = is_faster_in_bfloat16() and steps > 1 and batch > 1
    return lambda x: round_factor(x, dtype, native)


def _multiply(kernel: jax.Array, columns: jax.Array) -> jax.Array:
    """Return kernel [m, n] @ columns [n, batch].

    Since JAX 0.12, XLA's CPU backend takes twice as long as before for a matmul with one column. An
    explicit sum of products is faster there.
    """
    is_slow = columns.shape[1] == 1 and jax.__version_info__ >= (0, 12)
    if is_slow and jax.default_backend() == "cpu" and kernel.dtype == jnp.float32:
        return (kernel * columns.T).sum(axis=1, keepdims=True)
    return matmul_rounded(kernel, columns)


def _sigmoid(x: jax.Array) -> jax.Array:
    """Compute `jax.nn.sigmoid`, faster on XLA's CPU backend: no exponential and no division."""
    return 0.5 * jnp.tanh(0.5 * x) + 0.5


def _at(x: jax.Array, t: jax.Array) -> jax.Array:
    return lax.dynamic_index_in_dim(x, t, keepdims=False)


def _put(x: jax.Array, value: jax.Array, t: jax.Array | int) -> jax.Array:
    return lax.dynamic_update_index_in_dim(x, value, t, axis=0)
