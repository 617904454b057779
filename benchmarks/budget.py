"""Compare what experiments/minutes.py chooses with a search, in equal minutes on this machine.

    python benchmarks/budget.py --texts bible.txt,manual.txt --minutes 1,4 --seeds 3 --trials 20

For each text and number of minutes, one row has the validation loss in nats per token of

- experiments/minutes.py, with its test loss, and the minutes that the whole process took;
- the same with the fields of experiments/quick.py, so only its steps follow from the minutes;
- the best of the trials of a random search over experiments/sweeps/minutes.py, each as long.

An empty name among --texts is Tiny Shakespeare. It needs `pip install -e '.[sweep]'`. The same
command resumes after an interruption. With --trials 0, no search runs.
"""

from pathlib import Path
from typing import Any

import frame
from lstm_jax import budget
from lstm_jax import config as config_lib
from lstm_jax.run import workdir

_OF_MODEL = ("batches.", "model.", "optimizer.", "regularization.")
_SEARCH = "--sampler", "tpe", "--pruner", "none"


def main() -> None:
    """Do the remaining work, and print the table."""
    options = frame.parse_flags(
        __doc__, out=Path("runs/budget"), texts="", minutes="1,4", seeds=3, trials=20
    )
    experiments = frame.ROOT / "experiments"
    loaded = config_lib.load(str(experiments / "quick.py"))
    quick = dict(config_lib.flatten(config_lib.complete_config(loaded)))
    as_quick = [
        f"--config.{name}={quick[name]}" for name in budget.OPENABLE if name.startswith(_OF_MODEL)
    ]
    head = "minutes", "taken", "chosen", "validation", "test", "as quick.py", "best trial"
    frame.print_head("text", *head)
    for text in options.texts.split(","):
        for minutes in options.minutes.split(","):
            directory = options.out / f"{Path(text).stem or 'tiny_shakespeare'}_{minutes}"
            path = str(Path(text).resolve()) if text else ""
            flags = f"--config={experiments / 'minutes.py'}:{minutes}", f"--config.data.path={path}"
            runs, others = [], []
            for seed in range(options.seeds):
                of_seed = *flags, f"--config.seed={seed}"
                runs.append(directory / f"dial_{seed}")
                others.append(directory / f"quick_{seed}")
                taken = frame.train(runs[-1], *of_seed)
                frame.train(others[-1], *of_seed, *as_quick, "--config.validate_every_steps=0")
            trials: list[Path] = []
            if options.trials:
                search = "--workdir", directory / "sweep", "--trials", options.trials, *_SEARCH
                space = experiments / "sweeps" / "minutes.py"
                frame.run_python("-m", "lstm_jax.sweep", *flags, *search, "--space", space)
                trials = sorted((directory / "sweep" / "trials").iterdir())
            config = workdir.load_config(runs[0])
            frame.print_row(
                Path(text).stem or "Tiny Shakespeare",
                minutes,
                f"{taken:.2f}",
                f"2 x {config.model.hidden_size}, {config.max_steps} steps",
                frame.spread([find_loss(run, "validation") for run in runs]),
                frame.spread([find_loss(run, "test") for run in runs]),
                frame.spread([find_loss(run, "validation") for run in others]),
                f"{min(find_loss(run, 'validation') for run in trials):.3f}" if trials else "",
            )


def find_loss(directory: Path, split: str) -> float:
    """Return the lowest loss of a split that a run has measured."""
    rows: list[Any] = workdir.read_metrics(directory)
    return min((row["loss"] for row in rows if row["split"] == split), default=float("inf"))


if __name__ == "__main__":
    main()
