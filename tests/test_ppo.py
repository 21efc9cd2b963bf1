"""Step 3b: losses against NumPy, the clip case by case, a bandit with a closed form, the loop."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections import Counter

import numpy as np
import pytest
import reference_ppo
import torch
from conftest import make_policy
from hypothesis import given
from hypothesis import strategies as st
from tolerances import EXACT, FP32, FP64
from toys import (
    EOS,
    GARBAGE,
    PAD,
    V,
    make_batch,
    make_reward_model,
    make_talker,
    random_mask,
    same_weights,
    stop_at,
)

from rlhf_mini import ppo
from rlhf_mini.advantages import compute_gae, compute_rewards
from rlhf_mini.config import PPOConfig
from rlhf_mini.data import Prompt
from rlhf_mini.kl import estimate_kl
from rlhf_mini.models import ValueModel, compute_response_logprobs, freeze
from rlhf_mini.ppo import (
    Targets,
    build_optimizer,
    compute_rollout_stats,
    compute_targets,
    policy_loss,
    ptx_loss,
    train_ppo,
    update,
    update_ema,
    update_minibatch,
    value_loss,
)
from rlhf_mini.rollout import Rollout, collect_rollout, score_with
from rlhf_mini.runtime import METRICS, NonFiniteLoss, load_checkpoint, make_generator, read_metrics
from rlhf_mini.tensors import gather_logprobs, masked_whiten
from rlhf_mini.training import warmup_factor

# ---------------------------------------------------------------- the whole step against NumPy


def problem(seed: int, rows: int = 5, width: int = 6, vocab: int = 7) -> dict[str, np.ndarray]:
    """Tables for a step in which every case of both clips occurs."""
    rng = np.random.default_rng(seed)
    logits, old_logits, ref_logits = (rng.normal(size=(rows, width, vocab)) for _ in range(3))
    values, old_values = rng.normal(size=(2, rows, width))
    return dict(
        logits=old_logits + 0.3 * logits, old_logits=old_logits, ref_logits=ref_logits,
        actions=rng.integers(vocab, size=(rows, width)), values=old_values + 0.3 * values,
        old_values=old_values, scores=rng.normal(size=rows),
        lengths=[width, *rng.integers(1, width + 1, size=rows - 1)])


@pytest.mark.parametrize("seed", range(8))
def test_a_whole_step_equals_the_numpy_reference(seed):
    p = problem(seed)
    loss, logits_gradient, values_gradient = reference_ppo.ppo_step(
        **p, kl_coef=0.2, gamma=0.98, lam=0.9, clip_range=0.2, value_clip_range=0.2, vf_coef=0.1)
    t = {name: torch.tensor(x) for name, x in p.items()}
    mask = torch.arange(6) < t["lengths"][:, None]
    logits, values = t["logits"].requires_grad_(), t["values"].requires_grad_()
    logprobs, old, ref = (gather_logprobs(x, t["actions"])
                          for x in (logits, t["old_logits"], t["ref_logits"]))
    batch = dataclasses.replace(make_batch(1), response_mask=mask)
    rollout = Rollout(batch, old, ref, t["old_values"], t["scores"], mask[:, 0], old)
    targets = compute_targets(rollout, 0.2, PPOConfig(gamma=0.98, gae_lambda=0.9))
    p_loss, _ = policy_loss(logprobs, old, targets.advantages, mask, 0.2)
    v_loss, _ = value_loss(values, t["old_values"], targets.returns, mask, 0.2)
    ours = p_loss + 0.1 * v_loss
    assert ours.item() == pytest.approx(loss, rel=1e-8)
    for mine, theirs in zip(torch.autograd.grad(ours, [logits, values]),
                            (logits_gradient, values_gradient), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-7, atol=1e-10)


def test_targets_whiten_advantages_but_not_returns():
    p = problem(0)
    t = {name: torch.tensor(x) for name, x in p.items()}
    mask = torch.arange(6) < t["lengths"][:, None]
    old, ref = (gather_logprobs(t[x], t["actions"]) for x in ("old_logits", "ref_logits"))
    batch = dataclasses.replace(make_batch(1), response_mask=mask)
    rollout = Rollout(batch, old, ref, t["old_values"], t["scores"], mask[:, 0], old)
    raw = reference_ppo.advantages_of(
        reference_ppo.rewards_of(p["scores"], old.numpy(), ref.numpy(), p["lengths"], 0.2),
        p["old_values"], p["lengths"], 1.0, 0.95)
    white = compute_targets(rollout, 0.2, PPOConfig())
    plain = compute_targets(rollout, 0.2, PPOConfig(whiten_advantages=False))
    np.testing.assert_allclose(plain.advantages, raw, **FP64)
    assert abs(white.advantages[mask].mean()) < 1e-10
    assert white.advantages[mask].std(correction=0).item() == pytest.approx(1, abs=1e-6)
    for targets in (white, plain):
        np.testing.assert_allclose(targets.returns, np.where(mask, raw + p["old_values"], 0),
                                   **FP64)


# ---------------------------------------------------------------- policy loss

CASES = [  # advantage, ratio, loss, does a gradient flow?
    (2.0, 1.0, -2.0, True),
    (2.0, 1.1, -2.2, True),
    (2.0, 1.5, -2.4, False),  # above the range, good: clipped at 1.2
    (2.0, 0.5, -1.0, True),  # below the range, good: must be able to come back
    (-2.0, 1.0, 2.0, True),
    (-2.0, 0.9, 1.8, True),
    (-2.0, 0.5, 1.6, False),  # below the range, bad: clipped at 0.8
    (-2.0, 1.5, 3.0, True),  # above the range, bad: must be able to come back
    (0.0, 1.5, 0.0, False),
]


@pytest.mark.parametrize("advantage, ratio, expected, flows", CASES)
def test_every_case_of_the_clip(advantage, ratio, expected, flows):
    logprobs = torch.tensor([[math.log(ratio) - 1.0]], dtype=torch.float64, requires_grad=True)
    loss, stats = policy_loss(logprobs, torch.full((1, 1), -1.0, dtype=torch.float64),
                              torch.tensor([[advantage]], dtype=torch.float64),
                              torch.ones(1, 1).bool(), 0.2)
    loss.backward()
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    assert logprobs.grad.item() == pytest.approx(-advantage * ratio if flows else 0, abs=1e-12)
    assert stats["clip_fraction"] == float(advantage != 0 and not flows)
    assert stats["ratio_mean"] == stats["ratio_max"] == pytest.approx(ratio)


@given(st.integers(0, 10_000), st.floats(0.05, 0.5))
def test_policy_loss_and_gradient_equal_the_reference(seed, clip_range):
    rng, mask = np.random.default_rng(seed), random_mask(4, 5, seed)
    new, old, advantages = rng.normal(size=(3, 4, 5)) * [[[0.5]], [[0.5]], [[2.0]]]
    expected, gradient = reference_ppo.policy_loss_of(new, old, advantages,
                                                      mask.sum(1).tolist(), clip_range)
    logprobs = torch.tensor(new, requires_grad=True)
    loss, _ = policy_loss(logprobs, torch.tensor(old), torch.tensor(advantages), mask, clip_range)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-10, abs=1e-12)
    np.testing.assert_allclose(logprobs.grad, gradient, rtol=1e-9, atol=1e-12)


def test_policy_loss_by_finite_differences():
    mask, generator = random_mask(3, 4), torch.Generator().manual_seed(1)
    new, old, advantages = torch.randn(3, 3, 4, dtype=torch.float64, generator=generator)
    assert torch.autograd.gradcheck(
        lambda x: policy_loss(x, old, advantages, mask, 0.2)[0], new.requires_grad_())


def test_stats_of_the_policy_loss_are_masked_means():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    log_ratio = torch.tensor([[0.5, -0.1, 9.0], [-0.4, 9.0, 9.0]], dtype=torch.float64)
    advantages = torch.tensor([[1.0, 1.0, 1.0], [-1.0, 1.0, 1.0]], dtype=torch.float64)
    _, stats = policy_loss(log_ratio, torch.zeros(2, 3, dtype=torch.float64), advantages, mask, 0.2)
    ratios = np.exp([0.5, -0.1, -0.4])
    assert stats["ratio_mean"] == pytest.approx(ratios.mean())
    assert stats["ratio_max"] == pytest.approx(ratios.max())
    assert stats["ratio_min"] == pytest.approx(ratios.min())
    assert stats["clip_fraction"] == pytest.approx(2 / 3)
    # KL(old || new) over tokens drawn from old: k3 with d = old - new
    d = np.array([-0.5, 0.1, 0.4])
    assert stats["approx_kl"] == pytest.approx((np.exp(-d) - 1 + d).mean())
    assert stats["policy_loss"] == pytest.approx((-1.2 - ratios[1] + 0.8) / 3)


# ---------------------------------------------------------------- value loss

VALUE_CASES = [  # V, V_old, R, loss with range 0.2, gradient
    (1.0, 1.0, 3.0, 0.5 * 4.0, -2.0),  # inside the range
    (1.5, 1.0, 3.0, 0.5 * 1.8**2, 0.0),  # moved far towards R: the clipped error is larger
    (0.5, 1.0, 3.0, 0.5 * 2.5**2, -2.5),  # moved away from R: the plain error is larger
    (1.5, 1.0, 0.0, 0.5 * 1.5**2, 1.5),
    (0.5, 1.0, 0.0, 0.5 * 0.8**2, 0.0),
]


@pytest.mark.parametrize("value, old, target, expected, gradient", VALUE_CASES)
def test_every_case_of_the_value_clip(value, old, target, expected, gradient):
    values = torch.tensor([[value]], dtype=torch.float64, requires_grad=True)
    loss, stats = value_loss(values, torch.tensor([[old]]).double(),
                             torch.tensor([[target]]).double(), torch.ones(1, 1).bool(), 0.2)
    loss.backward()
    assert loss.item() == stats["value_loss"] == pytest.approx(expected)
    assert values.grad.item() == pytest.approx(gradient)
    assert stats["value_clip_fraction"] == float(gradient == 0)


@given(st.integers(0, 10_000))
def test_value_loss_and_gradient_equal_the_reference(seed):
    rng, mask = np.random.default_rng(seed), random_mask(4, 5, seed)
    new, old, returns = rng.normal(size=(3, 4, 5))
    expected, gradient = reference_ppo.value_loss_of(new, old, returns, mask.sum(1).tolist(), 0.4)
    values = torch.tensor(new, requires_grad=True)
    loss, _ = value_loss(values, torch.tensor(old), torch.tensor(returns), mask, 0.4)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-10)
    np.testing.assert_allclose(values.grad, gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_off_the_mask_changes_neither_losses_nor_gradients(garbage):
    mask, results = random_mask(4, 5), []
    parts = torch.randn(6, 4, 5, dtype=torch.float64)
    for filler in (0.0, garbage):
        new, old, advantages, values, old_values, returns = torch.where(mask, parts, filler)
        new.requires_grad_(), values.requires_grad_()
        p_loss, p_stats = policy_loss(new, old, advantages, mask, 0.2)
        v_loss, v_stats = value_loss(values, old_values, returns, mask, 0.2)
        gradients = torch.autograd.grad(p_loss + v_loss, [new, values])
        results.append((p_stats | v_stats, gradients))
    assert results[0][0] == results[1][0]
    for clean, dirty in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(dirty, clean, **EXACT)


def test_eight_gradients_of_one_episode_are_the_gradient_of_eight():
    # Episodes of equal length: 8 minibatches of 1, averaged, are 1 minibatch of 8.
    mask, generator = torch.ones(8, 5).bool(), torch.Generator().manual_seed(2)
    new, old, advantages, values, old_values, returns = torch.randn(
        6, 8, 5, dtype=torch.float64, generator=generator)
    new.requires_grad_(), values.requires_grad_()

    def gradients(rows):
        loss = (policy_loss(new[rows], old[rows], advantages[rows], mask[rows], 0.2)[0]
                + value_loss(values[rows], old_values[rows], returns[rows], mask[rows], 0.2)[0])
        return torch.autograd.grad(loss, [new, values])

    together = gradients(slice(None))
    singles = [gradients(slice(i, i + 1)) for i in range(8)]
    for i in range(2):
        accumulated = torch.stack([s[i] for s in singles]).mean(0)
        np.testing.assert_allclose(accumulated, together[i], **FP64)


# ---------------------------------------------------------------- a bandit with a closed form

def solve_bandit(kind: str, beta: float = 0.5, iterations: int = 300) -> tuple[float, float]:
    """PPO on one token out of six; total variation to ref * exp(r / beta) / Z, and to ref."""
    reward = torch.tensor([0.0, 0.2, 1.0, -0.5, 0.6, 0.1])
    ref = torch.tensor([0.40, 0.25, 0.05, 0.15, 0.10, 0.05])
    optimum = ref * (reward / beta).exp()
    optimum /= optimum.sum()
    logits = ref.log().clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.05)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, iterations)
    for _ in range(iterations):
        with torch.no_grad():  # every action as often as the policy takes it: no sampling noise
            counts = (5_000 * logits.softmax(-1)).round().long()
        actions = torch.repeat_interleave(torch.arange(6), counts)[:, None]
        mask = torch.ones_like(actions).bool()
        old = logits.detach().log_softmax(-1)[actions]
        ref_logprobs = ref.log()[actions]
        if kind == "k1":
            rewards = compute_rewards(reward[actions[:, 0]], old, ref_logprobs, mask, beta)
        else:
            rewards = reward[actions] - beta * estimate_kl(old, ref_logprobs, kind)
        baseline = rewards.mean().expand_as(rewards)
        advantages, _ = compute_gae(rewards, baseline, mask, 1.0, 0.95)
        for _ in range(2):
            logprobs = logits.log_softmax(-1)[actions]
            optimizer.zero_grad()
            policy_loss(logprobs, old, advantages, mask, 0.2)[0].backward()
            optimizer.step()
        schedule.step()
    policy = logits.detach().softmax(-1)
    return ((policy - optimum).abs().sum() / 2).item(), ((policy - ref).abs().sum() / 2).item()


def test_ppo_reaches_the_closed_form_of_the_kl_regularised_bandit():
    error, moved = solve_bandit("k1")
    assert moved > 0.25  # the optimum is far from where it began
    assert error < 0.003


def test_k3_in_the_reward_converges_to_another_policy():
    error, _ = solve_bandit("k3")
    assert error > 0.1


# ---------------------------------------------------------------- an update of real models

PROMPTS = [Prompt(f"p{i}", text) for i, text in enumerate(
    ["Where is Anna?", "Who?", "Tell me about the town.", "Bread", "The river?", "Why so cold?",
     "A mill?", "Two schools"])]
CONFIG = PPOConfig(iterations=4, episodes=8, minibatches=2, epochs=2, lr=1e-3, value_lr=1e-3,
                   warmup_iterations=2, kl_coef=0.05, max_prompt_tokens=40, max_response_tokens=8,
                   ptx_rows=2, checkpoint_every=1)
CORPUS = torch.randint(2, V, (20, 16), generator=torch.Generator().manual_seed(0))


def even_share(prompts, responses, batch):
    """The share of a response's tokens with an even id; EOS does not count."""
    counted = batch.response_mask & (batch.response_ids != EOS)
    even = (counted & (batch.response_ids % 2 == 0)).sum(1)
    return even / counted.sum(1).clamp(min=1)


