"""Search for the most probable continuations of a prompt.

    python examples/beam_search.py tiny-shakespeare "ROMEO:" --length 30 --beams 4

Each step extends every text by every token, and keeps the most probable ones. The texts of the last
step are printed with their log-probabilities. One beam is greedy decoding.
"""

import argparse

import jax
import numpy as np

import lstm_jax
from lstm_jax.generation import State, encode_prompt
from lstm_jax.run import command
from lstm_jax.vocabulary import PADDING_ID, SPECIAL_IDS


def search(run: lstm_jax.Run, prompt: str, length: int, beams: int) -> list[tuple[str, float]]:
    """Return the prompt with each continuation, of up to `length` tokens, and its log-probability.

    The best comes first. A text that ends with the stop token is kept as it is.
    """

    def pick(state: State, rows: np.ndarray) -> State:
        """Return the state of these texts."""
        return jax.tree.map(lambda x: x[rows] if x.ndim else x, state)

    state = run.read(encode_prompt(run.vocabulary, prompt)[None])
    state = pick(state, np.zeros(beams, int))
    totals = np.full(beams, -np.inf)
    totals[0] = 0  # All others are copies of the first.
    generated, ended = np.zeros((beams, 0), np.int32), np.zeros(beams, bool)
    for _ in range(length):
        log_probs = np.array(jax.nn.log_softmax(state.logits), np.float64)
        log_probs[:, SPECIAL_IDS] = -np.inf
        log_probs[ended] = -np.inf
        log_probs[ended, PADDING_ID] = 0
        sums = totals[:, None] + log_probs
        best = np.argsort(-sums, axis=None, kind="stable")[:beams]
        parents, ids = np.divmod(best.astype(np.int32), np.int32(sums.shape[1]))
        totals = sums.ravel()[best]
        generated = np.column_stack([generated[parents], ids])
        ended = ended[parents] | (ids == run.vocabulary.stop_id)
        if ended.all():
            break
        state = run.read(ids[:, None], pick(state, parents))
    stop_id = run.vocabulary.stop_id
    texts = [run.vocabulary.decode(i for i in row if i != stop_id) for row in generated]
    return [
        (prompt + t, total)
        for t, total in zip(texts, totals.tolist(), strict=True)
        if np.isfinite(total)
    ]


def main() -> None:
    """Print the most probable continuations of a prompt."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", help="a model that lstm_jax.load reads")
    parser.add_argument("prompt")
    parser.add_argument("--length", type=int, default=100)
    parser.add_argument("--beams", type=int, default=5)
    arguments = parser.parse_args()
    model = lstm_jax.load(arguments.model)
    for found, log_prob in search(model, arguments.prompt, arguments.length, arguments.beams):
        print(f"{log_prob:8.2f}  {found!r}")


if __name__ == "__main__":
    command.call_main(main)
