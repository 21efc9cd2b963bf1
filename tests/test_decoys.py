"""benchmarks/decoys.py: the two arms see the same prompts and the same number of responses."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from rlhf_mini.records import Ranking, check_record


@pytest.fixture
def decoys(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    yield importlib.import_module("decoys")
    sys.modules.pop("decoys")


def make_ranking(ranks, flags):
    k = len(ranks)
    return Ranking("a", "Who?", tuple(f"text {j}" for j in range(k)), tuple(ranks),
                   gold=tuple(1 / r for r in ranks), decoys=tuple(flags))


def test_one_arm_keeps_the_decoy_and_the_other_loses_it(decoys):
    ranking = make_ranking([2, 4, 1, 3], [False, False, True, False])
    with_decoy, without = decoys.split_ranking(ranking)
    assert with_decoy.responses == ("text 0", "text 1", "text 2")
    assert without.responses == ("text 0", "text 1", "text 3")
    assert (with_decoy.ranks, without.ranks) == ((2, 3, 1), (1, 3, 2))
    assert (with_decoy.decoys, without.decoys) == ((False, False, True), (False,) * 3)
    assert with_decoy.gold == (1 / 2, 1 / 4, 1)
    check_record(with_decoy)
    check_record(without)


def test_rankings_that_cannot_be_split_are_left_out(decoys):
    tied = make_ranking([1, 1, 2, 1], [False, False, True, False])  # all own responses tie
    assert decoys.split_ranking(tied) is None
    assert decoys.split_ranking(make_ranking([1, 2, 3], [False, True, False])) is None
    assert decoys.split_ranking(make_ranking([1, 2, 3, 4], [False] * 4)) is None


def test_a_model_that_ignores_the_prompt_never_prefers_its_own(decoys, monkeypatch):
    import torch

    def score(model, encoded, pad):
        return [torch.tensor([model(prompt, responses[0]), 0.0])
                for prompt, responses, _ in encoded]

    def encode(tokenizer, rankings, config):
        return [(r.prompt, r.responses, r.ranks) for r in rankings]

    monkeypatch.setattr(decoys, "score_rankings", score)
    monkeypatch.setattr(decoys, "encode_rankings", encode)
    rankings = [Ranking(f"r{i}", f"Q{i}", (f"A{i}", "B"), (1, 2), gold=(1.0, 0.0),
                        decoys=(False, False)) for i in range(5)]
    tokenizer = type("T", (), {"pad_token_id": 0})

    def match(prompt, response):
        return float(prompt[1:] == response[1:])

    assert decoys.measure_swap(match, tokenizer, rankings, None) == 1
    assert decoys.measure_swap(lambda p, r: 1.0, tokenizer, rankings, None) == 0
