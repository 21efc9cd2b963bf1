"""Recorded runs as explorable figures get them, and what the package says of their numbers."""

from __future__ import annotations

import json

import numpy as np
import torch

from rlhf_mini.experiments import STUDIES, find_rows, read_rows, seed_interval
from rlhf_mini.experiments import overoptimisation as over
from rlhf_mini.kl import estimate_kl
from rlhf_mini.notebook import recorded

COLUMNS = ("kl", "score", "gold")
WINDOW = 6
SIZES = [[over.best_of_n_kl(n), n] for n in over.SIZES]


def samples_data() -> dict:
    return json.loads(recorded("samples", "samples.json").read_text()) | {"start": 9}


def samples_grid(data: dict) -> list[dict]:
    return [{"prompt": f"{row['family']}: {row['prompt']}", "step": step, "token": token}
            for row in data["prompts"] for step in data["steps"][::3] for token in (0, 5, 40)]


def expected_samples(p: dict, data: dict) -> dict:
    row = next(row for row in data["prompts"] if p["prompt"].endswith(row["prompt"]))
    terms = [estimate_kl(*(torch.tensor(answer[name], dtype=torch.float64)
                           for name in ("logprobs", "ref_logprobs")))
             for answer in row["responses"]]
    now = data["steps"].index(p["step"])
    answer = row["responses"][now]
    texts = answer["tokens"]
    columns = {"text": texts, "term": terms[now].tolist(), "logprob": answer["logprobs"],
               "ref": answer["ref_logprobs"], "value": answer["values"],
               "advantage": answer["advantages"]}
    return {"kl": [x.sum().item() for x in terms], "place": min(p["token"], len(texts) - 1),
            "score": [x["score"] for x in row["responses"]],
            "gold": [x["gold"] for x in row["responses"]],
            "tokens": [dict(zip(columns, x, strict=True)) for x in zip(*columns.values(),
                                                                       strict=True)]}


def overoptimisation_data() -> dict:
    rows = read_rows(recorded("overoptimisation", "rows.jsonl"), STUDIES["overoptimisation"])
    models: dict[str, dict] = {}
    for number, condition in enumerate(over.STUDY.conditions):
        model = models.setdefault(f"model {number}", {})
        for seed in sorted({row["seed"] for row in rows}):
            for method, name in (("best-of-n", "best of n"), ("ppo", "PPO")):
                found = find_rows(rows, condition | {"method": method}, seed)
                if not found:
                    continue
                found.sort(key=lambda row: (row["n"], row["iteration"]))
                path = {x: [row[x] for row in found] for x in COLUMNS}
                if method == "ppo":
                    path = {x: [float(np.mean(y[i:i + WINDOW])) for i in range(
                        len(y) - WINDOW + 1)] for x, y in path.items()}
                model.setdefault(name, []).append(path)
    measured, even = [distance for distance, _ in SIZES], (np.linspace(0, 3, 31) ** 2).tolist()
    kl = sorted([*measured, *(x for x in even if min(abs(x - y) for y in measured) > 0.02)])
    for count in (2, 3, 4):
        models[f"{count} seeds"] = {name: x[:count] for name, x in models["model 1"].items()}
    return {"kl": kl, "sizes": SIZES, "models": models}


def overoptimisation_grid(data: dict) -> list[dict]:
    return [{"model": model, "kl": kl} for model in data["models"] for kl in (0, 0.25, 9)]


def expected_overoptimisation(p: dict, data: dict) -> dict:
    return {"now": data["kl"].index(p["kl"]),
            "methods": {method: _curves(paths, data["kl"])
                        for method, paths in data["models"][p["model"]].items()}}


def _curves(paths: list[dict], distances: list[float]) -> dict:
    columns: dict[str, list] = {"score": [], "gold": []}
    for name, points in columns.items():
        for distance in distances:
            values = [_passing(path, name, distance) for path in paths]
            points.append(None if None in values else seed_interval(values))
    means = [point["mean"] if point else -np.inf for point in columns["gold"]]
    return columns | {"peak": int(np.argmax(means))}


def _passing(path: dict, name: str, distance: float) -> float | None:
    """Follow a path until it passes a KL; return what has changed."""
    steps = list(zip(path["kl"], path[name], strict=True))
    if steps[0][0] >= distance:
        return 0.0
    for before, after in zip(steps, steps[1:], strict=False):
        if after[0] >= distance:
            return float(np.interp(distance, *zip(before, after, strict=True))) - steps[0][1]
    return None
