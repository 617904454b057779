"""Finish a run: measure its best checkpoint on the test split, and print the result."""

import jax

from lstm_jax import loss as loss_lib
from lstm_jax.devices import hosts
from lstm_jax.errors import warn
from lstm_jax.run import advice, checkpoints, messages, workdir
from lstm_jax.run.observers import generate_sample, plot_curves
from lstm_jax.run.session import Session
from lstm_jax.run.zero_state import measure_zero_state

# Number of positions in the validation text that are read from a zero state.
_POSITIONS = 64


def finish_run(run: Session) -> None:
    """Measure the best checkpoint on the test split, sample from it, and list the files."""
    hosts.wait_for_all("all is saved")
    rows = run.read_metrics()
    params, step = workdir.load_params(run.directory, run.model)
    measured = [row["loss"] for row in rows if (row["split"], row["step"]) == ("test", step)]
    loss = measured[-1] if measured else loss_lib.compute_loss(run.model, params, run.ids["test"])
    if not hosts.is_first():
        return
    if not measured:
        run.record(step, "test", loss)
    plot_curves(run)
    # On a device, as after a validation: else the function that generates would be compiled again.
    key = jax.device_put(jax.random.key(run.config.seed), jax.local_devices()[0])
    zero = measure_zero_state(run.model, params, run.ids["validation"], _POSITIONS)
    run.print(
        f"\n{generate_sample(run, params, key)}\n\n"
        f"Test loss at step {step}, the step with the best validation loss: "
        f"{messages.describe_loss(loss, run.vocabulary.token_name, run.sizes['test'])}"
    )
    if sentence := advice.advise(rows):
        run.print(sentence)
    run.print(messages.list_files(run))
    best = checkpoints.read_validation_loss(run.directory / workdir.CHECKPOINTS, step)
    losses = {"test": loss, "validation": best}
    if warning := advice.find_suspicion(losses, len(run.vocabulary), zero):
        warn(warning)
