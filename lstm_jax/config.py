"""Define each config field once: name, type, default, meaning, allowed values, other names.

Outside of the package, a config is an ml_collections `ConfigDict`. An experiment is a Python file
with `get_config()`, which takes `default()` and changes some fields, and fields can be set on the
command line: `--config.model.hidden_size=512`. `complete_config` checks it and returns a `Config`,
of which each module gets the section that it needs.

Nothing here imports JAX, which takes a second: `--help` and a mistake in a flag don't need it. So
the sections are here, and not in the modules that use them. `python -m lstm_jax.config >
docs/config.md` writes the table of all fields as a page.
"""

import contextlib
import dataclasses
import difflib
import itertools
import os
import re
import runpy
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, TypeVar, get_args

from ml_collections import ConfigDict

from lstm_jax import cells, vocabulary
from lstm_jax.errors import UserError, check_type, run_user_code

T = TypeVar("T")


class Field(NamedTuple):
    """One field of a config; `name` is dotted, and values have the type of `default`.

    Conditions are Python expressions, which messages show: `allowed` of the value x; `requires` of
    the whole config, by the names of its fields.
    """

    name: str
    default: Any
    meaning: str
    allowed: str | tuple[str, ...] = ""  # Of x. Empty: all of the type. A tuple: one of these.
    # A run may change it when it resumes: checkpoints have the same arrays with every value, and
    # losses before and after the change can be compared.
    resume: bool = False
    requires: str = ""
    also: str = ""  # Other names by which people look for it.
    is_flag: bool = True  # Otherwise, only the program sets it.


def field(default: T, meaning: str, allowed: str | tuple[str, ...] = "", **more: Any) -> T:
    """Define a field of a section; for `more`, see `Field`."""
    defined = Field("", default, meaning, allowed, **more)
    return dataclasses.field(default_factory=lambda: default, metadata={"field": defined})


# fmt: off
OptimizerName = Literal["adam", "muon", "sgd"]
Schedule = Literal["constant", "cosine", "linear"]
Dtype = Literal["float32", "bfloat16", "auto"]  # Of matmuls; `model.make_model` resolves "auto".
Option = bool | int | float | str  # The value of an option of a cell.
DTYPES = get_args(Dtype)

