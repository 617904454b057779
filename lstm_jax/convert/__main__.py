"""Convert weights from and to PyTorch; make a folder of a model.

    python -m lstm_jax.convert --from my.safetensors --vocabulary vocabulary.json --workdir runs/new
    python -m lstm_jax.convert --workdir runs/quick --to my.safetensors
    python -m lstm_jax.convert --workdir runs/quick --to models/quick

A .safetensors file holds a state_dict of PyTorch. Without a suffix, --to is a folder with the
model, to keep or to publish, which all commands that read a working directory also read.
"""

if __name__ == "__main__":
    from lstm_jax.run import interrupts

    interrupts.exit_at_once()  # While the rest is imported, which takes seconds.

from pathlib import Path

from absl import flags

from lstm_jax.errors import UserError
from lstm_jax.run import command

_FROM = flags.DEFINE_string("from", None, "File of weights to import (.safetensors).")
_TO = flags.DEFINE_string("to", None, "File to write (.safetensors), or folder to make.")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, f"With --from, the folder to make; with --to, the model: {command.TRAINED}."
)
flags.DEFINE_alias("model", "workdir")
_VOCABULARY = flags.DEFINE_string(
    "vocabulary", None, "Tokens of --from by id, as in the vocabulary.json of a run."
)
_TEXT = flags.DEFINE_string(
    "text", None, "Text that --from was trained on. Its characters are the default vocabulary."
)
_MODULES = flags.DEFINE_list(
    "modules",
    [],
    "Names of the Embedding, the LSTM or GRU, and the Linear in --from. "
    "[default: embedding,lstm,linear or embedding,gru,linear]",
)
_DROP_SPECIAL = flags.DEFINE_boolean("drop_special", False, "Omit the rows of '' and '[UNK]'.")
_DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16"], "Dtype of a folder's weights. [default: float32]"
)


def main() -> None:
    """Convert in the direction that the flags specify."""
    if _WORKDIR.value is None:
        raise UserError("specify the working directory: --workdir DIR")
    if (_FROM.value is None) == (_TO.value is None):
        raise UserError("give either --from FILE, to make the --workdir, or --to FILE, to read it")
    # Here, because it imports JAX, which --help does not need.
    from lstm_jax.convert import transfer

    directory, is_folder = Path(_WORKDIR.value), bool(_TO.value) and not Path(_TO.value).suffix
    if _DTYPE.value and not is_folder:
        raise UserError("--dtype is for --to with the name of a folder, without a suffix")
    if _DROP_SPECIAL.value and (_FROM.value or is_folder):
        raise UserError("--drop_special is for --to with the name of a file")
    if _TO.value and (_VOCABULARY.value or _TEXT.value or _MODULES.value):
        raise UserError("--vocabulary, --text and --modules are for --from")
    if len(_MODULES.value) not in (0, 3):
        raise UserError("--modules needs three names, such as encoder,rnn,decoder")
    if _FROM.value is not None:
        text = _VOCABULARY.value, _TEXT.value
        transfer.import_weights(Path(_FROM.value), directory, *text, _MODULES.value)
    elif is_folder:
        transfer.export_folder(directory, Path(_TO.value), _DTYPE.value or "float32")
    else:
        transfer.export_weights(directory, Path(_TO.value), _DROP_SPECIAL.value)


if __name__ == "__main__":
    command.run_command(main)
