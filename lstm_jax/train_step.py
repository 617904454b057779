"""Make one jitted training step: from a state and a batch to the next state, on any devices.

Dropout masks, by the `regularization` fields of a config, are drawn once per step and are the same
at every position of its windows. Kept values are divided by the probability of keeping them, so
that expectations do not change.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int, Integer

from lstm_jax import model as model_lib
from lstm_jax.batches import Batch
from lstm_jax.cells.base import reset_carry
from lstm_jax.config import Config, RegularizationConfig
from lstm_jax.devices.mesh import DATA, DIVIDED, EVERYWHERE
from lstm_jax.errors import UserError, warn


class TrainState(NamedTuple):
    """All that a step reads and writes; runs with another structure of it can't resume."""

    params: model_lib.Params
    opt_state: optax.OptState
    carry: model_lib.Carry  # After the last batch.
    key: Array  # The PRNG key of all random draws in training.
    step: Int[Array, ""]  # Training steps done.
    loss_sum: Float[Array, ""]  # Nats per token, summed since the last log line.
    norm_sum: Float[Array, ""]  # Of the gradients before clipping, summed likewise.
    loss_steps: Int[Array, ""]  # The number of steps in these sums.

    @property
    def rest(self) -> dict[str, Any]:
        """Return all but the parameters, which a checkpoint holds as a separate item."""
        return {name: x for name, x in self._asdict().items() if name != "params"}

    def clear_sums(self) -> "TrainState":
        """Return the state with sums of zero."""
        zeros = jax.tree.map(jnp.zeros_like, (self.loss_sum, self.norm_sum, self.loss_steps))
        return self._replace(loss_sum=zeros[0], norm_sum=zeros[1], loss_steps=zeros[2])

    def place(self, mesh: Mesh) -> "TrainState":
        """Place the state on the devices of a mesh, with the carry divided like a batch."""
        everywhere, rows = NamedSharding(mesh, EVERYWHERE), NamedSharding(mesh, DIVIDED)
        shardings: Any = dict.fromkeys(self._fields, everywhere) | {"carry": rows}
        return jax.jit(lambda state: state, out_shardings=TrainState(**shardings))(self)


TrainStep = Callable[[TrainState, Batch], TrainState]


def init_state(
    model: model_lib.LanguageModel,
    optimizer: optax.GradientTransformation,
    config: Config,
    initial_params: model_lib.Params | None = None,
    counts: Integer[np.ndarray, " vocabulary"] | None = None,
) -> TrainState:
    """Return the state before the first step, on the default device.

    `initial_params` are those to start from; `model` may have more tokens, whose parameters are
    drawn. For `counts`, see `model.init_params`. Raise `UserError` for a rate of dropout that can't
    apply to the parameters; warn of one that has no effect.
    """
    init_key, key = jax.random.split(jax.random.key(config.seed))
    params = model_lib.init_params(model, init_key, counts)
    jax.eval_shape(functools.partial(drop_parameters, config.regularization), params, key)
    if config.regularization.hidden_dropout and model.num_layers == 1:
        warn(
            "config.regularization.hidden_dropout is between layers: with one, use "
            "--config.regularization.output_dropout"
        )
    if initial_params is not None:
        params = jax.tree.map(
            # `old` is committed to a device, and `place` would refuse it.
            lambda new, old: new.at[tuple(map(slice, old.shape))].set(np.asarray(old)),
            params,
            initial_params,
        )
    # Separate arrays, because a step donates each of them.
    return TrainState(
        params=params,
        opt_state=optimizer.init(params),
        carry=model.initial_carry(config.batches.batch_size),
        key=key,
        step=jnp.int32(0),
        loss_sum=jnp.zeros(()),
        norm_sum=jnp.zeros(()),
        loss_steps=jnp.int32(0),
    )


