"""The fields that an experiment sets, their defaults, and what they may be.

An experiment is a Python file with `get_config()`, which takes `default()` and changes what it
wants different. Every field can be set from the command line: `--config.model.hidden_size=512`.
"""

import difflib
import json
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from lstm_jax import cells, fused, vocabulary
from lstm_jax import model as model_lib
from lstm_jax import optimizer as optimizer_lib
from lstm_jax.errors import UserError

# Sizes above it are mistakes, or someone else's attempt to fill the memory.
_LARGEST = 2**20


def default() -> ConfigDict:
    """Every field with its default: the lesson's model and training on Tiny Shakespeare."""
    config = ConfigDict()
    # Initial weights, the order of the data, and the samples all follow from the seed.
    config.seed = 0
    # Working directory of a run whose weights a new run starts from: main's --init_from sets it.
    config.init_from = ""

    config.data = ConfigDict()
    # UTF-8 text files of the user's: a path, a glob, or several of them with commas between.
    # They are read in that order (a glob's files by name). Where each split has files of its own,
    # those of train, validation and test with semicolons between. Empty: the TFDS dataset below.
    config.data.path = ""
    # A TFDS dataset and its feature that holds text.
    config.data.dataset = "tiny_shakespeare"
    config.data.text_feature = "text"
    # Where TFDS keeps prepared datasets. Empty: TFDS's own default, ~/tensorflow_datasets.
    config.data.directory = ""
    # The shares of train, validation and test in a text that comes without splits, by position.
    config.data.fractions = (0.9, 0.05, 0.05)
    # What the model reads and writes one at a time: "characters" (Unicode code points), "graphemes"
    # (accents stay with their letters, and emoji whole), "words" (with the space before each, and
    # graphemes between words) or "bytes" (any file at all).
    config.data.units = "characters"
    # Units that the training text has fewer times are read as [UNK]. Only bytes are all kept.
    config.data.min_count = 1
    # What ends a document, so that the model learns to stop there: "line", "blank_line" or "file"
    # (each file, or each example of a dataset). Empty: the text is one document without end.
    config.data.document_separator = ""
    # Files of more megabytes than this (10**6 bytes) in `path` are not read into memory: they are
    # encoded once into files of ids, of which training then reads what it needs.
    config.data.memory_megabytes = 16
    # Where those are kept. Empty: in .lstm_jax beside the first file of the text.
    config.data.prepared = ""
    # Checksum of the text, filled in when a run begins: it goes on, and is evaluated, on that text.
    config.data.sha256 = ""

    config.batches = ConfigDict()
    # "windows": shuffled windows, each from a zero carry. "streams": contiguous streams, the carry
    # handed from one step to the next (truncated back-propagation through time).
    config.batches.kind = "windows"
    config.batches.batch_size = 64
    # Tokens that one training step reads of each window or stream.
    config.batches.window_length = 100
    # In streams: the chance that a step begins with a zero carry, for each stream by itself. A
    # model that hardly ever sees that state in training can fail to recover from it, and every
    # evaluation and every sample begins with it.
    config.batches.reset_probability = 0.02

    config.model = ConfigDict()
    config.model.embedding_size = 256
    config.model.hidden_size = 1024
    config.model.num_layers = 1
    # What the layers are: "lstm", "mogrifier" (an LSTM whose inputs and hidden state scale each
    # other first, in `mogrifier_rounds`), "gru" or "rnn" (the simple one).
    config.model.cell = "lstm"
    config.model.mogrifier_rounds = 5
    # Normalise what goes into the gates.
    config.model.layer_norm = False
    # The dense layer's kernel is the embedding, and the last layer has `embedding_size` units.
    config.model.tie_embeddings = False
    # What fresh kernels and embeddings are multiplied by.
    config.model.initial_scale = 1.0
    # What the output bias begins as: "frequencies" (the logarithm of each token's share of the
    # training text, so that nothing has to be learned before that is predicted) or "zeros".
    config.model.initial_bias = "frequencies"
    # How the layers run over time: "scan" (the readable reference), "fused" (the same with a
    # backward pass of its own), "cudnn" (GPU, float32) or "auto" (the fastest). It can be changed
    # at any time.
    config.model.recurrence = "auto"
    # What matrix products multiply in: "float32", or "bfloat16" for GPUs, TPUs and CPUs with
    # AMX. Parameters, cell states, softmax and loss are float32 either way.
    config.model.dtype = "float32"
    # For long windows: keep the state at every so many steps only and compute the rest anew in the
    # backward pass. Least memory at the square root of the window's length. 0: keep everything.
    config.model.rematerialize = 0

    config.optimizer = ConfigDict()
    # "adam" (with `weight_decay`: AdamW) or "sgd" with `momentum`.
    config.optimizer.name = "adam"
    config.optimizer.momentum = 0.9
    # The peak learning rate. It is reached after `warmup_steps`, then stays ("constant"), falls to
    # zero at the end of the last epoch along half a cosine ("cosine") or a line ("linear"), or is
    # divided by ten at the shares `step_at` of all steps ("step").
    config.optimizer.learning_rate = 1e-4
    config.optimizer.warmup_steps = 0
    config.optimizer.schedule = "constant"
    config.optimizer.step_at = (0.5, 0.75)
    # Of kernels and embedding, a step: this times the learning rate.
    config.optimizer.weight_decay = 0.0
    # Gradients are scaled down to this global norm. 0: never.
    config.optimizer.max_gradient_norm = 0.0
    # Evaluation and sampling use an exponential moving average of the parameters, of which each
    # step keeps this share. 0: the parameters themselves.
    config.optimizer.average_decay = 0.0
    # A batch goes through the model in so many parts, one after the other; the gradient is the
    # same.
    config.optimizer.microbatches = 1

    # `regularization` says what each of these does. All draw anew at every step. 0: off.
    config.regularization = ConfigDict()
    config.regularization.embedding_dropout = 0.0
    config.regularization.input_dropout = 0.0
    config.regularization.hidden_dropout = 0.0
    config.regularization.output_dropout = 0.0
    config.regularization.recurrent_dropout = 0.0
    config.regularization.activation_penalty = 0.0
    config.regularization.temporal_activation_penalty = 0.0

    config.mesh = ConfigDict()
    # A batch is divided over data * model devices. Groups of `model` devices also divide the
    # matrices among parameters, optimizer state and averaged weights, for models that are too large
    # for one. data 0: all GPUs or TPUs; on a CPU, the cores that make it faster.
    config.mesh.data = 0
    config.mesh.model = 1

    config.num_epochs = 20
    # Steps that one compiled call runs, for models so small that calling them takes longer than
    # what they do. Logging and the ends of epochs keep their steps; between, single steps fill up.
    config.steps_per_call = 1
    # Steps between two lines of training loss in metrics.jsonl.
    config.log_every_steps = 10
    # A checkpoint is saved at the end of every epoch, and within one whenever so many seconds have
    # passed since the last: what a crash costs at the most. 0: after every step.
    config.checkpoint_every_seconds = 300.0
    # Steps whose loss or gradient is not finite that a run leaves out before it stops.
    config.max_skipped_steps = 0
    # Trace a few steps, for TensorBoard's profiler to open in the working directory.
    config.profile = False

    # The sample that training shows after each epoch: how many tokens, at what temperature.
    config.sample = ConfigDict()
    config.sample.length = 300
    config.sample.temperature = 0.8
    return config


