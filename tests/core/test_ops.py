"""Test the public recurrences: numbers, arguments, dtypes, and the transformations of JAX."""

import contextlib
import functools
import os
import re
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import commands
from lstm_jax import ops
from lstm_jax.ops import choice
from lstm_jax.ops.gates import LSTM
from references import (
    BATCH,
    FEATURES,
    GATED,
    HIDDEN,
    LENGTHS,
    TIME,
    assert_close,
    make_carry,
    make_inputs,
    make_params,
)

NAMES = [*GATED, "linear_scan", "mlstm"]
# Options for each implementation of a function.
IMPLEMENTATIONS: dict[str, list[dict[str, Any]]] = {
    **{name: [{"implementation": x} for x in ("scan", "xla", "auto")] for name in GATED},
    "linear_scan": [{"implementation": x} for x in ("scan", "parallel")],
    "mlstm": [{}],
}
every_function = pytest.mark.parametrize("name", NAMES)
every_gated = pytest.mark.parametrize("name", GATED)


def make_reset() -> np.ndarray:
    reset = np.zeros((BATCH, TIME), bool)
    reset[[0, 0, 1, 3], [0, 4, 2, 3]] = True
    return reset


def call(name: str, params: Any, inputs: jax.Array, carry: Any = None, **options: Any) -> Any:
    """Call a function of `ops`; inputs of `linear_scan` are its two arrays, side by side."""
    if name == "linear_scan":
        decays, terms = jnp.split(inputs, 2, axis=-1)
        return ops.linear_scan(decays, terms, carry, **options)
    return getattr(ops, name)(params, inputs, carry, **options)


def compute_loss(
    name: str, params: Any, inputs: jax.Array, carry: Any = None, **options: Any
) -> Any:
    """Return a number that depends on all results of a layer, in different ways."""
    last, outputs = call(name, params, inputs, carry, **options)
    shape = outputs.shape[1:]
    weights = jnp.cos(jnp.arange(np.prod(shape), dtype=outputs.dtype)).reshape(shape)
    total = (outputs * weights[None]).sum(axis=(1, 2))
    for leaf in jax.tree.leaves(last):
        total += jnp.sin(leaf).reshape(len(leaf), -1).sum(axis=1)
    return total.mean()


@every_function
def test_carry_resets_lengths_and_direction(name: str) -> None:
    """Compare a batch with each text alone, cut and turned by hand."""
    params, inputs, carry = make_params(name), make_inputs(name), make_carry(name)
    reset = make_reset()
    for reverse in (False, True):
        rows, carries = [], []
        for i, length in enumerate(LENGTHS):
            after = jax.tree.map(lambda x, i=i: x[i : i + 1], carry)
            row = np.zeros((TIME, HIDDEN))
            steps = range(length)
            for t in reversed(steps) if reverse else steps:
                if reset[i, t]:
                    after = None
                after, one = call(name, params, inputs[i : i + 1, t : t + 1], after)
                row[t] = one[0, 0]
            rows.append(row)
            carries.append(after)
        expected = jax.tree.map(lambda *x: np.concatenate(x), *carries), np.stack(rows)
        options: Any = {"reset": reset.astype(np.float32), "lengths": LENGTHS, "reverse": reverse}
        for implementation in IMPLEMENTATIONS[name]:
            found = call(name, params, inputs, carry, **options, **implementation)
            assert_close(found, expected)


@every_gated
@pytest.mark.usefixtures("unchecked")
def test_single_steps_are_those_of_the_layer(name: str) -> None:
    params, inputs, carry = make_params(name), make_inputs(name), make_carry(name)
    reset = make_reset()
    ids = np.arange(BATCH * TIME).reshape(BATCH, TIME) % FEATURES
    one_hot = ops.prepare(params, is_one_hot=True)
    for x, read, step in (
        (inputs, inputs, functools.partial(ops.step, params)),
        (inputs, inputs, ops.prepare(params).step),
        (jax.nn.one_hot(ids, FEATURES), ids, one_hot.step),
    ):
        (last, outputs), after = call(name, params, x, carry, reset=reset), carry
        for t in range(TIME):
            after, one = step(read[:, t], after, reset=reset[:, t])
            assert_close(one, outputs[:, t])
        assert_close(after, last)
    for mistake in (ids[:, :1], inputs[:, 0], ids[:1, 0]):
        with pytest.raises(ValueError, match="it must be"):
            one_hot.step(mistake, carry)
    with pytest.raises(ValueError, match="it must be"):
        ops.prepare(params).step(inputs[:, 0, 1:], carry)


