"""Step 1: the loss by hand, the choice of the epoch, the EOS gate, resume, learning."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from conftest import make_policy
from tolerances import FORWARD, FP32, FP64
from toys import EOS, PAD, make_pairs, make_talker, same_weights, stop_at

from rlhf_mini.config import SFTConfig
from rlhf_mini.data import Demonstration, collate, encode_pair
from rlhf_mini.models import compute_response_logprobs
from rlhf_mini.runtime import NonFiniteLoss, read_metrics
from rlhf_mini.sft import compute_eos_rate, compute_sft_loss, sft_loss, train_sft

ANIMALS = ("cat", "dog", "cow", "hen", "fox", "owl")


def demonstrations(count: int, first: int = 0) -> list[Demonstration]:
    return [Demonstration(f"d{i}", f"{ANIMALS[i % 6]} {i}?", f"A {ANIMALS[i % 6]}.")
            for i in range(first, first + count)]


TRAIN, VALID = demonstrations(24), demonstrations(6, 24)
CONFIG = SFTConfig(epochs=3, batch_size=8, lr=3e-3, dropout=0.2, max_prompt_tokens=40,
                   max_response_tokens=12, min_eos_rate=0.0, checkpoint_every=2)


def train(tokenizer, directory=None, config=CONFIG, seed=0):
    policy = make_policy(tokenizer, seed)
    return policy, train_sft(policy, tokenizer, TRAIN, VALID, config, seed, directory)


# ---------------------------------------------------------------- the loss

def test_loss_is_minus_the_mean_over_response_tokens_eos_included():
    logprobs = torch.tensor([[-1.0, -2.0, -9.0], [-4.0, -7.0, -100.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    loss, stats = sft_loss(logprobs, mask)
    assert loss.item() == pytest.approx((1 + 2 + 9 + 4) / 4, rel=1e-12)
    assert stats == {"loss": loss.item()}


def plain_nll(policy, pairs) -> list[list[float]]:
    """-log p of every response token, each pair alone and unpadded, through transformers."""
    losses = []
    with torch.no_grad():
        for prompt, response in pairs:
            table = policy(torch.tensor([prompt + response])).logits[0].double().log_softmax(-1)
            losses.append([-table[len(prompt) + t - 1, token].item()
                           for t, token in enumerate(response)])
    return losses


def test_loss_of_a_padded_batch_is_the_token_weighted_mean_of_the_single_ones(policy):
    pairs = make_pairs(7, seed=4)
    batch = collate(pairs, PAD)
    with torch.no_grad():
        loss, _ = sft_loss(compute_response_logprobs(policy, batch)[0], batch.response_mask)
    losses = plain_nll(policy, pairs)
    tokens = sum(len(row) for row in losses)
    assert loss.item() == pytest.approx(sum(map(sum, losses)) / tokens, rel=1e-5)
    # the control: a mean of the means of the rows is another number
    assert abs(np.mean([np.mean(row) for row in losses]) - loss.item()) > 1e-3


def test_loss_over_many_pairs_is_the_mean_over_all_their_tokens(policy):
    pairs = make_pairs(70, seed=5)  # two batches of different size
    losses = plain_nll(policy, pairs)
    expected = sum(map(sum, losses)) / sum(map(len, losses))
    assert compute_sft_loss(policy, pairs, PAD) == pytest.approx(expected, rel=1e-5)


def test_only_the_logits_before_response_tokens_get_a_gradient(policy):
    states = []  # all that logits are made of
    policy.lm_head.register_forward_pre_hook(lambda module, args: states.append(args[0]))
    pairs = make_pairs(4, seed=6)
    batch = collate(pairs, PAD)
    logprobs, _ = compute_response_logprobs(policy, batch)
    loss, _ = sft_loss(logprobs, batch.response_mask)
    gradients = torch.autograd.grad(loss, states)
    learning = torch.cat([x[gradient.abs().sum(-1) > 0]
                          for x, gradient in zip(states, gradients, strict=True)])
    wanted = torch.cat([
        policy.transformer(torch.tensor([prompt + response])).last_hidden_state[
            0, len(prompt) - 1:-1] for prompt, response in pairs])
    torch.testing.assert_close(learning, wanted, **FORWARD)


def test_prompt_tokens_are_context_and_not_targets(policy):
    # With prompt tokens among the targets, an unlikely prompt would raise the loss by its own NLL.
    [(prompt, response)] = make_pairs(1, seed=7)
    whole = policy(torch.tensor([prompt + response]))
    table = whole.logits[0].double().log_softmax(-1)
    rows = range(len(prompt) + len(response) - 1)
    targets = (prompt + response)[1:]
    everything = -np.mean([table[t, targets[t]].item() for t in rows])
    ours = compute_sft_loss(policy, [(prompt, response)], PAD)
    assert ours == pytest.approx(np.mean(plain_nll(policy, [(prompt, response)])), rel=1e-5)
    assert abs(everything - ours) > 1e-3


def test_eos_is_in_the_loss(policy, tokenizer):
    prompt, response = encode_pair(tokenizer, "cat?", "A cat.", 40, 12, "d")
    assert response[-1] == EOS
    with_eos = compute_sft_loss(policy, [(prompt, response)], PAD)
    losses = plain_nll(policy, [(prompt, response)])[0]
    assert with_eos == pytest.approx(np.mean(losses), rel=1e-5)
    assert abs(np.mean(losses[:-1]) - with_eos) > 1e-3


def test_gradient_of_the_loss_by_finite_differences():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: sft_loss(x, mask)[0], x)
    sft_loss(x, mask)[0].backward()
    np.testing.assert_allclose(x.grad, -mask.double() / 3, **FP64)


# ---------------------------------------------------------------- the loop

def test_the_policy_returned_is_the_one_with_the_lowest_validation_loss(tokenizer):
    # Answers that the training set contradicts: their loss falls at first, then rises.
    valid = [Demonstration(f"v{i}", f"cat {i}?", "An old dog!") for i in range(6)]
    config = dataclasses.replace(CONFIG, epochs=12, lr=1e-2)
    policy = make_policy(tokenizer)
    history = train_sft(policy, tokenizer, TRAIN, valid, config, 0)
    losses = [row["valid_loss"] for row in history if "valid_loss" in row]
    assert len(losses) == 12
    pairs = [encode_pair(tokenizer, d.prompt, d.response, 40, 12, d.id) for d in valid]
    final = compute_sft_loss(policy, pairs, PAD)
    assert final == pytest.approx(min(losses), rel=1e-6)
    assert min(losses) < losses[-1]  # the control: the last epoch was not the best


def test_every_demonstration_is_seen_once_per_epoch(tokenizer, monkeypatch):
    seen = []
    monkeypatch.setattr("rlhf_mini.sft.collate", lambda pairs, pad_id:
                        (seen.append([tuple(r) for _, r in pairs]), collate(pairs, pad_id))[1])
    config = dataclasses.replace(CONFIG, batch_size=10)
    train(tokenizer, config=config)
    sizes = [len(rows) for rows in seen]
    assert sorted(sizes[:3]) == [4, 10, 10] and sizes[3] == 6  # three steps, then validation
    epochs = [sum(seen[i:i + 3], []) for i in (0, 4, 8)]
    wanted = sorted(tuple(encode_pair(tokenizer, d.prompt, d.response, 40, 12, d.id)[1])
                    for d in TRAIN)
    assert all(sorted(epoch) == wanted for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_dropout_is_on_in_steps_only(tokenizer, monkeypatch):
    modes = []

    def spy(policy, batch, **kwargs):
        drop = policy.transformer.h[0].mlp.dropout
        modes.append((torch.is_grad_enabled(), drop.training, drop.p))
        return compute_response_logprobs(policy, batch, **kwargs)

    monkeypatch.setattr("rlhf_mini.sft.compute_response_logprobs", spy)
    policy, _ = train(tokenizer)
    assert set(modes) == {(True, True, 0.2), (False, False, 0.2)}
    assert not policy.training and policy.transformer.h[0].mlp.dropout.p == 0


def test_too_few_eos_stop_before_ppo(tokenizer, tmp_path):
    config = dataclasses.replace(CONFIG, epochs=1, lr=1e-6, min_eos_rate=0.9)
    with pytest.raises(ValueError, match="after SFT 0% of the responses end with EOS, fewer than "
                                         "min_eos_rate = 90%"):
        train(tokenizer, tmp_path, config)
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["eos_rate"] == 0


def test_eos_rate_is_the_share_of_responses_that_end(tokenizer):
    prompts = ["Who?"] * 400
    for bias, low, high in ((50.0, 1, 1), (-50.0, 0, 0)):
        talker = make_talker(tokenizer, eos_bias=bias)
        assert low <= compute_eos_rate(talker, tokenizer, prompts, 5, seed=0) <= high
    talker = make_talker(tokenizer, eos_bias=4.0)
    with torch.no_grad():  # one token only: the rate is the mean probability of EOS
        ids = torch.tensor([tokenizer.encode("User: Who?\nAssistant:")])
        p = talker(ids).logits[0, -1].softmax(-1)[EOS].item()
    rate = compute_eos_rate(talker, tokenizer, prompts, 1, seed=0)
    assert rate == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / 400))


@pytest.mark.parametrize("train_set, valid_set, counts", [([], VALID, "0 and 6"),
                                                          (TRAIN, [], "24 and 0")])
def test_missing_data_is_named(policy, tokenizer, train_set, valid_set, counts):
    with pytest.raises(ValueError, match=f"training and validation demonstrations; there are "
                                         f"{counts}"):
        train_sft(policy, tokenizer, train_set, valid_set, CONFIG, 0)


def test_a_demonstration_that_does_not_fit_is_named(policy, tokenizer):
    long = Demonstration("d99", "cat?", "word " * 50)
    with pytest.raises(ValueError, match="d99: response has .* tokens, at most 12 fit"):
        train_sft(policy, tokenizer, [*TRAIN, long], VALID, CONFIG, 0)


@pytest.mark.parametrize("stop", [1, 5, 8])
def test_a_stopped_training_resumes_bit_for_bit(tokenizer, tmp_path, monkeypatch, stop):
    unbroken, history = train(tokenizer, tmp_path / "unbroken")
    stop_at(monkeypatch, stop)
    with pytest.raises(KeyboardInterrupt):
        train(tokenizer, tmp_path / "broken")
    torch.rand(7)  # the new process has its own global generator, dropout must not notice
    resumed, again = train(tokenizer, tmp_path / "broken")
    assert same_weights(resumed, unbroken)
    assert again == history


def test_training_is_deterministic(tokenizer):
    one, history = train(tokenizer)
    two, again = train(tokenizer)
    assert same_weights(one, two) and history == again


def test_a_non_finite_loss_stops_with_the_step(tokenizer, monkeypatch, tmp_path):
    calls = []

    def poisoned(logprobs, mask):
        calls.append(1)
        loss, stats = sft_loss(logprobs, mask)
        return (loss * math.nan, stats) if len(calls) == 4 else (loss, stats)

    monkeypatch.setattr("rlhf_mini.sft.sft_loss", poisoned)
    with pytest.raises(NonFiniteLoss, match="step 2, SFT batch: loss is nan"):
        train(tokenizer, tmp_path, dataclasses.replace(CONFIG, batch_size=12))
    assert (tmp_path / "checkpoint/checkpoint.json").exists()


def test_a_last_step_that_spoils_the_weights_is_not_taken_for_success(tokenizer):
    # One step in all: only the validation loss can tell. The start policy must not pass for it.
    config = dataclasses.replace(CONFIG, epochs=1, batch_size=len(TRAIN), lr=1e30)
    with pytest.raises(NonFiniteLoss, match="step 0, validation demonstrations: loss is nan.* Try "
                                            "a lower learning rate"):
        train(tokenizer, config=config)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_policy_learns_the_demonstrations(tokenizer, seed):
    config = dataclasses.replace(CONFIG, epochs=25, lr=1e-2, dropout=0.0, min_eos_rate=0.8)
    policy, history = train(tokenizer, config=config, seed=seed)  # the EOS gate is passed
    losses = [row["valid_loss"] for row in history if "valid_loss" in row]
    assert history[0]["loss"] > 5
    assert min(losses) < 1
    batch = collate([encode_pair(tokenizer, d.prompt, d.response, 40, 12, d.id) for d in VALID],
                    PAD)
    with torch.no_grad():
        logprobs, _ = compute_response_logprobs(policy, batch)
    ends = logprobs[batch.response_ids == EOS].exp()
    assert ends.mean() > 0.8


def test_loss_in_float32_equals_float64():
    logprobs = -torch.rand(5, 7, dtype=torch.float64)
    mask = torch.rand(5, 7) > 0.4
    torch.testing.assert_close(sft_loss(logprobs.float(), mask)[0].double(),
                               sft_loss(logprobs, mask)[0], **FP32)
