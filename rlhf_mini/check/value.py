"""Checks of chapter 9, value function and GAE."""

from __future__ import annotations

from collections.abc import Callable, Generator

import torch
from torch import Tensor

from rlhf_mini.check.core import Property, close, exercise, finite, gradient, shaped


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


@exercise("ex-whiten")
def whiten(f: Callable) -> Generator[Property, None, str]:
    """Whitening of advantages: f(x, mask) -> (B, T)."""
    x, _, mask = _trajectories()
    full = torch.ones(2, 3, dtype=torch.bool)
    small = torch.tensor([[1.0, 2.0, 6.0], [3.0, -4.0, 4.0]])
    white = f(small, full)
    yield shaped(white, (2, 3), "whitened advantages")
    yield ("mean", close(white.mean(), 0.0),
           "What is praised for having been sampled is praised for nothing: over the real tokens "
           "of a rollout the mean should be gone.")
    yield ("variance", close((white**2).mean(), 1.0),
           "The variance over the real tokens should be 1. It is the mean of the squares, divided "
           "by the number of tokens and not by one less.")
    apart = torch.tensor([[5.0, 6.0, 7.0], [-5.0, -6.0, -7.0]])
    good = f(apart, full)[0]
    yield ("one rollout", bool((good > 0).all()),
           "The tokens of a good response have to stay above those of a bad one. Mean and variance "
           "belong to the rollout, not to each response: else its quality is what is taken away.")
    yield ("mask", close(f(torch.where(mask, x, 100.0), mask)[mask], f(x, mask)[mask]),
           "What stands at padding has changed the advantages of real tokens. Mean and variance "
           "are over real tokens only, and so is the number that they are divided by.")
    real = x[mask]
    expected = (real - real.mean()) / real.var(unbiased=False).sqrt()
    yield ("uneven lengths", close(f(x, mask)[mask], expected, 1e-4),
           "With responses of different lengths the result is another. Zeros at padding are "
           "entries as well, if you count them.")
    yield ("zero at padding", close(f(x, mask)[~mask], torch.zeros(int((~mask).sum()))),
           "Behind the end of a response stand no advantages; the entries should be 0.")
    dirty = f(torch.where(mask, x, torch.inf), mask)
    yield ("infinity at padding", close(dirty, f(x, mask)),
           "Padding may hold anything, infinity too, and 0 times infinity is not 0. Select the "
           "real entries; do not multiply with the mask.")
    yield ("equal entries", close(f(torch.full((2, 3), 0.7), full), torch.zeros(2, 3), 1e-2),
           "Where all advantages are equal there is nothing to scale, and division by a spread of "
           "0 gives nan. What is added to the variance, and why is it so small?")
    tiny = 1e-4 * small
    spread = (tiny.var(unbiased=False) + 1e-8).sqrt()
    yield ("small spread", close(f(tiny, full), (tiny - tiny.mean()) / spread, 1e-3),
           "These advantages differ by some ten-thousandths only, so what is added below the "
           "fraction shows. Is it as small as the task says, and is it added to the variance?")
    return "You have written masked_whiten of rlhf_mini/tensors.py."


def _cell(f: Callable, v: float, old: float, target: float) -> tuple[Tensor, Tensor]:
    """Return loss (1,) and gradient (1, 1) of one token's value with a clip range of 0.2."""
    cell, real = torch.tensor([[v], [old], [target]]), torch.ones(1, 1, dtype=torch.bool)
    loss = f(cell[:1], cell[1:2], cell[2:], real, 0.2)
    return loss, gradient(lambda x: f(x, cell[1:2], cell[2:], real, 0.2), cell[:1])


@exercise("ex-value-loss")
def value_loss(f: Callable) -> Generator[Property, None, str]:
    """Loss of the critic with a clip: f(values, old_values, returns, mask, range) -> ()."""
    returns, old, mask = _trajectories()
    values = old + 0.5 * torch.randn(3, 5, generator=torch.Generator().manual_seed(10))
    yield shaped(f(values, old, returns, mask, 0.2), (), "one loss")
    loss, slope = _cell(f, 1.0, 1.0, 3.0)
    yield ("at the rollout", close(loss, 2.0),
           "Before the first step the value is the old one, and the clip has nothing to do: half "
           "the square of what is missing to the return.")
    loss, slope = _cell(f, 1.1, 1.0, 3.0)
    yield ("within the range", close(loss, 0.5 * 1.9**2) and close(slope, [[-1.9]], 1e-4),
           "A guess that has moved by less than the range is judged as it is, and its gradient "
           "leads on to the return.")
    loss, slope = _cell(f, 1.5, 1.0, 3.0)
    yield ("edge of the range", close(loss, 0.5 * 1.8**2),
           "A guess that has run ahead towards the return, beyond the range, is judged as if it "
           "stood at the edge. The range lies around the value at the rollout, not around 0.")
    yield ("no gradient beyond", close(slope, [[0.0]]),
           "Beyond the range on the way to the return there is nothing more to gain from this "
           "rollout, so no gradient.")
    loss, slope = _cell(f, 0.5, 1.0, 3.0)
    yield ("a way back", close(loss, 0.5 * 2.5**2) and close(slope, [[-2.5]], 1e-4),
           "A guess that has left the range in the wrong direction needs its gradient to come "
           "back. Of the two errors the larger one counts.")
    two = torch.tensor([[True, True, False]])
    row = torch.tensor([[1.0, 2.0, 50.0]])
    yield ("mean over real tokens", close(f(row, row, row + 1, two, 0.2), 0.5),
           "The loss is a mean over real tokens: their sum, divided by their number.")
    there = torch.where(mask, values, torch.inf)
    grad = gradient(lambda v: f(v, old, returns, mask, 0.2), there)
    yield ("mask", close(f(there, old, returns, mask, 0.2), f(values, old, returns, mask, 0.2)) and
           finite(grad), "What stands at padding reaches the loss or its gradient. An infinite "
           "entry has to be replaced before it is squared, or its gradient is nan.")
    slow = [max((v - r) ** 2, (min(max(v, o - 0.4), o + 0.4) - r) ** 2) / 2 for v, o, r in
            zip(*(x[mask].tolist() for x in (values, old, returns)), strict=True)]
    yield ("tokens of all responses", close(f(values, old, returns, mask, 0.4),
                                            sum(slow) / len(slow)),
           "Each case alone is right, but not the mean over three responses of different length "
           "with a range of 0.4. Every token weighs the same, in a long response as in a short.")
    return "You have written value_loss of rlhf_mini/ppo.py."