@every_function
def test_no_step_and_what_lies_beyond_a_length(name: str) -> None:
    params, inputs, carry = make_params(name), make_inputs(name), make_carry(name)
    last, outputs = call(name, params, inputs[:, :0], carry)
    assert outputs.shape == (BATCH, 0, HIDDEN)
    assert_close(last, carry, 0)
    beyond = np.arange(TIME) >= LENGTHS[:, None]
    unfinished = jnp.where(beyond[..., None], jnp.nan, inputs)
    run = functools.partial(compute_loss, name, lengths=LENGTHS)
    found, expected = (jax.grad(run, (0, 1))(params, x, carry) for x in (unfinished, inputs))
    assert_close(found, expected, 0)
    carries = (call(name, params, inputs[:, :time], lengths=LENGTHS)[0] for time in (0, TIME))
    unread, short = (jax.tree.map(lambda x: x[LENGTHS == 0], carry) for carry in carries)
    assert_close(short, unread, 0)


@every_function
@pytest.mark.parametrize("implementation", ["scan", "auto"])
@pytest.mark.parametrize("reset_at", [0, 2])
@jax.debug_nans(False)
def test_a_reset_forgets_what_is_not_finite(name: str, implementation: Any, reset_at: int) -> None:
    """Compare results after a reset, and their gradients, with those after finite numbers."""
    params, inputs, carry = make_params(name), make_inputs(name), make_carry(name)
    options: Any = {"reset": np.arange(TIME) == np.full((BATCH, 1), reset_at)}
    if name != "mlstm":
        is_linear = implementation == "auto" and name == "linear_scan"
        options["implementation"] = "parallel" if is_linear else implementation

    def differentiate(inputs: Any, carry: Any) -> Any:
        def loss_fn(inputs: Any) -> Any:
            last, outputs = call(name, params, inputs, carry, **options)
            outputs = outputs[:, reset_at:]
            return jnp.sin(outputs).sum(), (last, outputs)

        grads, results = jax.grad(loss_fn, has_aux=True)(inputs)
        return grads[:, reset_at:], results

    expected = differentiate(inputs, carry)
    bad = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), carry)
    assert_close(differentiate(inputs, bad), expected, 0)
    assert_close(differentiate(inputs.at[:, :reset_at].set(jnp.inf), carry), expected)


@jax.debug_nans(False)
def test_a_reset_hides_no_nan_of_its_own_document() -> None:
    params, inputs, carry = make_params("mlstm"), make_inputs("mlstm"), make_carry("mlstm")
    reset = np.arange(TIME) == np.full((BATCH, 1), 2)
    inputs = inputs.at[0, 1].set(jnp.nan).at[1, 4].set(jnp.nan)
    carry = jax.tree.map(lambda x: x.at[2].set(jnp.inf), carry)
    last, outputs = ops.mlstm(params, inputs, carry, reset=reset)
    expected = np.zeros((BATCH, TIME), bool)
    expected[0, 1], expected[1, 4:], expected[2, :2] = True, True, True
    assert np.isnan(outputs).any(2).tolist() == expected.tolist()
    assert np.isnan(last.normalizer).any((1, 2)).tolist() == [False, True, False, False]


@pytest.mark.parametrize("gate", [45.0, 85.0, 300.0])
def test_padding_after_a_large_input_gate_has_no_gradient(gate: float) -> None:
    """The queries of padding are their bias, here zero, and exp(m) may overflow."""
    params = ops.MLSTMParams(
        jnp.ones((1, 4 * HIDDEN)), jnp.zeros(4 * HIDDEN), jnp.array([[gate, 0]]), jnp.zeros(2)
    )
    inputs = jnp.ones((1, 3, 1)).at[:, 1:].set(0)

    def differentiate(inputs: Any, **options: Any) -> Any:
        return jax.grad(lambda p, x: ops.mlstm(p, x, **options)[1].sum(), (0, 1))(params, inputs)

    (found, by_inputs), (expected, by_first) = (
        differentiate(inputs, lengths=np.ones(1, int)),
        differentiate(inputs[:, :1]),
    )
    assert_close((found, by_inputs[:, :1]), (expected, by_first), 1e-6)
    assert not by_inputs[:, 1:].any() and np.abs(expected.input_kernel).max() > 0.1


