"""Keep a run safe: its files, checkpoints, lock, metrics and signals; load it, and run commands."""
