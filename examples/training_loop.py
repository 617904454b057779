"""Train with a loop of your own: any optimizer, batches that change, another loss.

    python examples/training_loop.py --config experiments/quick.py --optimizer ademamix

It trains on one device, saves nothing, and prints the losses. The optimizer is Optax's scale_by_x
with the config's schedule, clipping and weight decay; the other fields of the optimizer, teachers
and max_steps have no effect. --batches 32x48x2,64x48x4: 32 windows of 48 tokens for 2 epochs, then
64 for 4. --decode_past 0.01: past decode regularization (Brahma 2019).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from optax import softmax_cross_entropy_with_integer_labels as cross_entropy

from lstm_jax import batches, cells, loss, model, optimizer, train_step
from lstm_jax.cells.base import reset_carry
from lstm_jax.config import Config, complete_config
from lstm_jax.data import texts
from lstm_jax.run import command

command.define_config_flag("The experiment.")
_OPTIMIZER = flags.DEFINE_string("optimizer", "adam", "The x in Optax's scale_by_x.")
_BATCHES = flags.DEFINE_list("batches", [], "As 32x48x2,64x48x4: size, length, epochs.")
_DECODE_PAST = flags.DEFINE_float("decode_past", 0.0, "Weight of past decode regularization.")
_FIELDS = ("batches.batch_size", "batches.window_length", "num_epochs")


def make_optimizer(config: Config, total_steps: int) -> optax.GradientTransformation:
    """Chain clipping, the optimizer, weight decay of all matrices, and the learning rate."""
    fields, name = config.optimizer, f"scale_by_{_OPTIMIZER.value}"
    is_matrix = functools.partial(jax.tree.map, lambda x: x.ndim > 1)
    return optax.chain(
        optax.clip_by_global_norm(fields.max_gradient_norm or jnp.inf),
        (getattr(optax, name, None) or getattr(optax.contrib, name))(),
        optax.add_decayed_weights(fields.weight_decay, is_matrix),
        optax.scale_by_learning_rate(optimizer.make_schedule(fields, total_steps)),
    )


def train(config: Config, ids: Any, lstm: model.LanguageModel, params: Any, key: jax.Array) -> Any:
    """Return the parameters after training."""
    parts = [dict(zip(_FIELDS, map(int, part.split("x")), strict=True)) for part in _BATCHES.value]
    configs = [complete_config(config, part) for part in parts or [{}]]
    lengths = [part.num_epochs * batches.count_steps(len(ids), part.batches) for part in configs]
    chain, rates = make_optimizer(config, sum(lengths)), config.regularization

    def compute_loss(params: Any, carry: Any, keys: Any, batch: Any) -> Any:
        masks = train_step.draw_masks(rates, lstm, keys[0], len(batch.inputs))
        dropped = train_step.drop_parameters(rates, params["lstm"], keys[1])
        outputs, carry = lstm.bind({"params": dropped}).run(batch.inputs, carry, masks)
        logits = lstm.bind({"params": params["lstm"]}).predict(model.apply_mask(outputs, masks[-1]))
        losses = cross_entropy(logits, batch.targets)
        if _DECODE_PAST.value:
            table = params["lstm"]["embedding"]["embedding"]
            read = jnp.tanh(jax.nn.softmax(logits) @ table @ params["past"]) @ table.T
            losses += _DECODE_PAST.value * cross_entropy(read, batch.inputs)
        return losses.mean(), carry

    @jax.jit(donate_argnums=(0, 1, 2))
    def step(params: Any, opt_state: Any, carry: Any, key: jax.Array, batch: Any) -> Any:
        key, *mask_keys = jax.random.split(key, 3)
        carry = reset_carry(lstm, carry, batch.reset)
        grads, carry = jax.grad(compute_loss, has_aux=True)(params, carry, mask_keys, batch)
        updates, opt_state = chain.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, carry, key

    opt_state = chain.init(params)
    for part, length in zip(configs, lengths, strict=True):
        feed = batches.make_batches(ids, part.batches, config.seed)
        carry = lstm.initial_carry(part.batches.batch_size)
        for _ in range(length):
            params, opt_state, carry, key = step(params, opt_state, carry, key, next(feed))
    return params


def main() -> None:
    """Train, and print the loss of each split in nats per token."""
    config = command.read_experiment()[0]
    splits = texts.load_texts(config.data)
    tokens = splits["train"].make_vocabulary(config.data)
    ids, _ = texts.encode_splits(splits, tokens)
    cells.load_cell(config.model.cell)
    lstm = model.make_model(config.model, len(tokens), tokens.stop_id)
    initial_key, key = jax.random.split(jax.random.key(config.seed))  # As `main` does.
    initial = model.init_params(lstm, initial_key, texts.count_ids(ids["train"], len(tokens)))
    past = jnp.eye(lstm.embedding_size)
    trained = train(config, ids["train"], lstm, {"lstm": initial, "past": past}, key)["lstm"]
    ids["validation and test"] = np.append(ids["validation"], ids["test"])
    print({name: round(loss.compute_loss(lstm, trained, x), 4) for name, x in ids.items()})


if __name__ == "__main__":
    command.run_command(main)
