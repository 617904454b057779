"""LSTM language models in JAX and Flax: train on a text, measure, and let it write."""