def setting(tokenizer, config=CONFIG, seed=0, eos_bias=3.0):
    policy = make_talker(tokenizer, seed, eos_bias)
    value_model = ValueModel.from_reward_model(make_reward_model(policy, seed))
    rollout, _ = collect_rollout(policy, freeze(policy), value_model, even_share, tokenizer,
                                 PROMPTS, config, make_generator(seed, "r"))
    return policy, value_model, rollout, compute_targets(rollout, config.kl_coef, config)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_ratio_is_one_on_the_first_minibatch(tokenizer, temperature):
    config = dataclasses.replace(CONFIG, temperature=temperature)
    policy, value_model, rollout, targets = setting(tokenizer, config)
    stats = update(policy, value_model, build_optimizer(policy, value_model, config), rollout,
                   targets, config, make_generator(0, "m"))
    assert stats["first_ratio_error"] < 1e-5
    assert stats["ratio_max"] > 1 + 1e-4  # later minibatches moved


@pytest.mark.parametrize("ptx_coef", [0.0, 0.5])
def test_two_threads_take_the_steps_of_one_and_the_same_again(tokenizer, ptx_coef):
    config = dataclasses.replace(CONFIG, ptx_coef=ptx_coef)
    rows = torch.randint(V, (8, 12), generator=torch.Generator().manual_seed(0))
    found = []
    for threads in (1, 2, 2):
        policy, value_model, rollout, targets = setting(tokenizer, config)
        torch.set_num_threads(threads)
        try:
            stats = update(policy, value_model, build_optimizer(policy, value_model, config),
                           rollout, targets, config, make_generator(0, "m"),
                           rows if ptx_coef else None)
        finally:
            torch.set_num_threads(1)
        found.append([torch.tensor(list(stats.values())), *policy.parameters(),
                      *value_model.parameters()])
    for one, two, again in zip(*found, strict=True):
        assert torch.equal(two, again)
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)


