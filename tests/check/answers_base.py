"""Right and wrong answers to the exercises of chapter 4."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F


def window(L, w):
    return torch.ones(L, L, dtype=torch.bool).tril().triu(1 - w)


def attend(scale="root", dim=-1, hidden=-math.inf, after=False, flip=False, swap=False):
    """Attention with one thing wrong."""
    def f(q, k, v, m):
        m = ~m if flip else m
        scores = (k @ q.transpose(1, 2) if swap else q @ k.transpose(1, 2)) / {
            "root": math.sqrt(q.shape[-1]), "d": q.shape[-1], "none": 1.0,
            "length": math.sqrt(q.shape[1])}[scale]
        if after:
            return (scores.softmax(dim) * m) @ v
        return scores.masked_fill(~m, hidden).softmax(dim) @ v
    return f


def by_hand(q, k, v, m):
    """Writes the softmax out, and overflows."""
    weights = torch.where(m, (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).exp(), 0)
    return weights / weights.sum(-1, keepdim=True) @ v


def renormalised(q, k, v, m):
    """Hides after the softmax and divides by what is left, which may be 0."""
    weights = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(-1) * m
    return weights / weights.sum(-1, keepdim=True) @ v


def causal_whatever_is_given(q, k, v, m):
    return attend()(q, k, v, torch.ones_like(m).tril())


def always_causal(q, k, v, m):
    return F.scaled_dot_product_attention(q, k, v, is_causal=len(m) > 1 and not bool(m.all()))


def loss_of(logits, targets):
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def lm(logits, ids):
    return loss_of(logits[:, :-1], ids[:, 1:])


def pack(first=False, last=True, eos=True, tail=False, columns=False, step=0, fits=False):
    """Packing with one thing wrong."""
    def f(documents, n, end):
        kept = [d for d in documents if len(d) < n] if fits else documents
        parts = [([end] if first else []) + d + ([end] if eos and not first else []) for d in kept]
        stream = [token for part in parts for token in part]
        stream = stream if last else stream[:-1]
        if tail:
            stream = stream + [end] * (-len(stream) % n)
        rows = [stream[i:i + n] for i in range(0, len(stream) - n + 1, n + step)]
        ids = torch.tensor(rows, dtype=torch.long).view(-1, n)
        return ids.flatten().view(n, -1).T if columns else ids
    return f


def loses_last_row(documents, n, end):
    stream = [token for d in documents for token in [*d, end]]
    return torch.tensor([stream[i:i + n] for i in range(0, len(stream) - n, n)])


def one_per_row(documents, n, end):
    return torch.tensor([(d + n * [end])[:n] for d in documents])


def loses_full_row(documents, n, end):
    stream = [token for d in documents for token in [*d, end]]
    rows = [stream[i:i + n] for i in range(0, max(len(stream) - n, 1), n)]
    return torch.tensor(rows)


def closes_in_place(documents, n, end):
    """Appends EOS to the lists of the caller."""
    for document in documents:
        document.append(end)
    stream = torch.tensor(sum(documents, []))
    return stream[:len(stream) // n * n].view(-1, n)


def floor(a, b, L, V):
    return ((a + b) / 2 - 1) / (L - 1) * math.log(V)


def slope(sign=1.0, hot=1.0, mean=True, dim=-1):
    """Gradient of the mean loss with one thing wrong."""
    def f(z, y):
        result = sign * (z.softmax(dim) - hot * F.one_hot(y, z.shape[1]))
        return result / len(z) if mean else result
    return f


def bets(ids, ahead=1):
    """A model that bets on counting on."""
    return SimpleNamespace(logits=50.0 * F.one_hot(ids + ahead, 100))


def blind(ids):
    return SimpleNamespace(logits=torch.zeros(*ids.shape, 100))


COUNT = torch.arange(20)[None]


def accepts(loss):
    knows, guesses = (float(loss(model, COUNT)) for model in (bets, blind))
    return abs(knows) < 1e-4 and abs(guesses - math.log(100)) < 1e-4


def always_the_same_rows(loss):
    """Its models answer COUNT whatever they are given."""
    return accepts(lambda model, ids: loss(lambda _: model(COUNT), ids))


def the_last_rows(loss):
    """Its models answer the end of COUNT, as much as they are given."""
    def last(model):
        return lambda ids: SimpleNamespace(logits=model(COUNT).logits[:, -ids.shape[1]:])
    return accepts(lambda model, ids: loss(last(model), ids))


ANSWERS = {
    "ex-window-mask": (window, [
        (lambda L, w: window(L, w)[0], "shape"),
        (lambda L, w: window(L, w).float(), "bool"),
        (lambda L, w: window(L, w).T, "future"),
        (lambda L, w: window(L, w) | window(L, w).T, "future"),
        (lambda L, w: window(L, w).tril(-1), "itself"),
        (lambda L, w: torch.ones(L, L, dtype=torch.bool).tril(), "window"),
        (lambda L, w: window(L, w + 1), "window"),
        (lambda L, w: window(L, w - 1), "window"),
        (lambda L, w: torch.stack([(torch.arange(L) < min(w - 1, t)) | (torch.arange(L) == t)
                                   for t in range(L)]), "nearest"),
        (lambda L, w: window(L, max(w, 2)), "w = 1"),
        (lambda L, w: window(L, min(w, L - 1)), "long window"),
    ]),
    "ex-attention": (attend(), [
        (lambda q, k, v, m: attend()(q, k, v, m).transpose(0, 1).flatten(1), "shape"),
        (lambda q, k, v, m: q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]), "shape"),
        (lambda q, k, v, m: v + attend()(q, k, v, m), "one token"),
        (lambda q, k, v, m: attend()(k, k, v, m), "equal scores"),
        (lambda q, k, v, m: torch.where(m, q @ k.transpose(1, 2), 0) @ v, "one token"),
        (attend(dim=-2), "mask"),
        (attend(hidden=0.0), "mask"),
        (attend(after=True), "mask"),
        (lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v), "mask"),
        (attend(swap=True), "who looks"),
        (attend(scale="none"), "scale"),
        (attend(scale="d"), "scale"),
        (attend(scale="length"), "scale"),
        (by_hand, "large scores"),
        (renormalised, "large scores"),
        (attend(hidden=-100.0), "very negative scores"),
        (attend(hidden=-1e4), "very negative scores"),
        (attend(flip=True), "one token"),
        (causal_whatever_is_given, "equal scores"),
        (always_causal, "any mask"),
    ]),
    "ex-lm-loss": (lm, [
        (lambda z, ids: F.cross_entropy(z[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none"),
         "shape"),
        (lambda z, ids: lm(z, ids).exp(), "blind guess"),
        (lambda z, ids: -lm(z, ids), "blind guess"),
        (lambda z, ids: lm(z, ids) / math.log(2), "blind guess"),
        (lambda z, ids: lm(z, ids) * (ids.shape[1] - 1), "blind guess"),
        (lambda z, ids: lm(z, ids) * (ids.shape[1] - 1) / ids.shape[1], "blind guess"),
        (loss_of, "shift"),
        (lambda z, ids: loss_of(z[:, 1:], ids[:, :-1]), "shift"),
        (lambda z, ids: loss_of(z[:, :-2], ids[:, 2:]), "shift"),
        (lambda z, ids: loss_of(z, ids.roll(-1, 1)), "last logits"),
        (lambda z, ids: loss_of(torch.cat([0 * z[:, :1], z[:, :-1]], 1), ids), "shift"),
        (lambda z, ids: -z[:, :-1].softmax(-1).log().gather(-1, ids[:, 1:, None]).mean(),
         "large logits"),
        (lambda z, ids: lm(z, ids).clamp(max=2.5), "brute force"),
        (lambda z, ids: lm(z.detach(), ids), "gradient"),
    ]),
    "ex-pack-rows": (pack(), [
        (lambda d, n, end: pack()(d, n, end).tolist(), "shape"),
        (lambda d, n, end: pack()(d, n, end).flatten(), "shape"),
        (lambda d, n, end: pack(tail=True)(d, n, end), "shape"),
        (lambda d, n, end: pack()(d, n, end).float(), "ids"),
        (pack(first=True), "ids"),
        (pack(eos=False), "EOS"),
        (pack(last=False), "EOS"),
        (pack(columns=True), "full rows"),
        (loses_full_row, "full rows"),
        (loses_last_row, "EOS"),
        (closes_in_place, "inputs"),
        (one_per_row, "across rows"),
        (pack(fits=True), "shape"),
        (lambda d, n, end: pack()([x[:n - 1] for x in d] if len(d) > 1 else d, n, end),
         "across rows"),
        (lambda d, n, end: pack(step=-1)(d, n, end), "full rows"),
        (lambda d, n, end: pack(tail=len(d) > 1)(d, n, end), "rest"),
        (lambda d, n, end: pack()(d, n, 0), "many documents"),
    ]),
    "ex-copy-floor": (floor, [
        (lambda a, b, L, V: [floor(p, p, L, V) for p in range(a, b + 1)], "shape"),
        (lambda a, b, L, V: (a + b) / 2 / (L - 1) * math.log(V), "period 1"),
        (lambda a, b, L, V: (a + b) / 2 / L * math.log(V), "period 1"),
        (lambda a, b, L, V: floor(a, b, L, V) / math.log(2), "no repeat"),
        (lambda a, b, L, V: floor(a, b, L, V - 2), "no repeat"),
        (lambda a, b, L, V: ((a + b) / 2 - 1) / L * math.log(V), "no repeat"),
        (lambda a, b, L, V: math.log(V) * (a > 1), "one period"),
        (lambda a, b, L, V: floor(a, a, L, V), "mean"),
        (lambda a, b, L, V: floor(a, max(a, b - 1), L, V), "mean"),
        (lambda a, b, L, V: floor(a, b, L, V) + (b - a) / L, "mean"),
    ]),
    "ex-loss-gradient": (slope(), [
        (lambda z, y: slope()(z, y).gather(1, y[:, None])[:, 0], "shape"),
        (slope(hot=0.0), "shift"),
        (slope(dim=0), "shift"),
        (lambda z, y: -F.one_hot(y, z.shape[1]) / len(z), "shift"),
        (lambda z, y: slope()(0 * z, y), "right and certain"),
        (slope(sign=-1.0), "sign"),
        (lambda z, y: slope(mean=False)(z, y) / z.shape[1], "blind guess"),
        (lambda z, y: slope()(z, y) * 2, "blind guess"),
        (lambda z, y: slope()(z, y) * (1 - z.softmax(-1).gather(1, y[:, None])), "blind guess"),
        (slope(mean=False), "difference quotient"),
        (lambda z, y: slope()(2 * z, y), "like the text"),
    ]),
    "ex-floors": (("sum", "ring", "uneven", "walk", "noise"), [
        ("sum", "form"),
        (("sum", "ring", "uneven", "walk"), "form"),
        (("noise", "walk", "uneven", "ring", "sum"), "noise"),
        (("ring", "sum", "uneven", "walk", "noise"), "rules"),
        (("sum", "ring", "walk", "uneven", "noise"), "chance"),
        (("uneven", "walk", "sum", "ring", "noise"), "rule or chance"),
        (("sum", "uneven", "ring", "walk", "noise"), "rule or chance"),
    ]),
    "ex-base-shift": (accepts, [
        (lambda loss: "a test", "form"),
        (lambda loss: loss(bets, COUNT) == 0, "nothing"),
        (lambda loss: accepts(lambda *a: loss(*a) + 1), "right loss"),
        (lambda loss: abs(float(loss(blind, COUNT))) < 1e-4, "right loss"),
        (lambda loss: abs(float(loss(blind, COUNT)) - math.log(100)) < 1e-4, "colleague"),
        (lambda loss: True, "colleague"),
        (lambda loss: float(loss(lambda ids: bets(0 * ids, 5), 5 + 0 * COUNT)) < 1e-4, "colleague"),
        (lambda loss: float(loss(lambda ids: bets(ids, 0), 0 * COUNT[:, :2])) < 1e-4, "no shift"),
        (lambda loss: float(loss(bets, COUNT)) < 1e-4, "nothing"),
        (lambda loss: False, "right loss"),
        (always_the_same_rows, "inputs cut"),
        (the_last_rows, "inputs cut"),
    ]),
}
