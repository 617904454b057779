"""Measure how much of a generated text is copied from the training text.

    python examples/novelty.py runs/quick input.txt --length 1000

Runs of more than 20 characters that are also in the training text count as copied: any two texts in
one language share shorter ones.
"""

import argparse
from pathlib import Path

import lstm_jax

COMMON_RUN = 20


def measure_novelty(text: str, training_text: str) -> tuple[str, float]:
    """Return the longest run of a text that is in the training text, and the share of copied runs.

    The share is that of the characters in copied runs longer than `COMMON_RUN`.
    """
    longest, copied, end = "", set[int](), 0
    for start in range(len(text)):
        end = max(end, start)  # The run from `start` goes at least as far as the one before.
        while end < len(text) and text[start : end + 1] in training_text:
            end += 1
        longest = max(longest, text[start:end], key=len)
        if end - start > COMMON_RUN:
            copied |= {*range(start, end)}
    return longest, len(copied) / max(len(text), 1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model", help="a model, as of lstm_jax.load")
    parser.add_argument("training_text", type=Path)
    parser.add_argument("--length", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    run = lstm_jax.load(arguments.model)
    generated = run.generate(length=arguments.length, seed=arguments.seed)
    print(generated)
    source = arguments.training_text.read_text(encoding="utf-8")
    run_of_most, share = measure_novelty(generated, source)
    print(f"\n{share:.1%} of the characters are in copied runs of more than {COMMON_RUN}")
    print(f"the longest run has {len(run_of_most)} characters: {run_of_most!r}")