def test_dropout_would_show_in_the_first_ratio(tokenizer):
    policy, value_model, rollout, targets = setting(tokenizer)
    for block in policy.transformer.h:
        block.mlp.dropout.p = 0.1
    policy.train()
    stats = update(policy, value_model, build_optimizer(policy, value_model, CONFIG), rollout,
                   targets, CONFIG, make_generator(0, "m"))
    assert stats["first_ratio_error"] > 1e-3


def sgd(policy, value_model, lr=1.0):
    return torch.optim.SGD([{"params": list(policy.parameters())},
                            {"params": list(value_model.parameters())}], lr=lr)


def flat(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_one_step_descends_policy_plus_value_plus_ptx(tokenizer):
    # With plain SGD the step is minus the gradient: of the policy loss, of vf_coef times the value
    # loss, of ptx_coef times the loss that transformers computes from labels.
    config = dataclasses.replace(CONFIG, ptx_coef=0.7, vf_coef=0.3, max_grad_norm=1e9)
    policy, value_model, rollout, targets = setting(tokenizer, config)
    twin, value_twin = copy.deepcopy(policy), copy.deepcopy(value_model)
    mask = rollout.batch.response_mask
    logprobs, _ = compute_response_logprobs(twin, rollout.batch)
    loss, _ = policy_loss(logprobs, rollout.old_logprobs, targets.advantages, mask, 0.2)
    rows = CORPUS[:4]
    (loss + 0.7 * twin(rows, labels=rows).loss).backward()
    (0.3 * value_loss(value_twin(rollout.batch), rollout.values, targets.returns, mask,
                      0.2)[0]).backward()
    for model in (twin, value_twin):
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p -= p.grad
    update_minibatch(policy, value_model, sgd(policy, value_model), rollout, targets, config, rows,
                     0)
    for mine, theirs in ((policy, twin), (value_model, value_twin)):
        torch.testing.assert_close(flat(mine), flat(theirs), rtol=1e-4, atol=1e-5)  # float32 step


def test_ptx_adds_its_coefficient_times_the_gradient_of_the_language_model_loss(tokenizer):
    steps, start = {}, None
    for coef in (0.0, 0.5, 1.0):
        config = dataclasses.replace(CONFIG, ptx_coef=coef, max_grad_norm=1e9)
        policy, value_model, rollout, targets = setting(tokenizer, config)
        start = flat(policy)
        update_minibatch(policy, value_model, sgd(policy, value_model), rollout, targets, config,
                         CORPUS[:4] if coef else None, 0)
        steps[coef] = flat(policy) - start
    policy = setting(tokenizer)[0]
    policy(CORPUS[:4], labels=CORPUS[:4]).loss.backward()
    gradient = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten()
                          for p in policy.parameters()])
    for coef in (0.5, 1.0):
        # float32 differences of steps of size 1: absolute error a few 1e-6
        torch.testing.assert_close(steps[coef] - steps[0.0], -coef * gradient, rtol=1e-3, atol=1e-5)


