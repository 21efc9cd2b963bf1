"""Right and wrong answers to the exercises of chapter 12."""

from __future__ import annotations

import numpy as np
import torch

from rlhf_mini.config import EvaluationConfig
from rlhf_mini.evaluation import compute_win_rate


def win_rate(ours, theirs):
    result = compute_win_rate(ours, theirs, EvaluationConfig(bootstrap=20))
    return result["mean"], result["ties"], result["without_ties"]


def shares(ours, theirs, tie=0.5, safe=True, strict=True):
    """Win rate, ties and rate without ties, with one thing wrong."""
    wins, ties = ((ours > theirs) if strict else (ours >= theirs)).mean(), (ours == theirs).mean()
    decided = 1 - ties
    with np.errstate(invalid="ignore"):
        without = wins / decided if decided > 0 or not safe else 0.5
    return wins + tie * ties, ties, without


def bootstrap(ours, theirs, resamples, *, paired=True, flat=False, mean=True, ends=(2.5, 97.5),
              replace=True, size=None, sign=1):
    """The percentile bootstrap of a gain, with one thing wrong."""
    rng = np.random.default_rng(0)
    ours, theirs = (x.ravel() if flat else x.mean(1) for x in (sign * ours, sign * theirs))
    n = len(ours)
    size = size or n
    rows = np.array([rng.choice(n, size, replace) for _ in range(resamples)])
    others = rows if paired else rng.integers(n, size=(resamples, size))
    gains = ours[rows] - theirs[others]
    return np.percentile(gains.mean(1) if mean else gains, ends)


def drawn_twice(ours, theirs, resamples):
    """Draw prompts, then samples again inside of each prompt."""
    rng = np.random.default_rng(0)
    gain = ours - theirs
    n, count = gain.shape
    rows = rng.integers(n, size=(resamples, n, 1))
    return np.percentile(gain[rows, rng.integers(count, size=(resamples, n, count))].mean((1, 2)),
                         [2.5, 97.5])


def normal(ours, theirs, resamples):
    x = (ours - theirs).mean(1)
    half = 1.96 * x.std() / len(x) ** 0.5
    return x.mean() - half, x.mean() + half


def score(logits, targets, mask, *, mean=True, count=None, safe=True, first=False, last=False,
          padded=False, some=False, shift=False):
    """Mean log-prob and whether each token is the argmax, with one thing wrong."""
    logp = logits.log_softmax(-1)
    if shift:
        logp = logp.roll(1, 1)
    logp = logp.gather(-1, targets[..., None])[..., 0]
    logp = torch.where(mask, logp, 0) if safe else logp * mask
    total = logp.sum(1)
    means = total / (count or mask.sum(1)) if mean else total
    right = logits.argmax(-1) == targets
    if first or last:
        column = 0 if first else mask.sum(1) - 1
        return means, right[torch.arange(len(right)), column]
    if padded:
        return means, right.all(1)
    return means, (right & mask).any(1) if some else (right | ~mask).all(1)


RIGHT = [("stays", "stays", "falls"), ("falls", "stays", "falls"), ("stays", "stays", "stays"),
         ("stays", "falls", "rises")]

