"""What explorable figures are tested with: data, parameters, and what the package says to them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import explored_runs as runs
import torch

from rlhf_mini.advantages import compute_gae
from rlhf_mini.kl import compute_exact_kl
from rlhf_mini.ppo import policy_loss
from rlhf_mini.reward import reward_loss


@dataclass
class Explored:
    """Data as a page would give them, parameters to try, and what must come out.

    `expected(p, data)` returns the entries of the result that are compared, numbers or lists.
    """

    data: dict
    grid: list[dict]
    expected: Callable[[dict, dict], dict]


def grid(**values) -> list[dict]:
    """All combinations of the values."""
    return [dict(zip(values, some, strict=True)) for some in itertools.product(*values.values())]


def double(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ---- what the package says ---------------------------------------------------------------------


def expected_clip(p: dict, data: dict) -> dict:
    logprob = double([[p["ratio"]]]).log().requires_grad_()
    advantage, real = double([[p["advantage"]]]), torch.ones(1, 1).bool()
    loss, stats = policy_loss(logprob, torch.zeros_like(logprob), advantage, real, p["clip"])
    loss.backward()
    return {"objective": -loss.item(), "gradient": -logprob.grad.item(),
            "binds": stats["clip_fraction"] == 1}


def expected_gae(p: dict, data: dict) -> dict:
    rewards, values = double([data["rewards"]]), double([data["values"]])
    real = torch.ones(rewards.shape).bool()
    advantages, returns = compute_gae(rewards, values, real, p["gamma"], p["lambda"])
    at, left = p["token"] - 1, rewards.shape[1] - p["token"] + 1
    estimates = []
    for n in range(1, left + 1):  # GAE looks n steps ahead where the response is cut after them
        cut = [x[:, at:at + n].clone() for x in (rewards, values)]
        if n < left:  # what the critic says of the rest is paid with the last reward
            cut[0][:, -1] += p["gamma"] * values[0, at + n]
        estimates.append(compute_gae(*cut, real[:, :n], p["gamma"], 1.0)[0][0, 0].item())
    weights = [(1 - p["lambda"]) * p["lambda"] ** k for k in range(left - 1)]
    weights.append(1 - sum(weights))
    mean = sum(w * e for w, e in zip(weights, estimates, strict=True))
    assert math.isclose(mean, advantages[0, at].item(), abs_tol=1e-9)  # of the test itself
    return {"advantages": advantages[0].tolist(), "returns": returns[0].tolist(),
            "estimates": estimates, "weights": weights}


def expected_ranking(p: dict, data: dict) -> dict:
    count = len(data["names"])
    scores = double([[p[f"score{i}"] + p["shift"] for i in range(count)]]).requires_grad_()
    ranks = torch.arange(1, count + 1)[None]
    loss, _ = reward_loss(scores, ranks, torch.ones(1, count).bool())
    loss.backward()
    chances = [[i, j, torch.sigmoid(scores[0, i] - scores[0, j]).item()]
               for i, j in itertools.combinations(range(count), 2)]
    return {"loss": loss.item(), "gradient": scores.grad[0].tolist(), "pairs": chances}


def expected_leash(p: dict, data: dict) -> dict:
    ref, scores = double(data["ref"]), double(data["scores"])
    logits = ref.log() + scores / p["beta"]
    optimum, kl = logits.softmax(-1), compute_exact_kl(logits, ref.log()).item()
    score, value = (optimum @ scores).item(), p["beta"] * logits.logsumexp(-1).item()
    assert math.isclose(score - p["beta"] * kl, value, abs_tol=1e-9)  # of the test itself
    return {"optimum": optimum.tolist(), "kl": kl, "score": score, "objective": value,
            "logZ": value / p["beta"]}


SAMPLES, CURVES = runs.samples_data(), runs.overoptimisation_data()
EXPLORABLES = {
    "clip": Explored(
        {}, grid(advantage=[-1.5, -0.1, 0, 0.1, 1], ratio=[0.05, 0.75, 0.7501, 1, 1.25, 1.2501, 2],
                 clip=[0.05, 0.25, 0.5]), expected_clip),
    "gae": Explored(
        {"tokens": [" No", " idea", ".", "EOS"], "rewards": [-0.3, 0.01, -1.2, 2.9],
         "values": [1.7, 2.4, 4.0, 2.3], "lambda": 0.95, "token": 2},
        [{"lambda": lam, "gamma": gamma, "token": token} for lam, gamma, token
         in itertools.product([0, 0.01, 0.95, 1], [0.8, 0.99, 1], [1, 3, 4])], expected_gae),
    "ranking": Explored(
        {"names": ["A", "B", "C", "D"], "scores": [0.5, 1.2, 0, -1]},
        grid(score0=[-3, 0.5, 800], score1=[1.2, -800], score2=[0, 3], score3=[0, -1],
             shift=[0, -2, 1000]), expected_ranking),
    "leash": Explored(
        {"names": ["On Hill Street.", "I do not know.", "Ask.", "Hm.", "By the mill.", "No."],
         "ref": [0.1, 0.4, 0.15, 0.2, 0.05, 0.1], "scores": [1, 0.2, 0.4, -0.2, 1.2, -1],
         "reached": [[0.5, 0.4, 0.5]]}, grid(beta=[0.002, 0.05, 0.5, 1, 31.6]), expected_leash),
    "samples": Explored(SAMPLES, runs.samples_grid(SAMPLES), runs.expected_samples),
    "overoptimisation": Explored(CURVES, runs.overoptimisation_grid(CURVES),
                                 runs.expected_overoptimisation),
}