def check_fields(config: ConfigDict) -> None:
    """Raises `UserError` for the first field whose value is outside its range."""
    data, batches, model, optimizer = config.data, config.batches, config.model, config.optimizer
    fractions = tuple(data.fractions)
    parts = max(config.mesh.data, 1) * max(config.mesh.model, 1)
    rules: list[tuple[bool, str, str]] = [
        (0 <= config.seed < 2**32, "seed", "0 or more, and below 2**32"),
        (
            len(fractions) == 3
            and all(isinstance(share, int | float) and share > 0 for share in fractions)
            and abs(sum(fractions) - 1) < 1e-6,
            "data.fractions",
            "three positive shares (train, validation, test) that add up to 1",
        ),
        (data.units in vocabulary.KINDS, "data.units", f"one of {', '.join(vocabulary.KINDS)}"),
        (0 < data.min_count < 2**31, "data.min_count", "1 or more, below 2**31"),
        (
            data.document_separator in vocabulary.SEPARATORS,
            "data.document_separator",
            f"empty or one of {', '.join(filter(None, vocabulary.SEPARATORS))}",
        ),
        (0 <= data.memory_megabytes <= 10**9, "data.memory_megabytes", "0 or more, up to 10**9"),
        (batches.kind in ("windows", "streams"), "batches.kind", "'windows' or 'streams'"),
        (0 < batches.batch_size <= _LARGEST, "batches.batch_size", f"from 1 to {_LARGEST:,}"),
        (0 < batches.window_length <= _LARGEST, "batches.window_length", f"from 1 to {_LARGEST:,}"),
        (0 <= batches.reset_probability < 1, "batches.reset_probability", "0 or more, and below 1"),
        (0 < model.embedding_size <= _LARGEST, "model.embedding_size", f"from 1 to {_LARGEST:,}"),
        (0 < model.hidden_size <= _LARGEST, "model.hidden_size", f"from 1 to {_LARGEST:,}"),
        (0 < model.num_layers <= 100, "model.num_layers", "from 1 to 100"),
        (model.cell in cells.CELLS, "model.cell", f"one of {', '.join(cells.CELLS)}"),
        (0 <= model.mogrifier_rounds <= 100, "model.mogrifier_rounds", "from 0 to 100"),
        (
            model.recurrence in fused.IMPLEMENTATIONS,
            "model.recurrence",
            f"one of {', '.join(fused.IMPLEMENTATIONS)}",
        ),
        (model.dtype in ("float32", "bfloat16"), "model.dtype", "'float32' or 'bfloat16'"),
        (0 <= model.rematerialize <= _LARGEST, "model.rematerialize", f"from 0 to {_LARGEST:,}"),
        (0 < model.initial_scale <= 1000, "model.initial_scale", "above 0, up to 1000"),
        (
            model.initial_bias in model_lib.INITIAL_BIASES,
            "model.initial_bias",
            f"one of {', '.join(model_lib.INITIAL_BIASES)}",
        ),
        (0 < optimizer.learning_rate <= 1e38, "optimizer.learning_rate", "above 0, up to 1e38"),
        (0 <= optimizer.warmup_steps < 2**31, "optimizer.warmup_steps", "0 or more, below 2**31"),
        (
            optimizer.name in optimizer_lib.OPTIMIZERS,
            "optimizer.name",
            f"one of {', '.join(optimizer_lib.OPTIMIZERS)}",
        ),
        (0 <= optimizer.momentum < 1, "optimizer.momentum", "0 or more, and below 1"),
        (
            optimizer.schedule in optimizer_lib.SCHEDULES,
            "optimizer.schedule",
            f"one of {', '.join(optimizer_lib.SCHEDULES)}",
        ),
        (
            all(isinstance(share, int | float) and 0 < share < 1 for share in optimizer.step_at),
            "optimizer.step_at",
            "shares between 0 and 1",
        ),
        (0 <= optimizer.weight_decay <= 1e38, "optimizer.weight_decay", "from 0 to 1e38"),
        (
            0 <= optimizer.max_gradient_norm <= 1e9,
            "optimizer.max_gradient_norm",
            "from 0 to 1e9",
        ),
        (0 <= optimizer.average_decay < 1, "optimizer.average_decay", "0 or more, and below 1"),
        (
            optimizer.microbatches > 0 and batches.batch_size % optimizer.microbatches == 0,
            "optimizer.microbatches",
            "a divisor of batches.batch_size",
        ),
        *(
            (0 <= rate < 1, f"regularization.{name}", "0 or more, and below 1")
            for name, rate in config.regularization.items()
            if name.endswith("_dropout")
        ),
        *(
            (0 <= weight <= 1e9, f"regularization.{name}", "from 0 to 1e9")
            for name, weight in config.regularization.items()
            if name.endswith("_penalty")
        ),
        (0 <= config.mesh.data <= _LARGEST, "mesh.data", f"from 0 to {_LARGEST:,}"),
        (0 < config.mesh.model <= _LARGEST, "mesh.model", f"from 1 to {_LARGEST:,}"),
        (
            batches.batch_size % parts == 0,
            "batches.batch_size",
            f"a multiple of mesh.data times mesh.model, {parts}",
        ),
        (0 < config.num_epochs <= 10**6, "num_epochs", "from 1 to 1,000,000"),
        (0 < config.log_every_steps < 2**31, "log_every_steps", "1 or more, below 2**31"),
        (
            0 < config.steps_per_call <= min(config.log_every_steps, 10**4),
            "steps_per_call",
            "from 1 to log_every_steps, and 10,000 at most",
        ),
        (
            0 <= config.checkpoint_every_seconds <= 1e9,
            "checkpoint_every_seconds",
            "from 0 to 1e9",
        ),
        (0 <= config.max_skipped_steps < 2**31, "max_skipped_steps", "0 or more, below 2**31"),
        (0 < config.sample.length <= 10**6, "sample.length", "from 1 to 1,000,000"),
        (0 <= config.sample.temperature <= 1000, "sample.temperature", "from 0 to 1000"),
    ]
    values = dict(flatten(config))
    for holds, field, allowed in rules:
        if not holds:
            raise UserError(f"config.{field} is {values[field]!r}: it must be {allowed}")


