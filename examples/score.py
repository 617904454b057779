"""Score the sentences of a file, one on each line, and sort them from most to least likely.

    python examples/score.py tiny-shakespeare sentences.txt

The score is the number of bits that the model needs for each character, given those before it. The
end of the line is a character, too. Each sentence is read as if it followed an empty line.
"""

import argparse
import math
from pathlib import Path

import lstm_jax
from lstm_jax.run import command


def score_sentences(run: lstm_jax.Run, sentences: list[str]) -> list[tuple[float, str]]:
    """Return the bits per character of each sentence with its sentence, the smallest first."""
    scored = []
    for sentence in sentences:
        tokens, log_probs = run.score(f"{sentence}\n", "\n\n")  # Its end is predicted, too.
        # A token that the model lacks is spelled out, with eight bits for each byte and its end.
        unknown = sum(len(t.encode()) + 1 for t in tokens if t not in run.vocabulary)
        bits = -log_probs.sum() / math.log(2) + 8 * unknown
        scored.append((bits / (len(sentence) + 1), sentence))
    return sorted(scored)


def main() -> None:
    """Print the sentences of a file, the most probable first."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", help="a model that lstm_jax.load reads")
    parser.add_argument("file", type=Path)
    arguments = parser.parse_args()
    lines = arguments.file.read_text(encoding="utf-8-sig").split("\n")
    for bits, line in score_sentences(lstm_jax.load(arguments.model), list(filter(None, lines))):
        print(f"{bits:6.3f}  {line}")


if __name__ == "__main__":
    command.call_main(main)
