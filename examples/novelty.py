"""Measure how much of a generated text is copied from the training text.

    python examples/novelty.py runs/quick train.txt --length 1000

Passages of more than 20 characters that are also in the training text count as copied: any two
texts in one language share shorter ones. The training text of Tiny Shakespeare is
~/tensorflow_datasets/tiny_shakespeare/train.txt.
"""

import argparse
from pathlib import Path

import lstm_jax
from lstm_jax.run import command
from lstm_jax.run.messages import make_printable

COMMON = 20


def measure_novelty(text: str, training_text: str) -> tuple[str, float]:
    """Return the longest passage that is in the training text, and the share of copied ones.

    The share is that of the characters in copied passages longer than `COMMON`.
    """
    longest, copied, end = "", set[int](), 0
    for start in range(len(text)):
        end = max(end, start)  # The passage from `start` ends where the one before does, or later.
        while end < len(text) and text[start : end + 1] in training_text:
            end += 1
        longest = max(longest, text[start:end], key=len)
        if end - start > COMMON:
            copied |= {*range(start, end)}
    return longest, len(copied) / max(len(text), 1)


def main() -> None:
    """Print a generated text, and what of it the training text contains."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", help="a model that lstm_jax.load reads")
    parser.add_argument("training_text", type=Path)
    parser.add_argument("--length", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    run = lstm_jax.load(arguments.model)
    generated = run.generate(length=arguments.length, seed=arguments.seed, stop_token=False)
    print(make_printable(generated))
    source = arguments.training_text.read_bytes().decode("utf-8-sig")
    longest, share = measure_novelty(generated, source)
    print(f"\n{share:.1%} of the characters are in copied passages of more than {COMMON}")
    print(f"the longest passage has {len(longest)} characters: {longest!r}")


if __name__ == "__main__":
    command.call_main(main)
