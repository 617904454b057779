"""Describe a model, its loss, and the start and the end of training."""

import math
import shlex

import jax
from flax.traverse_util import flatten_dict

from lstm_jax import loss as loss_lib
from lstm_jax import model as model_lib
from lstm_jax.errors import make_visible, name_setting
from lstm_jax.ops import choice
from lstm_jax.run import cell_file, workdir
from lstm_jax.run.opening import OpenRun, is_out_of_patience
from lstm_jax.vocabulary import FILE_END, TextSize

# Tokens of the window that is printed.
_LONGEST_WINDOW = 24
# Control characters, which a terminal executes, as escapes; bytes that are not UTF-8 as U+FFFD.
_PRINTABLE = {n: f"\\x{n:02x}" for n in (*range(32), *range(127, 160)) if chr(n) not in "\t\n\r"}
_PRINTABLE |= {**dict.fromkeys(range(0xD800, 0xE000), "\ufffd"), ord(FILE_END): "\n\n"}


def print_setup(run: OpenRun) -> None:
    """Print the model, the text with its first window, and initial weights or changed fields."""
    config, vocabulary, model, step = run.config, run.vocabulary, run.model, run.first_step
    window = run.ids["train"][: min(config.batches.window_length, _LONGEST_WINDOW) + 1]
    inputs, targets = window[:-1], window[1:]
    recurrence = model.recurrence
    if model.runs_gated_layers and recurrence == "auto":
        batch_size = config.batches.batch_size // config.optimizer.microbatches
        chosen = {
            choice.choose("auto", model.gating, size=size, batch=batch_size, dtype=model.dtype)
            for size in model.sizes[1:]
        }
        recurrence = " and ".join(sorted(chosen))
    counts = ", ".join(f"{len(of_split):,} {name}" for name, of_split in run.ids.items())
    run.print(
        f"{format_parameters(run.first_state.params)}\n\n"
        f"{vocabulary.token_name}s: {counts}; vocabulary: {len(vocabulary)}; "
        f"steps per epoch: {run.plan.steps_per_epoch:,}; "
        f"recurrence: {recurrence}, matmuls in {model.dtype}, on {run.mesh.size} x "
        f"{run.mesh.devices.flat[0].device_kind}\n\n"
        "The first window and its targets:\n"
        f"  inputs  {vocabulary.decode(inputs)!r}\n"
        f"  targets {vocabulary.decode(targets)!r}\n"
        f"  inputs  {' '.join(map(str, inputs))}\n"
        f"  targets {' '.join(map(str, targets))}\n"
    )
    if run.source:
        source_step, num_tokens = run.source
        new = vocabulary.tokens[num_tokens:]
        listed = ", ".join(map(repr, new[:10])) + ", ..." * (len(new) > 10)
        tokens = f"{len(new)} new tokens: {listed}" if new else "no new tokens"
        run.print(
            f"The initial weights are those of step {source_step} in "
            f"{make_visible(config.init_from)}; the vocabulary has {tokens}\n"
        )
    if config.distill.teachers and not run.is_finished:
        teachers = make_visible(config.distill.teachers)
        run.print(f"Teachers: {teachers}; they predict the training text first\n")
    for field, (before, after) in run.changes.items():
        run.print(f"From step {step} on, {field} is {after!r}; it was {before!r}")
    if run.is_finished:
        run.print(_describe_end(run))
    elif run.is_resumed:
        total = run.plan.total_steps
        run.print(
            f"Resuming from step {step} of {total}, saved in {make_visible(str(run.directory))}"
        )


def make_printable(text: str) -> str:
    r"""Return a text that a terminal shows: \x1b is an escape, the end of a file a blank line."""
    return text.translate(_PRINTABLE)


def format_parameters(params: model_lib.Params) -> str:
    """Return a table of the shapes and sizes of all parameters, with a sum for each layer."""
    rows: list[tuple[str, str, int]] = []
    for layer in sorted(params, key=lambda name: (name != "embedding", name == "dense", name)):
        arrays = flatten_dict(params[layer], sep="/")
        rows.append((layer, "", sum(array.size for array in arrays.values())))
        rows += [(f"  {name}", str([*array.shape]), array.size) for name, array in arrays.items()]
    rows.append(("total", "", sum(array.size for array in jax.tree.leaves(params))))
    width = max(len(name) for name, _, _ in rows)
    return "\n".join(f"{name:<{width}}  {shape:>14}  {count:>12,}" for name, shape, count in rows)


def describe_loss(loss: float, token_name: str, size: TextSize) -> str:
    """Return a loss in nats and bits per token, as a perplexity, and in bits per character."""
    bits = loss_lib.compute_bits_per_character(loss, [size])
    is_character = token_name == "character"  # Then both kinds of bits are one, printed once.
    described = (
        f"{loss:.4f} nats per {token_name}, "
        f"{bits if is_character else loss / math.log(2):.4f} bits per {token_name}, "
        f"perplexity {loss_lib.compute_perplexity(loss):.3f}"
    )
    return described if is_character else f"{described}, {bits:.4f} bits per character"


def describe_validation(run: OpenRun, step: int, loss: float, sample: str) -> str:
    """Return the message about the validation after `step` steps, with its sample."""
    plan = run.plan
    done, total = map(plan.count_epochs, (step, plan.total_steps))
    first = "before training" if run.config.init_from else "untrained"
    name = f"epoch {round(done, 4):g} of {round(total, 4):g}" if step else first
    described = describe_loss(loss, run.vocabulary.token_name, run.sizes["validation"])
    return f"\n=== {name}: validation loss {described}\n{sample}\n"


def describe_early_end(run: OpenRun, step: int) -> str:
    """Return the message that `patience` ends training after `step` steps."""
    return (
        f"Training ends at step {step} of {run.plan.total_steps}: the validation loss has not "
        f"improved for {run.config.patience} validations"
    )


def describe_stop(run: OpenRun, step: int) -> str:
    """Return the message that a signal has stopped training after `step` steps."""
    return (
        f"\nStopped at step {step} of {run.plan.total_steps}. Everything is saved in "
        f"{make_visible(str(run.directory))}: the same command resumes."
    )


def _describe_end(run: OpenRun) -> str:
    """Return the message that a run has ended, and how to train it longer."""
    plan, step, field, reason = run.plan, run.first_step, run.plan.limit, ""
    if is_out_of_patience(run.config, run.directory):
        field = "patience"
        reason = f": the validation loss has not improved for {run.config.patience} validations"
    setting = name_setting(field, 2 * getattr(run.config, field))
    return (
        f"The run in {make_visible(str(run.directory))} is finished after "
        f"{plan.describe_length(step)}{reason}. To train longer, set for example {setting}"
    )


def list_files(run: OpenRun) -> str:
    """Return lines about the files of a run, and the command that generates text."""
    directory = make_visible(str(run.directory))
    return (
        f"Everything is in {directory}: {workdir.CHECKPOINTS}/, {workdir.METRICS}, "
        f"{workdir.SAMPLES}, {workdir.CURVES}, TensorBoard events\n"
        f"Generate text: python -m lstm_jax.sample --workdir {shlex.quote(directory)}"
        f"{cell_file.make_flag(run.config.model)}"
    )
