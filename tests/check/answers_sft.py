"""Right and wrong answers to the exercises of chapter 5."""

from __future__ import annotations

import math

import torch

from rlhf_mini.training import cosine_lr

# ---------------------------------------------------------------- the loss


def loss(shift=1, first=0, last=0, padding=False, pool="tokens", of=lambda p: -p, sign=1,
         chosen=True, safe=True):
    """The loss of SFT with one thing wrong."""
    def f(logits, tokens, prompt_tokens, response_tokens):
        length = tokens.shape[1]
        column = torch.arange(length)
        begin = prompt_tokens[:, None] + first
        end = (prompt_tokens + response_tokens)[:, None] + last
        mask = (column >= begin) & ((column < end) | padding)
        z = logits[:, :length - shift]  # shift 2 asks for the token after the next
        p = z.log_softmax(-1) if safe else z.softmax(-1).log()
        losses, mask = of(p.gather(2, tokens[:, shift:, None])[..., 0]), mask[:, shift:]
        losses = sign * (torch.where(mask, losses, 0) if chosen else losses * mask)
        if pool == "sum":
            return losses.sum()
        if pool == "rows":
            return losses.sum(1)
        if pool == "everything":
            return losses.mean()
        if pool == "means":
            return (losses.sum(1) / mask.sum(1)).mean()
        return losses.sum() / mask.sum()
    return f


