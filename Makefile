# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: install demo test test-slow test-cluster lint
install: $(VENV)/.installed
# constraints.txt pins what was tested together; on a machine with CUDA the same line takes torch's CUDA build.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Millrace needs Python 3.11 or newer; set PYTHON=/path/to/python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test,dev]'
	touch $@

demo: install
	$(BIN)/python -m tools.demo

test: install
	$(BIN)/python -m pytest -q -rs --durations=30 -m "not slow and not cluster" tests

# The longest: runs that are killed again and again, studies, intervals held against hundreds of fits.
test-slow: install
	$(BIN)/python -m pytest -q -rs --durations=30 -m "slow and not cluster" tests

# On a SLURM cluster of network namespaces that the tests start: as root, with Debian's packages.
test-cluster: install
	$(BIN)/python -m pytest -q -rs -m cluster tests

lint: install
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
