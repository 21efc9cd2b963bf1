"""The study of other instructions and other customers."""

from __future__ import annotations

import random
from itertools import product

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from rlhf_mini.config import load_preset
from rlhf_mini.data import Prompt
from rlhf_mini.experiments import Lab, effect
from rlhf_mini.experiments import instructions as study
from rlhf_mini.loading import load_policy
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

def customer(number: int, split: str, **mix: float) -> dict:
    return {"id": number, "split": split, "mix": dict.fromkeys(FAMILIES, 0.0) | mix}


def test_who_asks_and_what_is_asked():
    people = [customer(0, "train", known=0.2, closed=0.2, list=0.6),  # questions 0.4
              customer(1, "train", unknown=0.7, harmful=0.3),  # 0.7
              customer(2, "train", known=0.1, chat=0.9),  # 0.1
              customer(3, "train", closed=0.5, polite=0.5),  # 0.5
              customer(4, "test", known=1.0)]
    prompts = [Prompt(f"{who}-{family}", "?", customer=who, family=family)
               for who in (0, 1, 2, 3, None) for family in ("known", "unknown", "harmful", "chat")]
    chosen = {name: study.choose_prompts(prompts, people, name)
              for name in ("standard", *study.CUSTOMERS)}
    assert chosen["standard"] == prompts
    assert {p.customer for p in chosen["half the customers"]} == {1, 3}
    assert len(chosen["half the customers"]) == 8
    assert {p.family for p in chosen["nothing to refuse"]} == {"known", "chat"}
    assert len(chosen["nothing to refuse"]) == 10


def test_with_all_prompts_they_do_what_the_lab_does(lab):
    everything = [p for p in lab.run.town.prompts if p.split == "train"]
    rankings = lab.collect("train", SMOKE.ranking.prompts)
    assert study.collect_from(lab, everything) == rankings
    reward = lab.train_reward_model(rankings)
    prompts = lab.run.prompts("train", lab.tokenizer)
    one, two = (load_policy(folder, "cpu")[0].state_dict() for folder in (
        lab.train_policy(reward), study.train_policy_on(lab, reward, prompts)))
    assert all(torch.equal(one[name], two[name]) for name in one)


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

    def ppo(*args):
        asked.update(p.id for p in args[4])
        return real(*args)

    def learn(self, rankings):
        ranked.update(self.by_text[r.prompt].id for r in rankings)
        return train_reward_model(self, rankings)

    real = study.train_ppo
    monkeypatch.setattr(study, "train_ppo", ppo)
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
            [p for p in town.prompts if p.split == "train"], town.world["customers"], name)}
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
