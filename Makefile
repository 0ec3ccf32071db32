# `make demo` and `make test` set up everything that they need in .venv.
# The quick look while working: .venv/bin/python -m pytest -m "not slow"
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || echo python3)
VENV   := .venv
BIN    := $(VENV)/bin
# two files of tests at a time, each with one thread a process
WORKERS := --numprocesses 2 --dist loadfile --no-loadscope-reorder

# Transformer Engine's own Python, for tests/te: beside the environment, because every import of it fails without its
# compiled parts, which are other wheels
TE     := .te

.PHONY: demo test test-all lint clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, found %s; name one: make PYTHON=python3.12 …" % sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

$(TE)/.installed: $(VENV)/.installed constraints.txt
	rm -rf $(TE)
	$(BIN)/pip install --quiet --no-deps --constraint constraints.txt --target $(TE) transformer-engine
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python examples/demo.py

test: $(VENV)/.installed $(TE)/.installed
	$(BIN)/python -m pytest $(WORKERS) -m "not exhaustive"

# with the whole matrices and the repeated runs
test-all: $(VENV)/.installed $(TE)/.installed
	$(BIN)/python -m pytest $(WORKERS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(TE) runs build *.egg-info
