"""The sweeps over the KL leash and the pretraining mix."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

from rlhf_mini.__main__ import main

ROOT = Path(__file__).parent.parent


@pytest.fixture
def sweeps(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    yield importlib.import_module("sweeps")
    for name in ("record", "sweeps"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A smoke run, judged on validation customers as a sweep is."""
    out = tmp_path_factory.mktemp("sweeps") / "run"
    assert main(["run", "--preset", "smoke", "--out", str(out), "--set",
                 "evaluation.split=valid"]) == 0
    return out


def test_a_point_with_the_settings_of_the_run_is_the_run(sweeps, finished, tmp_path):
    report = json.loads((finished / "report.json").read_text())
    beta, gamma = (report["config"]["ppo"][name] for name in ("kl_coef", "ptx_coef"))
    run, _ = sweeps.open_finished(finished, [])
    sft, gold = sweeps.measure_sft(run)
    assert {"sampled": sft["sampled"], "greedy": sft["greedy"]} == report["eval"]["sft"]
    for stage, ptx in (("ppo", 0.0), ("ppo_ptx", gamma)):
        point = sweeps.measure_point(run, beta, ptx, gold)
        assert point["zero_shot"] == report["zero_shot"][stage]
        for mode in ("sampled", "greedy"):
            assert point[mode] == report["eval"][stage][mode]
            assert point["gain"][mode] == report["gain"][f"{stage}_vs_sft"][mode]
        last = (finished / stage / "metrics.jsonl").read_text().splitlines()[-1]
        assert point["last"]["score"] == json.loads(last)["score"]


def test_a_stopped_sweep_goes_on_and_other_settings_begin_anew(sweeps, finished, tmp_path,
                                                               monkeypatch):
    trained = []
    train = sweeps.measure_point
    monkeypatch.setattr(sweeps, "measure_point", lambda run, *point: (
        trained.append(point[:2]), train(run, *point))[1])
    few = ["ppo.iterations=1"]
    sweeps.sweep([finished], [0.0], [0.0], few, tmp_path)
    assert trained == [(0.0, 0.0)]
    result = sweeps.sweep([finished], [0.0, 1.0], [0.0, 2.0], few, tmp_path)
    assert trained == [(0.0, 0.0), (1.0, 0.0), (0.0, 2.0)]
    assert result == json.loads((tmp_path / "sweeps.json").read_text())
    assert [(p["kl_coef"], p["ptx_coef"]) for p in result["runs"][0]["points"]] == trained
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["settings"] == few and manifest["runs"][0]["seed"] == 0
    sweeps.sweep([finished], [0.0], [], ["ppo.iterations=2"], tmp_path)
    assert trained[3:] == [(0.0, 0.0)]


def test_an_unfinished_run_is_refused(sweeps, tmp_path):
    with pytest.raises(ValueError, match="no finished stage 'sft'"):
        sweeps.sweep([tmp_path], [0.0], [], [], tmp_path / "out")
