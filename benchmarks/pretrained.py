"""Train the model in the package, and write its folder anew: lstm_jax/pretrained/tiny-shakespeare.

    make pretrained

Three seeds of experiments/quick.py are trained. The best by validation loss is written in bfloat16;
its card also gets the losses as stored, the command and the commit. The same command resumes.
`tests/run/test_pretrained.py` holds the checksum and a sample of the result: change them with it.
"""

import shutil
import subprocess

from frame import ROOT, evaluate, run_python, train
from lstm_jax.run import metrics, workdir

FOLDER = ROOT / "lstm_jax" / "pretrained" / "tiny-shakespeare"


def main() -> None:
    """Train what is not trained yet, and write the folder."""
    losses = {}
    for seed in range(3):
        directory = ROOT / "runs" / "pretrained" / str(seed)
        flags = ("--config", "experiments/quick.py", f"--config.seed={seed}")
        train(directory, *flags)
        rows = metrics.read_metrics(directory / workdir.METRICS)
        loss = min(row["loss"] for row in rows if row["split"] == "validation")
        losses[loss] = directory, flags
        print(f"seed {seed}: validation loss {loss:.4f}", flush=True)
    best, flags = losses[min(losses)]
    describe = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    commit = subprocess.check_output(describe, cwd=ROOT, text=True).strip()
    shutil.rmtree(FOLDER, ignore_errors=True)
    run_python("-m", "lstm_jax.convert", "--workdir", best, "--to", FOLDER, "--dtype", "bfloat16")
    stored = [
        f"{split} {evaluate(FOLDER, '--split', split):.4f}" for split in ("validation", "test")
    ]
    with (FOLDER / "README.md").open("a") as card:
        card.write(
            f"\nLosses as stored, in bfloat16: {', '.join(stored)} nats per character.\n\n"
            "The best of three seeds by validation loss, which `make pretrained` trained at commit "
            f"{commit}:\n\n    python -m lstm_jax.main {' '.join(flags)}\n"
        )
    print(f"Wrote {FOLDER}: {', '.join(stored)}")


if __name__ == "__main__":
    main()
