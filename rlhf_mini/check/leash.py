"""Checks of chapter 8, the KL leash."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator

import torch
from torch import Tensor

from rlhf_mini.check.core import Property, close, exercise, finite, gradient, moved, shaped, worded

Steps = Generator[Property, None, str]
# The six answers of the chapter: how often the reference gives them, and their scores.
REF = torch.tensor([0.10, 0.40, 0.15, 0.20, 0.05, 0.10], dtype=torch.double)
SCORES = torch.tensor([1.0, 0.2, 0.4, -0.2, 1.2, -1.0], dtype=torch.double)


def _policy(seed: int = 8) -> Tensor:
    """Return probabilities (6,) of another policy."""
    noise = torch.randn(6, generator=torch.Generator().manual_seed(seed)).double()
    return (REF.log() + noise).softmax(-1)


def _kl(policy: Tensor, ref: Tensor) -> float:
    """Return KL(policy || ref) of two distributions (V,), term by term."""
    return sum(p * math.log(p / q) for p, q in zip(policy.tolist(), ref.tolist(), strict=True))


def _optimum(scores: Tensor, ref: Tensor, beta: float) -> Tensor:
    """Return ref * exp(scores / beta), normalised (V,)."""
    return (ref.log() + scores / beta).softmax(-1)


@exercise("ex-kl-exact")
def exact(f: Callable) -> Steps:
    """KL of the next-token distributions of two models: f(logits, ref_logits) -> (...)."""
    logits, ref_logits = torch.randn(2, 2, 3, 5, generator=torch.Generator().manual_seed(8))
    yield shaped(f(logits, ref_logits), (2, 3), "one KL for each place")
    yield ("equal policies", close(f(logits, logits), torch.zeros(2, 3)),
           "A distribution is at distance 0 from itself.")
    yield ("never negative", bool((f(logits, ref_logits) >= 0).all()),
           "The KL divergence of two distributions is never negative. Are yours distributions, "
           "and is the sum weighed?")
    kept = torch.tensor([0.5, 0.5, 1e-12, 1e-12]).log()
    yield ("direction", close(f(kept, torch.zeros(4)), math.log(2), 1e-4),
           "A policy that keeps half of the reference's probability and gives the rest up is "
           "log 2 away. The other direction has no bound there.")
    yield ("logits", close(f(logits + 3, ref_logits - 2), f(logits, ref_logits)),
           "Logits are not log-probabilities: a constant added to all of them changes nothing "
           "about the distribution, and has changed your result.")
    table = [[_kl(p, q) for p, q in zip(*rows, strict=True)] for rows in
             zip(logits.softmax(-1), ref_logits.softmax(-1), strict=True)]
    yield ("sum over the vocabulary", close(f(logits, ref_logits), table),
           "The KL at one place is a sum over the vocabulary, in nats, not a mean and not in bits.")
    yield ("large logits", close(f(logits + 500, ref_logits + 500), table, 1e-3),
           "Logits of 500 overflow the exponential function, although the distributions are as "
           "before. Their largest has to be taken off first; torch does it for you.")
    even, never = torch.zeros(2), torch.tensor([0.0, -300.0])
    yield ("impossible tokens", close(f(never, even), math.log(2)) and
           close(f(even, never), 150 - math.log(2)),
           "A probability of 1e-130 is rounded to 0, and its logarithm to -inf. A small number "
           "that is added, or put in the place of infinity, makes the result finite and wrong. "
           "Take the logarithms from the logits in one step, not from the probabilities.")
    return "You have written compute_exact_kl of rlhf_mini/kl.py."


@exercise("ex-kl-estimators")
def estimators(f: Callable) -> Steps:
    """k1, k2, k3: f(logprobs, ref_logprobs, kind) -> (...)."""
    new, ref = _policy().log(), REF.log()
    kinds = "k1", "k2", "k3"
    for kind in kinds:
        yield shaped(f(new.view(2, 3), ref.view(2, 3), kind), (2, 3), f"{kind}, one per token")
    yield ("equal policies", all(close(f(ref, ref, kind), torch.zeros(6)) for kind in kinds),
           "Where both models give a token the same probability, every estimate is 0.")
    likes = f(torch.tensor([-1.0]), torch.tensor([-2.0]), "k1")
    yield ("sign of k1", finite(likes) and bool(likes > 0),
           "A token that the policy likes more than the reference does says that they are apart: "
           "k1 is positive there.")
    p, truth = new.exp(), _kl(_policy(), REF)
    yield ("k1 unbiased", close((p * f(new, ref, "k1")).sum(), truth),
           "Averaged over tokens of the policy, k1 is the KL divergence by definition.")
    yield ("k2 symmetric", close(f(new, ref, "k2"), f(ref, new, "k2")) and
           bool((f(new, ref, "k2") >= 0).all()),
           "k2 does not care about the sign of d and is never negative.")
    yield ("k3 never negative", bool((f(new, ref, "k3") >= 0).all()),
           "k3 is the height of the exponential function above its tangent at 0. A single value "
           "below zero says that a sign or a constant is wrong.")
    yield ("k3 unbiased", close((p * f(new, ref, "k3")).sum(), truth),
           "k3 is never negative, as it should be, and its mean over tokens of the policy is not "
           "the KL. What is added to k1 has to have the mean 0 under the policy: what is the mean "
           "of your exponential?")
    tiny = torch.tensor([1e-4, -2e-4])
    small = f(tiny, torch.zeros(2), "k2") / torch.tensor([5e-9, 2e-8])
    yield ("k2 near 0", close(small, torch.ones(2), 1e-3),
           "Near the reference k2 and k3 agree to second order in d. Yours differ by a factor.")
    yield ("k3 near 0", close(f(tiny, torch.zeros(2), "k3") / f(tiny, torch.zeros(2), "k2"),
                              torch.ones(2), 0.02),
           "Where d is small, two numbers close to 1 are subtracted, and of the seven digits of a "
           "float32 few are left. torch has a function for exactly this difference.")
    return "You have written estimate_kl of rlhf_mini/kl.py."


@exercise("ex-kl-rewards")
def rewards(f: Callable) -> Steps:
    """Rewards per token: f(scores, logprobs, ref_logprobs, mask, beta) -> (B, T)."""
    new, ref = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(81)) - 2
    mask = torch.arange(4) < torch.tensor([[4], [2], [1]])
    scores = torch.tensor([1.5, -0.5, 0.25])
    yield shaped(f(scores, new, ref, mask, 0.3), (3, 4), "rewards")
    alone = f(scores[:1], new[:1], ref[:1], mask[:1], 0.0)
    yield ("beta = 0", close(alone, [[0.0, 0.0, 0.0, 1.5]]),
           "Without a price there is only the score, and it is paid once, at the last token.")
    one, two = torch.full((1, 2), -1.0), torch.full((1, 2), -2.0)
    likes = f(torch.zeros(1), one, two, one < 0, 0.5)[0, 0]
    yield ("sign of the KL", finite(likes) and bool(likes < 0),
           "A token that the policy likes more than the reference does costs something, at once. "
           "Here it costs nothing, or it even earns something: paid for leaving.")
    yield ("bonus", close(f(torch.zeros(1), two, one, one < 0, 0.5)[0, 0], -likes),
           "A token that the policy likes less than the reference does gets the log-ratio back as "
           "a bonus. Without it nothing pulls a lost token home.")
    yield ("last token pays too", close(f(scores[2:], new[2:, :1], ref[2:, :1], mask[2:, :1], 0.3),
                                        scores[2:, None] - 0.3 * (new - ref)[2:, :1]),
           "The last token, EOS, is a token like all others: it pays for its distance and gets the "
           "score on top.")
    dirty = [torch.where(mask, x, torch.inf) for x in (new, ref)]
    got = f(scores, *dirty, mask, 0.3)
    yield ("zero at padding", close(got[~mask], torch.zeros(5)),
           "Behind the end of a response nothing is paid, whatever the tensors hold there. If a "
           "score has landed there, no token has earned it.")
    total = scores - 0.3 * torch.where(mask, new - ref, 0).sum(1)
    yield ("total", close(got.sum(1), total),
           "The rewards of a response have to add up to score minus beta times its summed "
           "log-ratio.")
    slow = torch.zeros(3, 4)
    for b, t in mask.nonzero().tolist():
        slow[b, t] = -0.3 * (new[b, t] - ref[b, t]) + (scores[b] if t == mask[b].sum() - 1 else 0)
    yield ("place", close(got, slow),
           "The sum is right, but something is paid at the wrong token: to each its own log-ratio, "
           "and the score to the last real token of each response.")
    return "You have written compute_rewards of rlhf_mini/advantages.py."


@exercise("ex-kl-controller")
def controller(f: Callable) -> Steps:
    """The next coefficient: f(beta, kl, target, episodes, horizon) -> one number."""
    yield shaped(f(0.2, 6.0, 6.0, 64, 10_000), ())
    yield ("on target", close(f(0.2, 6.0, 6.0, 64, 10_000), 0.2),
           "Where the distance is right, the price stays.")
    up, down = f(0.2, 6.6, 6.0, 500, 10_000), f(0.2, 5.4, 6.0, 500, 10_000)
    yield ("direction", up > 0.2 > down,
           "A policy that is too far away must pay more, and one that is too near less.")
    try:
        kept = f(0.2, 50.0, 0.0, 64, 10_000)
    except ZeroDivisionError:
        kept = None
    yield ("fixed", close(kept, 0.2),
           "A target of 0 means: keep the coefficient, as most runs of this book do. It is no "
           "number to divide by.")
    yield ("small errors", close([up, down], [0.2 * 1.005, 0.2 * 0.995]),
           "A KL that misses the target by a tenth moves the coefficient by a tenth, times "
           "episodes over horizon, as a factor.")
    far = [f(0.2, kl, 6.0, 500, 10_000) for kl in (7.21, 12.0, 600.0)]
    yield ("clip above", close(far, [0.2 * 1.01] * 3),
           "However far away one rollout is, an error above 0.2 counts as 0.2.")
    near = [f(0.2, kl, 6.0, 500, 10_000) for kl in (4.79, 0.0, -3.0)]
    yield ("clip below", close(near, [0.2 * 0.99] * 3),
           "An error below -0.2 counts as -0.2. (An estimated KL may even be negative.)")
    yield ("factor", close(f(20.0, 6.6, 6.0, 500, 10_000), 100 * up) and
           close(f(1e-6, 0.0, 6.0, 20_000, 10_000) * 1e6, 0.6),
           "The update multiplies. So it acts alike on large and small coefficients, and none "
           "becomes negative.")
    yield ("horizon", close(f(0.2, 6.6, 6.0, 500, 1_000), 0.21) and
           close(f(0.2, 6.6, 6.0, 100, 1_000), 0.202),
           "The more episodes a rollout has and the shorter the horizon is, the more it moves the "
           "coefficient.")
    return "You have written KLController.update of rlhf_mini/kl.py."


@exercise("ex-kl-filter")
def keep(f: Callable) -> Steps:
    """Probability to keep a response of the reference: f(scores, beta) -> (N,)."""
    chance = f(SCORES, 0.5)
    yield shaped(chance, (6,), "a tensor, one probability for each response,")
    yield ("probability", bool(((chance >= 0) & (chance <= 1)).all()),
           "A probability lies between 0 and 1.")
    yield ("equal scores", close(f(torch.full((3,), 2.0), 0.5), torch.ones(3)),
           "Where all responses score the same, the optimum is the reference: there is no reason "
           "to throw any away.")
    for beta in (0.5, 2.0):
        kept = REF * f(SCORES, beta)
        yield ("optimum", close(kept / kept.sum(), _optimum(SCORES, REF, beta)),
               "What is kept is distributed as ref times your probability, normalised. That is not "
               "the optimum.")
    yield ("no waste", close(f(SCORES, 0.5).max(), 1.0),
           "What is kept has the right distribution, but even the best response is thrown away at "
           "times. All probabilities could be larger by one common factor.")
    yield ("shift", close(f(SCORES + 1000, 0.5), f(SCORES, 0.5)),
           "A constant added to all scores changes no decision, and must not overflow either.")
    return "Nothing was trained, and it is exact: but look at how few are kept."


@exercise("ex-kl-two-leashes")
def two_leashes(f: Callable) -> Steps:
    """Best policy on two leashes: f(scores, ref, old, beta, eta) -> probabilities (V,)."""
    old = _policy(82)
    best = f(SCORES, REF, old, 0.5, 0.3)
    yield shaped(best, (6,), "probabilities")
    yield ("distribution", close(best.sum(), 1.0) and bool((best >= 0).all()),
           "Probabilities are not negative and add up to 1.")
    yield ("one leash", close(f(SCORES, REF, old, 0.5, 0.0), _optimum(SCORES, REF, 0.5)),
           "With eta = 0 there is only the reference, and the optimum is the one of the chapter.")
    yield ("other leash", close(f(SCORES, REF, old, 0.0, 0.3), _optimum(SCORES, old, 0.3)),
           "With beta = 0 there is only the old policy, and it takes the place of the reference.")
    yield ("same end", close(f(SCORES, REF, REF, 0.5, 0.3), _optimum(SCORES, REF, 0.8)),
           "Two leashes to one and the same policy are one leash, and its price is the sum.")

    def objective(logits: Tensor) -> Tensor:
        p = logits.softmax(-1)
        return p @ SCORES - 0.5 * p @ (p / REF).log() - 0.3 * p @ (p / old).log()

    yield ("no better policy", close(gradient(objective, best.log()), torch.zeros(6)),
           "At the best policy the objective has no slope. At yours a small step makes it better.")
    yield ("steep", finite(f(1000 * SCORES, REF, old, 0.5, 0.3)),
           "Scores that are large against the prices overflow the exponential function. Stay with "
           "logarithms until the end.")
    return "Do the argument with one leash again, and nothing new is needed: it is one line."


@exercise("ex-kl-predict")
def predict(answer: object) -> Steps:
    """What five changes do to the KL of the optimum: a list of five words."""
    yield ("five words", worded(answer, 5),
           "Expected a list of five words, each one of falls, stays, rises.")

    def distance(scores: Tensor, beta: float) -> float:
        return _kl(_optimum(scores, REF, beta), REF)

    def raised(index: int) -> Tensor:
        return SCORES + 0.1 * (torch.arange(6) == index)

    changes = [
        (SCORES, 1.0, "A nat costs twice as much."),
        (SCORES + 5, 0.5, "Look at what a common constant does to Z."),
        (2 * SCORES, 1.0, "Only one combination of score and price stands in the optimum."),
        (raised(4), 0.5, "Compare the score of this answer with the mean score under the optimum. "
         "Does the change draw the two apart, or together?"),
        (raised(5), 0.5, "Compare the score of this answer with the mean score under the optimum, "
         "not its probability with the reference's. Are the two drawn apart, or together?")]
    for i, (scores, beta, meaning) in enumerate(changes):
        truth = moved(distance(SCORES, 0.5), distance(scores, beta))
        yield f"change {i + 1}", answer[i] == truth, meaning
    return "More differences between scores, measured in units of beta, mean more distance."
