"""RLOO: advantages by brute force, an unbiased gradient by enumeration, the loop."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import reference_ppo
import torch
from tolerances import EXACT, FP64
from toys import EOS, GARBAGE, PAD, make_batch, make_reward_model, make_talker, same_weights

from rlhf_mini.config import PPOConfig
from rlhf_mini.data import Prompt
from rlhf_mini.models import compute_response_logprobs, freeze
from rlhf_mini.rloo import compute_returns, rloo_advantages, rloo_loss, train_rloo
from rlhf_mini.rollout import PromptSampler, Rollout, collect_rollout, score_with
from rlhf_mini.runtime import NonFiniteLoss, make_generator

# ---------------------------------------------------------------- advantages


@pytest.mark.parametrize("samples", [2, 3, 5])
def test_each_response_is_compared_with_the_mean_of_the_others(samples):
    returns = np.random.default_rng(samples).normal(size=4 * samples)
    wanted = []
    for i, own in enumerate(returns):
        first = i - i % samples
        others = [returns[j] for j in range(first, first + samples) if j != i]
        wanted.append(own - sum(others) / len(others))
    found = rloo_advantages(torch.tensor(returns), samples)
    np.testing.assert_allclose(found, wanted, **FP64)
    np.testing.assert_allclose(found.view(4, samples).sum(1), np.zeros(4), atol=1e-12)


def test_what_concerns_a_whole_prompt_cancels():
    returns = torch.randn(3, 4, dtype=torch.float64)
    easy = torch.tensor([[0.0], [100.0], [-7.0]], dtype=torch.float64)
    torch.testing.assert_close(rloo_advantages((returns + easy).flatten(), 4),
                               rloo_advantages(returns.flatten(), 4), **FP64)


@pytest.mark.parametrize("samples, message", [(1, "samples = 1: expected at least 2"),
                                              (0, "expected at least 2"),
                                              (4, "6 episodes are no multiple of samples = 4")])
def test_numbers_that_do_not_fit_are_errors(samples, message):
    with pytest.raises(ValueError, match=message):
        rloo_advantages(torch.zeros(6), samples)


# ---------------------------------------------------------------- the gradient, by enumeration

# All responses of a policy with two tokens, a and EOS, and at most three of them: EOS, a EOS,
# a a EOS, a a a. Its logits at the three places are its only parameters.
RESPONSES = [(1,), (0, 1), (0, 0, 1), (0, 0, 0)]
SCORES = torch.tensor([0.3, -1.0, 2.0, 0.7], dtype=torch.float64)
BETA = 0.4


def tables() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (3, 2) of the policy, with gradient, and of the reference."""
    generator = torch.Generator().manual_seed(3)
    logits, ref = torch.randn(2, 3, 2, dtype=torch.float64, generator=generator)
    return logits.requires_grad_(), ref


