"""The stages joined: demonstrations, rankings, reward model, PPO, on a preference that is known."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from conftest import make_policy
from toys import PAD, make_reward_model

from rlhf_mini.config import EvaluationConfig, PPOConfig, RankingConfig, RewardConfig, SFTConfig
from rlhf_mini.data import Demonstration, Prompt
from rlhf_mini.evaluation import compute_win_rate, evaluate_policy
from rlhf_mini.models import ValueModel, freeze
from rlhf_mini.ppo import train_ppo
from rlhf_mini.ranking import collect_rankings
from rlhf_mini.reward import (
    center_reward_model,
    compare_pairs,
    compute_accuracy,
    encode_rankings,
    score_rankings,
    train_reward_model,
)
from rlhf_mini.rollout import score_with
from rlhf_mini.sft import train_sft

LIMITS = dict(max_prompt_tokens=30, max_response_tokens=24)


def warmth(response: str) -> float:
    """The truth that the reward model has to find: the share of warm among four words."""
    return min(response.split().count("warm"), 4) / 4


def grade(prompt, response):
    return {"gold": warmth(response)}


def rank(prompt, responses, rng):
    """A labeler with a little noise."""
    gold = [warmth(r) for r in responses]
    judged = [round(g + rng.gauss(0, 0.1), 1) for g in gold]
    order = sorted(set(judged), reverse=True)
    return tuple(order.index(j) + 1 for j in judged), tuple(gold), 0


def demonstrations(count: int, seed: int) -> list[Demonstration]:
    rng = random.Random(seed)
    return [Demonstration(f"d{i}", f"Bread {i % 8}?", " ".join(rng.choices(["warm", "cold"], k=4)))
            for i in range(count)]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_chain_finds_what_the_labelers_want(tokenizer, seed):
    policy = make_policy(tokenizer, seed)
    train_sft(policy, tokenizer, demonstrations(96, seed), demonstrations(16, seed + 50),
              SFTConfig(epochs=12, batch_size=16, lr=1e-2, dropout=0.0, min_eos_rate=0.8, **LIMITS),
              seed)
    sft = freeze(policy)

    prompts = [Prompt(f"p{i}", f"Bread {i % 8}?") for i in range(48)]
    rankings = collect_rankings(sft, tokenizer, prompts, rank, RankingConfig(
        k_high=6, decoys=0, max_response_tokens=24), seed)
    reward_model = make_reward_model(sft, seed)
    # a response that was cut off at 24 tokens is one longer once it ends in EOS
    config = RewardConfig(epochs=5, batch_size=8, lr=3e-3, max_prompt_tokens=30,
                          max_response_tokens=34)
    train_reward_model(reward_model, tokenizer, rankings[:36], rankings[36:], config, seed)
    center_reward_model(reward_model, tokenizer, demonstrations(16, seed + 50), config)
    scores = score_rankings(reward_model, encode_rankings(tokenizer, rankings[36:], config), PAD)
    margins, _, _ = compare_pairs([s.numpy() for s in scores],
                                  [np.array(r.gold) for r in rankings[36:]])
    assert compute_accuracy(margins) > 0.8

    value_model = ValueModel.from_reward_model(reward_model)
    # With kl_coef 0.05 and twice the learning rate the policy finds "warmarmarm" on some seeds.
    history = train_ppo(policy, value_model, score_with(reward_model), tokenizer, prompts,
                        PPOConfig(iterations=10, episodes=48, lr=1e-3, kl_coef=0.2, **LIMITS),
                        seed, grade=lambda p, r: warmth(r))
    assert all(row["first_ratio_error"] < 1e-4 for row in history)
    assert history[-1]["score"] > history[0]["score"] + 0.3

    # new prompts, T = 1: better than the model it started from, and still ending its responses
    held_out = [Prompt(f"t{i}", f"Bread {i}?", split="test") for i in range(8, 10)] * 12
    settings = EvaluationConfig(samples=2, max_response_tokens=24, bootstrap=200)
    before, after = (evaluate_policy(model, sft, tokenizer, held_out, grade, reward_model, settings,
                                     seed) for model in (sft, policy))
    assert after.measures["gold"].mean() > before.measures["gold"].mean() + 0.15
    win_rate = compute_win_rate(after.measures["gold"], before.measures["gold"], settings)
    assert win_rate["mean"] > 0.6 and win_rate["low"] > 0.5
    assert after.measures["eos_rate"].mean() > 0.8
    assert after.measures["kl"].mean() > before.measures["kl"].mean() == 0
    assert not any(torch.isnan(p).any() for p in policy.parameters())