def complete_config(fields: Any) -> ConfigDict:
    """A whole, checked config from some of its fields; the others get their defaults.

    Args:
      fields: a ConfigDict or nested dict.

    Raises:
      UserError: for an unknown field, a value of the wrong type, or one outside its range.
    """
    if not isinstance(fields, ConfigDict):
        if not isinstance(fields, dict):
            raise UserError(f"get_config() returned {type(fields).__name__}, not a ConfigDict")
        try:
            fields = ConfigDict(fields)
        except (TypeError, ValueError) as error:  # A name with a dot in it.
            raise UserError(f"the config is not one: {error}") from None
    config = default()
    known = dict(flatten(config))
    for field, value in flatten(fields):
        if message := describe_unknown_field(field):
            raise UserError(message)
        try:
            if value is None:  # ConfigDict takes it for any field.
                raise TypeError
            config.update_from_flattened_dict({field: value})
        except (TypeError, ValueError, OverflowError):
            wanted = type(known[field]).__name__
            raise UserError(f"config.{field} is {value!r}: it must be of type {wanted}") from None
    check_fields(config)
    return config


def describe_unknown_field(field: str) -> str | None:
    """What is wrong with the dotted name of a field, or None if it is one."""
    known = dict(flatten(default()))
    if field in known:
        return None
    section, _, name = field.rpartition(".")
    others = {other.rpartition(".")[2]: other for other in known if section + "." in other}
    if near := difflib.get_close_matches(name, others, n=1):
        hint = f": did you mean {others[near[0]]}?"
    elif section and others:
        hint = f": there are {', '.join(others.values())}"
    else:
        near = difflib.get_close_matches(field, known, n=1)
        hint = f": did you mean {near[0]}?" if near else ""
    return f"there is no field config.{field}{hint}"


