"""Train a model that is as good as an ensemble of models of its size.

    python examples/student.py --config experiments/shakespeare_best.py --out runs/student

1. Teachers are trained, each with its own seed.
2. Together they generate a text, four times as long as the training text.
3. The student starts with the parameters of the last teacher. It reads the generated text once and
   the training text twice in an epoch, and learns the mean of the teachers' probabilities
   (Bucila et al. 2006; Hinton et al. 2015). No teacher has memorized the generated text.

--config.FIELD=VALUE flags are for the teachers. The student has the same fields, except its number
of epochs (--epochs), its learning rate, and regularization, of which it has none.
The same command resumes.
"""

import dataclasses
import os
from pathlib import Path

import jax
from absl import flags

import lstm_jax
from lstm_jax import generation
from lstm_jax.config import RegularizationConfig, complete_config
from lstm_jax.data import files, texts
from lstm_jax.run import command

command.define_config_flag("The experiment.")
_OUT = flags.DEFINE_string("out", "runs/student", "Directory of the runs and of the text.")
_TEACHERS = flags.DEFINE_integer("teachers", 3, "Number of teachers.")
_EPOCHS = flags.DEFINE_integer("epochs", 3, "Epochs of the student.")
_RELATIVE_LENGTH = 4  # The length of the generated text, relative to the training text.
_SAMPLES = 256  # It consists of this number of samples.


def generate_splits(teachers: list[Path], splits: dict[str, str], out: Path) -> str:
    """Write the student's splits, unless that is done; return their paths as in `data.path`."""
    paths = {name: out / f"{name}.txt" for name in ("validation", "test", "train")}
    if not paths["train"].exists():
        print("The teachers generate a text", flush=True)
        run, read = lstm_jax.load(teachers), splits["train"]
        length = _RELATIVE_LENGTH * len(run.vocabulary.split(read)) // _SAMPLES
        pieces = generation.stream_texts(
            *(run.model, run.params, run.vocabulary, jax.random.key(0)),
            length=length,
            num_samples=_SAMPLES,
            stop_token=False,
        )
        generated = ["".join(text) for text in zip(*pieces, strict=True)]
        halves = generated[::2], generated[1::2]
        # The validation text follows the training text.
        end = run.vocabulary.stop or "\n"
        train = "".join(end.join([*half, read]) for half in halves)
        for name, path in paths.items():
            text = train if name == "train" else splits[name]
            files.write_file(path, text.encode("utf-8", "surrogateescape"))
    return ";".join(str(paths[name]) for name in ("train", "validation", "test"))


def main() -> None:
    """Train all models that are not trained yet."""
    config, out = command.read_experiment()[0], Path(os.path.expanduser(_OUT.value))
    if config.data.document_separator == "file":
        raise lstm_jax.UserError("files that are documents can't be written into one text")
    teachers = [out / f"teacher_{k}" for k in range(_TEACHERS.value)]
    for k, directory in enumerate(teachers):
        lstm_jax.train(complete_config(config, {"seed": config.seed + k}), directory)
    fields = {
        "num_epochs": _EPOCHS.value,
        "optimizer.learning_rate": 4e-3,
        "distill.weight": 0.9,
        "init_from": str(teachers[-1]),
        "distill.teachers": ",".join(map(str, teachers)),
        "data.path": generate_splits(teachers, texts.read_splits(config.data), out),
    }
    config = dataclasses.replace(config, regularization=RegularizationConfig())  # None.
    lstm_jax.train(complete_config(config, fields), out / "student")


if __name__ == "__main__":
    command.run_command(main)
