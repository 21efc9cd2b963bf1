"""Right and wrong answers to the exercises of chapter 9."""

from __future__ import annotations

import torch

from rlhf_mini.advantages import compute_gae
from rlhf_mini.ppo import value_loss
from rlhf_mini.tensors import masked_mean, masked_var, masked_whiten


def gae(rewards, values, mask, gamma, gae_lambda):
    return compute_gae(rewards, values, mask, gamma, gae_lambda)[0]


def variant(value_at_end=False, pad=False, forward=False, weight=None, sign=1.0, masked=True):
    """GAE with one thing wrong."""
    def f(rewards, values, mask, gamma, gae_lambda):
        v = torch.where(mask, values, 0) if masked else values
        r = torch.where(mask, rewards, 0)
        result = torch.zeros_like(v)
        ahead = v[:, -1] if value_at_end else torch.zeros_like(v[:, 0])
        so_far = torch.zeros_like(ahead)
        steps = range(v.shape[1]) if forward else reversed(range(v.shape[1]))
        for t in steps:
            delta = r[:, t] + gamma * ahead - sign * v[:, t]
            so_far = delta + (weight or (lambda g, lam: g * lam))(gamma, gae_lambda) * so_far
            so_far = so_far if pad else torch.where(mask[:, t], so_far, 0)
            result[:, t] = so_far
            ahead = v[:, t]
        return result + (1.0 * ~mask if pad else 0)
    return f


def whitened(mean, var, eps=1e-8, x=lambda x, m: torch.where(m, x, 0), out=torch.where):
    """Whitening with its parts replaced."""
    def f(values, mask):
        z = x(values, mask)
        return out(mask, (z - mean(z, mask)) * (var(z, mask) + eps) ** -0.5, 0)
    return f


def clipped(v, o, r, m, w, near=None, pick=torch.max, mean=masked_mean, half=0.5):
    """Value loss with its parts replaced."""
    v, o, r = (torch.where(m, x, 0) for x in (v, o, r))
    close = v.clamp(o - w, o + w) if near is None else near(v, o, w)
    return half * mean(pick((v - r) ** 2, (close - r) ** 2), m)


def explained(v, r, m):
    return 1 - masked_var(r - v, m) / masked_var(r, m)


def mean_of_means(x, m):
    return masked_mean(x, m, 1).mean()


