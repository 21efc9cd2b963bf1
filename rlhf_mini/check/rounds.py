"""Checks of chapter 11, around again."""

from __future__ import annotations

from collections.abc import Callable, Generator
from itertools import combinations

import numpy as np

from rlhf_mini.check.core import Property, close, exercise, finite, moved, shaped, worded


def _responses(prompts: int = 4, k: int = 5, seed: int = 11) -> tuple[np.ndarray, np.ndarray]:
    """Return scores and gold (prompts, k); prompts differ in mean and in spread."""
    rng = np.random.default_rng(seed)
    spread = rng.uniform(0.3, 2, (prompts, 1))
    r = spread * rng.normal(size=(prompts, k)) + rng.normal(size=(prompts, 1))
    return r, 0.4 * r + rng.normal(size=r.shape)


def _means(r: np.ndarray, values: np.ndarray, b: float) -> float:
    """Sum over prompts of the mean of `values` under the tilted policy, one prompt at a time."""
    total = 0.0
    for scores, row in zip(r, values, strict=True):
        weights = [np.exp(b * s) for s in scores]
        total += sum(w * v for w, v in zip(weights, row, strict=True)) / sum(weights)
    return total


# ---- the exchange rate -------------------------------------------------------------------------


@exercise("ex-exchange-rate")
def exchange_rate(f: Callable) -> Generator[Property, None, str]:
    """Exchange rate on a leash of looseness b: f(r, g, b) -> one number; r, g (prompts, K)."""
    r, g = _responses()
    yield shaped(f(r, g, 0.0), ())
    yield ("gold is the score", close(f(r, r, 0.0), 1.0) and close(f(r, r, 0.8), 1.0),
           "Where the score is gold itself, one unit of it is worth one unit of gold, on every "
           "leash.")
    yield ("units", close(f(r, 3 * r, 0.0), 3.0) and close(f(4 * r, r, 0.0), 0.25),
           "The rate is gold per unit of score: it grows with the unit of gold and shrinks with "
           "the unit of the score. Which variance stands below the fraction line?")
    r_up, g_up = r + [[0.0], [2.0], [-1.0], [4.0]], g + [[1.0], [3.0], [0.0], [5.0]]
    yield ("within prompts", close(f(r_up, g_up, 0.0), f(r, g, 0.0))
           and close(f(r_up, g_up, 0.5), f(r, g, 0.5)),
           "Some prompts got higher scores and more gold for all of their responses alike. A "
           "policy cannot exchange its prompt for an easier one, so the rate should not move.")
    flat, more = np.vstack([r, np.ones((1, 5))]), np.vstack([g, [[0, 1, 0, 1, 0]]])
    got = f(flat, more, 0.0)
    yield ("a prompt without spread", finite(got) and close(got, f(r, g, 0.0)),
           "One more prompt came, whose responses all score alike. The score moves nothing there: "
           "it has no rate of its own, and should leave the common one as it is.")
    cov, var = (sum(np.cov(a, b, bias=True)[0, 1] for a, b in zip(*pair, strict=True))
                for pair in ((r, g), (r, r)))
    yield ("average first", close(got, cov / var),
           "Every prompt alone is right, but not all together. With the same b for all, the "
           "speeds at which gold and score rise add up over prompts; only then are they divided.")
    for b in (0.7, -0.4):
        dg, dr = (_means(r, x, b + 1e-5) - _means(r, x, b - 1e-5) for x in (g, r))
        yield ("tilt", close(f(r, g, b), dg / dr, 1e-4),
               "At b = 0 the rate is right. On a looser leash every mean in covariance and "
               "variance has the weights of the tilted policy, which sum to one for each prompt.")
    return "At b = 0 it is this page's rate_of, for other b the right panel of its figure."


# ---- best of n ---------------------------------------------------------------------------------


def _best(scores: np.ndarray, values: np.ndarray, n: int) -> list[float]:
    """Best of n by going through all draws of n from the pool."""
    result = []
    for score, value in zip(scores, values, strict=True):
        kept = []
        for chosen in combinations(range(len(score)), n):
            top = max(score[j] for j in chosen)
            kept.append(np.mean([value[j] for j in chosen if score[j] == top]))
        result.append(float(np.mean(kept)))
    return result


