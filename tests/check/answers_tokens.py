"""Right and wrong answers to the exercises of chapter 3."""

from __future__ import annotations

import math

import torch

from rlhf_mini.tensors import compute_entropy, masked_mean, pick_tokens


def logprobs(shift=1, dim=-1, masked=True, safe=True, normalised=True, tail=0):
    """Log-probabilities of response tokens with one thing wrong."""
    def f(logits, ids, mask):
        first, last = logits.shape[1] - ids.shape[1] - shift, logits.shape[1] - shift
        z = torch.cat([logits, logits[:, :1]], 1)[:, first:last]
        p = z.log_softmax(dim) if safe else z.softmax(dim).log()
        p = (p if normalised else z).gather(-1, ids[..., None])[..., 0]
        return torch.where(mask, p, 0) if masked else p
    return f


def every_column(logits, ids, mask):
    """Scores prompt and response alike."""
    return logits[:, :-1].log_softmax(-1).amax(-1)


def detached(logits, ids, mask):
    return logprobs()(logits.detach(), ids, mask)


def certain_by_where(logits):
    """Its gradient is nan where a probability is 0."""
    p = logits.softmax(-1)
    return -torch.where(p > 0, p * p.log(), 0).sum(-1)


def pick(divide=True, right=True, late=False, flat=False, rows=True, clamp=True):
    """Sampling with one thing wrong."""
    def f(logits, temperature, noise):
        if temperature == 0:
            return logits.argmax(-1)
        p = (logits / temperature if divide else logits * temperature).softmax(-1)
        if late:
            p = logits.softmax(-1) / temperature
        below = torch.ones_like(p).cumsum(-1) / p.shape[1] if flat else p.cumsum(-1)
        if not rows:
            below = below[:1].expand_as(below).contiguous()
        token = torch.searchsorted(below, noise[:, None], right=right)[:, 0]
        return token.clamp(max=logits.shape[1] - 1) if clamp else token
    return f


def first_end_above(logits, temperature, noise):
    """Finds token 0 when the noise is above all ends."""
    if temperature == 0:
        return logits.argmax(-1)
    return ((logits / temperature).softmax(-1).cumsum(-1) > noise[:, None]).int().argmax(-1)


def wraps_around(logits, temperature, noise):
    ids = pick(clamp=False)(logits, temperature, noise)
    return torch.where(ids >= logits.shape[1], 0, ids)


def heated(mean_at=None, power=2, sign=1.0, log=True):
    """Slope of a token's log-probability over the temperature, with one thing wrong."""
    def f(z, y, tau):
        p = (z / (tau if mean_at is None else mean_at)).softmax(-1)
        here = z[range(len(y)), y]
        slope = sign * ((p * z).sum(-1) - here) / tau**power
        return slope if log else slope * p[range(len(y)), y]
    return f


def colleague(ids):
    return (ids != 0).cumprod(dim=1).bool()


def right_mask(ids):
    ended = ids == 0
    return ended.cumsum(1) - ended.long() == 0


def first_end(ids):
    """Looks for the first EOS and forgets that there may be none."""
    return torch.arange(ids.shape[1]) <= (ids == 0).long().argmax(1, keepdim=True)


