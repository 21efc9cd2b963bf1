"""The four networks against plain transformers, one unpadded sequence at a time."""

from __future__ import annotations

import copy
import functools
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_policy
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import EXACT, FORWARD, FP32, FP64
from toys import (
    CONFIGS,
    EOS,
    PAD,
    Ids,
    V,
    configured,
    make_batch,
    make_pairs,
    make_reward_model,
    same_weights,
)
from transformers import GPT2Config, GPT2LMHeadModel

from rlhf_mini.data import TokenBatch, collate, pack_rankings
from rlhf_mini.loading import load_policy, save_model
from rlhf_mini.models import (
    RewardModel,
    ValueModel,
    compute_logits,
    compute_position_ids,
    compute_response_logits,
    compute_response_logprobs,
    compute_token_logprobs,
    freeze,
    run_layers,
    set_residual_dropout,
)

PAIRS = make_pairs(6, seed=1)


@functools.cache
def shared_networks():
    """The networks for hypothesis, which does not take fixtures of one test."""
    policy = make_policy(Ids(range(V)))
    reward_model = make_reward_model(policy)
    return policy, reward_model, ValueModel.from_reward_model(reward_model)


@pytest.fixture
def networks(policy):
    reward_model = make_reward_model(policy)
    return policy, reward_model, ValueModel.from_reward_model(reward_model)


def run(networks, batch: TokenBatch) -> list[torch.Tensor]:
    """Log-probs and values, 0 off the mask, and scores of a batch."""
    policy, reward_model, value_model = networks
    with torch.no_grad():
        logprobs, _ = compute_response_logprobs(policy, batch)
        return [logprobs, value_model(batch), reward_model(batch.input_ids, batch.attention_mask)]


# ---------------------------------------------------------------- against plain transformers

@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_entropy_equal_transformers_one_unpadded_sequence_at_a_time(
        policy, temperature):
    batch = collate(PAIRS, PAD)
    with torch.no_grad():
        logprobs, entropy = compute_response_logprobs(policy, batch, temperature)
        for b, (prompt, response) in enumerate(PAIRS):
            logits = policy(torch.tensor([prompt + response])).logits[0].double() / temperature
            table = logits.log_softmax(-1)
            for t, token in enumerate(response):
                row = table[len(prompt) + t - 1]
                assert logprobs[b, t].item() == pytest.approx(row[token].item(), abs=2e-5)
                assert entropy[b, t].item() == pytest.approx(-(row.exp() * row).sum().item(),
                                                             abs=2e-5)


def test_response_logits_predict_the_response_tokens(policy):
    batch = collate(PAIRS, PAD)
    with torch.no_grad():
        logits = compute_response_logits(policy, batch, temperature=2.0)
        plain = torch.cat([policy(torch.tensor([prompt + response])).logits[0, len(prompt) - 1:-1]
                           for prompt, response in PAIRS])
    assert logits.shape == (sum(len(response) for _, response in PAIRS), V)
    np.testing.assert_allclose(logits, plain / 2, **FORWARD)


# ---------------------------------------------------------------- GPT-2's layers, written out

def random_ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """(B, L) tokens."""
    return torch.randint(2, V, (rows, length), generator=torch.Generator().manual_seed(seed))


COLUMNS = torch.tensor([[0, 5, 6], [19, 19, 3], [7, 8, 9], [18, 0, 19]])  # in any order, or twice


@pytest.mark.parametrize("name", CONFIGS)
def test_layers_equal_transformers(name):
    model, ids, at = configured(name).double(), random_ids(4, 20), torch.arange(20)[None]
    with torch.no_grad():
        theirs = model.transformer(ids).last_hidden_state
        torch.testing.assert_close(run_layers(model, ids, at), theirs, **FP64)
        read = run_layers(model, ids, at, read=COLUMNS)
    for row, columns in enumerate(COLUMNS.tolist()):
        torch.testing.assert_close(read[row], theirs[row, columns], **FP64)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("read", [None, COLUMNS])
