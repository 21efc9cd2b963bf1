"""Checks of chapter 12, evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from rlhf_mini.check.core import Property, close, exercise, moved, shaped, worded


def _numbers(got: object, count: int) -> bool:
    """Whether this is a tuple, list or array of so many numbers."""
    try:
        return np.asarray(got, dtype=float).shape == (count,)
    except (TypeError, ValueError):
        return False


# ---- win rates ---------------------------------------------------------------------------------


def _counted(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float, float]:
    """Return win rate, share of ties, and wins among the decided, by counting."""
    pairs = list(zip(ours.ravel().tolist(), theirs.ravel().tolist(), strict=True))
    wins, ties = sum(a > b for a, b in pairs), sum(a == b for a, b in pairs)
    decided = len(pairs) - ties
    return (wins + ties / 2) / len(pairs), ties / len(pairs), wins / decided if decided else 0.5


@exercise("ex-win-rate")
def win_rate(f: Callable) -> Generator[Property, None, str]:
    """Win rate, ties, rate without ties: f(ours, theirs) -> three numbers; both are (N, S)."""
    rng = np.random.default_rng(12)
    ours, theirs = rng.integers(0, 4, size=(2, 20, 3)) / 4
    got = f(ours, theirs)
    yield ("form", _numbers(got, 3), "Expected three numbers: the win rate, the share of ties and "
           "the rate without ties.")
    yield ("always better", close(f(theirs + 1, theirs), [1.0, 0.0, 1.0]),
           "Who is better in every comparison has won them all, and nothing is tied.")
    half = np.array([[1.0], [0.0], [0.5], [0.5]])
    yield ("ties", close(f(half, 0 * half + 0.5), _counted(half, 0 * half + 0.5)),
           "One win, one loss and two ties: look at each of the three numbers. A tie counts half "
           "for each side, and its share is a share of all comparisons.")
    yield ("no ties left", close(f(half[[0, 0, 1, 2]], 0 * half + 0.5),
                                 _counted(half[[0, 0, 1, 2]], 0 * half + 0.5)),
           "Two wins, one loss and a tie: what is left when ties are put aside is a share of the "
           "decided comparisons only.")
    yield ("two sides", close(f(ours, theirs)[0] + f(theirs, ours)[0], 1.0),
           "Both sides share one pie: the win rate of A over B and that of B over A sum to one.")
    yield ("nothing decided", close(f(ours, ours), [0.5, 1.0, 0.5]),
           "If every comparison is a tie, no side is ahead by either rate. Dividing by the number "
           "of decided comparisons then divides by 0.")
    yield ("all responses", close(got, _counted(ours, theirs)),
           "With S responses per prompt, response s of one side meets response s of the other, and "
           "every comparison counts the same.")
    return "You have written compute_win_rate of rlhf_mini/evaluation.py, without its interval."


# ---- an interval over prompts ------------------------------------------------------------------


@exercise("ex-eval-interval")
def interval(f: Callable) -> Generator[Property, None, str]:
    """Paired percentile bootstrap: f(ours, theirs, resamples) -> (low, high); both are (N, S)."""
    rng = np.random.default_rng(3)
    hard = rng.normal(size=(150, 1))
    theirs = hard + 0.3 * rng.normal(size=(150, 1))
    ours = 0.2 + hard + 0.3 * rng.normal(size=(150, 1))
    gain, got = (ours - theirs).mean(), f(ours, theirs, 4000)
    yield "form", _numbers(got, 2), "Expected two numbers: the lower end and the upper end."
    low, high = (float(x) for x in got)
    yield ("holds the mean", low < gain < high,
           "The interval of the gain (ours less theirs) should begin below the gain that was "
           "observed and end above it.")
    yield ("paired", close(f(theirs + 0.5, theirs, 200), [0.5, 0.5]),
           "One policy is better by exactly the same at every prompt, so on any other draw of "
           "prompts the gain would be the same. Both policies answered the same prompts.")
    copies = [np.repeat(x, 8, axis=1) for x in (ours, theirs)]
    copied = float(np.ptp(f(*copies, 4000)))
    yield ("samples together", close(copied / (high - low), 1.0, 0.04),
           "Every response was written down eight times. Nothing was learned, so the interval "
           "should be as wide as before.")
    width = 2 * 1.96 * (ours - theirs).std() / math.sqrt(150)
    yield ("width", close((high - low) / width, 1.0, 0.04),
           "For this many prompts the interval should be about two times 1.96 standard errors "
           "wide. Is each resample as large as the test set, and do 95 % of them lie inside?")
    noisy = rng.exponential(size=(100, 6)), 0.1 * rng.normal(size=(100, 6))
    mean, error = (noisy[0] - noisy[1]).mean(), (noisy[0] - noisy[1]).mean(1).std() / 10
    low, high = (float(x) for x in f(*noisy, 4000))
    yield ("all samples", low < mean < high and close((high - low) / (3.92 * error), 1.0, 0.05),
           "Six different responses to each prompt, and one gain per prompt: that of the means "
           "over all six. Around the mean of these gains the interval should be about four "
           "standard errors wide, no less and no more.")
    rare = np.zeros((40, 1))
    rare[:2] = 1
    low, high = (float(x) for x in f(rare, 0 * rare, 1000))
    yield ("range", low >= 0 and high > 0.05,
           "The gain is 0 at most prompts and 1 at a few: no draw of prompts can make it negative. "
           "An interval of percentiles stays in the range that is possible.")
    return "You have written mean_interval of rlhf_mini/evaluation.py, for a difference."


# ---- zero-shot ---------------------------------------------------------------------------------


def _targets() -> tuple[Tensor, Tensor, Tensor]:
    """Return logits (5, 4, 6), targets and mask (5, 4) of targets with 4, 3, 2, 2 and 1 tokens."""
    generator = torch.Generator().manual_seed(12)
    logits = torch.randn(5, 4, 6, generator=generator)
    mask = torch.arange(4) < torch.tensor([[4], [3], [2], [2], [1]])
    targets = torch.where(mask, logits.argmax(-1), 0)
    targets[1, 2], targets[3, 0] = logits[1, 2].argmin(), logits[3, 0].argmin()  # not solved
    return logits, targets, mask


@exercise("ex-zero-shot")
def zero_shot(f: Callable) -> Generator[Property, None, str]:
    """Score targets: f(logits, targets, mask) -> mean log-prob (B,), solved (B,) bool."""
    logits, targets, mask = _targets()
    got = f(logits, targets, mask)
    pair = isinstance(got, tuple | list) and len(got) == 2
    yield "form", pair, "Expected two tensors: the mean log-probability and what is solved."
    yield shaped(got[0], (5,), "one mean for each item")
    yield shaped(got[1], (5,), "one truth value for each item")
    yield ("truth values", getattr(got[1], "dtype", None) == torch.bool,
           "An item is solved or it is not: the second tensor should be of bool.")
    means, _ = f(0 * logits, targets, mask)
    yield ("uniform", close(means, torch.full((5,), -math.log(6))),
           "A model that knows nothing gives each of the V tokens the same probability, so the "
           "mean per token is minus ln V, however long the target is.")
    one = f(logits[4:, :1], targets[4:, :1], mask[4:, :1])
    yield ("one token", close(one[0], [float(logits[4, 0].log_softmax(0)[targets[4, 0]])])
           and bool(one[1]),
           "For a target of one token the mean is the log-probability of that token, and the item "
           "is solved if it is the likeliest.")
    dirty = torch.where(mask[:, :, None], logits, torch.inf)
    wrong = torch.where(mask, targets, 5)
    again = f(dirty, wrong, mask)
    yield ("padding in the mean", close(again[0], got[0]),
           "What stands behind the end of a target must not count, neither in the sum nor in the "
           "number of tokens, not even if it is infinite.")
    solved = torch.tensor([True, False, True, False, True])
    yield ("padding in what is solved", bool(again[1][2]) and bool(again[1][4]),
           "These targets are written right to their end. Behind it nothing has to be right.")
    yield ("every token", close(got[1].int(), solved.int()),
           "Greedy decoding writes a target only if each of its tokens is the likeliest after "
           "those before it: the first one is not enough, nor is the last.")
    slow = [np.mean([float(logits[b, t].log_softmax(0)[targets[b, t]]) for t in range(n)])
            for b, n in enumerate(mask.sum(1).tolist())]
    yield ("mean per token", close(got[0], slow),
           "The log-probabilities of a target's own tokens are averaged over these tokens.")
    return ("You have written the heart of evaluate_zero_shot; minus the first result, over "
            "documents, is the corpus loss that the alignment tax is measured by.")


# ---- derive ------------------------------------------------------------------------------------


@exercise("ex-eval-power")
def power(f: Callable) -> Generator[Property, None, str]:
    """Prompts that a gain costs: f(sigma, delta) -> one number."""
    yield shaped(f(0.3, 0.01), ())
    n = float(f(0.3, 0.01))
    yield ("a smaller gain", close(float(f(0.3, 0.005)) / n, 4.0, 1e-2),
           "A standard error shrinks with the root of n, and half the gain has to stand out from "
           "half the error.")
    yield ("more noise", close(float(f(0.9, 0.01)) / n, 9.0, 1e-2),
           "Three times the standard deviation is made up for by a standard error that is three "
           "times smaller.")
    seen = NormalDist().cdf(0.01 * math.sqrt(n) / 0.3 - 1.96) if n > 0 else 0.0
    yield ("false alarms", seen > 0.3, "With so few prompts the interval would mostly hold 0. It "
           "excludes 0 only if the mean that is observed lies 1.96 standard errors above.")
    yield ("power", close(seen, 0.8, 2e-3),
           "The observed mean is itself normal, around the true gain. The share of it that lies "
           "above 1.96 standard errors should be 80 %, no less and no more.")
    return "Both quantiles add up: one for the false alarms, one for the misses."


@exercise("ex-seeds-or-prompts")
def seeds_or_prompts(f: Callable) -> Generator[Property, None, str]:
    """Prompts per seed at the least variance: f(sigma_s, sigma_e, c_seed, c_prompt) -> n."""
    yield shaped(f(0.02, 0.3, 100.0, 0.1), ())
    n = float(f(0.02, 0.3, 100.0, 0.1))
    yield ("currency", close(f(0.02, 0.3, 300.0, 0.3), n),
           "In another currency both prices are three times as high; the best plan is the same.")
    yield ("units", close(f(0.2, 3.0, 100.0, 0.1), n),
           "In another unit of gold both spreads are ten times as large; the best plan is the "
           "same.")
    yield ("direction", float(f(0.04, 0.3, 100.0, 0.1)) < n < float(f(0.02, 0.3, 200.0, 0.1)),
           "The more the seeds differ, the fewer prompts each of them should get; the dearer a "
           "seed is, the more should be asked of it.")
    for s, e, seed, prompt in ((0.02, 0.3, 100.0, 0.1), (0.1, 0.4, 50.0, 0.02), (1, 1, 9, 1)):
        n = float(f(s, e, seed, prompt))
        times = np.array([0.98, 1.0, 1.02]) * max(n, 1e-9)
        left, here, right = (s**2 + e**2 / times) * (seed + times * prompt)
        yield ("least variance", bool(here < left and here < right),
               "With the same money and a few more or fewer prompts per seed, the mean over seeds "
               "would have a smaller variance. Put the number of seeds that the money buys into "
               "the variance, then vary n.")
    return "The money itself does not occur: more of it buys more seeds, not more prompts for each."


# ---- predict -----------------------------------------------------------------------------------


def _measure(outcomes: np.ndarray) -> tuple[float, float, float]:
    """Return win rate, rate without ties and width of the interval of outcomes (N, S)."""
    decided = outcomes[outcomes != 0.5]
    return float(outcomes.mean()), float(decided.mean()), float(
        2 * 1.96 * outcomes.mean(1).std() / math.sqrt(len(outcomes)))


@exercise("ex-eval-predict")
def predict(answer: object) -> Generator[Property, None, str]:
    """Four changes of an evaluation, three measures: a list of four triples of words."""
    yield ("form", worded(answer, 4, 3), "Expected a list of 4 rows, one for each change, each of "
           "three words, and every word one of: rises, falls, stays.")
    outcomes = np.repeat([1.0, 0.5, 0.0], [100, 60, 40])[:, None]  # one response per prompt
    tossed = np.repeat([1.0, 0.0], [130, 70])[:, None]
    changes = {
        "new prompts": (np.vstack([outcomes, outcomes]),
                        "More prompts of the same kind change no share on average. What do they "
                        "change?"),
        "same texts": (np.vstack([outcomes, 0 * outcomes + 0.5]),
                       "At the new prompts no side is ahead. Which of the rates counts them, and "
                       "how far do outcomes now scatter, over how many prompts?"),
        "copies": (np.repeat(outcomes, 2, axis=1),
                   "Nothing was learned from writing down everything twice, if samples of one "
                   "prompt stay together."),
        "coin": (tossed, "A coin gives half of the ties to each side. What did a tie count before, "
                 "in either rate, and how far from the mean is an outcome now?")}
    for row, (name, (changed, meaning)) in zip(answer, changes.items(), strict=True):
        truth = [moved(1, b / a, 0.01) for a, b in
                 zip(_measure(outcomes), _measure(changed), strict=True)]
        yield name, list(row) == truth, meaning
    return "The win rate feels ties that say nothing; the rate without ties feels how ties end."
