"""The scripts that keep results: what they copy, join and refuse."""

from __future__ import annotations

import importlib
import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import scipy.stats
from run_folders import make_report, write_run

ROOT = Path(__file__).parent.parent


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    yield importlib.import_module("record"), importlib.import_module("seeds")
    for name in ("record", "seeds"):
        sys.modules.pop(name, None)


def test_a_run_is_kept_without_its_weights(scripts, tmp_path):
    run = write_run(tmp_path / "run", make_report())
    (run / "figures").mkdir()
    (run / "figures" / "ppo.png").write_bytes(b"picture")
    (run / "ppo" / "model.safetensors").write_bytes(b"weights")
    (run / "ppo" / "samples.jsonl").write_text("{}")
    for _ in range(2):  # the second time replaces the first
        scripts[0].record(run, tmp_path / "kept", ["ppo"])
    kept = {path.name: path.read_bytes() for path in (tmp_path / "kept").iterdir()}
    assert sorted(kept) == ["manifest.json", "ppo.jsonl", "ppo.png", "ppo_ptx.jsonl", "report.json",
                            "samples.jsonl"]
    assert kept["ppo.jsonl"] == (run / "ppo" / "metrics.jsonl").read_bytes()
    manifest = json.loads(kept["manifest.json"])
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    assert manifest["commit"] == (head.stdout.strip() or None)
    assert (manifest["command"], manifest["seed"]) == ("rlhf-mini run --out 'a<b'", 7)


def test_a_missing_figure_leaves_the_old_record(scripts, tmp_path):
    run = write_run(tmp_path / "run", make_report())
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "old.txt").write_text("old")
    with pytest.raises(FileNotFoundError, match="tax.png"):
        scripts[0].record(run, tmp_path / "kept", ["tax"])
    assert (tmp_path / "kept" / "old.txt").exists()


def test_intervals_over_seeds_are_students(scripts):
    values = [0.1, 0.15, 0.12, 0.2, 0.18]
    found = scripts[1].seed_interval(values)
    low, high = scipy.stats.t.interval(0.95, 4, statistics.mean(values), scipy.stats.sem(values))
    assert (found["low"], found["high"]) == (pytest.approx(low), pytest.approx(high))


@pytest.mark.parametrize("change, message", [
    (lambda report: report, "same seed"),
    (lambda report: report | {"seed": 8, "config": {}}, "different configurations")])
def test_runs_that_do_not_belong_together_are_refused(scripts, tmp_path, monkeypatch, capsys,
                                                      change, message):
    runs = [write_run(tmp_path / "a", make_report()),
            write_run(tmp_path / "b", change(make_report()))]
    monkeypatch.setattr(sys, "argv", ["seeds.py", *map(str, runs)])
    with pytest.raises(SystemExit):
        scripts[1].main()
    assert message in capsys.readouterr().err
