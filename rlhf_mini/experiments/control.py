"""The missing control: would the labelers' time be better spent on demonstrations?

All policies build on the town's demonstrations. More labels are bought on top, of one of two kinds:
further demonstrations, or rankings, from which a reward model learns that is then used in one of
three ways. What a ranking costs, in demonstrations, is not part of a run: `find_price_ratios`
computes from the results at which price the two kinds buy the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from rlhf_mini.data import Demonstration, Prompt, decode_response, encode_prompt
from rlhf_mini.experiments.figures import draw_line, new_panels
from rlhf_mini.experiments.lab import Lab
from rlhf_mini.experiments.study import Study, find_rows
from rlhf_mini.files import read_json, write_json
from rlhf_mini.generation import sample_responses
from rlhf_mini.loading import load_policy, save_model
from rlhf_mini.reward import score_rankings
from rlhf_mini.runtime import make_generator, make_rng
from rlhf_mini.sft import train_sft
from rlhf_mini.town.prompts import write_demonstrations
from rlhf_mini.workspace import grade_prompt

SAMPLES = 16  # n of best-of-n
PROMPTS = 800  # training prompts whose best responses SFT learns from, a tenth of them for choice
RANKED = {"ppo": "rankings, PPO", "best_of_n": f"rankings, best of {SAMPLES}",
          "sft_on_best": "rankings, SFT on the best"}
ASIDE = {"best_of_n": 1.12, "sft_on_best": 0.9}  # in the figure: else their points would coincide
START = {"method": "demonstrations", "labels": 0, "clean": False}
WRITTEN = {clean: tuple({"method": "demonstrations", "labels": labels, "clean": clean}
                        for labels in (100, 400, 1600)) for clean in (False, True)}
CONDITIONS = (START, *WRITTEN[False], *WRITTEN[True], *(
    {"method": method, "labels": labels, "clean": False}
    for method in RANKED for labels in (400, 1600)))


# ---- more demonstrations -----------------------------------------------------------------------


def write_more(lab: Lab, clean: bool) -> list[Demonstration]:
    """Let the town's labelers respond to every training prompt that has no demonstration yet.

    The order is random and the same for both kinds, so the first N are what N labels buy. Clean
    ones are without the errors and the needless words of the town's.
    """
    town, config = lab.run.town, lab.run.config.town
    taken = {d.prompt for d in town.demonstrations}
    prompts = [p for p in lab.run.prompts("train", lab.tokenizer) if p.prompt not in taken]
    shares = (0.0, 0.0) if clean else (config.demonstration_errors, config.demonstration_padding)
    return write_demonstrations(prompts, len(prompts), lab.labelers(), town.world, *shares,
                                make_rng(lab.seed, "control demonstrations"))


def train_on_more(lab: Lab, labels: int, clean: bool) -> tuple[Path, int]:
    """Fine-tune the base model on the town's demonstrations and `labels` more; count them all."""
    config = lab.run.config.sft
    train, valid = (lab.run.demonstrations(split, lab.tokenizer, config)
                    for split in ("train", "valid"))
    if labels:
        train = train + lab.run.fit(write_more(lab, clean), lab.tokenizer, config.max_prompt_tokens,
                                    config.max_response_tokens)[:labels]

    def make(folder: Path) -> None:
        policy, tokenizer = lab.run.policy("base")
        train_sft(policy, tokenizer, train, valid, config,
                  make_generator(lab.seed, "control sft").initial_seed())
        save_model(policy, tokenizer, folder)

    return lab.keep("written", [labels, clean, asdict(config)], make), len(train)


# ---- the best of n -----------------------------------------------------------------------------


def sample_pool(lab: Lab, prompts: Sequence[Prompt]) -> list[list[list[int]]]:
    """Return the token ids of n responses of SFT to each of N prompts, the same for all RMs."""
    config = lab.run.config.evaluation

    def make(folder: Path) -> None:
        policy, tokenizer = load_policy(lab.policy, lab.run.device)
        sampled = sample_responses(
            policy, tokenizer, [p.prompt for p in prompts for _ in range(SAMPLES)],
            max_response_tokens=config.max_response_tokens, batch_size=config.batch_size,
            generator=make_generator(lab.seed, "control pool", device=policy.device))
        write_json(folder / "pool.json", [[r.token_ids for r in sampled[i:i + SAMPLES]]
                                          for i in range(0, len(sampled), SAMPLES)])

    settings = [[p.id for p in prompts], SAMPLES, config.max_response_tokens, config.batch_size]
    return read_json(lab.keep("control-pool", settings, make) / "pool.json")


