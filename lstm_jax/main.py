"""Trains a language model: `python -m lstm_jax.main --config experiments/shakespeare.py`.

The same command again goes on where the run stopped. Every field of the config can be set on the
command line, for example --config.optimizer.learning_rate=1e-3 or --config.data.path=my.txt.
"""

if __name__ == "__main__":
    from lstm_jax.run import interrupts

    interrupts.exit_at_once()  # While the rest is imported, which takes seconds.

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from lstm_jax import command, config, train
from lstm_jax.devices import hosts
from lstm_jax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "Experiment to run: a Python file with get_config(); FILE:WORD calls get_config('WORD').",
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where the run is kept. [default: runs/<name of the config file>]"
)
_INIT_FROM = flags.DEFINE_string(
    "init_from", None, "Working directory of another run, whose weights a new run starts from."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "Of many processes that train together: where the first listens."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many they are.")
_PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "Which of them this is, from 0. SLURM, Open MPI and the like say all three."
)
_JOIN_SECONDS = flags.DEFINE_integer(
    "join_seconds", 300, "How long to wait for the others.", lower_bound=1
)


def main() -> int:
    """Reads the flags and trains."""
    flag = flags.FLAGS["config"]
    if not flag.present:
        raise UserError("name an experiment: --config experiments/quick.py")
    # What stands behind a colon is get_config's argument, as in experiments/cells.py:gru.
    name, _, argument = flag.config_filename.partition(":")
    path = Path(name)
    if not path.is_file():
        raise UserError(f"there is no config file {path}")
    run_name = f"{path.stem}_{argument}" if argument else path.stem
    directory = Path(_WORKDIR.value or Path("runs", run_name))
    experiment = config.complete_config(_CONFIG.value)
    if _INIT_FROM.value is not None:
        experiment.init_from = _INIT_FROM.value
    with hosts.join_processes(
        _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, _JOIN_SECONDS.value
    ):
        return train.train(experiment, directory)


if __name__ == "__main__":
    command.run_command(main)