def token_logprobs(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(4, 3) log-probabilities of the tokens of all responses, and their mask."""
    table, rows = logits.log_softmax(-1), []
    for response in RESPONSES:
        row = [table[t, token] for t, token in enumerate(response)]
        rows.append(torch.stack(row + [table.new_zeros(())] * (3 - len(row))))
    mask = torch.tensor([[t < len(r) for t in range(3)] for r in RESPONSES])
    return torch.stack(rows), mask


def expected_return(logits: torch.Tensor, ref: torch.Tensor) -> torch.Tensor:
    """E[score] - beta KL, exactly."""
    ours, theirs = (token_logprobs(x)[0].sum(1) for x in (logits, ref))
    assert ours.exp().sum().item() == pytest.approx(1)
    return (ours.exp() * (SCORES - BETA * (ours - theirs))).sum()


def rollout_of(indices, logits, ref) -> Rollout:
    logprobs, mask = token_logprobs(logits)
    batch = dataclasses.replace(make_batch(1), response_mask=mask[indices])
    old, theirs = logprobs.detach()[indices], token_logprobs(ref)[0][indices]
    return Rollout(batch, old, theirs, torch.zeros_like(old), SCORES[indices], mask[indices, 0],
                   old)


@pytest.mark.parametrize("samples", [2, 3])
def test_the_gradient_is_an_unbiased_estimate_of_that_of_the_objective(samples):
    logits, ref = tables()
    wanted, = torch.autograd.grad(-expected_return(logits, ref), logits)
    mean = torch.zeros_like(logits)
    for drawn in itertools.product(range(4), repeat=samples):  # every possible batch
        indices = list(drawn)
        logprobs, mask = token_logprobs(logits)
        advantages = rloo_advantages(
            compute_returns(rollout_of(indices, logits, ref), BETA), samples)
        loss, _ = rloo_loss(logprobs[indices], advantages, mask[indices])
        gradient, = torch.autograd.grad(loss, logits)
        mean += logprobs[indices].sum().exp().detach() * gradient
    np.testing.assert_allclose(mean, wanted, **FP64)
    assert wanted.abs().max() > 0.1


def test_a_mean_that_holds_the_response_itself_shrinks_the_gradient():
    # the baseline of GRPO without its division: biased by the factor (k - 1) / k
    logits, ref = tables()
    wanted, = torch.autograd.grad(-expected_return(logits, ref), logits)
    mean = torch.zeros_like(logits)
    for drawn in itertools.product(range(4), repeat=2):
        indices = list(drawn)
        logprobs, mask = token_logprobs(logits)
        returns = compute_returns(rollout_of(indices, logits, ref), BETA)
        loss, _ = rloo_loss(logprobs[indices], returns - returns.mean(), mask[indices])
        mean += logprobs[indices].sum().exp().detach() * torch.autograd.grad(loss, logits)[0]
    np.testing.assert_allclose(mean, wanted / 2, **FP64)


# ---------------------------------------------------------------- loss and returns

def test_the_loss_is_the_weighted_sum_over_tokens():
    rng = np.random.default_rng(0)
    logprobs, advantages = rng.normal(-2, 1, size=(3, 4)), rng.normal(size=3)
    lengths = [4, 1, 2]
    wanted = -sum(advantages[b] * logprobs[b, :n].sum() for b, n in enumerate(lengths)) / 3
    mask = torch.arange(4) < torch.tensor(lengths)[:, None]
    logits = torch.tensor(logprobs, requires_grad=True)
    loss, stats = rloo_loss(logits, torch.tensor(advantages), mask)
    loss.backward()
    assert loss.item() == pytest.approx(wanted, rel=1e-12) == stats["policy_loss"]
    np.testing.assert_allclose(logits.grad, -advantages[:, None] / 3 * mask.numpy(), **FP64)


@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_off_the_mask_changes_nothing(garbage):
    mask, results = torch.tensor([[True, True, False]]), []
    for filling in (0.0, garbage):
        logprobs = torch.tensor([[-1.0, -2.0, filling]], requires_grad=True)
        loss, _ = rloo_loss(logprobs, torch.tensor([0.7]), mask)
        loss.backward()
        results.append((loss.detach(), logprobs.grad))
    torch.testing.assert_close(results[1], results[0], **EXACT)


def test_returns_are_the_sum_of_ppo_rewards():
    rng = np.random.default_rng(2)
    old, ref, scores = rng.normal(size=(3, 4)), rng.normal(size=(3, 4)), rng.normal(size=3)
    lengths = [4, 1, 3]
    wanted = reference_ppo.rewards_of(scores, old, ref, lengths, 0.3).sum(1)
    mask = torch.arange(4) < torch.tensor(lengths)[:, None]
    batch = dataclasses.replace(make_batch(1), response_mask=mask)
    old, ref, scores = map(torch.tensor, (old, ref, scores))
    rollout = Rollout(batch, old, ref, old, scores, mask[:, 0], old)
    np.testing.assert_allclose(compute_returns(rollout, 0.3), wanted, **FP64)


# ---------------------------------------------------------------- real models

PROMPTS = [Prompt(f"p{i}", text) for i, text in enumerate(
    ["Where is Anna?", "Who?", "Tell me about the town.", "Bread", "The river?", "Why so cold?",
     "A mill?", "Two schools"])]
CONFIG = PPOConfig(iterations=3, episodes=12, minibatches=1, lr=1e-3, warmup_iterations=2,
                   kl_coef=0.05, max_prompt_tokens=40, max_response_tokens=8)


def even_share(prompts, responses, batch):
    """Score: the share of even ids among the response's tokens, EOS and PAD not counted."""
    real = batch.response_mask & (batch.response_ids > max(EOS, PAD))
    even = real & (batch.response_ids % 2 == 0)
    return even.sum(1) / real.sum(1).clamp(min=1)


def train(tokenizer, config=CONFIG, samples=4, seed=0, **kwargs):
    policy = make_talker(tokenizer, seed, eos_bias=3.0)
    return policy, train_rloo(policy, even_share, tokenizer, PROMPTS, config, samples, seed,
                              **kwargs)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_policy_learns_what_is_scored(tokenizer, seed):
    config = dataclasses.replace(CONFIG, iterations=25, episodes=48, lr=5e-3, kl_coef=0.01)
    _, history = train(tokenizer, config, seed=seed)
    scores = [row["score"] for row in history]
    assert np.mean(scores[-3:]) > np.mean(scores[:2]) + 0.25
    assert history[0]["kl_per_sequence"] == pytest.approx(0, abs=1e-4)
    assert history[-1]["kl_per_sequence"] > 0.3


def test_a_large_kl_coefficient_keeps_the_policy_near_the_reference(tokenizer):
    kl = {}
    for coef in (0.0, 5.0):
        config = dataclasses.replace(CONFIG, iterations=24, episodes=48, lr=2e-3, kl_coef=coef)
        kl[coef] = train(tokenizer, config)[1][-1]["kl_per_sequence"]
    assert kl[5.0] < kl[0.0] / 3


def test_every_prompt_is_answered_as_often_as_it_should_be(tokenizer):
    seen = []

    def score(prompts, responses, batch):
        seen.append([p.id for p in prompts])
        return torch.zeros(len(prompts))

    policy = make_talker(tokenizer)
    train_rloo(policy, score, tokenizer, PROMPTS, CONFIG, 3, 0)
    assert len(seen) == 3
    for ids in seen:
        groups = [ids[i:i + 3] for i in range(0, 12, 3)]
        assert all(len(set(group)) == 1 for group in groups) and len(set(ids)) == 4
    assert seen[0] != seen[1]


def test_without_differences_between_the_samples_nothing_is_learnt(tokenizer):
    policy, start = make_talker(tokenizer), make_talker(tokenizer)
    config = dataclasses.replace(CONFIG, kl_coef=0.0, missing_eos_score=1.0)
    history = train_rloo(policy, lambda *_: torch.ones(12), tokenizer, PROMPTS, config, 4, 0)
    assert same_weights(policy, start) and history[-1]["grad_norm"] == 0


def test_one_step_is_adam_on_the_loss_with_the_warmed_up_rate(tokenizer):
    config = dataclasses.replace(CONFIG, iterations=1)
    trained, history = train(tokenizer, config)
    policy = make_talker(tokenizer, 0, eos_bias=3.0)
    ref = freeze(policy)
    drawn = [p for p in PromptSampler(PROMPTS, 3, 0).draw(0) for _ in range(4)]
    rollout, _ = collect_rollout(policy, ref, None, even_share, tokenizer, drawn, config,
                                 make_generator(0, "rollout", "0"))
    assert rollout.values.eq(0).all()
    returns = rollout.scores.view(3, 4)  # policy = reference: no penalty yet
    advantages = returns - (returns.sum(1, keepdim=True) - returns) / 3
    logprobs, _ = compute_response_logprobs(policy, rollout.batch)
    (-(advantages.flatten() * logprobs.sum(1)).sum() / 12).backward()
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-4, eps=1e-5)  # a tenth: warm-up
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
    assert history[0]["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    for ours, wanted in zip(trained.parameters(), policy.parameters(), strict=True):
        # 1e-6: Adam's first step is the sign of a gradient; rounding shows where that is near 0
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6)


