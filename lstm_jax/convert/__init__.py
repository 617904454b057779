"""Convert weights from and to Keras and PyTorch: `python -m lstm_jax.convert`."""
