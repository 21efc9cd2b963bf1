"""Right and wrong answers to the exercises of chapter 7."""

from __future__ import annotations

import torch

from rlhf_mini.ppo import policy_loss
from rlhf_mini.rloo import rloo_advantages, rloo_loss
from rlhf_mini.tensors import masked_mean


def surrogate(logprobs, mask, scores, baseline):
    return rloo_loss(logprobs, (scores - baseline).detach(), mask)[0]


def whitened(logprobs, mask, scores, baseline):
    x = scores - baseline - (scores - baseline).mean()
    return rloo_loss(logprobs, (x / x.pow(2).mean().sqrt().clamp(min=1e-6)).detach(), mask)[0]


def summed(logprobs, mask):
    return torch.where(mask, logprobs, 0).sum(1)


def loo(scores):
    return rloo_advantages(scores.flatten(), scores.shape[1]).view(scores.shape)


def ratios(logprobs, old_logprobs, mask):
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0)
    return log_ratio.exp(), log_ratio.sum(1).exp()


def detached(logprobs, old_logprobs, mask):
    tokens, whole = ratios(logprobs, old_logprobs, mask)
    return tokens.detach(), whole


def whole_detached(logprobs, old_logprobs, mask):
    tokens, whole = ratios(logprobs, old_logprobs, mask)
    return tokens, whole.detach()


def chosen_late(logprobs, old_logprobs, mask):
    """Puts the 1 at padding after the exponential: the gradient there is 0 times infinity."""
    return (torch.where(mask, (logprobs - old_logprobs).exp(), 1),
            torch.where(mask, logprobs - old_logprobs, 0).sum(1).exp())


def of_probabilities(logprobs, old_logprobs, mask):
    new, old = (torch.where(mask, x, 0).exp() for x in (logprobs, old_logprobs))
    return new / old, new.prod(1) / old.prod(1)


def clipped(logprobs, old_logprobs, advantages, mask, clip_range):
    return policy_loss(logprobs, old_logprobs, advantages, mask, clip_range)[0]


def loss_variant(pick=torch.max, low=-1.0, high=1.0, side=-1.0, ratio=torch.exp, fixed=None,
                 mean=masked_mean):
    """The clipped loss with one thing wrong."""
    def f(logprobs, old_logprobs, advantages, mask, clip_range):
        width = fixed or clip_range
        r = ratio(torch.where(mask, logprobs - old_logprobs, 0))
        a = side * torch.where(mask, advantages, 0)
        return mean(pick(a * r, a * r.clamp(1 + low * width, 1 + high * width)), mask)
    return f


def masked_by_product(logprobs, old_logprobs, advantages, mask, clip_range):
    r = (logprobs - old_logprobs).exp()
    terms = torch.max(-advantages * r, -advantages * r.clamp(1 - clip_range, 1 + clip_range))
    return (terms * mask).sum() / mask.sum()


def cut_gradient(logprobs, old_logprobs, advantages, mask, clip_range):
    """Leaves out the clipped tokens instead of counting them at the end of the range."""
    r = torch.where(mask, logprobs - old_logprobs, 0).exp()
    a = torch.where(mask, advantages, 0)
    out = ((a > 0) & (r > 1 + clip_range)) | ((a < 0) & (r < 1 - clip_range))
    return masked_mean(torch.where(out, 0, -a * r), mask)


def mean_of_means(x, mask):
    return masked_mean(x, mask, dim=1).mean()