_OWN_CELL = "FILE.py:CLASS"
_SHARE, _AMOUNT = "0 <= x < 1", "0 <= x <= 1e9"
# Larger sizes are mistakes, or attempts to exhaust the memory.
_SIZE, _SIZE_OR_ZERO = "1 <= x <= 2**20", "0 <= x <= 2**20"
_COUNT, _POSITIVE_COUNT = "0 <= x < 2**31", "1 <= x < 2**31"


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The text, and how it is divided into tokens and documents."""

    path: str = field("", "UTF-8 text files: paths and globs, separated by commas; semicolons "
        "separate train, validation and test. Empty: data.dataset.", resume=True, also="data text")
    dataset: str = field("tiny_shakespeare", "Name of a standard text (docs/data.md) or of a TFDS "
        "dataset, if data.path is empty.")
    text_feature: str = field("text", "Feature of a TFDS dataset that holds the text.")
    directory: str = field("", "Directory of datasets. Empty: TFDS's default.", resume=True)
    fractions: tuple[float, ...] = field((0.9, 0.05, 0.05), "Fractions of train, validation and "
        "test, in this order, in a text without splits.",
        "len(x) == 3 and min(x) > 0 and abs(sum(x) - 1) < 1e-6")
    units: str = field("characters", "Kind of tokens (docs/data.md).", vocabulary.KINDS,
        also="tokens tokenizer")
    vocabulary_size: int = field(vocabulary.DEFAULT_SIZE, "Maximum number of tokens with bpe, "
        "with the 256 bytes and the special ones.", "259 <= x <= 2**20", also="vocab_size")
    min_count: int = field(1, "Replace tokens that occur less often than this in the training text "
        "by [UNK], except bytes. bpe: learn only tokens that occur at least this often.",
        _POSITIVE_COUNT)
    document_separator: str = field("", "End of a document, each of which is read alone "
        "(docs/data.md). Empty: the text is one document.", tuple(vocabulary.SEPARATORS))
    sha256: str = field("", "Checksum of the text, and bytes of each split.", is_flag=False)


@dataclasses.dataclass(frozen=True)
class BatchesConfig:
    """The batches of a training step."""

    # The carry and the step of a checkpoint belong to one order of batches, so no field can change
    # when a run resumes.
    kind: Literal["windows", "streams"] = field("windows", "windows: shuffled windows, each from a "
        "zero state. streams: shuffled segments of many windows, whose carry is kept (truncated "
        "BPTT).")
    batch_size: int = field(64, "Windows or streams per batch.", _SIZE,
        requires="batches.batch_size % max(mesh.data, 1) == 0")
    window_length: int = field(100, "Tokens of each window or stream per step.", _SIZE,
        also="context bptt seq_len sequence_length")
    reset_probability: float = field(0.02, "Probability that a stream starts another segment of "
        "the text at a step, from a zero state.", _SHARE)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The layers of the model, their initial parameters, and how they are computed."""

    embedding_size: int = field(256, "Size of token embeddings.", _SIZE)
    hidden_size: int = field(1024, "Hidden units of each layer; with tie_embeddings, the last one "
        "has embedding_size.", _SIZE, also="hidden units")
    num_layers: int = field(1, "Recurrent layers.", "1 <= x <= 100")
    cell: str = field("lstm", "Kind of recurrent layers, or a file with your own cell "
        "(docs/cells.md).", (*cells.CELLS, _OWN_CELL))
    options: Mapping[str, Option] = field({}, "Options that the cell declares, "
        "as in --config.model.options.rounds=3.",
        "all(isinstance(v, bool | int | float | str) for v in x.values())")
    block: Literal["none", "residual"] = field("none", "residual: each cell is in a block with "
        "normalization, a short convolution, a gated MLP and residual branches.")
    tie_embeddings: bool = field(False, "The embedding table is the dense layer's kernel.")
    skip_connections: bool = field(False, "Each layer but the first adds its inputs, without "
        "dropout, to its outputs.", requires="not (model.skip_connections and model.tie_embeddings)"
        " or model.embedding_size == model.hidden_size")
    initial_embedding: float = field(0.05, "Initial embeddings lie within ± this.", "0 < x <= 1000")
    initial_bias: Literal["frequencies", "zeros"] = field("frequencies", "Initial bias of the "
        "logits. frequencies: the logarithm of each token's frequency in the training text.")
    recurrence: Literal["auto", "scan", "xla", "c"] = field("auto",
        "Implementation of the recurrence (docs/models.md).", resume=True)
    dtype: Dtype = field("float32", "Dtype of matmuls. auto: the faster one (docs/models.md).",
        resume=True)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer, and its learning rate."""

    name: OptimizerName = field("adam", "adam: AdamW. muon: Muon for the matrices of recurrent "
        "layers with AdamW for the rest.", also="adamw optimizer")
    b1: float = field(0.9, "Decay of the gradients' mean in Adam.", _SHARE, resume=True,
        also="beta1")
    b2: float = field(0.999, "Decay of the gradients' mean square in Adam.", _SHARE, resume=True,
        also="beta2")
    epsilon: float = field(1e-8, "Added to the root mean square in Adam.", "1e-30 <= x <= 1",
        resume=True, also="eps")
    momentum: float = field(0.9, "Momentum of SGD and Muon.", _SHARE, resume=True)
    learning_rate: float = field(1e-4, "Peak of the schedule.", "0 < x <= 1e38",
        resume=True, also="lr")
    warmup_steps: int = field(0, "Steps of a linear rise to the peak.", _COUNT, resume=True)
    schedule: Schedule = field("constant", "Learning rate after warm-up. cosine, linear: decay to "
        "zero at the end of training.", resume=True)
    weight_decay: float = field(0.0, "Decay of kernels and embeddings.", "0 <= x <= 1e38",
        resume=True)
    max_gradient_norm: float = field(0.0, "Clip gradients to this global norm. 0: no clipping.",
        _AMOUNT, resume=True, also="clip grad_clip")
    microbatches: int = field(1, "Parts of a batch, computed one after the other to save memory "
        "(gradient accumulation).", _SIZE, resume=True,
        requires="batches.batch_size % optimizer.microbatches == 0")


@dataclasses.dataclass(frozen=True)
class RegularizationConfig:
    """Dropout of parts of the model, and terms of the loss, in training only."""

    embedding_dropout: float = field(0.0, "Dropout of whole rows of the embedding table.", _SHARE,
        resume=True)
    input_dropout: float = field(0.0, "Dropout of the first layer's inputs.", _SHARE, resume=True)
    hidden_dropout: float = field(0.0, "Dropout between layers.", _SHARE, resume=True)
    output_dropout: float = field(0.0, "Dropout of the last layer's outputs.", _SHARE, resume=True)
    recurrent_dropout: float = field(0.0, "DropConnect of recurrent kernels.", _SHARE, resume=True)
    activation: float = field(0.0, "Weight in the loss of the mean square of the last layer's "
        "outputs.", _AMOUNT, resume=True)
    temporal_activation: float = field(0.0, "Weight in the loss of the mean square of their "
        "differences from step to step.", _AMOUNT, resume=True)


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """Teachers, whose probabilities the model learns beside the text (Hinton et al. 2015)."""

    teachers: str = field("", "Directories or names of trained models, separated by commas: the "
        "model also learns the mean of their probabilities.", resume=True)
    weight: float = field(0.8, "Share of the teachers in the loss.", "0 <= x <= 1", resume=True)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The devices that a batch is divided over."""

    data: int = field(0, "The number of devices. 0: as many GPUs or TPUs as divide the batch; on "
        "a CPU, the fastest number of cores.", _SIZE_OR_ZERO, resume=True)


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """The text that is generated after each validation."""

    length: int = field(300, "Tokens of each sample.", "1 <= x <= 10**6", resume=True)
    temperature: float = field(0.8, "Temperature of each sample. 0: greedy.",
        "x == 0 or 1e-6 <= x <= 1000", resume=True)


