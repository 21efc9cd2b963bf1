"""Over-optimisation: how far can one push a reward model's score before the true score falls?

Two ways to push, both measured in KL from the SFT policy: choose the best of n samples, or train by
PPO, with and without a KL penalty. The reward models learn from few or many rankings, are small or
as large as the policy, and judge alone or as three.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from rlhf_mini.data import Prompt, TokenBatch, collate, encode_prompt
from rlhf_mini.experiments.figures import MARKERS, PALETTE, new_panels
from rlhf_mini.experiments.lab import Lab
from rlhf_mini.experiments.study import Study, find_rows, seed_interval
from rlhf_mini.files import read_json, write_json
from rlhf_mini.generation import sample_responses
from rlhf_mini.loading import load_policy, save_model
from rlhf_mini.models import RewardModel
from rlhf_mini.rollout import ScoreFunction
from rlhf_mini.runtime import make_generator
from rlhf_mini.town import grade

PROMPTS = 200  # held-out prompts of best-of-n
SAMPLES = 64  # responses of SFT to each
SIZES = (1, 2, 4, 8, 16, 32, 64)  # n
LONGER = 3  # PPO's iterations here, as a multiple of the run's: the fall comes late
BLOCKS = 8  # points of PPO's curve in the figure, each a mean over neighbouring iterations
MEMBERS = {"one": 1, "mean of 3": 3, "worst of 3": 3}  # reward models behind a score
FEW = {"share": 0.125, "depth": 1.0, "judge": "one", "kl_coef": 0.0}
BY_DATA = (FEW, FEW | {"share": 0.5}, FEW | {"share": 1.0})
SMALL = FEW | {"share": 1.0, "depth": 0.25}  # the reward model has a quarter of SFT's layers
ENSEMBLES = (FEW | {"judge": "mean of 3"}, FEW | {"judge": "worst of 3"})
LEASHED = FEW | {"kl_coef": 0.3}


def keep_layers(lab: Lab, depth: float) -> Path:
    """Return the folder of an SFT model that has only its first layers, at least one.

    Args:
        lab: one seed's.
        depth: share of the layers.
    """
    def make(folder: Path) -> None:
        policy, tokenizer = load_policy(lab.policy, lab.run.device)
        policy.config.n_layer = max(1, round(depth * policy.config.n_layer))
        policy.transformer.h = policy.transformer.h[:policy.config.n_layer]
        save_model(policy, tokenizer, folder)

    return lab.policy if depth == 1 else lab.keep("short-sft", depth, make)


def join_scores(reward_models: Sequence[RewardModel], judge: str) -> ScoreFunction:
    """Turn reward models into a score: with "worst of 3" the lowest of theirs, else the mean."""
    def score(prompts: list[Prompt], responses: list[str], batch: TokenBatch) -> Tensor:
        scores = torch.stack([x(batch.input_ids, batch.attention_mask) for x in reward_models])
        return scores.amin(0) if judge == "worst of 3" else scores.mean(0)
    return score


def best_of_n(scores: np.ndarray, values: np.ndarray, n: int) -> np.ndarray:
    r"""Return the expected value of the response that scores best among n of the M samples.

    If n of M are drawn without replacement, the one with i lower scores in the pool is the best of
    them with probability $\binom{i}{n-1} / \binom{M}{n}$: the others come from those below. The
    mean over all draws is unbiased for n fresh samples. Equal scores are equally likely to win.

    Args:
        scores: (N, M) what the best is chosen by.
        values: (N, M) what it is worth.
        n: from 1 to M.

    Returns:
        (N,) expected values.

    >>> best_of_n(np.array([[0.0, 1.0, 2.0]]), np.array([[3.0, 6.0, 9.0]]), 2).tolist()
    [8.0]
    """
    count = scores.shape[1]
    weights = np.array([math.comb(i, n - 1) / math.comb(count, n) for i in range(count)])
    best = []
    for score, value in zip(scores, values, strict=True):
        _, tie = np.unique(score, return_inverse=True)
        shared = (np.bincount(tie, value) / np.bincount(tie))[tie]  # mean over equal scores
        best.append(shared[np.argsort(score)] @ weights)
    return np.array(best)


def best_of_n_kl(n: int) -> float:
    """Return the KL of best-of-n to the sampler, in nats; an upper bound if scores can be equal."""
    return math.log(n) - (n - 1) / n


def sample_pool(lab: Lab) -> dict[str, list]:
    """Let SFT answer N held-out prompts M times each, as PPO samples; kept for all conditions.

    Returns:
        `prompts` (N,) texts; `tokens` (N, M) lists of ids; `finished` (N, M) bool, True = ended
        with EOS; `gold` (N, M).
    """
    config = lab.run.config
    prompts = lab.run.prompts(config.evaluation.split, lab.tokenizer)[:PROMPTS]
    settings = {"split": config.evaluation.split, "prompts": len(prompts), "samples": SAMPLES,
                "tokens": config.ppo.max_response_tokens, "temperature": config.ppo.temperature}

    def make(folder: Path) -> None:
        policy, tokenizer = load_policy(lab.policy, lab.run.device)
        owners = [p for p in prompts for _ in range(SAMPLES)]
        sampled = sample_responses(
            policy, tokenizer, [p.prompt for p in owners], max_response_tokens=settings["tokens"],
            batch_size=config.evaluation.batch_size, temperature=settings["temperature"],
            generator=make_generator(lab.seed, "lab pool", device=policy.device))
        gold = [grade(p, r.text).overall for p, r in zip(owners, sampled, strict=True)]
        columns = {"tokens": [r.token_ids for r in sampled],
                   "finished": [r.finished for r in sampled], "gold": gold}
        write_json(folder / "pool.json", {"prompts": [p.prompt for p in prompts]} | {
            name: [x[i:i + SAMPLES] for i in range(0, len(x), SAMPLES)]
            for name, x in columns.items()})

    return read_json(lab.keep("pool", settings, make) / "pool.json")


@torch.no_grad()
def score_pool(lab: Lab, pool: dict[str, list], score: ScoreFunction) -> np.ndarray:
    """Score a pool as PPO would; equal responses are scored once, so they get equal scores.

    Returns:
        (N, M) scores; without EOS, `ppo.missing_eos_score`.
    """
    prompts = [encode_prompt(lab.tokenizer, prompt) for prompt in pool["prompts"]]
    keys = [[(i, tuple(ids)) for ids in row] for i, row in enumerate(pool["tokens"])]
    different = sorted({key for row in keys for key in row},
                       key=lambda key: (len(prompts[key[0]]) + len(key[1]), key))
    size, found = lab.run.config.evaluation.batch_size, {}
    for start in range(0, len(different), size):
        part = different[start:start + size]
        batch = collate([(prompts[i], list(ids)) for i, ids in part], lab.tokenizer.pad_token_id)
        scores = score([], [], batch.to(lab.run.device))  # it reads the tokens only
        found |= dict(zip(part, scores.tolist(), strict=True))
    scores = np.array([[found[key] for key in row] for row in keys])
    return np.where(pool["finished"], scores, lab.run.config.ppo.missing_eos_score)


def measure(lab: Lab, condition: dict) -> list[dict]:
    """Train the reward models, then follow score and gold over KL in both ways.

    Best-of-n answers held-out customers. PPO's rows are its rollouts, on training customers;
    without a penalty only the number of iterations holds it back.

    Returns:
        Rows of `method` "ppo" (one response per prompt, so `n` is 1) and, without a penalty,
        "best-of-n" (of the SFT policy, so `iteration` is 0), with `kl` in nats, `score`, `gold`;
        `prompts` is the number of rankings behind each reward model.
    """
    pool = lab.collect("train", lab.run.config.ranking.prompts)
    rankings = pool[:round(len(pool) * condition["share"])]
    start = keep_layers(lab, condition["depth"])
    folders = [lab.train_reward_model(rankings, start=start, member=member)
               for member in range(MEMBERS[condition["judge"]])]
    score = join_scores([lab.load_reward_model(f) for f in folders], condition["judge"])
    responses = sample_pool(lab)
    scores, gold = score_pool(lab, responses, score), np.array(responses["gold"])
    rows = [{"method": "best-of-n", "n": n, "iteration": 0, "kl": best_of_n_kl(n),
             "score": float(best_of_n(scores, scores, n).mean()),
             "gold": float(best_of_n(scores, gold, n).mean())}
            for n in SIZES if not condition["kl_coef"]]
    config = lab.run.config.ppo
    config = replace(config, kl_coef=condition["kl_coef"], kl_target=0.0, ptx_coef=0.0,
                     iterations=LONGER * config.iterations)
    several = (score, condition["judge"]) if len(folders) > 1 else ()  # one: as in other studies
    policy = lab.train_policy(folders[0], config, *several)
    rows += [{"method": "ppo", "n": 1, "iteration": step["step"], "kl": step["kl_per_sequence"],
              "score": step["score"], "gold": step["gold"]}
             for step in read_json(policy / "history.json")]
    return [row | {"prompts": len(rankings)} for row in rows]


def distance(kl: Sequence[float]) -> np.ndarray:
    r"""Return $d = \sqrt{\mathrm{KL}}$ (N,); an estimate of KL below 0 counts as 0."""
    return np.sqrt(np.maximum(np.asarray(kl, dtype=float), 0))


def fit_curve(kl: Sequence[float], gold: Sequence[float], method: str) -> dict[str, float]:
    r"""Fit $R(d) = R_0 + d(a - b d)$ to best-of-n, $R_0 + d(a - b\log d)$ to PPO, $d=\sqrt{KL}$.

    The start is fitted too, for the first measured gold is as noisy as any other.

    Args:
        kl: (N,) nats, of at least 3 different distances.
        gold: (N,).
        method: "best-of-n" or "ppo".

    Returns:
        `start` ($R_0$), `a`, `b`, and `peak`, the d where the curve is highest: inf if b <= 0, as
        then it rises to the end.

    Source: Gao, Schulman, Hilton 2022 (arXiv 2210.10760), where R is 0 at d = 0.
    """
    d = distance(kl)
    bend = d * d if method == "best-of-n" else d * np.log(np.where(d > 0, d, 1))
    columns = np.stack([np.ones_like(d), d, -bend], axis=1)
    start, a, b = map(float, np.linalg.lstsq(columns, np.asarray(gold, dtype=float))[0])
    if b <= 0:
        peak = math.inf
    elif method == "best-of-n":
        peak = max(0.0, a / (2 * b))
    else:
        peak = math.exp(a / b - 1) if a / b < 700 else math.inf  # beyond that no float holds it
    return {"start": start, "a": a, "b": b, "peak": peak}


def summarise_fits(rows: Sequence[dict], condition: dict, method: str) -> dict:
    """Fit the curve of each seed.

    Returns:
        `a` and `b` as `seed_interval`; `peak`, the median over seeds, as it may be inf.
    """
    found = find_rows(rows, condition | {"method": method})
    seeds = [find_rows(found, {}, seed) for seed in sorted({row["seed"] for row in found})]
    fits = [fit_curve([r["kl"] for r in s], [r["gold"] for r in s], method) for s in seeds]
    return {name: seed_interval([fit[name] for fit in fits]) for name in ("a", "b")} | {
        "peak": float(np.median([fit["peak"] for fit in fits]))}


def _draw_curve(axes: Axes, rows: Sequence[dict], column: str, label: str, number: int) -> None:
    """Draw the mean over seeds against that of d, with the seeds' interval as a band."""
    steps = sorted({(row["n"], row["iteration"]) for row in rows})
    points = []
    for block in np.array_split(steps, min(BLOCKS, len(steps))):
        inside = [row for row in rows if [row["n"], row["iteration"]] in block.tolist()]
        seeds = [find_rows(inside, {}, seed) for seed in sorted({r["seed"] for r in inside})]
        mean = seed_interval([np.mean([r[column] for r in s]) for s in seeds])
        points.append((distance([r["kl"] for r in inside]).mean(), *mean.values()))
    x, mean, low, high = np.array(points).T
    axes.plot(x, mean, color=PALETTE[number], marker=MARKERS[number], markersize=4, label=label)
    axes.fill_between(x, low, high, color=PALETTE[number], alpha=0.15, lw=0)


