"""Test the layers of Linen and of NNX, and weights of PyTorch."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lstm_jax import layers, nnx_layers, ops
from lstm_jax.ops import weights
from references import (
    BATCH,
    FEATURES,
    HIDDEN,
    LENGTHS,
    TIME,
    assert_close,
    make_inputs,
    make_params,
)

CELLS: dict[str, Any] = {"lstm": nn.OptimizedLSTMCell, "gru": nn.GRUCell, "rnn": nn.SimpleCell}
LAYERS: dict[str, Any] = {"lstm": layers.LSTM, "gru": layers.GRU, "rnn": layers.RNN}
every_kind = pytest.mark.parametrize("name", CELLS)


def make_flax_variables(params: Any) -> Any:
    """Return the variables of `nn.RNN`, whose cells have a kernel for each gate."""
    gates = {ops.LSTMParams: "ifgo", ops.GRUParams: "rzn", ops.RNNParams: [""]}[type(params)]
    cell: dict[str, Any] = {}
    arrays = (np.split(np.asarray(x), len(gates), axis=-1) for x in params[:3])
    for gate, input_kernel, recurrent_kernel, bias in zip(gates, *arrays, strict=True):
        cell[f"i{gate}"], cell[f"h{gate}"] = {"kernel": input_kernel}, {"kernel": recurrent_kernel}
        cell[f"{'h' if len(gates) == 4 else 'i'}{gate}"]["bias"] = bias
    if len(gates) == 3:
        cell["hn"]["bias"] = np.asarray(params.recurrent_bias)
    return {"params": {"cell": cell}}


def make_variables(*names: str, params: Any) -> Any:
    return {"params": {name: params._asdict() for name in names}}


@every_kind
@pytest.mark.parametrize("reverse", [False, True])
def test_a_layer_takes_the_place_of_flax_rnn(name: str, reverse: bool) -> None:
    params, inputs = make_params(name), make_inputs(name)
    flax_layer: Any = nn.RNN(CELLS[name](HIDDEN), keep_order=True)
    layer = LAYERS[name](HIDDEN)
    theirs, ours = make_flax_variables(params), make_variables("l0", params=params)
    # Flax has another carry for a length of 0.
    lengths = np.maximum(LENGTHS, 1)
    within = (np.arange(TIME) < lengths[:, None])[..., None]
    carry = None
    for _ in range(2):  # From zeros, and from the carry of the first call.
        options: Any = {"initial_carry": carry, "reverse": reverse}
        options |= {"seq_lengths": jnp.asarray(lengths), "return_carry": True}
        expected = flax_layer.apply(theirs, inputs, **options)
        actual = layer.apply(ours, inputs, **options)
        assert_close(actual[0], expected[0])
        assert_close(actual[1], np.where(within, expected[1], 0))
        carry = expected[0]
    expected = flax_layer.apply(theirs, inputs, reverse=reverse)
    assert_close(layer.apply(ours, inputs, reverse=reverse), expected)


@every_kind
def test_layers_and_directions_are_those_of_flax(name: str) -> None:
    inputs, lengths = make_inputs(name), jnp.asarray(np.maximum(LENGTHS, 1))
    layer = LAYERS[name](HIDDEN, num_layers=2, bidirectional=True)
    variables = layer.init(jax.random.key(0), inputs)
    options: Any = {"seq_lengths": lengths, "return_carry": True}
    carry, outputs = layer.apply(variables, inputs, **options)
    again, _ = layer.apply(variables, inputs, initial_carry=carry, **options)
    assert jax.tree.map(jnp.shape, again) == jax.tree.map(jnp.shape, carry)
    below: Any = inputs
    expected: list[Any] = []
    for i in range(2):
        own = [variables["params"][f"l{i}{suffix}"] for suffix in ("", "_reverse")]
        both_variables = [make_flax_variables(type(make_params(name))(**params)) for params in own]
        flax_params = {
            f"{side}_rnn": variables["params"]
            for side, variables in zip(("forward", "backward"), both_variables, strict=True)
        }
        forward, backward = (nn.RNN(CELLS[name](HIDDEN)) for _ in range(2))
        both = nn.Bidirectional(forward, backward, return_carry=True)
        last, below = both.apply({"params": flax_params}, below, seq_lengths=lengths)
        expected.extend(last)
    assert_close(outputs, np.where((np.arange(TIME) < lengths[:, None])[..., None], below, 0))
    assert_close(carry, tuple(expected))


@pytest.mark.parametrize("name", ["LSTM", "PeepholeLSTM", "GRU", "RNN"])
def test_an_optimizer_of_nnx_trains_like_linen(name: str) -> None:
    inputs, reset = make_inputs("lstm"), np.arange(TIME)[None] == np.full([BATCH, 1], 3)
    attributes: Any = {"num_layers": 2, "bidirectional": True, "reverse": True}
    linen = getattr(layers, name)(HIDDEN, **attributes)
    model = getattr(nnx_layers, name)(FEATURES, HIDDEN, **attributes, rngs=nnx.Rngs(0))
    variables: Any = {"params": nnx.to_pure_dict(nnx.state(model, nnx.Param))}
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(
        jnp.shape, linen.init(jax.random.key(0), inputs)
    )
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)

    def compute_loss(run: Any) -> jax.Array:
        carry, outputs = run(inputs, seq_lengths=LENGTHS, reset=reset, return_carry=True)
        return (outputs**2).sum() + run(inputs, initial_carry=carry, reverse=False).sum()

    @nnx.jit
    def take_step(model: Any, optimizer: Any) -> Any:
        grads = nnx.grad(compute_loss)(model)
        optimizer.update(model, grads)

    differentiate = jax.jit(jax.grad(lambda v: compute_loss(functools.partial(linen.apply, v))))
    for _ in range(2):
        take_step(model, optimizer)
        grads = differentiate(variables)
        variables = jax.tree.map(lambda x, d: x - 0.1 * d, variables, grads)
    assert_close(nnx.to_pure_dict(nnx.state(model)), variables["params"])
    copy = nnx.merge(*nnx.split(model))
    assert_close(copy(inputs), linen.apply(variables, inputs))


def test_options_of_the_functions_reach_them() -> None:
    params, inputs = make_params("peephole_lstm"), make_inputs("peephole_lstm")
    options: Any = {"dtype": jnp.bfloat16, "implementation": "scan"}
    layer, reset = layers.PeepholeLSTM(HIDDEN, **options), np.ones((BATCH, TIME), bool)
    _, expected = ops.peephole_lstm(params, inputs, reset=reset, **options)
    assert_close(layer.apply(make_variables("l0", params=params), inputs, reset=reset), expected)


@every_kind
def test_each_document_is_read_alone_in_both_directions(name: str) -> None:
    inputs, cut = make_inputs(name), 4
    layer = LAYERS[name](HIDDEN, num_layers=2, bidirectional=True)
    variables = layer.init(jax.random.key(0), inputs)
    outputs = layer.apply(
        variables, inputs, reset=np.arange(TIME)[None] == np.full([BATCH, 1], cut)
    )
    alone = [layer.apply(variables, part) for part in (inputs[:, :cut], inputs[:, cut:])]
    assert_close(outputs, jnp.concatenate(alone, axis=1))
    none = layer.apply(variables, inputs[:, :0], reset=np.zeros([BATCH, 0], bool))
    assert none.shape == (BATCH, 0, 2 * HIDDEN)


def test_no_document_starts_after_the_end_of_a_text() -> None:
    inputs = make_inputs("gru")
    layer = layers.GRU(HIDDEN, reverse=True)
    variables = layer.init(jax.random.key(0), inputs)
    options: Any = {"initial_carry": jnp.ones((BATCH, HIDDEN)), "seq_lengths": np.full(BATCH, 2)}
    expected = layer.apply(variables, inputs, **options)
    reset = np.arange(TIME)[None] == np.full([BATCH, 1], 2)
    assert_close(layer.apply(variables, inputs, reset=reset, **options), expected)


def test_carries_are_those_of_all_layers() -> None:
    inputs, carry = make_inputs("gru"), jnp.zeros((BATCH, HIDDEN))
    layer = layers.GRU(HIDDEN, num_layers=2)
    for number in (0, 1, 3):
        with pytest.raises(ValueError, match=f"holds {number} carries: it must hold 2"):
            layer.init(jax.random.key(0), inputs, initial_carry=(carry,) * number)


@every_kind
def test_weights_are_read_back_unchanged(name: str) -> None:
    params = make_params(name)
    assert_close(weights.from_torch(weights.to_torch(params)), params, 0)


def test_weights_that_do_not_fit_raise_an_error() -> None:
    with pytest.raises(ValueError, match="no layer with PeepholeLSTMParams"):
        weights.to_torch(make_params("peephole_lstm"))
    state_dict = weights.to_torch(make_params("gru"), prefix="encoder.")
    message = "no weight_ih_l0, but encoder.weight_ih_l0: pass as prefix="
    with pytest.raises(ValueError, match=message):
        weights.from_torch(state_dict)
    with pytest.raises(ValueError, match="4 hidden units has 8 columns"):
        weights.from_torch({"weight_ih_l0": np.zeros((8, 3)), "weight_hh_l0": np.zeros((8, 4))})


@pytest.mark.slow
@every_kind
def test_a_layer_of_pytorch_computes_the_same(name: str) -> None:
    torch = pytest.importorskip("torch")
    params, inputs = make_params(name), make_inputs(name)
    arrays = weights.to_torch(params) | weights.to_torch(params, "l0_reverse")
    layer = getattr(torch.nn, name.upper())(FEATURES, HIDDEN, batch_first=True, bidirectional=True)
    layer.load_state_dict({key: torch.tensor(array) for key, array in arrays.items()})
    with torch.no_grad():
        expected = layer(torch.tensor(np.asarray(inputs)))[0].numpy()
    state_dict = {key: array.detach().numpy() for key, array in layer.state_dict().items()}
    sides = [weights.from_torch(state_dict, side) for side in ("l0", "l0_reverse")]
    outputs = [ops.run(side, inputs, reverse=i == 1)[1] for i, side in enumerate(sides)]
    assert_close(np.concatenate(outputs, axis=-1), expected)
