"""The four networks of RLHF: policy, frozen reference, reward model, value model.

The policy is a causal language model from transformers. Reward and value model are the same kind
of network, a backbone with one number per token (transformers' token classification with one
label): the reward model reads that number at the last token, the value model at every token. So
the value model can start as a copy of the reward model, and every saved model is a plain
transformers directory.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf_mini.data import PackedRankings, TokenBatch
from rlhf_mini.files import could_be_hub_name
from rlhf_mini.tensors import compute_entropy, gather_logprobs, last_index, unmask

EOS_TOKEN, PAD_TOKEN = "<|endoftext|>", "<|pad|>"
ROWS_TOGETHER = 32  # rows per forward pass: fewer waste less on padding, more fill the processor


def compute_position_ids(attention_mask: Tensor) -> Tensor:
    """Number the real tokens of each row from 0, whatever padding precedes them.

    Args:
        attention_mask: (B, L) bool.

    Returns:
        (B, L) int.
    """
    # Padding behind the last token repeats its position: one more could lie outside the context.
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


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
    kinds = _check_architecture(path).architectures or []
    if any(kind.endswith("Classification") for kind in kinds):
        raise ValueError(f"{path}: holds a {kinds[0]}, a reward or value model; give a language "
                         "model")
    tokenizer = load_tokenizer(path)
    policy = _from_pretrained(AutoModelForCausalLM, path)
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


def _check_architecture(path: str | Path) -> PretrainedConfig:
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


def _from_pretrained(auto_class, path: str | Path, **kwargs) -> PreTrainedModel:
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
    inner = model.model if isinstance(model, RewardModel | ValueModel) else model
    inner.save_pretrained(path)
    tokenizer.save_pretrained(path)


def freeze(model: nn.Module) -> nn.Module:
    """Return a frozen copy of a model: no gradients, no dropout."""
    return copy.deepcopy(model).requires_grad_(False).eval()


def set_residual_dropout(policy: PreTrainedModel, p: float) -> None:
    """Set the dropout after each attention and MLP block, and turn any other dropout off.

    Args:
        policy: a GPT-2 style model.
        p: probability of dropping, from 0 to 1; in train mode only.
    """
    for module in policy.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for block in policy.transformer.h:
        block.attn.resid_dropout.p = block.mlp.dropout.p = p


def _hidden_states(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Run the backbone on real tokens: rows of similar length together, padding cut off.

    Causal attention never looks right, so no mask is needed and the result is that of the padded
    rows. Returns (B, L, D); what stands at padding is not meaningful.
    """
    lengths = attention_mask.sum(1)
    by_length = lengths.argsort()
    real_first = (~attention_mask).long().argsort(dim=1, stable=True)
    place = compute_position_ids(attention_mask)  # of each token among the real ones
    parts = []
    for rows in by_length.split(ROWS_TOGETHER):
        ids = input_ids[rows].gather(1, real_first[rows, :lengths[rows[-1]]])
        hidden = model.transformer(ids, use_cache=False).last_hidden_state
        parts.append(hidden.gather(1, place[rows, :, None].expand(-1, -1, hidden.shape[-1])))
    return torch.cat(parts)[by_length.argsort()]


def compute_response_logits(
    policy: PreTrainedModel, batch: TokenBatch, temperature: float = 1.0
) -> Tensor:
    """Return the logits that predict the response tokens, without those at padding.

    Args:
        policy: causal language model.
        batch: prompts and responses, with N response tokens in all.
        temperature: divides the logits; the one the responses were sampled with.

    Returns:
        (N, V) float32; row n predicts `batch.response_ids[batch.response_mask][n]`.
    """
    hidden = _hidden_states(policy, batch.input_ids, batch.attention_mask)
    first = batch.prompt_ids.shape[1] - 1  # the last prompt token predicts the first response token
    return policy.lm_head(hidden[:, first:-1][batch.response_mask]).float() / temperature


