"""Loading and saving against plain transformers, and every kind of folder that is no model."""

from __future__ import annotations

import copy
import json

import pytest
import safetensors.torch
import torch
from conftest import make_policy
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tolerances import FORWARD
from toys import PAD, Ids, make_reward_model, same_weights
from transformers import (
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    AutoTokenizer,
    GPT2LMHeadModel,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from rlhf_mini.loading import load_policy, load_tokenizer, save_model
from rlhf_mini.models import RewardModel, ValueModel

IDS = torch.tensor([[5, 9, 200, 17, 33, 2, 71]])


@pytest.fixture
def networks(policy):
    reward_model = make_reward_model(policy)
    return policy, reward_model, ValueModel.from_reward_model(reward_model)


def test_saved_models_are_plain_transformers_directories(networks, tokenizer, tmp_path):
    policy, reward_model, value_model = networks
    classes = AutoModelForCausalLM, *[AutoModelForTokenClassification] * 2
    names = "policy", "reward", "value"
    for name, model, auto_class in zip(names, networks, classes, strict=True):
        save_model(model, tokenizer, tmp_path / name)
        inner = getattr(model, "model", model)
        loaded = auto_class.from_pretrained(tmp_path / name)
        assert same_weights(loaded, inner)
        with torch.no_grad():  # rounding can depend on where in memory the weights lie
            torch.testing.assert_close(loaded(IDS).logits, inner(IDS).logits, **FORWARD)
        assert AutoTokenizer.from_pretrained(tmp_path / name).get_vocab() == tokenizer.get_vocab()
        assert not [p for p in (tmp_path / name).iterdir() if p.suffix in (".bin", ".pt", ".pkl")]
    loaded, loaded_tokenizer = load_policy(tmp_path / "policy")
    assert not loaded.training and loaded_tokenizer.pad_token_id == PAD
    assert same_weights(loaded, policy)
    assert same_weights(RewardModel.load(tmp_path / "reward"), reward_model)
    assert same_weights(ValueModel.load(tmp_path / "value"), value_model)


def save_with(tokenizer, path, **config):
    """A saved policy whose configuration differs from the fixture's."""
    changed = make_policy(tokenizer).config
    for name, value in config.items():
        setattr(changed, name, value)
    torch.manual_seed(0)
    save_model(GPT2LMHeadModel(changed).eval(), tokenizer, path)


def activation(model) -> str:
    """What a loaded model computes, whatever its configuration says."""
    return type(model.transformer.h[0].mlp.act).__name__


def test_gelu_new_is_computed_in_one_step_and_stays_the_same_function(tokenizer, tmp_path):
    save_with(tokenizer, tmp_path, activation_function="gelu_new")
    ours, _ = load_policy(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (activation(ours), activation(theirs)) == ("GELUTanh", "NewGELUActivation")
    assert same_weights(ours, theirs)
    for ids in IDS, torch.arange(2, 66)[None]:
        logits = [model(ids).logits for model in (ours, theirs)]
        torch.testing.assert_close(*logits, **FORWARD)
        for made in logits:
            made.logsumexp(-1).sum().backward()
    grads = [torch.cat([p.grad.flatten() for p in model.parameters()]) for model in (ours, theirs)]
    # the two formulas round differently: relative to the largest gradient
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6 * grads[1].abs().max().item())


def test_a_swapped_activation_is_saved_and_plain_transformers_agrees(tokenizer, tmp_path):
    save_with(tokenizer, tmp_path, activation_function="gelu_new")
    ours, _ = load_policy(tmp_path)
    save_model(ours, tokenizer, tmp_path / "again")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert activation(theirs) == "GELUTanh"
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits, ours(IDS).logits, **FORWARD)


@pytest.mark.parametrize("name, kind", [("relu", "ReLU"), ("gelu", "GELUActivation"),
                                        ("gelu_pytorch_tanh", "GELUTanh")])
def test_any_other_activation_is_kept(tokenizer, tmp_path, name, kind):
    save_with(tokenizer, tmp_path, activation_function=name)
    ours, _ = load_policy(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert activation(ours) == activation(theirs) == kind
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, **FORWARD)


def test_scalar_models_swap_the_activation_too(networks, tokenizer, tmp_path):
    reward_model = networks[1]
    save_model(reward_model, tokenizer, tmp_path)
    theirs = AutoModelForTokenClassification.from_pretrained(tmp_path)
    for kind in RewardModel, ValueModel:
        ours = kind.load(tmp_path).model
        assert (activation(ours), activation(theirs)) == ("GELUTanh", "NewGELUActivation")
        with torch.no_grad():
            torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, **FORWARD)


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
        torch.testing.assert_close(logits[..., :257], model(ids).logits, **FORWARD)
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
