"""The recorded sweep of SFT that chapter 5 shows: complete, plausible, made by its script."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SWEEP = ROOT / "data" / "recorded" / "sft" / "sweep.json"


@pytest.fixture(scope="module")
def sweep():
    return json.loads(SWEEP.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("sft_sweep", ROOT / "benchmarks/sft_sweep.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_setting_has_the_same_seeds(sweep):
    keys = {"scaling": "demonstrations", "say_no": "share", "prompt_loss": "kind",
            "epochs": "dropout"}
    assert set(sweep["rows"]) == set(keys)
    for name, key in keys.items():
        counts = Counter((row[key], row.get("epoch")) for row in sweep["rows"][name])
        assert set(counts.values()) == {3}, name


def test_shares_and_scores_are_in_range(sweep):
    for rows in sweep["rows"].values():
        for row in rows:
            assert all(0 <= value <= 1 for name, value in row.items()
                       if name.startswith(("gold", "perfect", "says_no", "eos_rate")))


def test_the_script_runs_what_the_file_holds(sweep, script):
    for name in sweep["rows"]:
        assert callable(getattr(script, name))
    assert "python benchmarks/sft_sweep.py runs/cpu" in sweep["manifest"]["commands"]


def test_demonstrators_yield_only_where_they_should_say_no(script):
    """Flawless demonstrations score 1; with share 1 those that should say no do not."""
    from rlhf_mini.config import load_preset
    from rlhf_mini.town import build_town
    from rlhf_mini.workspace import grade_prompt

    bench = object.__new__(script.Bench)
    town = build_town(load_preset("smoke").town)
    bench.run = type("Run", (), {"town": town})
    bench.train = [p for p in town.prompts if p.split == "train"]
    bench.people = [x for x in town.labelers if x.group == "train"]
    prompts = {p.prompt: p for p in bench.train}
    for share in (0.0, 1.0):
        drawn = bench.draw_flawless(60, 0, share)
        assert len(drawn) == 60
        for d in drawn:
            prompt = prompts[d.prompt]
            gold = grade_prompt(prompt, d.response)["gold"]
            assert (gold > 0.5) == (share == 0.0 or prompt.family not in script.SAY_NO)