def draw(rows: list[dict], conditions: Sequence[dict] = ()) -> Figure:
    """Draw score and gold over the root of the KL, best-of-n on the left, PPO on the right.

    Args:
        rows: of the study.
        conditions: to draw; none: all. Each has its colour in every figure.
    """
    figure, panels = new_panels(2, 2, 4.6, sharex="col", sharey="row")
    for number, condition in enumerate(STUDY.conditions):
        found = find_rows(rows, condition)
        if not found or (conditions and condition not in conditions):
            continue
        count = round(np.mean([row["prompts"] for row in found]))
        label = f"{count:,} rankings, {condition['judge']}"
        label += ", small" if condition["depth"] < 1 else ""
        label += f", kl_coef {condition['kl_coef']}" if condition["kl_coef"] else ""
        for place, method in enumerate(("best-of-n", "ppo")):
            if curve := find_rows(found, {"method": method}):
                _draw_curve(panels[place], curve, "score", label, number)
                _draw_curve(panels[place + 2], curve, "gold", label, number)
    panels[0].set(title="Best of n", ylabel="reward model's score")
    panels[1].set(title="PPO")
    panels[2].set(xlabel="square root of KL in nats", ylabel="gold")
    panels[3].set(xlabel="square root of KL in nats")
    figure.legend(*panels[1].get_legend_handles_labels(), loc="outside upper center", ncols=2,
                  fontsize=8, frameon=False)
    return figure


STUDY = Study(
    "overoptimisation", "How far can a reward model be pushed before the true score falls?",
    (*BY_DATA, SMALL, *ENSEMBLES, LEASHED), measure, draw,
    ("ranking.prompts=1600", "ppo.iterations=12"))
