"""The study of PPO's machinery: compute by hand and by FLOPs, equal KL, and one small run."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch
from matplotlib.figure import Figure
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

from rlhf_mini.config import PPOConfig, RewardConfig, load_preset
from rlhf_mini.data import Prompt, Ranking, encode_prompt, pack_rankings
from rlhf_mini.dpo import train_dpo
from rlhf_mini.experiments import machinery as study
from rlhf_mini.experiments.overoptimisation import sample_pool
from rlhf_mini.files import read_json
from rlhf_mini.models import RewardModel, ValueModel
from rlhf_mini.ppo import train_ppo
from rlhf_mini.reward import encode_rankings, train_reward_model
from rlhf_mini.rloo import train_rloo
from rlhf_mini.rollout import score_with

SMOKE = load_preset("smoke")
PPO, RLOO, DPO, BEST = (study.CURVES[m][1] for m in ("PPO", "RLOO", "DPO", "best of n"))


# ---------------------------------------------------------------- compute

def test_passes_are_those_of_a_hand_count():
    # rollout: sample, score, old and reference log-probabilities, and PPO's values; update: a
    # forward pass and a backward one that costs two, for two networks in PPO, in each epoch
    assert study.passes_of("PPO", PPOConfig(epochs=1)) == 5 + 6
    assert study.passes_of("PPO", PPOConfig(epochs=2)) == 5 + 12
    assert study.passes_of("RLOO", PPOConfig(epochs=2)) == 4 + 3
    assert study.rloo_iterations(PPOConfig(iterations=12, epochs=2)) == 29  # 12 * 17 / 7 = 29.1
    assert study.count_reward(100, RewardConfig(epochs=2)) == 600
    assert study.count_dpo(100, RewardConfig(epochs=2)) == 700


class Counted:
    """Counts the FLOPs of a training, in forward passes of one token through one network."""

    def __init__(self, tokenizer):
        torch.manual_seed(0)
        self.tokenizer = tokenizer
        self.policy = GPT2LMHeadModel(GPT2Config(
            vocab_size=len(tokenizer), n_positions=64, n_embd=64, n_layer=4, n_head=2,
            bos_token_id=0, eos_token_id=0, pad_token_id=1)).eval()
        self.reward_model = RewardModel.from_policy(self.policy, torch.Generator().manual_seed(0))
        self.weights = 4 * 12 * 64**2  # of the blocks; the rest is small

    def run(self, function) -> tuple[float, list[dict]]:
        with FlopCounterMode(display=False) as counter:
            history = function(self)
        return counter.get_total_flops() / (2 * self.weights), history


PROMPTS = [Prompt(f"p{i}", text) for i, text in enumerate(
    ["Where is Anna?", "Who?", "Tell me about the town.", "Bread", "The river?", "Why so cold?"])]
ROLLOUTS = PPOConfig(iterations=1, episodes=24, minibatches=2, epochs=2, max_response_tokens=12)


def test_passes_of_a_rollout_agree_with_counted_flops(tokenizer):
    def ppo(c):
        return train_ppo(c.policy, ValueModel.from_reward_model(c.reward_model),
                         score_with(c.reward_model), tokenizer, PROMPTS, ROLLOUTS, 0)

    def rloo(c):
        return train_rloo(c.policy, score_with(c.reward_model), tokenizer, PROMPTS, ROLLOUTS, 4, 0)

    prompt = np.mean([len(encode_prompt(tokenizer, p.prompt)) for p in PROMPTS])
    per_pass = {}
    for method, train in (("PPO", ppo), ("RLOO", rloo)):
        counted, history = Counted(tokenizer).run(train)
        tokens = ROLLOUTS.episodes * (prompt + history[0]["response_tokens"])
        per_pass[method] = counted / tokens / study.passes_of(method, ROLLOUTS)
        assert 1 <= per_pass[method] < 1.2  # output layer and attention come on top of the blocks
    assert per_pass["PPO"] == pytest.approx(per_pass["RLOO"], rel=0.05)


def test_passes_over_rankings_agree_with_counted_flops(tokenizer, lab):
    rankings = [Ranking(f"r{i}", p.prompt, (f"The mill {'very ' * i}cold.", "Bread.", "A school.",
                                            "Bread."), (1, 2, 3, 2))
                for i, p in enumerate(PROMPTS)]
    limits = RewardConfig(epochs=2, batch_size=2, max_prompt_tokens=50)
    batch = pack_rankings(encode_rankings(tokenizer, rankings, limits), 1)
    tokens = int((batch.segments >= 0).sum())

    class Same:
        tokenizer, run = lab.tokenizer, lab.run
    Same.tokenizer, Same.run = tokenizer, replace(
        lab.run, config=replace(lab.run.config, reward=limits))
    assert study.count_tokens(Same, rankings) == tokens
    counted, _ = Counted(tokenizer).run(lambda c: train_reward_model(
        c.reward_model, tokenizer, rankings, [], limits, 0))
    assert counted == pytest.approx(study.count_reward(tokens, limits), rel=0.15)
    counted, _ = Counted(tokenizer).run(lambda c: train_dpo(
        c.policy, tokenizer, rankings, limits, 0.1, 0))
    assert counted == pytest.approx(study.count_dpo(tokens, limits), rel=0.2)


# ---------------------------------------------------------------- comparison

def test_interpolation_is_linear_in_the_root_and_never_extrapolates():
    rows = [{"kl": x * x, "gain": 0.3 + 0.2 * x} for x in (2.0, 0.5, 1.0)]
    for root in (0.5, 0.7, 1.0, 1.9, 2.0):
        assert study.gain_at(rows, root * root) == pytest.approx(0.3 + 0.2 * root)
    assert study.gain_at(rows, 0.24) is None and study.gain_at(rows, 4.01) is None
    assert study.gain_at([], 1.0) is None
    bent = [{"kl": 0.0, "gain": 0.0}, {"kl": 1.0, "gain": 0.1}, {"kl": 4.0, "gain": 0.0}]
    assert study.gain_at(bent, 2.25) == pytest.approx(0.05)


def test_comparison_at_equal_kl_is_paired_by_seed():
    gaps, rows = [0.05, 0.01, 0.03], []
    for seed, gap in enumerate(gaps):
        kl = 0.4 + 0.1 * seed  # PPO's differs between the seeds
        rows.append({"seed": seed, **PPO, "kl": kl, "gain": 0.1 * math.sqrt(kl) - gap})
        rows += [{"seed": seed, **c, "kl": x, "gain": 0.1 * math.sqrt(x)}
                 for c, x in zip(study.CURVES["DPO"], (0.1, 0.5, 1.0, 2.0), strict=True)]
    found = study.compare_at_equal_kl(rows, "DPO", PPO)
    wanted = scipy.stats.ttest_1samp(gaps, 0).confidence_interval(0.95)
    assert (found["low"], found["high"]) == pytest.approx(wanted) and found["seeds"] == 3
    far = [row | {"kl": 9.0} if row["method"] == "PPO" and row["seed"] else row for row in rows]
    assert study.compare_at_equal_kl(far, "DPO", PPO) is None  # one seed is left
    assert study.compare_at_equal_kl(rows, "RLOO", PPO) is None


def test_break_even_is_where_both_have_cost_the_same():
    rows = [{"seed": s, **PPO, "compute": 900.0 + s, "compute_answer": 10.0} for s in (0, 2)]
    rows += [{"seed": s, **BEST, "compute": 400.0 + s, "compute_answer": 60.0} for s in (0, 2)]
    answers = study.break_even(rows, PPO, BEST)
    assert 901 + 10 * answers == pytest.approx(401 + 60 * answers)


# ---------------------------------------------------------------- one run

@pytest.fixture(scope="module")
def rows(lab) -> list[dict]:
    lab = lab.with_settings("ppo.epochs=2", "reward.epochs=2")
    return [{"seed": lab.seed} | c | row for c in study.STUDY.conditions
            for row in study.measure(lab, c)]


def find(rows, condition):
    row, = [r for r in rows if all(r[k] == v for k, v in condition.items())]
    return row


def test_every_condition_gives_one_row_of_finite_numbers(rows, lab):
    assert len(rows) == len(study.STUDY.conditions) == 14
    for row in rows:
        numbers = {k: v for k, v in row.items() if k != "method"}
        assert all(np.isfinite(x) for x in numbers.values()), row
        assert {"gain", "kl", "compute", "compute_reward", "compute_answer", "models"} <= set(row)
        assert ("win_greedy" in row) == (row["method"] != "best of n")
    assert {row["models"] for row in rows} == {0, 1, 3, 4}
    assert len(list(lab.folder.glob("dpo-*"))) == 4 and len(list(lab.folder.glob("rloo-*"))) == 3
    assert len(list(lab.folder.glob("reward-*"))) == 1  # one for all


def test_compute_of_a_run_is_that_of_its_steps(rows, lab):
    rankings = lab.collect("train", SMOKE.ranking.prompts)
    batch = pack_rankings(encode_rankings(lab.tokenizer, rankings, SMOKE.reward), 1)
    tokens = int((batch.segments >= 0).sum())
    reward = 2 * 3 * tokens
    assert find(rows, DPO)["compute"] == 4 * tokens and find(rows, DPO)["compute_reward"] == 0
    assert find(rows, BEST)["compute"] == find(rows, BEST)["compute_reward"] == reward
    prompts = [len(encode_prompt(lab.tokenizer, p.prompt)) for p in lab.run.town.prompts
               if p.split == "train"]
    prompts = [n for n in prompts if n <= SMOKE.ppo.max_prompt_tokens]
    for folder in lab.folder.glob("rloo-*"):
        steps = read_json(folder / "history.json")
        assert len(steps) == round(SMOKE.ppo.iterations * 17 / 7)
        seen = sum(8 * (np.mean(prompts) + step["response_tokens"]) for step in steps)
        assert any(row["compute"] == pytest.approx(reward + 7 * seen) for row in rows)
    ppo, rloo = (find(rows, c)["compute"] - reward for c in (PPO, RLOO))
    assert ppo == pytest.approx(rloo, rel=0.1)


def test_gain_and_kl_are_those_on_the_prompts_of_the_pool(rows, lab):
    pool, small = sample_pool(lab), lab.with_settings("ppo.epochs=2", "reward.epochs=2")
    reward = small.train_reward_model(small.collect("train", SMOKE.ranking.prompts))
    for condition, policy in (
            (RLOO, study.make_rloo(small, reward, RLOO["dial"])),
            (PPO, small.train_policy(reward, study.ppo_config(small, PPO["dial"])))):
        row, measures = find(rows, condition), small.answer(policy)["sampled"].measures
        count = len(pool["prompts"])
        assert row["gain"] == pytest.approx(np.mean(measures["gold"][:count])
                                            - np.mean(pool["gold"]))
        assert row["kl"] == pytest.approx(np.mean(measures["kl"][:count]))
    best = find(rows, {"method": "best of n", "dial": 64})
    assert best["kl"] == pytest.approx(math.log(64) - 63 / 64)
    assert best["compute_answer"] == pytest.approx(
        32 * find(rows, {"method": "best of n", "dial": 2})["compute_answer"])


def test_the_rows_can_be_drawn(rows):
    seeds = [row | {"seed": s, "gain": row["gain"] + s} for s in (0, 1) for row in rows]
    figure = study.draw(seeds)
    assert isinstance(figure, Figure) and len(figure.axes) == 2
    legend = [text.get_text() for text in figure.legends[0].texts]
    assert legend == list(study.CURVES)
    line = figure.axes[0].lines[0]  # PPO, from the least KL to the most
    assert line.get_xdata()[1] == pytest.approx(math.sqrt(find(rows, PPO)["kl"]))
    assert line.get_ydata()[1] == pytest.approx(find(rows, PPO)["gain"] + 0.5)
    dpo = next(x for x in figure.axes[1].lines if x.get_label() == "DPO")
    assert dpo.get_xdata() == pytest.approx([find(rows, DPO)["compute"] / 1e6])
