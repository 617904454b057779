"""LSTM language models in JAX and Flax: train on a text, measure, and generate."""

__version__ = "0.1.0"
