"""Right and wrong answers to the exercises of chapter 10."""

from __future__ import annotations

import torch
from torch import nn

from rlhf_mini.advantages import compute_gae, compute_rewards
from rlhf_mini.ppo import policy_loss, value_loss
from rlhf_mini.tensors import gather_logprobs, masked_mean, masked_var, masked_whiten


def clip(rho, a, eps):
    bound = (a > 0 and rho > 1 + eps) or (a < 0 and rho < 1 - eps)
    return (-a * min(max(rho, 1 - eps), 1 + eps), 0.0) if bound else (-a * rho, -a)


def by(bound, slope=lambda a: 0.0, sign=-1.0):
    """The clip with its condition replaced."""
    def f(rho, a, eps):
        edge = min(max(rho, 1 - eps), 1 + eps)
        return (sign * a * edge, slope(a)) if bound(rho, a, eps) else (sign * a * rho, sign * a)
    return f


def missing(scores, ids, mask, eos, fixed):
    last = ids.gather(1, mask.sum(1, keepdim=True) - 1)[:, 0]
    return torch.where(last == eos, scores, fixed)


def ends(ids, mask, eos):
    return missing(torch.ones(len(ids)), ids, mask, eos, 0.0).bool()


def targets(scores, old, ref, values, mask, beta, gamma, lam, *, rewards=compute_rewards,
            gae=compute_gae, finish=lambda a, r, v, m: (masked_whiten(a, m), r)):
    """Targets with their parts replaced."""
    paid = rewards(scores, old, ref, mask, beta)
    return finish(*gae(paid, values, mask, gamma, lam), values, mask)


def with_parts(**parts):
    return lambda *x: targets(*x, **parts)


def per_row(x, m):
    mean = masked_mean(x, m, 1)[:, None]
    return torch.where(m, (x - mean) * (masked_var(x, m) + 1e-8) ** -0.5, 0)


def score_at_the_end(scores, old, ref, mask, beta):
    paid = torch.where(mask, -beta * (old - ref), 0)
    return torch.cat([paid[:, :-1], paid[:, -1:] + scores[:, None]], 1)


def stepper(p_loss=policy_loss, v_loss=value_loss, zero=True, norm="each", steps=1, twice=False,
            weight=lambda vf: vf, total=lambda p, v, vf: p + vf * v, after=False, names=None,
            old="old_logprobs", logprobs=gather_logprobs, number=lambda x: x.item()):
    """A step with its parts replaced."""
    def f(policy, critic, optimizer, part, eps, width, vf, most):
        def losses():
            new = logprobs(policy(part["ids"]), part["ids"])
            before = new.detach() if old == "new" else part[old]
            p, p_stats = p_loss(new, before, part["advantages"], part["mask"], eps)
            v, _ = v_loss(critic(part["ids"]), part["old_values"], part["returns"], part["mask"],
                          width)
            loss = total(p, v, weight(vf))
            return loss, {"loss": number(loss), "policy_loss": number(p), "value_loss": number(v),
                          "clip_fraction": p_stats["clip_fraction"]}

        loss, stats = losses()
        for i in range(steps):
            if zero:
                optimizer.zero_grad()
            (loss if i == 0 else losses()[0]).backward(retain_graph=twice)
            if twice:
                loss.backward()
            both = [*policy.parameters(), *critic.parameters()]
            groups = {"each": (policy.parameters(), critic.parameters()), "one": (both,),
                      "none": ()}[norm]
            for group in groups:
                nn.utils.clip_grad_norm_(group, most)
            optimizer.step()
        if after:
            stats = losses()[1]
        return {k: stats[k] for k in names} if names else stats
    return f


def no_clip(new, old, a, m, eps):
    ratio = torch.where(m, new - old, 0).exp()
    outside = ((ratio - 1).abs() > eps).float()
    return policy_loss(new, old, a, m, 1e6)[0], {"clip_fraction": masked_mean(outside, m).item()}


def count_outside(new, old, a, m, eps):
    return policy_loss(new, old, a, m, eps)[0], no_clip(new, old, a, m, eps)[1]


def with_padding(loss):
    """A loss that takes padding for tokens."""
    return lambda new, old, x, m, eps: loss(new, old, x, torch.ones_like(m), eps)


def detached(new, old, a, m, eps):
    loss, stats = policy_loss(new, old, a, m, eps)
    return loss.detach() + 0 * new.sum(), stats


def flipped(new, old, a, m, eps):
    loss, stats = policy_loss(new, old, a, m, eps)
    return -loss, stats


def value_detached(new, old, r, m, width):
    loss, stats = value_loss(new, old, r, m, width)
    return loss.detach() + 0 * new.sum(), stats