def compute_response_logprobs(
    policy: PreTrainedModel, batch: TokenBatch, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return log-probability and entropy at each response token.

    Args:
        policy: causal language model.
        batch: prompts and responses.
        temperature: divides the logits.

    Returns:
        logprobs (B, T) and entropies (B, T), in nats, 0 off `batch.response_mask`; the entropies
        carry no gradient.
    """
    logits, mask = compute_response_logits(policy, batch, temperature), batch.response_mask
    return (unmask(gather_logprobs(logits, batch.response_ids[mask]), mask),
            unmask(compute_entropy(logits.detach()), mask))


class _ScalarModel(nn.Module):
    """A backbone with one number per token.

    Args:
        model: a token-classification model with one label.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> Self:
        """Load a saved reward or value model.

        Raises:
            ValueError: for another architecture or damaged weights.
        """
        _check_architecture(path)
        model = _from_pretrained(AutoModelForTokenClassification, path, num_labels=1)
        return cls(model.to(device).eval())

    def read(self, hidden: Tensor) -> Tensor:
        """Apply the head: (..., D) -> (...)."""
        return self.model.classifier(hidden)[..., 0].float()


class RewardModel(_ScalarModel):
    """A backbone with a scalar head, read at the last real token."""

    @classmethod
    def from_policy(cls, policy: PreTrainedModel, generator: torch.Generator) -> RewardModel:
        """Copy a policy's backbone and draw a new head from N(0, 1/(D + 1)), bias 0.

        Source: Stiennon et al. 2020; Huang et al. 2024 (arXiv 2403.17031), detail 11.
        """
        config = copy.deepcopy(policy.config)
        config.num_labels, config.classifier_dropout = 1, 0.0
        model = AutoModelForTokenClassification.from_config(config)
        model.transformer.load_state_dict(policy.transformer.state_dict())
        head = model.classifier
        noise = torch.randn(head.weight.shape, generator=generator)
        with torch.no_grad():
            head.weight.copy_(noise / math.sqrt(head.in_features + 1))
            head.bias.zero_()
        return cls(model.to(policy.device).eval())

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Score whole sequences.

        Args:
            input_ids: (B, L) prompt and response.
            attention_mask: (B, L) bool.

        Returns:
            (B,) scores; the unit is log-odds of being preferred.
        """
        scores = self.read(_hidden_states(self.model, input_ids, attention_mask))
        return scores.gather(1, last_index(attention_mask)[:, None])[:, 0]

    def packed_scores(self, rankings: PackedRankings) -> Tensor:
        """Score all responses to a prompt in one row that holds the prompt only once.

        A response token sees the prompt and its own response, never another response, so the
        scores are those of `forward`.

        Args:
            rankings: rows of prompt, response 0, response 1, ...

        Returns:
            (B, K) scores; entries off `rankings.mask` are not meaningful.
        """
        segments = rankings.segments
        length = segments.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
        key, query = segments[:, None, :], segments[:, :, None]
        visible = causal & ((key == 0) | (key == query))  # padding sees only padding
        hidden = self.model.transformer(
            rankings.input_ids, attention_mask=visible[:, None],
            position_ids=rankings.position_ids, use_cache=False).last_hidden_state
        return self.read(hidden).gather(1, rankings.end_index)


class ValueModel(_ScalarModel):
    """A backbone with a scalar head, read before each response token."""

    @classmethod
    def from_reward_model(cls, reward_model: RewardModel) -> ValueModel:
        """Start from a copy of the reward model, as InstructGPT does."""
        return cls(copy.deepcopy(reward_model.model).requires_grad_(True))

    def forward(self, batch: TokenBatch) -> Tensor:
        """Predict the return from each state, before the token is emitted.

        Args:
            batch: prompts and responses.

        Returns:
            (B, T) values, in units of the score; not meaningful off `batch.response_mask`.
        """
        hidden = _hidden_states(self.model, batch.input_ids, batch.attention_mask)
        first = batch.prompt_ids.shape[1] - 1
        return self.read(hidden[:, first:-1])
