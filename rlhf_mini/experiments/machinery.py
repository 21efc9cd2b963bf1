"""Is PPO worth its machinery? Best-of-n, DPO and RLOO beside it, at equal KL and equal compute.

All start from the same SFT model and the same rankings. Each method has a dial that says how far
it may go: the coefficient of the KL penalty, for best-of-n the number of samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from rlhf_mini.config import PPOConfig, RewardConfig
from rlhf_mini.data import Ranking, encode_prompt
from rlhf_mini.dpo import train_dpo
from rlhf_mini.experiments.figures import draw_line, new_panels
from rlhf_mini.experiments.lab import Lab
from rlhf_mini.experiments.overoptimisation import (
    best_of_n,
    best_of_n_kl,
    join_scores,
    sample_pool,
    score_pool,
)
from rlhf_mini.experiments.study import Study, find_rows, seed_interval
from rlhf_mini.files import read_json, write_json
from rlhf_mini.loading import load_policy, save_model
from rlhf_mini.reward import encode_rankings
from rlhf_mini.rloo import train_rloo
from rlhf_mini.rollout import score_with
from rlhf_mini.runtime import make_generator
from rlhf_mini.workspace import grade_prompt

SAMPLES = 4  # k of RLOO, responses per prompt
DPO_LR = 1e-4  # 5e-4 as for reward models goes far and gains less: tried on validation customers
FORWARD, UPDATE = 1, 3  # passes over a token: a backward pass costs as much as two forward ones
# Networks that must be held while the policy is trained. DPO asks its reference beforehand.
MODELS = {"PPO": ("policy", "reference", "reward model", "value model"),
          "RLOO": ("policy", "reference", "reward model"), "DPO": ("policy",), "best of n": ()}
DIALS = {"PPO": (1.0, 0.3, 0.1), "RLOO": (1.0, 0.3, 0.1), "DPO": (1.0, 0.3, 0.1, 0.03),
         "best of n": (2, 4, 16, 64)}
CURVES = {method: tuple({"method": method, "dial": dial} for dial in dials)
          for method, dials in DIALS.items()}  # each from the least KL to the most


# ---- compute: how many tokens pass through how many networks -----------------------------------


def passes_of(method: str, config: PPOConfig) -> int:
    """Return the passes through a network that each token of a rollout costs, at training.

    All networks have one size, so passes over tokens are what can be compared; a pass is about two
    floating-point operations per weight and token. Both methods sample, score, and ask policy and
    reference for log-probabilities. PPO asks the value model too and updates both in each epoch.
    """
    if method == "RLOO":
        return 4 * FORWARD + UPDATE
    return 5 * FORWARD + config.epochs * 2 * UPDATE


def rloo_iterations(config: PPOConfig) -> int:
    """Return the iterations of RLOO that cost what PPO's cost, with as many episodes in each."""
    return round(config.iterations * passes_of("PPO", config) / passes_of("RLOO", config))


def count_tokens(lab: Lab, rankings: Sequence[Ranking]) -> int:
    """Count the tokens of packed rankings: each prompt once, each different response once."""
    encoded = encode_rankings(lab.tokenizer, list(rankings), lab.run.config.reward)
    return sum(len(prompt) + sum(map(len, set(map(tuple, responses))))
               for prompt, responses, _ in encoded)


def count_reward(tokens: int, config: RewardConfig) -> int:
    """Return the passes that training a reward model takes on rankings of so many tokens."""
    return config.epochs * UPDATE * tokens


def count_dpo(tokens: int, config: RewardConfig) -> int:
    """Return the passes that DPO takes, one of them by the reference."""
    return (FORWARD + config.epochs * UPDATE) * tokens


def mean_prompt(lab: Lab, split: str) -> float:
    """Return the mean length of a split's prompts in tokens."""
    return float(np.mean([len(encode_prompt(lab.tokenizer, p.prompt))
                          for p in lab.run.prompts(split, lab.tokenizer)]))


# ---- the policies ------------------------------------------------------------------------------


def ppo_config(lab: Lab, dial: float) -> PPOConfig:
    """Return the run's settings of PPO, without pretraining text."""
    return replace(lab.run.config.ppo, kl_coef=dial, ptx_coef=0.0)


