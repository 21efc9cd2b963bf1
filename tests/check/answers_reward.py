"""Right and wrong answers to the exercises of chapter 6."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from rlhf_mini.reward import compare_pairs, compute_accuracy, reward_loss
from rlhf_mini.tensors import last_index

# ---------------------------------------------------------------- losses


def pair_loss(chosen, rejected):
    return -F.logsigmoid(chosen - rejected).mean()


def k_way(scores, ranks, mask, better=lambda a, b: a < b, divide=lambda n, k: n, pool=False,
          exist=lambda m: m[:, :, None] & m[:, None, :], clean=True,
          cost=lambda z: -F.logsigmoid(z)):
    """The K-way loss with one thing wrong."""
    pairs = exist(mask) & better(ranks[:, :, None], ranks[:, None, :])
    scores = torch.where(mask, scores, 0) if clean else scores
    margins = scores[:, :, None] - scores[:, None, :]
    losses = torch.where(pairs, cost(margins), 0).sum((1, 2))
    counts = pairs.sum((1, 2))
    if pool:
        return losses.sum() / counts.sum()
    return (losses / divide(counts, mask.sum(1))).mean()


def with_(**wrong):
    return lambda scores, ranks, mask: k_way(scores, ranks, mask, **wrong)


def masked_by_product(scores, ranks, mask):
    """Multiplies by the table of pairs: nan times 0 is nan."""
    pairs = mask[:, :, None] & mask[:, None, :] & (ranks[:, :, None] < ranks[:, None, :])
    losses = -F.logsigmoid(scores[:, :, None] - scores[:, None, :]) * pairs
    return (losses.sum((1, 2)) / pairs.sum((1, 2))).mean()


def neighbours_only(scores, ranks, mask):
    pairs = mask[:, :, None] & mask[:, None, :]
    gaps = ranks[:, None, :] - ranks[:, :, None]
    pairs = pairs & ((gaps == 1) | ((gaps > 0) & (ranks.max() == 2)))
    losses = -F.logsigmoid(scores[:, :, None] - scores[:, None, :])
    return (torch.where(pairs, losses, 0).sum((1, 2)) / pairs.sum((1, 2))).mean()


def whole_ranking(scores, ranks, mask):
    order = torch.where(mask, ranks, 99).argsort(1)
    s, there = scores.gather(1, order), mask.gather(1, order)
    s = torch.where(there, s, -1e9)
    rounds = s.flip(1).logcumsumexp(1).flip(1) - s
    return torch.where(there, rounds, 0).sum(1).mean()


# ---------------------------------------------------------------- reading the score


def last_nonzero(values, mask):
    """Takes the last number that is not 0; where the score is 0, that is an earlier one."""
    kept = torch.where(mask, values, 0)
    return read_at(last_index)(values, kept != 0)


def one_hot_sum(values, mask):
    columns = torch.arange(values.shape[1])
    return (values * (columns == last_index(mask)[:, None])).sum(1)


def read_at(index):
    return lambda values, mask: values[torch.arange(len(values)), index(mask)]


# ---------------------------------------------------------------- accuracy


def accuracy(scores, ranks):
    return compute_accuracy(compare_pairs([s.numpy() for s in scores],
                                          [-r.numpy() for r in ranks])[0])


def shares(scores, ranks, rule=lambda s, r: (s > 0) + 0.5 * (s == 0), keep=lambda r: r > 0):
    """For each prompt the points and the number of its pairs."""
    for s, r in zip(scores, ranks, strict=True):
        gap, order = s[:, None] - s, r - r[:, None]
        pairs = keep(order) & ~torch.eye(len(s), dtype=torch.bool)
        yield (rule(gap, order) * pairs).sum(), pairs.sum()


def pooled(**wrong):
    def f(scores, ranks):
        points, pairs = zip(*shares(scores, ranks, **wrong), strict=True)
        return float(sum(points) / sum(pairs))
    return f


def mean_of_prompts(scores, ranks):
    return float(sum(p / n for p, n in shares(scores, ranks)) / len(scores))


def first_places_only(scores, ranks):
    """Counts a pair only if one of the two has rank 1."""
    points = pairs = 0
    for s, r in zip(scores, ranks, strict=True):
        margins = (s[:, None] - s)[(r[:, None] == 1) & (r > 1)]
        points, pairs = points + ((margins > 0) + 0.5 * (margins == 0)).sum(), pairs + len(margins)
    return float(points / pairs)


# ---------------------------------------------------------------- whole rankings


def rounds(scores, won=lambda i, k: 1.0, runs=lambda i: slice(i, None), last=1):
    """Gradient of the loss of a ranking with one thing wrong."""
    grad, k = torch.zeros_like(scores), len(scores)
    for i in range(k - last):
        there = runs(i)
        grad[there] += scores[there].softmax(0)
        grad[i] -= won(i, k)
    return grad


def overflowing(scores):
    grad, e = torch.zeros_like(scores), scores.exp()
    for i in range(len(scores) - 1):
        grad[i:] += e[i:] / e[i:].sum()
        grad[i] -= 1
    return grad


def one_maximum(scores):
    """Takes the largest score off once; what is left in later rounds may be 0 / 0."""
    return overflowing(scores - scores.max())


def masked_table(scores):
    chances = (scores[None] - scores.flip(0).logcumsumexp(0).flip(0)[:, None]).exp()
    won = torch.arange(len(scores)) < len(scores) - 1
    return (chances * torch.ones_like(chances).triu())[:-1].sum(0) - won.to(scores.dtype)


def ranking_loss(scores):
    return sum(scores[i:].logsumexp(0) - scores[i] for i in range(len(scores) - 1))


def by_autograd(scores):
    x = scores.detach().clone().requires_grad_()
    return torch.autograd.grad(ranking_loss(x), x)[0]


def pairwise(scores):
    won = torch.arange(len(scores) - 1, -1, -1)
    return torch.sigmoid(scores[:, None] - scores).sum(1) - 0.5 - won


def root(sign):
    return lambda a: (1 + sign * math.sqrt(max(2 * a - 1, 0))) / 2


ANSWERS = {
    "ex-pair-loss": (pair_loss, [
        (lambda c, r: -F.logsigmoid(c - r), "shape"),
        (lambda c, r: -F.logsigmoid(c - r).sum(), "equal scores"),
        (lambda c, r: -torch.sigmoid(c - r).mean(), "equal scores"),
        (lambda c, r: -(F.logsigmoid(c) + F.logsigmoid(-r)).mean(), "equal scores"),
        (lambda c, r: (1 - (c - r)).clamp(min=0).mean(), "equal scores"),
        (lambda c, r: -F.logsigmoid(r - c).mean(), "sign"),
        (lambda c, r: -(F.logsigmoid(c) + F.logsigmoid(-r)).mean() / 2, "shift"),
        (lambda c, r: -torch.sigmoid(c - r).log().mean(), "far apart"),
        (lambda c, r: (1 + (r - c).exp()).log().mean(), "far apart"),
        (lambda c, r: -F.logsigmoid(c - r.detach()).mean(), "gradient"),
        (lambda c, r: pair_loss(c, r).item(), "gradient"),
        (lambda c, r: pair_loss(c, r).detach(), "gradient"),
    ]),
    "ex-k-way": (lambda s, r, m: reward_loss(s, r, m)[0], [
        (lambda s, r, m: reward_loss(s, r, m), "shape"),
        (with_(better=lambda a, b: a > b), "two responses"),
        (with_(better=lambda a, b: a <= b), "two responses"),
        (with_(better=lambda a, b: a != b), "two responses"),
        (with_(divide=lambda n, k: k * (k - 1)), "two responses"),
        (lambda s, r, m: len(s) * k_way(s, r, m), "two responses"),
        (with_(divide=lambda n, k: n**2), "equal scores"),
        (with_(divide=lambda n, k: 1), "equal scores"),
        (whole_ranking, "equal scores"),
        (with_(divide=lambda n, k: k * (k - 1) // 2), "ties"),
        (with_(exist=lambda m: m[:, None, :]), "missing responses"),
        (with_(exist=lambda m: m[:, :, None] & m[:, :, None], clean=False), "missing responses"),
        (masked_by_product, "missing responses"),
        (with_(cost=lambda z: -torch.sigmoid(z).log()), "far apart"),
        (with_(cost=lambda z: (1 + (-z).exp()).log()), "far apart"),
        (with_(pool=True), "prompts alike"),
        (neighbours_only, "all pairs"),
        (lambda s, r, m: k_way(s.detach(), r, m), "gradient"),
        (with_(clean=False), "gradient off the mask"),
    ]),
    "ex-last-token": (read_at(last_index), [
        (lambda v, m: v.gather(1, last_index(m)[:, None]), "shape"),
        (lambda v, m: torch.where(m, v, 0).sum(1) / m.sum(1), "no padding"),
        (read_at(lambda m: m.long().argmax(1)), "no padding"),
        (read_at(lambda m: last_index(m) - 1), "no padding"),
        (lambda v, m: v[:, -1], "padding on the right"),
        (read_at(lambda m: m.sum(1) - 1), "padding on the left"),
        (read_at(lambda m: m.shape[1] - (~m).sum(1) - 1), "padding on the left"),
        (lambda v, m: torch.where(m[:, -1], v[:, -1], read_at(lambda m: m.sum(1) - 1)(v, m)),
         "padding on both sides"),
        (one_hot_sum, "garbage"),
        (last_nonzero, "a score of 0"),
        (lambda v, m: read_at(last_index)(v, m).detach(), "gradient"),
    ]),
    "ex-accuracy": (accuracy, [
        (lambda s, r: [accuracy(s, r)], "shape"),
        (pooled(keep=lambda order: order < 0), "all right"),
        (lambda s, r: 2 * accuracy(s, r) - 1, "all wrong"),
        (pooled(rule=lambda s, r: (s > 0).double()), "tie in the scores"),
        (pooled(rule=lambda s, r: (s >= 0).double()), "tie in the scores"),
        (pooled(rule=lambda s, r: 0.5 + 0.5 * torch.sign(s), keep=lambda order: order >= 0),
         "tie in the ranks"),
        (lambda s, r: accuracy([torch.cat(s)], [torch.cat(r)]), "prompts apart"),
        (first_places_only, "every pair"),
        (pooled(keep=lambda order: order == 1), "every pair"),
        (mean_of_prompts, "pairs alike"),
        (pooled(keep=lambda order: (order > 0) & (order < 4)), "any ranking"),
    ]),
    "ex-ceiling": (root(1), [
        (lambda a: [root(1)(a)], "shape"),
        (lambda a: 1 + math.sqrt(max(2 * a - 1, 0)), "no noise"),
        (lambda a: root(-1)(a), "no noise"),
        (lambda a: math.sqrt(a), "coin toss"),
        (lambda a: a**2 + (1 - a)**2, "above the agreement"),
        (lambda a: a, "above the agreement"),
        (lambda a: a + (1 - a) * (2 * a - 1), "simulated labelers"),
        (lambda a: root(1)(a) - 0.002 * (0.5 < a < 1), "exact"),
    ]),
    "ex-plackett-luce": (rounds, [
        (lambda s: rounds(s).sum(), "shape"),
        (lambda s: -rounds(s), "two responses"),
        (lambda s: rounds(s, won=lambda i, k: 0.0), "two responses"),
        (lambda s: rounds(s) / len(s), "two responses"),
        (lambda s: s.softmax(0) - 1, "two responses"),
        (lambda s: rounds(s, won=lambda i, k: k / 2), "sum"),
        (lambda s: rounds(s, runs=lambda i: slice(None)), "equal scores"),
        (lambda s: s.softmax(0) - F.one_hot(torch.tensor(0), len(s)), "equal scores"),
        (pairwise, "equal scores"),
        (overflowing, "far apart"),
        (one_maximum, "far apart"),
        (masked_table, "far apart"),
        (by_autograd, "by hand"),
    ]),
    "ex-two-opinions": (("rises", "stays", "falls"), [
        ("rises", "form"),
        (("better", "same", "worse"), "form"),
        (("falls", "stays", "falls"), "other mistakes"),
        (("stays", "stays", "falls"), "other mistakes"),
        (("rises", "rises", "falls"), "the same mistakes"),
        (("rises", "stays", "stays"), "a coin"),
        (("rises", "stays", "rises"), "a coin"),
    ]),
    "hunt-06": (30, [(6, "line"), (22, "line"), (28, "line"), (29, "line"), (34, "line"),
                     (48, "number"), (30.0, "number")]),
}
