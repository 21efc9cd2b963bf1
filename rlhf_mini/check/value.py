"""Checks of chapter 9, value function and GAE."""

from __future__ import annotations

from collections.abc import Callable, Generator

import torch
from torch import Tensor

from rlhf_mini.check.core import Property, close, exercise, shaped


def _trajectories() -> tuple[Tensor, Tensor, Tensor]:
    """Return rewards, values and mask (3, 5) of responses with 5, 3 and 1 tokens."""
    generator = torch.Generator().manual_seed(9)
    rewards, values = torch.randn(2, 3, 5, generator=generator)
    mask = torch.arange(5) < torch.tensor([[5], [3], [1]])
    return torch.where(mask, rewards, 0), values, mask


def _returns(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Discounted sums (B, T) of what is still to come, by the definition."""
    result = torch.zeros_like(rewards)
    for b, t in mask.nonzero().tolist():
        result[b, t] = sum(gamma ** (k - t) * rewards[b, k] for k in range(t, int(mask[b].sum())))
    return result


@exercise("ex-gae")
def gae(f: Callable) -> Generator[Property, None, str]:
    """Generalised advantage estimation: f(rewards, values, mask, gamma, gae_lambda) -> (B, T)."""
    rewards, values, mask = _trajectories()
    yield shaped(f(rewards, values, mask, 1.0, 0.95), (3, 5), "advantages")
    one = f(rewards[2:, :1], values[2:, :1], mask[2:, :1], 1.0, 0.95)
    yield ("terminal step", close(one, rewards[2:, :1] - values[2:, :1]),
           "At the last token nothing follows: V behind the end is 0, so the advantage is what the "
           "token paid less what was expected before it.")
    after = torch.where(mask, values, 0).roll(-1, 1)
    after[:, -1] = 0
    deltas = torch.where(mask, rewards + 0.9 * after - values, 0)
    full = mask.all(1)
    yield ("lambda = 0", close(f(rewards, values, mask, 0.9, 0.0)[full], deltas[full]),
           "With lambda = 0 the advantage of a token is its own TD error: its reward, plus gamma "
           "times the value of the next state, less the value of this one.")
    yield ("lambda = 1", close(f(rewards, values, mask, 0.9, 1.0)[full],
                               (_returns(rewards, mask, 0.9) - values)[full]),
           "With lambda = 1 the critic is a baseline only: discounted return minus value.")
    dirty = torch.where(mask, values, 100.0)
    yield ("mask", close(f(rewards, dirty, mask, 0.9, 0.5)[mask],
                         f(rewards, torch.where(mask, values, 0), mask, 0.9, 0.5)[mask]),
           "Values stand at padding too, since the critic reads every column. What is there must "
           "not reach a real token: the response ends where its mask ends.")
    yield ("zero at padding", close(f(rewards, dirty, mask, 0.9, 0.5)[~mask],
                                    torch.zeros(int((~mask).sum()))),
           "Entries behind the end of a response are no advantages; they should be 0.")
    slow = torch.zeros(3, 5)
    for b, t in mask.nonzero().tolist():
        slow[b, t] = sum((0.9 * 0.5) ** (k - t) * deltas[b, k] for k in range(t, 5))
    yield ("in between", close(f(rewards, values, mask, 0.9, 0.5), slow),
           "Both ends are right, but not lambda = 0.5: the TD error k steps ahead has the weight "
           "(gamma lambda) to the power k.")
    return "You have written compute_gae of rlhf_mini/advantages.py."


@exercise("ex-gae-horizon")
def horizon(f: Callable) -> Generator[Property, None, str]:
    """Mean number of steps that GAE looks ahead: f(lam, left) -> one number."""
    yield shaped(f(0.5, 3), ())
    yield ("lambda = 0", close(f(0.0, 7), 1.0), "At lambda = 0 GAE looks exactly one step ahead.")
    yield ("lambda near 1", close(f(1 - 1e-7, 7), 7.0, 1e-4),
           "Close to lambda = 1 nearly all weight lies on the look to the end.")
    yield ("one token left", close(f(0.6, 1), 1.0),
           "With one token left there is only one step to look ahead, whatever lambda is.")
    for lam, left in ((0.8, 4), (0.95, 10), (0.3, 2)):
        weights = [(1 - lam) * lam ** (n - 1) for n in range(1, left)] + [lam ** (left - 1)]
        yield ("weights", close(f(lam, left), sum(n * w for n, w in enumerate(weights, 1))),
               "The mean does not fit the weights: (1 - lambda) lambda^(n-1) for n < N, and all "
               "the rest, lambda^(N-1), on n = N.")
    return "The weight of all n >= k is a power of lambda; the mean is the sum of these weights."