ANSWERS = {
    "ex-theory-surrogate": (surrogate, [
        (lambda lp, m, s, b: -(s - b) * summed(lp, m), "shape"),
        (lambda lp, m, s, b: ((s - b) * summed(lp, m)).mean(), "sign"),
        (lambda lp, m, s, b: surrogate(lp, m, s, b).item(), "gradient"),
        (lambda lp, m, s, b: surrogate(lp, m, s, b).detach(), "gradient"),
        (lambda lp, m, s, b: surrogate(lp, m, s - b, (s - b).mean()), "baseline"),
        (whitened, "baseline"),
        (lambda lp, m, s, b: -((s - b) * summed(lp, m).exp()).mean(), "baseline"),
        (lambda lp, m, s, b: -(s * summed(lp, m)).mean(), "baseline"),
        (lambda lp, m, s, b: -((s + b) * summed(lp, m)).mean(), "baseline"),
        (lambda lp, m, s, b: -((s - b) * masked_mean(lp, m, dim=1)).mean(), "every token"),
        (lambda lp, m, s, b: -((s - b) * lp[:, -1]).mean(), "every token"),
        (lambda lp, m, s, b: -((s - b) * lp.sum(1)).mean(), "mask"),
        (lambda lp, m, s, b: -((s - b) * (lp * m).sum(1)).mean(), "mask"),
        (lambda lp, m, s, b: -((s - b) * summed(lp, m)).sum() / m.sum(), "every token"),
        (lambda lp, m, s, b: -((s - b) * summed(lp, m)).sum(), "mean over responses"),
        (lambda lp, m, s, b: -((s - b) * summed(lp, m)).mean(),
         "no gradient through the baseline"),
    ]),
    "ex-theory-two-arms": (lambda p, first, second: (1 - p) * first + p * second, [
        (lambda p, first, second: torch.tensor([first, second]), "shape"),
        (lambda p, first, second: 0.0, "equal scores"),
        (lambda p, first, second: first + second, "equal scores"),
        (lambda p, first, second: (first * second) ** 0.5, "shift"),
        (lambda p, first, second: max(first, second), "even odds"),
        (lambda p, first, second: p * first + (1 - p) * second, "least variance"),
        (lambda p, first, second: (first + second) / 2, "least variance"),
        (lambda p, first, second: ((1 - p) ** 2 * first + p**2 * second)
         / ((1 - p) ** 2 + p**2), "least variance"),
    ]),
    "ex-theory-loo": (loo, [
        (lambda s: s - s.mean(1), "error"),
        (lambda s: (s - s.mean(1, keepdim=True)).mean(1), "shape"),
        (lambda s: s, "equal scores"),
        (lambda s: s.mean(1, keepdim=True) - s, "two responses"),
        (lambda s: s - s.mean(1, keepdim=True), "two responses"),
        (lambda s: (s - s.mean(1, keepdim=True)) / s.std(1, keepdim=True).clamp(min=1e-6),
         "two responses"),
        (lambda s: s - (s.sum(1, keepdim=True) - s) / s.shape[1], "equal scores"),
        (lambda s: (s - s.mean()) * s.numel() / (s.numel() - 1), "prompts apart"),
        (lambda s: (s - s.mean(1, keepdim=True)) * 2, "own score"),
        (lambda s: s - s.roll(1, dims=1), "mean of the others"),
    ]),
    "ex-theory-ratio": (ratios, [
        (lambda n, o, m: ratios(n, o, m)[0], "two results"),
        (lambda n, o, m: ratios(n, o, m)[::-1], "shape"),
        (lambda n, o, m: (ratios(n, o, m)[0], ratios(n, o, m)[1].mean()), "shape"),
        (lambda n, o, m: tuple(x.log() for x in ratios(n, o, m)), "equal policies"),
        (lambda n, o, m: ratios(o, n, m), "direction"),
        (lambda n, o, m: ((n - o).exp(), ratios(n, o, m)[1]), "padding"),
        (lambda n, o, m: ((n - o).exp() * m, (n - o).exp().prod(1)), "padding"),
        (lambda n, o, m: (ratios(n, o, m)[0], masked_mean((n - o).exp(), m, dim=1)),
         "whole response"),
        (lambda n, o, m: (ratios(n, o, m)[0], masked_mean(n - o, m, dim=1).exp()),
         "whole response"),
        (of_probabilities, "long responses"),
        (detached, "gradient"),
        (whole_detached, "gradient"),
        (chosen_late, "gradient at padding"),
    ]),
    "ex-theory-policy-loss": (clipped, [
        (lambda *a: policy_loss(*a), "shape"),
        (loss_variant(mean=lambda x, m: x.mean(1)), "shape"),
        (loss_variant(side=1.0, pick=torch.min), "first step"),
        (loss_variant(ratio=lambda x: x), "first step"),
        (loss_variant(ratio=lambda x: (-x).exp()), "first step"),
        (loss_variant(ratio=lambda x: x.exp().detach()), "first step"),
        (loss_variant(ratio=lambda x: 1 + x), "inside the range"),
        (loss_variant(pick=torch.min), "no gradient outside the clip"),
        (loss_variant(pick=lambda plain, cut: plain), "no gradient outside the clip"),
        (loss_variant(low=-9.0), "no gradient outside the clip"),
        (loss_variant(pick=lambda plain, cut: cut), "way back"),
        (cut_gradient, "pessimistic side"),
        (loss_variant(fixed=0.2), "clip range"),
        (masked_by_product, "mask"),
        (loss_variant(mean=lambda x, m: x.mean()), "mean over tokens"),
        (loss_variant(mean=mean_of_means), "mean over tokens"),
        (loss_variant(mean=lambda x, m: x[m].sum()), "first step"),
    ]),
    "ex-theory-dragged": (["rises", "falls", "falls"], [
        ("rises", "three words"),
        (["up", "down", "up"], "three words"),
        (["rises", "rises", "falls"], "bad token"),
        (["stays", "falls", "stays"], "clipped token"),
        (["falls", "falls", "falls"], "clipped token"),
        (["rises", "falls", "stays"], "token nobody sampled"),
        (["rises", "falls", "rises"], "token nobody sampled"),
    ]),
    "hunt-07": (15, [(3, "line"), (8, "line"), (14, "line"), (23, "line"), (27, "line"),
                     (0, "number"), (38, "number"), ("15", "number")]),
}
