"""The study of unlike preferences: groups, labels, and what each group is said to get."""

from __future__ import annotations

import math
import random
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from rlhf_mini.config import load_preset
from rlhf_mini.data import Prompt, Ranking, collate, encode_pair, encode_prompt
from rlhf_mini.experiments import preferences as study
from rlhf_mini.town import Labeler, grade

SMOKE = load_preset("smoke")
DAVID = Prompt("x", "What is the job of David?", family="known",
               truth={"name": "David", "attribute": "job", "value": "singer"})
PLAIN = "David works as a singer."
LONG = "David works as a singer. Thanks for asking me that now."  # six words more, one polite


@pytest.fixture(scope="module")
def rows(lab) -> dict[str, list[dict]]:
    """What `measure` returns for each design at equal shares."""
    return {design: study.measure(lab, {"share": 0.5, "design": design})
            for design in study.DESIGNS}


# ---------------------------------------------------------------- groups

def test_the_groups_feel_opposite_tastes_over_the_same_content():
    gold = np.array([grade(DAVID, x).overall for x in (PLAIN, LONG)])
    assert gold[0] == 1
    taste = 0.4 * math.tanh(6 / 12) + 0.3
    ours, theirs = (study.compute_utilities(g, DAVID, [PLAIN, LONG]) for g in "AB")
    assert ours == pytest.approx([1, gold[1] - taste], abs=1e-6)
    assert theirs == pytest.approx([1, gold[1] + taste], abs=1e-6)


def test_members_keep_all_but_their_taste():
    town = [Labeler(3, "train", (0.6, 0.3, 0.1), 0.05, 0.02, 0.0)]
    groups = {group: study.change_taste(town, group)[0] for group in "AB"}
    assert groups["A"] == Labeler(3, "train", (0.6, 0.3, 0.1), -0.4, -0.3, 0.0)
    assert groups["B"] == Labeler(3, "train", (0.6, 0.3, 0.1), 0.4, 0.3, 0.0)
    ranks = {g: x.rank(DAVID, [PLAIN, LONG], random.Random(0)) for g, x in groups.items()}
    assert ranks == {"A": (1, 2), "B": (2, 1)}


def test_disagreement_counts_pairs_by_hand():
    ours = [np.array([3.0, 2.0, 1.0]), np.array([1.0, 1.0, 0.0])]
    theirs = [np.array([3.0, 1.0, 2.0]), np.array([0.0, 2.0, 1.0])]
    everything = [np.ones((3, 3), bool)] * 2
    # first prompt: 01 same, 02 same, 12 not; second: 01 tied by us, 02 not, 12 same
    assert study.compute_disagreement(ours, theirs, everything) == 2 / 5
    decoys = Ranking("r", "p", ("a", "b", "c"), (1, 2, 3), decoys=(True, False, False))
    own = [study.find_own(decoys), everything[1]]  # only pair 12 of the first prompt is left
    assert study.compute_disagreement(ours, theirs, own) == 2 / 3


def test_the_groups_truly_disagree(rows):
    assert all(0.2 < row["disagreement"] < 0.9 for found in rows.values() for row in found)


# ---------------------------------------------------------------- labels and reward models

def test_shares_are_nested_and_change_no_label(lab):
    pool = {r.id: r for r in study.leave_room(lab, lab.collect("train", SMOKE.ranking.prompts))}
    order = list(pool)
    by_share = {share: study.collect_labels(lab, share) for share in study.SHARES}
    for share, labels in by_share.items():
        cut = round(share * len(pool))
        assert {r.id for r in labels["A"]} <= set(order[:cut])
        assert {r.id for r in labels["B"]} <= set(order[cut:])
        assert sum(map(len, labels.values())) >= 0.8 * len(pool)  # few are tied throughout
        assert all(r.responses == pool[r.id].responses for x in labels.values() for r in x)
    few, many = by_share[0.5], by_share[0.9]
    assert len(few["A"]) < len(many["A"]) and len(few["B"]) > len(many["B"]) > 0
    assert all(r in many["A"] for r in few["A"]) and all(r in few["B"] for r in many["B"])


def test_who_learns_from_what():
    a, b = (Ranking(x, f"{x}?", ("yes", "no"), (1, 2)) for x in "ab")
    trained = []

    def train(rankings):
        trained.append([r.prompt for r in rankings])
        return len(trained)

    lab, labels = SimpleNamespace(train_reward_model=train), {"A": [a], "B": [b]}
    found = [study.train_reward_models(lab, labels, design)
             for design in ("averaged", "told", "per_group")]
    assert trained == [["a?", "b?"], ["For A: a?", "For B: b?"], ["a?"], ["b?"]]
    assert found == [{"A": 1, "B": 1}, {"A": 2, "B": 2}, {"A": 3, "B": 4}]