def pick_best(lab: Lab, reward: Path, prompts: Sequence[Prompt]) -> list[str]:
    """Return to each prompt the one of n responses of SFT that the reward model scores highest.

    A response without EOS has the fixed score that PPO gives it.
    """
    tokenizer, pool = lab.tokenizer, sample_pool(lab, prompts)
    encoded = [(encode_prompt(tokenizer, p.prompt), responses, (1,) * SAMPLES)
               for p, responses in zip(prompts, pool, strict=True)]
    scores = score_rankings(lab.load_reward_model(reward), encoded, tokenizer.pad_token_id)
    best = []
    for row, responses in zip(scores, pool, strict=True):
        finished = [ids[-1] == tokenizer.eos_token_id for ids in responses]
        row = np.where(finished, row.numpy(), lab.run.config.ppo.missing_eos_score)
        best.append(decode_response(tokenizer, responses[int(row.argmax())]))
    return best


def judge_best(lab: Lab, reward: Path) -> dict[str, float]:
    """Return what best-of-n is worth, as `Lab.judge` does; only sampling has a best of n."""
    prompts = lab.run.prompts(lab.run.config.evaluation.split, lab.tokenizer)
    grades = [grade_prompt(p, text)
              for p, text in zip(prompts, pick_best(lab, reward, prompts), strict=True)]
    row = {f"{name}_sampled": float(np.mean([g[name] for g in grades])) for name in grades[0]}
    theirs = lab.answer(lab.policy)["sampled"].measures["gold"]
    gain = np.array([[g["gold"]] for g in grades]) - theirs
    return row | {"gain_sampled": float(gain.mean()),
                  "win_sampled": float((np.sign(gain) + 1).mean() / 2)}


def train_on_best(lab: Lab, reward: Path) -> Path:
    """Fine-tune SFT on those of its own responses that a reward model likes best."""
    config = lab.run.config.sft

    def make(folder: Path) -> None:
        policy, tokenizer = load_policy(lab.policy, lab.run.device)
        prompts = lab.run.prompts("train", tokenizer)
        prompts = make_rng(lab.seed, "control prompts").sample(prompts, min(PROMPTS, len(prompts)))
        best = lab.run.fit(
            [Demonstration(f"{p.id}-best", p.prompt, text, p.source, p.customer, p.split)
             for p, text in zip(prompts, pick_best(lab, reward, prompts), strict=True)],
            tokenizer, config.max_prompt_tokens, config.max_response_tokens)
        held_out = len(best) // 10  # the epoch is chosen on them
        train_sft(policy, tokenizer, best[held_out:], best[:held_out], config,
                  make_generator(lab.seed, "control sft on best").initial_seed())
        save_model(policy, tokenizer, folder)

    sampler, missing = lab.run.config.evaluation, lab.run.config.ppo.missing_eos_score
    return lab.keep("on-best", [reward.name, asdict(config), PROMPTS, SAMPLES, missing,
                                sampler.max_response_tokens, sampler.batch_size], make)


# ---- the study ---------------------------------------------------------------------------------


def measure(lab: Lab, condition: dict) -> list[dict]:
    """Spend the labels in one way and judge the policy; best-of-n has no greedy columns.

    The row's `demonstrations` and `rankings` are the numbers that were learned from.
    """
    method, labels = condition["method"], condition["labels"]
    if method == "demonstrations":
        policy, count = train_on_more(lab, labels, condition["clean"])
        return [{"demonstrations": count, "rankings": 0} | lab.judge(policy)]
    rankings = lab.collect("train", lab.run.config.ranking.prompts)[:labels]
    reward = lab.train_reward_model(rankings)
    start = lab.run.demonstrations("train", lab.tokenizer, lab.run.config.sft)
    row = {"demonstrations": len(start), "rankings": len(rankings)}
    row |= lab.measure_reward_model(reward)
    if method == "best_of_n":
        return [row | judge_best(lab, reward)]
    policy = train_on_best(lab, reward) if method == "sft_on_best" else lab.train_policy(reward)
    return [row | lab.judge(policy)]


