"""Every known wrong variant is noticed by the test that is named for it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from mutants import MUTANTS, applied

from rlhf_mini import kl
from rlhf_mini.check.hunts import HUNTS

NAMES = [m.name for m in MUTANTS]


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    """What `python tests/mutants.py --json` says; one process for all of them."""
    script = Path(__file__).with_name("mutants.py")
    done = subprocess.run([sys.executable, str(script), "--json"], capture_output=True, text=True)
    assert done.stdout.strip(), done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", NAMES)
def test_the_mutant_is_killed(results, name):
    assert results[name] == "killed"


def test_a_variant_that_is_right_survives(results):
    assert results["control"] == "SURVIVED"


def test_there_are_at_least_25_with_names_and_reasons_of_their_own():
    assert len(MUTANTS) >= 25
    assert len(set(NAMES)) == len(MUTANTS)
    assert all(m.why and m.old != m.new for m in MUTANTS)
    assert set(HUNTS) <= set(NAMES)  # every bug hunt of the book is killed as well


def test_a_mutant_is_in_place_for_the_body_only():
    mutant = next(m for m in MUTANTS if m.name == "k1-sign")
    assert kl.estimate_kl(2.0, 0.5) == 1.5
    with applied(mutant):
        assert kl.estimate_kl(2.0, 0.5) == -1.5
    assert kl.estimate_kl(2.0, 0.5) == 1.5


def test_a_mutant_whose_source_is_gone_is_an_error():
    stale = replace(MUTANTS[0], old="this text is nowhere")
    with pytest.raises(LookupError, match="occurs 0 times in .*, expected once"), \
            applied(stale):
        pass
