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
from lstm_jax.errors import UserError
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
    "workdir", None, "Directory for the study, trials and results. [default: runs/sweeps/<name>]"
)
_STUDY = flags.DEFINE_string(
    "study", None, "URL of a database that workers share, such as postgresql://..., or a file."
)
_NAME = flags.DEFINE_string("name", None, "Name of the study. [default: <config>_<space>]")
_SAMPLER = flags.DEFINE_enum(
    "sampler", "tpe", ["tpe", "grid"], "Algorithm that samples settings; grid: each choice once."
)
_PRUNER = flags.DEFINE_enum(
    "pruner", "hyperband", ["hyperband", "none"], "Algorithm that stops trials of --space early."
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the sampler.")


def main() -> None:
    """Run one worker of the sweep that the flags describe."""
    experiment, name = command.read_experiment()
    # Here, because they import JAX, which --help does not need.
    try:
        import optuna
        import sqlalchemy  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(f"sweeps need {error.name}: pip install 'lstm-jax[sweep]'") from None
    import jax

    from lstm_jax.devices import memory, parallel
    from lstm_jax.ops.processor import count_cores
    from lstm_jax.sweep import search
    from lstm_jax.sweep import space as space_lib

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    # Make a CPU device for each core now: otherwise a trial would depend on earlier ones.
    parallel.use_cores(experiment, least=count_cores())
    jax.devices()
    memory.keep_freed_memory()
    seeds, file = _SEEDS.value, _SPACE.value
    if bool(seeds) == bool(file):
        raise UserError("use either --space experiments/sweeps/quick.py or --seeds 8")
    if seeds:
        space = space_lib.make_seed_space(experiment.seed, seeds)
    else:
        space = space_lib.load_space(config.find_experiment(file))
    sweep = search.prepare_sweep(
        experiment,
        _NAME.value or f"{name}_{f'seeds{seeds}' if seeds else Path(file).stem}",
        space,
        trials=_TRIALS.value,
        directory=_WORKDIR.value,
        location=_STUDY.value,
        grid=bool(seeds) or _SAMPLER.value == "grid",
        prune=not seeds and _PRUNER.value == "hyperband",
        seed=_SEED.value,
    )
    search.run_sweep(sweep)


if __name__ == "__main__":
    command.run_command(main)
