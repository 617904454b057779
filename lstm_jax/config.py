"""Define each config field once: type, default, meaning, allowed values, and when it may change.

Outside of the package, a config is an ml_collections `ConfigDict`. An experiment is a Python file
with `get_config()`, which takes `default()` and changes some fields, and every field can be set on
the command line: `--config.model.hidden_size=512`. `complete_config` checks it and returns a
`Config`, of which each module gets the section that it needs.

Nothing here imports JAX, which takes a second: `--help` and a mistake in a flag don't need it. So
the sections are here, and not in the modules that use them. `python -m lstm_jax.config >
docs/config.md` writes the table of all fields as a page.
"""

import dataclasses
import difflib
import functools
import itertools
import re
import runpy
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, TypeVar, get_args

from ml_collections import ConfigDict

from lstm_jax import vocabulary
from lstm_jax.errors import UserError, run_user_code

T = TypeVar("T")
T_contra = TypeVar("T_contra", contravariant=True)


class Rule(NamedTuple, Generic[T_contra]):
    """A condition, in words and as a function."""

    words: str
    is_met: Callable[[T_contra], bool]


_OF_TYPE: Rule[Any] = Rule("", lambda value: True)  # Allows all values of a field's type.


class Field(NamedTuple):
    """One field of a config; `name` is dotted, and values have the type of `default`."""

    name: str
    default: object
    meaning: str
    allowed: Rule[Any]
    # A run may change it when it resumes: checkpoints have the same arrays with every value, and
    # losses before and after the change can be compared.
    resume: bool
    requires: "Rule[Config] | None"  # The whole config must satisfy this rule, else an error.
    # Where a config breaks this rule, the field has no effect, and `main` warns if it is set.
    relevant_if: "Rule[Config] | None"


def field(
    default: T,
    meaning: str,
    allowed: Rule[T] = _OF_TYPE,
    *,
    resume: bool = False,
    requires: "Rule[Config] | None" = None,
    relevant_if: "Rule[Config] | None" = None,
) -> T:
    """Define a field of a section; see `Field`."""
    defined = Field("", default, meaning, allowed, resume, requires, relevant_if)
    return dataclasses.field(default_factory=lambda: default, metadata={"field": defined})


def between(low: int, high: int) -> Rule[float]:
    """Allow numbers from `low` to `high`, both included."""
    return Rule(f"from {low:,} to {high:,}", lambda value: low <= value <= high)


def one_of(*words: str) -> Rule[str]:
    """Allow these strings."""
    listed = f"one of {', '.join(filter(None, words))}"
    return Rule(listed if all(words) else f"empty or {listed}", lambda value: value in words)


def names_cell_file(name: str) -> bool:
    """Return whether a name has the form FILE.py:CLASS."""
    return re.fullmatch(r"[^\0]+\.py:\w+", name) is not None


def is_gated(model: Any) -> bool:
    """Return whether `lstm_jax.ops` runs the layers of a `ModelConfig` by a fast implementation."""
    gated = model.cell in ("lstm", "peephole", "gru", "rnn")
    in_scan = model.recurrence in ("scan", "cudnn")
    return bool(gated and not (in_scan or model.layer_norm or model.block != "none"))


# fmt: off
# The keys of `cells.CELLS`.
CELLS = (
    "lstm", "peephole", "mogrifier", "multiplicative", "gru", "rnn", "minlstm", "mingru", "rglru",
    "paragru", "slstm", "mlstm")
# The keys of `standard_texts.STANDARD_TEXTS`, which have splits.
STANDARD_TEXTS = (
    "tiny_shakespeare", "enwik8", "text8", "penn_treebank", "wikitext2")
OptimizerName = Literal["adam", "lion", "muon", "schedule_free", "sgd"]
Schedule = Literal["constant", "cosine", "linear", "step"]
Dtype = Literal["float32", "bfloat16", "auto"]  # Of matmuls; `model.make_model` resolves "auto".
Option = bool | int | float | str  # The value of an option of a cell.
DTYPES = get_args(Dtype)

