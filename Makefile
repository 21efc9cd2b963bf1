# make run    set up .venv, then run the whole chain (town to report) into runs/cpu
# make test   set up .venv, then lint and test; what CI runs
# make lint   set up .venv, then lint only
# make clean  remove .venv and caches; runs/ stays
#
# Needs Python 3.11 or newer and nothing else: make PYTHON=python3.12 run

PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
STEPS = 3

.PHONY: help run test lint clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^# \(make [a-z]* .*\)/\1/p' Makefile

run: STEPS = 3
run: $(VENV)/installed
	@echo "[3/3] Running the chain into runs/cpu; finished stages are not run again"
	@$(VENV)/bin/rlhf-mini run --preset cpu --out runs/cpu
	@echo "Done: open runs/cpu/report.html"

test: STEPS = 4
test: $(VENV)/installed-test
	@echo "[3/4] Lint"
	@$(VENV)/bin/python -m ruff check rlhf_mini tests benchmarks
	@echo "[4/4] Tests"
	@$(VENV)/bin/python -m pytest

lint: STEPS = 3
lint: $(VENV)/installed-test
	@echo "[3/3] Lint"
	@$(VENV)/bin/python -m ruff check rlhf_mini tests benchmarks

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

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find rlhf_mini tests -name __pycache__ -type d -prune -exec rm -rf {} +