def make_train_step(
    model: model_lib.LanguageModel,
    optimizer: optax.GradientTransformation,
    config: Config,
    mesh: Mesh,
) -> TrainStep:
    """Make the training step and jit it for the batches of `feed_batches`; the state is donated.

    Every device of the mesh computes the gradient for its part of the batch, one microbatch after
    the other. The mean over the devices is the gradient for the whole batch.
    """
    rates = config.regularization
    compute = compute_grads = _make_compute_grads(model, config)

    def compute_mean_grads(*arguments: Any) -> Any:
        means, carry = compute_grads(*arguments)
        return jax.lax.pmean(means, DATA), carry

    if mesh.size > 1:  # On one device, a collective operation would copy all gradients.
        compute = jax.shard_map(
            compute_mean_grads,
            mesh=mesh,
            in_specs=(EVERYWHERE, EVERYWHERE, DIVIDED, DIVIDED, DIVIDED),
            out_specs=(EVERYWHERE, DIVIDED),
            check_vma=False,  # Without its check of which results are replicated.
        )

    def train_step(state: TrainState, batch: Batch) -> TrainState:
        carry = reset_carry(model, state.carry, batch.reset)
        key, mask_key, parameter_key = jax.random.split(state.key, 3)
        masks = draw_masks(rates, model, mask_key, len(batch.inputs))
        data = batch.inputs, batch.targets, batch.soft_targets
        (grads, loss), carry = compute(state.params, parameter_key, data, carry, masks)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        return TrainState(
            params=optax.apply_updates(state.params, updates),
            opt_state=opt_state,
            carry=carry,
            key=key,
            step=state.step + 1,
            loss_sum=state.loss_sum + loss,
            norm_sum=state.norm_sum + optax.tree.norm(grads),
            loss_steps=state.loss_steps + 1,
        )

    return jax.jit(train_step, donate_argnums=0)


def _make_compute_grads(model: model_lib.LanguageModel, config: Config) -> Callable[..., Any]:
    """Make the function compute_grads(params, key, batch, carry, masks) of one device.

    `batch` is (inputs, targets, soft targets). It returns ((gradients, loss), carry).
    """
    rates, distill = config.regularization, config.distill
    microbatches = config.optimizer.microbatches

    def loss_fn(
        params: model_lib.Params, key: Array, batch: Any, carry: Any, masks: model_lib.Masks
    ) -> tuple[Float[Array, ""], tuple[Float[Array, ""], model_lib.Carry]]:
        """Return the objective to minimize; and (the loss of the text, to log, and the carry)."""
        masked_params = drop_parameters(rates, params, key)
        inputs, targets, soft_targets = batch
        outputs, carry = model.bind({"params": masked_params}).run(inputs, carry, masks)
        features = model_lib.apply_mask(outputs, masks[-1])
        # A tied embedding is dropped where it is read, not where it predicts.
        bound = model.bind({"params": params})
        loss = objective = bound.compute_losses(features, targets).mean()
        if soft_targets is not None:
            soft_losses = optax.softmax_cross_entropy(bound.predict(features), soft_targets)
            objective = (1 - distill.weight) * objective + distill.weight * soft_losses.mean()
        # Activation regularization (AR after dropout, TAR before it; Merity et al. 2017).
        if rates.activation:
            objective += rates.activation * jnp.square(features).mean()
        if rates.temporal_activation:
            changes = jnp.square(jnp.diff(outputs, axis=1))
            objective += rates.temporal_activation * changes.sum() / outputs.size
        return objective, (loss, carry)

    def compute_grads(params: model_lib.Params, key: Array, *batch_arrays: Any) -> Any:
        def compute_part(*part: Any) -> Any:
            grads, (loss, carry) = jax.grad(loss_fn, has_aux=True)(params, key, *part)
            return (grads, loss), carry

        if microbatches == 1:
            return compute_part(*batch_arrays)

        def add(sums: Any, part: Any) -> Any:
            more, carry = compute_part(*part)
            return jax.tree.map(jnp.add, sums, more), carry

        parts = jax.tree.map(lambda x: x.reshape(microbatches, -1, *x.shape[1:]), batch_arrays)
        zeros = jax.tree.map(jnp.zeros_like, params), jnp.zeros(())
        sums, carry = jax.lax.scan(add, zeros, parts)
        means = jax.tree.map(lambda x: x / microbatches, sums)
        return means, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), carry)

    return compute_grads