@every_gated
def test_a_layer_of_no_hidden_units_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match="hidden=0: a layer needs at least one of each"):
        GATED[name].init(jax.random.key(0), FEATURES, 0)
    params = jax.tree.map(lambda x: x[..., :0], make_params(name))
    params = params._replace(recurrent_kernel=params.recurrent_kernel[:0])
    with pytest.raises(ValueError, match="has no row: a layer needs"):
        getattr(ops, name)(params, make_inputs(name))


@every_gated
def test_a_batch_of_no_text(name: str) -> None:
    def compute(params: Any, inputs: jax.Array) -> jax.Array:
        return getattr(ops, name)(params, inputs, dtype="bfloat16")[1].sum()

    params = GATED[name].init(jax.random.key(0), 200, HIDDEN)
    inputs = jnp.zeros((0, TIME, 200))
    assert all(not x.any() for x in jax.grad(compute)(params, inputs))
    assert jax.vmap(functools.partial(compute, params))(inputs[:, None]).shape == (0,)


@every_function
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_arrays_of_every_floating_point_dtype(name: str, dtype: str) -> None:
    params, inputs, carry = make_params(name), make_inputs(name), make_carry(name)
    expected = call(name, params, inputs, carry)
    with jax.enable_x64(dtype in ("float32", "float64")):
        arrays = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), dtype), (params, inputs, carry))
        found = call(name, *arrays)
        assert {x.dtype.name for x in jax.tree.leaves(found)} == {dtype}
        found = jax.tree.map(lambda x: np.asarray(x, np.float64), found)
    assert_close(found, expected, 1e-5 if dtype in ("float32", "float64") else 5e-2)


@every_function
def test_states_of_half_precision_arrays_are_in_single_precision(name: str) -> None:
    arrays = make_params(name), make_inputs(name)
    params, inputs = jax.tree.map(lambda x: x.astype(jnp.bfloat16), arrays)
    carry, outputs = call(name, params, inputs)
    assert {x.dtype.name for x in jax.tree.leaves(carry)} == {"float32"}
    assert outputs.dtype == jnp.bfloat16
    half, _ = call(name, params, inputs[:, :5])
    rest, _ = call(name, params, inputs[:, 5:], half)
    assert_close(rest, carry, 1e-6)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), (params, inputs))
    options: Any = {} if name == "linear_scan" else {"dtype": "bfloat16"}
    exact, _ = call(name, *wide, **options)
    assert_close(carry, exact, 1e-6)


def test_gradients_of_float64_arrays_with_matmuls_in_bfloat16() -> None:
    with jax.enable_x64(True):
        arrays = make_params("lstm"), make_inputs("lstm")
        arrays = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), arrays)

        def compute(implementation: Any) -> Any:
            options: Any = {"dtype": "bfloat16", "implementation": implementation}
            return jax.grad(lambda p, x: (ops.lstm(p, x, **options)[1] ** 2).sum(), (0, 1))(*arrays)

        grads = compute("xla")
        assert all(grad.dtype == jnp.float64 for grad in jax.tree.leaves(grads))
        assert_close(grads, compute("scan"), 3e-2)


def list_mistakes(name: str) -> list[tuple[str, dict[str, Any]]]:
    """Return changes of the arguments of a function, each with a part of its message."""
    params, inputs, carry = make_params(name), make_inputs(name), make_carry(name)
    found = [
        (r"inputs is float32 \[6, 5\]: it must be float \[batch", {"inputs": inputs[0]}),
        ("input_kernel", {"inputs": inputs[..., :3]}),
        ("inputs is int32", {"inputs": jnp.ones(inputs.shape, int)}),
        ("carry", {"carry": jax.tree.map(lambda x: x[:3], carry)}),
        ("carry", {"carry": jax.tree.map(lambda x: x[..., :-1], carry)}),
        ("carry", {"carry": jax.tree.map(lambda x: x.astype(int), carry)}),
        (rf"carry is a tuple: it must be {type(carry).__name__}\(", {"carry": tuple(carry)}),
        ("reset is float", {"reset": np.zeros((TIME, BATCH))}),
        ("lengths", {"lengths": np.zeros(TIME, int)}),
        ("lengths", {"lengths": np.zeros(BATCH)}),
    ]
    if name != "mlstm":
        found.append(("implementation", {"implementation": "fastest"}))
    if name == "linear_scan":
        return [mistake for mistake in found if "inputs" not in mistake[1]]
    for field, array in params._asdict().items():
        for axis in range(array.ndim):
            cut = jax.lax.slice_in_dim(array, 0, array.shape[axis] - 1, axis=axis)
            found.append(("params", {"params": params._replace(**{field: cut})}))
        found.append(("params", {"params": params._replace(**{field: array[None]})}))
    return [
        *found,
        ("dtype is float16", {"dtype": "float16"}),
        ("dtype is float64: .* if an array is", {"dtype": "float64"}),
        ("params is a tuple", {"params": tuple(params)}),
    ]


