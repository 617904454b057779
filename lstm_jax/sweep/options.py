"""Names and limits of a sweep, which `--help` prints without importing JAX or Optuna."""

from lstm_jax import config

# Optuna's CMA-ES is not supported: it unpickles its state from the study, which can run any code.
SAMPLERS = ("tpe", "random", "grid")
PRUNERS = ("hyperband", "none")
DATABASE = "study.db"  # In the directory of a sweep: the study, unless --study names another.
FUNCTION = "get_overrides"  # The function of a space file.
LARGEST = 16  # The largest default size of a population of seeds.

# Fields that the compiled step of a population reads as arrays: all of these sections, but some.
_SECTIONS = ("optimizer.", "regularization.")
_FIXED = ("optimizer.name", "optimizer.step_at", "optimizer.microbatches")
TRACED_BY_STEP = tuple(
    field.name
    for field in config.FIELDS
    if field.name.startswith(_SECTIONS) and field.name not in _FIXED
)
# Fields in which members may differ: these, and those of initial parameters and batches.
TRACEABLE = ("seed", "model.initial_embedding", "model.initial_scale", *TRACED_BY_STEP)
