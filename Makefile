# `make train` and `make test` need nothing but Python 3.11 or newer and a reachable package index.
PYTHON ?= python3
# A text of your own, and the minutes that its training may take.
TEXT :=
MINUTES ?= 10
CONFIG ?= $(if $(TEXT),experiments/minutes.py:$(MINUTES),experiments/quick.py)
OF_TEXT = $(if $(TEXT), --config.data.path=$(TEXT) --workdir runs/$(basename $(notdir $(TEXT)))_$(MINUTES))
ROWS ?= quick.py
# A checkout of github.com/karpathy/nanoGPT, for the leaderboard.
NANOGPT ?= ../nanoGPT
# A file with exact versions, such as constraints/oldest.txt; without one, the newest are installed.
CONSTRAINTS :=
VENV := .venv$(addprefix -,$(basename $(notdir $(CONSTRAINTS))))
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest --numprocesses=3 --dist=worksteal
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check \
	$(addprefix --constraint ,$(CONSTRAINTS)) --editable

.PHONY: env train results leaderboard pretrained check test thorough lint clean

env: $(VENV)/installed

train: env
	$(BIN)/python -m lstm_jax.main --config $(CONFIG)$(OF_TEXT)

# Trains rows of docs/results.md again, and compares their losses with those stated.
results: env
	$(BIN)/python benchmarks/results.py --rows "$(ROWS)"

# Compares this project, an LSTM in PyTorch and nanoGPT after equal minutes; it takes a day.
leaderboard: env
	$(INSTALL) '.[bench]'
	$(BIN)/python benchmarks/leaderboard.py --nanogpt $(NANOGPT)

# Trains the model in the package anew.
pretrained: env
	$(BIN)/python benchmarks/pretrained.py

check: lint
	$(PYTEST) -m "not process and not slow"

# The second run tests the layers as on a processor without AVX-512.
test: $(VENV)/installed-dev
	$(PYTEST)
	LSTM_JAX_CPU=avx2 $(PYTEST) tests/core/test_native.py tests/core/test_ops.py

thorough: $(VENV)/installed-dev
	LSTM_JAX_DRAWS=25 $(PYTEST)

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tests/lint_c.py

clean:
	rm -rf $(VENV) dist

$(VENV)/installed: pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "lstm-jax needs Python 3.11 or newer; name one with: make PYTHON=python3.12" >&2; exit 1; }
	@echo "Installing lstm-jax and its dependencies in $(VENV); this takes a few minutes."
	@$(PYTHON) -m venv $(VENV)
	@$(INSTALL) .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	@echo "Installing what the tests need in $(VENV)."
	@$(INSTALL) '.[dev]'
	@touch $@
