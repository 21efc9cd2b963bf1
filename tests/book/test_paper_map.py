"""The map from the paper to the code: every function and every test that it names exists."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from rlhf_mini.config import RunConfig

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "book" / "paper-to-code.md").read_text(encoding="utf-8")
MAP = PAGE.split("## Equations")[1].split("## Hyperparameters")[0]
ENTRIES = re.findall(r"^[^:\n].+\n: (.+)\n: \*Departure:\* .+\n: \*Test:\* `(\w+::\w+)`$", MAP,
                     re.MULTILINE)
FUNCTIONS = sorted({name for row in ENTRIES for name in re.findall(r"`(\w[\w.]+)`", row[0])})
REST = PAGE.split("## Hyperparameters")[1]
NAMES = sorted(set(re.findall(r"`([a-z_]+\.[a-z_]+)`", REST)))  # functions or settings
TESTS = sorted({test for _, test in ENTRIES} | set(re.findall(r"`(test_\w+::\w+)`", REST)))


def test_every_entry_names_a_function_a_departure_and_a_test():
    assert len(ENTRIES) == MAP.count("*Departure:*") == MAP.count("*Test:*") >= 15
    assert all("`" in functions for functions, _ in ENTRIES)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_exist(name):
    module, _, function = name.rpartition(".")
    assert callable(getattr(importlib.import_module(f"rlhf_mini.{module}"), function))


@pytest.mark.parametrize("name", TESTS)
def test_tests_exist(name):
    file, _, function = name.partition("::")
    assert f"def {function}(" in (ROOT / "tests" / f"{file}.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_settings_and_functions_of_the_tables_exist(name):
    stage, _, field = name.partition(".")
    if hasattr(getattr(RunConfig(), stage, None), field):
        return
    assert callable(getattr(importlib.import_module(f"rlhf_mini.{stage}"), field))


def test_the_tables_name_settings():
    assert len(NAMES) > 20