# What a run may change when it goes on: all of these leave the arrays it has as they are.
_CHANGEABLE = (
    "num_epochs",
    "steps_per_call",
    "log_every_steps",
    "checkpoint_every_seconds",
    "max_skipped_steps",
    "profile",
    "sample.length",
    "sample.temperature",
    # Other ways to compute the same.
    "model.recurrence",
    "model.dtype",
    "model.rematerialize",
    "optimizer.microbatches",
    "mesh.data",
    "mesh.model",
    # How fast it learns from here on; with num_epochs, where the schedule ends.
    "optimizer.learning_rate",
    "optimizer.warmup_steps",
    "optimizer.schedule",
    "optimizer.step_at",
    "optimizer.max_gradient_norm",
    "optimizer.momentum",
    "optimizer.weight_decay",
    "batches.reset_probability",
    # What keeps it from learning by heart.
    "regularization.embedding_dropout",
    "regularization.input_dropout",
    "regularization.hidden_dropout",
    "regularization.output_dropout",
    "regularization.recurrent_dropout",
    "regularization.activation_penalty",
    "regularization.temporal_activation_penalty",
    # The text may have moved; that it is the same, its checksum tells.
    "data.path",
    "data.directory",
    "data.memory_megabytes",
    "data.prepared",
)


def can_change_on_resume(field: str) -> bool:
    """Temporary."""
    return field in _CHANGEABLE


def flatten(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields every field as (dotted name, value)."""
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def to_json(config: ConfigDict) -> str:
    """The config as JSON text."""
    return json.dumps(config.to_dict(), indent=2) + "\n"
