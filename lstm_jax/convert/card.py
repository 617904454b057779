"""Write the card of a model: the README.md of its folder."""

import re
import shlex
from collections.abc import Sequence

import jax

from lstm_jax import config as config_lib
from lstm_jax.errors import make_visible
from lstm_jax.run.metrics import Row
from lstm_jax.run.workdir import Trained
from lstm_jax.version import __version__

# Those of standard texts that are known.
_LICENSES = {"tiny_shakespeare": "public domain", "wikitext2": "CC BY-SA 3.0"}
# Fields that differ between machines.
_OMITTED = ("data.sha256", "data.directory")


def make_card(name: str, trained: Trained, dtype: str, rows: Sequence[Row]) -> str:
    """Return the card of the folder `name`: model, text, losses, and how to use and train it.

    What a config names, perhaps one from someone else, is in blocks of code, not Markdown or HTML.
    `dtype` is that of the file, and `rows` are those of the run's metrics.jsonl.
    """
    name = make_visible(name)
    model, vocabulary, config = trained.model, trained.vocabulary, trained.config
    data = config.data
    count = sum(array.size for array in jax.tree.leaves(trained.params))
    text = f"{_remove_directories(data.path) or data.dataset}, license: "
    text += "unknown" if data.path else _LICENSES.get(data.dataset, "unknown")
    digest, *lengths = data.sha256.split(":")
    text += f", bytes of its splits: {', '.join(lengths)}, SHA-256 of all: {digest}"
    if not data.sha256:  # Weights that were imported without their text.
        text = "unknown"
    losses = {row["split"]: row["loss"] for row in rows if row["step"] == trained.step}
    table = [f"| {s} | {losses[s]:.4f} |" for s in ("validation", "test") if s in losses]
    default = dict(config_lib.flatten(config_lib.Config()))
    fields = {f: v for f, v in config_lib.flatten(config) if v != default[f] and f not in _OMITTED}
    for path in {"data.path", "init_from", "distill.teachers"} & fields.keys():
        fields[path] = _remove_directories(str(fields[path]))
    settings = [f"config.{field} = {value!r}" for field, value in fields.items()]
    lines = [
        "---\nlibrary_name: lstm-jax\npipeline_tag: text-generation\n---\n",
        f"# {name}\n",
        f"A language model of lstm-jax {__version__}: {model.cell_name}, {model.num_layers} x "
        f"{model.hidden_size} hidden units, {count:,} parameters in {dtype}, {len(vocabulary)} "
        f"{vocabulary.token_name}s.\n",
        "Text:\n",
        f"    {make_visible(text)}\n",
        f"Losses at step {trained.step}, that of the parameters:\n",
        f"| split | nats per {vocabulary.token_name} |",
        "| --- | ---: |",
        *(table or ["| not measured | |"]),
        "\nGenerate text (`lstm_jax.load` does it in Python):\n",
        f"    python -m lstm_jax.sample --workdir {shlex.quote(name)}\n",
        "Train it again, in Python:\n",
        "    import lstm_jax\n",
        *(f"    {line}" for line in ["config = lstm_jax.config.default()", *settings]),
        '    lstm_jax.train(config, "runs/again")\n',
    ]
    return "\n".join(lines)


def _remove_directories(paths: str) -> str:
    return re.sub("[^,;]+", lambda path: path[0].rpartition("/")[2], paths)