def dpo_config(lab: Lab) -> RewardConfig:
    """Return those of the reward model with one pass and a smaller learning rate."""
    return replace(lab.run.config.reward, epochs=1, lr=DPO_LR)


def make_dpo(lab: Lab, rankings: Sequence[Ranking], beta: float) -> Path:
    """Train the SFT model by DPO; return the folder of the policy and its `history.json`."""
    config = dpo_config(lab)

    def make(folder: Path) -> None:
        policy, tokenizer = load_policy(lab.policy, lab.run.device)
        history = train_dpo(policy, tokenizer, list(rankings), config, beta,
                            make_generator(lab.seed, "lab dpo").initial_seed())
        save_model(policy, tokenizer, folder)
        write_json(folder / "history.json", history)

    labels = [(r.prompt, r.responses, r.ranks) for r in rankings]
    return lab.keep("dpo", [labels, asdict(config), beta], make)


def make_rloo(lab: Lab, reward: Path, kl_coef: float) -> Path:
    """Train the SFT model by RLOO against a reward model; return the folder as `make_dpo` does."""
    config = ppo_config(lab, kl_coef)
    config = replace(config, iterations=rloo_iterations(config))

    def make(folder: Path) -> None:
        policy, tokenizer = load_policy(lab.policy, lab.run.device)
        history = train_rloo(
            policy, score_with(lab.load_reward_model(reward)), tokenizer,
            lab.run.prompts("train", tokenizer), config, SAMPLES,
            make_generator(lab.seed, "lab rloo").initial_seed(),
            grade=lambda prompt, response: grade_prompt(prompt, response)["gold"])
        save_model(policy, tokenizer, folder)
        write_json(folder / "history.json", history)

    return lab.keep("rloo", [reward.name, asdict(config), SAMPLES], make)


# ---- one run -----------------------------------------------------------------------------------


def measure(lab: Lab, condition: dict) -> list[dict]:
    """Make one method's policy at one setting of its dial, and judge it.

    Returns:
        One row. `gain` in gold over SFT and `kl` in nats, both at T = 1 on the prompts of
        `sample_pool`, where SFT answered often, so that all methods share prompts and baseline;
        `compute` of all training after the rankings, `compute_reward` of it for the reward model
        and `compute_answer` for one answer, in passes of a token through a network; `models` held
        while the policy is trained. Policies also have the columns of `Lab.judge`.
    """
    rankings = lab.collect("train", lab.run.config.ranking.prompts)
    method, tokens = condition["method"], count_tokens(lab, rankings)
    row = {"models": len(MODELS[method]), "compute_reward": 0}
    if method == "DPO":
        policy = make_dpo(lab, rankings, condition["dial"])
        return [row | {"compute": count_dpo(tokens, dpo_config(lab))} | _judge(lab, policy)]
    reward = lab.train_reward_model(rankings)
    row["compute_reward"] = count_reward(tokens, lab.run.config.reward)
    if method == "best of n":
        row["compute"] = row["compute_reward"]
        return [row | _choose(lab, reward, condition["dial"])]
    config = ppo_config(lab, condition["dial"])
    policy = (make_rloo(lab, reward, condition["dial"]) if method == "RLOO"
              else lab.train_policy(reward, config))
    history = read_json(policy / "history.json")
    prompt = mean_prompt(lab, "train")
    seen = sum(config.episodes * (prompt + step["response_tokens"]) for step in history)
    row["compute"] = row["compute_reward"] + passes_of(method, config) * seen
    return [row | _judge(lab, policy)]


def _judge(lab: Lab, policy: Path) -> dict[str, float]:
    pool = np.array(sample_pool(lab)["gold"])
    row, answers = lab.judge(policy), lab.answer(policy)["sampled"].measures
    gold, kl = (answers[name][:len(pool)] for name in ("gold", "kl"))
    prompt = mean_prompt(lab, lab.run.config.evaluation.split)
    return {"gain": float(gold.mean() - pool.mean()), "kl": float(kl.mean()),
            "compute_answer": FORWARD * (prompt + row["response_tokens_sampled"])} | row


