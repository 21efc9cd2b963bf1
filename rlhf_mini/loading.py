"""Loading and saving: plain transformers directories, GPT-2 style, safetensors only."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf_mini.files import could_be_hub_name

EOS_TOKEN, PAD_TOKEN = "<|endoftext|>", "<|pad|>"


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer and make sure that PAD and EOS are two different tokens.

    A tokenizer without PAD (GPT-2's own) gets one; `load_policy` then adds its embedding.

    Args:
        path: a folder or a hub name.

    Raises:
        ValueError: if it cannot be read, has no EOS, or uses EOS as PAD.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds
        raise ValueError(f"{path}: no tokenizer could be read there ({error})") from error
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise ValueError(f"{path}: the tokenizer has no tokens of text; its files, such as "
                         "tokenizer.json, are missing there")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{path}: the tokenizer has no EOS token; set eos_token, for GPT-2 "
                         f"{EOS_TOKEN!r}, so that responses can end")
    if tokenizer.pad_token_id is None:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    check_pad_token(tokenizer, path)
    tokenizer.padding_side = "left"
    return tokenizer


def check_pad_token(tokenizer: PreTrainedTokenizerBase, path: str | Path) -> None:
    """Raise ValueError for a tokenizer whose PAD is its EOS."""
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise ValueError(
            f"{path}: pad_token and eos_token are both {tokenizer.eos_token!r} "
            f"(id {tokenizer.eos_token_id}). EOS would be masked like padding and the policy would "
            f"never learn to stop. Remove pad_token from the tokenizer's configuration (a "
            f"{PAD_TOKEN!r} is then added) or set it to a token of its own.")


def load_policy(
    path: str | Path, device: torch.device | str = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a GPT-2 style language model and its tokenizer, dropout off.

    Args:
        path: a folder or a hub name; weights are read from safetensors only, no code is run.
        device: where the model goes.

    Returns:
        The model in eval mode, float32, and the tokenizer.

    Raises:
        ValueError: for another architecture, damaged weights, or a tokenizer that does not fit.
    """
    kinds = check_architecture(path).architectures or []
    if any(kind.endswith("Classification") for kind in kinds):
        raise ValueError(f"{path}: holds a {kinds[0]}, a reward or value model; give a language "
                         "model")
    tokenizer = load_tokenizer(path)
    policy = read_weights(AutoModelForCausalLM, path)
    match_embeddings(policy, tokenizer, path)
    policy.config.pad_token_id = policy.generation_config.pad_token_id = tokenizer.pad_token_id
    policy.config.eos_token_id = policy.generation_config.eos_token_id = tokenizer.eos_token_id
    return policy.to(device).eval(), tokenizer


def match_embeddings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str | Path
) -> None:
    """Add the embedding of a new PAD token; raise ValueError for another model's tokenizer."""
    vocabulary, tokens = model.config.vocab_size, len(tokenizer)
    if tokens == vocabulary + 1 and tokenizer.pad_token_id == vocabulary:
        model.resize_token_embeddings(tokens, mean_resizing=False)
    elif not 0 <= vocabulary - tokens < 256:  # some models round their vocabulary up
        raise ValueError(f"{path}: the tokenizer has {tokens} tokens and the model's embedding "
                         f"{vocabulary} rows: they were not made for each other")


def check_architecture(path: str | Path) -> PretrainedConfig:
    """Return the configuration at a path; raise ValueError unless it is a GPT-2's."""
    here = Path(path)
    if not ((here / "config.json").is_file() if here.exists() else could_be_hub_name(str(path))):
        raise ValueError(f"{path}: no model could be read there; give a folder with config.json, "
                         "model.safetensors and the tokenizer, or a model's name on the hub")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds
        place = "there" if here.exists() else "on the hub, and there is no such folder"
        raise ValueError(f"{path}: no model could be read {place} ({error})") from error
    if config.model_type != "gpt2":
        raise ValueError(f"{path}: the model is of type {config.model_type!r}; rlhf-mini trains "
                         "GPT-2 style models (model_type 'gpt2')")
    return config


def read_weights(auto_class, path: str | Path, **kwargs) -> PreTrainedModel:
    """Return a model with the weights at a path, float32.

    GPT-2's own checkpoints name the activation `gelu_new`, which transformers computes in eight
    elementary steps; `gelu_pytorch_tanh` is the same function in one.

    Args:
        auto_class: transformers' class that loads this kind of model.
        path: a folder or a hub name.
        **kwargs: changes of the configuration.

    Raises:
        ValueError: if the weights cannot be read or lack a tensor.
    """
    if check_architecture(path).activation_function == "gelu_new":
        kwargs["activation_function"] = "gelu_pytorch_tanh"
    try:
        model, info = auto_class.from_pretrained(
            path, dtype=torch.float32, use_safetensors=True, trust_remote_code=False,
            output_loading_info=True, ignore_mismatched_sizes=True, **kwargs)  # named below
    except Exception as error:  # transformers and safetensors raise many kinds
        why = ("no format but model.safetensors is" if isinstance(error, OSError) else
               "the file is damaged or half written, make or copy it again")
        raise ValueError(f"{path}: the weights could not be read; {why} ({error})") from error
    if info["missing_keys"] or info["mismatched_keys"]:
        bad = sorted(info["missing_keys"]) + sorted(str(k) for k in info["mismatched_keys"])
        raise ValueError(f"{path}: the checkpoint lacks {len(bad)} of the model's tensors or has "
                         f"them in another shape than config.json says, first {bad[0]}")
    return model


def save_model(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, path: str | Path
) -> None:
    """Write a transformers directory: safetensors, config and tokenizer.

    Args:
        model: a policy, `RewardModel` or `ValueModel`.
        tokenizer: its tokenizer.
        path: the folder; it is created.
    """
    getattr(model, "model", model).save_pretrained(path)
    tokenizer.save_pretrained(path)
