"""Unlike preferences: what does a minority lose when one reward model averages over two groups?

All labelers care for content, with the weights and the noise that they have in the town. Those of
group A also like short, plain answers, those of group B long, polite ones. The responses and the
prompts are the same throughout; who ranks what, and what the reward model is told, is varied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from rlhf_mini.data import Prompt, Ranking, encode_prompt
from rlhf_mini.evaluation import compute_pair_accuracy
from rlhf_mini.experiments.figures import draw_line, new_panels
from rlhf_mini.experiments.lab import Lab
from rlhf_mini.experiments.study import Study
from rlhf_mini.files import read_json, write_json
from rlhf_mini.generation import sample_responses
from rlhf_mini.loading import load_policy
from rlhf_mini.reward import encode_rankings, score_rankings
from rlhf_mini.runtime import make_generator
from rlhf_mini.stages import rank_by
from rlhf_mini.town import Labeler
from rlhf_mini.town.grader import WEIGHTS

TASTES = {"A": (-0.4, -0.3), "B": (0.4, 0.3)}  # utility of a very long response, of a polite word
OTHER = {"A": "B", "B": "A"}
SHARES = (0.5, 0.7, 0.9)  # of the rankings that labelers of group A make
DESIGNS = {"averaged": "RM of all, untold", "told": "RM of all, told the group",
           "per_group": "RM of the group alone"}
PROMPTS, SAMPLES = 200, 16  # of best-of-n


def change_taste(labelers: Sequence[Labeler], group: str) -> list[Labeler]:
    """Return the labelers with the taste of a group; their weights and noise stay."""
    verbosity, politeness = TASTES[group]
    return [replace(x, verbosity=verbosity, politeness=politeness) for x in labelers]


def compute_utilities(group: str, prompt: Prompt, responses: Sequence[str]) -> np.ndarray:
    """Return what a group feels about responses, on average and without noise.

    Args:
        group: "A" or "B".
        prompt: of the town.
        responses: K texts.

    Returns:
        (K,) utilities: the gold score plus the group's taste.
    """
    member, = change_taste([Labeler(-1, "test", WEIGHTS, 0.0, 0.0, 0.0)], group)
    # Sums that differ in the last bit only are a tie.
    return np.array([round(member.utility(prompt, response), 6) for response in responses])


def feel(lab: Lab, group: str, rankings: Sequence[Ranking]) -> list[np.ndarray]:
    """Return a group's utilities (K,) of the responses of each ranking."""
    return [compute_utilities(group, lab.by_text[r.prompt], r.responses) for r in rankings]


def find_own(ranking: Ranking) -> np.ndarray:
    """Return (K, K) bool: both responses of the pair were written to this prompt."""
    own = ~np.array(ranking.decoys)
    return own[:, None] & own[None, :]


def compute_disagreement(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray],
                         keep: Sequence[np.ndarray]) -> float:
    """Return the share of pairs that two groups order differently, of those that neither ties.

    Args:
        ours: per prompt (K,) utilities.
        theirs: per prompt (K,) utilities of the other group.
        keep: per prompt (K, K) bool, symmetric: the pairs that count.
    """
    differ = decided = 0
    for a, b, counted in zip(ours, theirs, keep, strict=True):
        product = np.sign(a[:, None] - a[None, :]) * np.sign(b[:, None] - b[None, :])
        differ += (product[counted] < 0).sum()
        decided += (product[counted] != 0).sum()
    return float(differ / decided)


def mark(ranking: Ranking, group: str) -> Ranking:
    """Return the ranking with the group's name in front of its prompt."""
    return replace(ranking, prompt=f"For {group}: {ranking.prompt}")


def leave_room(lab: Lab, rankings: Sequence[Ranking]) -> list[Ranking]:
    """Return the rankings whose prompt fits with the mark too; all designs use only these."""
    limit = lab.run.config.reward.max_prompt_tokens
    return [r for r in rankings if all(
        len(encode_prompt(lab.tokenizer, mark(r, group).prompt)) <= limit for group in TASTES)]


