"""DPO: its loss by hand, its gradient at the reference, its optimum in closed form, the loop."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from conftest import make_policy
from tolerances import EXACT, FP64
from toys import GARBAGE, same_weights

from rlhf_mini.config import RewardConfig
from rlhf_mini.data import DataError, Ranking, encode_pair, pack_rankings
from rlhf_mini.dpo import compute_ref_logprobs, dpo_loss, sum_logprobs, train_dpo
from rlhf_mini.models import freeze
from rlhf_mini.reward import encode_rankings
from rlhf_mini.runtime import NonFiniteLoss

# ---------------------------------------------------------------- the loss


def test_two_responses_give_the_formula_of_the_paper():
    rng = np.random.default_rng(0)
    policy, ref = rng.normal(-20, 5, size=(2, 6, 2))  # the first response is the chosen one
    beta, losses = 0.3, []
    for p, r in zip(policy, ref, strict=True):
        margin = beta * (p[0] - r[0]) - beta * (p[1] - r[1])
        losses.append(math.log(1 + math.exp(-margin)))
    loss, stats = dpo_loss(torch.tensor(policy), torch.tensor(ref), torch.tensor([[1, 2]] * 6),
                           torch.ones(6, 2).bool(), beta)
    assert loss.item() == pytest.approx(np.mean(losses), rel=1e-12)
    difference = policy - ref
    margins = beta * (difference[:, 0] - difference[:, 1])
    assert stats["margin"] == pytest.approx(margins.mean())
    assert stats["accuracy"] == pytest.approx((margins > 0).mean())
    assert stats["log_ratio"] == pytest.approx(difference.mean())
    assert stats["log_ratio_best"] == pytest.approx(difference[:, 0].mean())


def test_k_responses_give_the_mean_over_pairs_then_prompts_and_ties_are_dropped():
    rng = np.random.default_rng(1)
    policy, ref = rng.normal(-20, 5, size=(2, 2, 4))
    ranks = [[2, 1, 2, 3], [1, 2]]  # four responses of which two tie, and two
    beta, per_prompt = 0.2, []
    for p, r, order in zip(policy, ref, ranks, strict=True):
        rewards = [beta * (p[i] - r[i]) for i in range(len(order))]
        pairs = [(w, x) for w, x in itertools.permutations(range(len(order)), 2)
                 if order[w] < order[x]]
        assert len(pairs) == {4: 5, 2: 1}[len(order)]  # six less the tied one
        per_prompt.append(np.mean([math.log(1 + math.exp(rewards[x] - rewards[w]))
                                   for w, x in pairs]))
    loss, _ = dpo_loss(torch.tensor(policy), torch.tensor(ref),
                       torch.tensor([ranks[0], [1, 2, 0, 0]]),
                       torch.tensor([[True] * 4, [True, True, False, False]]), beta)
    assert loss.item() == pytest.approx(np.mean(per_prompt), rel=1e-12)


def test_only_tied_responses_are_an_error():
    with pytest.raises(ValueError, match="no untied pair"):
        dpo_loss(torch.zeros(1, 3), torch.zeros(1, 3), torch.ones(1, 3).long(),
                 torch.ones(1, 3).bool(), 0.1)


@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_where_there_is_no_response_changes_nothing(garbage):
    mask = torch.tensor([[True, True, False]])
    results = []
    for filling in (0.0, garbage):
        logprobs = torch.tensor([[-3.0, -4.0, filling]], requires_grad=True)
        ref = torch.tensor([[-3.5, -3.0, filling]])
        loss, stats = dpo_loss(logprobs, ref, torch.tensor([[1, 2, 0]]), mask, 0.5)
        loss.backward()
        results.append((loss.detach(), logprobs.grad, stats))
    torch.testing.assert_close(results[1], results[0], **EXACT)


def test_the_gradient_at_the_reference_pulls_the_two_apart_equally():
    # loss = -log sigma(beta u), u = 0 at the reference: d loss / du = -beta sigma(0) = -beta / 2,
    # and u = (logit_w - logit_l) - constants, as the normaliser of the softmax cancels
    logits = torch.tensor([0.3, -1.0, 2.0, 0.5], dtype=torch.float64, requires_grad=True)
    ref = logits.detach().log_softmax(0)
    loss, _ = dpo_loss(logits.log_softmax(0)[[2, 1]][None], ref[[2, 1]][None],
                       torch.tensor([[1, 2]]), torch.ones(1, 2).bool(), 0.4)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2), rel=1e-12)
    np.testing.assert_allclose(logits.grad, [0, 0.2, -0.2, 0], **FP64)


# ---------------------------------------------------------------- the optimum

REF = np.array([0.5, 0.1, 0.3, 0.1])
WORTH = np.array([1.0, 4.0, 2.0, 8.0])  # exp(reward) of the only four responses


def minimise(rankings: list[tuple[tuple[int, ...], float]], beta: float) -> np.ndarray:
    """Minimise the expected loss of a tabular policy; rankings (best first) with probabilities."""
    logits = torch.tensor(np.log(REF), requires_grad=True)
    ref = torch.tensor(np.log(REF))
    order = torch.tensor([r for r, _ in rankings])
    ranks, mask = torch.arange(1, order.shape[1] + 1)[None], torch.ones(1, order.shape[1]).bool()
    optimizer = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-12,
                                  tolerance_change=0, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        logprobs = logits.log_softmax(0)
        loss = sum(p * dpo_loss(logprobs[o][None], ref[o][None], ranks, mask, beta)[0]
                   for o, (_, p) in zip(order, rankings, strict=True))
        loss.backward()
        return loss

    optimizer.step(closure)
    return logits.detach().softmax(0).numpy()


def plackett_luce(k: int) -> list[tuple[tuple[int, ...], float]]:
    """All rankings of all k of the four responses, with their probabilities."""
    rankings = []
    for subset in itertools.combinations(range(4), k):
        for order in itertools.permutations(subset):
            p = 1.0
            for place in range(k):
                p *= WORTH[order[place]] / sum(WORTH[i] for i in order[place:])
            rankings.append((order, p / math.comb(4, k)))
    assert sum(p for _, p in rankings) == pytest.approx(1)
    return rankings


@pytest.mark.parametrize("k", [2, 3, 4])
@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_the_optimum_is_that_of_the_kl_regularised_objective(k, beta):
    # Labels drawn from the Plackett-Luce model of a reward r give pairs of Bradley and Terry; then
    # DPO's optimum is ref * exp(r / beta) / Z, the policy that PPO would seek with the true r.
    optimum = REF * WORTH ** (1 / beta)
    np.testing.assert_allclose(minimise(plackett_luce(k), beta), optimum / optimum.sum(),
                               rtol=1e-5)
    assert abs(optimum / optimum.sum() - REF).max() > 0.1  # not where it began


# ---------------------------------------------------------------- real models

WORDS = ["warm", "cold", "river", "bread", "mill", "town"]
CONFIG = RewardConfig(epochs=2, batch_size=4, lr=2e-3, max_prompt_tokens=30,
                      max_response_tokens=24)


def rankings(count: int, seed: int = 0) -> list[Ranking]:
    """Rankings of two to four responses, in which more words "warm" are better."""
    rng, made = np.random.default_rng(seed), []
    while len(made) < count:
        texts = tuple(" ".join(rng.choice(WORDS, size=rng.integers(2, 5)))
                      for _ in range(rng.integers(2, 5)))
        warmth = [text.split().count("warm") for text in texts]
        ranks = tuple(1 + len({w for w in warmth if w > own}) for own in warmth)
        if max(ranks) > 1:
            made.append(Ranking(f"r{len(made)}", f"Question {len(made)}?", texts, ranks))
    return made


def test_sums_are_those_of_single_unpadded_forwards(tokenizer, policy):
    data = rankings(5)
    data[0] = dataclasses.replace(data[0], responses=("warm mill",) * 3, ranks=(1, 2, 3))
    encoded = encode_rankings(tokenizer, data, CONFIG)
    batch = pack_rankings(encoded, tokenizer.pad_token_id)
    sums, mask = sum_logprobs(policy, batch), batch.mask
    assert len(set(mask.sum(1).tolist())) > 1 and sums[~mask].eq(0).all()
    for b, r in enumerate(data):
        for k, text in enumerate(r.responses):
            prompt, response = encode_pair(tokenizer, r.prompt, text, 30, 24, "")
            with torch.no_grad():
                table = policy(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
            wanted = sum(table[len(prompt) + t - 1, token].item()
                         for t, token in enumerate(response))
            assert sums[b, k].item() == pytest.approx(wanted, abs=2e-4)
    reference = compute_ref_logprobs(policy, encoded, tokenizer.pad_token_id)
    assert not reference[0].requires_grad
    for b, row in enumerate(reference):
        torch.testing.assert_close(row, sums[b][mask[b]].detach(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_policy_learns_the_labelers_order_and_begins_at_ln_2(tokenizer, seed):
    policy, train, test = make_policy(tokenizer, seed), rankings(60, seed), rankings(40, seed + 9)
    ref = freeze(policy)
    config = dataclasses.replace(CONFIG, epochs=4)
    history = train_dpo(policy, tokenizer, train, config, 0.3, seed)
    assert history[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert history[0]["log_ratio"] == pytest.approx(0, abs=1e-4)
    assert len(history) == 4 * 15 and [row["step"] for row in history] == list(range(60))
    batch = pack_rankings(encode_rankings(tokenizer, test, CONFIG), tokenizer.pad_token_id)
    with torch.no_grad():
        ours, theirs = (sum_logprobs(m, batch) for m in (policy, ref))
    _, stats = dpo_loss(ours, theirs, batch.ranks, batch.mask, 0.3)
    assert stats["accuracy"] > 0.75 and stats["margin"] > 0.2


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_three_labels_against_one_move_the_log_ratio_by_ln_3_over_beta(tokenizer, beta):
    # the loss is smallest where sigma(beta u) is the share of labels, 3/4
    policy, labels = make_policy(tokenizer), [(1, 2), (1, 2), (2, 1), (1, 2)]
    data = [Ranking(f"r{i}", "Which?", ("warm bread", "cold river"), x)
            for i, x in enumerate(labels)]
    encoded = encode_rankings(tokenizer, data[:1], CONFIG)
    before, = compute_ref_logprobs(policy, encoded, tokenizer.pad_token_id)
    config = dataclasses.replace(CONFIG, epochs=150, weight_decay=0.0)
    train_dpo(policy, tokenizer, data, config, beta, 0)
    after, = compute_ref_logprobs(policy, encoded, tokenizer.pad_token_id)
    moved = after - before
    assert (moved[0] - moved[1]).item() == pytest.approx(math.log(3) / beta, rel=0.01)


def test_training_is_deterministic_and_the_seed_matters(tokenizer):
    policies = []
    for seed in (0, 0, 1):
        policies.append(make_policy(tokenizer))
        train_dpo(policies[-1], tokenizer, rankings(12), CONFIG, 0.1, seed)
    assert same_weights(policies[0], policies[1])
    assert not same_weights(policies[0], policies[2])


def test_dropout_stays_off(tokenizer):
    policies = [make_policy(tokenizer) for _ in range(2)]
    for block in policies[1].transformer.h:
        block.attn.resid_dropout.p = block.mlp.dropout.p = 0.9
    policies[1].train()
    for policy in policies:
        train_dpo(policy, tokenizer, rankings(8), CONFIG, 0.1, 0)
    assert same_weights(*policies)


def test_what_cannot_be_trained_on_is_an_error(tokenizer, policy):
    with pytest.raises(ValueError, match="beta = 0"):
        train_dpo(policy, tokenizer, rankings(4), CONFIG, 0, 0)
    with pytest.raises(ValueError, match="no rankings"):
        train_dpo(policy, tokenizer, [], CONFIG, 0.1, 0)
    long = dataclasses.replace(rankings(1)[0], responses=("river " * 40, "warm"), ranks=(2, 1))
    with pytest.raises(DataError, match="at most 24 fit"):
        train_dpo(policy, tokenizer, [long], CONFIG, 0.1, 0)
    broken = make_policy(tokenizer)
    broken.transformer.ln_f.weight.data[0] = float("nan")
    with pytest.raises(NonFiniteLoss, match="step 0"):
        train_dpo(broken, tokenizer, rankings(4), CONFIG, 0.1, 0)
