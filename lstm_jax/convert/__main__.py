"""Weights in and out, from and to Keras and PyTorch.

    python -m lstm_jax.convert --from model.keras --vocabulary vocabulary.json --workdir runs/new
    python -m lstm_jax.convert --workdir runs/quick --to model.safetensors

What a file holds, its name says: .keras, .weights.h5 (both Keras 3) or .safetensors (PyTorch).
"""

if __name__ == "__main__":
    from lstm_jax.run import interrupts

    interrupts.exit_at_once()  # While the rest is imported, which takes seconds.

from pathlib import Path

from absl import flags

from lstm_jax import command
from lstm_jax.convert import transfer
from lstm_jax.errors import UserError


def main() -> None:
    """Reads the flags and converts."""
    values = flags.FLAGS
    source, target = values["from"].value, values.to
    if values.workdir is None:
        raise UserError("name the working directory: --workdir DIR")
    if (source is None) == (target is None):
        raise UserError(
            "give either --from FILE, to make the working directory of it, or --to FILE, to write "
            "what the working directory holds"
        )
    directory = Path(values.workdir)
    if source is not None:
        if values.drop_special:
            raise UserError("--drop_special is for --to")
        transfer.import_weights(Path(source), directory, values.vocabulary, values.text)
    else:
        if values.vocabulary or values.text:
            raise UserError("--vocabulary and --text are for --from")
        transfer.export_weights(directory, Path(target), values.drop_special)


if __name__ == "__main__":
    flags.DEFINE_string("from", None, "File of weights to make a working directory of.")
    flags.DEFINE_string("to", None, "File of weights to write: .keras, .weights.h5, .safetensors.")
    flags.DEFINE_string("workdir", None, "The working directory that is made, or read.")
    flags.DEFINE_string(
        "vocabulary", None, "What the ids of --from stand for: a vocabulary.json, a list, a text."
    )
    flags.DEFINE_string(
        "text", None, "The text that --from was trained on: its characters are the vocabulary."
    )
    flags.DEFINE_boolean(
        "drop_special", False, "Leave out the rows of '' and '[UNK]', for a model without them."
    )
    command.run_command(main)
