"""Checks of chapter 6, the reward model."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator

import torch
from torch import Tensor

from rlhf_mini.check.core import Property, close, exercise, finite, gradient, moved, shaped, worded


def _draw(*shape: int, seed: int = 6) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@exercise("ex-pair-loss")
def pair_loss(f: Callable) -> Generator[Property, None, str]:
    """The Bradley-Terry loss of pairs: f(chosen, rejected) -> ()."""
    chosen, rejected = _draw(2, 5)
    yield shaped(f(chosen, rejected), (), "the loss")
    for n in (1, 4):
        yield ("equal scores", close(f(torch.zeros(n), torch.zeros(n)), math.log(2)),
               "Equal scores promise each order a probability of one half. Every pair costs minus "
               "the logarithm of that, and so does a mean over any number of pairs.")
    yield ("sign", close(f(torch.tensor([20.0]), torch.tensor([-20.0])), 0.0),
           "The chosen response scores far above the rejected one: the labeler's order was "
           "promised, so there should be next to nothing to pay.")
    yield ("shift", close(f(chosen + 3, rejected + 3), f(chosen, rejected)),
           "The same number is added to all scores, and the loss changes. Only differences between "
           "scores are promises.")
    x = torch.tensor([-400.0, 400.0])
    value = f(x, -x)
    yield ("far apart", finite(value) and close(value, 400.0)
           and finite(gradient(lambda s: f(s, -x), x)),
           "Scores that are far apart give inf or nan, or another number than half of the gap: a "
           "sigmoid that rounds to 0 has no logarithm. Log and sigmoid belong in one function.")
    slopes = -torch.sigmoid(rejected - chosen) / 5
    yield ("gradient", close(gradient(lambda s: f(s, rejected), chosen), slopes)
           and close(gradient(lambda s: f(chosen, s), rejected), -slopes),
           "The gradient at a chosen score should be minus what was not promised yet, divided by "
           "the number of pairs, and the opposite at the rejected one. (A plain number carries no "
           "gradient.)")
    by_hand = sum(math.log1p(math.exp(b - a)) for a, b in zip(chosen.tolist(), rejected.tolist(),
                                                              strict=True)) / 5
    yield ("any scores", close(f(chosen, rejected), by_hand),
           "Special cases hold, but the mean over five random pairs does not.")
    return "It is reward_loss of rlhf_mini/reward.py for K = 2; all K come next."


def _rankings() -> tuple[Tensor, Tensor, Tensor]:
    """Return scores, ranks and mask (4, 6) of rankings with K = 6, 4, 2 and 5; two hold ties."""
    ranks = torch.tensor([[2, 1, 3, 6, 4, 5], [3, 1, 2, 2, 0, 0], [2, 1, 0, 0, 0, 0],
                          [1, 1, 3, 2, 3, 0]])
    return _draw(4, 6), ranks, ranks > 0


def _mean_of_prompts(scores: Tensor, ranks: Tensor, mask: Tensor) -> float:
    """The K-way loss by loops."""
    means = []
    for s, r, m in zip(scores.tolist(), ranks.tolist(), mask.tolist(), strict=True):
        there = [i for i, exists in enumerate(m) if exists]
        losses = [math.log1p(math.exp(s[j] - s[i])) for i in there for j in there if r[i] < r[j]]
        means.append(sum(losses) / len(losses))
    return sum(means) / len(means)


@exercise("ex-k-way")
def k_way(f: Callable) -> Generator[Property, None, str]:
    """The K-way loss: f(scores, ranks, mask) -> ()."""
    scores, ranks, mask = _rankings()
    yield shaped(f(scores, ranks, mask), (), "the loss")
    two, order = _draw(2, 2), torch.tensor([[1, 2], [2, 1]])
    by_hand = (math.log1p(math.exp(two[0, 1] - two[0, 0])) +
               math.log1p(math.exp(two[1, 0] - two[1, 1]))) / 2
    yield ("two responses", close(f(two, order, order > 0), by_hand),
           "With K = 2 this is the pairwise loss, a mean over the prompts: each prompt has one "
           "pair, and rank 1 is the better response.")
    for k in (2, 4, 9):
        order = torch.arange(1, k + 1)[None]
        yield ("equal scores", close(f(torch.zeros(1, k), order, order > 0), math.log(2)),
               "If all scores are equal, a pair costs the same in any ranking, so the loss may not "
               "depend on K. By how many pairs is the sum divided, and how often?")
    tied = torch.tensor([[1, 1, 2]])
    x = torch.tensor([[1.0, 5.0, 0.0]])
    yield ("ties", close(f(x, tied, tied > 0), (math.log1p(math.exp(-1)) +
                                                math.log1p(math.exp(-5))) / 2),
           "A tie says nothing about an order. It belongs neither in the sum nor in the number "
           "of pairs.")
    x = torch.tensor([[-400.0, 400.0]])
    order = torch.tensor([[1, 2]])
    yield ("far apart", close(f(x, order, order > 0), 800.0)
           and finite(gradient(lambda s: f(s, order, order > 0), x)),
           "Scores that are far apart give inf or nan, in the loss or in its gradient. The "
           "exercise on one pair says why.")
    clean = f(scores, ranks, mask)
    for rank, score in ((0, 30.0), (1, 30.0), (7, 30.0), (0, math.nan)):
        dirty = torch.where(mask, scores, score), torch.where(mask, ranks, rank)
        yield ("missing responses", close(f(*dirty, mask), clean),
               "Scores or ranks off the mask change the loss. A prompt with fewer responses fills "
               "its row up with anything; a pair needs two responses that exist.")
    rows = [f(scores[b:b + 1], ranks[b:b + 1], mask[b:b + 1]) for b in range(4)]
    yield ("prompts alike", close(clean, sum(float(row) for row in rows) / 4),
           "The loss of a batch should be the mean of its prompts' losses: one with 15 pairs "
           "counts as much as one with a single pair.")
    yield ("all pairs", close(clean, _mean_of_prompts(scores, ranks, mask)),
           "Equal scores, ties and the mean over prompts are right; a ranking of several responses "
           "is not. Is every pair in the sum, not only neighbours in rank?")
    slopes = gradient(lambda s: f(s, ranks, mask), scores)
    yield ("gradient", close(slopes.sum(1), torch.zeros(4)) and float(slopes.abs().sum()) > 0.1
           and close(slopes[~mask], torch.zeros(int((~mask).sum()))),
           "The gradients of a prompt should add up to zero, not all be zero, and none may fall on "
           "a response that is not there. (A plain number carries no gradient.)")
    dirty = torch.where(mask, scores, math.nan)
    yield ("gradient off the mask", close(gradient(lambda s: f(s, ranks, mask), dirty), slopes),
           "The loss is right where scores off the mask are nan, and its gradient is not: on the "
           "way back 0 times nan is nan. Choose what takes part before you compute with it, too.")
    return "You have written reward_loss of rlhf_mini/reward.py."


@exercise("ex-last-token")
def last_token(f: Callable) -> Generator[Property, None, str]:
    """The score at the last real token: f(values, mask) -> (B,)."""
    values = _draw(3, 6)
    everything = torch.ones(3, 6, dtype=torch.bool)
    yield shaped(f(values, everything), (3,), "the scores")
    yield ("no padding", close(f(values, everything), values[:, 5]),
           "Without padding the last real token stands in the last column.")
    right = torch.arange(6) < torch.tensor([[6], [4], [1]])
    yield ("padding on the right", close(f(values, right), values[[0, 1, 2], [5, 3, 0]]),
           "A short response is followed by padding. The number there is the score of nothing.")
    left = torch.arange(6) >= torch.tensor([[0], [2], [4]])
    yield ("padding on the left", close(f(values, left), values[:, 5]),
           "Prompts are padded on the left, so the number of real tokens does not tell where the "
           "last one stands.")
    both = left & torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0], [1] * 6]).bool()
    there = values[[0, 1, 2], [3, 4, 5]]
    yield ("padding on both sides", close(f(values, both), there),
           "In a batch of sampled responses a row has padding before the prompt and behind EOS.")
    dirty = torch.where(both, values, math.nan)
    zero = torch.where(torch.arange(6) == torch.tensor([[3], [4], [5]]), 0.0, dirty)
    yield ("garbage", close(f(dirty, both), there),
           "Numbers at padding reach the score, here nan. Arithmetic with a mask lets them in, a "
           "choice of one column does not.")
    yield ("a score of 0", close(f(zero, both), torch.zeros(3)),
           "A score may be exactly 0. Only the mask says which tokens are real.")
    grad = gradient(lambda x: f(x, both), values)
    expected = torch.zeros(3, 6)
    expected[[0, 1, 2], [3, 4, 5]] = 1
    yield ("gradient", close(grad, expected),
           "The gradient of a score should reach the number that was read, and no other.")
    return "You have written last_index of rlhf_mini/tensors.py and how RewardModel reads with it."


@exercise("ex-accuracy")
def accuracy(f: Callable) -> Generator[Property, None, str]:
    """Share of pairs in the labeler's order: f(scores, ranks) -> one number."""
    def run(scores: list, ranks: list) -> object:
        return f([torch.tensor(s, dtype=torch.float32) for s in scores],
                 [torch.tensor(r) for r in ranks])

    yield shaped(run([[2.0, 1.0]], [[1, 2]]), (), "the share")
    yield ("all right", close(run([[3.0, 2.0, 0.5]], [[1, 2, 3]]), 1.0),
           "The scores have the labeler's order, rank 1 on top. All pairs are right.")
    yield ("all wrong", close(run([[0.5, 2.0, 3.0]], [[1, 2, 3]]), 0.0),
           "The scores have just the opposite order: no pair is right.")
    yield ("tie in the scores", close(run([[1.0, 1.0, 1.0]], [[1, 3, 2]]), 0.5),
           "A judge that gives all responses one score knows nothing, like a tossed coin. It "
           "should earn what a coin earns.")
    yield ("tie in the ranks", close(run([[1.0, 5.0, 0.0]], [[1, 1, 2]]), 1.0)
           and close(run([[1.0, 5.0, 3.0]], [[1, 1, 2]]), 0.5),
           "The labeler saw no difference between the first two. That pair cannot be right or "
           "wrong, so it is not counted.")
    scores, ranks = [[1.0, 0.0], [9.0, 8.0]], [[1, 2], [1, 2]]
    yield ("prompts apart", close(run(scores, ranks), 1.0),
           "Only responses to the same prompt were compared. A score of another prompt says "
           "nothing about them.")
    yield ("every pair", close(run([[3.0, 0.0, 1.0, 2.0]], [[1, 2, 3, 4]]), 0.5),
           "Four responses without ties make six pairs, and each of them counts: not only those "
           "with the best response in them, and not only neighbours in rank.")
    scores, ranks = [[3.0, 2.0, 1.0, 0.0], [0.0, 1.0]], [[1, 2, 3, 4], [1, 2]]
    yield ("pairs alike", close(run(scores, ranks), 6 / 7),
           "Unlike the loss, this is a share of pairs: a prompt with six of them counts six times. "
           "Collect the pairs of all prompts, then count.")
    scores = [_draw(k, seed=k).round(decimals=0).tolist() for k in (4, 6, 9)]
    ranks = [[1, 3, 2, 2], [4, 1, 1, 3, 2, 2], [5, 1, 4, 3, 2, 2, 6, 1, 5]]
    points = [0.5 * (s[i] > s[j]) + 0.5 * (s[i] >= s[j]) for s, r in zip(scores, ranks, strict=True)
              for i in range(len(r)) for j in range(len(r)) if r[i] < r[j]]
    yield ("any ranking", close(run(scores, ranks), sum(points) / len(points)),
           "Special cases hold, but rankings of several responses with both kinds of ties do not. "
           "Is each pair counted, and once?")
    return "You have written compare_pairs and compute_accuracy of rlhf_mini/reward.py."