def test_gradients_of_the_layers_equal_those_of_transformers(name, read):
    model, ids = configured(name).double(), random_ids(4, 20)
    rows = torch.arange(4)[:, None]
    weights = torch.randn(4, 20 if read is None else 3, 32, dtype=torch.float64,
                          generator=torch.Generator().manual_seed(1))
    states = model.transformer(ids).last_hidden_state
    gradients = []
    for x in (run_layers(model, ids, torch.arange(20)[None], read=read),
              states if read is None else states[rows, read]):
        gradients.append(torch.autograd.grad((x * weights).sum(),
                                             list(model.transformer.parameters())))
    for ours, theirs in zip(*gradients, strict=True):
        assert theirs.any()
        torch.testing.assert_close(ours, theirs, **FP64)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("read", [None, COLUMNS])
def test_layers_with_a_mask_of_their_own_equal_transformers(name, read):
    model, ids = configured(name).double(), random_ids(4, 20)
    rng = torch.Generator().manual_seed(2)
    visible = torch.rand(4, 20, 20, generator=rng) < 0.5  # not even causal
    visible |= torch.eye(20, dtype=torch.bool)
    positions = torch.randint(64, (4, 20), generator=rng)
    with torch.no_grad():
        ours = run_layers(model, ids, positions, visible, read)
        theirs = model.transformer(ids, attention_mask=visible[:, None], position_ids=positions,
                                   use_cache=False).last_hidden_state
    if read is not None:
        theirs = theirs[torch.arange(4)[:, None], read]
    torch.testing.assert_close(ours, theirs, **FP64)


def test_a_state_that_is_read_sees_nothing_behind_it(policy):
    ids, read = random_ids(4, 20), torch.tensor([[3, 9]] * 4)
    other = torch.where(torch.arange(20) <= 9, ids, random_ids(4, 20, seed=1))
    with torch.no_grad():
        one, same = (run_layers(policy, x, torch.arange(20)[None], read=read) for x in (ids, other))
        ids[:, 4] = 7  # behind the first of the two only
        moved = run_layers(policy, ids, torch.arange(20)[None], read=read)
    torch.testing.assert_close(one, same, **EXACT)
    torch.testing.assert_close(one[:, 0], moved[:, 0], **EXACT)
    assert not torch.isclose(one[:, 1], moved[:, 1]).all(-1).any()


@pytest.mark.parametrize("together", [1, 4, 7, 100])
def test_rows_come_back_in_their_order_however_many_run_together(networks, monkeypatch, together):
    pairs = make_pairs(30, seed=5)
    batch = collate(pairs, PAD)
    monkeypatch.setattr("rlhf_mini.models.ROWS_TOGETHER", {"cpu": together})
    logprobs, values, scores = run(networks, batch)
    for b, pair in enumerate(pairs):
        alone = run(networks, collate([pair], PAD))
        for x, single in zip((logprobs, values), alone, strict=False):
            np.testing.assert_allclose(x[b, :len(pair[1])], single[0], **FORWARD)
        np.testing.assert_allclose(scores[b], alone[2][0], **FORWARD)


# ---------------------------------------------------------------- logits in parts

HIDDEN = torch.randn(50, 32, generator=torch.Generator().manual_seed(3))
NEXT = random_ids(1, 50)[0]


def token_logprobs(policy, entropy=True):
    """Log-probs, entropies, and the gradients of a weighted sum: of the states and the head."""
    hidden = HIDDEN.clone().requires_grad_()
    logprobs, entropies = compute_token_logprobs(policy, hidden, NEXT, 0.7, entropy)
    gradients = torch.autograd.grad((logprobs * torch.arange(50)).mean(),
                                    [hidden, policy.lm_head.weight])
    return [logprobs, entropies, *gradients]


