"""Train a language model: `python -m lstm_jax.main --config experiments/shakespeare.py`.

The same command resumes a run that was stopped. Without --config, --init_from MODEL trains a model
further, with its own sizes (docs/training.md).

Every field of the config is a flag, too: --config.optimizer.learning_rate=1e-3,
--config.data.path=my.txt. `python -m lstm_jax.config` lists them, as docs/config.md does.
"""

import contextlib
import dataclasses
from pathlib import Path

from absl import flags

from lstm_jax.run import command, interrupts

command.define_config_flag("Python file with get_config(); FILE:WORD calls get_config('WORD').")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Working directory of the run. [default: runs/<name of the config file>]"
)
_INIT_FROM = flags.DEFINE_string(
    "init_from", None, f"{command.TRAINED}, whose parameters a new run starts from."
)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Train in the processes that SLURM, Open MPI or a TPU pod has started."
)
_PROCESSES = (
    flags.DEFINE_string(
        "coordinator_address", None, "HOST:PORT of the first of processes that you start yourself."
    ),
    flags.DEFINE_integer("num_processes", None, "Number of these processes."),
    flags.DEFINE_integer("process_id", None, "Index of this process, from 0."),
)


def main() -> int:
    """Train as the flags say, and return the exit code."""
    model = _INIT_FROM.value
    experiment, name = command.read_experiment(model and f"experiments/finetune.py:{model}")
    if model is not None:
        experiment = dataclasses.replace(experiment, init_from=model.rstrip("/"))
    # Here, because they import JAX, which --help does not need.
    from lstm_jax import training
    from lstm_jax.devices import setup
    from lstm_jax.devices.processes import join_processes

    setup.use_cores(experiment)
    processes = [flag.value for flag in _PROCESSES]
    alone = not _DISTRIBUTED.value and processes == [None] * 3
    with contextlib.nullcontext() if alone else join_processes(*processes):
        setup.keep_freed_memory()
        try:
            training.train(experiment, _WORKDIR.value or Path("runs", name))
        except interrupts.Stopped as stopped:
            return stopped.code
    return 0


if __name__ == "__main__":
    command.run_command(main)
