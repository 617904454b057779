"""Search hyperparameters, or train several seeds: `python -m lstm_jax.sweep`."""
