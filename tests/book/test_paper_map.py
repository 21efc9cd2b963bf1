"""The map from the paper to the code: every function and every test that it names exists."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "book" / "paper-to-code.md").read_text(encoding="utf-8")
ROWS = [line.split(" | ") for line in PAGE.splitlines() if "`test_" in line]
FUNCTIONS = sorted({name for row in ROWS for name in re.findall(r"`([\w.]+)`", row[1])})
TESTS = sorted({name for row in ROWS for name in re.findall(r"`(\w+::\w+)`", row[2])})


def test_every_row_names_a_function_and_a_test():
    assert len(ROWS) >= 15
    assert all(re.search(r"`\w+\.\w+`", row[1]) and "::" in row[2] for row in ROWS)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_exist(name):
    module, _, function = name.rpartition(".")
    assert callable(getattr(importlib.import_module(f"rlhf_mini.{module}"), function))


@pytest.mark.parametrize("name", TESTS)
def test_tests_exist(name):
    file, _, function = name.partition("::")
    assert f"def {function}(" in (ROOT / "tests" / f"{file}.py").read_text(encoding="utf-8")
