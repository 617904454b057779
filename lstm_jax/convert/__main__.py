"""Convert weights from and to Keras and PyTorch, and to ONNX.

    python -m lstm_jax.convert --from model.keras --vocabulary vocabulary.json --workdir runs/new
    python -m lstm_jax.convert --workdir runs/quick --to model.safetensors

The suffix of a file is its format: .keras, .weights.h5 (both Keras 3), .safetensors (PyTorch)
or .onnx (a graph, which can only be written).
"""

if __name__ == "__main__":
    from lstm_jax.run import interrupts

    interrupts.exit_at_once()  # While the rest is imported, which takes seconds.

from pathlib import Path

from absl import flags

from lstm_jax.errors import UserError
from lstm_jax.run import command

_FROM = flags.DEFINE_string("from", None, "File to make a working directory from.")
_TO = flags.DEFINE_string("to", None, "File to write: .keras, .weights.h5, .safetensors or .onnx.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Working directory to make, or to read.")
_VOCABULARY = flags.DEFINE_string(
    "vocabulary", None, "Tokens of --from by id: a vocabulary.json, JSON list or object, or text."
)
_TEXT = flags.DEFINE_string(
    "text", None, "Text that --from was trained on. Its characters are the default vocabulary."
)
_DROP_SPECIAL = flags.DEFINE_boolean("drop_special", False, "Omit the rows of '' and '[UNK]'.")


def main() -> None:
    """Convert in the direction that the flags specify."""
    if _WORKDIR.value is None:
        raise UserError("specify the working directory: --workdir DIR")
    if (_FROM.value is None) == (_TO.value is None):
        raise UserError("give either --from FILE, to make the --workdir, or --to FILE, to read it")
    # Here, because it imports JAX, which --help does not need.
    from lstm_jax.convert import transfer

    directory = Path(_WORKDIR.value)
    if _FROM.value is not None:
        if _DROP_SPECIAL.value:
            raise UserError("--drop_special is for --to")
        transfer.import_weights(Path(_FROM.value), directory, _VOCABULARY.value, _TEXT.value)
    else:
        if _VOCABULARY.value or _TEXT.value:
            raise UserError("--vocabulary and --text are for --from")
        transfer.export_weights(directory, Path(_TO.value), _DROP_SPECIAL.value)


if __name__ == "__main__":
    command.run_command(main)