@dataclasses.dataclass(frozen=True)
class Config:
    """A complete, checked config: the fields of the run, and the sections."""

    seed: int = field(0, "Seed of initial parameters, batches and samples.", "0 <= x < 2**32")
    init_from: str = field("", "The model whose parameters this run starts from: directory of a "
        "run, folder of a model, or name of one in the package.", is_flag=False)
    minutes: float = field(0.0, "Minutes of the whole run, for which it chooses the open fields.",
        "0 <= x <= 1e6", is_flag=False)
    open: tuple[str, ...] = field((), "Fields that `budget` chooses.", is_flag=False)
    num_epochs: int = field(20, "Passes over the training text.", "1 <= x <= 10**6", resume=True)
    max_steps: int = field(0, "Training ends after this number of steps, if num_epochs has more. "
        "0: no limit.", _COUNT, resume=True)
    validate_every_steps: int = field(0, "Validate at the multiples of this number of steps. 0: at "
        "the end of each epoch.", _COUNT, resume=True)
    patience: int = field(0, "Training ends when the validation loss has not improved for this "
        "number of validations. 0: no such limit.", _COUNT, resume=True)
    log_every_steps: int = field(10, "Steps between training losses.", _POSITIVE_COUNT, resume=True)
    checkpoint_every_seconds: float = field(300.0, "Seconds between checkpoints. 0: as "
        "often as possible.", _AMOUNT, resume=True)
    data: DataConfig = DataConfig()
    batches: BatchesConfig = BatchesConfig()
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    regularization: RegularizationConfig = RegularizationConfig()
    distill: DistillConfig = DistillConfig()
    mesh: MeshConfig = MeshConfig()
    sample: SampleConfig = SampleConfig()
    # fmt: on

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as nested dicts, as in config.json."""
        return dataclasses.asdict(self)


_SECTIONS: dict[str, Any] = {x.name: x.type for x in dataclasses.fields(Config) if not x.metadata}


def _list_fields(section: Any, prefix: str = "") -> Iterator[Field]:
    for own in dataclasses.fields(section):
        if defined := own.metadata.get("field"):
            choices = get_args(own.type) if isinstance(defined.default, str) else ()  # Literal.
            name, allowed = f"{prefix}{own.name}", defined.allowed or choices or ""
            yield defined._replace(name=name, allowed=allowed)
        else:
            yield from _list_fields(own.type, f"{own.name}.")


FIELDS = {field.name: field for field in _list_fields(Config)}
# The fields that may change when a run resumes.
CHANGEABLE = tuple(field.name for field in FIELDS.values() if field.resume)
# A field whose value is a dict with any names; each can be set like a field.
OPTIONS = "model.options"


def default() -> ConfigDict:
    """Return the default config, of one layer of 1,024 units trained on Tiny Shakespeare."""
    return ConfigDict(Config().to_dict())


def load(name: str) -> Any:
    """Return the config of an experiment, which can be changed, and passed to `lstm_jax.train`.

    `name` is that of `--config`: FILE, for what `get_config()` of this file returns, or FILE:WORD,
    for `get_config(WORD)`. `lstm_jax.config.load("experiments/quick.py")` works in any directory.
    Raise `UserError` if there is no such file, or its code fails.
    """
    name, word = split_name(name)
    file = find_experiment(name)
    if not Path(file).is_file():
        raise UserError(f"there is no config file {file}")
    with run_user_code("config file", file):
        get_config = runpy.run_path(file)["get_config"]
        return get_config() if word is None else get_config(word)


def split_name(name: str) -> tuple[str, str | None]:
    """Return FILE and WORD of FILE:WORD, as in experiments/cells.py:gru, or FILE and None."""
    file, colon, word = name.partition(".py:")
    return (f"{file}.py", word) if colon else (name, None)


def find_experiment(name: str) -> str:
    """Return the path of an experiment of the package; any other name with ~ expanded.

    A file here comes first. An installed package has experiments/ within it, and an editable one
    beside it.
    """
    package = Path(__file__).parent
    path = (package if (package / "experiments").is_dir() else package.parent) / name
    is_packaged = name.startswith("experiments/") and path.is_file() and not Path(name).exists()
    return str(path) if is_packaged else os.path.expanduser(name)


def complete_config(fields: object, changes: Mapping[str, object] = MappingProxyType({})) -> Config:
    """Return a checked config: defaults, `fields`, and then `changes`, by dotted names.

    Args:
      fields: a ConfigDict or nested dict, or a `Config`.
      changes: the values of single fields, such as those of flags.

    Raises:
      UserError: for an unknown field, a value of the wrong type, or one that is not allowed.
    """
    if isinstance(fields, Config | ConfigDict):
        fields = fields.to_dict()
    if not isinstance(fields, dict):
        raise UserError(f"the config is a {type(fields).__name__}, not a ConfigDict")
    values = {name: field.default for name, field in FIELDS.items()}
    for name, value in [*flatten(fields), *flatten(changes)]:
        if name.startswith(f"{OPTIONS}."):
            values[OPTIONS] = values[OPTIONS] | {name.removeprefix(f"{OPTIONS}."): value}
        elif name in FIELDS:
            values[name] = value
        else:
            similar = find_fields(name) or difflib.get_close_matches(name, FIELDS, n=1)
            hint = (
                f"did you mean {' or '.join(similar)}?" if similar else "docs/config.md lists all"
            )
            raise UserError(f"there is no field {name}: {hint}")
    if values["minutes"]:  # None leaves a field open, for `budget.py`.
        still_open = {*values["open"]} - {*dict(flatten(changes))}
        still_open |= {name for name, value in values.items() if value is None}
        values |= {name: FIELDS[name].default for name in still_open}
        values["open"] = tuple(sorted(still_open))
    sections: dict[str, dict[str, Any]] = {name: {} for name in ("", *_SECTIONS)}
    for name, value in values.items():
        section, _, last = name.rpartition(".")
        sections[section][last] = check_value(name, value)
    own = sections.pop("")
    config = Config(**own, **{name: _SECTIONS[name](**x) for name, x in sections.items()})
    for name, field in FIELDS.items():
        if not _is_met(field.requires, vars(config)):
            raise UserError(f"config.{name} is {values[name]!r}: it needs {field.requires}")
    return config


def list_changes(old_config: Config, config: Config) -> list[tuple[str, object, object]]:
    """Return name, value before and value now of each changed field; a cell's file may move."""
    old, new = (
        dict(flatten(one)) | {"model.cell": one.model.cell.rpartition(":")[2]}
        for one in (old_config, config)
    )
    return [(field, old[field], value) for field, value in new.items() if value != old[field]]


