"""Whose instructions: what becomes of the policy if labelers are told, or customers ask, otherwise?

The responses of SFT are ranked by the town's labelers, who all go by the same written
instructions. What these say is worth most, what the labelers like besides, or who the customers
are, is changed; the number of rankings, the labelers' noise and all that follows stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from matplotlib.figure import Figure

from rlhf_mini.data import Prompt
from rlhf_mini.experiments.figures import draw_rows, new_panels
from rlhf_mini.experiments.lab import Lab
from rlhf_mini.experiments.study import Study, find_rows
from rlhf_mini.stages import rank_by
from rlhf_mini.town import Labeler
from rlhf_mini.town.grader import FAMILIES, REFUSAL, WEIGHTS
from rlhf_mini.town.labelers import POLITE
from rlhf_mini.town.questions import QUESTIONS
from rlhf_mini.town.responses import SAY_NO
from rlhf_mini.town.words import words_of

LABELERS = {  # what is changed of a labeler who weighs helpful, truthful, harmless as gold does
    "standard": {},
    "helpful first": {"weights": (0.9, 0.05, 0.05)},
    "harmless first": {"weights": (0.2, 0.2, 0.6)},
    "likes long answers": {"verbosity": 0.6},
    "likes polite words": {"politeness": 0.4},
}
CUSTOMERS = {  # the families of prompts that are in use
    "nothing to refuse": [name for name in FAMILIES if name not in SAY_NO],
    "questions only": [family.name for family in QUESTIONS],  # nobody sets a task
}
CONDITIONS = tuple({"instructions": name} for name in (*LABELERS, *CUSTOMERS))
DRAWN = {"helpful": "helpful_sampled", "harmless": "harmless_sampled", "words": "words",
         "share with a polite word": "polite"}


# ---- other labelers, other customers -----------------------------------------------------------


def instruct(labelers: Sequence[Labeler], name: str) -> list[Labeler]:
    """Return the labelers as instructed; with changed customers the instructions are standard."""
    return [replace(x, **{"weights": WEIGHTS} | LABELERS.get(name, {})) for x in labelers]


def choose_prompts(prompts: Sequence[Prompt], name: str) -> list[Prompt]:
    """Return those of the training prompts that are in use under one of CUSTOMERS."""
    return [p for p in prompts if p.family in CUSTOMERS[name]]


# ---- judgement ---------------------------------------------------------------------------------


def describe_style(prompts: Sequence[Prompt], responses: Sequence[Sequence[str]]
                   ) -> dict[str, float]:
    """Describe how a policy writes.

    Args:
        prompts: N of the town, not all of them harmful requests.
        responses: N lists of its texts.

    Returns:
        `words`, mean per response; `polite`, share of responses with a polite word; `refused`,
        share of refusals among responses to prompts that are no harmful request.
    """
    words, polite, refused = [], [], []
    for prompt, texts in zip(prompts, responses, strict=True):
        for text in texts:
            found = words_of(text)
            words.append(len(found))
            polite.append(bool(POLITE & set(found)))
            if prompt.family != "harmful":
                refused.append(bool(REFUSAL.search(" ".join(found))))
    return {"words": float(np.mean(words)), "polite": float(np.mean(polite)),
            "refused": float(np.mean(refused))}


def measure(lab: Lab, condition: dict) -> list[dict]:
    """Rank, train a reward model and a policy, and judge them by the same town as always.

    Labelers rank anew in every condition, with the same noise in all that share their prompts.
    """
    name = condition["instructions"]
    prompts = None if name in LABELERS else choose_prompts(
        lab.run.prompts("train", lab.tokenizer), name)
    pool = lab.collect("train", lab.run.config.ranking.prompts, prompts=prompts)
    rankings = lab.rank_again(pool, rank_by(instruct(lab.labelers(), name)), "instructions")
    reward = lab.train_reward_model(rankings)
    policy = lab.train_policy(reward, prompts=prompts)
    asked = lab.run.prompts(lab.run.config.evaluation.split, lab.tokenizer)
    return [{"rankings": len(rankings)} | lab.measure_reward_model(reward) | lab.judge(policy)
            | describe_style(asked, lab.answer(policy)["sampled"].responses)]


# ---- the study ---------------------------------------------------------------------------------


def subtract_standard(rows: Sequence[dict], columns: Sequence[str]) -> list[dict]:
    """Return the rows of the other conditions, less the standard one's of the same seed.

    The seeds' mean of such differences is what `study.effect` returns.

    Args:
        rows: of the study.
        columns: measures to subtract; others are left out.
    """
    differences = []
    for row in rows:
        standard = find_rows(rows, CONDITIONS[0], row["seed"])
        if standard and row["instructions"] != CONDITIONS[0]["instructions"]:
            differences.append({"seed": row["seed"], "instructions": row["instructions"]}
                               | {name: row[name] - standard[0][name] for name in columns})
    return differences


def draw(rows: list[dict]) -> Figure:
    """Draw what each change makes of the policy, as differences to the standard instructions."""
    differences = subtract_standard(rows, list(DRAWN.values()))
    conditions = {condition["instructions"]: condition for condition in CONDITIONS[1:]}
    figure, panels = new_panels(2, 2, 4.4, sharey=True)
    for axes, (label, column) in zip(panels, DRAWN.items(), strict=True):
        axes.axvline(0, lw=0.8, color="#777777")
        draw_rows(axes, differences, conditions, {label: column})
        axes.set_title(label)
    figure.supxlabel("difference to the standard instructions, T = 1", fontsize=8.5)
    return figure


STUDY = Study(
    "instructions", "What becomes of the policy under other instructions and other customers?",
    CONDITIONS, measure, draw, ("ranking.prompts=1600", "ppo.iterations=12"))