@exercise("ex-explained-variance")
def explained_variance(f: Callable) -> Generator[Property, None, str]:
    """Share of the returns' variance that a critic predicts: f(values, returns, mask) -> ()."""
    returns, noise, mask = _trajectories()
    values = returns + 0.5 * noise
    yield shaped(f(values, returns, mask), (), "one number")
    yield ("perfect critic", close(f(returns, returns, mask), 1.0),
           "A critic that says every return beforehand leaves no variance: 1.")
    full, row = torch.ones(1, 4, dtype=torch.bool), torch.tensor([[1.0, -2.0, 4.0, 1.0]])
    yield ("constant critic", close(f(torch.full((1, 4), 1.0), row, full), 0.0),
           "A critic that always says the same explains nothing: 0, whichever number it says. With "
           "a mean squared error instead of a variance it would depend on the number.")
    yield ("a shift", close(f(row + 5, row, full), 1.0),
           "A critic that is wrong by the same amount everywhere has explained all differences. "
           "Variances do not see a shift; a mean squared error does.")
    yield ("worse than a constant", close(f(-row, row, full), -3.0),
           "A critic that says the opposite is worse than one that says nothing, and the number "
           "has to say so: it is below 0, as it is at the start of a run.")
    dirty = torch.where(mask, values, 100.0)
    yield ("mask", close(f(dirty, returns, mask), f(values, returns, mask)),
           "What the critic says at padding has changed the result.")
    left, all_of_it = ((x - x.mean()).square().sum() for x in
                       ((returns - values)[mask], returns[mask]))
    yield ("uneven lengths", close(f(values, returns, mask), 1 - left / all_of_it),
           "With responses of different lengths the result is another: padding is in one of the "
           "variances, or each response has a variance of its own.")
    return "You have written the explained variance of compute_rollout_stats, rlhf_mini/rollout.py."


def _blame(notice: int, lam: float) -> list[float]:
    """Advantages of eight tokens, score -1 at the end, of a critic that falls after one token."""
    rewards, values = [0.0] * 7 + [-1.0], [0.0 if t <= notice else -1.0 for t in range(1, 9)]
    ahead = [*values[1:], 0.0]
    errors = [r + after - v for r, after, v in zip(rewards, ahead, values, strict=True)]
    return [sum(lam ** (k - t) * errors[k] for k in range(t, 8)) for t in range(8)]


@exercise("ex-gae-blame")
def blame(answer: object) -> Generator[Property, None, str]:
    """Six advantages of a response whose fifth token was a mistake."""
    numbers = isinstance(answer, list | tuple) and len(answer) == 6 and all(map(finite, answer))
    yield "six numbers", numbers, "Expected a list of six numbers, in the order of the questions."
    sees, late = _blame(5, 0.5), _blame(7, 0.5)
    yield ("the culprit", close(answer[1], sees[4]),
           "At the mistake itself the forecast falls from 0 to -1, and nothing else happens "
           "afterwards: write down its TD error, then those behind it.")
    yield ("after the mistake", close(answer[2], sees[6]),
           "Behind the mistake the forecast is right already. Neither it nor the score brings any "
           "news, and no token can be blamed for what has happened before it.")
    yield ("before the mistake", close(answer[0], sees[2]),
           "Blame is handed backwards and loses the factor lambda with every token. How many "
           "tokens lie between, and which sign has it?")
    yield ("an innocent token", close(answer[4], late[6]),
           "Nothing but TD errors enters. Where does the forecast of the late critic fall?")
    yield ("the culprit of a late critic", close(answer[3], late[4]),
           "The late critic notices two tokens after the deed. What is left of the blame after "
           "two steps backwards?")
    yield ("lambda = 1", close(answer[5], _blame(7, 1.0)[4]),
           "At lambda = 1 the TD errors add up undiminished to return minus value. Does it matter "
           "where the critic noticed?")
    return ("A small lambda believes the critic about the place of a mistake; a large one believes "
            "nobody, and blames every token before the end alike.")
