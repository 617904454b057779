"""Make a web page about a trained model: `python -m lstm_jax.export`."""
