"""The comparison with TRL: ratios are paired and geometric, our side does the work it counts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import against_trl  # noqa: E402


def row(side: str, speed: float, memory: float = 100.0) -> dict:
    return {"side": side, "stage": "ppo", "per_second": speed, "peak_memory_mb": memory}


def test_ratio_is_the_geometric_mean_of_pairs_with_its_interval():
    rows = [row("ours", 20), row("trl", 10), row("ours", 8), row("trl", 1, 300.0)]
    (summary,), table = against_trl.summarize(rows, ["ppo"])
    assert summary["ratio"] == pytest.approx(4.0)  # sqrt(2 * 8)
    # two logs, ln 2 and ln 8: standard error ln 2, Student's quantile with one degree 12.706
    assert summary["high"] == pytest.approx(4 * 2**12.7062, rel=1e-3)
    assert summary["low"] == pytest.approx(4 / 2**12.7062, rel=1e-3)
    assert (summary["ours"], summary["trl"], summary["trl_memory_mb"]) == (14.0, 5.5, 300.0)
    assert "| ppo | episodes | 14 | 6 | 4.00 [" in table


def test_prompts_have_the_stated_length_and_rankings_have_no_ties():
    tokenizer, _, _ = against_trl.make_models()
    assert len(against_trl.make_prompts(tokenizer)) >= against_trl.PPO.episodes
    rankings = against_trl.make_rankings(5)
    assert all(sorted(r.ranks) == [1, 2, 3, 4] for r in rankings)


def test_our_side_does_the_work_that_it_counts():
    train, units = against_trl.ours_reward(32)
    assert units == 32 and len(train()) == 2  # two batches of 16
    train, units = against_trl.ours_ppo(1)
    assert units == against_trl.PPO.episodes and len(train()) == 1
