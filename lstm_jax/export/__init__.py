"""Put a trained model into a web page: `python -m lstm_jax.export`."""