@every_function
@pytest.mark.usefixtures("unchecked")
def test_every_wrong_array_is_an_error(name: str) -> None:
    for message, change in list_mistakes(name):
        arguments: dict[str, Any] = {
            "params": make_params(name),
            "inputs": make_inputs(name),
            "carry": make_carry(name),
        }
        with pytest.raises(ValueError, match=message):
            call(name, **{**arguments, **change})


def test_an_implementation_that_can_not_run_says_why() -> None:
    with pytest.raises(ValueError, match="in float64 here"):
        choice.choose("c", LSTM, size=16, dtype="float64")


# The transformations of JAX. Each takes a loss of parameters and inputs, the parameters and the
# inputs, and returns the gradient by the parameters.


def use_vmap(loss: Callable[..., Any], params: Any, inputs: jax.Array) -> Any:
    """Equinox's idiom: a function of one example, which `vmap` runs over the batch."""
    return jax.grad(lambda p: jax.vmap(lambda x: loss(p, x[None]))(inputs).mean())(params)


def use_vmap_of_batches(loss: Callable[..., Any], params: Any, inputs: jax.Array) -> Any:
    batches = inputs.reshape(2, BATCH // 2, *inputs.shape[1:])
    return jax.grad(lambda p: jax.vmap(functools.partial(loss, p))(batches).mean())(params)


def use_vmap_of_grad(loss: Callable[..., Any], params: Any, inputs: jax.Array) -> Any:
    of_each = jax.vmap(lambda x: jax.grad(loss)(params, x[None]))(inputs)
    return jax.tree.map(lambda x: x.mean(axis=0), of_each)


def use_vmap_of_params(loss: Callable[..., Any], params: Any, inputs: jax.Array) -> Any:
    several = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), params)
    return jax.tree.map(lambda x: x[0], jax.vmap(jax.grad(loss), (0, None))(several, inputs))


def use_scan(loss: Callable[..., Any], params: Any, inputs: jax.Array) -> Any:
    def sum_losses(params: Any) -> Any:
        step = lambda total, _: (total + loss(params, inputs), None)  # noqa: E731
        return jax.lax.scan(step, 0.0, None, length=2)[0] / 2

    return jax.grad(sum_losses)(params)


def use_pmap(loss: Callable[..., Any], params: Any, inputs: jax.Array) -> Any:
    parts = inputs.reshape(2, -1, *inputs.shape[1:])
    run = jax.pmap(
        lambda p, x: jax.lax.pmean(jax.grad(loss)(p, x), "data"), "data", in_axes=(None, 0)
    )
    return jax.tree.map(lambda x: x[0], run(params, parts))


def use_shard_map(loss: Callable[..., Any], params: Any, inputs: jax.Array) -> Any:
    mesh = jax.make_mesh((2,), ("data",), (AxisType.Auto,), devices=jax.devices()[:2])
    run = jax.shard_map(
        lambda p, x: jax.lax.pmean(loss(p, x), "data"),
        mesh=mesh,
        in_specs=(P(), P("data")),
        out_specs=P(),
    )
    return jax.jit(jax.grad(run))(params, inputs)


def use_mesh(
    kind: AxisType, is_set: bool, loss: Callable[..., Any], params: Any, inputs: jax.Array
) -> Any:
    """Divide a batch between two devices of a mesh, explicit as by default or not, set or not."""
    mesh = jax.make_mesh((2,), ("data",), (kind,), devices=jax.devices()[:2])
    with jax.set_mesh(mesh) if is_set else contextlib.nullcontext():
        inputs = jax.device_put(inputs, NamedSharding(mesh, P("data")))
        params = jax.device_put(params, NamedSharding(mesh, P()))
        return jax.jit(jax.grad(loss))(params, inputs)


TRANSFORMATIONS = {
    "jit": lambda loss, *arguments: jax.jit(jax.grad(loss))(*arguments),
    "checkpoint": lambda loss, *arguments: jax.grad(jax.checkpoint(loss))(*arguments),
    "scan": use_scan,
    "vmap": use_vmap,
    "vmap of batches": use_vmap_of_batches,
    "vmap of grad": use_vmap_of_grad,
    "vmap of parameters": use_vmap_of_params,
}
ON_TWO_DEVICES: dict[str, Callable[..., Any]] = {
    "pmap": use_pmap,
    "shard_map": use_shard_map,
    "sharded batch": functools.partial(use_mesh, AxisType.Auto, False),
    "explicit mesh": functools.partial(use_mesh, AxisType.Explicit, True),
    "default mesh": functools.partial(use_mesh, AxisType.Explicit, False),
}