def test_ptx_loss_is_the_labels_loss_of_transformers(policy):
    loss, stats = ptx_loss(policy, CORPUS)
    torch.testing.assert_close(loss, policy(CORPUS, labels=CORPUS).loss, **FP32)
    assert stats == {"ptx_loss": loss.item()}


@pytest.mark.parametrize("rows", [None, CORPUS[:4]], ids=["PPO", "PPO-ptx"])
def test_gradients_are_clipped_for_each_model_alone(tokenizer, rows):
    config = dataclasses.replace(CONFIG, max_grad_norm=1e-3, vf_coef=10.0)
    policy, value_model, rollout, targets = setting(tokenizer, config)
    before = flat(policy), flat(value_model)
    stats = update_minibatch(policy, value_model, sgd(policy, value_model), rollout, targets,
                             config, rows, 0)
    assert stats["grad_norm"] > 1e-3
    for model, start in ((policy, before[0]), (value_model, before[1])):
        assert (flat(model) - start).norm().item() == pytest.approx(1e-3, rel=1e-2)


def test_every_episode_is_used_once_per_epoch(tokenizer, monkeypatch):
    seen = []

    def spy(policy, value_model, optimizer, rollout, targets, config, ptx_rows, step, together):
        seen.append((rollout.scores.tolist(), None if ptx_rows is None else ptx_rows.tolist()))
        return {"ratio_max": 1.0, "ratio_min": 1.0, "approx_kl": 0.0}

    monkeypatch.setattr(ppo, "update_minibatch", spy)
    policy, value_model, rollout, targets = setting(tokenizer)
    rollout.scores = torch.arange(8.0)
    update(policy, value_model, None, rollout, targets, CONFIG, make_generator(0, "m"), CORPUS[:8])
    epochs = [seen[0][0] + seen[1][0], seen[2][0] + seen[3][0]]
    assert [sorted(epoch) for epoch in epochs] == [list(range(8))] * 2
    assert epochs[0] != epochs[1]
    assert sum((rows for _, rows in seen), []) == CORPUS[:8].tolist()


