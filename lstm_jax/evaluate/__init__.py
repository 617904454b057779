"""Measure a trained model on a text: `python -m lstm_jax.evaluate`."""
