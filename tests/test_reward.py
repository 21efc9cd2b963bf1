"""Step 2b: the K-way loss by brute force over pairs, centring, learning, accuracy, calibration."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_policy
from hypothesis import given
from hypothesis import strategies as st
from tolerances import FP32, FP64
from toys import GARBAGE, PAD, make_reward_model, same_weights, stop_at

from rlhf_mini.config import RewardConfig
from rlhf_mini.data import Demonstration, Ranking, encode_pair, pack_rankings
from rlhf_mini.models import RewardModel
from rlhf_mini.reward import (
    center_reward_model,
    compare_pairs,
    compute_accuracy,
    compute_calibration,
    encode_rankings,
    reward_loss,
    score_rankings,
    train_reward_model,
)
from rlhf_mini.runtime import NonFiniteLoss


def draw(rows: int, k: int, seed: int = 0):
    """Random scores (float64), ranks with ties, and a mask, as `pack_rankings` pads them."""
    rng = np.random.default_rng(seed)
    scores = torch.tensor(rng.normal(size=(rows, k)))
    ranks, mask = torch.zeros(rows, k, dtype=torch.int64), torch.zeros(rows, k, dtype=torch.bool)
    for b in range(rows):
        size = rng.integers(2, k + 1)
        ranks[b, :size] = torch.tensor(rng.integers(1, 4, size))
        if ranks[b, :size].min() == ranks[b, :size].max():
            ranks[b, 0] = ranks[b, 1] + 1
        mask[b, :size] = True
    return scores, ranks, mask


def brute_force(scores, ranks, mask) -> tuple[float, float, float]:
    """Loss, accuracy and margin by a loop over itertools.combinations."""
    losses, chosen = [], []
    for b in range(len(scores)):
        terms = []
        exist = [j for j in range(scores.shape[1]) if mask[b, j]]
        for i, j in itertools.combinations(exist, 2):
            if ranks[b, i] == ranks[b, j]:
                continue
            w, loser = (i, j) if ranks[b, i] < ranks[b, j] else (j, i)
            margin = float(scores[b, w]) - float(scores[b, loser])
            terms.append(math.log1p(math.exp(-margin)))
            chosen.append(margin)
        losses.append(sum(terms) / len(terms))
    right = [1.0 if m > 0 else 0.5 if m == 0 else 0.0 for m in chosen]
    return float(np.mean(losses)), float(np.mean(right)), float(np.mean(chosen))


# ---------------------------------------------------------------- the loss

@given(st.integers(0, 10_000))
def test_loss_and_stats_equal_brute_force_over_pairs(seed):
    batch = draw(5, 9, seed)
    loss, stats = reward_loss(*batch)
    expected = brute_force(*batch)
    assert loss.item() == pytest.approx(expected[0], rel=1e-10)
    assert stats["loss"] == pytest.approx(expected[0], rel=1e-10)
    assert stats["accuracy"] == pytest.approx(expected[1], rel=1e-6)
    assert stats["margin"] == pytest.approx(expected[2], rel=1e-6, abs=1e-9)


def test_two_responses_give_the_pairwise_loss():
    scores = torch.tensor([[0.3, 1.1], [2.0, -0.5]], dtype=torch.float64)
    loss, _ = reward_loss(scores, torch.tensor([[1, 2], [1, 2]]), torch.ones(2, 2).bool())
    expected = [-math.log(1 / (1 + math.exp(-d))) for d in (0.3 - 1.1, 2.5)]
    assert loss.item() == pytest.approx(np.mean(expected), rel=1e-12)


def test_two_responses_give_the_loss_of_trl():
    trainer = pytest.importorskip("trl").RewardTrainer
    scores = torch.randn(6, 2)

    def model(**inputs):  # chosen first, then rejected, as trl's collator stacks them
        return SimpleNamespace(logits=torch.cat([scores[:, 0], scores[:, 1]])[:, None])

    model.training = False
    metrics = {"eval": {name: [] for name in ("min_reward", "mean_reward", "max_reward",
                                              "accuracy", "margin", "num_tokens")}}
    accelerator = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x)
    self = SimpleNamespace(model=model, accelerator=accelerator, _metrics=metrics,
                           _total_train_tokens=0,
                           args=SimpleNamespace(center_rewards_coefficient=None))
    theirs = trainer.compute_loss(self, model, {"input_ids": None})
    ours, stats = reward_loss(scores, torch.tensor([[1, 2]] * 6), torch.ones(6, 2).bool())
    torch.testing.assert_close(ours, theirs, **FP32)
    assert stats["accuracy"] == pytest.approx(metrics["eval"]["accuracy"][0])
    assert stats["margin"] == pytest.approx(metrics["eval"]["margin"][0], rel=1e-5)


def test_equal_scores_give_ln_2_whatever_k():
    for k in (2, 4, 9):
        loss, stats = reward_loss(torch.zeros(3, k), torch.arange(1, k + 1).expand(3, k),
                                  torch.ones(3, k).bool())
        assert loss.item() == pytest.approx(math.log(2), rel=1e-6)  # divided by C(K, 2) once
        assert stats["accuracy"] == 0.5


def test_a_prompt_with_nine_responses_weighs_as_much_as_one_with_four():
    one = draw(1, 9, 1)
    scores, ranks = one[0], torch.arange(1, 10)[None]
    nine, _ = reward_loss(scores, ranks, torch.ones(1, 9).bool())
    four, _ = reward_loss(scores, ranks, torch.arange(9)[None] < 4)
    both, _ = reward_loss(scores.expand(2, 9), ranks.expand(2, 9),
                          torch.stack([torch.ones(9).bool(), torch.arange(9) < 4]))
    assert both.item() == pytest.approx((nine.item() + four.item()) / 2, rel=1e-12)
    pooled = (36 * nine.item() + 6 * four.item()) / 42
    assert abs(both.item() - pooled) > 1e-3  # the control: a mean over all pairs differs


@given(st.integers(0, 1000), st.floats(-50, 50))
def test_a_shift_of_all_scores_of_a_prompt_changes_nothing(seed, shift):
    scores, ranks, mask = draw(4, 6, seed)
    moved = scores + shift * torch.arange(1, 5)[:, None]
    assert reward_loss(moved, ranks, mask)[0].item() == pytest.approx(
        reward_loss(scores, ranks, mask)[0].item(), rel=1e-9)


@given(st.integers(0, 1000), st.permutations(range(6)))
def test_the_order_of_the_responses_does_not_matter(seed, order):
    scores, ranks, mask = draw(4, 6, seed)
    order = list(order)
    shuffled = reward_loss(scores[:, order], ranks[:, order], mask[:, order])[0]
    assert shuffled.item() == pytest.approx(reward_loss(scores, ranks, mask)[0].item(), rel=1e-12)


def test_ties_are_dropped_from_sum_and_count():
    scores = torch.tensor([[1.0, 5.0, 0.0]], dtype=torch.float64, requires_grad=True)
    loss, stats = reward_loss(scores, torch.tensor([[1, 1, 2]]), torch.ones(1, 3).bool())
    expected = (math.log1p(math.exp(-1)) + math.log1p(math.exp(-5))) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert stats["accuracy"] == 1
    loss.backward()
    assert scores.grad[0].sum().item() == pytest.approx(0, abs=1e-12)


def test_the_gradient_raises_the_chosen_and_lowers_the_rejected():
    scores = torch.zeros(1, 2, requires_grad=True)
    reward_loss(scores, torch.tensor([[2, 1]]), torch.ones(1, 2).bool())[0].backward()
    assert scores.grad.tolist() == [[0.5, -0.5]]  # response 1 has rank 1: it must rise


def test_gradient_by_finite_differences():
    scores, ranks, mask = draw(3, 5, 2)
    assert torch.autograd.gradcheck(lambda s: reward_loss(s, ranks, mask)[0],
                                    scores.requires_grad_())


@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_off_the_mask_changes_neither_loss_nor_gradient(garbage):
    scores, ranks, mask = draw(4, 6, 3)
    results = []
    for filler in (0.0, garbage):
        x = torch.where(mask, scores, filler).requires_grad_()
        loss, stats = reward_loss(x, torch.where(mask, ranks, 1 if filler else 0), mask)
        loss.backward()
        results.append((loss.item(), stats, x.grad))
    assert results[0][:2] == results[1][:2]
    torch.testing.assert_close(results[1][2], results[0][2], **FP64)


def test_a_batch_element_without_untied_pair_is_named():
    with pytest.raises(ValueError, match="ranking 1 of the batch has no untied pair"):
        reward_loss(torch.zeros(2, 3), torch.tensor([[1, 2, 3], [2, 2, 2]]),
                    torch.ones(2, 3).bool())


def test_the_minimum_recovers_the_bradley_terry_gap():
    # Two responses, the first preferred in 80 % of the rankings: the gap tends to logit(0.8).
    gap = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    ranks = torch.tensor([[1, 2]] * 8 + [[2, 1]] * 2)
    optimizer = torch.optim.LBFGS([gap], lr=1, max_iter=100, tolerance_grad=1e-12,
                                  tolerance_change=1e-15)

    def closure():
        optimizer.zero_grad()
        scores = torch.stack([gap, torch.zeros_like(gap)], 1).expand(10, 2)
        loss, _ = reward_loss(scores, ranks, torch.ones(10, 2).bool())
        loss.backward()
        return loss

    optimizer.step(closure)
    assert gap.item() == pytest.approx(math.log(0.8 / 0.2), abs=1e-5)


# ---------------------------------------------------------------- training

CONFIG = RewardConfig(epochs=2, batch_size=8, lr=3e-3, max_prompt_tokens=40,
                      max_response_tokens=40, checkpoint_every=3)


def synthetic(count: int, seed: int, split: str = "train") -> list[Ranking]:
    """Responses of good and bad words in any order; more good words rank higher."""
    rng, rankings = random.Random(seed), []
    while len(rankings) < count:
        goods = [rng.randint(0, 4) for _ in range(rng.randint(3, 5))]
        if len(set(goods)) == 1:
            continue
        texts = []
        for good in goods:
            words = ["warm"] * good + ["cold"] * (4 - good)
            rng.shuffle(words)
            texts.append(" ".join(words))
        order = sorted(set(goods), reverse=True)
        rankings.append(Ranking(f"{split}{len(rankings)}", f"Bread {rng.randint(0, 9)}?",
                                tuple(texts), tuple(order.index(g) + 1 for g in goods)))
    return rankings


TRAIN, VALID = synthetic(40, 0), synthetic(20, 1, "valid")


def train(tokenizer, directory=None, config=CONFIG, seed=0, rankings=TRAIN):
    reward_model = make_reward_model(make_policy(tokenizer, seed), seed)
    history = train_reward_model(reward_model, tokenizer, rankings, VALID, config, seed, directory)
    return reward_model, history


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_reward_model_learns_the_preference(tokenizer, seed):
    config = dataclasses.replace(CONFIG, epochs=8)
    reward_model, history = train(tokenizer, config=config, seed=seed)
    scores = score_rankings(reward_model, encode_rankings(tokenizer, VALID, CONFIG), PAD)
    margins, _, _ = compare_pairs([s.numpy() for s in scores],
                                  [-np.array(r.ranks) for r in VALID])
    assert compute_accuracy(margins) > 0.9
    assert history[-1]["valid_loss"] < 0.45 < math.log(2)


def test_packed_training_loss_equals_one_forward_per_response(tokenizer):
    reward_model = make_reward_model(make_policy(tokenizer))
    encoded = encode_rankings(tokenizer, TRAIN[:6], CONFIG)
    packed = pack_rankings(encoded, PAD)
    loss, _ = reward_loss(reward_model.packed_scores(packed), packed.ranks, packed.mask)
    losses = []
    for prompt, responses, ranks in encoded:
        scores = []
        for response in responses:
            ids = torch.tensor([prompt + response])
            scores.append(reward_model(ids, torch.ones_like(ids).bool()))
        scores = torch.stack(scores, 1)
        losses.append(reward_loss(scores, torch.tensor([ranks]),
                                  torch.ones_like(scores).bool())[0])
    expected = torch.stack(losses).mean()
    torch.testing.assert_close(loss, expected, **FP32)
    head = reward_model.model.classifier.weight
    backbone = reward_model.model.transformer.h[0].mlp.c_fc.weight
    for one, other in zip(torch.autograd.grad(loss, [head, backbone]),
                          torch.autograd.grad(expected, [head, backbone]), strict=True):
        # float32, summed in another order: relative to the largest entry
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * other.abs().max().item())


def test_validation_loss_is_the_mean_over_prompts(tokenizer):
    reward_model, history = train(tokenizer)
    scores = score_rankings(reward_model, encode_rankings(tokenizer, VALID, CONFIG), PAD)
    losses = [brute_force(s[None], torch.tensor([r.ranks]), torch.ones(1, len(s)).bool())[0]
              for s, r in zip(scores, VALID, strict=True)]
    assert history[-1]["valid_loss"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_scores_come_one_row_per_ranking(tokenizer):
    many = synthetic(40, 5)  # more than one batch
    reward_model = make_reward_model(make_policy(tokenizer))
    encoded = encode_rankings(tokenizer, many, CONFIG)
    scores = score_rankings(reward_model, encoded, PAD)
    assert [len(s) for s in scores] == [len(r.responses) for r in many]
    alone = [score_rankings(reward_model, [e], PAD)[0] for e in encoded]
    for one, other in zip(scores, alone, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("stop", [2, 4, 9])
def test_a_stopped_training_resumes_bit_for_bit(tokenizer, tmp_path, monkeypatch, stop):
    unbroken, history = train(tokenizer, tmp_path / "unbroken")
    stop_at(monkeypatch, stop)
    with pytest.raises(KeyboardInterrupt):
        train(tokenizer, tmp_path / "broken")
    resumed, again = train(tokenizer, tmp_path / "broken")
    assert same_weights(resumed, unbroken)
    assert [r.items() for r in again] == [r.items() for r in history]


def test_errors_of_the_data(tokenizer):
    with pytest.raises(ValueError, match="there are no training rankings"):
        train(tokenizer, rankings=[])
    long = Ranking("r9", "Bread?", ("warm " * 60, "cold"), (1, 2))
    with pytest.raises(ValueError, match=r"r9: responses\[0\] has .* tokens, at most 40 fit"):
        train(tokenizer, rankings=[long])


def test_a_non_finite_loss_stops_with_the_step(tokenizer, monkeypatch):
    def poisoned(scores, ranks, mask):
        loss, stats = reward_loss(scores, ranks, mask)
        return loss * math.nan, stats

    monkeypatch.setattr("rlhf_mini.reward.reward_loss", poisoned)
    with pytest.raises(NonFiniteLoss, match="step 0, batch of rankings: loss is nan"):
        train(tokenizer)


# ---------------------------------------------------------------- centring

def test_a_last_step_that_spoils_the_weights_is_not_taken_for_success(tokenizer):
    config = dataclasses.replace(CONFIG, epochs=1, batch_size=len(TRAIN), lr=1e30)
    with pytest.raises(NonFiniteLoss, match="step 0, validation rankings: loss is nan"):
        train(tokenizer, config=config)


def test_centring_makes_demonstrations_score_zero_and_keeps_every_difference(tokenizer, tmp_path):
    reward_model = make_reward_model(make_policy(tokenizer))
    demonstrations = [Demonstration(f"d{i}", f"Bread {i}?", "warm " * (1 + i % 4))
                      for i in range(70)]  # two batches

    def scores():
        with torch.no_grad():
            return torch.cat([
                reward_model(ids, torch.ones_like(ids).bool())
                for ids in (torch.tensor([sum(encode_pair(tokenizer, d.prompt, d.response, 40, 40,
                                                          d.id), [])]) for d in demonstrations)])

    before = scores()
    mean = center_reward_model(reward_model, tokenizer, demonstrations, CONFIG)
    assert mean == pytest.approx(before.mean().item(), rel=1e-5)
    assert abs(before.mean().item()) > 0.1
    assert abs(scores().mean().item()) < 1e-5
    np.testing.assert_allclose(scores() - scores()[0], before - before[0], rtol=1e-4, atol=2e-5)
    reward_model.model.save_pretrained(tmp_path)  # the zero is part of the saved model
    assert same_weights(RewardModel.load(tmp_path), reward_model)


# ---------------------------------------------------------------- accuracy and calibration

@given(st.integers(0, 1000))
def test_pairs_equal_a_double_loop(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(2, 6, 4)
    scores = [rng.normal(size=k).round(1) for k in sizes]
    targets = [rng.integers(0, 3, k).astype(float) for k in sizes]
    expected = [(s[i] - s[j], t[i] - t[j], n)
                for n, (s, t) in enumerate(zip(scores, targets, strict=True))
                for i in range(len(s)) for j in range(len(s)) if t[i] > t[j]]
    margins, gaps, prompts = compare_pairs(scores, targets)
    assert sorted(zip(margins.tolist(), gaps.tolist(), prompts.tolist(), strict=True)) == sorted(
        expected)
    if expected:
        right = [1.0 if m > 0 else 0.5 if m == 0 else 0.0 for m, _, _ in expected]
        assert compute_accuracy(margins) == pytest.approx(np.mean(right))


def test_accuracy_of_nothing_is_nan():
    assert math.isnan(compute_accuracy(np.zeros(0)))
    assert [len(x) for x in compare_pairs([], [])] == [0, 0, 0]


def test_calibration_equals_counting_by_hand():
    margins = np.array([0.1, -0.1, 3.0, 3.0, -3.0, 0.0])
    rows = compute_calibration(margins, bins=2)  # bins [0.5, 0.75) and [0.75, 1]
    low = [1 / (1 + math.exp(-m)) for m in (0.1, 0.1, 0.0)]
    assert [row["pairs"] for row in rows] == [3, 3]
    assert rows[0]["predicted"] == pytest.approx(np.mean(low))
    assert rows[0]["observed"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert rows[1]["predicted"] == pytest.approx(1 / (1 + math.exp(-3)))
    assert rows[1]["observed"] == pytest.approx(2 / 3)


def test_a_calibrated_model_is_on_the_diagonal():
    rng = np.random.default_rng(0)
    gaps = rng.normal(0, 1.5, 60_000)
    margins = np.where(rng.random(60_000) < 1 / (1 + np.exp(-gaps)), gaps, -gaps)
    rows = compute_calibration(margins)
    assert sum(row["pairs"] for row in rows) == 60_000 and len(rows) == 10
    for row in rows:  # four standard errors
        error = 4 * math.sqrt(row["predicted"] * (1 - row["predicted"]) / row["pairs"])
        assert row["observed"] == pytest.approx(row["predicted"], abs=error)


def test_extreme_margins_fall_into_the_last_bin():
    [row] = compute_calibration(np.array([800.0, 1e9]))
    assert row == {"predicted": 1.0, "observed": 1.0, "pairs": 2}
