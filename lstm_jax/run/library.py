"""Load a trained model and use it from Python: generate, score, look inside."""

import dataclasses
import functools
import itertools
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict, Unpack, cast

import jax
import numpy as np

from lstm_jax import generation
from lstm_jax import loss as loss_lib
from lstm_jax import model as model_lib
from lstm_jax.config import DTYPES, Config, Dtype
from lstm_jax.ensemble import Ensemble
from lstm_jax.errors import UserError
from lstm_jax.run import cell_file, workdir
from lstm_jax.vocabulary import Vocabulary

if TYPE_CHECKING:
    from lstm_jax.run.metrics import Row


class GenerateOptions(TypedDict, total=False):
    """The options of `Run.generate` and `Run.stream`, of which the last are the controls."""

    length: int
    seed: int
    stop_token: bool
    temperature: float
    top_k: int
    top_p: float
    min_p: float


class Scores(NamedTuple):
    """The log-probabilities of the tokens of a text."""

    tokens: list[str]  # Those that were predicted.
    log_probs: np.ndarray  # Natural logarithms, float32 [tokens].


@dataclasses.dataclass(eq=False, repr=False)
class Run:
    """A trained model, or an ensemble of several, whose config and step are those of the first.

    Texts that contain tokens that the model does not know are read with [UNK] in their place; all
    methods but `score` and `hidden_states` warn.
    """

    config: Config
    vocabulary: Vocabulary
    model: Any  # A `LanguageModel` or an `Ensemble`.
    params: Any  # Of the checkpoint with the best validation loss, to read only.
    step: int  # The training step of this checkpoint.
    directory: Path | None = None  # None for an ensemble.
    members: Sequence["Run"] = ()  # The models of an ensemble; of one model, only itself.

    def __post_init__(self) -> None:
        self.members = self.members or [self]

    @functools.cached_property
    def _arrays(self) -> Any:
        return generation.prepare_params(self.model, self.params)

    @property
    def metrics(self) -> list["Row"]:
        """Return the rows of metrics.jsonl; [] if a model has no run, or is an ensemble."""
        from lstm_jax.run import metrics  # It imports TensorBoard's events.

        return metrics.read_metrics(self.directory / workdir.METRICS) if self.directory else []

    def __repr__(self) -> str:
        members = getattr(self.model, "members", [self.model])
        models = ", ".join(f"{m.cell_name} {m.num_layers}x{m.hidden_size}" for m in members)
        count = sum(array.size for array in jax.tree.leaves(self.params))
        return (
            f"<lstm_jax.Run: {models}; {count:,} parameters; {len(self.vocabulary)} "
            f"{self.vocabulary.token_name}s; step {self.step:,}>"
        )

    def generate(self, prompt: str = "", **options: Unpack[GenerateOptions]) -> str:
        """Return the prompt and its continuation; see `stream`, which takes the same options."""
        self._warn_of_unknown(prompt)
        return prompt + "".join(self._stream(prompt, None, options))

    def stream(
        self, prompt: str = "", *, piece_length: int = 16, **options: Unpack[GenerateOptions]
    ) -> Iterator[str]:
        """Continue a prompt, and yield the generated text piece by piece.

        No piece is empty, and none but the last ends within a character.

        Args:
          prompt: the text to continue.
          piece_length: the number of tokens of a piece, at most 1,024.
          **options: the following, all optional.
            length: the maximum number of tokens, by default 500.
            seed: the random seed, by default 0; the same seed generates the same text.
            stop_token: whether the stop token of a model of documents ends the text (by default).
            temperature: divides the logits, by default 0.8; 0 is greedy decoding.
            The others are fields of `Controls`.

        Raises:
          UserError: if a value is not allowed.
        """
        self._warn_of_unknown(prompt)
        generation.check_number("piece_length", piece_length)
        return self._stream(prompt, piece_length, options)

    def _stream(self, prompt: str, piece_length: int | None, options: Any) -> Iterator[str]:
        """Check the options, and return the pieces."""
        values = {"length": 500, "seed": 0, "stop_token": True, "temperature": 0.8, **options}
        numbers = ((name, values.pop(name)) for name in ("length", "seed"))
        length, seed = itertools.starmap(generation.check_number, numbers)
        stop_token, controls = values.pop("stop_token"), generation.Controls(**values)
        generation.make_control_arrays(controls)
        pieces = generation.stream_texts(
            self.model,
            self.params,
            self.vocabulary,
            jax.random.key(seed),
            prompt=prompt,
            length=length,
            controls=controls,
            stop_token=stop_token,
            piece_length=piece_length,
        )
        return (piece for (piece,) in pieces if piece)

    def read(self, ids: np.ndarray, state: generation.State | None = None) -> generation.State:
        """Read token ids of one or several texts, int32 [batch, time], from the start or a state.

        Return the state after them. Its `logits`, float32 [batch, vocabulary], predict the next
        token of each text; before the first token they are zeros. The results depend on the number
        of texts by rounding only, and not on how a text is divided between calls.
        """
        if ids.ndim != 2 or (ids.size and not 0 <= ids.min() <= ids.max() < len(self.vocabulary)):
            raise UserError(f"ids must be [batch, time], from 0 to {len(self.vocabulary) - 1}")
        if state is None:
            state = generation.initial_state(self.model, self._arrays, len(ids))
        return generation.read_tokens(self.model, self._arrays, state, ids)

    def score(self, text: str, prompt: str = "") -> Scores:
        """Compute the log-probability of each token of a text, given all before it.

        That is the prompt and the text itself; without a prompt, the first token is not predicted.
        """
        tokens = [*self.vocabulary.split(prompt), *self.vocabulary.split(text)]
        prompt_ids, ids = map(self.vocabulary.encode, (prompt, text))
        first = max(len(prompt_ids), 1)
        losses = loss_lib.compute_token_losses(self.model, self.params, np.append(prompt_ids, ids))
        return Scores(tokens[first:], -losses[first - 1 :])

    def hidden_states(self, text: str) -> list[np.ndarray]:
        """Return the hidden states after each token, for each layer float32 [tokens, hidden].

        Raise `UserError` if this is an ensemble.
        """
        if isinstance(self.model, Ensemble):
            raise UserError("an ensemble has no hidden states of its own: load one of its models")
        ids = self.vocabulary.encode(text)
        padding = loss_lib.round_length(len(ids)) - len(ids)
        hidden = _compute_hidden(self.model, self.params, np.pad(ids, (0, padding)))
        return [np.asarray(layer)[: len(ids)] for layer in hidden]

    def next(self, text: str, n: int = 10) -> list[tuple[str, float]]:
        """Return the n most probable tokens after a text, with their probabilities."""
        generation.check_number("n", n)
        self._warn_of_unknown(text)
        state = self.read(generation.encode_prompt(self.vocabulary, text)[None])
        probabilities = np.asarray(jax.nn.softmax(state.logits[0]))
        best = np.argsort(-probabilities, kind="stable")[:n]
        return [(self.vocabulary.tokens[i], float(probabilities[i])) for i in best]

    def _warn_of_unknown(self, text: str) -> None:
        """Warn of tokens that the model does not know, on the line that called a public method."""
        if named := self.vocabulary.name_unknown(text):
            message = f"the model does not know {named} and reads [UNK] instead"
            warnings.warn(message, stacklevel=3)


