"""Convert weights from and to Keras and PyTorch, and to ONNX: `python -m lstm_jax.convert`."""
