"""Generate text with a trained model: `python -m lstm_jax.sample`."""