def test_gold_is_logged_and_never_trained_on(tokenizer):
    plain, history = train(tokenizer)
    graded, with_gold = train(tokenizer, grade=lambda prompt, response: float(len(response)))
    assert same_weights(plain, graded)
    assert all("gold" not in row for row in history) and all("gold" in row for row in with_gold)


def test_training_is_deterministic_and_the_seed_matters(tokenizer):
    one, two = (train(tokenizer)[0] for _ in range(2))
    assert same_weights(one, two)
    policy = make_talker(tokenizer, 0, eos_bias=3.0)
    train_rloo(policy, even_share, tokenizer, PROMPTS, CONFIG, 4, seed=1)
    assert not same_weights(one, policy)


def test_a_reward_model_scores_as_any_function_does(tokenizer):
    policy = make_talker(tokenizer, 0, eos_bias=3.0)
    history = train_rloo(policy, score_with(make_reward_model(policy)), tokenizer, PROMPTS, CONFIG,
                         2, 0)
    assert all(np.isfinite(list(row.values())).all() for row in history)


def test_what_cannot_be_trained_on_is_an_error(tokenizer):
    policy = make_talker(tokenizer)
    with pytest.raises(ValueError, match="12 episodes are no multiple of samples = 5"):
        train_rloo(policy, even_share, tokenizer, PROMPTS, CONFIG, 5, 0)
    with pytest.raises(NonFiniteLoss, match="step 0"):
        train_rloo(policy, lambda *_: torch.full((12,), float("nan")), tokenizer, PROMPTS,
                   dataclasses.replace(CONFIG, missing_eos_score=0.0), 4, 0)
