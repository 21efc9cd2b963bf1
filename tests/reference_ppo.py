"""One PPO step in NumPy, float64, loops and hand-derived gradients: the oracle of test_ppo.py.

Nothing of rlhf_mini is imported here. Equation numbers are those of Schulman et al. 2017 (clip),
Schulman et al. 2015 (GAE) and Ziegler et al. 2019 (KL in the reward).
"""

from __future__ import annotations

import numpy as np


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """(..., V) log-probabilities."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def rewards_of(scores, old_logprobs, ref_logprobs, lengths, kl_coef) -> np.ndarray:
    """(B, T): minus beta times k1 at each token, plus the score at the last one."""
    rewards = np.zeros_like(old_logprobs)
    for b, n in enumerate(lengths):
        for t in range(n):
            rewards[b, t] = -kl_coef * (old_logprobs[b, t] - ref_logprobs[b, t])
        rewards[b, n - 1] += scores[b]
    return rewards


def advantages_of(rewards, values, lengths, gamma, lam) -> np.ndarray:
    """(B, T): the double sum over future TD errors, the value after the end being 0."""
    advantages = np.zeros_like(rewards)
    for b, n in enumerate(lengths):
        following = [*values[b, 1:n], 0.0]
        delta = [rewards[b, t] + gamma * following[t] - values[b, t] for t in range(n)]
        for t in range(n):
            advantages[b, t] = sum((gamma * lam) ** (s - t) * delta[s] for s in range(t, n))
    return advantages


def whitened(x, lengths) -> np.ndarray:
    """Mean 0 and variance 1 over the real tokens of all rows."""
    real = np.concatenate([x[b, :n] for b, n in enumerate(lengths)])
    out = np.zeros_like(x)
    for b, n in enumerate(lengths):
        out[b, :n] = (x[b, :n] - real.mean()) / np.sqrt(real.var() + 1e-8)
    return out


def policy_loss_of(logprobs, old_logprobs, advantages, lengths, clip_range):
    """Loss and its gradient with respect to logprobs, by the four cases of the clip."""
    total, gradient, tokens = 0.0, np.zeros_like(logprobs), sum(lengths)
    for b, n in enumerate(lengths):
        for t in range(n):
            ratio, a = np.exp(logprobs[b, t] - old_logprobs[b, t]), advantages[b, t]
            if a > 0 and ratio > 1 + clip_range:  # good and already likelier: stop
                total -= a * (1 + clip_range)
            elif a < 0 and ratio < 1 - clip_range:  # bad and already rarer: stop
                total -= a * (1 - clip_range)
            else:
                total -= a * ratio
                gradient[b, t] = -a * ratio / tokens
    return total / tokens, gradient


def value_loss_of(values, old_values, returns, lengths, clip_range):
    """Half the mean of the larger of two squared errors, and its gradient."""
    total, gradient, tokens = 0.0, np.zeros_like(values), sum(lengths)
    for b, n in enumerate(lengths):
        for t in range(n):
            v, old, target = values[b, t], old_values[b, t], returns[b, t]
            near = min(max(v, old - clip_range), old + clip_range)
            if (near - target) ** 2 > (v - target) ** 2:
                total += 0.5 * (near - target) ** 2  # the clipped value does not move with v
            else:
                total += 0.5 * (v - target) ** 2
                gradient[b, t] = (v - target) / tokens
    return total / tokens, gradient


def ppo_step(*, logits, old_logits, ref_logits, actions, values, old_values, scores, lengths,
             kl_coef, gamma, lam, clip_range, value_clip_range, vf_coef):
    """A whole step on tabular policies: loss, d loss / d logits (B, T, V), d loss / d values."""
    def taken(table):
        return np.take_along_axis(log_softmax(table), actions[..., None], -1)[..., 0]

    rewards = rewards_of(scores, taken(old_logits), taken(ref_logits), lengths, kl_coef)
    raw = advantages_of(rewards, old_values, lengths, gamma, lam)
    advantages, returns = whitened(raw, lengths), raw + old_values
    p_loss, p_gradient = policy_loss_of(taken(logits), taken(old_logits), advantages, lengths,
                                        clip_range)
    v_loss, v_gradient = value_loss_of(values, old_values, returns, lengths, value_clip_range)
    onehot = np.eye(logits.shape[-1])[actions]
    logits_gradient = p_gradient[..., None] * (onehot - np.exp(log_softmax(logits)))
    return p_loss + vf_coef * v_loss, logits_gradient, vf_coef * v_gradient