def find_count(counts: Sequence[float], values: Sequence[float], target: float) -> float | None:
    """Return where a curve first reaches a target; between its points it is straight in log(count).

    It is the first count if the curve starts at the target or above, None if it never gets there.

    Args:
        counts: (N,) ascending, above 0.
        values: (N,) of the curve.
        target: value to reach.

    >>> find_count([100, 400], [1, 3], 2)
    200.0
    """
    if values[0] >= target:
        return float(counts[0])
    for i in range(1, len(counts)):
        if values[i] >= target:
            share = (target - values[i - 1]) / (values[i] - values[i - 1])
            return float(counts[i - 1] * (counts[i] / counts[i - 1]) ** share)
    return None


def find_price_ratios(rows: Sequence[dict], measure: str = "gold_sampled") -> list[dict]:
    """Compute at which price of a ranking the two kinds of labels buy the same.

    A ranking that costs fewer demonstrations than `ratio` is the better buy.

    Args:
        rows: of the study; their means over seeds are compared.
        measure: column; a method without it is left out.

    Returns:
        Rows with `method` and `labels` of the rankings, `clean` of the demonstrations, `needed`
        (further demonstrations that reach the same value) and `ratio` (needed per ranking); both
        None if the largest number does not get there.
    """
    def mean(condition: dict, column: str) -> float:
        return float(np.mean([row[column] for row in find_rows(rows, condition)]))

    prices = []
    for clean, more in WRITTEN.items():
        curve = [c for c in (START, *more) if find_rows(rows, c)]
        counts = [mean(c, "demonstrations") for c in curve]
        values = [mean(c, measure) for c in curve]
        for condition in CONDITIONS:
            found = find_rows(rows, condition)
            if condition["method"] in RANKED and found and measure in found[0]:
                count = find_count(counts, values, mean(condition, measure))
                needed = None if count is None else count - counts[0]
                ratio = None if needed is None else needed / condition["labels"]
                prices.append(condition | {"clean": clean, "needed": needed, "ratio": ratio})
    return prices


def draw(rows: list[dict], price: float = 1.0) -> Figure:
    """Draw gold against the cost of the labels, a line per way to spend them.

    Args:
        rows: of the study.
        price: of a ranking, in demonstrations; at 1 the cost is the number of labels.
    """
    rows = [row | {"cost": row["labels"] * ASIDE.get(row["method"], 1)
                   * (price if row["method"] in RANKED else 1)} for row in rows]
    lines = {"demonstrations": WRITTEN[False], "clean demonstrations": WRITTEN[True]} | {
        label: [c for c in CONDITIONS if c["method"] == method] for method, label in RANKED.items()}
    figure, panels = new_panels(1, 2, 3.0)
    titles = {"gold_sampled": "Gold, T = 1", "gold_greedy": "Gold, greedy"}
    for axes, (column, title) in zip(panels, titles.items(), strict=True):
        known = [row for row in rows if column in row]
        if start := find_rows(known, START):
            axes.axhline(np.mean([row[column] for row in start]), lw=0.8, color="#777777",
                         label="no further label")
        for number, (label, conditions) in enumerate(lines.items()):
            if any(find_rows(known, c) for c in conditions):
                draw_line(axes, known, conditions, "cost", column, label, number)
        axes.set(xscale="log", xlabel="labels" if price == 1 else "cost, in demonstrations",
                 title=title)
        axes.set_xticks([100, 400, 1600], ["100", "400", "1,600"])
        axes.minorticks_off()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2,
                  fontsize=8, frameon=False)
    return figure


STUDY = Study(
    "control", "Would the same number of labels do more as demonstrations than as rankings?",
    CONDITIONS, measure, draw, ("ranking.prompts=1600", "ppo.iterations=12"))
