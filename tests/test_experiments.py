"""Studies over seeds: what is kept, refused and resumed, and the study of noisy labels."""

from __future__ import annotations

import json
import multiprocessing
import random
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from matplotlib.figure import Figure

from rlhf_mini.config import load_preset, override
from rlhf_mini.data import Prompt, Ranking
from rlhf_mini.experiments import (
    STUDIES,
    Lab,
    Study,
    effect,
    find_rows,
    noise,
    read_rows,
    seed_interval,
)
from rlhf_mini.experiments.study import open_results, run_study, work
from rlhf_mini.files import read_json
from rlhf_mini.town import Labeler
from rlhf_mini.workspace import Run

CPU = torch.device("cpu")
SMOKE = load_preset("smoke")


@pytest.fixture
def base(smoke_base) -> Path:
    return smoke_base


@pytest.fixture
def lab(base, tmp_path) -> Lab:
    return Lab(Run(base, SMOKE), 0, tmp_path / "lab")


def count_runs(lab: Lab, condition: dict) -> list[dict]:
    """A study's `measure` that trains nothing and says that it was called."""
    with (lab.folder / "called").open("a") as file:
        file.write(f"{condition['x']}\n")
    if condition["x"] == 9:
        raise ValueError("nine is too much")
    print("something to log")
    return [{"y": condition["x"] + 10 * lab.seed}]


def draw_nothing(rows: list[dict]) -> Figure:
    return Figure()


TOY = Study("toy", "Does it count?", ({"x": 1}, {"x": 2}), count_runs, draw_nothing)


def run_toy(base, out, study=TOY, config=SMOKE, seeds=2, jobs=1) -> list[dict]:
    return run_study(study, config, base, out, seeds, jobs, CPU, "toy command")


def calls(base) -> int:
    return sum(len(path.read_text().split()) for path in base.glob("lab/*/called"))


# ---------------------------------------------------------------- running

def test_every_condition_and_seed_gets_its_row_and_none_is_made_twice(base, tmp_path, capsys):
    before, out = calls(base), tmp_path / "toy"
    rows = run_toy(base, out)
    assert rows == [{"seed": s, "x": x, "y": x + 10 * s} for x in (1, 2) for s in (0, 1)]
    assert [json.loads(x) for x in (out / "rows.jsonl").read_text().splitlines()] == rows
    assert (out / "figure.png").read_bytes()[:4] == b"\x89PNG"
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["command"] == "toy command" and manifest["settings"]["ppo.iterations"] == 4
    assert {"commit", "changed", "device", "versions", "seconds", "sft", "jobs"} <= set(manifest)
    assert calls(base) == before + 4
    assert "something to log" not in capsys.readouterr().out  # it stands in the log
    assert "something to log" in (base / "lab" / "seed-1" / "toy.log").read_text()
    assert run_toy(base, out) == rows and calls(base) == before + 4
    assert "all 4 runs are in" in capsys.readouterr().out
    more = run_toy(base, out, seeds=3)
    assert len(more) == 6 and calls(base) == before + 6