ANSWERS = {
    "ex-gae": (gae, [
        (lambda r, v, m, g, lam: compute_gae(r, v, m, g, lam), "shape"),
        (lambda r, v, m, g, lam: gae(r, v, m, g, lam).sum(1), "shape"),
        (variant(value_at_end=True), "terminal step"),
        (variant(sign=-1.0), "terminal step"),
        (variant(forward=True), "lambda = 0"),
        (lambda r, v, m, g, lam: gae(r, v, m, 1.0, lam), "lambda = 0"),
        (lambda r, v, m, g, lam: torch.where(m, r - v, 0), "lambda = 0"),
        (variant(weight=lambda g, lam: lam), "lambda = 1"),
        (variant(masked=False), "mask"),
        (variant(pad=True), "zero at padding"),
        (variant(weight=lambda g, lam: g * lam**2), "in between"),
        (lambda r, v, m, g, lam: (1 - lam) * gae(r, v, m, g, 0) + lam * gae(r, v, m, g, 1),
         "in between"),
    ]),
    "ex-gae-horizon": (lambda lam, left: (1 - lam**left) / (1 - lam), [
        (lambda lam, left: [1.0], "shape"),
        (lambda lam, left: float(left), "lambda = 0"),
        (lambda lam, left: 1 / (1 - lam), "lambda near 1"),
        (lambda lam, left: 1.0, "lambda near 1"),
        (lambda lam, left: 1 + lam * (left - 1) * 1.0 + lam * (1 - lam) * (left == 1),
         "one token left"),
        (lambda lam, left: 1 + lam * (left - 1), "weights"),
    ]),
    "ex-whiten": (masked_whiten, [
        (lambda x, m: masked_whiten(x, m)[m], "shape"),
        (lambda x, m: masked_whiten(x, m, shift_mean=False), "mean"),
        (whitened(masked_mean, lambda x, m: masked_var(x, m) ** 2), "variance"),
        (whitened(masked_mean, lambda x, m: x[m].var()), "variance"),
        (whitened(lambda x, m: masked_mean(x, m, 1)[:, None], masked_var), "variance"),
        (whitened(lambda x, m: masked_mean(x, m, 1)[:, None],
                  lambda x, m: x.var(1, unbiased=False)[:, None]), "one rollout"),
        (lambda x, m: (x - x.mean()) / x.std(unbiased=False), "mask"),
        (whitened(lambda x, m: x.mean(), masked_var, x=lambda x, m: x), "mask"),
        (whitened(lambda x, m: x.mean(), lambda x, m: x.var(unbiased=False)), "uneven lengths"),
        (whitened(masked_mean, masked_var, out=lambda m, x, _: x), "zero at padding"),
        (whitened(lambda x, m: (x * m).sum() / m.sum(), masked_var, x=lambda x, m: x * m),
         "infinity at padding"),
        (whitened(masked_mean, masked_var, eps=0.0), "equal entries"),
        (whitened(masked_mean, masked_var, eps=1e-6), "small spread"),
        (whitened(masked_mean, masked_var, eps=1e-5), "small spread"),
        (whitened(masked_mean, masked_var, eps=1e-4), "small spread"),
        (whitened(masked_mean, lambda x, m: (masked_var(x, m).sqrt() + 1e-8) ** 2, eps=0.0),
         "small spread"),
    ]),
    "ex-value-loss": (lambda *a: value_loss(*a)[0], [
        (lambda *a: value_loss(*a), "shape"),
        (lambda v, o, r, m, w: torch.max((v - r) ** 2, (v.clamp(o - w, o + w) - r) ** 2) / 2,
         "shape"),
        (lambda *a: clipped(*a, half=1.0), "at the rollout"),
        (lambda *a: clipped(*a, near=lambda v, o, w: (v - o).clamp(-w, w)), "at the rollout"),
        (lambda *a: clipped(*a, near=lambda v, o, w: v.clamp(-w, w)), "at the rollout"),
        (lambda *a: clipped(*a, near=lambda v, o, w: o.clamp(v - w, v + w)), "within the range"),
        (lambda *a: clipped(*a, near=lambda v, o, w: v.clamp(1 - w, 1 + w) * o),
         "tokens of all responses"),
        (lambda *a: clipped(*a, near=lambda v, o, w: v), "edge of the range"),
        (lambda *a: clipped(*a, pick=torch.min), "edge of the range"),
        (lambda *a: clipped(*a, near=lambda v, o, w: v + (v.clamp(o - w, o + w) - v).detach()),
         "no gradient beyond"),
        (lambda *a: clipped(*a, pick=lambda unclipped, near: near), "a way back"),
        (lambda *a: clipped(*a, mean=lambda x, m: torch.where(m, x, 0).mean()),
         "mean over real tokens"),
        (lambda v, o, r, m, w: 0.5 * masked_mean(
            torch.max((v - r) ** 2, (v.clamp(o - w, o + w) - r) ** 2), m), "mask"),
        (lambda *a: clipped(*a, mean=mean_of_means), "tokens of all responses"),
    ]),
    "ex-explained-variance": (explained, [
        (lambda v, r, m: [explained(v, r, m)], "shape"),
        (lambda v, r, m: masked_var(r - v, m) / masked_var(r, m), "perfect critic"),
        (lambda v, r, m: 1 - masked_mean((r - v) ** 2, m) / masked_var(r, m), "a shift"),
        (lambda v, r, m: 1 - (masked_var(r - v, m) / masked_var(r, m)) ** 0.5,
         "worse than a constant"),
        (lambda v, r, m: 1 - masked_var(r - v, m) / masked_var(v, m), "constant critic"),
        (lambda v, r, m: explained(v, r, m).clamp(min=0), "worse than a constant"),
        (lambda v, r, m: torch.corrcoef(torch.stack([v[m] + 1e-9 * r[m], r[m]]))[0, 1] ** 2,
         "constant critic"),
        (lambda v, r, m: 1 - (r - v).var() / r.var(), "mask"),
        (lambda v, r, m: 1 - torch.where(m, r - v, 0).var() / torch.where(m, r, 0).var(),
         "uneven lengths"),
        (lambda v, r, m: 1 - masked_var(r - v, m) / masked_mean(r**2, m), "constant critic"),
    ]),
    "ex-gae-blame": ([-0.25, -1, 0, -0.25, -1, -1], [
        ([-0.25, -1, 0], "six numbers"),
        ("all of them", "six numbers"),
        ([0, 0, 0, 0, 0, -1], "the culprit"),
        ([0.25, 1, 0, 0.25, 1, 1], "the culprit"),
        ([-0.25, -1, -0.5, -0.25, -1, -1], "after the mistake"),
        ([-0.125, -1, 0, -0.25, -1, -1], "before the mistake"),
        ([0, -1, 0, -0.25, -1, -1], "before the mistake"),
        ([-0.25, -1, 0, -1, 0, -1], "an innocent token"),
        ([-0.25, -1, 0, 0, -1, -1], "the culprit of a late critic"),
        ([-0.25, -1, 0, -0.25, -1, -0.25], "lambda = 1"),
    ]),
    "hunt-09": (31, [(1, "line"), (5, "line"), (17, "line"), (32, "line"), (33, "line"),
                     (0, "number"), ("31", "number"), (99, "number")]),
}
