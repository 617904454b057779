"""LSTM language models in JAX and Flax: train on a text, measure, and let it write."""

__version__ = "0.1.0"
