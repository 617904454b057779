"""Define each config field once: default, allowed values, meaning, and when it may change.

An experiment is a Python file with `get_config()`, which takes `default()` and changes some
fields. Every field can also be set on the command line: `--config.model.hidden_size=512`.
`python -m lstm_jax.config > docs/config.md` writes the table as a page.
"""

import difflib
import itertools
import re
import textwrap
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from lstm_jax import vocabulary
from lstm_jax.errors import UserError

# Nothing here imports JAX, which takes a second: `--help` and a mistake in a flag don't need it.


class Rule(NamedTuple):
    """A condition, in words and as a function."""

    words: str
    holds: Callable[[Any], bool]


class Field(NamedTuple):
    """One field of a config; `name` is dotted, and values have the type of `default`."""

    name: str
    default: Any
    allowed: Rule
    meaning: str
    resume: bool = False  # A run may change it when it resumes.
    compared: bool = True  # All runs of a study have the same value.
    fits: Rule | None = None  # A rule that the whole config must satisfy.
    used_with: Rule | None = None  # The field has no effect on a config that breaks this rule.


def names_cell_file(name: str) -> bool:
    """Return whether a name has the form FILE.py:CLASS."""
    return re.fullmatch(r".+\.py:\w+", name) is not None


def between(low: int, high: int) -> Rule:
    """Allow numbers from `low` to `high`, both included."""
    return Rule(f"from {low:,} to {high:,}", lambda value: low <= value <= high)


def one_of(*words: str) -> Rule:
    """Allow these strings."""
    listed = f"one of {', '.join(filter(None, words))}"
    return Rule(listed if all(words) else f"empty or {listed}", lambda value: value in words)


def is_set_to(name: str, value: Any) -> Rule:
    """Require that the field `name` is `value`."""
    section, _, last = name.partition(".")
    return Rule(f"{name}={value!r}", lambda config: config[section][last] == value)


_TEXT = Rule("any text", lambda value: True)
_SWITCH = Rule("True or False", lambda value: True)
_SHARE = Rule("0 or more, and below 1", lambda value: 0 <= value < 1)
_SHARES = Rule(
    "fractions between 0 and 1",
    lambda values: all(isinstance(share, int | float) and 0 < share < 1 for share in values),
)
_FRACTIONS = Rule(
    "three positive fractions (train, validation, test) that add up to 1",
    lambda values: len(values) == 3 and _SHARES.holds(values) and abs(sum(values) - 1) < 1e-6,
)
_SEVERAL_LAYERS = Rule("model.num_layers above 1", lambda c: c.model.num_layers > 1)
_OTHER_THAN_SGD = Rule("another optimizer than 'sgd'", lambda c: c.optimizer.name != "sgd")
# The keys of `cells.CELLS` and of `optimizer.OPTIMIZERS`, and `optimizer.SCHEDULES`.
CELLS = (
    "lstm",
    "peephole",
    "mogrifier",
    "gru",
    "rnn",
    "minlstm",
    "mingru",
    "rglru",
    "slstm",
    "mlstm",
)
OPTIMIZERS = ("adam", "lion", "muon", "schedule_free", "sgd")
SCHEDULES = ("constant", "cosine", "linear", "step")
DTYPES = ("float32", "bfloat16", "auto")  # Of matmuls; `model.make_model` resolves "auto".
_CELL = Rule(
    f"one of {', '.join(CELLS)}, or FILE.py:CLASS",
    lambda name: name in CELLS or names_cell_file(name),
)
_OPTIONS = Rule(
    "numbers, strings and booleans, by name",
    lambda options: all(isinstance(value, bool | int | float | str) for value in options.values()),
)
# Larger sizes are mistakes, or attempts to exhaust the memory.
_SIZE, _SIZE_OR_ZERO = between(1, 2**20), between(0, 2**20)
_COUNT, _POSITIVE_COUNT = between(0, 2**31 - 1), between(1, 2**31 - 1)

