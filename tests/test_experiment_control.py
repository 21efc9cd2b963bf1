"""The control study: what labels buy, the best of n, and the price at which two kinds are even."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from tolerances import FORWARD

from rlhf_mini.config import load_preset
from rlhf_mini.data import Demonstration, Prompt, collate, decode_response, encode_prompt
from rlhf_mini.experiments import Lab
from rlhf_mini.experiments import control as study
from rlhf_mini.loading import load_policy
from rlhf_mini.town import grade
from rlhf_mini.town.responses import SAY_NO

SMOKE = load_preset("smoke")
METHODS = ("demonstrations", *study.RANKED)


@pytest.fixture(scope="module")
def reward(lab):
    """The reward model of 12 rankings."""
    return lab.train_reward_model(lab.collect("train", SMOKE.ranking.prompts)[:12])


@pytest.fixture(scope="module")
def rows(lab, reward) -> dict[str, dict]:
    """What `measure` returns for 12 labels, by method."""
    found = {method: study.measure(lab, {"method": method, "labels": 12, "clean": False})
             for method in METHODS}
    assert all(len(x) == 1 for x in found.values())
    return {method: row for method, (row,) in found.items()}


# ---------------------------------------------------------------- more demonstrations

def test_more_demonstrations_are_new_and_only_the_clean_ones_all_right(lab):
    dirty, clean = study.write_more(lab, False), study.write_more(lab, True)
    texts = [d.prompt for d in clean]
    train = {p.prompt for p in lab.run.prompts("train", lab.tokenizer)}  # short enough
    assert texts == [d.prompt for d in dirty] and len(set(texts)) == len(texts)
    assert set(texts) == train - {d.prompt for d in lab.run.town.demonstrations}
    gold = {name: np.array([grade(lab.by_text[d.prompt], d.response).overall for d in x])
            for name, x in (("dirty", dirty), ("clean", clean))}
    assert (gold["clean"] > 0.999).all()
    # TownConfig: of E[1 - (errors, or 2 errors first where one should say no)] 40 % stay plain
    errors, padding = SMOKE.town.demonstration_errors, SMOKE.town.demonstration_padding
    right = np.mean([(1 - errors) * (1 - padding) * (
        1 - 2 * errors * (lab.by_text[x].family in SAY_NO)) for x in texts])
    share = (gold["dirty"] > 0.999).mean()
    assert share == pytest.approx(right, abs=3.5 * (right * (1 - right) / len(texts)) ** 0.5)
    other = study.write_more(Lab(lab.run, 1, lab.folder), True)
    assert [d.prompt for d in other] != texts


@pytest.mark.parametrize("labels, clean", [(0, False), (5, True)])
def test_sft_learns_from_the_towns_demonstrations_and_the_first_more(
        lab, monkeypatch, labels, clean):
    seen = {}

    def train(policy, tokenizer, train, valid, config, seed):
        weights = load_policy(lab.run.directory / "base", "cpu")[0].state_dict()
        assert all(torch.equal(x, weights[name]) for name, x in policy.state_dict().items())
        seen.update(train=train, valid=valid, config=config)

    monkeypatch.setattr(study, "train_sft", train)
    _, count = study.train_on_more(Lab(lab.run, 7, lab.folder), labels, clean)
    town, valid = (lab.run.demonstrations(x, lab.tokenizer, SMOKE.sft)  # short enough
                   for x in ("train", "valid"))
    written = study.write_more(Lab(lab.run, 7, lab.folder), clean)
    assert seen["train"][:len(town)] == town and seen["valid"] == valid
    more = [d for d in seen["train"] if d not in town]
    assert len(more) == labels and more == [d for d in written if d in more]
    assert written.index(more[-1]) < labels + 5 if labels else count == len(town)
    assert count == len(town) + labels and seen["config"] == SMOKE.sft


# ---------------------------------------------------------------- the best of n

def score_alone(reward_model, tokenizer, prompt: str, tokens: list[int]) -> float:
    """A response's score in a batch of its own, as PPO sees it."""
    if tokens[-1] != tokenizer.eos_token_id:
        return SMOKE.ppo.missing_eos_score
    batch = collate([(encode_prompt(tokenizer, prompt), tokens)], tokenizer.pad_token_id)
    with torch.no_grad():
        return reward_model(batch.input_ids, batch.attention_mask).item()


