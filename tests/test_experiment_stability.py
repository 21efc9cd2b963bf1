"""The study of stability: prompts of equal meaning, responses that are truly worse, one run."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from matplotlib.figure import Figure

from rlhf_mini.config import load_preset
from rlhf_mini.data import Prompt
from rlhf_mini.experiments import stability as study
from rlhf_mini.town import grade, ideal_response
from rlhf_mini.town.words import SMALL

SMOKE = load_preset("smoke")
HABITS = {1: "", 2: "Hello. ", 3: "My boss wants this: ", 4: "Dear helper, "}
TRUTH = {"name": "David", "attribute": "job", "value": "singer"}


def prompt(text: str, customer: int = 1, family: str = "known", truth: dict = TRUTH) -> Prompt:
    return Prompt("p", text, customer=customer, family=family, truth=truth)


# ---------------------------------------------------------------- the prompt

@pytest.mark.parametrize("text, customer, wanted", [
    ("Who is David?", 1, {"Hello. Who is David?", "My boss wants this: Who is David?"}),
    ("Hello. Who is David?", 2, {"My boss wants this: Who is David?"}),
    ("Dear helper, who is David?", 4, {"Hello. Who is David?",
                                       "My boss wants this: Who is David?"})])
def test_another_prefix_takes_the_place_of_the_customers_own(text, customer, wanted):
    rng = random.Random(0)
    assert {study.change_prefix(prompt(text, customer), HABITS, rng) for _ in range(40)} == wanted


def test_small_talk_gets_no_prefix():
    hello = prompt("Hello!", family="chat", truth={"intent": "hello"})
    assert study.change_prefix(hello, HABITS, random.Random(0)) == "Hello!"


def test_a_typo_swaps_two_letters_inside_one_word():
    # "an" and "old" are too short, and the two o of "book" are equal
    rng, text = random.Random(0), "an old book, David"
    assert {study.swap_letters(text, rng) for _ in range(60)} == {
        "an old book, Dvaid", "an old book, Daivd"}
    assert study.swap_letters("an old book", rng) == "an old book"


def test_no_typo_turns_one_word_of_the_town_into_another():
    words = {word.lower() for pool in (SMALL.names, SMALL.objects, SMALL.colours, SMALL.places,
                                       *SMALL.categories.values(), *SMALL.attributes.values())
             for entry in pool for word in entry.split()}
    for word in words:
        for i in range(1, len(word) - 2):
            swapped = word[:i] + word[i + 1] + word[i] + word[i + 2:]
            assert swapped == word or swapped not in words, (word, swapped)


def test_every_change_says_the_same_in_another_text(lab):
    habits = {c["id"]: c["prefix"] for c in lab.run.town.world["customers"]}
    prompts, rng, changed = lab.run.prompts("test", lab.tokenizer), random.Random(0), Counter()
    for name, change in study.prompt_changes(habits).items():
        for p in prompts:
            text = change(p, rng)
            changed[name] += text != p.prompt
            subject = (p.truth.get("name") or p.truth.get("category") or "").lower()
            if name != "typo":
                assert subject in text.lower(), (p.prompt, text)
            else:
                assert Counter(text) == Counter(p.prompt)
    assert set(changed) == set(study.FLIPS) and min(changed.values()) > 0.8 * len(prompts)


def test_flips_are_counted_by_hand():
    before = [np.array([2.0, 1.0, 0.0]), np.array([1.0, 1.0, 3.0])]
    after = [np.array([1.0, 2.0, 0.0]), np.array([0.0, 5.0, 0.0])]
    # first: (a,b) flips, (a,c) and (b,c) stay; second: (a,b) is no pair, (a,c) ties, (b,c) flips
    found = study.measure_flips(before, after)
    assert found["rate"] == pytest.approx(2.5 / 5) and found["pairs"] == 5
    # margins before 1, 2, 1, -2, -2; after -1, 1, 2, 0, 5
    assert found["change"] == pytest.approx((2 + 1 + 1 + 2 + 7) / 5)
    assert found["margin"] == pytest.approx(8 / 5)
    same = study.measure_flips(before, [2 * x for x in before])
    assert same["rate"] == 0 and same["change"] == same["margin"]


# ---------------------------------------------------------------- the response

def test_edits_take_from_gold_what_the_grader_says():
    asked, right = prompt("What is the job of David?"), "David works as a singer."
    cases = [(asked, (right,)), (prompt("Bye!"), ("Goodbye! Have a nice day.",))]
    worse = {name: study.find_worse(asked, right, edit(asked, right, random.Random(0)))
             for name, edit in study.response_edits(cases).items()}
    assert set(worse) == set(study.WORSE) and grade(asked, right).overall == 1
    assert worse["no final mark"] == "David works as a singer"  # helpful loses 0.06 for the mark
    assert grade(asked, worse["no final mark"]).overall == pytest.approx(1 - 0.5 * 0.06)
    assert worse["other prompt"] == "Goodbye! Have a nice day."
    sentence = worse["needless sentence"].removeprefix(right + " ")
    assert sentence in SMALL.closings
    # 0.1 for needless words at all, 0.04 for each of the first 15
    cost = 0.1 + 0.04 * len(sentence.split())
    assert grade(asked, worse["needless sentence"]).overall == pytest.approx(1 - 0.5 * cost)


def test_values_are_changed_within_their_category():
    asked = prompt("What is the job of David?")
    texts = study.change_values(asked, "David works as a singer.", random.Random(0))
    for text in texts:
        name, job = text.removesuffix(".").split(" works as a ")
        assert (name == "David") != (job == "singer")
        assert name in SMALL.names and job in SMALL.attributes["job"]
    assert study.change_values(asked, "Nobody can say.", random.Random(0)) == []
    street = study.change_values(asked, "It is Mill Street.", random.Random(0))
    assert {x.removeprefix("It is ")[:-1] for x in street} < set(SMALL.attributes["street"])
    (first, *_) = study.change_values(asked, "Marbles, darts.", random.Random(0))
    assert first[0].isupper()  # a capital stays one


def test_every_change_of_a_right_response_is_checked_by_gold(lab):
    cases = [(p, (ideal_response(p),)) for p in lab.run.prompts("test", lab.tokenizer)]
    for edit in study.response_edits(cases).values():
        pairs = [(p, best, study.find_worse(p, best, edit(p, best, random.Random(0))))
                 for p, (best,) in cases]
        found = [(p, best, worse) for p, best, worse in pairs if worse]
        assert len(found) > len(cases) / 2
        assert all(grade(p, worse).overall < grade(p, best).overall for p, best, worse in found)


def test_nothing_is_called_worse_that_is_as_good():
    asked = prompt("What is the job of David?")
    assert study.find_worse(asked, "David works as a singer.",
                            ["David is a singer.", "", "David works as a singer!"]) is None


def test_preferences_are_counted_by_hand():
    scores = [np.array(x) for x in ([2.0, 1.0], [0.0, 3.0], [1.0, 1.0], [4.0, 0.0])]
    assert study.measure_preferences(scores) == {"rate": 1.5 / 4, "pairs": 4, "change": 8 / 4}


# ---------------------------------------------------------------- the runs

def test_half_of_the_prompts_are_reworded_and_nothing_else(lab):
    twice = lab.with_settings("reward.epochs=2")
    rankings = lab.collect("train", 24)
    found = study.reword_half(twice, rankings)
    assert len(found) == 2 * len(rankings) and found == study.reword_half(twice, rankings)
    pairs = list(zip(rankings * 2, found, strict=True))
    assert all((a.responses, a.ranks, a.gold) == (b.responses, b.ranks, b.gold) for a, b in pairs)
    changed = sum(a.prompt != b.prompt for a, b in pairs) / len(pairs)
    assert changed == pytest.approx(0.5, abs=0.25)  # more than three standard errors
    short = lab.with_settings("reward.max_prompt_tokens=2")
    assert study.reword_half(short, rankings) == rankings  # no rewording fits


def test_cases_hold_different_own_responses_the_best_first(lab):
    cases = study.find_cases(lab)
    decoys = {(r.prompt, x) for r in lab.collect("test", 12)
              for x, decoy in zip(r.responses, r.decoys, strict=True) if decoy}
    assert cases and not any((p.prompt, x) in decoys for p, own in cases for x in own)
    for p, own in cases:
        gold = [grade(p, x).overall for x in own]
        assert gold == sorted(gold, reverse=True) and len(set(own)) == len(own) > 1


def test_rows_of_a_run_are_whole_and_can_be_drawn(lab, monkeypatch):
    # so small an SFT model writes nothing that holds a value or a final mark
    monkeypatch.setattr(study, "find_cases", lambda lab: [
        (p, (ideal_response(p), "I am not sure.")) for p in lab.run.prompts("test", lab.tokenizer)])
    rows = study.measure(lab, {"augmented": True})
    *probes, policy = rows
    assert [row["probe"] for row in probes] == [*study.FLIPS, *study.WORSE]
    for row in probes:
        assert 0 <= row["rate"] <= 1 and row["pairs"] > 0 and row["change"] >= 0
        assert ("margin" in row) == (row["probe"] in study.FLIPS)
    assert policy["probe"] == "policy"
    assert {"rm_gold", "rm_labelers", "gain_sampled", "gold_greedy"} <= set(policy)
    assert all(np.isfinite(x) for row in rows for x in row.values() if not isinstance(x, str))
    both = [{"seed": seed, "augmented": augmented} | row
            | ({"rate": 0.1 * seed + 0.5 * augmented} if "rate" in row else {})
            for seed in (0, 1) for augmented in (False, True) for row in rows]
    figure = study.draw(both)
    assert isinstance(figure, Figure)
    upper = figure.axes[0]
    assert [x.get_text() for x in upper.get_yticklabels()] == list(study.FLIPS)
    means = [line.get_xdata()[0] for line in upper.lines if line.get_marker() in "oD"]
    assert means == pytest.approx([0.05] * 4 + [0.55] * 4)
