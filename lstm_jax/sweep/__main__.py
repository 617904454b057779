r"""Search the hyperparameters of an experiment, or train it with several seeds.

    python -m lstm_jax.sweep --config experiments/quick.py \
        --space experiments/sweeps/quick.py --trials 40
    python -m lstm_jax.sweep --config experiments/quick.py --seeds 8

The same command resumes a sweep. Any number of processes may run it at the same time. Every field
of the config is a flag, too: `python -m lstm_jax.config` lists them, as docs/config.md does.
"""

from pathlib import Path

from absl import flags

from lstm_jax import config
from lstm_jax.errors import UserError, make_command
from lstm_jax.run import command

command.define_config_flag("Experiment to start from: a Python file with get_config().")
_SPACE = flags.DEFINE_string(
    "space", None, "Python file with get_overrides(trial), which returns config fields."
)
_SEEDS = flags.DEFINE_integer(
    "seeds", None, "Instead of --space: number of seeds to train with.", lower_bound=1
)
_TRIALS = flags.DEFINE_integer(
    "trials", None, "Number of trials of all workers. [default: 40, or the grid]", lower_bound=1
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Directory for the study and trials. [default: runs/sweeps/<config>_<space>]"
)
_STUDY = flags.DEFINE_string(
    "study", None, "URL of a database that workers share, such as postgresql://..., or a file."
)
_SAMPLER = flags.DEFINE_enum(
    "sampler", "tpe", ["tpe", "grid"], "Algorithm that samples settings; grid: each point once."
)
_PRUNER = flags.DEFINE_enum(
    "pruner", "hyperband", ["hyperband", "none"], "Algorithm that stops trials of --space early."
)


def main() -> int:
    """Run one worker of the sweep that the flags describe, and print the results.

    Return the exit code, 1 if other workers have not finished their trials.
    """
    experiment, name = command.read_experiment()
    # Here, because they import JAX, which --help does not need.
    try:
        import optuna
    except ModuleNotFoundError:
        raise UserError("sweeps need Optuna: pip install optuna") from None
    from lstm_jax.devices import setup
    from lstm_jax.sweep import search

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    setup.use_cores(experiment)
    setup.keep_freed_memory()
    seeds, file = _SEEDS.value, _SPACE.value
    if bool(seeds) == bool(file):
        raise UserError("use either --space experiments/sweeps/quick.py or --seeds 8")
    if seeds:
        space = search.make_seed_space(experiment.seed, seeds)
    else:
        space = search.load_space(config.find_experiment(file))
    sweep = search.open_sweep(
        experiment,
        space,
        _WORKDIR.value or Path("runs", "sweeps", f"{name}_{Path(file or f'seeds{seeds}').stem}"),
        location=_STUDY.value,
        trials=_TRIALS.value,
        grid=bool(seeds) or _SAMPLER.value == "grid",
        prune=not seeds and _PRUNER.value == "hyperband",
    )
    config_flags = [flags.FLAGS[x] for x in flags.FLAGS if x == "config" or x.startswith("config.")]
    fields = [f"--{flag.name}={flag.value}" for flag in config_flags if flag.value is not None]
    try:
        return 1 if search.run_worker(sweep) else 0
    finally:
        print(search.describe_results(sweep.study, make_command("main", *fields)))


if __name__ == "__main__":
    command.run_command(main)