# fmt: off
FIELDS = (
    Field("seed", 0, between(0, 2**32 - 1),
          "Random seed of initial parameters, batches and samples."),
    Field("init_from", "", _TEXT,
          "Start from the parameters of the run in this directory (set by --init_from)."),
    Field("num_epochs", 20, between(1, 10**6), "Passes over the training text.", resume=True),
    Field("max_steps", 0, _COUNT,
          "Training ends after this number of steps, if num_epochs has more. 0: no limit.",
          resume=True),
    Field("validate_every_steps", 0, _COUNT,
          "Steps between validations within an epoch; each epoch also ends with one. 0: no others.",
          resume=True),
    Field("validation_tokens", 0,
          Rule("0, or from 4 to 2,147,483,647", lambda value: value == 0 or 4 <= value < 2**31),
          "Number of tokens at the start of the validation text to validate on. 0: all of it."),
    Field("patience", 0, _COUNT,
          "Training ends when the validation loss has not improved for this number of validations. "
          "0: no such limit.", resume=True),
    Field("steps_per_call", 1, between(1, 10**4),
          "Training steps per compiled call; more are faster for tiny models.", resume=True,
          fits=Rule("at most log_every_steps", lambda c: c.steps_per_call <= c.log_every_steps)),
    Field("log_every_steps", 10, _POSITIVE_COUNT,
          "Steps between training losses in metrics.jsonl.", resume=True),
    Field("checkpoint_every_seconds", 300.0, between(0, 10**9),
          "Seconds between checkpoints in an epoch. 0: every step.", resume=True, compared=False),
    Field("max_skipped_steps", 0, _COUNT,
          "Skip at most this number of steps whose loss or gradient is not finite.", resume=True),
    Field("profile", False, _SWITCH, "Trace a few steps for TensorBoard's profiler.", resume=True),

    Field("data.path", "", _TEXT,
          "UTF-8 text files: paths and glob patterns, separated by commas; semicolons separate "
          "train, validation and test. Empty: data.dataset.", resume=True, compared=False),
    Field("data.dataset", "tiny_shakespeare", _TEXT,
          "Name of a standard text (docs/data.md) or of a TFDS dataset.",
          used_with=is_set_to("data.path", "")),
    Field("data.text_feature", "text", _TEXT,
          "Feature of the dataset that holds the text.", used_with=is_set_to("data.path", "")),
    Field("data.directory", "", _TEXT,
          "Directory of datasets. Empty: TFDS's default.", resume=True, compared=False),
    Field("data.fractions", (0.9, 0.05, 0.05), _FRACTIONS,
          "Fractions of train, validation and test, in this order, in a text without splits.",
          used_with=Rule("a text without splits", lambda c: ";" not in c.data.path
                         if c.data.path else c.data.dataset != "tiny_shakespeare")),
    Field("data.units", "characters", one_of(*vocabulary.KINDS),
          "Kind of tokens: characters (Unicode code points), graphemes (letters with their "
          "accents, whole emoji), words (with the space before each), bytes (of any file) or bpe "
          "(parts of words, by byte-pair encoding)."),
    Field("data.vocabulary_size", vocabulary.DEFAULT_SIZE, between(259, 2**20),
          "Maximum number of tokens: two special ones, the 256 bytes, a stop token, and those that "
          "byte-pair encoding learns from the training text.",
          used_with=is_set_to("data.units", "bpe")),
    Field("data.min_count", 1, _POSITIVE_COUNT,
          "Replace tokens that occur less often in the training text by [UNK], except bytes. "
          "bpe: learn only tokens that occur at least this often."),
    Field("data.document_separator", "", one_of(*vocabulary.SEPARATORS),
          "End of a document, where the model learns to stop. file: the end of each file, or of "
          "each example of a dataset. Empty: the text is one document."),
    Field("data.memory_megabytes", 16, between(0, 10**9),
          "Texts larger than this (in 10**6 bytes) are not read into memory: they are encoded "
          "once into files of ids, which training reads in parts.", resume=True),
    Field("data.prepared", "", _TEXT,
          "Directory for encoded texts. Empty: .lstm_jax beside the first text file.", resume=True),
    Field("data.sha256", "", _TEXT,
          "Checksum of the text, set when a run begins. The run resumes with this text only."),

    Field("batches.kind", "windows", one_of("windows", "streams"),
          "windows: shuffled windows, each from a zero carry. streams: contiguous streams that "
          "keep their carry between steps (truncated backpropagation through time)."),
    Field("batches.batch_size", 64, _SIZE, "Windows or streams per batch.",
          fits=Rule("a multiple of mesh.data times mesh.model",
                    lambda c: c.batches.batch_size % (max(c.mesh.data, 1) * c.mesh.model) == 0)),
    Field("batches.window_length", 100, _SIZE, "Tokens of each window or stream per step."),
    Field("batches.reset_probability", 0.02, _SHARE,
          "Probability that a stream starts a step from a zero carry, as evaluation does.",
          resume=True, used_with=is_set_to("batches.kind", "streams")),

    Field("model.embedding_size", 256, _SIZE, "Size of token embeddings."),
    Field("model.hidden_size", 1024, _SIZE, "Hidden units of each layer."),
    Field("model.num_layers", 1, between(1, 100), "Recurrent layers."),
    Field("model.cell", "lstm", _CELL,
          "Kind of recurrent layers, or a file with your own cell (docs/cells.md)."),
    Field("model.options", {}, _OPTIONS,
          "Options that the cell declares, as in --config.model.options.rounds=3."),
    Field("model.cell_sha256", "", _TEXT,
          "Checksum of the cell's file, set when a run begins. The run resumes with it only."),
    Field("model.mogrifier_rounds", 5, between(0, 100),
          "Default of the option rounds of the cell mogrifier.",
          used_with=is_set_to("model.cell", "mogrifier")),
    Field("model.block", "none", one_of("none", "residual"),
          "residual: each cell is in a block with normalization, a short convolution, a gated MLP "
          "and residual branches."),
    Field("model.layer_norm", False, _SWITCH, "Layer normalization of the inputs of the gates."),
    Field("model.tie_embeddings", False, _SWITCH,
          "Use the embedding table as the dense layer's kernel; sets the last layer's width."),
    Field("model.skip_connections", False, _SWITCH,
          "Each layer but the first adds its inputs, without dropout, to its outputs.",
          used_with=_SEVERAL_LAYERS,
          fits=Rule("False with tie_embeddings, unless embedding_size equals hidden_size",
                    lambda c: not (c.model.skip_connections and c.model.tie_embeddings)
                    or c.model.embedding_size == c.model.hidden_size)),
    Field("model.initial_embedding", 0.05, Rule("above 0, up to 1000", lambda x: 0 < x <= 1000),
          "Initial embeddings are uniform between minus and plus this."),
    Field("model.initial_scale", 1.0, Rule("above 0, up to 1000", lambda value: 0 < value <= 1000),
          "Factor of the initial kernels and embedding table."),
    Field("model.initial_bias", "frequencies", one_of("frequencies", "zeros"),
          "Initial bias of the logits. frequencies: the logarithm of each token's frequency in "
          "the training text, which the model then does not have to learn."),
    Field("model.recurrence", "auto", one_of("auto", "scan", "fused", "cudnn", "parallel"),
          "Implementation of the recurrence. scan: the readable reference. parallel: all steps "
          "at once, for cells that support it. fused: LSTMs with a custom VJP. cudnn: LSTMs with "
          "cuDNN on a GPU, in float32. auto: the fastest.", resume=True),
    Field("model.dtype", "float32", one_of(*DTYPES),
          "Dtype of matmul operands; parameters, cell states, softmax and loss are float32. "
          "auto: bfloat16 on GPUs and TPUs, and for fused layers on CPUs with instructions for it.",
          resume=True),
    Field("model.rematerialize", 0, _SIZE_OR_ZERO,
          "Steps between the states stored for the backward pass, which recomputes the others to "
          "save memory. 0: store all.", resume=True,
          used_with=Rule("model.cell='lstm' without layer_norm or block, recurrence auto or fused",
                         lambda c: c.model.cell == "lstm" and not c.model.layer_norm
                         and c.model.block == "none" and c.model.recurrence in ("auto", "fused"))),

    Field("optimizer.name", "adam", one_of(*OPTIMIZERS),
          "AdamW; Lion; Muon for the kernels of recurrent layers with AdamW for the rest; "
          "schedule-free AdamW; or SGD."),
    Field("optimizer.b1", 0.9, _SHARE,
          "Decay of the gradients' mean in Adam and Lion; the share of the average in the weights "
          "that schedule_free trains.", resume=True, used_with=_OTHER_THAN_SGD,
          fits=Rule("above 0 for optimizer.name='schedule_free'",
                    lambda c: c.optimizer.b1 > 0 or c.optimizer.name != "schedule_free")),
    Field("optimizer.b2", 0.999, _SHARE,
          "Decay of the gradients' mean square in Adam, and of their mean in Lion.",
          resume=True, used_with=_OTHER_THAN_SGD),
    Field("optimizer.epsilon", 1e-8, Rule("above 0, up to 1", lambda value: 0 < value <= 1),
          "Added to the root mean square in Adam.", resume=True,
          used_with=Rule("another optimizer than 'lion' or 'sgd'",
                         lambda c: c.optimizer.name not in ("lion", "sgd"))),
    Field("optimizer.momentum", 0.9, _SHARE, "Momentum of SGD and Muon.",
          resume=True,
          used_with=Rule("optimizer.name='sgd' or 'muon'",
                         lambda c: c.optimizer.name in ("sgd", "muon"))),
    Field("optimizer.learning_rate", 1e-4, Rule("above 0, up to 1e38", lambda x: 0 < x <= 1e38),
          "Peak learning rate.", resume=True),
    Field("optimizer.warmup_steps", 0, _COUNT,
          "Steps of a linear rise to the peak learning rate.", resume=True),
    Field("optimizer.schedule", "constant", one_of(*SCHEDULES),
          "Learning rate after warm-up. cosine, linear: decay to zero at the end of training. "
          "step: divide by ten at each of step_at.", resume=True),
    Field("optimizer.step_at", (0.5, 0.75), _SHARES,
          "Fractions of all steps.", resume=True,
          used_with=is_set_to("optimizer.schedule", "step")),
    Field("optimizer.weight_decay", 0.0, Rule("from 0 to 1e38", lambda value: 0 <= value <= 1e38),
          "Weight decay, of kernels and embedding only.", resume=True),
    Field("optimizer.max_gradient_norm", 0.0, between(0, 10**9),
          "Clip gradients to this global norm. 0: no clipping.", resume=True),
    Field("optimizer.average_decay", 0.0, _SHARE,
          "Decay of an exponential moving average of the parameters, which evaluation and sampling "
          "then use. 0: no average.",
          used_with=Rule("another optimizer than 'schedule_free'",
                         lambda c: c.optimizer.name != "schedule_free")),
    Field("optimizer.microbatches", 1, _SIZE,
          "Parts of a batch, computed one after the other to save memory.", resume=True,
          fits=Rule("a divisor of batches.batch_size",
                    lambda c: c.batches.batch_size % c.optimizer.microbatches == 0)),

    Field("regularization.embedding_dropout", 0.0, _SHARE,
          "Dropout of whole rows of the embedding table.", resume=True),
    Field("regularization.input_dropout", 0.0, _SHARE,
          "Dropout of the inputs of the first layer.", resume=True),
    Field("regularization.hidden_dropout", 0.0, _SHARE, "Dropout between layers.", resume=True,
          used_with=_SEVERAL_LAYERS),
    Field("regularization.output_dropout", 0.0, _SHARE,
          "Dropout of the outputs of the last layer.", resume=True),
    Field("regularization.recurrent_dropout", 0.0, _SHARE,
          "DropConnect of the recurrent kernels.", resume=True),
    Field("regularization.activation_penalty", 0.0, between(0, 10**9),
          "Weight of the outputs' mean square in the loss.", resume=True),
    Field("regularization.temporal_activation_penalty", 0.0, between(0, 10**9),
          "Weight of the outputs' mean squared change per step in the loss.", resume=True),

    Field("mesh.data", 0, _SIZE_OR_ZERO,
          "A batch is divided over mesh.data times mesh.model devices. 0: all GPUs or TPUs; on a "
          "CPU, the fastest number of cores.", resume=True, compared=False),
    Field("mesh.model", 1, _SIZE,
          "Devices that also divide the matrices of parameters and optimizer state between steps. "
          "Within a step, each still holds all parameters and gradients.",
          resume=True, compared=False),

    Field("sample.length", 300, between(1, 10**6),
          "Tokens of the sample of each validation.", resume=True, compared=False),
    Field("sample.temperature", 0.8, between(0, 1000),
          "Temperature of this sample. 0: greedy.", resume=True, compared=False),
)
# fmt: on