def draw_masks(
    rates: RegularizationConfig, model: model_lib.LanguageModel, key: jax.Array, batch_size: int
) -> model_lib.Masks:
    """Draw masks for locked (variational) dropout (Gal & Ghahramani 2016).

    `input_dropout` applies to the inputs of the first layer, `hidden_dropout` between layers, and
    `output_dropout` to the outputs of the last one. Each text of the batch has its own masks,
    float32 [batch_size, features]; they are None where the rate is 0.
    """
    between = [rates.hidden_dropout] * (model.num_layers - 1)
    by_place = [rates.input_dropout, *between, rates.output_dropout]
    keys = jax.random.split(key, len(by_place))
    # Drawn feature-major, as the recurrence computes: XLA's CPU backend is four times slower at
    # multiplying by the transpose of an array.
    return [
        _draw_mask(key, rate, (size, batch_size)).T if rate else None
        for key, rate, size in zip(keys, by_place, model.sizes, strict=True)
    ]


def drop_parameters(
    rates: RegularizationConfig, params: model_lib.Params, key: jax.Array
) -> model_lib.Params:
    """Set a random part of the parameters to zero (Merity et al. 2018).

    `embedding_dropout` drops rows of the embedding table, that is all occurrences of a token (Gal &
    Ghahramani 2016). `recurrent_dropout` drops individual weights of the recurrent kernels
    (DropConnect, Wan et al. 2013), in all layers; raise `UserError` if there are none.
    """
    new_params = dict(params)
    if rates.embedding_dropout:
        table = params["embedding"]["embedding"]
        mask = _draw_mask(jax.random.fold_in(key, 0), rates.embedding_dropout, (len(table), 1))
        new_params["embedding"] = {"embedding": table * mask}
    if rates.recurrent_dropout:
        arrays = flatten_dict(new_params)
        kernels = sorted(path for path in arrays if path[-1] == "recurrent_kernel")
        if not kernels:
            raise UserError(
                "--config.regularization.recurrent_dropout needs a cell with a parameter "
                "recurrent_kernel: set it to 0"
            )
        for number, path in enumerate(kernels, start=1):
            layer_key = jax.random.fold_in(key, number)
            mask = _draw_large_mask(layer_key, rates.recurrent_dropout, arrays[path].shape)
            arrays[path] *= mask
        new_params = unflatten_dict(arrays)
    return new_params


def _draw_mask(key: jax.Array, rate: float, shape: tuple[int, ...]) -> jax.Array:
    """Draw 0 with probability `rate`, otherwise 1 / (1 - rate)."""
    return jax.random.bernoulli(key, 1 - rate, shape) / (1 - rate)


def _draw_large_mask(key: jax.Array, rate: float, shape: tuple[int, ...]) -> jax.Array:
    """Draw a mask like `_draw_mask` from 16 random bits an entry; the rate is rounded to 16 bits.

    JAX draws a word of 32 bits even for 16, so each word is split in two. For the kernel of a
    layer with 1,024 hidden units this takes 9 ms on a core, and `jax.random.bernoulli` 26 ms.
    """
    words = jax.random.bits(key, (-(-shape[0] // 2), *shape[1:]), "uint32")
    bits = jnp.concatenate([words >> 16, words & 0xFFFF])[: shape[0]]
    limit = jnp.maximum(jnp.round((1 - rate) * 2**16), 1)
    return (bits < limit) * (2**16 / limit)
