"""Step 2a: K responses per prompt, decoys, ties."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
from conftest import make_policy
from toys import make_talker

from rlhf_mini.config import RankingConfig
from rlhf_mini.data import Prompt, read_jsonl, write_jsonl
from rlhf_mini.ranking import _draw_decoys, collect_rankings
from rlhf_mini.records import Ranking, check_record
from rlhf_mini.runtime import make_rng

PROMPTS = [Prompt(f"p{i}", f"Question {i}?", split="valid") for i in range(30)]
CONFIG = RankingConfig(k_low=4, k_high=9, decoys=1, max_response_tokens=6, batch_size=64)


def by_length(prompt, responses, rng):
    """Rank by length, longest first; the true score is the length."""
    lengths = sorted({len(r) for r in responses}, reverse=True)
    return (tuple(lengths.index(len(r)) + 1 for r in responses),
            tuple(float(len(r)) for r in responses), 7)


@pytest.fixture(scope="module")
def rankings(tokenizer_of_module):
    return collect_rankings(make_policy(tokenizer_of_module), tokenizer_of_module, PROMPTS,
                            by_length, CONFIG, seed=0)


@pytest.fixture(scope="module")
def tokenizer_of_module(request):
    return request.getfixturevalue("tokenizer")


def test_every_k_from_low_to_high_is_drawn(rankings):
    counts = Counter(len(r.responses) for r in rankings)
    # a random model writes no empty and no equal responses: K is as drawn
    assert set(counts) == set(range(4, 10))
    assert len(rankings) == len(PROMPTS)


def test_records_hold_what_the_labeler_saw(rankings, tmp_path):
    for prompt, ranking in zip(PROMPTS, rankings, strict=True):
        check_record(ranking)
        assert (ranking.prompt, ranking.split, ranking.labeler) == (prompt.prompt, "valid", 7)
        assert ranking.id == f"{prompt.id}-ranking"
        assert ranking.gold == tuple(float(len(r)) for r in ranking.responses)
        best = max(range(len(ranking.ranks)), key=lambda j: ranking.gold[j])
        assert ranking.ranks[best] == 1
    write_jsonl(tmp_path / "rankings.jsonl", rankings)
    assert read_jsonl(tmp_path / "rankings.jsonl", Ranking) == rankings


def test_decoys_are_responses_to_other_prompts(rankings):
    own = [{r for r, decoy in zip(x.responses, x.decoys, strict=True) if not decoy}
           for x in rankings]
    for i, ranking in enumerate(rankings):
        decoys = [r for r, decoy in zip(ranking.responses, ranking.decoys, strict=True) if decoy]
        assert len(decoys) == 1
        assert decoys[0] not in own[i]
        assert any(decoys[0] in own[j] for j in range(len(rankings)) if j != i)


def test_a_decoy_is_never_the_owners_own_response():
    responses = [[f"own {i}"] for i in range(3)]
    for seed in range(50):
        [decoy] = _draw_decoys(responses, 1, 1, make_rng(seed))
        assert decoy in ("own 0", "own 2")


def test_decoys_are_new_texts():
    responses = [["same"], ["same", "other"], ["same"]]
    for seed in range(20):
        assert set(_draw_decoys(responses, 0, 2, make_rng(seed))) <= {"other"}


def test_without_decoys_all_responses_are_own(policy, tokenizer):
    config = dataclasses.replace(CONFIG, decoys=0)
    for ranking in collect_rankings(policy, tokenizer, PROMPTS[:5], by_length, config, seed=0):
        assert ranking.decoys == (False,) * len(ranking.responses)


def test_all_tied_rankings_are_left_out(policy, tokenizer):
    def tie_odd(prompt, responses, rng):
        if int(prompt.id[1:]) % 2:
            return (1,) * len(responses), None, None
        return by_length(prompt, responses, rng)

    rankings = collect_rankings(policy, tokenizer, PROMPTS[:6], tie_odd, CONFIG, seed=0)
    assert [r.id for r in rankings] == ["p0-ranking", "p2-ranking", "p4-ranking"]


def test_empty_responses_are_left_out(tokenizer):
    silent = make_talker(tokenizer, eos_bias=50.0)
    assert collect_rankings(silent, tokenizer, PROMPTS[:4], by_length, CONFIG, seed=0) == []


def test_same_seed_same_rankings(tokenizer):
    one, two, other = (collect_rankings(make_policy(tokenizer), tokenizer, PROMPTS[:4], by_length,
                                        CONFIG, seed) for seed in (0, 0, 1))
    assert one == two != other


def test_responses_are_sampled_at_the_temperature_of_the_config(policy, tokenizer):
    config = dataclasses.replace(CONFIG, temperature=1e-4, decoys=0)

    def first_is_best(prompt, responses, rng):
        return (1,) + (2,) * (len(responses) - 1), None, None

    for ranking in collect_rankings(policy, tokenizer, PROMPTS[:4], first_is_best, config, seed=0):
        assert len(set(ranking.responses)) == 1  # nearly greedy: one response, K times