_BY_NAME = {field.name: field for field in FIELDS}
_LEGEND = (
    "Numbers are written as in Python: 1_000 is 1000. A run may change the fields marked [resume] "
    "when it resumes."
)
# A field whose value is a dict with any names.
_OPEN = "model.options"
# Names of fields by property.
CHANGEABLE = tuple(field.name for field in FIELDS if field.resume)
COMPARED = tuple(field.name for field in FIELDS if field.compared)


def default() -> ConfigDict:
    """Return the default config: the lesson's model and training on Tiny Shakespeare."""
    fields: dict[str, Any] = {}
    for field in FIELDS:
        section, _, name = field.name.rpartition(".")
        (fields.setdefault(section, {}) if section else fields)[name] = field.default
    return ConfigDict(fields)


def complete_config(fields: Any) -> ConfigDict:
    """Return a checked config with the given fields, and defaults for all others.

    Args:
      fields: a ConfigDict or nested dict.

    Raises:
      UserError: for an unknown field, a value of the wrong type, or one that is not allowed.
    """
    if not isinstance(fields, ConfigDict | dict):
        raise UserError(f"get_config() returned {type(fields).__name__}, not a ConfigDict")
    try:
        fields = ConfigDict(fields)
    except (TypeError, ValueError) as error:  # A name with a dot in it.
        raise UserError(f"this is not a config: {error}") from None
    config = default()
    for name, value in flatten(fields):
        if message := describe_unknown_field(name):
            raise UserError(message)
        try:
            if value is None:  # ConfigDict accepts it for any field.
                raise TypeError
            config.update_from_flattened_dict({name: value})
        except (TypeError, ValueError, OverflowError):
            wanted = type(_BY_NAME[name].default).__name__
            raise UserError(f"config.{name} is {value!r}: it must be of type {wanted}") from None
    values = dict(flatten(config))
    rules = [(field.name, field.allowed, values[field.name]) for field in FIELDS]
    rules += [(field.name, field.fits, config) for field in FIELDS if field.fits]
    for name, rule, argument in rules:
        if not rule.holds(argument):
            raise UserError(f"config.{name} is {values[name]!r}: it must be {rule.words}")
    return config


