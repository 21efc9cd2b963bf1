"""The KL divergence between policy and reference: exact, estimated, and its coefficient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def compute_exact_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    r"""Compute $\mathrm{KL}(\pi\|\pi_\mathrm{ref}) = \sum_v\pi_v\log(\pi_v/\pi_{\mathrm{ref},v})$.

    Args:
        logits: (..., V) of the policy.
        ref_logits: (..., V) of the reference.

    Returns:
        (...) nats, at least 0.
    """
    logprobs, ref_logprobs = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    return (logprobs.exp() * (logprobs - ref_logprobs)).sum(-1)


def estimate_kl(logprobs: Tensor, ref_logprobs: Tensor, kind: str = "k1") -> Tensor:
    r"""Estimate $\mathrm{KL}(\pi \| \pi_\mathrm{ref})$ from tokens sampled from $\pi$.

    With $d = \log\pi(a) - \log\pi_\mathrm{ref}(a)$: k1 is $d$ (unbiased, may be negative), k2 is
    $d^2/2$ (biased, never negative), k3 is $e^{-d} - 1 + d$ (unbiased, never negative). The reward
    uses k1: its gradient is the one of the KL; k3 is for logging only.

    Args:
        logprobs: (...) nats, under the policy that sampled the tokens.
        ref_logprobs: (...) nats, under the reference.
        kind: "k1", "k2" or "k3".

    Returns:
        (...) nats per token.

    Raises:
        ValueError: for another kind.

    Source: Schulman 2020, "Approximating KL divergence".
    """
    d = logprobs - ref_logprobs
    if kind == "k1":
        return d
    if kind == "k2":
        return d**2 / 2
    if kind == "k3":
        return torch.expm1(-d) + d
    raise ValueError(f"kind {kind!r}: expected 'k1', 'k2' or 'k3'")


@dataclass
class KLController:
    r"""The coefficient $\beta$ of the KL penalty: fixed, or steered towards a target.

    After each rollout of n episodes, with $e = \mathrm{clip}(\mathrm{KL}/\mathrm{target} - 1,
    -0.2, 0.2)$: $\beta \leftarrow \beta (1 + e\, n / \mathrm{horizon})$.

    Args:
        kl_coef: $\beta$, the current coefficient.
        target: nats per sequence; 0 keeps $\beta$ fixed.
        horizon: episodes over which $\beta$ can change by about a fifth.

    Source: Ziegler et al. 2019 (arXiv 1909.08593), section 2.2; the horizon is their code's.
    """

    kl_coef: float
    target: float = 0.0
    horizon: int = 10_000

    def update(self, kl_per_sequence: float, episodes: int) -> None:
        """Move the coefficient after a rollout.

        Args:
            kl_per_sequence: nats, mean over the rollout.
            episodes: how many responses the rollout held.
        """
        if self.target > 0:
            error = min(max(kl_per_sequence / self.target - 1, -0.2), 0.2)
            self.kl_coef *= 1 + error * episodes / self.horizon
