"""Rewards by loops and GAE as the double sum that defines it, in Python floats."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerances import EXACT, FP64
from toys import GARBAGE, random_mask

from rlhf_mini.advantages import compute_gae, compute_rewards


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loop_rewards(scores, old, ref, mask, kl_coef):
    rewards = np.zeros(mask.shape)
    for b in range(len(scores)):
        length = int(mask[b].sum())
        for t in range(length):
            rewards[b, t] = -kl_coef * (float(old[b, t]) - float(ref[b, t]))
        rewards[b, length - 1] += float(scores[b])
    return rewards


def double_sum(rewards, values, mask, gamma, lam):
    """A_t = sum_l (gamma lambda)^l delta_(t+l), with V = 0 after the last real token."""
    advantages = np.zeros(mask.shape)
    for b in range(len(mask)):
        n = int(mask[b].sum())
        v = [float(x) for x in values[b, :n]] + [0.0]
        delta = [float(rewards[b, t]) + gamma * v[t + 1] - v[t] for t in range(n)]
        for t in range(n):
            advantages[b, t] = sum((gamma * lam) ** i * delta[t + i] for i in range(n - t))
    return advantages


@given(st.integers(0, 1000), st.integers(1, 5), st.integers(1, 9), st.floats(0, 2))
def test_rewards_equal_the_loop(seed, rows, width, kl_coef):
    mask = random_mask(rows, width, seed)
    scores, old, ref = draw(seed, rows), draw(seed + 1, rows, width), draw(seed + 2, rows, width)
    rewards = compute_rewards(scores, old, ref, mask, kl_coef)
    np.testing.assert_allclose(rewards, loop_rewards(scores, old, ref, mask, kl_coef), **FP64)


def test_total_reward_is_score_minus_beta_times_kl():
    mask, scores = random_mask(6, 8), draw(0, 6)
    old, ref = draw(1, 6, 8), draw(2, 6, 8)
    total = compute_rewards(scores, old, ref, mask, 0.3).sum(1)
    kl = [sum((old[b, t] - ref[b, t]).item() for t in range(int(mask[b].sum()))) for b in range(6)]
    np.testing.assert_allclose(total, scores.numpy() - 0.3 * np.array(kl), **FP64)


def test_a_policy_that_left_the_reference_is_punished():
    # Tokens that the policy likes more than the reference does cost reward.
    mask = torch.ones(1, 3, dtype=torch.bool)
    rewards = compute_rewards(torch.zeros(1), torch.full((1, 3), -1.0), torch.full((1, 3), -2.0),
                              mask, 0.5)
    assert rewards.tolist() == [[-0.5, -0.5, -0.5]]


@given(st.integers(0, 1000), st.integers(1, 4), st.integers(1, 9), st.floats(0, 1), st.floats(0, 1))
def test_gae_equals_the_double_sum(seed, rows, width, gamma, lam):
    mask = random_mask(rows, width, seed)
    rewards, values = draw(seed, rows, width), draw(seed + 1, rows, width)
    advantages, returns = compute_gae(rewards, values, mask, gamma, lam)
    expected = double_sum(rewards, values, mask, gamma, lam)
    np.testing.assert_allclose(advantages, expected, **FP64)
    np.testing.assert_allclose(returns, np.where(mask, expected + values.numpy(), 0), **FP64)


def test_lambda_zero_is_the_one_step_error():
    mask = random_mask(5, 7)
    rewards, values = draw(3, 5, 7), draw(4, 5, 7)
    advantages, _ = compute_gae(rewards, values, mask, 0.9, 0.0)
    for b in range(5):
        n = int(mask[b].sum())
        for t in range(n):
            following = values[b, t + 1] if t + 1 < n else 0.0
            expected = rewards[b, t] + 0.9 * following - values[b, t]
            assert advantages[b, t].item() == pytest.approx(float(expected), rel=1e-12)


def test_lambda_one_is_the_discounted_return_minus_the_value():
    mask = random_mask(5, 7)
    rewards, values = draw(5, 5, 7), draw(6, 5, 7)
    advantages, returns = compute_gae(rewards, values, mask, 0.9, 1.0)
    for b in range(5):
        n = int(mask[b].sum())
        for t in range(n):
            to_go = sum(0.9 ** (s - t) * rewards[b, s].item() for s in range(t, n))
            assert returns[b, t].item() == pytest.approx(to_go, rel=1e-10)
            assert advantages[b, t].item() == pytest.approx(to_go - values[b, t].item(), rel=1e-9)


def test_perfect_values_give_no_advantage():
    # The score comes at the end, nothing is discounted: the true value of every state is the score.
    mask = random_mask(4, 6)
    scores = draw(7, 4)
    same = draw(8, 4, 6)
    rewards = compute_rewards(scores, same, same, mask, 0.1)
    advantages, returns = compute_gae(rewards, scores[:, None].expand(4, 6), mask, 1.0, 0.95)
    np.testing.assert_allclose(advantages, 0, atol=1e-12)
    np.testing.assert_allclose(returns[mask], scores[:, None].expand(4, 6)[mask], **FP64)


def test_the_end_of_the_row_is_the_end_of_the_episode():
    # One real token; what the value model says of the padding behind it must not be bootstrapped.
    mask = torch.tensor([[True, False, False]])
    advantages, returns = compute_gae(torch.tensor([[1.0, 5.0, 5.0]]),
                                      torch.tensor([[0.25, 100.0, 100.0]]), mask, 1.0, 0.95)
    assert advantages.tolist() == [[0.75, 0, 0]]
    assert returns.tolist() == [[1.0, 0, 0]]


@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_off_the_mask_changes_nothing(garbage):
    mask, results = random_mask(4, 6), []
    for filler in (0.0, garbage):
        old, ref, values = (torch.where(mask, draw(s, 4, 6), filler) for s in (1, 2, 3))
        rewards = compute_rewards(draw(0, 4), old, ref, mask, 0.1)
        results.append((rewards, *compute_gae(torch.where(mask, rewards, filler), values, mask,
                                              1.0, 0.95)))
    for clean, dirty in zip(*results, strict=True):
        torch.testing.assert_close(dirty, clean, **EXACT)
        assert not dirty[~mask].any()


@pytest.mark.parametrize("padding", [1, 3])
def test_more_padding_changes_nothing(padding):
    mask = random_mask(4, 6)
    rewards, values = draw(8, 4, 6), draw(9, 4, 6)
    wide = [torch.nn.functional.pad(x, (0, padding)) for x in (rewards, values, mask)]
    for narrow, padded in zip(compute_gae(rewards, values, mask, 1.0, 0.95),
                              compute_gae(*wide, 1.0, 0.95), strict=True):
        torch.testing.assert_close(padded[:, :6], narrow, **EXACT)