def test_prompts_that_only_fit_without_the_mark_are_left_out(lab):
    rankings = lab.collect("train", SMOKE.ranking.prompts)
    tokens = {r.id: len(encode_prompt(lab.tokenizer, r.prompt)) for r in rankings}
    longest = max(tokens.values())
    narrow = lab.with_settings(f"reward.max_prompt_tokens={longest}")
    left = {r.id for r in study.leave_room(narrow, rankings)}
    assert 0 < len(left) < len(rankings)
    assert all((tokens[i] == longest) <= (i not in left) for i in tokens)
    wide = lab.with_settings(f"reward.max_prompt_tokens={longest + 20}")
    assert study.leave_room(wide, rankings) == rankings


# ---------------------------------------------------------------- what a group gets

def test_the_best_scored_response_counts():
    scores = [np.array([0.1, 0.9, 0.2]), np.array([1.0, 1.0, 0.0])]
    felt = [np.array([5.0, 7.0, 9.0]), np.array([2.0, 4.0, 6.0])]
    assert study.pick_best(scores, felt) == (7 + 2) / 2


def test_rows_of_both_groups_are_complete_and_mirror_each_other(rows):
    columns = {"group", "rankings", "disagreement", "gain_self"} | {
        f"{measure}_{whose}" for measure in ("accuracy", "sft", "best", "gain")
        for whose in ("own", "other")}
    for design, found in rows.items():
        a, b = found
        more = {"ppo_own", "ppo_gain"} if design == "averaged" else set()
        assert set(a) == set(b) == columns | more and (a["group"], b["group"]) == ("A", "B")
        assert all(np.isfinite(x) for row in found for k, x in row.items() if k != "group")
        assert a["sft_own"] == b["sft_other"] and a["sft_other"] == b["sft_own"]
        for row in found:
            assert row["gain_own"] == pytest.approx(row["best_own"] - row["sft_own"])
            assert row["gain_self"] >= row["gain_own"]
    a, b = rows["averaged"]
    assert a["best_own"] == b["best_other"] and a["accuracy_own"] == b["accuracy_other"]
    a, b = rows["per_group"]
    assert a["rankings"] + b["rankings"] == rows["averaged"][0]["rankings"]


def test_opposite_tastes_cancel_so_both_groups_together_feel_twice_gold(lab, rows):
    a, b = rows["averaged"]
    reward = study.train_reward_models(lab, study.collect_labels(lab, 0.5), "averaged")["A"]
    judged = lab.judge(lab.train_policy(reward))
    assert a["ppo_own"] + b["ppo_own"] == pytest.approx(2 * judged["gold_sampled"], abs=1e-5)
    assert a["ppo_gain"] + b["ppo_gain"] == pytest.approx(2 * judged["gain_sampled"], abs=1e-5)
    gold = [grade(lab.by_text[r.prompt], x).overall for r in study.sample_pool(lab)
            for x in r.responses]
    assert a["sft_own"] + a["sft_other"] == pytest.approx(2 * np.mean(gold), abs=1e-5)


def test_a_model_that_is_told_the_group_reads_the_mark(lab, rows):
    folders = study.train_reward_models(lab, study.collect_labels(lab, 0.5), "told")
    pool = study.sample_pool(lab)
    assert len(pool) > 10 and all(len(r.responses) == 16 for r in pool)
    reward_model = lab.load_reward_model(folders["B"])
    best = []
    for r in pool:  # one response at a time, as plain text, instead of packed rows
        scores = []
        for text in r.responses:
            pair = encode_pair(lab.tokenizer, f"For B: {r.prompt}", text, 99, 99, "here")
            batch = collate([pair], lab.tokenizer.pad_token_id)
            with torch.no_grad():
                scores.append(reward_model(batch.input_ids, batch.attention_mask).item())
        top = r.responses[int(np.argmax(scores))]
        best.append(study.compute_utilities("B", lab.by_text[r.prompt], [top])[0])
    assert rows["told"][1]["best_own"] == pytest.approx(np.mean(best))


# ---------------------------------------------------------------- the figure

def test_the_figure_shows_the_mean_gain_of_each_group():
    made = [{"seed": seed, "share": share, "design": design, "group": group,
             "gain_own": share + seed / 10 + (group == "B"), "ppo_gain": 0.1, "gain_self": 2.0}
            for share, design, group, seed in product(study.SHARES, study.DESIGNS, "AB", (0, 1))]
    figure = study.draw(made)
    assert isinstance(figure, Figure)
    for axes, more in zip(figure.axes, (0, 1), strict=True):
        lines = {line.get_label(): line.get_ydata() for line in axes.get_lines()}
        for label in study.DESIGNS.values():
            assert lines[label] == pytest.approx([s + 0.05 + more for s in study.SHARES])
        assert lines["PPO, RM of all, untold"] == pytest.approx([0.1] * 3)