@exercise("ex-ceiling")
def ceiling(f: Callable) -> Generator[Property, None, str]:
    """The accuracy of a judge without noise, from an agreement: f(agreement) -> one number."""
    yield shaped(f(0.7), (), "the ceiling")
    yield ("no noise", close(f(1.0), 1.0),
           "If labelers always agree, their favourite is always what the next one says.")
    yield ("coin toss", close(f(0.5), 0.5),
           "Labelers who toss coins agree on half of the pairs. Nobody can predict them.")
    yield ("above the agreement", all(f(a) > a for a in (0.55, 0.7, 0.9)),
           "A judge without noise predicts a noisy labeler better than another noisy labeler does. "
           "A quadratic equation has two roots; which of them is a share of at least one half?")
    for m in (0.6, 0.75, 0.9):
        draws = torch.rand(2, 200_000, generator=torch.Generator().manual_seed(6)) < m
        yield ("simulated labelers", close(f((draws[0] == draws[1]).double().mean().item()), m,
                                           0.006),
               "Labelers were simulated who prefer the favourite with a known probability; from "
               "the share of pairs on which two of them agree your function should find it.")
    yield ("exact", close([f(m**2 + (1 - m)**2) for m in (0.55, 0.8)], [0.55, 0.8]),
           "It is close, but not the solution of the equation for the agreement.")
    return "With pairs of unequal difficulty it is an upper bound; the solution says why."