def test_every_episode_keeps_its_own_targets(tokenizer, monkeypatch):
    def spy(policy, value_model, optimizer, rollout, targets, *rest):
        names = rollout.scores[:, None].expand_as(targets.returns)
        assert torch.equal(targets.advantages, names) and torch.equal(targets.returns, -names)
        return {"ratio_max": 1.0, "ratio_min": 1.0, "approx_kl": 0.0}

    monkeypatch.setattr(ppo, "update_minibatch", spy)
    policy, value_model, rollout, targets = setting(tokenizer)
    rollout.scores = torch.arange(8.0)
    names = rollout.scores[:, None].expand_as(targets.returns)
    update(policy, value_model, None, rollout, Targets(names, -names), CONFIG,
           make_generator(0, "m"))


@pytest.mark.parametrize("rows", [4, 6, 7])
def test_any_number_of_corpus_rows_is_split_over_the_minibatches(tokenizer, monkeypatch, rows):
    counts = []
    monkeypatch.setattr(ppo, "update_minibatch", lambda *a: (
        counts.append(len(a[6])), {"ratio_max": 1.0, "ratio_min": 1.0, "approx_kl": 0.0})[1])
    policy, value_model, rollout, targets = setting(tokenizer)
    update(policy, value_model, None, rollout, targets, CONFIG, make_generator(0, "m"),
           CORPUS[:rows])
    assert len(counts) == 4 and sum(counts) == rows and min(counts) > 0


