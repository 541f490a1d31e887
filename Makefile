# Two commands do all set-up: `make demo` and `make test`. PYTHON chooses the interpreter (3.11 or 3.12).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-full lint bench clean

$(VENV)/installed: pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) must be Python 3.11 or newer: make PYTHON=python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "python3 -m venv failed; on Debian: apt install python3-venv"; exit 1; }
	$(BIN)/pip install --quiet --editable '.[train,test]'
	@touch $@

demo: $(VENV)/installed
	$(BIN)/dllm-kernels demo $(ARGS)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadgroup -m 'not slow'

test-full: lint
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadgroup

bench: $(VENV)/installed
	$(BIN)/python benchmarks/run.py $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info dllm_kernels/*.so