@pytest.mark.parametrize("rows", [1, 7, 10, 25, 49])
def test_logits_in_parts_change_neither_values_nor_gradients(policy, monkeypatch, rows):
    whole = token_logprobs(policy)
    monkeypatch.setattr("rlhf_mini.models.LOGITS_TOGETHER", rows * V + V - 1)
    for ours, expected in zip(token_logprobs(policy), whole, strict=True):
        torch.testing.assert_close(ours, expected, **FP32)
    table = (HIDDEN.double() @ policy.lm_head.weight.detach().double().T / 0.7).log_softmax(-1)
    np.testing.assert_allclose(whole[0].detach(), table[range(50), NEXT], **FP32)
    np.testing.assert_allclose(whole[1], -(table.exp() * table).sum(-1), **FP32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("multiple, rows", [(7, 322), (V + 3, V + 3), (64, V)])
def test_rows_of_zeros_in_the_output_layer_change_nothing(
        policy, monkeypatch, multiple, rows, dtype):
    def compute(shape):
        hidden = HIDDEN.view(*shape, -1).clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = compute_logits(policy, hidden)
        assert logits.shape == (*shape, V) and logits.dtype == torch.float32
        loss = (logits.log_softmax(-1)[..., 0] * torch.arange(50).view(shape)).mean()
        return logits, *torch.autograd.grad(loss, [hidden, policy.lm_head.weight])

    padded: list[tuple] = []
    for shape in [(50,), (5, 10)]:
        plain = compute(shape)
        padded.clear()
        with monkeypatch.context() as patch:
            patch.setattr("rlhf_mini.models.ROUND", {"cpu": multiple})
            patch.setattr("rlhf_mini.models.F.pad", lambda x, by, pad=F.pad: (
                padded.append((x.dtype, x.shape[0] + by[-1])), pad(x, by))[1])
            ours = compute(shape)
        assert padded == ([(dtype, rows)] if rows > V else [])
        for one, other in zip(ours, plain, strict=True):
            torch.testing.assert_close(one, other, **FP32)


@pytest.mark.parametrize("budget, parts", [(7 * V, 8), (25 * V, 2), (50 * V, 1), (1, 50)])
def test_no_more_logits_than_the_budget_are_made_or_kept(policy, monkeypatch, budget, parts):
    monkeypatch.setattr("rlhf_mini.models.LOGITS_TOGETHER", budget)
    made, kept = [], []
    policy.lm_head.register_forward_hook(lambda module, args, logits: made.append(logits.numel()))

    def keep(x):
        kept.append(x.numel())
        return x

    hidden = HIDDEN.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        logprobs, entropies = compute_token_logprobs(policy, hidden, NEXT, entropy=True)
    assert len(made) == parts and sum(made) == 50 * V
    assert max(made) <= max(budget, V)  # at least one row
    weights = policy.lm_head.weight.numel()
    # one part is kept for the backward pass; of several, none
    assert (sum(size for size in kept if size != weights) >= 50 * V) == (parts == 1)
    logprobs.sum().backward()
    assert sum(made) == (50 * V if parts == 1 else 100 * V)  # made again
    assert max(made) <= max(budget, V)
    assert logprobs.requires_grad and not entropies.requires_grad


@pytest.mark.parametrize("budget", [2**25, 9 * V])
def test_entropies_are_computed_only_if_wanted(policy, monkeypatch, budget):
    monkeypatch.setattr("rlhf_mini.models.LOGITS_TOGETHER", budget)
    batch = collate(PAIRS, PAD)
    wanted, entropies = compute_response_logprobs(policy, batch)
    assert entropies.shape == wanted.shape and not entropies.requires_grad
    monkeypatch.setattr("rlhf_mini.models.compute_entropy", lambda logits: pytest.fail("computed"))
    logprobs, nothing = compute_response_logprobs(policy, batch, entropy=False)
    assert nothing is None
    torch.testing.assert_close(logprobs, wanted, **EXACT)


# ---------------------------------------------------------------- the number per token

def plain_scores(model, ids: list[int]) -> torch.Tensor:
    """The number per token that transformers' own forward gives."""
    with torch.no_grad():
        return model.model(torch.tensor([ids])).logits[0, :, 0]


def test_reward_model_reads_the_last_real_token(networks):
    batch = collate(PAIRS, PAD)
    scores = run(networks, batch)[2]
    for b, (prompt, response) in enumerate(PAIRS):
        expected = plain_scores(networks[1], prompt + response)[-1].item()
        assert scores[b].item() == pytest.approx(expected, abs=2e-5)


def test_value_model_reads_the_state_before_each_token(networks):
    batch = collate(PAIRS, PAD)
    with torch.no_grad():
        values = networks[2](batch)
    for b, (prompt, response) in enumerate(PAIRS):
        expected = plain_scores(networks[2], prompt + response)
        for t in range(len(response)):
            assert values[b, t].item() == pytest.approx(
                expected[len(prompt) + t - 1].item(), abs=2e-5)
    assert values[batch.response_mask].all() and not values[~batch.response_mask].any()


def test_value_model_from_a_reward_model_says_what_the_reward_model_says(networks):
    _, reward_model, value_model = networks
    batch = collate(PAIRS, PAD)
    with torch.no_grad():
        values = value_model(batch)
        for b, (prompt, response) in enumerate(PAIRS):
            ids = torch.tensor([prompt + response[:-1]])  # the state before the last token
            score = reward_model(ids, torch.ones_like(ids).bool())
            assert values[b, len(response) - 1].item() == pytest.approx(score.item(), abs=2e-5)


def test_value_model_is_a_copy_that_trains(networks):
    _, reward_model, value_model = networks
    before = copy.deepcopy(reward_model)
    assert all(p.requires_grad for p in value_model.parameters())
    with torch.no_grad():
        for p in value_model.parameters():
            p.add_(1)
    assert same_weights(before, reward_model)


def test_value_model_from_a_frozen_reward_model_trains(networks):
    value_model = ValueModel.from_reward_model(freeze(networks[1]))
    assert all(p.requires_grad for p in value_model.parameters())


# ---------------------------------------------------------------- padding

def test_position_ids_count_real_tokens():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 0]]).bool()
    positions = compute_position_ids(mask)
    assert positions[0, 2:].tolist() == positions[2, 1:4].tolist() == [0, 1, 2]
    assert positions[1].tolist() == [0, 1, 2, 3, 4]
    assert positions.min() == 0 and positions[2, 4] == 2  # padding gets positions that exist


