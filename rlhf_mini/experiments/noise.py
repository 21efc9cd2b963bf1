"""No ground truth: what do wrong, few and tied labels cost the reward model and the policy?"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from matplotlib.figure import Figure

from rlhf_mini.data import Prompt, Ranking
from rlhf_mini.experiments.figures import draw_line, new_panels
from rlhf_mini.experiments.lab import Lab
from rlhf_mini.experiments.study import Study
from rlhf_mini.ranking import RankFunction
from rlhf_mini.town import Labeler

LEVELS = tuple({"noise": factor, "labelers": 1, "tie": 0.0} for factor in (0.0, 1.0, 2.0, 4.0, 8.0))
PANELS = tuple({"noise": factor, "labelers": 3, "tie": 0.0} for factor in (1.0, 4.0))
TIES = ({"noise": 1.0, "labelers": 1, "tie": 0.2},)


def rank_together(labelers: Sequence[Labeler], count: int, noise: float, tie: float
                  ) -> RankFunction:
    """Return a function that lets several labelers rank, and orders the responses by mean rank.

    Args:
        labelers: to draw from, per prompt.
        count: labelers per prompt.
        noise: factor of their noise.
        tie: share of neighbours in a ranking that a hurried labeler calls equal.
    """
    def rank(prompt: Prompt, responses: list[str], rng: random.Random):
        drawn = [replace(x, noise=noise * x.noise) for x in rng.sample(list(labelers), count)]
        ranks = np.mean([x.rank(prompt, responses, rng) for x in drawn], axis=0)
        return merge_neighbours(ranks, tie, rng), None, drawn[0].id if count == 1 else None
    return rank


def merge_neighbours(values: Sequence[float], share: float, rng: random.Random
                     ) -> tuple[int, ...]:
    """Turn values into ranks from 1, and each rank into that before it with probability `share`.

    Args:
        values: (K,) lower = better; equal values tie.
        share: from 0 to 1.
        rng: source of randomness.

    >>> merge_neighbours([2.5, 1.0, 2.5], 0.0, random.Random(0))
    (2, 1, 2)
    """
    rank_of, rank = {}, 0
    for value in sorted(set(values)):
        if not rank_of or rng.random() >= share:
            rank += 1
        rank_of[value] = rank
    return tuple(rank_of[value] for value in values)


def measure_labels(rankings: Sequence[Ranking]) -> dict[str, float]:
    """Compare labels with the truth, over pairs of a prompt's own responses that differ in gold.

    Returns:
        `label_error`, the share of untied pairs in the wrong order; `label_ties`, the share of
        pairs that are tied.
    """
    wrong = right = tied = 0
    for r in rankings:
        own = [i for i, decoy in enumerate(r.decoys) if not decoy]
        for a in own:
            for b in own:
                if r.gold[a] > r.gold[b]:
                    wrong += r.ranks[a] > r.ranks[b]
                    right += r.ranks[a] < r.ranks[b]
                    tied += r.ranks[a] == r.ranks[b]
    return {"label_error": wrong / (wrong + right), "label_ties": tied / (wrong + right + tied)}


def measure(lab: Lab, condition: dict) -> list[dict]:
    """Label, train a reward model, optimise against it, and judge both.

    The number of single rankings is the same in all conditions: several labelers per prompt mean
    fewer prompts.
    """
    pool = lab.collect("train", lab.run.config.ranking.prompts)
    pool = pool[:len(pool) // condition["labelers"]]
    rank = rank_together(lab.labelers(), condition["labelers"], condition["noise"],
                         condition["tie"])
    rankings = lab.rank_again(pool, rank, str(sorted(condition.items())))
    reward = lab.train_reward_model(rankings)
    row = {"prompts": len(rankings)} | measure_labels(rankings)
    return [row | lab.measure_reward_model(reward) | lab.judge(lab.train_policy(reward))]


def draw(rows: list[dict]) -> Figure:
    """Draw the reward model's accuracy and PPO's gain against the labels' error."""
    figure, (left, right) = new_panels(1, 2, 2.7)
    groups = {"one labeler": LEVELS, "three, a third of the prompts": PANELS,
              "one, a fifth tied": TIES}
    for number, (label, conditions) in enumerate(groups.items()):
        draw_line(left, rows, conditions, "label_error", "rm_gold", label, number)
        draw_line(right, rows, conditions, "label_error", "gain_sampled", label, number)
    left.set(xlabel="share of wrong labels", title="Reward model against gold")
    right.axhline(0, lw=0.8, color="#777777")
    right.set(xlabel="share of wrong labels", title="PPO over SFT, gold, T = 1")
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=2,
                  fontsize=8, frameon=False)
    return figure


STUDY = Study(
    "noise", "What do wrong, few and tied labels cost the reward model and the policy?",
    (*LEVELS, *PANELS, *TIES), measure, draw,
    ("ranking.prompts=1600", "ppo.iterations=12"))
