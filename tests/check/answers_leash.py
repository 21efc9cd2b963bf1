"""Right and wrong answers to the exercises of chapter 8."""

from __future__ import annotations

import torch

from rlhf_mini.advantages import compute_rewards
from rlhf_mini.kl import KLController, compute_exact_kl, estimate_kl


def probabilities(logits, ref_logits):
    p, q = logits.softmax(-1), ref_logits.softmax(-1)
    return (p * (p.log() - q.log())).sum(-1)


def from_logarithms(log):
    """The KL with the wrong logarithm of both models' logits."""
    return lambda z, ref: (z.softmax(-1) * (log(z) - log(ref))).sum(-1)


def estimator(**changed):
    """The three estimators, some of them changed: functions of d."""
    def f(logprobs, ref_logprobs, kind):
        if kind in changed:
            return changed[kind](logprobs - ref_logprobs)
        return estimate_kl(logprobs, ref_logprobs, kind)
    return f


def rewards_variant(price=lambda d: d, pay=None, last=None):
    """Rewards with one thing wrong: the price of a log-ratio, or the place of the score."""
    def f(scores, logprobs, ref_logprobs, mask, beta):
        result = torch.where(mask, -beta * price(logprobs - ref_logprobs), 0)
        if pay:
            return result + pay(scores, mask)
        at = last(mask) if last else mask.sum(1) - 1
        return result.index_put((torch.arange(len(mask)), at), scores, accumulate=True)
    return f


def without_last(scores, logprobs, ref_logprobs, mask, beta):
    result = torch.where(mask, -beta * (logprobs - ref_logprobs), 0)
    result[torch.arange(len(mask)), mask.sum(1) - 1] = scores
    return result


def all_at_the_end(scores, logprobs, ref_logprobs, mask, beta):
    """The penalty of the whole response is paid by its last token."""
    total = compute_rewards(scores, logprobs, ref_logprobs, mask, beta).sum(1)
    return compute_rewards(total, logprobs, ref_logprobs, mask, 0.0)


def shifted(scores, logprobs, ref_logprobs, mask, beta):
    """Each token pays for the one before it, the first one for the last one."""
    d = torch.stack([torch.cat([row[:n].roll(1), row[n:]]) for row, n in
                     zip(logprobs - ref_logprobs, mask.sum(1).tolist(), strict=True)])
    return compute_rewards(scores, d, 0 * d, mask, beta)


def unmasked(scores, logprobs, ref_logprobs, mask, beta):
    full = compute_rewards(scores, logprobs, ref_logprobs, mask, beta)
    return torch.where(mask, full, -beta * (logprobs - ref_logprobs))


def multiplied(scores, logprobs, ref_logprobs, mask, beta):
    result = -beta * (logprobs - ref_logprobs) * mask
    return result.index_put((torch.arange(len(mask)), mask.sum(1) - 1), scores, accumulate=True)


def steer(beta, kl, target, episodes, horizon):
    controller = KLController(beta, target, horizon)
    controller.update(kl, episodes)
    return controller.kl_coef


def steer_variant(error=lambda kl, target: kl / target - 1, low=-0.2, high=0.2,
                  scale=lambda n, horizon: n / horizon, step=lambda beta, x: beta * (1 + x)):
    """The controller with one thing wrong."""
    def f(beta, kl, target, episodes, horizon):
        if target == 0:
            return beta
        e = min(max(error(kl, target), low), high)
        return step(beta, e * scale(episodes, horizon))
    return f


def two_leashes(scores, ref, old, beta, eta):
    return ((beta * ref.log() + eta * old.log() + scores) / (beta + eta)).softmax(-1)


def mixture(scores, ref, old, beta, eta):
    both = (beta * ref + eta * old) / (beta + eta)
    return (both.log() + scores / (beta + eta)).softmax(-1)


def overflowing(scores, ref, old, beta, eta):
    share = beta / (beta + eta)
    weights = ref**share * old ** (1 - share) * (scores / (beta + eta)).exp()
    return weights / weights.sum()


