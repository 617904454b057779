"""Names and limits of a sweep, which `--help` prints without importing JAX or Optuna."""

# Optuna's CMA-ES is not supported: it unpickles its state from the study, which can run any code.
SAMPLERS = ("tpe", "random", "grid")
PRUNERS = ("hyperband", "none")
DATABASE = "study.db"  # In the directory of a sweep: the study, unless --study names another.
FUNCTION = "get_overrides"  # The function of a space file.
LARGEST = 16  # The largest default size of a population of seeds.
