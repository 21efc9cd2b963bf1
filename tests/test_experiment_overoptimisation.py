"""The study of over-optimisation: best-of-n without bias, the fitted law, and one small run."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch
from matplotlib.figure import Figure

from rlhf_mini.config import load_preset
from rlhf_mini.data import encode_prompt
from rlhf_mini.experiments import overoptimisation as study
from rlhf_mini.loading import load_policy

SMOKE = load_preset("smoke")


# ---------------------------------------------------------------- best of n

@pytest.mark.parametrize("n", range(1, 7))
def test_best_of_n_is_the_mean_over_all_subsets(n):
    scores = np.array([[0.3, -1.0, 2.0, 0.5, 7.0, 0.1],
                       [1.0, 2.0, 2.0, 0.0, 2.0, 1.0],  # ties: each of the equal may win
                       [5.0, 5.0, 5.0, 5.0, 5.0, 5.0]])
    values = np.array([[0.9, 0.1, 0.4, 0.8, 0.2, 0.6]] * 3)
    wanted = []
    for score, value in zip(scores, values, strict=True):
        subsets = [list(x) for x in combinations(range(6), n)]
        wanted.append(np.mean([value[x][score[x] == score[x].max()].mean() for x in subsets]))
    assert study.best_of_n(scores, values, n) == pytest.approx(wanted, rel=1e-12)


def test_best_of_n_from_a_pool_agrees_with_fresh_samples():
    rng = np.random.default_rng(0)
    scores = rng.uniform(size=(4000, 8))  # the best of n uniform numbers is n / (n + 1) on average
    for n in (2, 4):
        found = study.best_of_n(scores, scores, n)
        assert found.mean() == pytest.approx(n / (n + 1), abs=4 * found.std() / 4000**0.5)


@pytest.mark.parametrize("n", study.SIZES)
def test_kl_of_best_of_n_is_the_integral(n):
    # a sample at quantile u is the best of n with density n u^(n-1), against 1 for the sampler
    wanted, _ = scipy.integrate.quad(
        lambda u: n * u**(n - 1) * (math.log(n) + (n - 1) * math.log(u)), 0, 1)
    assert study.best_of_n_kl(n) == pytest.approx(wanted, abs=1e-7)


# ---------------------------------------------------------------- the law

@pytest.mark.parametrize("method, shape", [("best-of-n", lambda d: d), ("ppo", np.log)])
def test_fit_recovers_the_curve_and_its_peak(method, shape):
    start, a, b = 0.6, 0.31, 0.08
    d = np.linspace(0.05, 3, 30)
    kl, gold = np.append(0.0, d**2), np.append(start, start + d * (a - b * shape(d)))
    found = study.fit_curve(kl, gold, method)
    assert [found[x] for x in ("start", "a", "b")] == pytest.approx([start, a, b], rel=1e-9)
    grid = np.linspace(0.01, 40, 400_000)
    top = grid[np.argmax(grid * (a - b * shape(grid)))]
    assert found["peak"] == pytest.approx(top, abs=1e-3)


def test_a_curve_that_only_rises_has_no_peak_and_one_that_falls_peaks_at_the_start():
    d = np.linspace(0, 2, 9)
    for method in ("best-of-n", "ppo"):
        bend = d * d if method == "best-of-n" else d * np.log(np.where(d > 0, d, 1))
        assert study.fit_curve(d**2, 0.2 * d + 0.1 * bend, method)["peak"] == math.inf
    assert study.fit_curve(d**2, -0.2 * d - 0.1 * d * d, "best-of-n")["peak"] == 0


def test_a_kl_estimated_below_zero_counts_as_zero():
    assert study.distance([-0.01, 0.0, 4.0]).tolist() == [0, 0, 2]


def test_fits_are_summarised_over_seeds():
    slopes, condition = [0.2, 0.3, 0.35], study.STUDY.conditions[0]
    d = np.linspace(0, 2, 7)
    rows = [condition | {"seed": seed, "method": "best-of-n", "kl": float(x * x),
                         "gold": float(0.5 + x * (a - 0.1 * x))}
            for seed, a in enumerate(slopes) for x in d]
    other = [row | {"method": "ppo", "gold": 0.0} for row in rows]
    found = study.summarise_fits(rows + other, condition, "best-of-n")
    wanted = scipy.stats.ttest_1samp(slopes, 0).confidence_interval(0.95)
    assert (found["a"]["low"], found["a"]["high"]) == pytest.approx(wanted)
    assert found["b"]["mean"] == pytest.approx(0.1) and found["peak"] == pytest.approx(1.5)


# ---------------------------------------------------------------- scores

def test_three_reward_models_give_their_mean_or_their_lowest_score():
    scores = torch.tensor([[1.0, 5.0], [3.0, -1.0], [2.0, 2.0]])
    members = [lambda ids, mask, row=row: row for row in scores]

    class Batch:
        input_ids = attention_mask = None

    assert study.join_scores(members, "mean of 3")([], [], Batch).tolist() == [2.0, 2.0]
    assert study.join_scores(members, "worst of 3")([], [], Batch).tolist() == [1.0, -1.0]
    assert study.join_scores(members[:1], "one")([], [], Batch).tolist() == [1.0, 5.0]


def test_pool_scores_are_those_of_single_sequences(lab):
    reward_model = lab.load_reward_model(lab.train_reward_model(lab.collect("train", 12)))
    pool = study.sample_pool(lab)
    pool = {name: x[:3] for name, x in pool.items()}
    pool["tokens"] = [[*row[:5], row[0]] for row in pool["tokens"]]  # an equal one at the end
    pool["finished"] = [[True, False, True, True, True, True]] * 3
    scores = study.score_pool(lab, pool, study.join_scores([reward_model], "one"))
    for i, row in enumerate(pool["tokens"]):
        assert scores[i, 0] == scores[i, 5]
        assert scores[i, 1] == SMOKE.ppo.missing_eos_score
        for j in (0, 2, 3, 4):
            ids = torch.tensor([encode_prompt(lab.tokenizer, pool["prompts"][i]) + row[j]])
            with torch.no_grad():
                alone = reward_model(ids, torch.ones_like(ids).bool()).item()
            assert scores[i, j] == pytest.approx(alone, abs=1e-5)


def test_the_pool_is_sampled_once_and_graded_by_the_town(lab):
    pool = study.sample_pool(lab)
    assert pool == study.sample_pool(lab) and len(list(lab.folder.glob("pool-*"))) == 1
    prompts = lab.run.prompts("test", lab.tokenizer)[:study.PROMPTS]
    assert pool["prompts"] == [p.prompt for p in prompts]
    assert {len(row) for row in pool["tokens"] + pool["finished"] + pool["gold"]} == {64}
    assert study.sample_pool(replace(lab, seed=1))["tokens"] != pool["tokens"]


# ---------------------------------------------------------------- one run

def test_a_small_reward_model_reads_what_the_first_layers_write(lab):
    assert study.keep_layers(lab, 1.0) == lab.policy
    whole, short = (load_policy(study.keep_layers(lab, depth), "cpu")[0] for depth in (1.0, 0.25))
    assert len(whole.transformer.h) == SMOKE.pretrain.layers > len(short.transformer.h) == 1
    ids = torch.arange(8)[None]
    with torch.no_grad():
        inside = whole.transformer(ids, output_hidden_states=True).hidden_states[1]
        torch.testing.assert_close(short.transformer(ids).last_hidden_state,
                                   whole.transformer.ln_f(inside))
    rankings = lab.collect("train", 12)
    reward = lab.train_reward_model(rankings, start=study.keep_layers(lab, 0.25))
    assert reward != lab.train_reward_model(rankings)
    assert sum(".attn.c_attn.weight" in name for name in
               lab.load_reward_model(reward).state_dict()) == 1


def test_a_penalty_keeps_ppo_nearer_and_leaves_best_of_n_out(lab):
    free, held = (study.measure(lab, study.FEW | {"share": 1.0, "kl_coef": x}) for x in (0.0, 50.0))
    assert {row["method"] for row in free} == {"ppo", "best-of-n"}
    assert {row["method"] for row in held} == {"ppo"}
    far = [[row["kl"] for row in rows if row["method"] == "ppo"][-1] for rows in (free, held)]
    assert far[1] < far[0]



def test_rows_of_a_run_are_whole_and_can_be_drawn(lab):
    condition = study.FEW | {"share": 1.0, "judge": "worst of 3"}
    rows = study.measure(lab, condition)
    assert len(list(lab.folder.glob("reward-*"))) >= 3
    columns = {"method", "n", "iteration", "kl", "score", "gold", "prompts"}
    assert all(set(row) == columns for row in rows)
    assert all(np.isfinite(x) for row in rows for x in row.values() if not isinstance(x, str))
    best = [row for row in rows if row["method"] == "best-of-n"]
    ppo = [row for row in rows if row["method"] == "ppo"]
    assert [row["n"] for row in best] == list(study.SIZES) and len(best) + len(ppo) == len(rows)
    assert [row["iteration"] for row in ppo] == list(range(study.LONGER * SMOKE.ppo.iterations))
    assert all(np.diff([row["score"] for row in best]) >= 0)  # the best of more scores more
    gold = np.array(study.sample_pool(lab)["gold"])
    assert best[0]["kl"] == 0 and best[0]["gold"] == pytest.approx(gold.mean())
    assert ppo[0]["kl"] == pytest.approx(0, abs=1e-5)
    seeds = [{"seed": seed} | study.FEW | {"share": share} | row | {"gold": row["gold"] + seed}
             for seed in (0, 1) for share in (0.125, 1.0) for row in rows]
    figure = study.draw(seeds)
    assert isinstance(figure, Figure) and len(figure.axes[0].lines) == 2
    # the mean over seeds of gold, and its first point, stand in the panel of best-of-n
    assert figure.axes[2].lines[0].get_ydata()[0] == pytest.approx(best[0]["gold"] + 0.5)
    few = study.draw(seeds, [study.FEW]).axes[3].lines
    assert [line.get_label() for line in few] == [figure.axes[3].lines[0].get_label()]
