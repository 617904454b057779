"""Train an agent with a memory by proximal policy optimization (PPO, Schulman et al. 2017).

    python examples/actor_critic.py --updates 50

The task is a T-maze (Bakker 2001): the first step of an episode shows a side. The agent must walk
to the end of a corridor and turn to this side there, for a reward of 1. It acts with `ops.step`,
and learns with `ops.lstm` over all steps since the last update.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lstm_jax import ops

ENVIRONMENTS, TIME, HIDDEN, CORRIDOR, WALK = 64, 32, 64, 6, 2  # Actions 0 and 1 turn to a side.


def play(params: Any, state: Any, key: jax.Array) -> tuple[Any, Any]:
    """Take `TIME` steps; return the state, and arrays of all steps [environments, time, ...]."""

    def act(state: Any, key: jax.Array) -> tuple[Any, Any]:
        side, place, first, carry = state
        action_key, side_key = jax.random.split(key)
        inputs = jnp.column_stack([(2.0 * side - 1) * first, place == CORRIDOR])
        carry, outputs = ops.step(params["lstm"], inputs, carry, reset=first)
        head = outputs @ params["head"]  # The logits of the actions, and the value of the state.
        action = jax.random.categorical(action_key, head[:, :3])
        log_prob = -optax.softmax_cross_entropy_with_integer_labels(head[:, :3], action)
        last = (place == CORRIDOR) & (action != WALK)
        reward = jnp.where(last, action == side, -0.02)
        place = jnp.where(last, 0, jnp.minimum(place + (action == WALK), CORRIDOR))
        side = jnp.where(last, jax.random.randint(side_key, side.shape, 0, 2), side)
        step = inputs, first, action, log_prob, head[:, 3], reward, last
        return (side, place, last, carry), step

    state, steps = jax.lax.scan(act, state, jax.random.split(key, TIME))
    return state, jax.tree.map(lambda x: x.swapaxes(0, 1), steps)


def compute_loss(params: Any, carry: Any, steps: Any) -> tuple[jax.Array, jax.Array]:
    """Return the loss of steps after a carry, and their log-probabilities [environments, time]."""
    inputs, first, action, old_log_prob, old_value, reward, last = steps
    head = ops.lstm(params["lstm"], inputs, carry, reset=first)[1] @ params["head"]
    log_prob = -optax.softmax_cross_entropy_with_integer_labels(head[..., :3], action)
    reward = reward.at[:, -1].set(old_value[:, -1])  # Of the last step and all after it.
    returns = ops.linear_scan(0.98 * ~last[..., None], reward[..., None], reverse=True)[1][..., 0]
    ratio, advantage = jnp.exp(log_prob - old_log_prob), returns - old_value
    gain = jnp.minimum(ratio * advantage, jnp.clip(ratio, 0.8, 1.2) * advantage)
    return (0.5 * (head[..., 3] - returns) ** 2 - gain).mean(), log_prob


def train(seed: int, updates: int) -> jax.Array:
    """Return the share of correct turns between updates."""
    keys, ones = jax.random.split(jax.random.key(seed), updates + 1), jnp.ones(ENVIRONMENTS, int)
    params = {"lstm": ops.LSTMParams.init(keys[0], 2, HIDDEN), "head": jnp.zeros((HIDDEN, 4))}
    state = ones, 0 * ones, ones == 1, ops.LSTMCarry.zeros(ENVIRONMENTS, HIDDEN)
    optimizer = optax.adam(3e-3)

    def update(agent: Any, key: jax.Array) -> Any:
        params, opt_state, before = agent
        after, steps = play(params, before, key)
        for _ in range(4):
            grads, _ = jax.grad(compute_loss, has_aux=True)(params, before[-1], steps)
            changes, opt_state = optimizer.update(grads, opt_state)
            params = optax.apply_updates(params, changes)
        *_, reward, last = steps
        return (params, opt_state, after), (reward == 1).sum() / jnp.maximum(last.sum(), 1)

    return jax.lax.scan(update, (params, optimizer.init(params), state), keys[1:])[1]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--updates", type=int, default=50)
    shares = train(seed=0, updates=parser.parse_args().updates)
    print("correct turns:", *(f"{share:.0%}" for share in shares[::5]))