def _is_met(condition: str, names: Mapping[str, object]) -> bool:
    """Return whether a condition of `Field` holds for these names; the empty one does."""
    return bool(eval(condition or "True", globals(), {**names}))


def check_value(name: str, value: Any) -> Any:
    """Return a value in the type of its field; raise `UserError` if the field can't have it."""
    field = FIELDS[name]
    kind, allowed = type(field.default), field.allowed
    if kind is tuple and isinstance(value, list):
        value = tuple(value)
    if isinstance(allowed, str):
        return check_number(f"config.{name}", value, kind, allowed)
    if value in allowed or (_OWN_CELL in allowed and cells.names_file(str(value))):
        return value
    raise UserError(f"config.{name} is {value!r:.99}: it must be {_list_allowed(allowed)}")


def check_number(name: str, value: Any, kind: type, condition: str) -> Any:
    """Return a value in a type, such as int, if it meets a condition on x.

    If it does not, raise `UserError` with the name of the field, flag or argument.
    """
    check_type(name, value, kind)
    value = getattr(value, "item", lambda: value)()  # Of a number of NumPy.
    if kind in (int, float) and abs(value) < 2**1000:
        value = kind(value)
    with contextlib.suppress(TypeError):  # Elements of a tuple may have any type.
        if _is_met(condition, {"x": value}):
            return value
    rule = re.sub(r"\bx\b", name.rpartition(".")[2], condition)
    raise UserError(f"{name} is {value!r:.99}: it needs {rule}")