@pytest.mark.parametrize("extra", [1, 4, 11])
def test_the_amount_of_left_padding_changes_nothing(networks, extra):
    batch = collate(PAIRS, PAD)
    pad = torch.nn.functional.pad
    wide = TokenBatch(pad(batch.prompt_ids, (extra, 0), value=PAD),
                      pad(batch.prompt_mask, (extra, 0), value=False),
                      batch.response_ids, batch.response_mask)
    for narrow, padded in zip(run(networks, batch), run(networks, wide), strict=True):
        np.testing.assert_allclose(padded, narrow, **FORWARD)


@settings(max_examples=10)
@given(st.integers(0, 1000))
def test_garbage_in_padding_changes_nothing(seed):
    networks = shared_networks()
    batch, rng = make_batch(4, seed), torch.Generator().manual_seed(seed)

    def dirty(ids, mask):
        return torch.where(mask, ids, torch.randint(V, ids.shape, generator=rng))

    garbled = TokenBatch(dirty(batch.prompt_ids, batch.prompt_mask), batch.prompt_mask,
                         dirty(batch.response_ids, batch.response_mask), batch.response_mask)
    for clean, other in zip(run(networks, batch), run(networks, garbled), strict=True):
        torch.testing.assert_close(other, clean, **EXACT)


def test_padding_gets_no_gradient_from_the_padded_rows(policy):
    # Gradients of the padded batch equal the sum of those of the single rows.
    def gradients(batches):
        policy.zero_grad()
        for batch in batches:
            logprobs, _ = compute_response_logprobs(policy, batch)
            logprobs.sum().backward()
        return torch.cat([p.grad.flatten() for p in policy.parameters()])

    singles = gradients([collate([pair], PAD) for pair in PAIRS])
    # float32 sums over other shapes: relative to the largest gradient
    torch.testing.assert_close(gradients([collate(PAIRS, PAD)]), singles, rtol=1e-3,
                               atol=1e-5 * singles.abs().max().item())


def test_a_row_that_fills_the_context_may_be_padded(networks):
    # 60 + 4 and 50 + 10 tokens fill a context of 64, in a batch that is 70 wide.
    rng = random.Random(0)
    pairs = [([rng.randrange(2, V) for _ in range(p)], [rng.randrange(2, V) for _ in range(r)])
             for p, r in ((60, 4), (50, 10))]
    together = run(networks, collate(pairs, PAD))
    for b, pair in enumerate(pairs):
        single = run(networks, collate([pair], PAD))
        np.testing.assert_allclose(together[0][b, :len(pair[1])], single[0][0], **FORWARD)
        np.testing.assert_allclose(together[2][b], single[2][0], **FORWARD)


