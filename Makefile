# `make train` and `make test` need nothing but Python 3.11 or newer and a reachable package index.
PYTHON ?= python3
CONFIG ?= experiments/quick.py
VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest --numprocesses=2 --dist=worksteal

.PHONY: env train check test thorough lint clean

env: $(VENV)/installed

train: env
	$(BIN)/python -m lstm_jax.main --config $(CONFIG)

check: lint
	$(PYTEST) -m "not process and not slow"

test: $(VENV)/installed-dev
	$(PYTEST)

thorough: $(VENV)/installed-dev
	LSTM_JAX_DRAWS=25 $(PYTEST) -m drawn

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) build dist *.egg-info

$(VENV)/installed: pyproject.toml lstm_jax/recurrences/lstm.c
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "lstm-jax needs Python 3.11 or newer; name one with: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	$(BIN)/python -m lstm_jax.recurrences.native || echo "lstm-jax works without this library." >&2
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@
