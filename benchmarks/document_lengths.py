"""Compare the lengths of documents that a model generates with those of real ones.

    python benchmarks/document_lengths.py --workdir runs/shakespeare_speeches

The model must have a stop token (data.document_separator). It generates `--num_samples`
documents at temperature 1, each up to its stop token or to `--length` tokens.
"""

from pathlib import Path

import jax
import numpy as np
from absl import logging

from frame import parse_flags, print_head, print_row
from lstm_jax import generation
from lstm_jax.data import texts
from lstm_jax.run import workdir

_PERCENTILES = (10, 25, 50, 75, 90)


def main() -> None:
    """Measure and print a Markdown table of lengths in characters."""
    options = parse_flags(__doc__, workdir=Path, num_samples=500, length=3000, seed=0)
    logging.set_verbosity(logging.ERROR)
    trained = workdir.load_trained(options.workdir)
    documents = {
        f"{name} text": text.split(trained.vocabulary.stop)
        for name, text in texts.read_splits(trained.config.data).items()
    }
    documents["generated"] = generation.generate_texts(
        trained.model,
        trained.params,
        trained.vocabulary,
        jax.random.key(options.seed),
        length=options.length,
        num_samples=options.num_samples,
    )
    print_head("", "documents", *(f"{p} %" for p in _PERCENTILES), "mean")
    for name, parts in documents.items():
        lengths = [len(part) for part in parts]
        figures = [*np.percentile(lengths, _PERCENTILES), np.mean(lengths)]
        print_row(name, f"{len(parts):,}", *(f"{x:.0f}" for x in figures))


if __name__ == "__main__":
    main()
