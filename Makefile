# make book       set up .venv, train what the pages need, run all pages, build the site
# make run        set up .venv, then run the whole chain (town to report) into runs/cpu
# make notebooks  set up .venv, then write the pages as plain notebooks to book/notebooks/
# make browse     walk every page of the built book in a headless Chromium
# make test       set up .venv, then lint and test; what CI runs
# make lint       set up .venv, then lint only
# make clean      remove .venv, caches and the built book; runs/ stays
#
# Needs Python 3.11 or newer and nothing else: make PYTHON=python3.12 run

PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
STEPS = 3

.PHONY: help book run notebooks browse test lint clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^# \(make [a-z]* .*\)/\1/p' Makefile

book: STEPS = 4
book: $(VENV)/installed-book
	@echo "[3/4] Running the chain into runs/cpu; finished stages are not run again"
	@$(VENV)/bin/rlhf-mini run --preset cpu --out runs/cpu
	@echo "[4/4] Running the pages and building the site; unchanged pages are not run again"
	@$(VENV)/bin/python book/tools/build.py

notebooks: STEPS = 3
notebooks: $(VENV)/installed-book
	@echo "[3/3] Writing book/notebooks/"
	@$(VENV)/bin/python book/tools/notebooks.py

browse: STEPS = 3
browse: $(VENV)/installed-book
	@echo "[3/3] Walking the built book"
	@$(VENV)/bin/python tests/book/browse.py

run: STEPS = 3
run: $(VENV)/installed
	@echo "[3/3] Running the chain into runs/cpu; finished stages are not run again"
	@$(VENV)/bin/rlhf-mini run --preset cpu --out runs/cpu
	@echo "Done: open runs/cpu/report.html"

test: STEPS = 4
test: $(VENV)/installed-test
	@echo "[3/4] Lint"
	@$(VENV)/bin/python -m ruff check rlhf_mini tests benchmarks book
	@echo "[4/4] Tests"
	@$(VENV)/bin/python -m pytest -n auto --dist loadfile

lint: STEPS = 3
lint: $(VENV)/installed-test
	@echo "[3/3] Lint"
	@$(VENV)/bin/python -m ruff check rlhf_mini tests benchmarks book

$(VENV)/created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "error: $(PYTHON): $$($(PYTHON) --version 2>/dev/null || echo 'no such command');" \
	         "rlhf-mini needs Python 3.11 or newer, name one: make PYTHON=python3.12 $(MAKECMDGOALS)" \
	         >&2; exit 1; }
	@echo "[1/$(STEPS)] Creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv --clear $(VENV) || { \
	    echo "error: '$(PYTHON) -m venv' failed; on Debian and Ubuntu install python3-venv" >&2; exit 1; }
	@touch $@

$(VENV)/installed: $(VENV)/created pyproject.toml constraints.txt
	@echo "[2/$(STEPS)] Installing the package and what it needs"
	@$(PIP) install -e . -c constraints.txt
	@touch $@

$(VENV)/installed-test: $(VENV)/created pyproject.toml constraints.txt
	@echo "[2/$(STEPS)] Installing the package, what it needs, and the test tools"
	@$(PIP) install -e '.[test]' -c constraints.txt
	@touch $@ $(VENV)/installed

$(VENV)/installed-book: $(VENV)/created pyproject.toml constraints.txt
	@echo "[2/$(STEPS)] Installing the package, what it needs, and the tools of the book"
	@$(PIP) install -e '.[test,book]' -c constraints.txt
	@touch $@ $(VENV)/installed $(VENV)/installed-test

clean:
	rm -rf book/_build $(VENV) .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find rlhf_mini tests -name __pycache__ -type d -prune -exec rm -rf {} +
