"""Train the model in the package, and write its folder anew: lstm_jax/pretrained/tiny-shakespeare.

    make pretrained

Three seeds of experiments/shakespeare_teacher.py are teachers: the model of experiments/quick.py
learns the mean of their probabilities. It is written in bfloat16; its card has the losses as
stored, the commands and the commit. The same command resumes. `tests/run/test_pretrained.py` holds
the checksum and a sample of the result: change them with it.
"""

import shutil
import subprocess
from pathlib import Path

from frame import ROOT, evaluate, run_python, train

FOLDER = ROOT / "lstm_jax" / "pretrained" / "tiny-shakespeare"
RUNS = Path("runs", "pretrained")  # Relative, as in the config of the model.
TEACHER = ("--config", "experiments/shakespeare_teacher.py")
STUDENT = (
    "--config",
    "experiments/quick.py",
    "--config.num_epochs=36",
    "--config.distill.weight=0.8",
)


def main() -> None:
    """Train what is not trained yet, and write the folder."""
    teachers = [RUNS / f"teacher_{seed}" for seed in range(3)]
    for seed, directory in enumerate(teachers):
        train(ROOT / directory, *TEACHER, f"--config.seed={seed}")
    student = (*STUDENT, f"--config.distill.teachers={','.join(map(str, teachers))}")
    train(ROOT / RUNS / "student", *student)
    describe = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    commit = subprocess.check_output(describe, cwd=ROOT, text=True).strip()
    shutil.rmtree(FOLDER, ignore_errors=True)
    convert = ("lstm_jax.convert", "--workdir", RUNS / "student", "--to", FOLDER)
    run_python("-m", *convert, "--dtype", "bfloat16")
    stored = [
        f"{split} {evaluate(FOLDER, '--split', split):.4f}" for split in ("validation", "test")
    ]
    command = "    python -m lstm_jax.main"
    (FOLDER / "README.md").write_text(
        f"---\nlibrary_name: lstm-jax\npipeline_tag: text-generation\n---\n\n# {FOLDER.name}\n\n"
        f"Losses as stored, in bfloat16: {', '.join(stored)} nats per character.\n\n"
        "It learned from three teachers, seeds 0 to 2. `make pretrained` trained all at commit "
        f"{commit}:\n\n{command} {' '.join(TEACHER)} --config.seed=SEED\n"
        f"{command} {' '.join(student)}\n"
    )
    print(f"Wrote {FOLDER}: {', '.join(stored)}")


if __name__ == "__main__":
    main()
