"""Checks of chapter 7, policy gradients and the clip."""

from __future__ import annotations

from collections.abc import Callable, Generator
from itertools import product

import torch
from torch import Tensor

from rlhf_mini.check.core import Property, close, exercise, finite, gradient, moved, shaped, worded
from rlhf_mini.ppo import policy_loss

Steps = Generator[Property, None, str]


def _batch(seed: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probabilities, others near by, and mask (3, 4): 4, 2 and 1 real tokens."""
    noise = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(4) < torch.tensor([[4], [2], [1]])
    return -1.5 + 0.6 * noise[0], -1.5 + 0.6 * noise[1], mask


class Language:
    """All responses of up to two tokens: "." ends one, a or b goes on; three states.

    Attributes:
        tokens: (7, 2) of the responses ".", "a.", "b.", "aa", "ab", "ba", "bb".
        mask: (7, 2) bool.
        scores: (7,).
    """

    def __init__(self) -> None:
        words = [(2,), *product((0, 1), (2, 0, 1))]  # a is 0, b 1, the full stop 2
        self.tokens = torch.tensor([[*word, 0][:2] for word in words])
        self.mask = torch.tensor([[True, len(word) > 1] for word in words])
        self.states = torch.tensor([[0, word[0] + 1 if len(word) > 1 else 0] for word in words])
        self.scores = torch.tensor([0.3, 1.0, -0.5, 0.2, 2.0, -1.0, 0.7]).double()

    def logprobs(self, table: Tensor) -> Tensor:
        """Return the log-probabilities (7, 2) of the tokens under a table of logits (3, 3)."""
        return torch.where(self.mask, table.log_softmax(-1)[self.states, self.tokens], 0)

    def probabilities(self, table: Tensor) -> Tensor:
        """Return those (7,) of the responses."""
        return self.logprobs(table).sum(1).exp()

    def slope(self, table: Tensor) -> Tensor:
        """Return the gradient (3, 3) of the mean score."""
        return gradient(lambda x: self.probabilities(x) * self.scores, table)


def _tables(count: int) -> Tensor:
    return torch.randn(count, 3, 3, generator=torch.Generator().manual_seed(70)).double()


@exercise("ex-theory-surrogate")
def reinforce(f: Callable) -> Steps:
    """REINFORCE with a baseline as a loss: f(logprobs, mask, scores, baseline) -> one number."""
    logprobs, _, mask = _batch()
    scores, baseline = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([0.5, 0.5, -0.25])
    yield shaped(f(logprobs, mask, scores, baseline), ())

    def slope(rows: slice, width: int, scores: list, base: list) -> Tensor:
        """The gradient (rows, width) by the log-probabilities of these responses alone."""
        return gradient(lambda x: f(x, mask[rows, :width], torch.tensor(scores),
                                    torch.tensor(base)), logprobs[rows, :width])

    one_token = slope(slice(3), 1, [2.0, 3.0, 1.0], [0.5, 3.0, 1.5])[:, 0]
    yield ("gradient", bool((one_token != 0).any()),
           "Your loss has no gradient: a plain number (after .item() or float()) and a detached "
           "tensor carry none.")
    yield ("sign", bool(one_token[0] < 0),
           "A loss is minimised. Descending on it must raise the log-probability of a response "
           "that scored more than its baseline; yours does not.")
    yield ("baseline", close(one_token / one_token.abs().sum(), [-0.75, 0.0, 0.25]),
           "What weighs the direction of a response is its score less its own baseline, and "
           "nothing else is taken off or divided by; a response that scores what was expected "
           "pushes nothing.")
    yield ("every token", close(slope(slice(1), 4, [1.0], [0.0]), [[-1.0] * 4]),
           "The log-probability of a response is the sum over its tokens. Each of them has the "
           "whole weight, however long the response is.")
    dirty = torch.where(mask, logprobs, -torch.inf)
    yield ("mask", close(f(dirty, mask, scores, baseline), f(logprobs, mask, scores, baseline)),
           "What stands behind the end of a response must not reach the loss, even if it is "
           "-inf (0 times infinity is not a number).")
    expected = torch.where(mask, -(scores - baseline)[:, None] / 3, 0)
    yield ("mean over responses",
           close(gradient(lambda x: f(x, mask, scores, baseline), logprobs), expected),
           "An expectation over responses is estimated by a mean over responses: each counts "
           "once. A mean over tokens weighs long responses and short ones differently.")
    yield ("no gradient through the baseline",
           close(gradient(lambda b: f(logprobs, mask, scores, b), baseline), torch.zeros(3)),
           "If a network computes the baseline, your loss trains that network as well, and not to "
           "predict anything. The baseline weighs; it is not learned here.")
    world, table = Language(), _tables(1)[0]
    p = world.probabilities(table)

    def mean_loss(x: Tensor) -> Tensor:
        rows = world.logprobs(x)
        return sum(p[i] * f(rows[i:i + 1], world.mask[i:i + 1], world.scores[i:i + 1],
                            torch.tensor([0.4])) for i in range(7))

    yield ("unbiased", close(gradient(mean_loss, table), -world.slope(table)),
           "Averaged over all responses of a small language, the gradient of the loss is not "
           "minus that of the mean score.")
    return "With score minus baseline as the advantage, this is rloo_loss of rlhf_mini/rloo.py."


@exercise("ex-theory-two-arms")
def two_arms(f: Callable) -> Steps:
    """The baseline of least variance for two answers: f(p, first, second) -> one number."""
    yield shaped(f(0.3, 1.0, 2.0), ())
    yield ("equal scores", close(f(0.3, 1.5, 1.5), 1.5),
           "If both answers score the same, that score is the baseline that leaves nothing over.")
    yield ("shift", close(f(0.3, 11.0, 12.0), f(0.3, 1.0, 2.0) + 10),
           "A constant that is added to both scores must be taken off again by the baseline.")
    yield ("even odds", close(f(0.5, 1.0, 4.0), 2.5),
           "With equally likely answers both directions have the same length, and the best "
           "baseline is the mean score.")
    for p, first, second in ((0.1, 3.0, 0.0), (0.8, -1.0, 0.5), (0.95, 2.0, 1.0)):
        b = f(p, first, second)
        estimates = (first - b) * (1 - p), (second - b) * -p
        yield ("least variance", close(estimates[0], estimates[1]),
               "Another baseline has less variance. Compare the two estimates, one for each "
               "answer: (score - baseline) times the derivative of the log-probability by the "
               "logit. The more two numbers differ, the larger their variance.")
    return ("The weights are exchanged: the score of the rarer answer counts more. Both answers "
            "now give the same estimate, so one sample is as good as a thousand.")


@exercise("ex-theory-loo")
def leave_one_out(f: Callable) -> Steps:
    """Score minus the mean of the others: f(scores) -> (N, K)."""
    scores = torch.randn(3, 4, generator=torch.Generator().manual_seed(71)).double()
    yield shaped(f(scores), (3, 4), "advantages")
    yield ("equal scores", close(f(torch.full((2, 3), 5.0)), torch.zeros(2, 3)),
           "Where all responses to a prompt score the same, none is better than the others.")
    yield ("two responses", close(f(torch.tensor([[3.0, 1.0]])), [[2.0, -2.0]]),
           "With two responses, each is the other one's baseline.")
    yield ("prompts apart", close(f(scores)[:1], f(scores[:1])),
           "The responses to another prompt have changed the advantages of this one. A baseline "
           "of a hard prompt says nothing about an easy one.")
    bump = torch.zeros(3, 4).double()
    bump[1, 2] = 1
    yield ("own score", close((f(scores + bump) - f(scores))[1, 2], 1.0),
           "If one response scores a point more, its own advantage has to rise by that point: "
           "its baseline must not contain it.")
    slow = [[row[i] - sum(row[:i] + row[i + 1:]) / 3 for i in range(4)] for row in scores.tolist()]
    yield ("mean of the others", close(f(scores), slow),
           "Each baseline is the plain mean of the other scores of its row.")
    world, table = Language(), _tables(1)[0]
    p = world.probabilities(table)
    directions = torch.stack([gradient(lambda x, i=i: world.logprobs(x)[i], table)
                              for i in range(7)])
    pairs = torch.cartesian_prod(torch.arange(7), torch.arange(7))
    weighed = torch.as_tensor(f(world.scores[pairs]))[..., None, None] * directions[pairs]
    mean = (p[pairs].prod(1)[:, None, None] * weighed.mean(1)).sum(0)
    yield ("unbiased", close(mean, world.slope(table)),
           "Averaged over all pairs of responses of a small language, the estimate is not the "
           "gradient of the mean score.")
    return "You have written rloo_advantages of rlhf_mini/rloo.py."


@exercise("ex-theory-ratio")
def ratios(f: Callable) -> Steps:
    """Importance ratios: f(logprobs, old_logprobs, mask) -> of tokens (B, T), of responses (B,)."""
    new, old, mask = _batch()
    result = f(new, old, mask)
    yield ("two results", isinstance(result, tuple | list) and len(result) == 2,
           "Return two tensors, the ratios of the tokens and those of the whole responses.")
    yield shaped(result[0], (3, 4), "ratios of tokens")
    yield shaped(result[1], (3,), "ratios of responses")
    ones = f(new, new, mask)
    yield ("equal policies", close(ones[0][mask], torch.ones(7)) and close(ones[1], torch.ones(3)),
           "A policy that has not moved has ratio 1 everywhere. Are these probabilities or still "
           "their logarithms?")
    double = f(torch.tensor([[0.4]]).log(), torch.tensor([[0.2]]).log(), mask[2:, :1])
    yield ("direction", close(double[0], [[2.0]]),
           "A token that the current policy says twice as often as the old one has the ratio 2.")
    dirty = f(torch.where(mask, new, torch.inf), torch.where(mask, old, torch.inf), mask)
    yield ("padding", close(dirty[0][~mask], torch.ones(5)) and close(dirty[1], result[1]),
           "Behind the end of a response nothing was written: the ratio there is 1, whatever the "
           "tensors hold, and the ratio of the response does not change by it.")
    products = [(row[real].sum()).exp() for row, real in zip(new - old, mask, strict=True)]
    yield ("whole response", close(result[1], torch.stack(products)),
           "A response is as likely as its tokens multiplied; so is its ratio.")
    long = torch.full((1, 400), -3.0)
    yield ("long responses", close(f(long + 0.01, long, long < 0)[1].log(), [4.0], 1e-3),
           "The probability of a long response is too small for a floating-point number, "
           "and 0 / 0 is not a number. Its ratio is not small: subtract logarithms first.")
    expected = (torch.where(mask, (new - old).exp(), 0),
                torch.where(mask, torch.stack(products)[:, None], 0))
    for i in range(2):
        yield ("gradient", close(gradient(lambda x, i=i: f(x, old, mask)[i], new), expected[i]),
               "The derivative of a ratio by the log-probability of a token in it is the ratio "
               "itself, and 0 at padding; that holds for tokens and for whole responses. A loss "
               "made of your ratios would not learn rightly.")
    never = torch.where(mask, old, -torch.inf)
    for i in range(2):
        yield ("gradient at padding",
               close(gradient(lambda x, i=i: f(x, never, mask)[i], new), expected[i]),
               "With -inf at padding your ratios are right and their gradient is not: on the way "
               "back 0 times infinity is nan. Choose the real tokens before the exponential, not "
               "behind it.")
    world, (before, now) = Language(), _tables(2)
    whole = f(world.logprobs(now), world.logprobs(before), world.mask)[1]
    yield ("exact", close((world.probabilities(before) * whole * world.scores).sum(),
                          (world.probabilities(now) * world.scores).sum()),
           "Weighed with the ratios, the mean score over responses of the old policy should be "
           "the mean score of the new one.")
    return "Its first two lines are those of policy_loss in rlhf_mini/ppo.py."


def _by_cases(ratio: float, advantage: float, clip_range: float) -> tuple[float, float]:
    """Return the loss of one token and its derivative by the log-probability."""
    if advantage > 0 and ratio > 1 + clip_range:
        return -advantage * (1 + clip_range), 0.0
    if advantage < 0 and ratio < 1 - clip_range:
        return -advantage * (1 - clip_range), 0.0
    return -advantage * ratio, -advantage * ratio


def _token_agrees(f: Callable, ratio: float, advantage: float, clip_range: float = 0.2,
                  slope_only: bool = False) -> bool:
    """Whether loss and derivative of a single token are those of the case analysis."""
    def loss(x: Tensor) -> Tensor:
        return f(x, torch.zeros(1, 1), torch.tensor([[advantage]]), torch.ones(1, 1).bool(),
                 clip_range)

    x = torch.tensor([[ratio]]).log()
    value, slope = _by_cases(ratio, advantage, clip_range)
    return close(gradient(loss, x), [[slope]]) and (slope_only or close(loss(x), value))


@exercise("ex-theory-policy-loss")
def clipped_loss(f: Callable) -> Steps:
    """PPO's loss: f(logprobs, old_logprobs, advantages, mask, clip_range) -> one number."""
    new, old, mask = _batch()
    advantages = torch.randn(3, 4, generator=torch.Generator().manual_seed(72))
    yield shaped(f(new, old, advantages, mask, 0.2), ())
    full = torch.ones(3, 4).bool()
    yield ("first step", close(f(old, old, advantages, full, 0.2), -advantages.mean()) and
           close(gradient(lambda x: f(x, old, advantages, full, 0.2), old), -advantages / 12),
           "Where nothing has moved yet, all ratios are 1: the loss is minus the mean advantage, "
           "and its gradient is that of REINFORCE with the advantages as factors.")
    yield ("inside the range", all(_token_agrees(f, r, a) for r in (0.9, 1.1) for a in (2.0, -2.0)),
           "While a ratio is inside the range, the objective of its token is advantage times "
           "ratio, and that is also its derivative by the log-probability.")
    yield ("no gradient outside the clip", all(_token_agrees(f, *case, slope_only=True)
                                               for case in ((1.5, 2.0), (0.5, -2.0))),
           "A token that has moved far enough in the direction of its advantage, cases 1 and 3 "
           "of the table, is still pushed.")
    yield ("way back", all(_token_agrees(f, *case, slope_only=True)
                           for case in ((0.5, 2.0), (1.5, -2.0))),
           "A good token that has become unlikely, or a bad one that has become likely, must get "
           "its whole gradient, however far out it is: cases 2 and 4 of the table.")
    every = [(r, a) for r in (0.5, 1.5) for a in (2.0, -2.0)]
    yield ("pessimistic side", all(_token_agrees(f, *case) for case in every),
           "The gradients are right and a value is not. A clipped token counts as if its ratio "
           "stood at the end of the range; the loss is never lower than without clipping.")
    yield ("clip range", all(_token_agrees(f, r, a, 0.7) for r, a in [*every, (1.8, 1.0)]),
           "With another clip range the loss is wrong: is a number written into your code?")
    dirty = [torch.where(mask, x, torch.inf) for x in (new, old, advantages)]
    slope = gradient(lambda x: f(x, *dirty[1:], mask, 0.2), dirty[0])
    yield ("mask", finite(f(*dirty, mask, 0.2)) and finite(slope) and
           close(f(*dirty, mask, 0.2), f(new, old, advantages, mask, 0.2)) and
           close(slope[~mask], torch.zeros(5)),
           "Padding has changed the loss or got a gradient. Choose the real tokens before you "
           "compute with them: inf - inf and 0 * inf are not numbers.")
    pairs = [_by_cases((n - o).exp().item(), a.item(), 0.2)
             for n, o, a in zip(new[mask], old[mask], advantages[mask], strict=True)]
    yield ("mean over tokens",
           close(f(new, old, advantages, mask, 0.2), torch.tensor(pairs)[:, 0].mean()) and
           close(gradient(lambda x: f(x, old, advantages, mask, 0.2), new)[mask],
                 torch.tensor(pairs)[:, 1] / 7),
           "The mean is over the real tokens of the batch: every token counts once, whichever "
           "response it stands in, and padding is not counted.")
    return "You have written policy_loss of rlhf_mini/ppo.py, but for its stats."


@exercise("ex-theory-dragged")
def dragged(answer: object) -> Steps:
    """What one more step does to three tokens: a list of three words."""
    yield ("three words", worded(answer, 3),
           "Expected a list of three words, each one of rises, falls, stays.")
    old, now = torch.tensor([[0.40, 0.40, 0.20], [0.60, 0.36, 0.04]]).double()
    signs = torch.tensor([[1.0], [-1.0]]).double()

    def loss(logits: Tensor) -> Tensor:
        logprobs = logits.log_softmax(-1)[:2, None]
        return policy_loss(logprobs, old.log()[:2, None], signs, signs != 0, 0.2)[0]

    after = (now.log() - 0.1 * gradient(loss, now.log())).softmax(-1)
    truth = [moved(a, b) for a, b in zip(now.tolist(), after.tolist(), strict=True)]
    yield ("bad token", answer[1] == truth[1],
           "The bad token is inside the range. What does its term of the loss do?")
    yield ("clipped token", answer[0] == truth[0],
           "It is true that the good token's own term has no gradient. But its logit stands in the "
           "softmax of the other one.")
    yield ("token nobody sampled", answer[2] == truth[2],
           "Its logit moves by very little; that of another token moves by much, and all share "
           "one softmax. Compare the change of its logit with the mean change.")
    return "The clip leaves a token alone. It does not hold it, and it does not see the others."