_SHARE: Rule[float] = Rule("0 or more, and below 1", lambda value: 0 <= value < 1)
_SHARES: Rule[tuple[float, ...]] = Rule(
    "fractions between 0 and 1",
    lambda values: all(isinstance(share, int | float) and 0 < share < 1 for share in values),
)
_FRACTIONS: Rule[tuple[float, ...]] = Rule(
    "three positive fractions (train, validation, test) that add up to 1",
    lambda values: len(values) == 3 and _SHARES.is_met(values) and abs(sum(values) - 1) < 1e-6,
)
_SCALE: Rule[float] = Rule("above 0, up to 1000", lambda value: 0 < value <= 1000)
# Larger sizes are mistakes, or attempts to exhaust the memory.
_SIZE, _SIZE_OR_ZERO = between(1, 2**20), between(0, 2**20)
_COUNT, _POSITIVE_COUNT = between(0, 2**31 - 1), between(1, 2**31 - 1)
_AMOUNT = between(0, 10**9)
_NO_PATH: "Rule[Config]" = Rule("data.path=''", lambda c: not c.data.path)
_SEVERAL_LAYERS: "Rule[Config]" = Rule("model.num_layers above 1", lambda c: c.model.num_layers > 1)
_READS_B1_AND_B2: "Rule[Config]" = Rule(
    "another optimizer than 'sgd'", lambda c: c.optimizer.name != "sgd"
)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The text, and how it is divided into tokens and documents."""

    path: str = field("", "UTF-8 text files: paths and glob patterns, separated by commas; "
        "semicolons separate train, validation and test. Empty: data.dataset.", resume=True)
    dataset: str = field("tiny_shakespeare", "Name of a standard text (docs/data.md) or of a TFDS "
        "dataset.", relevant_if=_NO_PATH)
    text_feature: str = field("text", "Feature of the dataset that holds the text.",
        relevant_if=_NO_PATH)
    directory: str = field("", "Directory of datasets. Empty: TFDS's default.", resume=True)
    fractions: tuple[float, ...] = field((0.9, 0.05, 0.05), "Fractions of train, validation and "
        "test, in this order, in a text without splits.", _FRACTIONS,
        relevant_if=Rule("a text without splits", lambda c: ";" not in c.data.path
            if c.data.path else c.data.dataset not in STANDARD_TEXTS))
    units: str = field("characters", "Kind of tokens: characters (Unicode code points), words "
        "(with the space before each), tokens (what is between white space, and the end of each "
        "line), bytes (of any file) or bpe (parts of words, by byte-pair encoding).",
        one_of(*vocabulary.KINDS))
    vocabulary_size: int = field(vocabulary.DEFAULT_SIZE, "Maximum number of tokens: two special "
        "ones, the 256 bytes, a stop token, and those that byte-pair encoding learns from the "
        "training text.", between(259, 2**20),
        relevant_if=Rule("data.units='bpe'", lambda c: c.data.units == "bpe"))
    min_count: int = field(1, "Replace tokens that occur less often than this in the training text "
        "by [UNK], except bytes. bpe: learn only tokens that occur at least this often.",
        _POSITIVE_COUNT)
    document_separator: str = field("", "End of a document, where the model learns to stop; the "
        "next is read from a zero state. file: the end of each file, or of each example of a "
        "dataset. Empty: the text is one document.",
        one_of(*vocabulary.SEPARATORS))
    sha256: str = field("", "Checksum of the text, and the number of bytes of each split, set when "
        "a run begins. The run resumes with this text only.")


@dataclasses.dataclass(frozen=True)
class BatchesConfig:
    """The batches of a training step."""

    # The carry and the step of a checkpoint are those of batches of one shape, so kind, batch_size
    # and window_length can't change when a run resumes.
    kind: Literal["windows", "streams"] = field("windows", "windows: shuffled windows, each from a "
        "zero state. streams: contiguous streams that keep their carry between steps (truncated "
        "backpropagation through time).")
    batch_size: int = field(64, "Windows or streams per batch.", _SIZE,
        requires=Rule("a multiple of mesh.data times mesh.model",
            lambda c: c.batches.batch_size % (max(c.mesh.data, 1) * c.mesh.model) == 0))
    window_length: int = field(100, "Tokens of each window or stream per step.", _SIZE)
    reset_probability: float = field(0.02, "Probability that a stream starts a step from a zero "
        "state, as each text does in evaluation.", _SHARE, resume=True,
        relevant_if=Rule("batches.kind='streams'", lambda c: c.batches.kind == "streams"))


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The layers of the model, their initial parameters, and how they are computed."""

    embedding_size: int = field(256, "Size of token embeddings.", _SIZE)
    hidden_size: int = field(1024, "Hidden units of each layer; with tie_embeddings, the last one "
        "has embedding_size.", _SIZE,
        relevant_if=Rule("model.num_layers above 1 with tie_embeddings",
            lambda c: not c.model.tie_embeddings or c.model.num_layers > 1))
    num_layers: int = field(1, "Recurrent layers.", between(1, 100))
    cell: str = field("lstm", "Kind of recurrent layers, or a file with your own cell "
        "(docs/cells.md).",
        Rule(f"one of {', '.join(CELLS)}, or FILE.py:CLASS",
            lambda name: name in CELLS or names_cell_file(name)))
    options: Mapping[str, Option] = field({}, "Options that the cell declares, "
        "as in --config.model.options.rounds=3.",
        Rule("numbers, strings and booleans, by name",
            lambda options: all(isinstance(x, Option) for x in options.values())))
    cell_sha256: str = field("", "Checksum of the cell's file, set when a run begins. The run "
        "resumes with it only.")
    block: Literal["none", "residual"] = field("none", "residual: each cell is in a block with "
        "normalization, a short convolution, a gated MLP and residual branches.")
    layer_norm: bool = field(False, "Layer normalization of x W and h U, and of an LSTM's c'.")
    tie_embeddings: bool = field(False, "Use the embedding table as the dense layer's kernel; sets "
        "the last layer's width.")
    skip_connections: bool = field(False, "Each layer but the first adds its inputs, without "
        "dropout, to its outputs.", relevant_if=_SEVERAL_LAYERS,
        requires=Rule("False with tie_embeddings, unless embedding_size equals hidden_size",
            lambda c: not (c.model.skip_connections and c.model.tie_embeddings)
            or c.model.embedding_size == c.model.hidden_size))
    initial_embedding: float = field(0.05, "Initial embeddings are uniform between minus and plus "
        "this.", _SCALE)
    initial_scale: float = field(1.0, "Factor of the initial kernels and embedding table.", _SCALE)
    initial_bias: Literal["frequencies", "zeros"] = field("frequencies", "Initial bias of the "
        "logits. frequencies: the logarithm of each token's frequency in the training text, which "
        "the model then does not have to learn.")
    recurrence: Literal["auto", "scan", "xla", "c", "cudnn", "pallas", "parallel"] = field("auto",
        "Implementation of the recurrence. scan: step by step, the readable reference. parallel: "
        "all steps at once, for cells that support it. xla, c (CPUs with AVX-512), cudnn (LSTMs on "
        "a GPU, in float32), pallas (TPUs): for LSTM, peephole LSTM, GRU and RNN cells. auto: the "
        "fastest that supports the cell.", resume=True)
    dtype: Dtype = field("float32", "Dtype of matmul operands; parameters, cell states, softmax "
        "and loss are float32. auto: bfloat16 on TPUs, on GPUs that have it, and for LSTM, "
        "peephole LSTM, GRU and RNN layers on CPUs that multiply faster in it.", resume=True)
    rematerialize: int = field(0, "Steps between the states stored for the backward pass, which "
        "recomputes the others to save memory. 0: store all.", _SIZE_OR_ZERO, resume=True,
        relevant_if=Rule("batches.window_length above it",
            lambda c: c.model.rematerialize < c.batches.window_length))


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer, its learning rate, and the average of the parameters."""

    name: OptimizerName = field("adam", "AdamW; Lion; Muon for the matrices of recurrent layers "
        "with AdamW for the rest; schedule-free AdamW; or SGD.")
    b1: float = field(0.9, "Decay of the gradients' mean in Adam; its weight in Lion's updates; "
        "in schedule_free, the share of the average in the point of the gradient, which can't "
        "change when a run resumes.", _SHARE,
        resume=True, relevant_if=_READS_B1_AND_B2,
        requires=Rule("above 0 for optimizer.name='schedule_free'",
            lambda c: c.optimizer.b1 > 0 or c.optimizer.name != "schedule_free"))
    b2: float = field(0.999, "Decay of the gradients' mean square in Adam, and of their mean in "
        "Lion.", _SHARE, resume=True, relevant_if=_READS_B1_AND_B2)
    epsilon: float = field(1e-8, "Added to the root mean square in Adam.",
        Rule("from 1e-30 to 1", lambda value: 1e-30 <= value <= 1), resume=True,
        relevant_if=Rule("another optimizer than 'lion' or 'sgd'",
            lambda c: c.optimizer.name not in ("lion", "sgd")))
    momentum: float = field(0.9, "Momentum of SGD and Muon.", _SHARE, resume=True,
        relevant_if=Rule("optimizer.name='sgd' or 'muon'",
            lambda c: c.optimizer.name in ("sgd", "muon")))
    learning_rate: float = field(1e-4, "Peak learning rate.",
        Rule("above 0, up to 1e38", lambda x: 0 < x <= 1e38), resume=True)
    warmup_steps: int = field(0, "Steps of a linear rise to the peak learning rate.", _COUNT,
        resume=True)
    schedule: Schedule = field("constant", "Learning rate after warm-up. cosine, linear: decay to "
        "zero at the end of training. step: divide by ten at each of step_at.", resume=True)
    step_at: tuple[float, ...] = field((0.5, 0.75), "Fractions of all steps.", _SHARES, resume=True,
        relevant_if=Rule("optimizer.schedule='step'", lambda c: c.optimizer.schedule == "step"))
    weight_decay: float = field(0.0, "Weight decay of kernels and embeddings.",
        Rule("from 0 to 1e38", lambda value: 0 <= value <= 1e38), resume=True)
    max_gradient_norm: float = field(0.0, "Clip gradients to this global norm. 0: no clipping.",
        _AMOUNT, resume=True)
    average_decay: float = field(0.0, "Decay of an exponential moving average of the parameters, "
        "which evaluation and sampling then use. 0: no average.", _SHARE,
        relevant_if=Rule("another optimizer than 'schedule_free'",
            lambda c: c.optimizer.name != "schedule_free"))
    microbatches: int = field(1, "Parts of a batch, computed one after the other to save memory "
        "(gradient accumulation).",
        _SIZE, resume=True,
        requires=Rule("a divisor of batches.batch_size",
            lambda c: c.batches.batch_size % c.optimizer.microbatches == 0))


@dataclasses.dataclass(frozen=True)
class RegularizationConfig:
    """The rates of dropout, and the weights of penalties."""

    embedding_dropout: float = field(0.0, "Dropout of whole rows of the embedding table.", _SHARE,
        resume=True)
    input_dropout: float = field(0.0, "Dropout of the inputs of the first layer.", _SHARE,
        resume=True)
    hidden_dropout: float = field(0.0, "Dropout between layers.", _SHARE, resume=True,
        relevant_if=_SEVERAL_LAYERS)
    output_dropout: float = field(0.0, "Dropout of the outputs of the last layer.", _SHARE,
        resume=True)
    recurrent_dropout: float = field(0.0, "DropConnect of the recurrent kernels.", _SHARE,
        resume=True)
    activation_penalty: float = field(0.0, "Weight of the outputs' mean square in the loss.",
        _AMOUNT, resume=True)
    temporal_activation_penalty: float = field(0.0, "Weight of the outputs' mean squared change "
        "per step in the loss.", _AMOUNT, resume=True)


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """Teachers, whose probabilities the model learns beside the text (Hinton et al. 2015)."""

    teachers: str = field("", "Working directories of trained models, separated by commas: the "
        "model also learns the mean of their probabilities.", resume=True)
    weight: float = field(0.8, "Share of the teachers in the loss; the rest is the text's.",
        Rule("from 0 to 1", lambda value: 0 <= value <= 1), resume=True)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The devices that a batch is divided over."""

    data: int = field(0, "A batch is divided over mesh.data times mesh.model devices. 0: all GPUs "
        "or TPUs; on a CPU, the fastest number of cores.", _SIZE_OR_ZERO, resume=True)
    model: int = field(1, "Devices that also divide the matrices of parameters and optimizer state "
        "between steps. Within a step, each still holds all parameters and gradients.", _SIZE,
        resume=True)


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """The text that is generated after each validation."""

    length: int = field(300, "Tokens of the sample of each validation.", between(1, 10**6),
        resume=True)
    temperature: float = field(0.8, "Temperature of this sample. 0: greedy.",
        Rule("0, or from 1e-6 to 1000", lambda value: value == 0 or 1e-6 <= value <= 1000),
        resume=True)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """The length of a run, and what it does between steps."""

    seed: int = field(0, "Random seed of initial parameters, batches and samples.",
        between(0, 2**32 - 1))
    init_from: str = field("", "Start from the parameters of the run in this directory (set by "
        "--init_from).")
    num_epochs: int = field(20, "Passes over the training text.", between(1, 10**6), resume=True)
    max_steps: int = field(0, "Training ends after this number of steps, if num_epochs has more. "
        "0: no limit.", _COUNT, resume=True)
    validate_every_steps: int = field(0, "Steps between validations within an epoch; each epoch "
        "also ends with one. 0: no others.", _COUNT, resume=True)
    validation_tokens: int = field(0, "Number of tokens at the start of the validation text to "
        "validate on. 0: all of it.",
        Rule("0, or from 4 to 2,147,483,647", lambda value: value == 0 or 4 <= value < 2**31))
    patience: int = field(0, "Training ends when the validation loss has not improved for this "
        "number of validations. 0: no such limit.", _COUNT, resume=True)
    steps_per_call: int = field(1, "Training steps per compiled call; more are faster for tiny "
        "models.", between(1, 10**4), resume=True,
        requires=Rule("at most log_every_steps", lambda c: c.steps_per_call <= c.log_every_steps))
    log_every_steps: int = field(10, "Steps between training losses in metrics.jsonl.",
        _POSITIVE_COUNT, resume=True)
    checkpoint_every_seconds: float = field(300.0, "Seconds between checkpoints in an epoch. 0: "
        "as often as possible.", _AMOUNT, resume=True)
    max_skipped_steps: int = field(0, "Skip at most this number of steps with a number that "
        "is not finite.", _COUNT, resume=True)
    profile: bool = field(False, "Trace a few steps for TensorBoard's profiler.", resume=True)