def collect_labels(lab: Lab, share: float) -> dict[str, list[Ranking]]:
    """Let A rank the first part of a pool of responses and B the rest; the pool has no order.

    A group ranks a prompt alike at every share, so the shares differ in nothing else.

    Args:
        lab: one seed's.
        share: of the pool that A ranks.
    """
    pool = leave_room(lab, lab.collect("train", lab.run.config.ranking.prompts))
    first = {r.id for r in pool[:round(share * len(pool))]}
    labels = {}
    for group in TASTES:
        ranked = lab.rank_again(pool, rank_by(change_taste(lab.labelers(), group)), group)
        labels[group] = [r for r in ranked if (r.id in first) == (group == "A")]
    return labels


def train_reward_models(lab: Lab, labels: dict[str, list[Ranking]], design: str
                        ) -> dict[str, Path]:
    """Return for each group the folder of the reward model that scores for it.

    Args:
        lab: one seed's.
        labels: rankings by the group that made them.
        design: one of DESIGNS.
    """
    if design == "per_group":
        return {group: lab.train_reward_model(ranked) for group, ranked in labels.items()}
    everybody = [mark(r, group) if design == "told" else r
                 for group, ranked in labels.items() for r in ranked]
    return dict.fromkeys(labels, lab.train_reward_model(everybody))


def score(lab: Lab, reward: Path, rankings: Sequence[Ranking]) -> list[np.ndarray]:
    """Return a reward model's scores (K,) of the responses of each ranking."""
    encoded = encode_rankings(lab.tokenizer, list(rankings), lab.run.config.reward)
    scores = score_rankings(lab.load_reward_model(reward), encoded, lab.tokenizer.pad_token_id)
    return [x.double().numpy() for x in scores]


def sample_pool(lab: Lab) -> list[Ranking]:
    """Sample SFT's responses to held-out prompts for best-of-n.

    Returns:
        One ranking per prompt, for the reward models to read; nobody ranked it, so its ranks are
        the order of sampling.
    """
    config = lab.run.config.evaluation
    prompts = [p.prompt for p in lab.run.prompts(config.split, lab.tokenizer)[:PROMPTS]]

    def make(folder: Path) -> None:
        policy, tokenizer = load_policy(lab.policy, lab.run.device)
        sampled = sample_responses(
            policy, tokenizer, [p for p in prompts for _ in range(SAMPLES)],
            max_response_tokens=config.max_response_tokens, batch_size=config.batch_size,
            generator=make_generator(lab.seed, "best of", device=policy.device))
        texts = [response.text for response in sampled]
        write_json(folder / "pool.json",
                   [texts[i:i + SAMPLES] for i in range(0, len(texts), SAMPLES)])

    settings = [prompts, SAMPLES, config.max_response_tokens, config.batch_size]
    rows = read_json(lab.keep("best-of", settings, make) / "pool.json")
    ranks, limits = tuple(range(1, SAMPLES + 1)), lab.run.config.reward
    pool = [Ranking(str(i), prompt, tuple(texts), ranks)
            for i, (prompt, texts) in enumerate(zip(prompts, rows, strict=True))]
    return leave_room(lab, lab.run.fit(pool, lab.tokenizer, limits.max_prompt_tokens,
                                       limits.max_response_tokens))


def pick_best(scores: Sequence[np.ndarray], felt: Sequence[np.ndarray]) -> float:
    """Return the mean utility of the responses that score best.

    Args:
        scores: per prompt (K,); of equal ones the first is picked.
        felt: per prompt (K,) utilities.
    """
    return float(np.mean([u[s.argmax()] for s, u in zip(scores, felt, strict=True)]))


