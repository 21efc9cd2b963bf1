"""Checks of chapter 10, PPO on the language model."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator

import torch
from torch import Tensor, nn

from rlhf_mini.check.core import Property, close, exercise, finite, gradient, moved, shaped, worded
from rlhf_mini.check.minibatch import Problem

Steps = Generator[Property, None, str]


@exercise("ex-ppo-clip")
def clip(f: Callable) -> Steps:
    """Clipped loss of one token by cases: f(rho, a, eps) -> (loss, slope over rho)."""
    def says(rho: float, a: float, loss: float, slope: float, eps: float = 0.2) -> bool:
        return close(f(rho, a, eps), [loss, slope], 1e-6)

    pair = f(1.1, 2.0, 0.2)
    yield ("pair", isinstance(pair, list | tuple) and len(pair) == 2 and all(map(finite, pair)),
           "Expected two numbers, the loss and its slope over the ratio, not more and not less.")
    yield ("ratio 1", says(1.0, 2.0, -2.0, -2.0) and says(1.0, -2.0, 2.0, 2.0),
           "At the first minibatch nothing is clipped. The loss of a good token is below 0 and "
           "falls as the token becomes likelier; that of a bad one is the mirror image.")
    yield ("within the range", says(1.1, 2.0, -2.2, -2.0) and says(0.9, -2.0, 1.8, 2.0),
           "Within the range the loss is a straight line in the ratio.")
    yield ("good and already likelier", says(1.5, 2.0, -2.4, 0.0),
           "A good token beyond the range has gained all that this rollout pays: the loss stays "
           "where it was at the edge, and its slope with it.")
    yield ("good but rarer", says(0.5, 2.0, -1.0, -2.0),
           "A good token that has become rarer, perhaps pushed by others, must be able to come "
           "back. Its slope is not 0.")
    yield ("bad and already rarer", says(0.5, -2.0, 1.6, 0.0),
           "A bad token below the range has been pushed down enough for this rollout.")
    yield ("bad but likelier", says(1.5, -2.0, 3.0, 2.0),
           "A bad token that has become likelier is the worst case. Nothing may protect it.")
    yield ("another range", says(1.25, 1.0, -1.25, -1.0, 0.3) and says(0.6, -1.0, 0.7, 0.0, 0.3),
           "The cases are right for a range of 0.2, but the width is an argument.")
    grid = [(rho, a) for rho in (0.3, 0.79, 0.81, 1.0, 1.19, 1.21, 2.0) for a in (-3, -0.5, 0, 1)]
    losses = [max(-a * rho, -a * min(max(rho, 0.8), 1.2)) for rho, a in grid]
    yield ("everywhere", all(close(f(*case, 0.2)[0], loss) for case, loss in
                             zip(grid, losses, strict=True)),
           "On a grid of ratios and advantages your loss is not that of the clipped objective.")
    return "These cases are policy_loss of rlhf_mini/ppo.py, one token at a time."


@exercise("ex-ppo-missing-eos")
def missing_eos(f: Callable) -> Steps:
    """Scores with a penalty: f(scores, response_ids, mask, eos_id, missing) -> (B,)."""
    eos, pad = 0, 1
    ids = torch.tensor([[5, 6, eos, pad], [5, 6, 7, 8], [5, 6, 7, eos], [eos, pad, pad, pad]])
    mask = torch.arange(4) < torch.tensor([[3], [4], [4], [1]])
    scores = torch.tensor([0.5, 2.0, 1.5, -3.0])
    yield shaped(f(scores, ids, mask, eos, -1.0), (4,), "one score per response")
    yield ("finished", close(f(scores[:1], ids[:1], mask[:1], eos, -1.0), [0.5]),
           "A response that ends with EOS keeps what the reward model says, padding or not.")
    yield ("cut off", close(f(scores[1:2], ids[1:2], mask[1:2], eos, -1.0), [-1.0]),
           "A response that was stopped by the limit gets the fixed score, however good its text "
           "is: nothing of the reward model's opinion is left.")
    yield ("finished at the limit", close(f(scores[2:3], ids[2:3], mask[2:3], eos, -1.0), [1.5]),
           "A response may fill the last column with its EOS. Full length is not cut off.")
    yield ("a low score stays", close(f(scores, ids, mask, eos, -1.0), [0.5, -1.0, 1.5, -3.0]),
           "A bad response that ends properly keeps its low score, even below the fixed one.")
    yield ("fixed", close(f(torch.tensor([-3.0]), ids[1:2], mask[1:2], eos, -1.0), [-1.0]),
           "A bad text without an end gets the fixed score as well, not the lower of the two.")
    yield ("padding", close(f(scores[1:2], torch.tensor([[5, 6, eos, eos]]),
                              torch.tensor([[True, True, False, False]]), eos, -1.0), [-1.0]),
           "What stands at padding is not part of the response, even if it looks like an end.")
    yield ("end in the ids", close(f(scores[:1], ids[:1] + 7, mask[:1], eos + 7, -2.5), [0.5]) and
           close(f(scores[:1], ids[:1] + 7, mask[:1], 3, -2.5), [-2.5]),
           "Which id ends a response, and which score a missing end gets, are arguments.")
    return "You have written the end of collect_rollout in rlhf_mini/rollout.py."


# ---- targets ------------------------------------------------------------------------------------


def _rollout() -> dict[str, Tensor]:
    """Return scores (3,), log-probs, values and mask (3, 5) of 5, 3 and 1 tokens."""
    generator = torch.Generator().manual_seed(10)
    old, ref, values = torch.randn(3, 3, 5, generator=generator)
    return {"scores": torch.tensor([4.0, 1.0, 3.0]), "old_logprobs": old - 2,
            "ref_logprobs": ref - 2, "values": values,
            "mask": torch.arange(5) < torch.tensor([[5], [3], [1]])}


def _returns(x: dict[str, Tensor], beta: float, gamma: float, lam: float) -> Tensor:
    """Advantages plus values (B, T) by the double sum over TD errors; 0 at padding."""
    result = torch.zeros_like(x["values"])
    for b, n in enumerate(x["mask"].sum(1).tolist()):
        r = (-beta * (x["old_logprobs"] - x["ref_logprobs"]))[b, :n].tolist()
        r[-1] += float(x["scores"][b])
        v = [*x["values"][b, :n].tolist(), 0.0]
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(n)]
        for t in range(n):
            result[b, t] = v[t] + sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, n))
    return result


@exercise("ex-ppo-targets")
def targets(f: Callable) -> Steps:
    """f(scores, old_logprobs, ref_logprobs, values, mask, beta, gamma, lam) -> two (B, T)."""
    x = _rollout()
    mask = x["mask"]

    def of(beta: float, gamma: float, lam: float, **other: Tensor) -> tuple[Tensor, Tensor]:
        return f(*(x | other).values(), beta, gamma, lam)

    both = of(0.0, 1.0, 1.0)
    yield ("pair", isinstance(both, list | tuple) and len(both) == 2,
           "Expected two tensors: advantages and returns, in this order.")
    yield shaped(both[0], (3, 5), "advantages")
    yield shaped(both[1], (3, 5), "returns")
    flat = torch.zeros(3, 5)
    yield ("returns keep their level", close(of(0.0, 1.0, 1.0, values=flat)[1][mask],
                                             _returns(x | {"values": flat}, 0.0, 1, 1)[mask]),
           "With a critic that says 0, lambda = 1 and no penalty, every return is the score "
           "of its response, in units of the score. Is something used that was whitened?")
    yield ("penalty", close(of(0.5, 1.0, 1.0)[1][mask], _returns(x, 0.5, 1, 1)[mask]),
           "With a penalty the returns are others. A token that the policy likes more than the "
           "reference does costs something, and what it costs counts for all tokens before it.")
    yield ("returns", close(of(0.5, 0.9, 0.7)[1][mask], _returns(x, 0.5, 0.9, 0.7)[mask]),
           "With gamma and lambda below 1 the returns are not advantage plus value at the rollout.")
    white = of(0.5, 0.9, 0.7)[0][mask]
    yield ("whitened", close(white.mean(), 0.0) and close((white**2).mean(), 1.0, 1e-4),
           "The advantages that enter the loss have mean 0 and variance 1 over the real tokens of "
           "the rollout.")
    raw = (_returns(x, 0.5, 0.9, 0.7) - x["values"])[mask]
    yield ("advantages", close(white, (raw - raw.mean()) / raw.std(unbiased=False), 1e-4),
           "The advantages have the right mean and variance and are not a shifted and scaled "
           "version of GAE's, all responses alike.")
    dirty = {name: torch.where(mask, x[name], 50.0)
             for name in ("old_logprobs", "ref_logprobs", "values")}
    dirty["ref_logprobs"] = dirty["ref_logprobs"] - torch.where(mask, 0, 9.0)
    there = of(0.5, 0.9, 0.7, **dirty)
    yield ("padding", close(torch.stack(list(there))[:, mask],
                            torch.stack([white, _returns(x, 0.5, 0.9, 0.7)[mask]]), 1e-4),
           "What the networks say at padding has reached a real token.")
    yield ("zero at padding", close(torch.stack(list(there))[:, ~mask], torch.zeros(2, 6)),
           "Both results are 0 behind the end of a response.")
    return "You have written compute_targets of rlhf_mini/rollout.py."


@exercise("ex-ppo-step")
def step(f: Callable) -> Steps:
    """One step: f(policy, critic, optimizer, part, eps, width, vf_coef, max_norm) -> stats."""
    names = ("loss", "policy_loss", "value_loss", "clip_fraction")
    first = Problem(f, moved=0.0)
    yield ("stats", isinstance(first.got, dict) and set(names) <= set(first.got) and
           all(finite(first.got[name]) and not getattr(first.got[name], "requires_grad", False)
               for name in names),
           f"Expected a dict with the numbers {', '.join(names)}, none of them with a gradient.")
    yield ("first minibatch", first.same("policy_loss", "clip_fraction"),
           "At ratio 1 the policy loss is minus the mean advantage over real tokens, and no token "
           "is clipped. The stats are those before the step.")
    later = Problem(f)
    yield ("policy loss", later.same("policy_loss"),
           "Away from ratio 1 the policy loss is another: clip, sign, or which of the two wins.")
    yield ("value loss", later.same("value_loss"),
           "The critic's loss is not half the mean of the larger of two squared errors, or its "
           "clip is not around the old values.")
    yield ("clip fraction", later.same("clip_fraction"),
           "A token counts as clipped if the clip binds: if it makes its loss larger. That a ratio "
           "is outside of the range is not enough.")
    yield ("loss", Problem(f, vf=0.7).same("loss"),
           "The loss is the policy's plus vf_coef times the critic's.")
    yield ("one step", later.optimizer.steps == 1,
           f"The optimiser took {later.optimizer.steps} steps. One minibatch, one step.")
    yield ("policy moves", later.moved("policy"),
           "The stats are right, but the policy is not where one step of gradient descent on the "
           "loss leads. Which tokens should give a gradient? Was it cut, or made twice?")
    yield ("critic moves", later.moved("critic"),
           "The critic is not where one step leads. Its gradient carries vf_coef.")
    dirty = Problem(f, dirt=-1e4)
    yield ("padding", dirty.same(*names) and dirty.moved("policy") and dirty.moved("critic"),
           "What stands at padding has reached a stat or a gradient. A ratio there may be "
           "infinite, and 0 times infinity is not 0, backwards neither. Take padding out early.")
    stale = Problem(f, stale=True)
    yield ("old gradients", stale.moved("policy") and stale.moved("critic"),
           "Gradients of an earlier minibatch were still there, and have moved the weights again.")
    tight = Problem(f, scale=30.0, vf=5.0, most=0.5)
    yield ("gradient norm", tight.moved("policy") and tight.moved("critic"),
           "Large gradients are not scaled down to max_grad_norm, or both models share one norm. "
           "Each model has its own: a wild critic must not silence the policy.")
    return "You have written update_minibatch of rlhf_mini/ppo.py, and so the heart of PPO."


@exercise("ex-ppo-ptx")
def ptx(f: Callable) -> Steps:
    """PPO-ptx: f(ppo_loss, logits, rows, ptx_coef) -> () with logits (N, L, V), rows (N, L)."""
    g = torch.Generator().manual_seed(12)
    logits, rows = torch.randn(3, 6, 7, generator=g), torch.randint(7, (3, 6), generator=g)
    loss = torch.tensor(0.25)
    yield shaped(f(loss, logits, rows, 0.5), (), "one loss")
    yield ("coefficient 0", close(f(loss, logits, rows, 0.0), 0.25),
           "Without the mix it is the loss of PPO, untouched.")
    yield ("uniform model", close(f(loss, torch.zeros(3, 6, 7), rows, 2.0),
                                  0.25 + 2 * math.log(7)),
           "A model that knows nothing pays ln V nats per token, times the coefficient, on top of "
           "PPO's loss. A mean over tokens, added.")
    sure = 50.0 * torch.nn.functional.one_hot(rows.roll(-1, 1), 7).float()
    yield ("next token", close(f(loss, sure, rows, 1.0), 0.25, 1e-4),
           "A model that is sure of each next token, and right, pays nothing. Logits at place t "
           "predict the token at t + 1; behind the last token there is nothing to predict.")
    pull = gradient(lambda x: f(x, logits, rows, 3.0), loss)
    yield ("PPO keeps its weight", close(pull, 1.0),
           "The loss of PPO enters with weight 1, its gradient too, whatever the coefficient is.")
    every = [-float(logits[i, t].log_softmax(-1)[rows[i, t + 1]])
             for i in range(3) for t in range(5)]
    yield ("mean over tokens", close(f(loss, logits, rows, 0.5), 0.25 + 0.5 * sum(every) / 15),
           "The pretraining loss is the mean of -log pi over all predicted tokens of all rows.")
    slope = gradient(lambda x: f(loss, x, rows, 1.0), logits)
    yield ("last column", close(slope[:, -1], torch.zeros(3, 7)) and
           bool((slope[:, :-1].abs().sum(-1) > 0).all()),
           "Every place but the last one learns something from the text.")
    return "You have written ptx_loss of rlhf_mini/ppo.py and its place in update_minibatch."


def _iteration(epochs: int) -> list[float]:
    """One iteration on a policy that is a table (4, 6): its log, and the KL after it."""
    g = torch.Generator().manual_seed(13)
    ref = torch.randn(4, 6, generator=g)
    ids = torch.multinomial(ref.softmax(-1), 64, replacement=True, generator=g).T
    scores = (ids == 2).sum(1).float()
    a = ((scores - scores.mean()) / scores.std(unbiased=False))[:, None].expand(64, 4)
    policy = nn.Parameter(ref.clone())
    adam, log = torch.optim.Adam([policy], 0.1), []
    for _ in range(epochs):
        for rows in torch.randperm(64, generator=g).split(32):
            places = torch.arange(4), ids[rows]
            d = policy.log_softmax(-1)[places] - ref.log_softmax(-1)[places]
            free, edge = -a[rows] * d.exp(), -a[rows] * d.exp().clamp(0.8, 1.2)
            loss = torch.max(free, edge).mean()
            log.append([loss.item(), (edge > free).float().mean().item(),
                        (d.expm1() - d).mean().item(), (d.exp() - 1).abs().max().item()])
            adam.zero_grad()
            loss.backward()
            adam.step()
    logprobs = policy.detach().log_softmax(-1)
    kl = (logprobs.exp() * (logprobs - ref.log_softmax(-1))).sum().item()
    means = [sum(row[k] for row in log) / len(log) for k in range(3)]
    return [scores.mean().item(), log[0][3], *means, kl]


@exercise("ex-ppo-epochs")
def epochs(answer: object) -> Steps:
    """What more epochs over one rollout do to six logged numbers: a list of six words."""
    yield ("six words", worded(answer, 6),
           'Expected a list of six words, each of them "rises", "falls" or "stays".')
    few, many = _iteration(1), _iteration(6)
    truth = [moved(a, b, 1e-6) for a, b in zip(few, many, strict=True)]
    why = {
        "score": "The score is logged of the rollout, which was sampled before any epoch.",
        "first ratio error": "It is taken in the first minibatch. How many steps came before it?",
        "policy loss": "It is a mean over minibatches. The first is taken at ratio 1; what does "
                       "each further one, on tokens that were learned from already, add to it?",
        "clip fraction": "Where is the ratio after many steps on the same tokens, and where is it "
                         "in the first minibatch, which is part of the mean?",
        "approximate KL": "It measures how far the policy has moved away from that of the rollout.",
        "next KL": "The next rollout is sampled by a policy that has taken more steps.",
    }
    for (name, meaning), said, true in zip(why.items(), answer, truth, strict=True):
        yield name, said == true, meaning
    return "Known before the update stays; the rest shows how far the policy has moved."