@exercise("ex-best-of-n")
def best_of_n(f: Callable) -> Generator[Property, None, str]:
    """Expected gold of the best of n: f(r, g, n) -> (prompts,); r, g (prompts, M)."""
    r, g = _responses(3, 6, seed=4)
    yield shaped(f(r, g, 2), (3,), "one mean for each prompt")
    yield ("n = 1", close(f(r, g, 1), g.mean(1)),
           "The best of one is a response drawn at random, whatever its score.")
    top = g[np.arange(3), r.argmax(1)]
    yield ("n = M", close(f(r, g, 6), top),
           "If all M responses are drawn there is nothing left to chance: the one with the best "
           "score is kept, and what counts is its gold.")
    mixed = [3, 0, 5, 1, 4, 2]
    yield ("order", close(f(r[:, mixed], g[:, mixed], 2), f(r, g, 2)),
           "The same responses in another order gave another result. In what order they were "
           "sampled says nothing.")
    yield ("n = 2", close(f(r, g, 2), _best(r, g, 2)),
           "Go through all pairs of different responses by hand, keep the one with the better "
           "score of each, and take the mean of its gold: your number differs.")
    yield ("between", all(close(f(r, g, n), _best(r, g, n)) for n in (3, 4, 5)),
           "One, two and all are right, but not what lies between. In how many draws of n is a "
           "response the best? All the others have to come from those that score lower.")
    tied = np.round(r)
    yield ("ties", all(close(f(tied, g, n), _best(tied, g, n)) for n in (2, 4, 6)),
           "Responses with equal scores, such as the same text twice, are equally likely to be "
           "kept. Yours prefers one of them, by its place.")
    return "You have written best_of_n of rlhf_mini/experiments/overoptimisation.py."


# ---- more, or elsewhere ------------------------------------------------------------------------


@exercise("ex-more-or-elsewhere")
def more_or_elsewhere(f: Callable) -> Generator[Property, None, str]:
    """Price up to which a ranking from the new place pays: f(n, m, sigma) -> one number."""
    yield shaped(f(100, 0.2, 1.0), ())
    yield ("no mismatch", close(f(100, 0.0, 1.0), 1.0),
           "If both places ask for the same thing, a ranking is worth the same wherever it comes "
           "from, so nobody should pay more for it.")
    yield ("sign", close(f(50, -0.3, 1.0), f(50, 0.3, 1.0)),
           "It does not matter to which side the old place is off.")
    yield ("units", close(f(50, 0.6, 2.0), f(50, 0.3, 1.0)),
           "Mismatch and noise are measured in the same unit; in another unit both numbers are "
           "twice as large, and the decision must not change.")
    for n, m, sigma in ((40, 0.3, 1.0), (1000, 0.1, 2.0), (3, 1.0, 0.5)):
        c = float(f(n, m, sigma))
        new = c / n * sigma**2 if c > 0 else 0.0
        yield ("break-even", close(new, m**2 + sigma**2 / n),
               "At this price both data sets should leave the same mean squared error. That is "
               "variance plus squared bias, and the same money buys fewer of the dearer labels.")
    return "The more labels there are already, the more a label from the new place is worth."


# ---- predict -----------------------------------------------------------------------------------


def measure(r: np.ndarray, g: np.ndarray) -> tuple[float, float, float]:
    """Return exchange rate, accuracy against gold and spread of scores r, gold g (prompts, K)."""
    dr, dg = (x[:, :, None] - x[:, None, :] for x in (r, g))
    accuracy = (np.sign(dr[dg > 0]) + 1).mean() / 2
    return float((dr * dg).sum() / (dr**2).sum()), float(accuracy), float(r.std(1).mean())


@exercise("ex-again-predict")
def predict(answer: object) -> Generator[Property, None, str]:
    """Four changes of the scores, three measures: a list of four triples of words."""
    yield ("form", worded(answer, 4, 3), "Expected a list of 4 rows, one for each change, each of "
           "three words, and every word one of: rises, falls, stays.")
    rng = np.random.default_rng(0)
    r, g = _responses(600, 6)
    same = np.repeat(r[:, :1], 6, axis=1), np.repeat(g[:, :1], 6, axis=1)
    changes = {
        "doubled": ((2 * r, g), "Nothing happens to the order of two responses, only to the unit "
                    "in which they are scored."),
        "constants": ((r + 5 * rng.normal(size=(600, 1)), g),
                      "Which of the three compare responses to different prompts?"),
        "noise": ((r + 2 * rng.normal(size=r.shape), g),
                  "Noise that knows nothing of gold leaves the covariance as it is on average. "
                  "What does it do to the variance, and to a pair that is close?"),
        "same texts": ((np.vstack([r, same[0]]), np.vstack([g, same[1]])),
                       "What does a prompt whose responses are all one text add to the covariance, "
                       "to the variance, to the pairs with a better and a worse one?")}
    for row, (name, (changed, meaning)) in zip(answer, changes.items(), strict=True):
        truth = [moved(1, b / a, 0.01) for a, b in
                 zip(measure(r, g), measure(*changed), strict=True)]
        yield name, list(row) == truth, meaning
    return "Only the accuracy is blind to the unit; only the spread sees prompts of one text."