def _without_autograd(f: Callable, x: Tensor) -> object:
    """Return f(x), or None if it fails where no gradients are recorded."""
    try:
        with torch.inference_mode():
            return f(x)
    except RuntimeError:
        return None


@exercise("ex-plackett-luce")
def plackett_luce(f: Callable) -> Generator[Property, None, str]:
    """Gradient of the loss of a whole ranking: f(scores, best first) -> (K,)."""
    scores = _draw(5)
    yield shaped(f(scores), (5,), "the gradient")
    pair = torch.sigmoid(scores[1] - scores[0])
    yield ("two responses", close(f(scores[:2]), torch.stack([-pair, pair])),
           "With two responses there is one round, and the ranking is a pair: the gradient should "
           "be that of the pairwise loss.")
    yield ("sum", close(f(scores).sum(), 0.0),
           "A shift of all scores does not change the probability of a ranking, so the gradients "
           "should add up to zero. How many rounds are there, and how many can the last one win?")
    yield ("equal scores", close(f(torch.zeros(3)), [1 / 3 - 1, 5 / 6 - 1, 5 / 6]),
           "With equal scores each of those who still run has the same chance in a round. Who runs "
           "in the second round?")
    tail = torch.sigmoid(torch.tensor(1.0)).item()
    for far, slope in (([-800.0, 0.0, 800.0], [-1.0, -1.0, 2.0]),
                       ([1000.0, 0.0, -1000.0], [0.0, 0.0, 0.0]),
                       ([1000.0, 0.0, 1.0], [0.0, -tail, tail])):
        yield ("far apart", close(f(torch.tensor(far)), slope),
               "Scores that are far apart give inf or nan. An exponential overflows unless the "
               "largest score is taken off first, and it becomes 0 for all who are far below: in "
               "each round, the largest of those who still run.")
    for k in (3, 5, 9):
        s = _draw(k, seed=k).double()

        def loss(s: Tensor) -> Tensor:
            return -sum(s[i] - s[i:].logsumexp(0) for i in range(len(s) - 1))
        yield ("any ranking", close(f(s), gradient(loss, s)),
               "It is not the derivative of minus the logarithm of the ranking's probability. In "
               "each round that a response runs, it is expected to win with some probability.")
    yield ("by hand", close(_without_autograd(f, scores), f(scores)),
           "The numbers are right, but they do not come where autograd is switched off, as here. "
           "The task is to derive the formula.")
    return "Rounds expected minus rounds won: the twin of the gradient over pairs."


@exercise("ex-two-opinions")
def two_opinions(answer: object) -> Generator[Property, None, str]:
    """What a second judge does to the accuracy of the sum: a word for each of three judges."""
    yield ("form", worded(answer, 3),
           "Expected three words, one for each second judge: \"rises\", \"falls\" or \"stays\".")
    gold, mine, theirs = _draw(3, 4000)
    first = gold + mine
    others = {"other mistakes": gold + theirs, "the same mistakes": 10 * first + 3,
              "a coin": theirs}

    def right(judge: Tensor) -> float:
        return float(((judge[::2] > judge[1::2]) == (gold[::2] > gold[1::2])).float().mean())

    meanings = ("Both judges are right about equally often. What happens to independent mistakes "
                "in a sum, and what to that on which both agree?",
                "The second judge is the first in other units. What does a division by the "
                "standard deviation make of the units?",
                "Nothing that a coin says has to do with the quality of a response, but it is "
                "added with the same weight.")
    for (name, second), word, meaning in zip(others.items(), answer, meanings, strict=True):
        truth = moved(right(first), right(first / first.std() + second / second.std()), 0.01)
        yield name, word == truth, meaning
    return "The solution holds these three cases against the judges of this page."
