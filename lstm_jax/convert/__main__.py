"""Convert weights from and to PyTorch; make a folder of a model.

    python -m lstm_jax.convert --from my.safetensors --vocabulary vocabulary.json --workdir runs/new
    python -m lstm_jax.convert --workdir runs/quick --to my.safetensors
    python -m lstm_jax.convert --workdir runs/quick --to models/quick

A .safetensors file holds a state_dict of PyTorch. Without this suffix, --to is a folder with the
model, to keep or to publish, which all commands that read a working directory also read.
"""

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
_MODULES = flags.DEFINE_list(
    "modules",
    ["embedding", "lstm", "linear"],
    "Names of the Embedding, the LSTM or GRU, and the Linear in --from.",
)
_DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "Dtype of the weights in a folder."
)


def main() -> None:
    """Convert in the direction that the flags specify."""
    is_given = [flag.value is not None for flag in (_FROM, _VOCABULARY, _TO)]
    if _WORKDIR.value is None or is_given not in ([True, True, False], [False, False, True]):
        raise UserError(
            "give --workdir DIR, and either --from FILE and --vocabulary FILE, to make this model, "
            "or --to, to convert it"
        )
    if len(_MODULES.value) != 3:
        raise UserError("--modules needs three names, such as encoder,rnn,decoder")
    # Here, because it imports JAX, which --help does not need.
    from lstm_jax.convert import transfer
    from lstm_jax.run.workdir import expand_path

    directory, file = Path(_WORKDIR.value), expand_path(_FROM.value or _TO.value)
    if _FROM.value:
        transfer.import_weights(file, directory, _VOCABULARY.value, _MODULES.value)
    elif file.suffix == ".safetensors":
        transfer.export_weights(directory, file)
    else:
        transfer.export_folder(directory, file, _DTYPE.value)


if __name__ == "__main__":
    command.run_command(main)