def test_an_update_stops_when_it_left_the_rollout_policy(tokenizer, monkeypatch):
    calls = []
    monkeypatch.setattr(ppo, "update_minibatch", lambda *a: (
        calls.append(1), {"ratio_max": 1.0, "ratio_min": 1.0, "approx_kl": 0.03})[1])
    policy, value_model, rollout, targets = setting(tokenizer)
    for limit, expected in ((0.0, 4), (0.02, 2), (0.05, 4)):
        calls.clear()
        config = dataclasses.replace(CONFIG, update_kl_stop=limit)
        update(policy, value_model, None, rollout, targets, config, make_generator(0, "m"))
        assert len(calls) == expected


def test_rollout_stats_are_masked(tokenizer):
    _, _, rollout, targets = setting(tokenizer)
    rollout, targets = rollout.rows(torch.arange(5)), Targets(
        targets.advantages[:5], targets.returns[:5])
    mask = rollout.batch.response_mask
    assert not mask.all() and mask.shape[0] != mask.shape[1]  # a wrong axis would show
    generator = torch.Generator().manual_seed(5)
    rollout.ref_logprobs = rollout.old_logprobs + torch.randn(mask.shape, generator=generator)
    for name in ("old_logprobs", "values", "entropy"):
        setattr(rollout, name, torch.where(mask, getattr(rollout, name), 1e6))
    stats = compute_rollout_stats(rollout, targets)
    kl = [[(rollout.old_logprobs[b, t] - rollout.ref_logprobs[b, t]).item()
           for t in range(int(mask[b].sum()))] for b in range(5)]
    returns, values = targets.returns[mask].numpy(), rollout.values[mask].numpy()
    expected = {
        "kl_per_sequence": np.mean([sum(row) for row in kl]),
        "kl_per_token": np.mean(sum(kl, [])),
        "entropy": rollout.entropy[mask].mean().item(),
        "response_tokens": np.mean([len(row) for row in kl]),
        "eos_rate": np.mean(rollout.finished.tolist()),
        "score": rollout.scores.mean().item(), "score_std": rollout.scores.std().item(),
        "value_mean": values.mean(), "returns_mean": returns.mean(),
        "advantage_mean": (returns - values).mean(),
        "advantage_std": (returns - values).std(),
        "explained_variance": 1 - (returns - values).var() / returns.var()}
    for name, value in expected.items():
        assert stats[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    assert set(stats) == set(expected)


# ---------------------------------------------------------------- schedules and averages

def test_warmup_runs_from_a_tenth_to_one_and_stays():
    factors = [warmup_factor(i, 10) for i in range(15)]
    np.testing.assert_allclose(factors, [0.1 + 0.09 * i for i in range(10)] + [1.0] * 5, **FP64)
    assert warmup_factor(0, 0) == 1


def test_both_learning_rates_follow_the_warmup(tokenizer):
    config = dataclasses.replace(CONFIG, value_lr=5e-3)
    seen = []

    def spy(policy, value_model, optimizer, *rest):
        seen.append([group["lr"] for group in optimizer.param_groups])
        return update(policy, value_model, optimizer, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "update", spy)
        _, _, history = train(tokenizer, config=config)
    np.testing.assert_allclose(seen, [[1e-4, 5e-4], [5.5e-4, 2.75e-3], [1e-3, 5e-3],
                                      [1e-3, 5e-3]], **FP64)
    assert [row["lr"] for row in history] == [lrs[0] for lrs in seen]


def test_adam_has_the_epsilon_of_the_config(policy):
    value_model = ValueModel.from_reward_model(make_reward_model(policy))
    optimizer = build_optimizer(policy, value_model, CONFIG)
    assert {group["eps"] for group in optimizer.param_groups} == {1e-5}
    owned = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(owned) == sorted(id(p) for m in (policy, value_model) for p in m.parameters())


def test_ema_keeps_decay_of_the_average():
    average, model = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    expected = 0.9 * average.weight.detach() + 0.1 * model.weight.detach()
    update_ema(average, model, 0.9)
    torch.testing.assert_close(average.weight.detach(), expected, **FP32)
    update_ema(average, model, 0.0)
    torch.testing.assert_close(average.weight, model.weight, **EXACT)


# ---------------------------------------------------------------- the loop

def train(tokenizer, directory=None, config=CONFIG, seed=0, score=even_share, corpus=None,
          grade=None):
    policy = make_talker(tokenizer, seed, eos_bias=3.0)
    value_model = ValueModel.from_reward_model(make_reward_model(policy, seed))
    history = train_ppo(policy, value_model, score, tokenizer, PROMPTS, config, seed, corpus,
                        directory, grade)
    return policy, value_model, history


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_policy_learns_what_is_scored(tokenizer, seed):
    config = dataclasses.replace(CONFIG, iterations=12, episodes=64, lr=3e-3, kl_coef=0.01,
                                 value_lr=3e-3)
    _, _, history = train(tokenizer, config=config, seed=seed)
    scores = [row["score"] for row in history]
    assert np.mean(scores[-3:]) > np.mean(scores[:2]) + 0.25
    assert history[0]["kl_per_sequence"] == pytest.approx(0, abs=1e-4)
    assert history[-1]["kl_per_sequence"] > 0.3
    assert all(row["first_ratio_error"] < 1e-4 for row in history)


def test_a_large_kl_coefficient_keeps_the_policy_near_the_reference(tokenizer):
    config = dataclasses.replace(CONFIG, iterations=8, episodes=64, lr=3e-3, value_lr=3e-3)
    kl = {}
    for coef in (0.0, 5.0):
        _, _, history = train(tokenizer, config=dataclasses.replace(config, kl_coef=coef))
        kl[coef] = history[-1]["kl_per_sequence"]
    assert kl[5.0] < kl[0.0] / 3


RESUME = dataclasses.replace(CONFIG, iterations=5, episodes=8, ema_decay=0.8, kl_target=0.01,
                             kl_horizon=20, ptx_coef=0.5, checkpoint_every=2)


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_a_stopped_training_resumes_bit_for_bit(tokenizer, tmp_path, monkeypatch, stop):
    unbroken = train(tokenizer, tmp_path / "unbroken", RESUME, corpus=CORPUS)
    stop_at(monkeypatch, stop)
    with pytest.raises(KeyboardInterrupt):
        train(tokenizer, tmp_path / "broken", RESUME, corpus=CORPUS)
    resumed = train(tokenizer, tmp_path / "broken", RESUME, corpus=CORPUS)
    assert same_weights(resumed[0], unbroken[0])  # the averaged policy
    assert same_weights(resumed[1], unbroken[1])
    assert resumed[2] == unbroken[2]
    betas = [row["kl_coef"] for row in unbroken[2]]
    assert len(set(betas)) == 5  # the adaptive coefficient moved, and so had to be kept
    left, right = (load_checkpoint(tmp_path / name / "checkpoint")
                   for name in ("unbroken", "broken"))
    assert left[1] == right[1]
    assert all(torch.equal(left[0][k], right[0][k]) for k in left[0])


def test_training_is_deterministic(tokenizer):
    one, two = (train(tokenizer) for _ in range(2))
    assert same_weights(one[0], two[0]) and same_weights(one[1], two[1]) and one[2] == two[2]
    assert one[2] != train(tokenizer, seed=1)[2]


def test_with_ema_the_policy_returned_is_the_average(tokenizer, monkeypatch):
    seen = []
    monkeypatch.setattr(ppo, "update_ema", lambda average, model, decay: (
        update_ema(average, model, decay), seen.append((flat(model), flat(average)))))
    start = flat(make_talker(tokenizer, 0, eos_bias=3.0))
    policy, _, _ = train(tokenizer, config=dataclasses.replace(CONFIG, ema_decay=0.9))
    average = start
    for current, _ in seen:
        average = 0.9 * average + 0.1 * current
    torch.testing.assert_close(flat(policy), average, rtol=1e-4, atol=1e-6)
    assert not torch.equal(seen[-1][0], seen[-1][1])
    policy, _, _ = train(tokenizer)  # without: the last weights
    assert torch.equal(flat(policy), seen[-1][0])


def test_the_start_policy_is_the_reference_and_stays(tokenizer, tmp_path):
    train(tokenizer, tmp_path)
    tensors, _ = load_checkpoint(tmp_path / "checkpoint")
    start = make_talker(tokenizer, 0, eos_bias=3.0).state_dict()
    assert all(torch.equal(tensors[f"module/ref_policy/{k}"], v) for k, v in start.items()
               if f"module/ref_policy/{k}" in tensors)
    assert not torch.equal(tensors["module/policy/lm_head.weight"], start["lm_head.weight"])


def test_the_penalty_uses_the_current_coefficient(tokenizer):
    config = dataclasses.replace(CONFIG, kl_target=1.0, kl_horizon=100, kl_coef=0.5)
    _, _, history = train(tokenizer, config=config)
    beta = 0.5
    for row in history:
        assert row["kl_coef"] == pytest.approx(beta, rel=1e-12)
        error = min(max(row["kl_per_sequence"] / 1.0 - 1, -0.2), 0.2)
        beta *= 1 + error * 8 / 100
    assert history[-1]["kl_coef"] < 0.5  # far below the target: beta falls


def test_training_stops_at_the_kl_limit_and_stays_stopped(tokenizer, tmp_path):
    config = dataclasses.replace(CONFIG, iterations=10, lr=2e-2, kl_coef=0.0, kl_stop=0.3)
    policy, _, history = train(tokenizer, tmp_path, config)
    kl = [row["kl_per_sequence"] for row in history]
    assert len(kl) < 10 and kl[-1] > 0.3 and max(kl[:-1]) <= 0.3
    assert "policy_loss" not in history[-1] and "policy_loss" in history[-2]
    again, _, more = train(tokenizer, tmp_path, config)  # a resumed run does not go on
    assert more == history and same_weights(again, policy)


def test_gold_is_logged_and_never_trained_on(tokenizer):
    plain, _, _ = train(tokenizer)
    graded, _, history = train(tokenizer, grade=lambda prompt, response: float(len(response)))
    assert same_weights(plain, graded)
    assert all(row["gold"] > 0 for row in history)


def test_every_metric_is_in_the_glossary(tokenizer, tmp_path):
    _, _, history = train(tokenizer, tmp_path, RESUME, corpus=CORPUS, grade=lambda p, r: 0.0)
    assert set().union(*history) - {"step"} <= set(METRICS)
    assert read_metrics(tmp_path / "metrics.jsonl") == history


def test_a_nan_score_names_the_iteration_and_keeps_what_is_sound(tokenizer, tmp_path):
    calls = []

    def poisoned(prompts, responses, batch):
        calls.append(1)
        scores = even_share(prompts, responses, batch)
        return scores * math.nan if len(calls) == 3 else scores

    with pytest.raises(NonFiniteLoss, match="step 2, PPO minibatch: loss is nan"):
        train(tokenizer, tmp_path, score=poisoned)
    tensors, meta = load_checkpoint(tmp_path / "checkpoint")
    assert meta["step"] == 2
    assert all(torch.isfinite(x).all() for x in tensors.values() if x.is_floating_point())
    resumed = train(tokenizer, tmp_path)  # and with a sound score it goes on to the same end
    assert same_weights(resumed[0], train(tokenizer)[0])


def test_a_non_finite_loss_changes_nothing(tokenizer):
    policy, value_model, rollout, targets = setting(tokenizer)
    before = copy.deepcopy(policy), copy.deepcopy(value_model)
    bad = Targets(targets.advantages * math.inf, targets.returns)
    with pytest.raises(NonFiniteLoss):
        update_minibatch(policy, value_model, build_optimizer(policy, value_model, CONFIG), rollout,
                         bad, CONFIG, None, 0)
    assert same_weights(policy, before[0]) and same_weights(value_model, before[1])


def test_ptx_without_corpus_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="ptx_coef > 0 mixes in pretraining text, and there is "
                                         "none: give a corpus or set ptx_coef=0"):
        train(tokenizer, config=dataclasses.replace(CONFIG, ptx_coef=1.0))


