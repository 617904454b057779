"""Load a trained model and use it from Python: generate, score, look inside."""

import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, Unpack

import jax
import numpy as np

from lstm_jax import cells, generation
from lstm_jax import loss as loss_lib
from lstm_jax import model as model_lib
from lstm_jax.config import Config, complete_config
from lstm_jax.ensemble import Ensemble
from lstm_jax.errors import UserError, warn
from lstm_jax.run import workdir
from lstm_jax.vocabulary import Vocabulary


class GenerateOptions(TypedDict, total=False):
    """The options of `Run.generate`: those of `Run.stream`, where they are explained."""

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
    """A trained model, or an ensemble of several, whose config is that of the first.

    Texts that contain tokens that the model does not know are read with [UNK] in their place;
    `generate`, `stream` and `next` warn.
    """

    config: Config
    vocabulary: Vocabulary
    model: Any  # A `LanguageModel` or an `Ensemble`.
    params: Any  # Of the checkpoint with the best validation loss, to read only.
    step: Any  # The training step of this checkpoint; of an ensemble, a list of its models' steps.
    directory: Path | None = None  # None for an ensemble, and in training.

    @functools.cached_property
    def _prepared(self) -> Any:
        return generation.prepare_params(self.model, self.params)

    @property
    def metrics(self) -> list[workdir.Row]:
        """Return the rows of metrics.jsonl; [] if a model has no run, or is an ensemble."""
        return workdir.read_metrics(self.directory) if self.directory else []

    def __repr__(self) -> str:
        members = getattr(self.model, "members", [self.model])
        models = ", ".join(f"{m.cell_name} {m.num_layers}x{m.hidden_size}" for m in members)
        count = sum(array.size for array in jax.tree.leaves(self.params))
        return (
            f"<lstm_jax.Run: {models}; {count:,} parameters; {len(self.vocabulary)} "
            f"{self.vocabulary.token_name}s; step {self.step}>"
        )

    def generate(self, prompt: str = "", **options: Unpack[GenerateOptions]) -> str:
        """Return the prompt and its continuation; see `stream`, which takes the same options."""
        return prompt + "".join(self.stream(prompt, **options))

    def stream(
        self,
        prompt: str = "",
        *,
        length: int = 500,
        seed: int = 0,
        stop_token: bool = True,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
    ) -> Iterator[str]:
        """Continue a prompt, and yield the generated text in pieces of more and more tokens.

        No piece is empty, and none but the last ends within a character.

        Args:
          prompt: the text to continue.
          length: the maximum number of tokens.
          seed: the random seed; the same seed generates the same text.
          stop_token: whether the stop token of a model of documents ends the text.
          temperature: divides the logits; 0 is greedy decoding.
          top_k: see `Controls`.
          top_p: see `Controls`.
          min_p: see `Controls`.

        Raises:
          UserError: if a value is not allowed.
        """
        self.warn_of_unknown(prompt)
        controls = generation.Controls(temperature, top_k, top_p, min_p)
        generation.make_control_arrays(controls)  # At once, not with the first piece.
        pieces = generation.stream_texts(
            self.model,
            self.params,
            self.vocabulary,
            jax.random.key(generation.check_number("seed", seed)),
            prompt=prompt,
            length=generation.check_number("length", length),
            controls=controls,
            stop_token=stop_token,
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
            state = generation.initial_state(self.model, self._prepared, len(ids))
        return generation.read_tokens(self.model, self._prepared, state, ids)

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
        """Return the outputs of each layer after each token, a list of float32 [tokens, hidden].

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
        self.warn_of_unknown(text)
        state = self.read(generation.encode_prompt(self.vocabulary, text)[None])
        probabilities = np.asarray(jax.nn.softmax(state.logits[0]))
        best = np.argsort(-probabilities, kind="stable")[:n]
        return [(self.vocabulary.tokens[i], float(probabilities[i])) for i in best]

    def warn_of_unknown(self, text: str) -> None:
        """Warn of the tokens of a text that are not in the vocabulary."""
        if names := self.vocabulary.name_unknown(text):
            warn(f"the model does not know {names} and reads [UNK] instead")


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
    for name in [cell] if isinstance(cell, str) else cell:
        cells.load_cell(name)
    paths = [directory] if isinstance(directory, str | os.PathLike) else directory
    with jax.enable_x64(False):  # Parameters are float32.
        members = [_load_one(path, dtype) for path in paths]
    if len(members) == 1:
        return members[0]
    config, vocabulary = members[0].config, members[0].vocabulary
    for path, other in zip(paths, members, strict=True):
        texts = (config.data.sha256, other.config.data.sha256)
        if len({*texts}) > 1 or other.vocabulary.to_fields() != vocabulary.to_fields():
            raise UserError(
                f"{paths[0]} and {path} have different texts, splits or vocabularies: the models "
                "of an ensemble must be trained on one text, with one vocabulary"
            )
    ensemble = Ensemble(tuple(member.model for member in members))
    params, steps = tuple(member.params for member in members), [x.step for x in members]
    return Run(config, vocabulary, ensemble, params, steps)


def _load_one(directory: Path | str, dtype: str | None) -> Run:
    """Load the best checkpoint of a run by validation loss, else its latest, or a folder."""
    directory = workdir.find_model(directory)
    config, vocabulary = workdir.load_config(directory), workdir.load_vocabulary(directory)
    # The run may have used another kind of device, and the file of its cell may have moved.
    changes = {"recurrence": "auto", "cell": cells.find_cell(config.model.cell, directory)}
    changes["dtype"] = dtype or config.model.dtype
    config = complete_config(config, {"model": changes})
    model = model_lib.make_model(config.model, len(vocabulary), vocabulary.stop_id)
    shapes = model_lib.get_param_shapes(model)
    file, checkpoints = directory / workdir.MODEL, directory / workdir.CHECKPOINTS
    if file.exists() and not checkpoints.exists():  # A run may have other weights of this name.
        params, step = workdir.read_params(file, shapes)
    else:
        # A folder does not need Orbax, whose import takes half a second.
        from lstm_jax.run.checkpoints import restore_best_params

        params, step = restore_best_params(checkpoints, shapes)
    return Run(config, vocabulary, model, params, step, directory)


@jax.jit(static_argnames="model")
def _compute_hidden(
    model: model_lib.LanguageModel, params: model_lib.Params, ids: jax.Array
) -> list[jax.Array]:
    """Return the outputs of each layer after each of ids [time]: [time, hidden]."""
    bound = model.bind({"params": params})

    def step(carry: model_lib.Carry, token: jax.Array) -> tuple[model_lib.Carry, list[jax.Array]]:
        _, carry, records = bound.run_step(token[None], carry)
        return carry, [outputs[0] for _, outputs in records]

    return jax.lax.scan(step, model.initial_carry(1), ids)[1]