def check_gradients(name: str, transform: Callable[..., Any], **options: Any) -> None:
    params, inputs = make_params(name), make_inputs(name)
    loss = functools.partial(compute_loss, name, **options)
    expected = jax.grad(loss)(params, inputs)
    with jax.numpy_rank_promotion("allow"):
        found = transform(loss, params, inputs)
    assert_close(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("transformation", TRANSFORMATIONS)
@pytest.mark.parametrize("name", [*GATED, "mlstm"])
def test_gradients_under_transformations(name: str, transformation: str) -> None:
    check_gradients(name, TRANSFORMATIONS[transformation])


@pytest.mark.process
def test_gradients_on_two_devices() -> None:
    code = "import test_ops; test_ops.check_gradients_on_two_devices()"
    env = {"JAX_NUM_CPU_DEVICES": "2", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = commands.run_python("-c", code, env=env)
    assert done.returncode == 0, done.stderr


def check_gradients_on_two_devices() -> None:
    for transformation, transform in ON_TWO_DEVICES.items():
        is_short = transformation in ("sharded batch", "explicit mesh")
        for name in GATED if is_short else NAMES:
            for implementation in [{}] if is_short else IMPLEMENTATIONS[name]:
                check_gradients(name, transform, **implementation)
    # On explicit axes, the library computes a batch where it lies. The loop reads no inputs.
    mesh = jax.make_mesh((2,), ("data",))
    inputs = jax.device_put(make_inputs("lstm"), NamedSharding(mesh, P("data")))
    text = jax.jit(functools.partial(call, "lstm")).lower(make_params("lstm"), inputs).as_text()
    calls = re.findall(r'custom_call @"lstm-.*-forward".* : \(tensor<(\w+)xf32>', text)
    assert calls in ([], [f"{TIME}x{BATCH // 2}x0"])


@pytest.mark.parametrize("implementation", ["xla", "auto"])
def test_a_vmap_over_examples_is_one_batch(implementation: str) -> None:
    """Count the loops or calls: there is one forward and one backward, on all examples."""
    run = functools.partial(compute_loss, "gru", implementation=implementation)
    differentiate = jax.jit(functools.partial(use_vmap, run))
    text = differentiate.lower(make_params("gru"), make_inputs("gru")).as_text()
    calls = re.findall(r'custom_call @"lstm-.*-(?:for|back)ward"', text)
    assert len(calls or re.findall("stablehlo.while", text)) == 2


@every_gated
def test_second_derivatives_name_the_remedy(name: str) -> None:
    params, inputs = make_params(name), make_inputs(name)

    def penalty(params: Any, implementation: str) -> Any:
        loss = functools.partial(compute_loss, name, implementation=implementation)
        return jnp.stack([(x**2).sum() for x in jax.grad(loss)(params, inputs)]).sum()

    with pytest.raises(NotImplementedError, match="pass implementation='scan'"):
        jax.grad(penalty)(params, "auto")
    assert all(np.isfinite(x).all() for x in jax.grad(penalty)(params, "scan"))


@every_gated
def test_derivatives_in_a_direction_are_those_of_the_gradient(name: str) -> None:
    arrays = make_params(name), make_inputs(name)
    direction = jax.tree.map(jnp.cos, arrays)
    scan = functools.partial(compute_loss, name, implementation="scan")
    grads = jax.grad(functools.partial(compute_loss, name), (0, 1))(*arrays)
    expected = sum(jax.tree.leaves(jax.tree.map(jnp.vdot, grads, direction)))
    assert_close(jax.jvp(scan, arrays, direction)[1], expected)


@pytest.mark.parametrize("implementation", ["scan", "xla"])
def test_an_exported_layer_has_the_same_outputs(implementation: str) -> None:
    run = jax.jit(functools.partial(call, "gru", implementation=implementation))
    params, inputs = make_params("gru"), make_inputs("gru")
    symbolic = jax.ShapeDtypeStruct(jax.export.symbolic_shape(f"b, t, {FEATURES}"), inputs.dtype)
    exported = jax.export.export(run)(params, symbolic)
    assert_close(exported.call(params, inputs), run(params, inputs))