ANSWERS = {
    "ex-kl-exact": (compute_exact_kl, [
        (lambda z, ref: compute_exact_kl(z, ref).mean(), "shape"),
        (lambda z, ref: z.log_softmax(-1) - ref.log_softmax(-1), "shape"),
        (lambda z, ref: (z.softmax(-1) * ref.log_softmax(-1)).sum(-1), "equal policies"),
        (lambda z, ref: -compute_exact_kl(z, ref), "never negative"),
        (lambda z, ref: (z.log_softmax(-1) - ref.log_softmax(-1)).sum(-1), "never negative"),
        (lambda z, ref: compute_exact_kl(ref, z), "direction"),
        (lambda z, ref: (compute_exact_kl(z, ref) + compute_exact_kl(ref, z)) / 2, "direction"),
        (lambda z, ref: (z.softmax(-1) - ref.softmax(-1)).abs().sum(-1) / 2, "direction"),
        (lambda z, ref: (z.softmax(-1) * (z - ref)).sum(-1).abs(), "logits"),
        (lambda z, ref: compute_exact_kl(z, ref) / 0.6931, "direction"),
        (lambda z, ref: compute_exact_kl(z, ref) * (4 / z.shape[-1]), "sum over the vocabulary"),
        (probabilities, "impossible tokens"),
        (from_logarithms(lambda z: (z.softmax(-1) + 1e-12).log()), "impossible tokens"),
        (from_logarithms(lambda z: z.softmax(-1).clamp(min=1e-30).log()), "impossible tokens"),
        (from_logarithms(lambda z: z.softmax(-1).log().nan_to_num()), "impossible tokens"),
        (lambda z, ref: probabilities(z, ref).nan_to_num(), "impossible tokens"),
        (from_logarithms(lambda z: z - z.exp().sum(-1, keepdim=True).log()), "large logits"),
    ]),
    "ex-kl-estimators": (estimate_kl, [
        (lambda n, r, kind: estimate_kl(n, r, kind).mean(), "shape"),
        (estimator(k3=lambda d: (-d).exp() + d), "equal policies"),
        (estimator(k1=lambda d: -d), "sign of k1"),
        (estimator(k1=lambda d: d.abs()), "k1 unbiased"),
        (estimator(k1=lambda d: d.exp() - 1), "k1 unbiased"),
        (estimator(k2=lambda d: d / 2), "k2 symmetric"),
        (estimator(k3=lambda d: torch.expm1(-d) - d), "k3 never negative"),
        (estimator(k3=lambda d: torch.expm1(d) + d), "k3 never negative"),
        (estimator(k3=lambda d: torch.expm1(d) - d), "k3 unbiased"),
        (estimator(k3=lambda d: d**2 / 2), "k3 unbiased"),
        (estimator(k2=lambda d: d**2), "k2 near 0"),
        (estimator(k3=lambda d: (-d).exp() - 1 + d), "k3 near 0"),
    ]),
    "ex-kl-rewards": (compute_rewards, [
        (lambda *a: compute_rewards(*a).sum(1), "shape"),
        (rewards_variant(pay=lambda s, m: torch.where(m, s[:, None], 0)), "beta = 0"),
        (rewards_variant(last=lambda m: 0 * m.sum(1)), "beta = 0"),
        (rewards_variant(last=lambda m: m.sum(1) - 2), "beta = 0"),
        (rewards_variant(price=lambda d: -d), "sign of the KL"),
        (all_at_the_end, "sign of the KL"),
        (rewards_variant(price=torch.abs), "bonus"),
        (rewards_variant(price=lambda d: torch.expm1(-d) + d), "bonus"),
        (without_last, "last token pays too"),
        (unmasked, "zero at padding"),
        (multiplied, "zero at padding"),
        (rewards_variant(last=lambda m: torch.full((len(m),), m.shape[1] - 1)), "zero at padding"),
        (lambda s, n, r, m, b: compute_rewards(s, n, r, m, b / m.sum(1, keepdim=True)), "total"),
        (shifted, "place"),
    ]),
    "ex-kl-controller": (steer, [
        (lambda *a: [steer(*a)], "shape"),
        (steer_variant(error=lambda kl, target: kl / target), "on target"),
        (lambda beta, kl, target, n, h: beta * kl / target if target else beta, "small errors"),
        (steer_variant(step=lambda beta, x: beta * (1 - x)), "direction"),
        (steer_variant(error=lambda kl, target: target / kl - 1), "direction"),
        (lambda beta, kl, target, n, h: steer_variant()(beta, kl, target or 1.0, n, h), "fixed"),
        (lambda beta, kl, target, n, h: beta * (1 + max(-0.2, min(0.2, kl / target - 1)) * n / h),
         "fixed"),
        (steer_variant(error=lambda kl, target: kl - target), "small errors"),
        (steer_variant(step=lambda beta, x: beta + x), "small errors"),
        (lambda beta, kl, target, n, h: beta if target == 0 or kl == target else beta * (
            1 + max(min(kl / target - 1, -0.2), 0.2) * n / h), "direction"),
        (steer_variant(high=1e9), "clip above"),
        (steer_variant(low=-1.0), "clip below"),
        (steer_variant(low=0.0), "direction"),
        (steer_variant(step=lambda beta, x: beta + 0.2 * x), "factor"),
        (steer_variant(scale=lambda n, h: n / 10_000), "horizon"),
        (steer_variant(scale=lambda n, h: 0.05 if n == 500 else n / h), "horizon"),
    ]),
    "ex-kl-filter": (lambda s, beta: ((s - s.max()) / beta).exp(), [
        (lambda s, beta: (s / beta).exp().mean(), "shape"),
        (lambda s, beta: (s / beta).exp(), "probability"),
        (lambda s, beta: (s / beta).softmax(-1), "equal scores"),
        (lambda s, beta: (s > 0).double(), "optimum"),
        (lambda s, beta: (s == s.max()).double(), "optimum"),
        (lambda s, beta: (s - s.max()).exp(), "optimum"),
        (lambda s, beta: ((s - s.max()) * beta).exp(), "optimum"),
        (lambda s, beta: 0.9 * ((s - s.max()) / beta).exp() if s.std() > 0 else torch.ones(3),
         "no waste"),
        (lambda s, beta: (s / beta).exp() / (s / beta).exp().max(), "shift"),
    ]),
    "ex-kl-two-leashes": (two_leashes, [
        (lambda *a: two_leashes(*a).log().sum(), "shape"),
        (lambda *a: two_leashes(*a).log(), "distribution"),
        (lambda s, ref, old, beta, eta: ref * (s / (beta + eta)).exp(), "distribution"),
        (lambda s, ref, old, beta, eta: (ref.log() + old.log() + s / (beta + eta)).softmax(-1),
         "one leash"),
        (lambda s, ref, old, beta, eta: (ref.log() + s / (beta + eta)).softmax(-1),
         "other leash"),
        (lambda s, ref, old, beta, eta: (ref.log() + s / beta).softmax(-1), "other leash"),
        (lambda s, ref, old, beta, eta: (
            (beta * ref.log() + eta * old.log()) / (beta + eta)
            + s / max(beta, eta)).softmax(-1), "same end"),
        (mixture, "no better policy"),
        (lambda s, ref, old, beta, eta: (beta * (ref.log() + s / (beta + eta)).softmax(-1) + eta * (
            old.log() + s / (beta + eta)).softmax(-1)) / (beta + eta), "no better policy"),
        (overflowing, "steep"),
    ]),
    "ex-kl-predict": (["falls", "stays", "stays", "rises", "falls"], [
        ("falls", "five words"),
        (["falls", "stays", "stays", "up", "down"], "five words"),
        (["rises", "stays", "stays", "rises", "falls"], "change 1"),
        (["falls", "rises", "stays", "rises", "falls"], "change 2"),
        (["falls", "stays", "rises", "rises", "falls"], "change 3"),
        (["falls", "stays", "stays", "stays", "falls"], "change 4"),
        (["falls", "stays", "stays", "rises", "rises"], "change 5"),
    ]),
    "hunt-08": (26, [(5, "line"), (12, "line"), (21, "line"), (27, "line"), (41, "line"),
                     (42, "line"), (0, "number"), (43, "number"), (None.__class__, "number")]),
}
