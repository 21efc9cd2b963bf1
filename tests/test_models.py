"""The four networks against plain transformers, one unpadded sequence at a time."""

from __future__ import annotations

import copy
import functools
import json
import math
import random

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import make_policy
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tolerances import EXACT, FORWARD
from toys import EOS, PAD, V, make_batch, make_pairs, make_reward_model, same_weights
from transformers import (
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from rlhf_mini.data import TokenBatch, collate, pack_rankings
from rlhf_mini.models import (
    RewardModel,
    ValueModel,
    compute_position_ids,
    compute_response_logits,
    compute_response_logprobs,
    freeze,
    load_policy,
    load_tokenizer,
    save_model,
    set_residual_dropout,
)

PAIRS = make_pairs(6, seed=1)


class Ids(list):
    """All that `make_policy` needs of a tokenizer: its length and the special ids."""

    eos_token_id, pad_token_id = EOS, PAD


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
    """Log-probs, values (0 off the mask) and scores of a batch."""
    policy, reward_model, value_model = networks
    with torch.no_grad():
        logprobs, _ = compute_response_logprobs(policy, batch)
        return [torch.where(batch.response_mask, logprobs, 0),
                torch.where(batch.response_mask, value_model(batch), 0),
                reward_model(batch.input_ids, batch.attention_mask)]


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
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()
    positions = compute_position_ids(mask)
    assert positions[0, 2:].tolist() == [0, 1, 2]
    assert positions[1].tolist() == [0, 1, 2, 3, 4]


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
            torch.where(batch.response_mask, logprobs, 0).sum().backward()
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


# ---------------------------------------------------------------- files

def test_saved_models_are_plain_transformers_directories(networks, tokenizer, tmp_path):
    policy, reward_model, value_model = networks
    classes = AutoModelForCausalLM, *[AutoModelForTokenClassification] * 2
    names = "policy", "reward", "value"
    ids = torch.tensor([PAIRS[0][0]])
    for name, model, auto_class in zip(names, networks, classes, strict=True):
        save_model(model, tokenizer, tmp_path / name)
        inner = getattr(model, "model", model)
        loaded = auto_class.from_pretrained(tmp_path / name)
        with torch.no_grad():
            torch.testing.assert_close(loaded(ids).logits, inner(ids).logits, **EXACT)
        assert AutoTokenizer.from_pretrained(tmp_path / name).get_vocab() == tokenizer.get_vocab()
        assert not [p for p in (tmp_path / name).iterdir() if p.suffix in (".bin", ".pt", ".pkl")]
    loaded, loaded_tokenizer = load_policy(tmp_path / "policy")
    assert not loaded.training and loaded_tokenizer.pad_token_id == PAD
    assert same_weights(loaded, policy)
    assert same_weights(RewardModel.load(tmp_path / "reward"), reward_model)
    assert same_weights(ValueModel.load(tmp_path / "value"), value_model)


def test_pad_equal_to_eos_is_refused(tokenizer, tmp_path):
    bad = copy.deepcopy(tokenizer)
    bad.pad_token = bad.eos_token
    save_model(make_policy(tokenizer), bad, tmp_path)
    with pytest.raises(ValueError, match=r"pad_token and eos_token are both '<\|endoftext\|>' "
                                         r"\(id 0\).*never learn to stop"):
        load_policy(tmp_path)


def test_a_tokenizer_without_eos_is_refused(tokenizer, tmp_path):
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no EOS token; set eos_token"):
        load_tokenizer(tmp_path)


def test_gpt2_tokenizer_gets_a_pad_token_and_the_model_an_embedding(tmp_path):
    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bpe = Tokenizer(models.BPE(vocab=alphabet | {"<|endoftext|>": 256}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    gpt2 = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>")
    assert gpt2.pad_token_id is None
    model = make_policy(gpt2)
    save_model(model, gpt2, tmp_path)
    policy, tokenizer = load_policy(tmp_path)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (256, 257, 258)
    assert tokenizer.padding_side == "left"
    ids = torch.tensor([gpt2.encode("Any text.")])
    with torch.no_grad():
        logits = policy(ids).logits
        torch.testing.assert_close(logits[..., :257], model(ids).logits, **EXACT)
    assert logits.shape[-1] == 258
    save_model(policy, tokenizer, tmp_path / "again")  # and it stays so
    assert same_weights(load_policy(tmp_path / "again")[0], policy)


def test_another_architecture_is_refused(tokenizer, tmp_path):
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the model is of type 'llama'.*GPT-2 style"):
        load_policy(tmp_path)
    with pytest.raises(ValueError, match="the model is of type 'llama'"):
        RewardModel.load(tmp_path)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere: no model could be read there"):
        load_policy(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="nowhere: no tokenizer could be read there"):
        load_tokenizer(tmp_path / "nowhere")


@pytest.mark.parametrize("rows", [200, 1000])
def test_a_tokenizer_of_another_model_is_refused(tokenizer, tmp_path, rows):
    other = make_policy(Ids(range(rows)))
    save_model(other, tokenizer, tmp_path)
    with pytest.raises(ValueError, match=f"tokenizer has 320 tokens and the model's embedding "
                                         f"{rows} rows: they were not made for each other"):
        load_policy(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "zeros", "empty"])
def test_damaged_weights_are_named(policy, tokenizer, tmp_path, damage):
    save_model(policy, tokenizer, tmp_path)
    file = tmp_path / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes({"cut": data[:len(data) // 2], "zeros": bytes(100) + data[100:],
                      "empty": b""}[damage])
    with pytest.raises(ValueError, match="the weights could not be read; the file is damaged"):
        load_policy(tmp_path)


@pytest.mark.parametrize("change", ["missing", "reshaped"])
def test_a_checkpoint_without_all_tensors_is_refused(networks, tokenizer, tmp_path, change):
    policy, reward_model, _ = networks
    for model, load in ((policy, load_policy), (reward_model, RewardModel.load)):
        save_model(model, tokenizer, tmp_path)
        tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
        name = next(n for n in tensors if n.endswith("h.1.mlp.c_fc.weight"))
        if change == "missing":
            del tensors[name]
        else:
            tensors[name] = tensors[name][:4].clone()
        safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match="lacks 1 of the model's tensors or has them in another"
                                             " shape than config.json says, first .*h.1.mlp.c_fc"):
            load(tmp_path)


def test_pickled_weights_are_not_read(policy, tokenizer, tmp_path):
    save_model(policy, tokenizer, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(policy.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="the weights could not be read; no format but "
                                         "model.safetensors is .*no file named model.safetensors"):
        load_policy(tmp_path)


@pytest.mark.parametrize("place", ["empty", "file", "none", "./none", "a/b/none"])
def test_what_is_no_model_says_what_would_be_one(tmp_path, place, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    path = tmp_path / place if place == "none" else place
    with pytest.raises(ValueError) as error:
        load_policy(path)
    assert str(error.value) == (
        f"{path}: no model could be read there; give a folder with config.json, model.safetensors "
        "and the tokenizer, or a model's name on the hub")


def test_a_name_that_may_be_of_the_hub_is_looked_up_and_both_are_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no-such-model: no model could be read on the hub, and "
                                         "there is no such folder"):
        load_policy("no-such-model")


def test_a_model_without_its_tokenizer_is_named(policy, tmp_path):
    policy.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tokenizer has no tokens of text; its files, such as "
                                         "tokenizer.json, are missing there|no tokenizer could be"):
        load_policy(tmp_path)


def test_remote_code_is_not_run(policy, tokenizer, tmp_path):
    save_model(policy, tokenizer, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.Config",
                                                  "AutoModelForCausalLM": "code.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text("raise SystemExit('remote code was run')\n")
    with pytest.raises(ValueError, match="no model could be read there"):
        load_policy(tmp_path)
