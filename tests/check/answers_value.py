"""Right and wrong answers to the exercises of chapter 9."""

from __future__ import annotations

import torch

from rlhf_mini.advantages import compute_gae


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
    "hunt-09": (17, [(1, "line"), (5, "line"), (12, "line"), (18, "line"), (0, "number"),
                     ("17", "number"), (99, "number")]),
}
