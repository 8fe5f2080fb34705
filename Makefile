# setup: a virtual environment with pinned packages     demo: learn from noisy digits and restore
# lint:  ruff and mypy      test: lint and every test, one process for each core
# docs:  the site, nothing executed; docs-full: tutorials and gallery executed
# browser-test: the app and the written pages in headless Chromium
# fuzz:  12,000 cases of bad input, what is mishandled (some ten minutes on two cores)
# wheel: build and check it; test-lowest: the tests with the lowest versions that are allowed
# test-pythons: the tests with every supported Python that is installed, in .venv-3.11 and so on
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

SPHINX := $(BIN)/python -m sphinx -W --keep-going -q -b html docs

.PHONY: setup demo lint test docs docs-full browser-test fuzz wheel test-lowest test-pythons clean

setup: $(READY)

# torch is named first and pinned, so that no other package chooses its build.
# -qq keeps errors and hides warnings.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "setup: Python 3.11 or newer is needed: make setup PYTHON=python3.11"; exit 1; }
	@echo "setup: making $(VENV) and installing the packages of constraints.txt (some minutes, once)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt torch -e ".[dev,docs,app]"
	@touch $@
	@echo "setup: done. Next: make demo, or $(BIN)/unmurk --help"

demo: setup
	@$(BIN)/unmurk demo --out demo

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

# bytecode is kept, whatever the environment says: the tests start some hundred processes
test: lint
	@env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest -n auto --maxprocesses 8 \
		--dist loadfile --no-loadscope-reorder

docs: setup
	@$(SPHINX) docs/_build/html
	@echo "docs: docs/_build/html/index.html"

docs-full: setup
	@UNMURK_DOCS_FULL=1 $(SPHINX) docs/_build/full
	@echo "docs-full: docs/_build/full/index.html"

wheel: setup
	@$(BIN)/python -m pytest -q tests/test_wheel.py
	@$(BIN)/python -m build --wheel --no-isolation --outdir dist . > /dev/null
	@ls dist/*.whl

test-lowest:
	@$(PYTHON) .ci/lowest.py

# make test-pythons ARGS='tests/test_package.py' runs a part of them
test-pythons:
	@$(PYTHON) .ci/pythons.py $(ARGS)

# Chromium is a package of the system; Playwright and axe-core are Python packages.
# make browser-test ARGS='-m "not slow"' leaves out what takes longer
browser-test: setup
	@if { command -v chromium || command -v chromium-browser || command -v google-chrome; } > /dev/null; \
	then { $(BIN)/python -c "import axe_playwright_python, playwright" 2> /dev/null || \
		$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[browser]"; } && \
		$(BIN)/python -m pytest -q -n auto --maxprocesses 2 --dist loadfile \
			$(ARGS) tests/browser/app.py tests/browser/pages.py tests/browser/strangers.py; \
	else echo "browser-test: skipped: there is no Chromium (Debian: apt install chromium)"; fi

fuzz: setup
	@$(BIN)/python -m tests.fuzz

clean:
	rm -rf $(VENV) .venv-lowest .venv-3.* build dist demo docs/_build docs/gallery docs/api/generated docs/tutorials/runs examples/gallery/runs .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
