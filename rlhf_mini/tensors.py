"""Masked arithmetic and log-probabilities, in pure torch.

One mask polarity everywhere: True marks a real token that takes part (EOS included).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    r"""Average the entries where the mask is True, $\sum_i m_i x_i / \sum_i m_i$.

    Args:
        x: any shape.
        mask: bool, same shape as `x`.
        dim: the dimension to reduce; None reduces all.

    Returns:
        A scalar, or `x` without `dim`. Where nothing is selected the mean is 0.

    >>> x = torch.tensor([1.0, 3.0, 99.0])
    >>> masked_mean(x, x < 9)
    tensor(2.)
    """
    selected = torch.where(mask, x, 0)  # not x * mask: 0 * inf would be nan
    if dim is None:
        return selected.sum() / mask.sum().clamp(min=1)
    return selected.sum(dim) / mask.sum(dim).clamp(min=1)


def masked_var(x: Tensor, mask: Tensor) -> Tensor:
    r"""Compute the biased variance of the selected entries, $\frac1n\sum (x_i - \bar x)^2$.

    Args:
        x: any shape.
        mask: bool, same shape as `x`.

    Returns:
        A scalar; 0 where fewer than two entries are selected.
    """
    x = torch.where(mask, x, 0)  # a gradient through (inf - mean)**2 would be nan
    return masked_mean((x - masked_mean(x, mask)) ** 2, mask)


def masked_whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    r"""Scale the selected entries to variance 1 and, unless told otherwise, to mean 0.

    Args:
        x: any shape.
        mask: bool, same shape as `x`.
        shift_mean: False keeps the mean, as some implementations do for rewards; for advantages
            the mean must go.

    Returns:
        Shape of `x`; 0 where the mask is False.

    Source: Huang et al. 2024 (arXiv 2403.17031), detail 18.
    """
    x = torch.where(mask, x, 0)
    mean = masked_mean(x, mask)
    whitened = (x - mean) * torch.rsqrt(masked_var(x, mask) + 1e-8)
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask, whitened, 0)


def gather_logprobs(logits: Tensor, token_ids: Tensor) -> Tensor:
    r"""Return $\log \mathrm{softmax}(\text{logits})$ at the given tokens.

    Args:
        logits: (..., V), where `logits[..., t, :]` predicts `token_ids[..., t]`.
        token_ids: (...) int.

    Returns:
        (...) log-probabilities in nats.
    """
    return -F.cross_entropy(
        logits.flatten(0, -2), token_ids.flatten(), reduction="none"
    ).view(token_ids.shape)


def compute_entropy(logits: Tensor) -> Tensor:
    r"""Return the entropy of each next-token distribution, $-\sum_v p_v \log p_v$, in nats.

    Args:
        logits: (..., V).

    Returns:
        (...) entropies, from 0 to ln V.
    """
    logprobs = logits.log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


def temper(logits: Tensor, temperature: float) -> Tensor:
    r"""Return logits (..., V) divided by T; T = 0 (greedy) leaves them as they are, as does 1."""
    return logits if temperature in (0, 1) else logits / temperature


def pick_tokens(logits: Tensor, temperature: float, noise: Tensor | None) -> Tensor:
    r"""Pick tokens from $\mathrm{softmax}(\text{logits}/T)$: invert its distribution function.

    Each token owns an interval of [0, 1) as long as its probability; the noise says whose turn it
    is. So the same noise picks the same tokens, whoever computes the logits.

    Args:
        logits: (B, V).
        temperature: T; 0 takes the likeliest token.
        noise: (B,) from [0, 1); not needed at temperature 0.

    Returns:
        (B,) int.
    """
    if temperature == 0:
        return logits.argmax(-1)
    below = temper(logits, temperature).softmax(-1).cumsum(-1)
    u = noise[:, None] * below[:, -1:]
    return torch.searchsorted(below, u, right=True)[:, 0].clamp(max=below.shape[1] - 1)


def unmask(values: Tensor, mask: Tensor) -> Tensor:
    """Put values back where the mask is True; the inverse of `x[mask]`.

    Args:
        values: (N,), N = number of True in the mask.
        mask: (B, T) bool.

    Returns:
        (B, T), 0 off the mask.
    """
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def last_index(mask: Tensor) -> Tensor:
    """Return the index of the last True in each row.

    Args:
        mask: (B, T) bool with at least one True in each row.

    Returns:
        (B,) int.

    Raises:
        ValueError: if a row has no True.
    """
    if not bool(mask.any(-1).all()):
        row = int((~mask.any(-1)).nonzero()[0, 0])
        raise ValueError(f"mask row {row} selects no token; every row needs at least one")
    positions = torch.arange(mask.shape[-1], device=mask.device)
    return torch.where(mask, positions, -1).max(-1).values
