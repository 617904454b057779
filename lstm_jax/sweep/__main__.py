r"""Search the hyperparameters of an experiment, or train it with several seeds.

    python -m lstm_jax.sweep --config experiments/quick.py \
        --space experiments/sweeps/quick.py --trials 40
    python -m lstm_jax.sweep --config experiments/quick.py --seeds 8

The same command resumes a sweep. Any number of processes may run it at the same time.
"""

if __name__ == "__main__":
    from lstm_jax.run import interrupts

    interrupts.exit_at_once()  # During the imports, which take seconds.

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
    "study", None, "Storage that workers share: postgresql://..., mysql://... or a journal file."
)
_NAME = flags.DEFINE_string("name", None, "Name of the study. [default: <config>_<space>]")
_SAMPLER = flags.DEFINE_enum(
    "sampler", None, ["tpe", "random", "grid"], "Algorithm that samples settings. [default: tpe]"
)
_PRUNER = flags.DEFINE_enum(
    *("pruner", None, ["hyperband", "none"]),
    "Algorithm that stops trials early. [default: hyperband; none for seeds]",
)
_SEED = flags.DEFINE_integer("seed", None, "Seed of the sampler. [default: 0]")


def main() -> int:
    """Run one worker of the sweep that the flags describe."""
    experiment, name = command.read_experiment()
    # Here, because they import JAX, which --help does not need.
    try:
        import optuna
        import sqlalchemy  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(
            f"sweeps need {error.name}, which is not installed: pip install 'lstm-jax[sweep]'"
        ) from None
    import jax

    from lstm_jax.devices import parallel
    from lstm_jax.ops.processor import count_cores
    from lstm_jax.sweep import search

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    # Make a CPU device for each core now: otherwise a trial would depend on earlier ones.
    parallel.use_cores(experiment, least=count_cores())
    jax.devices()
    sweep = search.prepare_sweep(
        experiment,
        name,
        space_file=_SPACE.value and config.find_experiment(_SPACE.value),
        seeds=_SEEDS.value,
        trials=_TRIALS.value,
        directory=_WORKDIR.value,
        location=_STUDY.value,
        name=_NAME.value,
        sampler=_SAMPLER.value,
        pruner=_PRUNER.value,
        seed=_SEED.value,
    )
    return search.run_sweep(sweep)


if __name__ == "__main__":
    command.run_command(main)
