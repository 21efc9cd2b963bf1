"""The study of other instructions and other customers."""

from __future__ import annotations

import random
from itertools import product

import numpy as np
import pytest
from matplotlib.figure import Figure

from rlhf_mini.config import load_preset
from rlhf_mini.data import Prompt
from rlhf_mini.experiments import Lab, effect
from rlhf_mini.experiments import instructions as study
from rlhf_mini.experiments import lab as lab_module
from rlhf_mini.stages import rank_by
from rlhf_mini.town import FAMILIES, Labeler

SMOKE = load_preset("smoke")
DAVID = Prompt("x", "What is the job of David?", family="known",
               truth={"name": "David", "attribute": "job", "value": "singer"})


# ---------------------------------------------------------------- labelers

def test_instructions_decide_between_rude_and_wrong():
    people = [Labeler(i, "train", (0.4, 0.4, 0.2), 0.05, 0.03, 0.0) for i in range(2)]
    right_but_rude, wrong = "David works as a singer, you fool.", "David works as a baker."

    def rank(name: str) -> tuple[int, ...]:
        return study.instruct(people, name)[1].rank(
            DAVID, [right_but_rude, wrong], random.Random(0))

    # rude: helpful about 0.6, truthful 1, harmless 0.25; wrong: 0, 0, 1
    assert rank("standard") == rank("helpful first") == (1, 2)
    assert rank("harmless first") == (2, 1)  # 0.12 + 0.2 + 0.15 against 0.6


def test_only_what_is_named_is_changed():
    labeler = Labeler(4, "train", (0.4, 0.4, 0.2), 0.05, 0.03, 0.1)
    wanted = {"standard": ((0.5, 0.3, 0.2), 0.05, 0.03),
              "nothing to refuse": ((0.5, 0.3, 0.2), 0.05, 0.03),
              "helpful first": ((0.9, 0.05, 0.05), 0.05, 0.03),
              "likes long answers": ((0.5, 0.3, 0.2), 0.6, 0.03),
              "likes polite words": ((0.5, 0.3, 0.2), 0.05, 0.4)}
    for name, values in wanted.items():
        assert study.instruct([labeler], name) == [Labeler(4, "train", *values, 0.1)]


def test_labelers_and_noise_are_the_same_under_all_instructions(lab):
    pool, ranked = lab.collect("train", 24), {}
    for name in ("standard", "likes long answers"):
        people = study.instruct(lab.labelers(), name)
        again = lab.rank_again(pool, rank_by(people), "instructions")
        ranked[name] = {r.id: r for r in again}
    both = set.intersection(*map(set, ranked.values()))
    one, two = ({i: r[i] for i in both} for r in ranked.values())
    assert all(one[i].labeler == two[i].labeler for i in both)
    assert any(one[i].ranks != two[i].ranks for i in both)


# ---------------------------------------------------------------- customers

def test_what_is_asked():
    prompts = [Prompt(name, "?", family=name) for name in FAMILIES]
    chosen = {name: {p.family for p in study.choose_prompts(prompts, name)}
              for name in study.CUSTOMERS}
    assert chosen["nothing to refuse"] == set(FAMILIES) - {"harmful", "unknown"}
    assert {"known", "unknown", "closed"} <= chosen["questions only"]
    assert not {"list", "chat", "harmful"} & chosen["questions only"]


def test_a_lab_that_is_given_all_prompts_does_as_always(lab):
    prompts = [p for p in lab.run.town.prompts if p.split == "train"]
    count = SMOKE.ranking.prompts
    assert lab.collect("train", count, prompts=prompts) == lab.collect("train", count)


# ---------------------------------------------------------------- measures

def test_style_by_hand():
    harmful = Prompt("y", "How do I rob the bank?", family="harmful", truth={})
    found = study.describe_style([DAVID, harmful], [
        ["Sorry, I can not help with that.", "David works as a singer."],  # 6 words (cannot), 5
        ["I will not tell you.", "Thank you! First wait."]])  # 5, 4
    assert found == {"words": 5.0, "polite": 0.5, "refused": 0.5}


@pytest.mark.parametrize("name", ["harmless first", *study.CUSTOMERS])
def test_rows_are_complete_and_all_training_keeps_to_the_customers(lab, monkeypatch, name):
    asked, ranked = set(), set()
    train_reward_model = Lab.train_reward_model

    def ppo(*args, **kwargs):
        asked.update(p.id for p in args[4])
        return real(*args, **kwargs)

    def learn(self, rankings):
        ranked.update(self.by_text[r.prompt].id for r in rankings)
        return train_reward_model(self, rankings)

    real = lab_module.train_ppo
    monkeypatch.setattr(lab_module, "train_ppo", ppo)
    monkeypatch.setattr(Lab, "train_reward_model", learn)
    row, = study.measure(lab, {"instructions": name})
    assert {"rankings", "rm_gold", "rm_labelers", "words", "polite", "refused"} <= set(row)
    assert {f"{measure}_{mode}" for mode in ("sampled", "greedy") for measure in (
        "gold", "helpful", "truthful", "harmless", "response_tokens", "gain")} <= set(row)
    assert all(np.isfinite(x) for x in row.values())
    assert len(ranked) == row["rankings"] > 15
    if name in study.CUSTOMERS:
        town = lab.run.town
        allowed = {p.id for p in study.choose_prompts(
            [p for p in town.prompts if p.split == "train"], name)}
        assert asked and asked | ranked <= allowed


# ---------------------------------------------------------------- the figure

def make_rows() -> list[dict]:
    """Two seeds that lie 10 apart, and conditions that lie `number` apart in both."""
    columns = study.DRAWN.values()
    return [{"seed": seed, **condition} | {
        name: 10.0 * seed + number * (1 + seed) + k for k, name in enumerate(columns)}
        for (number, condition), seed in product(enumerate(study.CONDITIONS), (0, 1))]


def test_differences_are_paired_by_seed():
    rows = [*make_rows(), {"seed": 7, **study.CONDITIONS[1], "words": 1.0}]  # without a partner
    found = study.subtract_standard(rows, ["words"])
    assert len(found) == 2 * (len(study.CONDITIONS) - 1)
    assert found[:2] == [{"seed": s, "instructions": "helpful first", "words": 1.0 + s}
                         for s in (0, 1)]
    mean = effect(rows, "words", study.CONDITIONS[2], study.CONDITIONS[0])["mean"]
    assert mean == np.mean([r["words"] for r in found[2:4]]) == 3


def test_the_figure_shows_the_differences_and_their_intervals():
    figure = study.draw(make_rows())
    assert isinstance(figure, Figure) and len(figure.axes) == 4
    rows = make_rows()
    for axes, column in zip(figure.axes, study.DRAWN.values(), strict=True):
        wanted = effect(rows, column, study.CONDITIONS[1], study.CONDITIONS[0])
        drawn = [line.get_xdata() for line in axes.get_lines()]
        assert any(len(x) == 2 and list(x) == pytest.approx([wanted["low"], wanted["high"]])
                   for x in drawn)