def load(
    directory: Path | str | Sequence[Path | str],
    dtype: str | None = None,
    cell: str | Sequence[str] = (),
) -> Run:
    """Load a trained model, or an ensemble.

    Args:
      directory: a working directory, the folder of a model, or the name of one in the package; or
        several, whose models are an ensemble: it averages their probabilities at every step.
      dtype: that of the matmuls, "float32" or "bfloat16", or with "auto" the one in which this
        machine trains faster; by default that of the config.
      cell: FILE.py:CLASS of the run's cell, if it has your own, or several. The file is code, and
        runs.

    Raises:
      UserError: if there is no model, or a file is damaged, or the models of an ensemble were
        trained on different texts.
    """
    if dtype not in (known := (None, *DTYPES)):
        raise UserError(f"dtype is {dtype!r}: it must be one of {', '.join(known[1:])}")
    for name in [cell] if isinstance(cell, str) else cell:
        cell_file.load_cell(name)
    paths = [directory] if isinstance(directory, str | os.PathLike) else directory
    if not paths:
        raise UserError("no model is given: name the directory of one")
    with jax.enable_x64(False):  # Parameters are float32.
        first, *others = members = [_load_one(path, dtype) for path in paths]
    for path, other in zip(paths[1:], others, strict=True):
        ours, theirs = ((r.vocabulary.to_fields(), r.config.data.sha256) for r in (first, other))
        if ours != theirs:
            raise UserError(
                f"{paths[0]} and {path} have different texts, splits or vocabularies: the models "
                "of an ensemble must be trained on one text, with one vocabulary"
            )
    if not others:
        return first
    models, params = zip(*((member.model, member.params) for member in members), strict=True)
    return Run(first.config, first.vocabulary, Ensemble(models), params, first.step, None, members)


def _load_one(directory: Path | str, dtype: str | None) -> Run:
    """Load the best checkpoint of a run by validation loss, else its latest, or a folder."""
    directory = workdir.find_model(directory)
    config, vocabulary = workdir.load_config(directory), workdir.load_vocabulary(directory)
    fields = cell_file.use_loaded_cell(config.model, directory)
    dtype = cast(Dtype, dtype or fields.dtype)
    # The run may have used another kind of device.
    fields = dataclasses.replace(fields, recurrence="auto", dtype=dtype)
    config = dataclasses.replace(config, model=fields)
    model = model_lib.make_model(config.model, len(vocabulary), vocabulary.stop_id)
    model_lib.check_model(model)
    params, step = workdir.load_params(directory, model_lib.get_param_shapes(model))
    return Run(config, vocabulary, model, params, step, directory)


@jax.jit(static_argnames="model")
def _compute_hidden(
    model: model_lib.LanguageModel, params: model_lib.Params, ids: jax.Array
) -> list[jax.Array]:
    """Return the hidden states of each layer after each of ids [time]: [time, hidden]."""
    bound = model.bind({"params": params})

    def step(carry: model_lib.Carry, token: jax.Array) -> tuple[model_lib.Carry, list[jax.Array]]:
        _, carry, records = bound.run_step(token[None], carry)
        return carry, [outputs[0] for _, outputs in records]

    return jax.lax.scan(step, model.initial_carry(1), ids)[1]
