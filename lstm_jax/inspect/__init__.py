"""Show what a trained model has learned: `python -m lstm_jax.inspect`."""
