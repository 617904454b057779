"""Train the model in the package, and write its folder anew: lstm_jax/pretrained/tiny-shakespeare.

    make pretrained

examples/student.py trains three teachers, three seeds of experiments/shakespeare_best.py, and
generates a text with them. On this text, the model of experiments/quick.py learns the mean of their
probabilities. It is written in bfloat16; its card has the losses as stored, the commands and the
commit. The same command resumes. `tests/run/test_pretrained.py` holds the checksum and a sample of
the result: change them with it.
"""

import dataclasses
import shlex
import shutil
import subprocess
from pathlib import Path

from frame import ROOT, evaluate, run_python, train
from lstm_jax.run import workdir

FOLDER = ROOT / "lstm_jax" / "pretrained" / "tiny-shakespeare"
RUNS = Path("runs", "pretrained")  # Relative, as in the config of the model.
TEACHERS = ("examples/student.py", "--config", "experiments/shakespeare_best.py", "--out", RUNS)
_NAMES = [str(RUNS / f"teacher_{seed}") for seed in range(3)]
_TEXT = [str(RUNS / f"{split}.txt") for split in ("train", "validation", "test")]
STUDENT = (
    "--config",
    "experiments/quick.py",
    f"--config.data.path={';'.join(_TEXT)}",
    f"--config.distill.teachers={','.join(_NAMES)}",
    "--config.distill.weight=0.9",
    "--config.optimizer.learning_rate=0.012",
    "--config.optimizer.weight_decay=0.03",
    "--config.regularization.activation=0.25",
    "--config.regularization.temporal_activation=0.25",
)


def main() -> None:
    """Train what is not trained yet, and write the folder."""
    run_python(*TEACHERS)
    train(ROOT / RUNS / "small", *STUDENT)
    describe = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    commit = subprocess.check_output(describe, cwd=ROOT, text=True).strip()
    shutil.rmtree(FOLDER, ignore_errors=True)
    convert = ("lstm_jax.convert", "--workdir", RUNS / "small", "--to", FOLDER)
    run_python("-m", *convert, "--dtype", "bfloat16")
    # Its validation and test splits are those of Tiny Shakespeare, which everybody has.
    data = workdir.load_config(ROOT / _NAMES[0]).data
    config = dataclasses.replace(workdir.load_config(FOLDER), data=data)
    workdir.save_fields(FOLDER, config, workdir.load_vocabulary(FOLDER))
    stored = [
        f"{split} {evaluate(FOLDER, '--split', split):.4f}" for split in ("validation", "test")
    ]
    (FOLDER / "README.md").write_text(
        f"---\nlibrary_name: lstm-jax\npipeline_tag: text-generation\n---\n\n# {FOLDER.name}\n\n"
        f"    python -m lstm_jax.sample --model {FOLDER.name} --prompt ROMEO:\n\n"
        f"Losses as stored, in bfloat16: {', '.join(stored)} nats per character.\n\n"
        "It learned from three teachers, seeds 0 to 2, and from text that they generated. `make "
        f"pretrained` trained all at commit {commit}:\n\n"
        f"    python {shlex.join(map(str, TEACHERS))}\n"
        f"    python -m lstm_jax.main {shlex.join(STUDENT)}\n"
    )
    print(f"Wrote {FOLDER}: {', '.join(stored)}")


if __name__ == "__main__":
    main()
