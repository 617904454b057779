"""Classify which of two characters of a play speaks, from the hidden states of a language model.

    python examples/classify.py tiny-shakespeare play.txt PETRUCHIO KATHARINA

In the text, an empty line ends each speech. Its first line is the name, which the classifier does
not see. The features are the mean hidden states of a speech, and a logistic regression classifies
them: each fifth of the speeches with weights that were fitted to the others. For an honest
accuracy, use a text that the language model was not trained on.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lstm_jax
from lstm_jax.run import command


def read_speeches(text: str, names: tuple[str, str]) -> tuple[list[str], np.ndarray]:
    """Return the speeches of two characters, and who speaks each: 0 or 1."""
    parts = [speech.partition(":\n") for speech in text.split("\n\n")]
    spoken = [(words, names.index(name)) for name, _, words in parts if name in names and words]
    if not spoken:
        raise SystemExit(f"there is no speech of {' or '.join(names)}")
    speeches, labels = zip(*spoken, strict=True)
    return list(speeches), np.array(labels)


def compute_features(run: lstm_jax.Run, speeches: list[str]) -> np.ndarray:
    """Return the mean of the hidden states of all layers in each speech, [speeches, features]."""
    states = (np.concatenate(run.hidden_states(speech), axis=1) for speech in speeches)
    return np.stack([of_speech.mean(axis=0) for of_speech in states])


@jax.jit
def fit(features: jax.Array, labels: jax.Array) -> jax.Array:
    """Fit a logistic regression; return its weights and, last, its bias: [features + 1]."""
    optimizer = optax.adam(0.01)

    def loss_fn(weights: jax.Array) -> jax.Array:
        losses = optax.sigmoid_binary_cross_entropy(predict(weights, features), labels)
        return losses.mean() + 0.01 * (weights[:-1] ** 2).sum()

    def step(state: tuple, _: None) -> tuple:
        weights, opt_state = state
        updates, opt_state = optimizer.update(jax.grad(loss_fn)(weights), opt_state)
        return (optax.apply_updates(weights, updates), opt_state), None

    start = jnp.zeros(features.shape[1] + 1)
    return jax.lax.scan(step, (start, optimizer.init(start)), length=500)[0][0]


def predict(weights: jax.Array, features: jax.Array) -> jax.Array:
    """Return the logits of label 1, [speeches]."""
    return features @ weights[:-1] + weights[-1]


def cross_validate(features: np.ndarray, labels: np.ndarray, folds: int = 5) -> float:
    """Return the accuracy on speeches that the classifier was not trained on."""
    correct = 0
    for held_out in np.array_split(np.arange(len(labels)), folds):
        known = np.delete(features, held_out, axis=0)
        scaled = (features - known.mean(axis=0)) / (known.std(axis=0) + 1e-6)
        weights = fit(np.delete(scaled, held_out, axis=0), np.delete(labels, held_out))
        logits = predict(weights, jnp.asarray(scaled[held_out]))
        correct += int(((logits > 0) == labels[held_out]).sum())
    return correct / len(labels)


def main() -> None:
    """Print the accuracy of the classifier."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", help="a model that lstm_jax.load reads")
    parser.add_argument("file", type=Path)
    parser.add_argument("names", nargs=2)
    arguments = parser.parse_args()
    text = arguments.file.read_text(encoding="utf-8-sig")
    speeches, labels = read_speeches(text, tuple(arguments.names))
    accuracy = cross_validate(compute_features(lstm_jax.load(arguments.model), speeches), labels)
    majority = max(labels.mean(), 1 - labels.mean())
    print(f"{len(labels)} speeches: accuracy {accuracy:.3f}; the majority class {majority:.3f}")


if __name__ == "__main__":
    command.call_main(main)
