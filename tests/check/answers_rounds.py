"""Right and wrong answers to the exercises of chapter 11."""

from __future__ import annotations

import math

import numpy as np

from rlhf_mini.experiments.overoptimisation import best_of_n


def rate(r, g, b, *, centred=True, within=True, below="r", tilt="r", divide="late", spread=False):
    """The exchange rate, with one thing wrong if asked for."""
    w = np.exp(b * {"r": r, "g": g, "none": 0 * r}[tilt])
    w = w / (w.sum(1, keepdims=True) if within else w.mean() * w.shape[1])
    mean_r, mean_g = ((w * x).sum(1, keepdims=True) for x in (r, g))
    if not within:
        mean_r, mean_g = (w * r).sum() / w.sum(), (w * g).sum() / w.sum()
    if not centred:
        mean_r = mean_g = 0
    cov = (w * (r - mean_r) * (g - mean_g)).sum(1)
    x, mean = {"r": (r, mean_r), "g": (g, mean_g)}[below]
    var = (w * (x - mean) ** 2).sum(1)
    if spread:  # a correlation
        var = (var * (w * (g - mean_g) ** 2).sum(1)) ** 0.5
    if divide == "late":
        return cov.sum() / var.sum()
    with np.errstate(invalid="ignore"):
        return np.mean(cov / var) if divide == "early" else np.nanmean(cov / var)


def fresh_mean(r, g, b):
    """Weights of the tilted policy, but deviations from the mean of the untilted one."""
    w = np.exp(b * r)
    w /= w.sum(1, keepdims=True)
    r, g = r - r.mean(1, keepdims=True), g - g.mean(1, keepdims=True)
    return (w * r * g).sum() / (w * r * r).sum()


def best(r, g, n, weight):
    """Best of n with a weight for the response with i lower scores among M."""
    order = np.argsort(r, axis=1, kind="stable")
    w = np.array([weight(i, n, r.shape[1]) for i in range(r.shape[1])])
    return np.take_along_axis(g, order, 1) @ w


def drawn(i, n, m):
    return math.comb(i, n - 1) / math.comb(m, n)


def put_back(i, n, m):
    return ((i + 1) / m) ** n - (i / m) ** n


def groups(r, g, n):
    """Cut the samples into groups of n and take the best of each."""
    result = []
    for a, b in zip(r, g, strict=True):
        starts = range(0, len(a) - n + 1, n)
        result.append(np.mean([b[s + a[s:s + n].argmax()] for s in starts]))
    return np.array(result)


RIGHT = [("falls", "stays", "rises"), ("stays", "stays", "stays"), ("falls", "falls", "rises"),
         ("stays", "stays", "falls")]

ANSWERS = {
    "ex-exchange-rate": (rate, [
        (lambda r, g, b: (g - g.mean()) / (r - r.mean()), "shape"),
        (lambda r, g, b: np.cov(g.ravel(), r.ravel())[0, 1], "gold is the score"),
        (lambda r, g, b: rate(r, g, b, below="g"), "units"),
        (lambda r, g, b: rate(r, g, b, spread=True), "units"),
        (lambda r, g, b: rate(r, g, b, within=False), "within prompts"),
        (lambda r, g, b: rate(r, g, b, centred=False), "within prompts"),
        (lambda r, g, b: rate(r, g, b, divide="early"), "a prompt without spread"),
        (lambda r, g, b: rate(r, g, b, divide="nan"), "average first"),
        (lambda r, g, b: rate(r, g, b, tilt="none"), "tilt"),
        (lambda r, g, b: rate(r, g, -b), "tilt"),
        (lambda r, g, b: rate(r, g, b, tilt="g"), "tilt"),
        (fresh_mean, "tilt"),
    ]),
    "ex-best-of-n": (best_of_n, [
        (lambda r, g, n: best_of_n(r, g, n).mean(), "shape"),
        (lambda r, g, n: g.max(1), "n = 1"),
        (lambda r, g, n: best_of_n(g, g, n), "n = M"),
        (lambda r, g, n: best_of_n(r, r, n), "n = 1"),
        (lambda r, g, n: best(r, g, n, put_back), "n = M"),
        (lambda r, g, n: np.take_along_axis(g, np.argsort(r, 1)[:, -n:], 1).mean(1), "n = 1"),
        (lambda r, g, n: g[np.arange(len(r)), r[:, :n].argmax(1)], "n = 1"),
        (groups, "order"),
        (lambda r, g, n: g.mean(1) if n == 1 else best(r, g, r.shape[1], drawn), "n = 2"),
        (lambda r, g, n: best(r, g, n, drawn if n in (1, 2, r.shape[1]) else put_back), "between"),
        (lambda r, g, n: best(r, g, n, drawn), "ties"),
    ]),
    "ex-more-or-elsewhere": (lambda n, m, sigma: 1 + n * m**2 / sigma**2, [
        (lambda n, m, sigma: (n, m), "shape"),
        (lambda n, m, sigma: n * m**2 / sigma**2, "no mismatch"),
        (lambda n, m, sigma: m**2 + sigma**2 / n, "no mismatch"),
        (lambda n, m, sigma: 1 + n * m / sigma, "sign"),
        (lambda n, m, sigma: 1 + n * m**2 / sigma, "units"),
        (lambda n, m, sigma: 1 + m**2 / sigma**2, "break-even"),
        (lambda n, m, sigma: 1 + n * abs(m) / sigma, "break-even"),
        (lambda n, m, sigma: 1 / (1 + n * m**2 / sigma**2), "break-even"),
        (lambda n, m, sigma: 1 - n * m**2 / sigma**2, "break-even"),
    ]),
    "ex-again-predict": (RIGHT, [
        ("falls", "form"),
        (RIGHT[:3], "form"),
        ([("down", "up", "up")] * 4, "form"),
        ([("stays", "stays", "rises"), *RIGHT[1:]], "doubled"),
        ([("rises", "stays", "rises"), *RIGHT[1:]], "doubled"),
        ([RIGHT[0], ("falls", "stays", "rises"), *RIGHT[2:]], "constants"),
        ([*RIGHT[:2], ("stays", "falls", "rises"), RIGHT[3]], "noise"),
        ([*RIGHT[:2], ("falls", "stays", "rises"), RIGHT[3]], "noise"),
        ([*RIGHT[:3], ("falls", "falls", "falls")], "same texts"),
        ([*RIGHT[:3], ("stays", "stays", "stays")], "same texts"),
    ]),
    "hunt-11": (11, [(10, "line"), (20, "line"), (25, "line"), (36, "line"), (37, "line"),
                     (0, "number"), (40, "number"), ("11", "number")]),
}
