# Two commands: `make demo` runs the whole journey on the embedded model, `make test` passes the tests. Each sets up what it needs.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test clean

.venv/ready: pyproject.toml src/intervale/__init__.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "intervale needs Python 3.11 or newer; name one: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

demo: .venv/ready
	$(BIN)/intervale quickstart

test: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest

clean:
	rm -rf .venv