# fmt: on


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    """A complete, checked config: the fields of the run, and the sections."""

    data: DataConfig = DataConfig()
    batches: BatchesConfig = BatchesConfig()
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    regularization: RegularizationConfig = RegularizationConfig()
    distill: DistillConfig = DistillConfig()
    mesh: MeshConfig = MeshConfig()
    sample: SampleConfig = SampleConfig()

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as nested dicts, as in config.json."""
        return ConfigDict(dataclasses.asdict(self)).to_dict()


def _list_fields(section: Any, prefix: str = "") -> Iterator[Field]:
    for own in dataclasses.fields(section):
        name = prefix + own.name
        if own.metadata:
            defined: Field = own.metadata["field"]
            is_of_type = defined.allowed is _OF_TYPE
            allowed = _allow_type(own.type) if is_of_type else defined.allowed
            yield defined._replace(name=name, allowed=allowed)
        else:
            yield from _list_fields(own.type, f"{name}.")


def _allow_type(kind: object) -> Rule[Any]:
    """Return the rule of a type that gives its own values: bool, str or a Literal."""
    words = {bool: "True or False", str: "any text"}
    return _OF_TYPE._replace(words=words[kind]) if kind in words else one_of(*get_args(kind))


FIELDS = tuple(_list_fields(Config))
_BY_NAME = {field.name: field for field in FIELDS}
_SECTIONS: dict[str, Any] = {
    section.name: section.type for section in dataclasses.fields(Config) if not section.metadata
}
_LEGEND = (
    "Numbers are written as in Python: 1_000 is 1000. A run may change the fields marked [resume] "
    "when it resumes."
)
# A field whose value is a dict with any names.
_OPEN = "model.options"
# The fields that may change when a run resumes.
CHANGEABLE = tuple(field.name for field in FIELDS if field.resume)


def default() -> ConfigDict:
    """Return the default config, of one layer of 1,024 units trained on Tiny Shakespeare."""
    return ConfigDict(dataclasses.asdict(Config()))


def load(name: str) -> Any:
    """Return the config of an experiment, which can be changed, and passed to `lstm_jax.train`.

    `name` is that of `--config`: FILE, for what `get_config()` of this file returns, or FILE:WORD,
    for `get_config(WORD)`. `lstm_jax.config.load("experiments/quick.py")` works in any directory.

    Raises:
      UserError: if there is no such file, or its code fails.
    """
    name, word = split_name(name)
    file = find_experiment(name)
    if not Path(file).is_file():
        raise UserError(f"there is no config file {file}")
    with run_user_code("config file", file):
        get_config = runpy.run_path(file).get("get_config")
        if get_config is None:
            raise UserError(f"config file {file} has no function get_config()")
        return get_config() if word is None else get_config(word)


def split_name(name: str) -> tuple[str, str | None]:
    """Return FILE and WORD of FILE:WORD, as in experiments/cells.py:gru, or FILE and None.

    In the path of FILE.py there may be a colon.
    """
    match = re.fullmatch(r"(.*?\.py|[^:]*)(?::(.*))?", name, re.DOTALL)
    assert match
    return match[1], match[2]


def find_experiment(name: str) -> str:
    """Return the path of a packaged experiment; any other name, and of a file here, as it is."""
    path = find_in_package(name)
    is_packaged = name.startswith("experiments/") and path.is_file() and not Path(name).exists()
    return str(path) if is_packaged else name


def find_in_package(name: str) -> Path:
    """Return the path of a packaged experiment, which may not exist.

    An installed package has experiments/ within it, and an editable one beside it.
    """
    package = Path(__file__).parent
    return (package if (package / "experiments").is_dir() else package.parent) / name


def complete_config(fields: object) -> Config:
    """Return a checked config with the given fields, and defaults for all others.

    Args:
      fields: a ConfigDict or nested dict, or a `Config`.

    Raises:
      UserError: for an unknown field, a value of the wrong type, or one that is not allowed.
    """
    if isinstance(fields, Config):
        fields = fields.to_dict()
    if not isinstance(fields, ConfigDict | dict):
        raise UserError(f"the config is a {type(fields).__name__}, not a ConfigDict")
    try:
        given = list(_flatten(ConfigDict(fields).to_dict()))
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
        # Of a name, such as "a.b", or of sections that are too deep.
        raise UserError(f"this is not a config: {error}") from None
    made = default()
    for name, value in given:
        if message := describe_unknown_field(name):
            raise UserError(message)
        try:
            if value is None:  # ConfigDict accepts it for any field.
                raise TypeError
            made.update_from_flattened_dict({name: value})
        except (TypeError, ValueError, OverflowError):
            wanted = type(_BY_NAME[name].default).__name__
            raise UserError(f"config.{name} is {value!r}: it must be of type {wanted}") from None
    nested = made.to_dict()
    values = dict(_flatten(nested))
    sections = {name: section(**nested.pop(name)) for name, section in _SECTIONS.items()}
    config = Config(**nested, **sections)
    for field in FIELDS:
        check_value(field.name, values[field.name])
    for field in FIELDS:
        if field.requires and not field.requires.is_met(config):
            value, words = values[field.name], field.requires.words
            raise UserError(f"config.{field.name} is {value!r}: it must be {words}")
    return config


def check_value(name: str, value: object) -> None:
    """Raise `UserError` if a value is not allowed in the field with this dotted name."""
    rule = _BY_NAME[name].allowed
    if not rule.is_met(value):
        raise UserError(f"config.{name} is {value!r}: it must be {rule.words}")


def change_fields(config: Config, overrides: Mapping[str, object]) -> Config:
    """Return the complete config with the overrides, by dotted field name, applied.

    Raise `UserError` for an unknown field or an invalid value.
    """
    fields = config.to_dict()
    for field, value in overrides.items():
        if message := describe_unknown_field(str(field)):
            raise UserError(message)
        *parents, name = field.split(".")
        functools.reduce(dict.__getitem__, parents, fields)[name] = value
    return complete_config(fields)


def find_unused_fields(config: Config) -> list[str]:
    """Return a message for each field that is set but has no effect on this config."""
    return [
        f"config.{name} is {value!r}, which has no effect: it needs {rule.words}"
        for name, value in flatten(config)
        if (rule := _BY_NAME[name].relevant_if) and not rule.is_met(config)
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
    elif same := [other for other in _BY_NAME if other.rpartition(".")[2] == last]:
        hint = f": did you mean {' or '.join(same)}?"
    elif section and others:
        hint = f": there are {', '.join(others.values())}"
    else:
        near = difflib.get_close_matches(name, _BY_NAME, n=1)
        hint = f": did you mean {near[0]}?" if near else ""
    return f"there is no field config.{name}{hint}"


def flatten(config: Config) -> Iterator[tuple[str, object]]:
    """Yield every field as (dotted name, value), sorted by name."""
    return _flatten(config.to_dict())


def _flatten(fields: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in fields.items():
        full = prefix + name
        if isinstance(value, dict) and full != _OPEN and (value or full in _SECTIONS):
            yield from _flatten(value, f"{full}.")
        else:
            yield full, value


def describe_fields(width: int, quote: str = "") -> str:
    """Return the table, wrapped at `width` columns, with `quote` around names and defaults."""
    lines = textwrap.wrap(_LEGEND, width)
    for section, fields in itertools.groupby(FIELDS, lambda field: field.name.rpartition(".")[0]):
        lines += ["", section or "run", "-" * len(section or "run"), ""]
        for field in fields:
            mark = " [resume]" * field.resume
            lines.append(f"- {quote}--config.{field.name}={field.default!r}{quote}{mark}")
            allowed = "; ".join(rule.words for rule in (field.allowed, field.requires) if rule)
            only = f" Needs {field.relevant_if.words}." if field.relevant_if else ""
            text = f"{field.meaning} Allowed: {allowed}.{only}"
            lines += textwrap.wrap(text, width, initial_indent="  ", subsequent_indent="  ")
    return "\n".join(lines)


if __name__ == "__main__":
    print("# Config fields\n\nGenerated from config.py.\n", describe_fields(99, "`"), sep="\n")