def test_a_stopped_study_goes_on_and_a_cut_line_is_named(base, tmp_path):
    out = tmp_path / "toy"
    rows = run_toy(base, out)
    path, before = out / "rows.jsonl", calls(base)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3]))
    assert sorted(map(str, run_toy(base, out))) == sorted(map(str, rows))
    assert calls(base) == before + 1
    path.write_text("".join(lines[:3]) + lines[3][:9])
    with pytest.raises(ValueError, match=r"rows\.jsonl:4: not a whole row .* delete this line"):
        run_toy(base, out)
    path.write_text('{"seed": 0, "z": 1}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: expected an object with seed, x"):
        run_toy(base, out)


def test_a_failed_run_is_named_and_the_finished_ones_are_kept(base, tmp_path):
    study = replace(TOY, conditions=({"x": 1}, {"x": 9}))
    with pytest.raises(ValueError, match=r"toy, \{'x': 9\}, seed 0: nine is too .*kept"):
        run_toy(base, tmp_path / "toy", study)
    assert len((tmp_path / "toy" / "rows.jsonl").read_text().splitlines()) == 2


def test_several_processes_give_the_rows_of_one(base, tmp_path):
    study = STUDIES["noise"]
    study = replace(study, conditions=study.conditions[:2])
    one = run_toy(base, tmp_path / "one", study)
    for path in base.glob("lab/*/*-*"):
        path.rename(tmp_path / f"{path.parent.name}-{path.name}")  # nothing is found there
    two = run_toy(base, tmp_path / "two", study, jobs=2)
    key = json.dumps
    assert sorted(map(key, one)) == sorted(map(key, two))


@pytest.mark.parametrize("change, message", [
    (dict(seeds=1), "--seeds 1: expected at least 2"),
    (dict(jobs=0), "--jobs 0: expected at least 1"),
    (dict(config=override(SMOKE, ["ppo.lr=0.5"])), r"other settings \(ppo.lr 0.0002 -> 0.5\)"),
    (dict(study=replace(TOY, name="other")), "holds results of toy, not of 'other'")])
def test_bad_wishes_are_refused_and_nothing_is_overwritten(base, tmp_path, change, message):
    out = tmp_path / "toy"
    run_toy(base, out)
    before = {path: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ValueError, match=message):
        run_toy(base, out, **change)
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_a_folder_of_something_else_is_left_alone(base, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds no manifest.json"):
        run_toy(base, tmp_path)
    assert open_results(tmp_path / "new", TOY, {}) == ([], {})


# ---------------------------------------------------------------- statistics

def test_interval_over_seeds_is_students():
    values = [0.61, 0.58, 0.66, 0.60, 0.63]
    found = seed_interval(values)
    wanted = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found["low"], found["high"]) == pytest.approx(wanted)
    assert found["mean"] == pytest.approx(np.mean(values))


def test_effects_are_paired_by_seed():
    rows = [{"seed": s, "x": x, "y": s * 10.0 + gain} for x, gains in (
        (1, (0, 0, 0)), (2, (1, 2, 3))) for s, gain in enumerate(gains)]
    rows = [*rows[::-1], {"seed": 7, "x": 2, "y": 99.0}]  # without a partner
    found = effect(rows, "y", {"x": 2}, {"x": 1})
    assert found["mean"] == pytest.approx(2)
    assert found["high"] - 2 == pytest.approx(scipy.stats.t.ppf(0.975, 2) / 3**0.5)
    assert find_rows(rows, {"x": 1}, 2) == [{"seed": 2, "x": 1, "y": 20.0}]


# ---------------------------------------------------------------- the lab

def test_what_is_kept_depends_on_all_that_made_it(lab):
    made = []

    def make(folder):
        made.append(folder)
        (folder / "x").write_text("x")

    first = lab.keep("thing", {"a": 1}, make)
    assert lab.keep("thing", {"a": 1}, make) == first and (first / "x").exists()
    others = [lab.keep("thing", {"a": 2}, make), lab.keep("other", {"a": 1}, make),
              Lab(lab.run, 1, lab.folder).keep("thing", {"a": 1}, make)]
    assert len({first, *others}) == len(made) == 4


def keep_slowly(lab: Lab) -> str:
    """Keep a result that takes a while; runs in a process of its own."""
    def make(folder: Path) -> None:
        (folder / "thing").write_text("whole")
        time.sleep(1)
        with (lab.folder / "made").open("a") as file:
            file.write("once ")
    return (lab.keep("thing", {}, make) / "thing").read_text()


def test_one_of_several_processes_makes_a_result_and_the_others_wait(lab):
    lab.folder.mkdir()
    with ProcessPoolExecutor(3, multiprocessing.get_context("spawn")) as pool:
        assert list(pool.map(keep_slowly, [lab] * 3)) == ["whole"] * 3
    assert (lab.folder / "made").read_text() == "once "


def test_judging_sft_against_itself_finds_no_gain(lab):
    row = lab.judge(lab.policy)
    assert row["gain_sampled"] == row["gain_greedy"] == row["kl_sampled"] == 0
    assert row["win_sampled"] == row["win_greedy"] == 0.5


def test_labels_change_with_the_seed_and_responses_stay_when_ranked_again(lab):
    rankings = lab.collect("train", 20)
    assert rankings == lab.collect("train", 20)
    assert rankings != Lab(lab.run, 1, lab.folder).collect("train", 20)
    assert {r.split for r in lab.collect("test", 10)} == {"test"}
    upside_down = lab.rank_again(
        rankings, lambda p, texts, rng: (tuple(sorted(set(texts)).index(t) + 1 for t in texts),
                                         None, None), "alphabet")
    by_id = {r.id: r for r in rankings}
    assert all(r.responses == by_id[r.id].responses for r in upside_down)
    assert all(r.responses[r.ranks.index(1)] == min(r.responses) for r in upside_down)


# ---------------------------------------------------------------- noisy labels

def ranking(ranks, gold, decoys=(False, False, False)) -> Ranking:
    return Ranking("r", "p", ("a", "b", "c"), ranks, gold=gold, decoys=decoys)


def test_label_error_counts_pairs_by_hand():
    # pairs (a,b) right, (a,c) right, (b,c) tied; then (a,b) wrong, the rest with a decoy
    found = noise.measure_labels([
        ranking((1, 2, 2), (0.9, 0.5, 0.1)),
        ranking((2, 1, 3), (0.9, 0.5, 0.1), (False, False, True))])
    assert found == {"label_error": 1 / 3, "label_ties": 1 / 4}


def test_merging_neighbours():
    assert noise.merge_neighbours([3.0, 1.0, 2.0], 1.0, random.Random(0)) == (1, 1, 1)
    rng, counts = random.Random(0), 0
    for _ in range(2000):
        low, high = noise.merge_neighbours([0.0, 1.0], 0.2, rng)
        assert low == 1
        counts += high == 1
    assert counts / 2000 == pytest.approx(0.2, abs=0.03)  # three standard errors


def test_labelers_together_err_less_and_noise_errs_more():
    prompt = Prompt("x", "What is the job of David?", family="known",
                    truth={"name": "David", "attribute": "job", "value": "singer"})
    responses = ["David works as a singer.", "David works as a baker."]
    people = [Labeler(i, "train", (0.5, 0.3, 0.2), 0.0, 0.0, 0.5) for i in range(5)]

    def error(count: int, factor: float) -> float:
        rng, rank = random.Random(1), noise.rank_together(people, count, factor, 0.0)
        return np.mean([rank(prompt, responses, rng)[0] == (2, 1) for _ in range(600)])

    # one labeler: utilities differ by u, Gumbel noise of scale s: P(wrong) = 1 / (1 + exp(u / s))
    gap = people[0].utility(prompt, responses[0]) - people[0].utility(prompt, responses[1])
    for factor in (1.0, 4.0):
        wanted = 1 / (1 + np.exp(gap / (0.5 * factor)))
        assert error(1, factor) == pytest.approx(wanted, abs=0.06)
    assert error(1, 0.0) == error(3, 0.0) == 0
    # three equal voters: a wrong majority, p^2 (3 - 2p); equal mean ranks cannot occur
    p = 1 / (1 + np.exp(gap / 2.0))
    assert error(3, 4.0) == pytest.approx(p * p * (3 - 2 * p), abs=0.06)


def test_three_labelers_rank_a_third_of_the_prompts(lab):
    rows = [work(STUDIES["noise"], lab.run, condition, 0)[0]
            for condition in (noise.LEVELS[1], noise.PANELS[0])]
    assert rows[1]["prompts"] <= 24 // 3 < rows[0]["prompts"]
    assert all(np.isfinite(value) for row in rows for value in row.values())


@pytest.mark.parametrize("name", STUDIES)
def test_conditions_are_all_different_and_have_one_set_of_keys(name):
    conditions = STUDIES[name].conditions
    assert len({json.dumps(c, sort_keys=True) for c in conditions}) == len(conditions)
    assert len({tuple(sorted(c)) for c in conditions}) == 1 and "seed" not in conditions[0]
    override(load_preset("cpu"), list(STUDIES[name].settings))


RECORDED = Path(__file__).parent.parent / "data" / "recorded"


@pytest.mark.parametrize("name", STUDIES)
def test_recorded_results_are_whole(name):
    study, manifest = STUDIES[name], read_json(RECORDED / name / "manifest.json")
    rows = read_rows(RECORDED / name / "rows.jsonl", study)
    seeds = {row["seed"] for row in rows}
    assert len(seeds) >= 5
    assert all(find_rows(rows, condition, seed) for condition in study.conditions for seed in seeds)
    assert sum(len(find_rows(rows, condition)) for condition in study.conditions) == len(rows)
    changed = override(load_preset("cpu"), list(study.settings))
    assert all(str(manifest["settings"][key]) == str(getattr(getattr(changed, part), field))
               for key in manifest["settings"] for part, field in [key.split(".")])
    assert {"commit", "command", "seconds", "versions", "device"} <= set(manifest)
    assert (RECORDED / name / "figure.png").is_file()
