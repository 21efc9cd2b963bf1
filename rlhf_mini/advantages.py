"""From scores to advantages: shaped rewards, GAE, returns."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_mini.tensors import last_index


def compute_rewards(
    scores: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor, response_mask: Tensor,
    kl_coef: float,
) -> Tensor:
    r"""Spread the score and the KL penalty over the tokens.

    $r_t = -\beta\,(\log\pi_\mathrm{old}(a_t) - \log\pi_\mathrm{ref}(a_t))
    + \mathbb 1[t = \text{last}]\,\text{score}$

    Args:
        scores: (B,) from the reward model.
        old_logprobs: (B, T) nats, policy at rollout.
        ref_logprobs: (B, T) nats, frozen reference.
        response_mask: (B, T) bool, True on response tokens, EOS included.
        kl_coef: $\beta$, score units per nat.

    Returns:
        (B, T) rewards, 0 where the mask is False.

    Source: InstructGPT, equation 2; Ziegler et al. 2019, equation 2.
    """
    rewards = torch.where(response_mask, -kl_coef * (old_logprobs - ref_logprobs), 0)
    rows = torch.arange(len(scores), device=scores.device)
    return rewards.index_put((rows, last_index(response_mask)), scores, accumulate=True)


def compute_gae(
    rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    r"""Compute generalised advantage estimates and the returns the value model is trained on.

    $\delta_t = r_t + \gamma V_{t+1} - V_t$, with $V = 0$ after the last token;
    $A_t = \delta_t + \gamma\lambda A_{t+1}$; $R_t = A_t + V_t$.

    Args:
        rewards: (B, T).
        values: (B, T), `values[:, t]` predicted before token t is emitted.
        response_mask: (B, T) bool, True on response tokens; they come first in each row.
        gamma: discount, from 0 to 1.
        gae_lambda: $\lambda$, from 0 (one-step) to 1 (Monte Carlo).

    Returns:
        advantages (B, T) and returns (B, T), both 0 where the mask is False.

    Source: Schulman et al. 2016 (arXiv 1506.02438), equation 16.
    """
    values = torch.where(response_mask, values, 0)
    rewards = torch.where(response_mask, rewards, 0)
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = torch.where(
            response_mask[:, t], delta + gamma * gae_lambda * next_advantage, 0
        )
        advantages[:, t] = next_advantage
        next_value = values[:, t]
    return advantages, torch.where(response_mask, advantages + values, 0)