def test_the_best_of_n_scores_best_one_at_a_time(lab, reward, monkeypatch):
    prompts = lab.run.prompts("test", lab.tokenizer)[:6]
    eos, word = lab.tokenizer.eos_token_id, lab.tokenizer.encode(" the town")
    rng = np.random.default_rng(0)
    pool = [[[*rng.integers(2, 300, size=5).tolist(), *([eos] if rng.random() < 0.5 else word)]
             for _ in range(study.SAMPLES)] for _ in prompts]
    monkeypatch.setattr(study, "sample_pool", lambda lab, prompts: pool)
    reward_model = lab.load_reward_model(reward)
    cut = 0
    for shift in (0.0, -5.0, 5.0):  # of all scores of finished responses
        with torch.no_grad():
            reward_model.model.classifier.bias += shift
        monkeypatch.setattr(Lab, "load_reward_model", lambda lab, folder: reward_model)
        for prompt, responses, text in zip(prompts, pool, study.pick_best(lab, reward, prompts),
                                           strict=True):
            scores = [score_alone(reward_model, lab.tokenizer, prompt.prompt, x)
                      for x in responses]
            picked = [decode_response(lab.tokenizer, x) for x in responses].index(text)
            assert scores[picked] == pytest.approx(max(scores), rel=FORWARD["rtol"],
                                                   abs=FORWARD["atol"])
            cut += responses[picked][-1] != eos
    assert cut == len(prompts)  # where the finished ones score below the missing EOS


def test_the_pool_holds_n_different_samples_and_is_kept(lab):
    prompts = lab.run.prompts("test", lab.tokenizer)[:4]
    pool = study.sample_pool(lab, prompts)
    assert pool == study.sample_pool(lab, prompts)
    assert [len(x) for x in pool] == [study.SAMPLES] * 4
    assert all(len({tuple(ids) for ids in x}) > 1 for x in pool)
    assert pool != study.sample_pool(Lab(lab.run, 1, lab.folder), prompts)


def test_best_of_n_is_judged_by_the_grader_against_sft(lab, reward, rows):
    prompts = lab.run.prompts("test", lab.tokenizer)
    texts = study.pick_best(lab, reward, prompts)
    gold = [grade(p, x).overall for p, x in zip(prompts, texts, strict=True)]
    sft = [[grade(p, x).overall for x in answers] for p, answers in zip(
        prompts, lab.answer(lab.policy)["sampled"].responses, strict=True)]
    pairs = [(ours, theirs) for ours, x in zip(gold, sft, strict=True) for theirs in x]
    row = rows["best_of_n"]
    assert row["gold_sampled"] == pytest.approx(np.mean(gold))
    assert row["gain_sampled"] == pytest.approx(np.mean([a - b for a, b in pairs]))
    assert row["win_sampled"] == pytest.approx(
        np.mean([(a > b) + 0.5 * (a == b) for a, b in pairs]))


def test_sft_on_the_best_learns_from_the_picks_and_holds_a_tenth_back(lab, reward, monkeypatch):
    seen = {}

    def train(policy, tokenizer, train, valid, config, seed):
        weights = load_policy(lab.policy, "cpu")[0].state_dict()
        assert all(torch.equal(x, weights[name]) for name, x in policy.state_dict().items())
        seen.update(train=train, valid=valid)

    monkeypatch.setattr(study, "train_sft", train)
    monkeypatch.setattr(study, "PROMPTS", 30)
    monkeypatch.setattr(study, "pick_best", lambda lab, reward, prompts: [
        f"to {p.id}" for p in prompts])
    study.train_on_best(Lab(lab.run, 7, lab.folder), reward)
    assert (len(seen["train"]), len(seen["valid"])) == (27, 3)
    learned: list[Demonstration] = seen["train"] + seen["valid"]
    assert len({d.prompt for d in learned}) == 30
    for d in learned:
        prompt: Prompt = lab.by_text[d.prompt]
        assert prompt.split == "train" and d.response == f"to {prompt.id}"


# ---------------------------------------------------------------- prices

@pytest.mark.parametrize("golds, target, wanted", [
    ((0.5, 0.6, 0.7), 0.65, 800.0),  # half-way from 400 to 1600 in the logarithm
    ((0.5, 0.6, 0.7), 0.525, 100 * 2**0.5),
    ((0.5, 0.6, 0.7), 0.7, 1600.0),
    ((0.5, 0.6, 0.7), 0.4, 100.0),  # there before the first label
    ((0.5, 0.6, 0.7), 0.71, None),
    ((0.5, 0.7, 0.6), 0.6, 200.0),  # reached twice: the first counts
    ((0.5, 0.4, 0.6), 0.5, 100.0)])
def test_counts_that_reach_a_target_by_hand(golds, target, wanted):
    assert study.find_count((100, 400, 1600), golds, target) == (
        wanted if wanted is None else pytest.approx(wanted))


