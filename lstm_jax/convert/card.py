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

# Fields that differ between machines.
_OMITTED = ("data.sha256", "data.directory")
_PATHS = ("data.path", "init_from", "distill.teachers")


def make_card(name: str, trained: Trained, dtype: str, rows: Sequence[Row]) -> str:
    """Return the card of the folder `name`: model, text, losses, and how to use and train it.

    What a config names, perhaps one from someone else, is in blocks of code, not Markdown or HTML.
    `dtype` is that of the file, and `rows` are those of the run's metrics.jsonl.
    """
    name, data, model = make_visible(name), trained.config.data, trained.model
    count = sum(array.size for array in jax.tree.leaves(trained.params))
    text = f"{_remove_directories(data.path) or data.dataset}, SHA-256 and bytes: {data.sha256}"
    if not data.sha256:  # Weights that were imported without their text.
        text = "unknown"
    losses = {row["split"]: row["loss"] for row in rows if row["step"] == trained.step}
    measured = [f"{s} {losses[s]:.4f}" for s in ("validation", "test") if s in losses]
    default = dict(config_lib.flatten(config_lib.Config()))
    fields = {f: v for f, v in config_lib.flatten(trained.config) if v != default[f]}
    settings = [
        f"    config.{f} = {(_remove_directories(str(v)) if f in _PATHS else v)!r}"
        for f, v in fields.items()
        if f not in _OMITTED
    ]
    lines = [
        "---\nlibrary_name: lstm-jax\npipeline_tag: text-generation\n---\n",
        f"# {name}\n",
        f"A language model of lstm-jax {__version__}: {model.cell_name}, {model.num_layers} x "
        f"{model.hidden_size} hidden units, {count:,} parameters in {dtype}, "
        f"{len(trained.vocabulary)} {trained.vocabulary.token_name}s.\n",
        f"Losses at step {trained.step}, in nats per {trained.vocabulary.token_name}: "
        f"{', '.join(measured) or 'not measured'}.\n",
        "Text, whose license is to be added here:\n",
        f"    {make_visible(text)}\n",
        "Generate text (`lstm_jax.load` does it in Python):\n",
        f"    python -m lstm_jax.sample --workdir {shlex.quote(name)}\n",
        "Train it again, in Python:\n",
        "    import lstm_jax\n",
        "    config = lstm_jax.config.default()",
        *settings,
        '    lstm_jax.train(config, "runs/again")\n',
    ]
    return "\n".join(lines)


def _remove_directories(paths: str) -> str:
    return re.sub("[^,;]+", lambda path: path[0].rpartition("/")[2], paths)