def measure_policy(lab: Lab, policy: Path, group: str) -> float:
    """Return a group's mean utility of a policy's sampled answers to the held-out prompts."""
    prompts = lab.run.prompts(lab.run.config.evaluation.split, lab.tokenizer)
    answers = lab.answer(policy)["sampled"].responses
    return float(np.mean([compute_utilities(group, p, texts).mean()
                          for p, texts in zip(prompts, answers, strict=True)]))


def measure(lab: Lab, condition: dict) -> list[dict]:
    """Train the reward models of a design, and say what each group gets from its own.

    Returns:
        A row per group. `own` is that group's utility and `other` the other's: accuracies on pairs
        of SFT's responses, and means over prompts of SFT (`sft_`), of its best of 16 by the reward
        model (`best_`), and their difference (`gain_`); `gain_self` if the group itself picked.
        Of design "averaged" also PPO's policy (`ppo_own`) and its difference to SFT (`ppo_gain`).
    """
    design = condition["design"]
    labels = collect_labels(lab, condition["share"])
    rewards = train_reward_models(lab, labels, design)
    test = leave_room(lab, lab.collect("test", lab.run.config.ranking.test_prompts))
    pool, keep = sample_pool(lab), [find_own(r) for r in test]
    wanted = {group: feel(lab, group, test) for group in TASTES}
    felt = {group: feel(lab, group, pool) for group in TASTES}
    config = replace(lab.run.config.evaluation, bootstrap=1)
    rows = []
    for group, reward in rewards.items():
        learned = labels if design != "per_group" else {group: labels[group]}
        row = {"group": group, "rankings": sum(map(len, learned.values())),
               "disagreement": compute_disagreement(wanted["A"], wanted["B"], keep)}
        scores, of_pool = (score(lab, reward, [mark(r, group) for r in x] if design == "told"
                                 else x) for x in (test, pool))
        for name, whose in (("own", group), ("other", OTHER[group])):
            accuracy = compute_pair_accuracy(scores, wanted[whose], keep, config)["mean"]
            sft = float(np.mean([u.mean() for u in felt[whose]]))
            best = pick_best(of_pool, felt[whose])
            row |= {f"accuracy_{name}": accuracy, f"sft_{name}": sft, f"best_{name}": best,
                    f"gain_{name}": best - sft}
        row["gain_self"] = pick_best(felt[group], felt[group]) - row["sft_own"]
        if design == "averaged":
            row["ppo_own"] = measure_policy(lab, lab.train_policy(reward), group)
            row["ppo_gain"] = row["ppo_own"] - measure_policy(lab, lab.policy, group)
        rows.append(row)
    return rows


def draw(rows: list[dict]) -> Figure:
    """Draw each group's gain in its own utility against the share of A, for every design."""
    lines = {label: (design, "gain_own") for design, label in DESIGNS.items()}
    lines |= {"PPO, RM of all, untold": ("averaged", "ppo_gain"),
              "picked by the group itself": ("averaged", "gain_self")}
    figure, panels = new_panels(1, 2, 3.2, sharey=True)
    for axes, (group, who) in zip(panels, {"A": "majority", "B": "minority"}.items(), strict=True):
        found = [row for row in rows if row["group"] == group]
        for number, (label, (design, column)) in enumerate(lines.items()):
            shifted = [row | {"x": row["share"] + 0.012 * (number - 2)} for row in found]
            conditions = [{"share": share, "design": design} for share in SHARES]
            draw_line(axes, shifted, conditions, "x", column, label, number)
        axes.axhline(0, lw=0.8, color="#777777")
        axes.set(xlabel="share of A's rankings", xticks=SHARES, title=f"Group {group}, the {who}")
    panels[0].set_ylabel("gain in own utility over SFT")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2,
                  fontsize=8, frameon=False)
    return figure


STUDY = Study(
    "preferences", "What does a minority lose when one reward model averages over two groups?",
    tuple({"share": share, "design": design} for share in SHARES for design in DESIGNS),
    measure, draw, ("ranking.prompts=1600", "ppo.iterations=12"))