def _list_allowed(words: tuple[str, ...]) -> str:
    return f"one of {', '.join(word or 'empty' for word in words)}"


def find_fields(name: str) -> list[str]:
    """Return the fields that people mean by a name, of any section: by names, else by words."""
    word = name.rpartition(".")[2]
    flags = [(x.name, x.name.rpartition(".")[2], x.also) for x in FIELDS.values() if x.is_flag]
    matches = [field for field, last, also in flags if word in (last, *also.split())]
    return matches[:1] or [field for field, last, _ in flags if word in last.split("_")]


def flatten(config: Config | Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """Yield every field of a config, or of nested dicts, as (dotted name, value)."""
    fields = config.to_dict() if isinstance(config, Config) else config
    for name, value in fields.items():
        if isinstance(value, dict) and name in _SECTIONS:
            yield from ((f"{name}.{inner}", x) for inner, x in value.items())
        else:
            yield str(name), value


def explain(field: Field) -> str:
    """Return the meaning of a field, its choices if it has any, and its condition."""
    allowed = field.allowed
    choices = f" Allowed: {_list_allowed(allowed)}." if isinstance(allowed, tuple) else ""
    return field.meaning + choices + (f" Needs `{field.requires}`." if field.requires else "")


if __name__ == "__main__":
    print(
        "# Config fields\n\nGenerated from config.py. Numbers are written as in Python: 1_000 is "
        "1000. A run may change the fields marked\n[resume] when it resumes."
    )
    flags = [field for field in FIELDS.values() if field.is_flag]
    for section, fields in itertools.groupby(flags, lambda field: field.name.rpartition(".")[0]):
        print(f"\n## {section or 'run'}\n")
        for one in fields:
            mark = " [resume]" * one.resume
            print(f"- `--config.{one.name}={one.default!r}`{mark}: {explain(one)}")