def _choose(lab: Lab, reward: Path, n: int) -> dict[str, float]:
    pool = sample_pool(lab)
    scores = score_pool(lab, pool, join_scores([lab.load_reward_model(reward)], "one"))
    gold = np.array(pool["gold"])
    prompt = mean_prompt(lab, lab.run.config.evaluation.split)
    response = np.mean([len(ids) for row in pool["tokens"] for ids in row])
    return {"gain": float(best_of_n(scores, gold, n).mean() - gold.mean()),
            "kl": best_of_n_kl(n), "compute_answer": float(2 * FORWARD * n * (prompt + response))}


# ---- comparison --------------------------------------------------------------------------------


def gain_at(rows: Sequence[dict], kl: float) -> float | None:
    """Return a method's gain at a KL, on straight lines between its points over the root of the KL.

    Args:
        rows: of one method and seed, each with `kl` and `gain`.
        kl: nats.

    Returns:
        None outside the points: nothing is extrapolated.

    >>> gain_at([{"kl": 1.0, "gain": 0.1}, {"kl": 4.0, "gain": 0.3}], 2.25)
    0.2
    """
    points = sorted((row["kl"], row["gain"]) for row in rows)
    if not points or not points[0][0] <= kl <= points[-1][0]:
        return None
    roots, gains = np.sqrt([x for x, _ in points]), [y for _, y in points]
    return float(np.interp(np.sqrt(kl), roots, gains))


def compare_at_equal_kl(rows: Sequence[dict], method: str, against: dict) -> dict | None:
    """Return how much more a method gains than a condition, at that condition's KL in each seed.

    Args:
        rows: of the study.
        method: its points are interpolated.
        against: a condition of another method.

    Returns:
        As `seed_interval`, and `seeds`, the number of those in which the method's points enclose
        the KL; None if these are fewer than 2.
    """
    differences = []
    for other in find_rows(rows, against):
        gain = gain_at(find_rows(rows, {"method": method}, other["seed"]), other["kl"])
        if gain is not None:
            differences.append(gain - other["gain"])
    if len(differences) < 2:
        return None
    return seed_interval(differences) | {"seeds": len(differences)}


def break_even(rows: Sequence[dict], trained: dict, chosen: dict) -> float:
    """Return after how many answers a trained policy has cost less than best-of-n.

    The training of the policy is paid once, n samples and their scores are paid with each answer;
    the reward model is paid in both. Means over seeds.

    Args:
        rows: of the study.
        trained: condition of PPO or RLOO.
        chosen: condition of "best of n".
    """
    def mean(condition: dict, column: str) -> float:
        return float(np.mean([row[column] for row in find_rows(rows, condition)]))

    training = mean(trained, "compute") - mean(chosen, "compute")
    return training / (mean(chosen, "compute_answer") - mean(trained, "compute_answer"))


def draw(rows: list[dict]) -> Figure:
    """Draw the gain over the KL, and over the compute of training at the middle of the dials.

    PPO and RLOO cost the same; their points are drawn side by side.
    """
    rows = [row | {"root": row["kl"] ** 0.5, "millions": row["compute"] / 1e6} for row in rows]
    figure, (left, right) = new_panels(1, 2, 3.0, sharey=True)
    apart = 0.02 * max(row["millions"] for row in rows)
    for number, (method, conditions) in enumerate(CURVES.items()):
        draw_line(left, rows, conditions, "root", "gain", method, number)
        shift = {"PPO": -apart, "RLOO": apart}.get(method, 0)
        middle = [row | {"millions": row["millions"] + shift} for row in rows]
        draw_line(right, middle, conditions[1:2], "millions", "gain", method, number)
    for axes in (left, right):
        axes.axhline(0, lw=0.8, color="#777777")
    left.set(xlabel="square root of KL in nats", title="Gain over SFT, gold, T = 1")
    right.set(xlabel="million token passes", title="The same, dials at the middle")
    right.set_xlim(left=0)
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=4,
                  fontsize=8, frameon=False)
    return figure


STUDY = Study(
    "machinery", "Is PPO worth its machinery, beside best-of-n, DPO and RLOO?",
    tuple(condition for curve in CURVES.values() for condition in curve), measure, draw,
    ("ranking.prompts=1600", "ppo.iterations=12"))
