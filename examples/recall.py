"""Train a policy with a memory, and one without, on a task that needs a memory.

    python examples/recall.py --updates 300

The first step of an episode shows one of four cues, the steps after it show nothing, and at its
end, 3 to 10 steps later, the agent must name the cue. The reward is 1 for the right answer, else 0,
so a policy without memory has a return of 0.25 at best. Episodes follow each other in a row of
64 steps in each of 32 environments: `reset` marks the first step of each. The algorithm is
REINFORCE with the mean reward as a baseline.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lstm_jax import ops

CUES, ENVIRONMENTS, TIME, HIDDEN = 4, 32, 64, 64


def draw_steps(key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Return inputs [environments, time, features]; and first steps, last steps and cues.

    The agent's answers change nothing but the reward, so all steps can be drawn before them.
    """
    lengths, cues = jax.random.split(key)
    ends = jnp.cumsum(jax.random.randint(lengths, (ENVIRONMENTS, TIME), 4, 12), axis=1)
    steps = jnp.arange(TIME)
    episode = (ends[:, None] <= steps[:, None]).sum(axis=-1)
    last = (ends[:, None] == steps[:, None] + 1).any(axis=-1)
    first = jnp.roll(last, 1, axis=1).at[:, 0].set(True)
    cue = jnp.take_along_axis(jax.random.randint(cues, ends.shape, 0, CUES), episode, axis=1)
    shown = jax.nn.one_hot(cue, CUES) * first[..., None]
    return jnp.concatenate([shown, last[..., None]], axis=-1), first, last, cue


def train(seed: int, updates: int, has_memory: bool) -> float:
    """Train a policy, and return its mean return in the last tenth of the updates."""
    optimizer = optax.adam(3e-3)

    def compute_loss(params: dict[str, Any], key: jax.Array) -> tuple[jax.Array, jax.Array]:
        steps, actions = jax.random.split(key)
        inputs, first, last, cue = draw_steps(steps)
        reset = first if has_memory else jnp.ones_like(first)  # Every step reads zeros.
        _, outputs = ops.gru(params["gru"], inputs, reset=reset)
        logits = outputs @ params["head"]
        action = jax.random.categorical(actions, logits)
        reward = jnp.where(last, action == cue, 0.0)
        mean = reward.sum() / last.sum()
        log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits), action[..., None], axis=-1)
        advantage = jnp.where(last, reward - mean, 0.0)
        return -(advantage * log_prob[..., 0]).sum() / last.sum(), mean

    def update(state: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        params, opt_state = state
        grads, mean = jax.grad(compute_loss, has_aux=True)(params, key)
        updates, opt_state = optimizer.update(grads, opt_state)
        return (optax.apply_updates(params, updates), opt_state), mean

    gru = ops.GRUParams.init(jax.random.key(seed), CUES + 1, HIDDEN)
    params = {"gru": gru, "head": jnp.zeros((HIDDEN, CUES))}
    keys = jax.random.split(jax.random.key(seed + 1), updates)
    _, returns = jax.lax.scan(update, (params, optimizer.init(params)), keys)
    return float(returns[-max(1, updates // 10) :].mean())


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--updates", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for has_memory in (False, True):
        mean = train(arguments.seed, arguments.updates, has_memory)
        print(f"{'with' if has_memory else 'without'} memory: mean return {mean:.3f}")