def pad_by_id(logits, tokens, prompt_tokens, response_tokens):
    """Takes id 0 for padding, and loses EOS, which has it too."""
    column = torch.arange(tokens.shape[1])
    mask = ((column >= prompt_tokens[:, None]) & (tokens != 0))[:, 1:]
    p = logits[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
    return -(p * mask).sum() / mask.sum()


def detached(logits, tokens, prompt_tokens, response_tokens):
    return loss()(logits, tokens, prompt_tokens, response_tokens).item()


# ---------------------------------------------------------------- the mean of means


def sequence_mean(logprobs, mask):
    tokens = mask.sum(1)
    sums = torch.where(mask, logprobs, 0).sum(1)
    return -(sums / tokens.clamp(min=1)).sum() / (tokens > 0).sum()


def multiplied(logprobs, mask):
    tokens = mask.sum(1)
    return -((logprobs * mask).sum(1) / tokens.clamp(min=1)).sum() / (tokens > 0).sum()


def without_empty_rows(logprobs, mask):
    rows = [-x[m].mean() for x, m in zip(logprobs, mask, strict=True) if m.any()]
    return torch.stack(rows).mean()


# ---------------------------------------------------------------- accumulation


def count(batch):
    return batch.response_mask.sum()


def weighted(weight, backward=True):
    """Accumulation with some weight of each batch."""
    def f(batches, loss_of):
        whole, total = sum(weight(b) for b in batches), 0.0
        for batch in batches:
            part = loss_of(batch) * weight(batch) / whole
            if backward:
                part.backward()
            total += part.item()
        return total
    return f


def summed(batches, loss_of):
    total = 0.0
    for batch in batches:
        part = loss_of(batch)
        part.backward()
        total += part.item()
    return total


def all_at_once(batches, loss_of):
    whole = sum(count(b) for b in batches)
    total = sum(loss_of(b) * count(b) / whole for b in batches)
    total.backward()
    return total.item()


def keeps_the_graph(batches, loss_of):
    whole, total = sum(count(b) for b in batches), 0.0
    for batch in batches:
        part = loss_of(batch) * count(batch) / whole
        part.backward()
        total = total + part
    return total


def loss_of_the_last(batches, loss_of):
    whole = sum(count(b) for b in batches)
    for batch in batches:
        part = loss_of(batch)
        (part * count(batch) / whole).backward()
    return part.item()


def no_number(batches, loss_of):
    whole, parts = sum(count(b) for b in batches), []
    for batch in batches:
        parts.append(loss_of(batch) * count(batch) / whole)
        parts[-1].backward()
    return parts


# ---------------------------------------------------------------- the rest


def linear(step, steps, warmup, floor):
    if step < warmup:
        return (step + 1) / warmup
    return 1 - (1 - floor) * (step - warmup) / (steps - warmup)


def half_cosine(step, steps, warmup, floor):
    return max(floor, 0.5 * (1 + math.cos(math.pi * step / steps)))


def wave(step, steps, warmup, floor):
    return floor + (1 - floor) * 0.5 * (1 + math.cos(2 * math.pi * step / steps))


def from_zero(step, steps, warmup, floor):
    return step / warmup if step < warmup else cosine_lr(step, steps, warmup, floor)


def overlapping(step, steps, warmup, floor):
    return (step + 1) / warmup if step < warmup else cosine_lr(step, steps, 0, floor)


def late(step, steps, warmup, floor):
    return (step + 1) / warmup if step < warmup else cosine_lr(step - warmup, steps, 0, floor)


def kl(p, c):
    """KL of two coins."""
    return sum(a * math.log(a / b) for a, b in ((p, c), (1 - p, 1 - c)) if a > 0)


ANSWERS = {
    "ex-sft-loss": (loss(), [
        (loss(pool="rows"), "shape"),
        (loss(pool="sum"), "uniform"),
        (loss(pool="everything"), "uniform"),
        (loss(sign=-1), "uniform"),
        (loss(of=lambda p: -p.exp()), "uniform"),
        (loss(shift=0), "shift"),
        (loss(shift=2), "shift"),
        (loss(first=-9), "prompt"),
        (loss(first=-1), "prompt"),
        (loss(first=1), "first token"),
        (detached, "first token"),
        (loss(last=-1), "EOS"),
        (pad_by_id, "EOS"),
        (loss(last=1), "padding"),
        (loss(padding=True), "padding"),
        (loss(chosen=False), "nan at padding"),
        (loss(pool="means"), "tokens alike"),
        (loss(safe=False), "large logits"),
        (loss(of=lambda p: -p.clamp(min=-69)), "large logits"),
    ]),
    "ex-sequence-mean": (sequence_mean, [
        (lambda x, m: -x.mean(1), "shape"),
        (lambda x, m: x[m].mean(), "one response"),
        (lambda x, m: -(x * m).sum(1).mean(), "one response"),
        (lambda x, m: -x[m].mean(), "responses alike"),
        (lambda x, m: -x.mean(1).mean(), "responses alike"),
        (lambda x, m: -(x.sum(1) / m.sum(1)).mean(), "mask"),
        (multiplied, "inf at padding"),
        (lambda x, m: -(torch.where(m, x, 0).sum(1) / m.sum(1)).mean(), "empty row"),
        (lambda x, m: -(torch.where(m, x, 0).sum(1) / m.sum(1).clamp(min=1)).mean(),
         "empty row"),
        (lambda x, m: without_empty_rows(x.detach(), m), "gradient"),
        (lambda x, m: without_empty_rows(x, m).item(), "gradient"),
    ]),
    "ex-sft-accumulate": (weighted(count), [
        (no_number, "shape"),
        (weighted(count, backward=False), "one batch"),
        (summed, "equal batches"),
        (weighted(lambda b: 1), "unequal batches"),
        (weighted(lambda b: len(b.response_ids)), "unequal batches"),
        (weighted(lambda b: b.response_ids.numel()), "unequal batches"),
        (weighted(lambda b: b.attention_mask.sum()), "unequal batches"),
        (all_at_once, "one at a time"),
        (keeps_the_graph, "plain number"),
        (loss_of_the_last, "loss"),
    ]),
    "ex-sft-lr": (cosine_lr, [
        (lambda *a: torch.tensor([cosine_lr(*a)]), "shape"),
        (lambda *a: 1 - cosine_lr(*a), "start"),
        (lambda step, steps, w, floor: cosine_lr(step, steps - 1, w, floor), "floor"),
        (half_cosine, "halfway"),
        (wave, "floor"),
        (lambda step, steps, w, floor: 0.5 * (1 + math.cos(math.pi * step / steps)), "floor"),
        (linear, "curve"),
        (lambda step, steps, w, floor: cosine_lr(step, steps, 0, floor), "warm-up"),
        (from_zero, "warm-up"),
        (overlapping, "after warm-up"),
        (late, "after warm-up"),
    ]),
    "ex-sft-certainty": (kl, [
        (lambda p, c: [kl(p, c)], "shape"),
        (lambda p, c: -(p * math.log(c) + (1 - p) * math.log(1 - c)), "c = p"),
        (lambda p, c: p * math.log(p / c) + (1 - p) * math.log((1 - p) / (1 - c)), "error"),
        (lambda p, c: kl(c, p) if p < 1 else 0.0, "labelers agree"),
        (lambda p, c: kl(p, c) / math.log(2), "labelers agree"),
        (lambda p, c: p * math.log(p / c), "never negative"),
        (lambda p, c: -kl(p, c), "never negative"),
        (lambda p, c: abs(math.log(p / c)), "flat at the minimum"),
        (lambda p, c: kl(c, p) if p < 1 else kl(p, c), "counted"),
        (lambda p, c: kl(p, c) / 2 if p < 1 else kl(p, c), "counted"),
    ]),
    "ex-sft-kl": (("covers both", "chooses one"), [
        ("covers both", "form"),
        (("both", "one"), "form"),
        (["covers both"], "form"),
        (("chooses one", "covers both"), "KL(p || pi)"),
        (("chooses one", "chooses one"), "KL(p || pi)"),
        (("covers both", "covers both"), "KL(pi || p)"),
    ]),
    "hunt-05": (31, [(1, "line"), (18, "line"), (21, "line"), (30, "line"), (36, "line"),
                     (0, "number"), ("37", "number")]),
}
