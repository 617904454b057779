"""One training step, jitted: from the state and a batch to the next, on one device or many."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lstm_jax import batches, regularization
from lstm_jax import model as model_lib
from lstm_jax.devices import feeding, parallel


class TrainState(NamedTuple):
    """Everything that a training step reads and writes.

    Attributes:
      params: the model's parameters.
      average: an exponential moving average of them, which evaluation and sampling use; None
        without one.
      optimizer: the optimizer's state.
      carry: after the last batch.
      key: PRNG key that whatever is random in training follows from, with the step.
      step: int32 [], training steps done.
      loss_sum: float32 [], nats per token, summed over the steps since it was last logged.
      loss_steps: int32 [], how many steps those are.
      skipped: int32 [], steps left out because numbers of theirs were not finite.
      first_skipped: int32 [], the first of them that was not told yet; 0 if there is none.
    """

    params: model_lib.Params
    average: model_lib.Params | None
    optimizer: optax.OptState
    carry: model_lib.Carry
    key: jax.Array
    step: jax.Array
    loss_sum: jax.Array
    loss_steps: jax.Array
    skipped: jax.Array
    first_skipped: jax.Array

    @property
    def evaluated(self) -> model_lib.Params:
        """The parameters that evaluation and sampling use."""
        return self.params if self.average is None else self.average

    @property
    def rest(self) -> dict[str, Any]:
        """All of the state but `evaluated`, which a checkpoint holds by itself."""
        fields = self._asdict()
        del fields["average"]
        if self.average is None:
            del fields["params"]
        return fields

    @classmethod
    def join(cls, evaluated: model_lib.Params, rest: dict[str, Any]) -> "TrainState":
        """The state that `evaluated` and `rest` are of."""
        if "params" in rest:
            return cls(average=evaluated, **rest)
        return cls(params=evaluated, average=None, **rest)

    def place(self, mesh: Mesh) -> "TrainState":
        """The state on the devices of a mesh: the carry as a batch is, the rest as `store`d."""
        stored = parallel.place_state(self._replace(carry=()), mesh)
        return stored._replace(carry=parallel.place(self.carry, mesh, parallel.DIVIDED))


TrainStep = Callable[[TrainState, batches.Batch | feeding.Resident], TrainState]


def init_state(
    model: model_lib.LanguageModel,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    batch_size: int,
    averaged: bool = False,
    trained: model_lib.Params | None = None,
    mesh: Mesh | None = None,
    counts: np.ndarray | None = None,
) -> TrainState:
    """The state before the first step.

    Args:
      model: the model.
      optimizer: from `optimizer.make`.
      key: PRNG key.
      batch_size: of the training batches.
      averaged: whether a moving average of the parameters is kept.
      trained: parameters to start from, of the same model with the same vocabulary or the first
        part of it; the rows of new units start fresh.
      mesh: where the state is made; None: on one device, from where `place` can move it.
      counts: of the tokens in the training text, see `model.init_params`.
    """
    init_key, key = jax.random.split(key)
    params = model_lib.init_params(model, init_key, counts)
    if trained is not None:
        params = jax.tree.map(
            lambda new, old: new.at[tuple(map(slice, old.shape))].set(old), params, trained
        )
    if mesh is not None:
        params = parallel.place_state(
            params, mesh
        )  # First, so that nothing else of its size is whole.
    # Every counter is an array of its own: a step donates each.
    step, loss_steps, skipped, first_skipped = (jnp.zeros((), jnp.int32) for _ in range(4))
    state = TrainState(
        params=params,
        average=jax.tree.map(jnp.copy, params) if averaged else None,
        optimizer=optimizer.init(params),
        carry=model.initial_carry(batch_size),
        key=key,
        step=step,
        loss_sum=jnp.zeros(()),
        loss_steps=loss_steps,
        skipped=skipped,
        first_skipped=first_skipped,
    )
    return state if mesh is None else state.place(mesh)


def make_train_step(
    model: model_lib.LanguageModel,
    optimizer: optax.GradientTransformation,
    config: ConfigDict,
    mesh: Mesh,
) -> TrainStep:
    """`make_step`, jitted, for batches as the training loop has them. It donates the state.

    Where the arrays of a batch have a first axis more, they are those of several steps, which are
    run one after the other.
    """
    train_step = make_step(model, optimizer, config, mesh)

    def train_steps(state: TrainState, batch: batches.Batch | feeding.Resident) -> TrainState:
        def one(state: TrainState, step: Any) -> tuple[TrainState, None]:
            if isinstance(batch, feeding.Resident):
                step = feeding.cut_batch(batch.ids, step, config.batches.window_length)
            return train_step(state, step), None

        steps = batch.places if isinstance(batch, feeding.Resident) else batch
        if steps.starts.ndim:
            return jax.lax.scan(one, state, steps)[0]
        return one(state, steps)[0]

    return jax.jit(train_steps, donate_argnums=0)


def make_step(
    model: model_lib.LanguageModel,
    optimizer: optax.GradientTransformation,
    config: ConfigDict,
    mesh: Mesh | None,
) -> Callable[[TrainState, batches.Batch], TrainState]:
    """The training step as a pure function of a state and a `batches.Batch`.

    Every device of the mesh puts the parameters together and computes the gradient for its part of
    the batch, a microbatch after the other; the mean over all is the gradient for the whole batch,
    of which each device keeps the part that it stores. A step whose loss, gradient or updated
    parameters are not finite is counted and leaves everything else as it was.

    Args:
      model: the model.
      optimizer: from `optimizer.make`.
      config: read are `regularization`, `optimizer.microbatches`, `optimizer.average_decay` and
        `batches.reset_probability`. The rates and the decay may be arrays.
      mesh: from `parallel.make_mesh`; None where the step is part of a program for one device.
    """
    rates, decay = config.regularization, config.optimizer.average_decay

    def objective(
        params: model_lib.Params,
        carry: model_lib.Carry,
        batch: tuple[jax.Array, jax.Array],
        masks: model_lib.Masks | None,
        key: jax.Array | None,
    ) -> tuple[jax.Array, tuple[jax.Array, model_lib.Carry]]:
        """What is minimised; and the loss alone, with the carry."""
        if key is not None:
            params = regularization.drop_parameters(rates, params, key)
        inputs, targets = batch
        bound = model.bind({"params": params})
        outputs, carry = bound.run(inputs, carry, masks)
        dropped = outputs if masks is None else model_lib.apply_mask(outputs, masks[-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(bound.predict(dropped), targets)
        loss = losses.mean()
        return loss + regularization.penalty(rates, outputs, dropped), (loss, carry)

    def gradients(params: model_lib.Params, key: jax.Array | None, *divided: Any) -> Any:
        """Gradient, loss and carry for one device's part, [batch / devices, ...]."""

        def one(batch: Any, carry: model_lib.Carry, masks: Any) -> Any:
            differentiate = jax.value_and_grad(objective, has_aux=True)
            (_, (loss, carry)), gradient = differentiate(params, carry, batch, masks, key)
            return (gradient, loss), carry

        number = config.optimizer.microbatches
        if number == 1:
            means, carry = one(*divided)
        else:

            def add(sums: Any, part: Any) -> Any:
                more, carry = one(*part)
                return jax.tree.map(jnp.add, sums, more), carry

            parts = jax.tree.map(lambda x: x.reshape(number, -1, *x.shape[1:]), divided)
            zeros = jax.tree.map(jnp.zeros_like, params), jnp.zeros(())
            sums, carry = jax.lax.scan(add, zeros, parts)
            means = jax.tree.map(lambda x: x / number, sums)
            carry = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), carry)
        return means, carry

    def gradients_of_all(
        specs: Any, params: model_lib.Params, key: jax.Array | None, *divided: Any
    ) -> Any:
        """The mean of gradients and losses over all devices, as they are stored; the carry."""
        means, carry = gradients(parallel.gather_parts(params, specs), key, *divided)
        return parallel.mean_over_devices(means, (specs, parallel.EVERYWHERE)), carry

    def train_step(state: TrainState, batch: batches.Batch) -> TrainState:
        starts = jnp.broadcast_to(batch.starts, len(batch.inputs))
        chance = config.batches.reset_probability
        if chance and config.batches.kind == "streams":
            # By a key of its own, so that masks are the same whether or not streams are reset.
            reset_key = jax.random.fold_in(state.key, state.step)
            starts |= jax.random.bernoulli(reset_key, chance, starts.shape)
        carry = jax.tree.map(lambda x: jnp.where(starts[:, None], 0, x), state.carry)
        key, masks, parameter_key = state.key, None, None
        if regularization.is_random(rates):
            key, mask_key, parameter_key = jax.random.split(state.key, 3)
            masks = regularization.draw_masks(rates, model, mask_key, len(batch.inputs))
        read = batch.inputs, batch.targets
        compute = gradients
        if mesh is not None:
            specs = jax.tree.map(lambda array: parallel.get_storage_spec(array, mesh), state.params)
            everywhere, divided = parallel.EVERYWHERE, parallel.DIVIDED
            compute = parallel.shard_map(
                functools.partial(gradients_of_all, specs),
                mesh,
                in_specs=(specs, everywhere, divided, divided, divided),
                out_specs=((specs, everywhere), divided),
            )
        (gradient, loss), carry = compute(state.params, parameter_key, read, carry, masks)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        step = state.step + 1
        average = state.average
        if average is not None:
            # Short at first, so that the initial weights are soon forgotten.
            kept = jnp.minimum(decay, (1 + step) / (10 + step))
            average = jax.tree.map(lambda a, p: kept * a + (1 - kept) * p, average, params)
        # A learning rate or weight decay can make of finite gradients what is not.
        finite = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(gradient))
        finite &= model_lib.is_finite(params)
        # Selected leaf by leaf, it becomes part of the loops that compute the new values anyway.
        params, average, optimizer_state, carry = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (params, average, optimizer_state, carry),
            (state.params, state.average, state.optimizer, state.carry),
        )
        first_skipped = jnp.where(finite | (state.first_skipped > 0), state.first_skipped, step)
        return TrainState(
            params=params,
            average=average,
            optimizer=optimizer_state,
            carry=carry,
            key=key,
            step=step,
            loss_sum=state.loss_sum + jnp.where(finite, loss, 0),
            loss_steps=state.loss_steps + finite,
            skipped=state.skipped + ~finite,
            first_skipped=first_skipped,
        )

    return train_step