def test_counts_that_reach_a_target_by_search():
    rng = np.random.default_rng(1)
    for _ in range(20):
        counts, golds = np.sort(rng.uniform(50, 3000, 5)), rng.uniform(0, 1, 5)
        target = rng.uniform(0, 1)
        grid = np.linspace(np.log(counts[0]), np.log(counts[-1]), 200_001)
        reached = np.interp(grid, np.log(counts), golds) >= target
        wanted = np.exp(grid[reached.argmax()]) if reached.any() else None
        found = study.find_count(counts, golds, target)
        assert found == (wanted if wanted is None else pytest.approx(wanted, rel=1e-4))


def make_rows(seeds=(0, 1)) -> list[dict]:
    """Demonstrations add .1 per fourfold number from 300, clean ones .2; rankings by hand."""
    gold = {("ppo", 400): 0.65, ("ppo", 1600): 0.9, ("best_of_n", 400): 0.5,
            ("sft_on_best", 1600): 0.7}
    made = []
    for condition, seed in product(study.CONDITIONS, seeds):
        method, labels, clean = condition.values()
        count = 300 + labels * (method == "demonstrations")
        value = gold.get((method, labels)) if method in study.RANKED else (
            0.6 + (0.2 if clean else 0.1) * np.log(count / 300) / np.log(4))
        if value is not None:
            row = {"seed": seed, "demonstrations": count, "gold_sampled": value + seed / 10 - 0.05}
            greedy = {} if method == "best_of_n" else {"gold_greedy": value + 0.1}
            made.append(condition | row | greedy)
    return made


def test_prices_by_hand():
    prices = {(x["method"], x["labels"], x["clean"]): (x["needed"], x["ratio"])
              for x in study.find_price_ratios(make_rows())}
    assert len(prices) == 8
    # half a step of the curve: 300 * 4**.5 = 600 in all, 300 more; a clean quarter: 300 * 4**.25
    assert prices["ppo", 400, False] == pytest.approx((300, 300 / 400))
    assert prices["ppo", 400, True] == pytest.approx((124.264, 124.264 / 400), rel=1e-5)
    assert prices["sft_on_best", 1600, False] == pytest.approx((900, 900 / 1600))
    assert prices["ppo", 1600, False] == prices["ppo", 1600, True] == (None, None)
    assert prices["best_of_n", 400, False] == prices["best_of_n", 400, True] == (0, 0)
    greedy = study.find_price_ratios(make_rows(), "gold_greedy")
    assert {x["method"] for x in greedy} == {"ppo", "sft_on_best"}
    assert greedy[0]["ratio"] == pytest.approx(300 / 400)


# ---------------------------------------------------------------- rows and figure

def test_rows_are_complete_and_finite(lab, rows):
    town = len(lab.run.demonstrations("train", lab.tokenizer, SMOKE.sft))
    rm = {"rm_gold", "rm_labelers"}
    judged = {f"{name}_{mode}" for mode in ("sampled", "greedy") for name in (
        "gold", "helpful", "truthful", "harmless", "kl", "response_tokens", "gain", "win")}
    best = {f"{name}_sampled" for name in (
        "gold", "helpful", "truthful", "harmless", "gain", "win")}
    for method, row in rows.items():
        columns = {"demonstrations", "rankings"} | (best if method == "best_of_n" else judged)
        assert set(row) == columns | (set() if method == "demonstrations" else rm)
        assert all(np.isfinite(x) and isinstance(x, int | float) for x in row.values())
        written = 12 * (method == "demonstrations")
        assert (row["demonstrations"], row["rankings"]) == (town + written, 12 - written)
    different = {(row["gold_sampled"], row.get("kl_sampled")) for row in rows.values()}
    assert len(different) == len(METHODS)


def test_the_figure_shows_means_over_seeds_and_leaves_out_what_is_not_there():
    figure = study.draw(make_rows())
    assert isinstance(figure, Figure)
    left, right = ({line.get_label(): line for line in axes.get_lines()} for axes in figure.axes)
    assert left["demonstrations"].get_xdata() == pytest.approx([100, 400, 1600])
    assert left["rankings, PPO"].get_ydata() == pytest.approx([0.65, 0.9])
    assert left["no further label"].get_ydata() == pytest.approx([0.6, 0.6])
    assert right["rankings, SFT on the best"].get_ydata() == pytest.approx([0.8])
    assert "rankings, best of 16" in left and "rankings, best of 16" not in right


def test_a_price_moves_the_rankings_along_the_axis_and_nothing_else():
    left, _ = ({line.get_label(): line for line in axes.get_lines()}
               for axes in study.draw(make_rows(), price=0.25).axes)
    assert left["demonstrations"].get_xdata() == pytest.approx([100, 400, 1600])
    assert left["rankings, PPO"].get_xdata() == pytest.approx([100, 400])
    assert left["rankings, PPO"].get_ydata() == pytest.approx([0.65, 0.9])
