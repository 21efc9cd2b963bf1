"""A minibatch of PPO on tables, and the step that it should lead to, in NumPy by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from rlhf_mini.check.core import close


class Table(nn.Module):
    """A network without inputs: its output (B, T, ...) is its only parameter."""

    def __init__(self, table: Tensor):
        super().__init__()
        self.table = nn.Parameter(table.clone())

    def forward(self, ids: Tensor) -> Tensor:
        """Return the table; a learner's function is given one row per response."""
        if ids.shape != self.table.shape[:2]:
            raise ValueError(f"the networks are asked about ids of shape {tuple(ids.shape)}; they "
                             f"know those of part['ids'], {tuple(self.table.shape[:2])}")
        return self.table


class CountingSGD(torch.optim.SGD):
    """SGD that counts its steps."""

    def __init__(self, *args: object, **kwargs: object):
        super().__init__(*args, **kwargs)
        self.steps = 0

    def step(self, closure: Callable | None = None) -> None:
        """Step and count."""
        self.steps += 1
        super().step(closure)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities (B, T, V) of logits (B, T, V)."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _losses(logits: np.ndarray, values: np.ndarray, part: dict, eps: float, width: float
            ) -> tuple[dict[str, float], np.ndarray, np.ndarray]:
    """Return losses, and their gradients with respect to logits (B, T, V) and values (B, T).

    In NumPy, token by token, with derivatives by hand.
    """
    all_logprobs, n = _log_softmax(logits), part["mask"].sum()
    p_loss = v_loss = clipped = 0.0
    by_logits, by_values = np.zeros_like(logits), np.zeros_like(values)
    for b, t in zip(*part["mask"].nonzero(), strict=True):
        token, a, target = (part[name][b, t] for name in ("ids", "advantages", "returns"))
        rho = math.exp(all_logprobs[b, t, token] - part["old_logprobs"][b, t])
        edge = min(max(rho, 1 - eps), 1 + eps)
        p_loss += max(-a * rho, -a * edge) / n
        clipped += (-a * edge > -a * rho) / n
        if -a * rho >= -a * edge:
            by_logits[b, t] = a * rho * np.exp(all_logprobs[b, t]) / n
            by_logits[b, t, token] -= a * rho / n
        v, old = values[b, t], part["old_values"][b, t]
        near = min(max(v, old - width), old + width)
        v_loss += 0.5 * max((v - target) ** 2, (near - target) ** 2) / n
        by_values[b, t] = (v - target) / n if abs(v - target) >= abs(near - target) else 0
    return {"policy_loss": p_loss, "value_loss": v_loss, "clip_fraction": clipped}, \
        by_logits, by_values


class Problem:
    """One problem for a step: tables, a minibatch, and what the step should do to them."""

    def __init__(self, f: Callable, moved: float = 0.4, vf: float = 0.1, most: float = 1e9,
                 scale: float = 1.0, dirt: float = 0.0, stale: bool = False):
        g = torch.Generator().manual_seed(11)
        logits, values = (torch.randn(4, 5, *more, generator=g).double() for more in ((6,), ()))
        ids = torch.randint(6, (4, 5), generator=g)
        mask = torch.arange(5) < torch.tensor([[5], [2], [4], [1]])
        noise, noise_v, a, returns = torch.randn(4, 4, 5, generator=g).double()
        old = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0] + moved * noise
        part = {"ids": ids, "mask": mask, "old_logprobs": old,
                "old_values": values + moved * noise_v, "advantages": scale * a,
                "returns": 3 * returns}
        start = {k: v.numpy().copy() for k, v in part.items()}
        for name in ("old_logprobs", "old_values", "advantages", "returns"):
            part[name] = part[name] + dirt * ~mask
        self.stats, by_logits, by_values = _losses(logits.numpy(), values.numpy(), start, 0.2, 0.3)
        self.stats["loss"] = self.stats["policy_loss"] + vf * self.stats["value_loss"]
        norms = [np.sqrt((x**2).sum()) for x in (by_logits, vf * by_values)]
        shrink = [min(1.0, most / (norm + 1e-6)) for norm in norms]
        self.policy, self.critic = Table(logits), Table(values)
        self.optimizer = CountingSGD([*self.policy.parameters(), *self.critic.parameters()], lr=0.5)
        if stale:
            for model in (self.policy, self.critic):
                model.table.grad = torch.ones_like(model.table)
        self.got = f(self.policy, self.critic, self.optimizer, part, 0.2, 0.3, vf, most)
        self.new_logits = logits.numpy() - 0.5 * shrink[0] * by_logits
        self.new_values = values.numpy() - 0.5 * shrink[1] * vf * by_values

    def same(self, *names: str) -> bool:
        """Whether these stats are those of the step in NumPy."""
        return all(close(self.got[name], self.stats[name], 1e-6) for name in names)

    def moved(self, model: str) -> bool:
        """Whether the policy's or the critic's table is where NumPy's step leads."""
        there, name = getattr(self, model), {"policy": "new_logits", "critic": "new_values"}[model]
        return close(there.table, getattr(self, name), 1e-6)