def softmax_at(logits, ids):
    return logits.softmax(-1).gather(-1, ids[..., None])[..., 0]


def multiplied(new, old, a, m, eps):
    ratio = (new - old).exp()
    worse = torch.max(-a * ratio, -a * ratio.clamp(1 - eps, 1 + eps))
    return (worse * m).sum() / m.sum(), policy_loss(new, old, a, m, eps)[1]


def masked_late(new, old, a, m, eps):
    ratio = (new - old).exp()
    worse = torch.max(-a * ratio, -a * ratio.clamp(1 - eps, 1 + eps))
    return masked_mean(worse, m), policy_loss(new, old, a, m, eps)[1]


def ptx(loss, logits, rows, coef):
    logprobs = gather_logprobs(logits[:, :-1], rows[:, 1:])
    return loss - coef * logprobs.mean()


def nll(logits, ids):
    return -gather_logprobs(logits, ids)


ANSWERS = {
    "ex-ppo-clip": (clip, [
        (lambda rho, a, eps: clip(rho, a, eps)[0], "pair"),
        (by(lambda rho, a, eps: False, sign=1.0), "ratio 1"),
        (by(lambda rho, a, eps: False), "good and already likelier"),
        (by(lambda rho, a, eps: a > 0 and rho > 1 + eps, lambda a: -a),
         "good and already likelier"),
        (by(lambda rho, a, eps: abs(rho - 1) > eps), "good but rarer"),
        (by(lambda rho, a, eps: rho > 1 + eps), "bad and already rarer"),
        (by(lambda rho, a, eps: a > 0 and rho > 1 + eps), "bad and already rarer"),
        (by(lambda rho, a, eps: rho > 1 + eps or (a < 0 and rho < 1 - eps)),
         "bad but likelier"),
        (lambda rho, a, eps: clip(rho, a, 0.2), "another range"),
        (lambda rho, a, eps: (0, 0) if abs(a) < 0.7 else clip(rho, a, eps), "everywhere"),
    ]),
    "ex-ppo-missing-eos": (missing, [
        (lambda s, i, m, e, f: missing(s, i, m, e, f).mean(), "shape"),
        (lambda s, i, m, e, f: torch.where(ends(i, m, e), f, s), "finished"),
        (lambda s, i, m, e, f: torch.where(i[:, -1] == e, s, f), "finished"),
        (lambda s, i, m, e, f: torch.where(ends(i, m, e), s, s + f), "cut off"),
        (lambda s, i, m, e, f: s * ends(i, m, e), "cut off"),
        (lambda s, i, m, e, f: torch.where(m.all(1), f, s), "finished at the limit"),
        (lambda s, i, m, e, f: missing(s, i, m, e, f).clamp(min=f), "a low score stays"),
        (lambda s, i, m, e, f: torch.where(ends(i, m, e), s, s.clamp(max=f)), "fixed"),
        (lambda s, i, m, e, f: torch.where((i == e).any(1), s, f), "padding"),
        (lambda s, i, m, e, f: missing(s, i, m, 0, f), "end in the ids"),
        (lambda s, i, m, e, f: missing(s, i, m, e, -1.0), "end in the ids"),
    ]),
    "ex-ppo-targets": (targets, [
        (lambda *x: targets(*x)[0], "pair"),
        (with_parts(finish=lambda a, r, v, m: (a[m], r)), "shape"),
        (with_parts(finish=lambda a, r, v, m: (masked_whiten(a, m), masked_whiten(a, m) + v)),
         "returns keep their level"),
        (with_parts(finish=lambda a, r, v, m: (r, masked_whiten(a, m))),
         "returns keep their level"),
        (with_parts(finish=lambda a, r, v, m: (masked_whiten(a, m), masked_whiten(r, m))),
         "returns keep their level"),
        (with_parts(rewards=score_at_the_end), "returns keep their level"),
        (with_parts(rewards=lambda *x: masked_whiten(compute_rewards(*x), x[3])),
         "returns keep their level"),
        (with_parts(rewards=lambda s, o, r, m, b: compute_rewards(s, r, o, m, b)), "penalty"),
        (with_parts(rewards=lambda s, o, r, m, b: compute_rewards(s, o, r, m, 0.0)), "penalty"),
        (with_parts(finish=lambda a, r, v, m: (masked_whiten(a, m), a)), "penalty"),
        (with_parts(gae=lambda r, v, m, g, lam: compute_gae(r, v, m, 1.0, lam)), "returns"),
        (with_parts(finish=lambda a, r, v, m: (a, r)), "whitened"),
        (with_parts(finish=lambda a, r, v, m: (masked_whiten(a, m, shift_mean=False), r)),
         "whitened"),
        (with_parts(finish=lambda a, r, v, m: (masked_whiten(per_row(a, m), m), r)), "advantages"),
        (with_parts(finish=lambda a, r, v, m: (masked_whiten(r, m), r)), "advantages"),
        (with_parts(finish=lambda a, r, v, m: (masked_whiten(a, m) + 2.0 * ~m, r)),
         "zero at padding"),
        (with_parts(finish=lambda a, r, v, m: (masked_whiten(a, m), a + v)), "zero at padding"),
    ]),
    "ex-ppo-step": (stepper(), [
        (stepper(names=["loss", "policy_loss"]), "stats"),
        (stepper(number=lambda x: x), "stats"),
        (lambda *x: stepper()(*x)["loss"], "stats"),
        (stepper(p_loss=flipped), "first minibatch"),
        (stepper(p_loss=with_padding(policy_loss)), "first minibatch"),
        (stepper(after=True), "first minibatch"),
        (stepper(old="new"), "policy loss"),
        (stepper(p_loss=no_clip), "policy loss"),
        (stepper(logprobs=softmax_at), "first minibatch"),
        (stepper(v_loss=lambda *x: (2 * value_loss(*x)[0], None)), "value loss"),
        (stepper(v_loss=lambda v, o, r, m, w: value_loss(v, o, r, m, 1e6)), "value loss"),
        (stepper(p_loss=count_outside), "clip fraction"),
        (stepper(weight=lambda vf: 1.0), "loss"),
        (stepper(total=lambda p, v, vf: vf * p + v), "loss"),
        (stepper(p_loss=multiplied), "padding"),
        (stepper(p_loss=masked_late), "padding"),
        (stepper(steps=0), "one step"),
        (stepper(steps=2), "one step"),
        (stepper(p_loss=detached), "policy moves"),
        (stepper(twice=True), "policy moves"),
        (stepper(v_loss=value_detached), "critic moves"),
        (stepper(zero=False), "old gradients"),
        (stepper(norm="none"), "gradient norm"),
        (stepper(norm="one"), "gradient norm"),
    ]),
    "ex-ppo-ptx": (ptx, [
        (lambda p, x, rows, c: p + c * nll(x[:, :-1], rows[:, 1:]), "shape"),
        (lambda p, x, rows, c: c * nll(x[:, :-1], rows[:, 1:]).mean(), "coefficient 0"),
        (lambda p, x, rows, c: p - c * nll(x[:, :-1], rows[:, 1:]).mean(), "uniform model"),
        (lambda p, x, rows, c: p + c * nll(x[:, :-1], rows[:, 1:]).sum(), "uniform model"),
        (lambda p, x, rows, c: p + c * nll(x[:, :-1], rows[:, 1:]).sum(1).mean(),
         "uniform model"),
        (lambda p, x, rows, c: p + c * nll(x, rows).mean(), "next token"),
        (lambda p, x, rows, c: p + c * nll(x, rows.roll(1, 1)).mean(), "next token"),
        (lambda p, x, rows, c: p + c * nll(x[:, 1:], rows[:, :-1]).mean(), "next token"),
        (lambda p, x, rows, c: ptx(p.detach(), x, rows, c), "PPO keeps its weight"),
        (lambda p, x, rows, c: p + c * nll(x, rows.roll(-1, 1)).mean(), "mean over tokens"),
        (lambda p, x, rows, c: p + c * nll(x[:, 1:-1], rows[:, 2:]).mean(), "mean over tokens"),
        (lambda p, x, rows, c: ptx(p, x.detach(), rows, c) + 0 * x.sum(), "last column"),
    ]),
    "ex-ppo-epochs": (["stays", "stays", "falls", "rises", "rises", "rises"], [
        ("stays", "six words"),
        (["stays", "stays", "falls"], "six words"),
        (["rises", "stays", "falls", "rises", "rises", "rises"], "score"),
        (["stays", "rises", "falls", "rises", "rises", "rises"], "first ratio error"),
        (["stays", "stays", "stays", "rises", "rises", "rises"], "policy loss"),
        (["stays", "stays", "falls", "stays", "rises", "rises"], "clip fraction"),
        (["stays", "stays", "falls", "rises", "falls", "rises"], "approximate KL"),
        (["stays", "stays", "falls", "rises", "rises", "stays"], "next KL"),
    ]),
    "hunt-10": (39, [(1, "line"), (8, "line"), (17, "line"), (38, "line"), (40, "line"),
                     (0, "number"), (39.0, "number"), (200, "number")]),
}
