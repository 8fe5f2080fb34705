# setup: a virtual environment with pinned packages     demo: learn from noisy digits and restore
# lint:  ruff and mypy      test: lint and every test, one process for each core
# fuzz:  12,000 cases of bad input, what is mishandled (some ten minutes on two cores)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup demo lint test fuzz clean

setup: $(READY)

# torch is named first and pinned, so that no other package chooses its build.
# -qq keeps errors and hides warnings.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "setup: Python 3.11 or newer is needed: make setup PYTHON=python3.11"; exit 1; }
	@echo "setup: making $(VENV) and installing the packages of constraints.txt (some minutes, once)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt torch -e ".[dev]"
	@touch $@
	@echo "setup: done. Next: make demo, or $(BIN)/unmurk --help"

demo: setup
	@$(BIN)/unmurk demo --out demo

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

test: lint
	@$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

fuzz: setup
	@$(BIN)/python -m tests.fuzz

clean:
	rm -rf $(VENV) build dist demo .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