ANSWERS = {
    "ex-win-rate": (win_rate, [
        (lambda a, b: (a > b).mean(), "form"),
        (lambda a, b: win_rate(b, a), "always better"),
        (lambda a, b: shares(a, b, tie=0.0), "ties"),
        (lambda a, b: shares(a, b, tie=1.0), "ties"),
        (lambda a, b: (shares(a, b)[0], (a == b).sum(), shares(a, b)[2]), "ties"),
        (lambda a, b: (*shares(a, b)[:2], shares(a, b)[0] / (1 - (a == b).mean() or 1)), "ties"),
        (lambda a, b: (*shares(a, b)[:2], (a > b).mean() / max((a >= b).mean(), 0.1)), "ties"),
        (lambda a, b: (*shares(a, b)[:2], shares(a, b)[0]), "no ties left"),
        (lambda a, b: shares(a, b, safe=False), "nothing decided"),
        (lambda a, b: (*shares(a, b)[:2], (a > b).sum() / max((a != b).sum(), 1)),
         "nothing decided"),
        (lambda a, b: win_rate(a[:, :1], b[:, :1]), "all responses"),
        (lambda a, b: win_rate(a.mean(1, keepdims=True), b.mean(1, keepdims=True)),
         "all responses"),
    ]),
    "ex-eval-interval": (bootstrap, [
        (lambda a, b, n: (a - b).mean(), "form"),
        (lambda a, b, n: bootstrap(a, b, n, sign=-1), "holds the mean"),
        (lambda a, b, n: bootstrap(a, b, n, replace=False), "holds the mean"),
        (lambda a, b, n: bootstrap(a, b, n)[::-1], "holds the mean"),
        (lambda a, b, n: bootstrap(a, b, n, paired=False), "paired"),
        (lambda a, b, n: bootstrap(a, 0 * b, n) - b.mean(), "paired"),
        (lambda a, b, n: bootstrap(a, b, n, flat=True), "samples together"),
        (lambda a, b, n: bootstrap(a, b, n, mean=False), "width"),
        (lambda a, b, n: bootstrap(a, b, n, ends=(5, 95)), "width"),
        (lambda a, b, n: bootstrap(a, b, n, size=100), "width"),
        (lambda a, b, n: bootstrap(a[:, :1], b[:, :1], n), "all samples"),
        (lambda a, b, n: bootstrap(a[:, -1:], b[:, -1:], n), "all samples"),
        (lambda a, b, n: bootstrap(np.median(a, 1)[:, None], np.median(b, 1)[:, None], n),
         "all samples"),
        (lambda a, b, n: bootstrap(np.median(a - b, 1)[:, None], 0 * a[:, :1], n), "all samples"),
        (lambda a, b, n: bootstrap(a.max(1)[:, None], b.max(1)[:, None], n), "all samples"),
        (drawn_twice, "all samples"),
        (normal, "range"),
    ]),
    "ex-zero-shot": (score, [
        (lambda x, y, m: score(x, y, m)[0], "form"),
        (lambda x, y, m: (score(x, y, m)[0].mean(), score(x, y, m)[1]), "shape"),
        (lambda x, y, m: (score(x, y, m)[0], score(x, y, m)[1].float().mean()), "shape"),
        (lambda x, y, m: (score(x, y, m)[0], score(x, y, m)[1].float()), "truth values"),
        (lambda x, y, m: score(x, y, m, mean=False), "uniform"),
        (lambda x, y, m: score(x, y, m, count=m.shape[1]), "uniform"),
        (lambda x, y, m: (-score(x, y, m)[0], score(x, y, m)[1]), "uniform"),
        (lambda x, y, m: (x.gather(-1, y[..., None])[..., 0].where(m, 0).sum(1) / m.sum(1),
                          score(x, y, m)[1]), "uniform"),
        (lambda x, y, m: score(x, y, torch.ones_like(m)),
         "padding in the mean"),
        (lambda x, y, m: score(x, y, m, safe=False), "padding in the mean"),
        (lambda x, y, m: score(x, y, m, padded=True), "padding in what is solved"),
        (lambda x, y, m: score(x, y, m, first=True), "every token"),
        (lambda x, y, m: score(x, y, m, last=True), "every token"),
        (lambda x, y, m: score(x, y, m, some=True), "every token"),
        (lambda x, y, m: (torch.where(m, x.max(-1).values - x.logsumexp(-1), 0).sum(1) / m.sum(1),
                          score(x, y, m)[1]), "mean per token"),
    ]),
    "ex-eval-power": (lambda sigma, delta: (2.8 * sigma / delta) ** 2, [
        (lambda sigma, delta: [2.8], "shape"),
        (lambda sigma, delta: 2.8 * sigma / delta, "a smaller gain"),
        (lambda sigma, delta: 2.8**2 * sigma**2 / delta, "a smaller gain"),
        (lambda sigma, delta: 2.8**2 * sigma / delta**2, "more noise"),
        (lambda sigma, delta: (sigma / delta) ** 2, "false alarms"),
        (lambda sigma, delta: (0.84 * sigma / delta) ** 2, "false alarms"),
        (lambda sigma, delta: (1.96 * sigma / delta) ** 2, "power"),
        (lambda sigma, delta: (1.96 + 1.28) ** 2 * (sigma / delta) ** 2, "power"),
        (lambda sigma, delta: 2 * (2.8 * sigma / delta) ** 2, "power"),
        (lambda sigma, delta: (1.96**2 + 0.84**2) * (sigma / delta) ** 2, "power"),
    ]),
    "ex-seeds-or-prompts": (lambda s, e, seed, prompt: (e / s) * (seed / prompt) ** 0.5, [
        (lambda s, e, seed, prompt: (1, 2), "shape"),
        (lambda s, e, seed, prompt: (e / s) * seed, "currency"),
        (lambda s, e, seed, prompt: e * (seed / prompt) ** 0.5, "units"),
        (lambda s, e, seed, prompt: (s / e) * (seed / prompt) ** 0.5, "direction"),
        (lambda s, e, seed, prompt: (e / s) * (prompt / seed) ** 0.5, "direction"),
        (lambda s, e, seed, prompt: seed / prompt, "direction"),
        (lambda s, e, seed, prompt: (e / s) ** 2, "direction"),
        (lambda s, e, seed, prompt: (e / s) * (seed / prompt), "least variance"),
        (lambda s, e, seed, prompt: (e / s) ** 2 * (seed / prompt) ** 0.5, "least variance"),
        (lambda s, e, seed, prompt: (e / s) ** 2 * seed / prompt, "least variance"),
    ]),
    "ex-eval-predict": (RIGHT, [
        (["stays", "stays", "falls"], "form"),
        (RIGHT + RIGHT[:1], "form"),
        ([("stays", "stays", "stays"), *RIGHT[1:]], "new prompts"),
        ([("rises", "rises", "falls"), *RIGHT[1:]], "new prompts"),
        ([RIGHT[0], ("stays", "stays", "falls"), *RIGHT[2:]], "same texts"),
        ([RIGHT[0], ("falls", "falls", "falls"), *RIGHT[2:]], "same texts"),
        ([*RIGHT[:2], ("stays", "stays", "falls"), RIGHT[3]], "copies"),
        ([*RIGHT[:3], ("falls", "falls", "rises")], "coin"),
        ([*RIGHT[:3], ("stays", "falls", "stays")], "coin"),
    ]),
    "hunt-12": (43, [(34, "line"), (37, "line"), (38, "line"), (41, "line"), (25, "line"),
                     (50, "line"), (53, "number"), (43.0, "number")]),
}