def find_unused_fields(config: ConfigDict) -> list[str]:
    """Return a message for each field that is set but has no effect on this config."""
    return [
        f"config.{name} is {value!r}, which has no effect: it needs {rule.words}"
        for name, value in flatten(config)
        if (rule := _BY_NAME[name].used_with) and not rule.holds(config)
        if value != _BY_NAME[name].default
    ]


def describe_unknown_field(name: str) -> str | None:
    """Return an error message if a dotted name is not a field, else None."""
    if name in _BY_NAME or re.fullmatch(rf"{re.escape(_OPEN)}\.\w+", name):
        return None
    section, dot, last = name.rpartition(".")
    within = [other for other in _BY_NAME if other.startswith(section + dot)]
    others = {other.rpartition(".")[2]: other for other in within}
    if near := difflib.get_close_matches(last, others, n=1):
        hint = f": did you mean {others[near[0]]}?"
    elif section and others:
        hint = f": there are {', '.join(others.values())}"
    else:
        near = difflib.get_close_matches(name, _BY_NAME, n=1)
        hint = f": did you mean {near[0]}?" if near else ""
    return f"there is no field config.{name}{hint}"


def flatten(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every field as (dotted name, value)."""
    for name, value in config.items():
        if prefix + name == _OPEN and isinstance(value, ConfigDict):
            yield _OPEN, value.to_dict()
        elif isinstance(value, ConfigDict):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def describe_fields(width: int, quote: str = "") -> str:
    """Return the table, wrapped at `width` columns, with `quote` around names and defaults."""
    lines = textwrap.wrap(_LEGEND, width)
    for section, fields in itertools.groupby(FIELDS, lambda field: field.name.rpartition(".")[0]):
        lines += ["", section or "run", "-" * len(section or "run"), ""]
        for field in fields:
            mark = " [resume]" * field.resume
            lines.append(f"- {quote}--config.{field.name}={field.default!r}{quote}{mark}")
            allowed = "; ".join(rule.words for rule in (field.allowed, field.fits) if rule)
            only = f" Needs {field.used_with.words}." if field.used_with else ""
            text = f"{field.meaning} Allowed: {allowed}.{only}"
            lines += textwrap.wrap(text, width, initial_indent="  ", subsequent_indent="  ")
    return "\n".join(lines)


if __name__ == "__main__":
    print("# Config fields\n\nGenerated from config.py.\n", describe_fields(99, "`"), sep="\n")