# ---------------------------------------------------------------- packed rankings

@settings(max_examples=15)
@given(st.integers(0, 1000))
def test_packed_scores_equal_forward_response_by_response(seed):
    _, reward_model, _ = shared_networks()
    rng, rankings = random.Random(seed), []
    for i in range(3):
        k = rng.randint(2, 9)
        responses = [r for _, r in make_pairs(k, seed + 7 * i, response=(1, 9))]
        rankings.append((make_pairs(1, seed + i)[0][0], responses, tuple(range(1, k + 1))))
    packed = pack_rankings(rankings, PAD)
    with torch.no_grad():
        scores = reward_model.packed_scores(packed)
    for b, (prompt, responses, _) in enumerate(rankings):
        assert packed.mask[b].sum() == len(responses)
        for j, response in enumerate(responses):
            expected = plain_scores(reward_model, prompt + response)[-1].item()
            assert scores[b, j].item() == pytest.approx(expected, abs=2e-5)


def test_packed_responses_do_not_see_each_other(networks):
    prompt, response = PAIRS[0]
    scores = []
    for first in ([5, 6, EOS], [7, 8, EOS]):
        packed = pack_rankings([(prompt, [first, response], (1, 2))], PAD)
        with torch.no_grad():
            scores.append(networks[1].packed_scores(packed)[0])
    assert scores[0][0] != scores[1][0]
    assert scores[0][1] == scores[1][1]


# ---------------------------------------------------------------- heads, dropout, copies

def test_reward_head_is_drawn_with_variance_one_over_d_plus_one():
    policy = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=8, n_embd=512, n_layer=1,
                                        n_head=1))
    model = make_reward_model(policy).model
    weights = model.classifier.weight.detach()
    assert weights.shape == (1, 512)
    # the standard error of an estimate from 512 draws is 1 / sqrt(1024) = 3 %
    assert weights.std().item() == pytest.approx(1 / math.sqrt(513), rel=0.12)
    assert abs(weights.mean().item()) < 4 / math.sqrt(513 * 512)
    assert not model.classifier.bias.any()
    assert not same_weights(make_reward_model(policy, 1), make_reward_model(policy, 2))
    assert same_weights(make_reward_model(policy, 1), make_reward_model(policy, 1))


def test_reward_model_takes_the_backbone_of_the_policy(policy):
    before = copy.deepcopy(policy)
    reward_model = make_reward_model(policy)
    assert same_weights(reward_model.model.transformer, policy.transformer)
    with torch.no_grad():
        for p in reward_model.parameters():
            p.add_(1)
    assert same_weights(before, policy)


def test_all_networks_run_without_dropout(tokenizer, tmp_path):
    config = make_policy(tokenizer).config
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.3
    save_model(GPT2LMHeadModel(config), tokenizer, tmp_path)
    policy, _ = load_policy(tmp_path)
    reward_model = make_reward_model(policy)
    save_model(reward_model, tokenizer, tmp_path / "rm")
    for networks in ((policy, reward_model, ValueModel.from_reward_model(reward_model)),
                     (freeze(copy.deepcopy(policy).train()), RewardModel.load(tmp_path / "rm"),
                      ValueModel.load(tmp_path / "rm"))):
        first, second = (run(networks, collate(PAIRS, PAD)) for _ in range(2))
        for a, b in zip(first, second, strict=True):
            torch.testing.assert_close(a, b, **EXACT)


def test_residual_dropout_acts_in_train_mode_only(policy):
    batch = collate(PAIRS, PAD)
    set_residual_dropout(policy, 0.5)
    with torch.no_grad():
        still = [compute_response_logprobs(policy, batch)[0] for _ in range(2)]
        policy.train()
        moving = [compute_response_logprobs(policy, batch)[0] for _ in range(2)]
    assert torch.equal(*still)
    assert not torch.equal(*moving)


def test_freeze_copies(policy):
    frozen = freeze(policy.train())
    assert not any(p.requires_grad for p in frozen.parameters()) and not frozen.training
    with torch.no_grad():
        policy.lm_head.weight.add_(1)
    assert not same_weights(frozen, policy)