def test_ptx_draws_rows_of_the_corpus(tokenizer, monkeypatch):
    seen = Counter()
    monkeypatch.setattr(ppo, "ptx_loss", lambda policy, rows: (
        seen.update(map(tuple, rows.tolist())), ptx_loss(policy, rows))[1])
    config = dataclasses.replace(CONFIG, ptx_coef=0.1)
    _, _, history = train(tokenizer, config=config, corpus=CORPUS)
    assert sum(seen.values()) == 2 * 2 * 2 * 4  # rows x minibatches x epochs x iterations
    assert set(seen) <= set(map(tuple, CORPUS.tolist())) and len(seen) > 8
    assert all(row["ptx_loss"] > 0 for row in history)


def test_a_reward_model_scores_as_any_function_does(tokenizer):
    policy = make_policy(tokenizer)
    reward_model = make_reward_model(policy)
    batch = make_batch(3)
    with torch.no_grad():
        torch.testing.assert_close(score_with(reward_model)([], [], batch),
                                   reward_model(batch.input_ids, batch.attention_mask), **EXACT)


def test_whitening_is_that_of_the_rollout_and_not_of_the_minibatch(tokenizer):
    policy, value_model, rollout, targets = setting(tokenizer)
    mask = rollout.batch.response_mask
    part = masked_whiten(targets.advantages[:4], mask[:4])
    assert (part - targets.advantages[:4]).abs().max() > 1e-3
    assert PAD not in rollout.batch.response_ids[mask]
