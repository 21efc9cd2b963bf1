"""Step 3a: what a rollout holds, row by row against single forwards; the prompt sampler."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch
from toys import EOS, PAD, make_reward_model, make_talker

from rlhf_mini.config import PPOConfig
from rlhf_mini.data import DataError, Prompt, encode_prompt
from rlhf_mini.models import ValueModel
from rlhf_mini.rollout import PromptSampler, collect_rollout, score_with
from rlhf_mini.runtime import make_generator

PROMPTS = [Prompt(f"p{i}", text) for i, text in enumerate(
    ["Where is Anna?", "Who?", "Tell me about the town.", "Bread", "The river?", "Why so cold?"])]
CONFIG = PPOConfig(max_prompt_tokens=40, max_response_tokens=8, missing_eos_score=-3.5,
                   temperature=0.8)


@pytest.fixture
def networks(tokenizer):
    policy, ref_policy = (make_talker(tokenizer, seed, eos_bias=3.0) for seed in (0, 1))
    reward_model = make_reward_model(policy)
    return policy, ref_policy, ValueModel.from_reward_model(reward_model), reward_model


@pytest.fixture
def rollout(networks, tokenizer):
    policy, ref_policy, value_model, reward_model = networks
    return collect_rollout(policy, ref_policy, value_model, score_with(reward_model), tokenizer,
                           PROMPTS, CONFIG, make_generator(0, "r"))


def test_every_number_equals_that_of_a_single_unpadded_forward(networks, rollout, tokenizer):
    policy, ref_policy, value_model, reward_model = networks
    rollout, _ = rollout
    for b, prompt in enumerate(PROMPTS):
        start = encode_prompt(tokenizer, prompt.prompt)
        response = rollout.batch.response_ids[b][rollout.batch.response_mask[b]].tolist()
        ids = torch.tensor([start + response])
        with torch.no_grad():
            tables = [(m(ids).logits[0].double() / 0.8).log_softmax(-1)
                      for m in (policy, ref_policy)]
            values = value_model.model(ids).logits[0, :, 0]
            score = reward_model(ids, torch.ones_like(ids).bool()).item()
        assert rollout.finished[b].item() == (response[-1] == EOS)
        expected = score if response[-1] == EOS else -3.5
        assert rollout.scores[b].item() == pytest.approx(expected, abs=2e-5)
        for t, token in enumerate(response):
            at = len(start) + t - 1
            entropy = -(tables[0][at].exp() * tables[0][at]).sum().item()
            for name, wanted in (("old_logprobs", tables[0][at, token].item()),
                                 ("ref_logprobs", tables[1][at, token].item()),
                                 ("values", values[at].item()), ("entropy", entropy)):
                assert getattr(rollout, name)[b, t].item() == pytest.approx(wanted, abs=5e-5)


def test_both_finished_and_cut_off_episodes_were_seen(rollout):
    rollout, _ = rollout
    assert set(rollout.finished.tolist()) == {True, False}
    width = rollout.batch.response_ids.shape
    for name in ("old_logprobs", "ref_logprobs", "values", "entropy"):
        assert getattr(rollout, name).shape == width and not getattr(rollout, name).requires_grad
    assert rollout.scores.shape == rollout.finished.shape == (len(PROMPTS),)
    assert rollout.scores[~rollout.finished].eq(-3.5).all()


def test_missing_eos_gets_the_fixed_score_however_good_the_text_is(networks, tokenizer):
    policy, ref_policy, value_model, _ = networks
    rollout, _ = collect_rollout(
        policy, ref_policy, value_model, lambda prompts, responses, batch: torch.full((6,), 100.0),
        tokenizer, PROMPTS, CONFIG, make_generator(0, "r"))
    assert rollout.scores.tolist() == [100.0 if f else -3.5 for f in rollout.finished.tolist()]


def test_the_score_function_sees_prompts_texts_and_tokens(networks, tokenizer):
    policy, ref_policy, value_model, _ = networks
    seen = {}

    def score(prompts, responses, batch):
        seen.update(prompts=prompts, responses=responses, batch=batch)
        return torch.zeros(len(prompts))

    rollout, responses = collect_rollout(policy, ref_policy, value_model, score, tokenizer, PROMPTS,
                                         CONFIG, make_generator(0, "r"))
    assert seen["prompts"] == PROMPTS and seen["responses"] == responses
    for b, text in enumerate(responses):
        ids = [i for i in rollout.batch.response_ids[b].tolist() if i not in (EOS, PAD)]
        assert text == tokenizer.decode(ids).strip()
    assert seen["batch"] is rollout.batch


def test_rows_are_episodes_of_their_own(rollout):
    rollout, _ = rollout
    index = torch.tensor([4, 1])
    part = rollout.rows(index)
    for f in dataclasses.fields(rollout):
        if f.name != "batch":
            assert torch.equal(getattr(part, f.name), getattr(rollout, f.name)[index])
    for f in dataclasses.fields(rollout.batch):
        assert torch.equal(getattr(part.batch, f.name), getattr(rollout.batch, f.name)[index])


def test_a_prompt_that_does_not_fit_is_named(networks, tokenizer):
    policy, ref_policy, value_model, reward_model = networks
    long = Prompt("p77", "word " * 30)
    with pytest.raises(DataError, match="p77: prompt has .* tokens, at most 40 fit; raise "
                                        "ppo.max_prompt_tokens"):
        collect_rollout(policy, ref_policy, value_model, score_with(reward_model), tokenizer,
                        [*PROMPTS, long], CONFIG, make_generator(0, "r"))


# ---------------------------------------------------------------- the sampler

def test_every_prompt_comes_once_before_any_comes_again():
    sampler = PromptSampler(PROMPTS, 4, seed=0)
    drawn = [p.id for i in range(9) for p in sampler.draw(i)]  # 36 draws, 6 epochs
    epochs = [drawn[i:i + 6] for i in range(0, 36, 6)]
    assert all(Counter(epoch) == Counter(p.id for p in PROMPTS) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_a_draw_depends_on_seed_and_iteration_only():
    in_order = PromptSampler(PROMPTS, 4, seed=3)
    draws = [in_order.draw(i) for i in range(8)]
    for i in (7, 2, 5, 0):
        assert PromptSampler(PROMPTS, 4, seed=3).draw(i) == draws[i]
        assert in_order.draw(i) == draws[i]
    assert [PromptSampler(PROMPTS, 4, seed=4).draw(i) for i in range(8)] != draws


def test_more_episodes_than_prompts_is_fine_and_no_prompts_are_an_error():
    assert len(PromptSampler(PROMPTS[:2], 5, seed=0).draw(3)) == 5
    with pytest.raises(ValueError, match="PPO needs at least one prompt"):
        PromptSampler([], 5, seed=0)
