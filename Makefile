# Two commands do all set-up: `make demo` and `make test`. `make help` lists the others.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
export PIP_CONSTRAINT := $(abspath $(CONSTRAINTS))
comma := ,
# reasoning-gym depends on pycosat, which has no wheels: without a C compiler its tests are skipped, as those of the C++ engine are
HAS_CC := $(shell command -v cc || command -v gcc || command -v clang)
EXTRAS_OF_TESTS := train,test$(if $(HAS_CC),$(comma)gym)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test test-full lint bench mutants clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo 'Variables: PYTHON=python3.12 (3.10 to 3.13), VENV=.venv, CONSTRAINTS=constraints.txt, ARGS="..." of demo, bench and mutants'

# $(VENV)/trainer: what the demo needs; $(VENV)/installed: the tools of tests and linters beside it
$(VENV)/trainer $(VENV)/installed: pyproject.toml setup.py $(CONSTRAINTS) $(wildcard csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "$(PYTHON) must be Python 3.10 or newer: make PYTHON=python3.12"; exit 1; }
	@echo "installing into $(VENV): torch is most of it, so minutes on a slow line; the C++ engine is compiled"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "python3 -m venv failed; on Debian: apt install python3-venv"; exit 1; }
	@test -n '$(HAS_CC)' || echo "there is no C compiler: the C++ engine$(if $(filter %/installed,$@), and reasoning-gym are, is) left out"
	$(BIN)/pip install --progress-bar on --editable '.[$(if $(filter %/trainer,$@),train,$(EXTRAS_OF_TESTS))]'
	@touch $@

demo: ## supervised fine-tuning, then RL, on Sudoku; config keys in ARGS
	@echo "make demo: a diffusion language model of 0.2 million parameters learns Sudoku, by SFT, then by RL: about 5 minutes on one core"
	@$(MAKE) --no-print-directory $(if $(wildcard $(VENV)/installed),$(VENV)/installed,$(VENV)/trainer)
	$(BIN)/dllm-kernels demo $(ARGS)

lint: $(VENV)/installed ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint ## lint, then the tests but for the slow ones
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadgroup -m 'not slow'

test-full: lint ## lint, then all tests
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadgroup

bench: $(VENV)/installed ## time, memory and accuracy beside the baselines
	$(BIN)/python benchmarks/run.py $(ARGS)

mutants: $(VENV)/installed ## do the fast tests notice 600 changes of the numerics? hours; goes on where it was cut off
	$(BIN)/python benchmarks/mutants.py --count 600 --out benchmarks/results/mutants.json $(ARGS)

clean: ## remove the environment and what was built
	rm -rf $(VENV) build dist *.egg-info dllm_kernels/*.so