ANSWERS = {
    "ex-masked-mean": (masked_mean, [
        (lambda x, m: masked_mean(x, m, 1), "shape"),
        (lambda x, m: x * m, "shape"),
        (lambda x, m: x.sum() / m.sum(1).max(), "no padding"),
        (lambda x, m: torch.where(m, x, 0).mean(), "mask"),
        (lambda x, m: x.mean(), "mask"),
        (lambda x, m: masked_mean(x, m, 1).mean(), "mask"),
        (lambda x, m: (x * m).sum() / m.sum(), "inf at padding"),
        (lambda x, m: torch.nan_to_num(x, 0, 0, 0)[m].mean(), "nan at a real entry"),
        (lambda x, m: x[m & x.isfinite()].mean(), "nan at a real entry"),
        (lambda x, m: x[m].mean(), "nothing selected"),
        (lambda x, m: torch.where(m, x, 0).sum() / m.sum(), "nothing selected"),
        (lambda x, m: torch.where(m, x, 0).sum() / (m.sum() + 1), "no padding"),
        (lambda x, m: masked_mean(x, m) if m.any() else (x * 0).sum(), "nothing selected"),
        (lambda x, m: torch.where(m, x / m.sum(), 0).sum(), "gradient of nothing"),
        (lambda x, m: masked_mean(x.detach(), m), "gradient"),
    ]),
    "ex-response-logprobs": (logprobs(), [
        (every_column, "shape"),
        (lambda z, ids, m: z[:, 3:8].log_softmax(-1), "shape"),
        (lambda z, ids, m: logprobs()(z, ids, m).sum(1), "shape"),
        (lambda z, ids, m: logprobs()(z, ids, m).exp(), "blind guess"),
        (lambda z, ids, m: -logprobs()(z, ids, m), "blind guess"),
        (lambda z, ids, m: logprobs()(z, ids, m) / math.log(2), "blind guess"),
        (logprobs(normalised=False), "blind guess"),
        (logprobs(dim=1), "blind guess"),
        (logprobs(shift=0), "shift"),
        (logprobs(shift=2), "shift"),
        (logprobs(safe=False), "large logits"),
        (logprobs(masked=False), "zero at padding"),
        (lambda z, ids, m: logprobs(masked=False)(z, ids, m) * m, "nan at padding"),
        (lambda z, ids, m: logprobs()(z, ids, m).clamp(min=-3), "brute force"),
        (detached, "gradient"),
    ]),
    "ex-entropy": (compute_entropy, [
        (lambda z: compute_entropy(z).mean(), "shape"),
        (lambda z: -(z.softmax(-1) * z.log_softmax(-1)), "shape"),
        (lambda z: -compute_entropy(z), "all equal"),
        (lambda z: compute_entropy(z) / math.log(2), "all equal"),
        (lambda z: -(z.softmax(-1) * z.log_softmax(-1)).mean(-1), "all equal"),
        (lambda z: -z.log_softmax(-1).mean(-1), "two tokens"),
        (lambda z: (z.logsumexp(-1) - z.amax(-1)), "two tokens"),
        (lambda z: -(z.softmax(0) * z.log_softmax(0)).sum(-1), "all equal"),
        (lambda z: -(z.exp() * z).sum(-1), "shift"),
        (lambda z: -(z.softmax(-1) * z).sum(-1), "shift"),
        (lambda z: -(z.softmax(-1) * z.softmax(-1).log()).sum(-1), "certain"),
        (lambda z: -(z.softmax(-1).detach() * z.log_softmax(-1)).sum(-1), "gradient"),
        (lambda z: compute_entropy(z.detach()), "gradient"),
        (certain_by_where, "gradient where certain"),
        (lambda z: -torch.nan_to_num(z.softmax(-1) * z.softmax(-1).log()).sum(-1),
         "gradient where certain"),
    ]),
    "ex-sampler": (pick_tokens, [
        (lambda z, t, u: pick_tokens(z, t, u)[:, None], "shape"),
        (lambda z, t, u: (z / max(t, 1)).softmax(-1), "shape"),
        (lambda z, t, u: pick_tokens(z, t, u).float(), "ids"),
        (lambda z, t, u: pick_tokens(z, t or 1.0, u), "greedy"),
        (pick(flat=True), "intervals"),
        (lambda z, t, u: z.argmax(-1), "intervals"),
        (lambda z, t, u: pick_tokens(z, t, 1 - u), "intervals"),
        (pick(right=False), "impossible tokens"),
        (pick(divide=False), "temperature"),
        (pick(late=True), "temperature"),
        (lambda z, t, u: pick_tokens(z, float(t > 0), u), "temperature"),
        (pick(rows=False), "rows"),
        (pick(clamp=False), "rounding"),
        (first_end_above, "rounding"),
        (wraps_around, "rounding"),
    ]),
    "ex-heated-token": (heated(), [
        (lambda z, y, tau: heated()(z, y, tau).mean(), "shape"),
        (lambda z, y, tau: -(z / tau).log_softmax(-1)[range(len(y)), y] / tau, "equal logits"),
        (heated(sign=-1.0), "likeliest token"),
        (lambda z, y, tau: -z[range(len(y)), y] / tau**2, "least likely token"),
        (heated(mean_at=1e9), "mean zero"),
        (heated(mean_at=1), "mean zero"),
        (heated(log=False), "mean zero"),
        (lambda z, y, tau: 2 * heated()(z, y, tau), "tau = 1"),
        (heated(power=0), "tau = 0.5"),
        (heated(power=1), "tau = 0.5"),
        (heated(power=3), "tau = 0.5"),
    ]),
    "ex-heated-length": (("falls", "rises", "rises"), [
        ("rises", "form"),
        (("falls", "rises"), "form"),
        (("shorter", "longer", "longer"), "form"),
        (("rises", "rises", "rises"), "three tokens"),
        (("stays", "rises", "rises"), "three tokens"),
        (("falls", "falls", "rises"), "many words"),
        (["falls", "stays", "rises"], "many words"),
        (("falls", "rises", "falls"), "greedy"),
    ]),
    "ex-tokens-hunt": (right_mask, [
        (lambda ids: right_mask(ids).sum(1), "shape"),
        (lambda ids: right_mask(ids).long(), "bool"),
        (lambda ids: colleague(ids).roll(1, 1), "words"),
        (first_end, "no end"),
        (colleague, "EOS"),
        (lambda ids: ids != 0, "EOS"),
        (lambda ids: torch.ones_like(ids, dtype=torch.bool), "behind the end"),
        (lambda ids: (ids == 0).cumsum(1) <= 1, "garbage"),
        (lambda ids: torch.cat([torch.ones_like(ids[:, :1]), ids[:, :-1]], 1) != 0, "garbage"),
    ]),
}
