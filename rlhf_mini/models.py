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
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForTokenClassification, PreTrainedModel

from rlhf_mini.compute import compilable
from rlhf_mini.data import PackedRankings, TokenBatch
from rlhf_mini.loading import read_weights
from rlhf_mini.tensors import compute_entropy, gather_logprobs, last_index, temper, unmask

# Rows per forward pass: fewer waste less on padding, more fill the processor.
ROWS_TOGETHER = {"cpu": 32, "cuda": 256}
LOGITS_TOGETHER = 2**25  # logits in memory at a time, 128 MiB in float32
ROUND = {"cpu": 1, "cuda": 8}  # a GPU's matrix products are fast in multiples of 8 (16 bytes)


def compute_position_ids(attention_mask: Tensor) -> Tensor:
    """Number the real tokens of each row from 0, whatever padding precedes them.

    Args:
        attention_mask: (B, L) bool.

    Returns:
        (B, L) int.
    """
    # Padding behind the last token repeats its position: one more could lie outside the context.
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def freeze(model: nn.Module) -> nn.Module:
    """Return a frozen copy of a model: no gradients, no dropout."""
    return copy.deepcopy(model).requires_grad_(False).eval()


@torch.no_grad()
def copy_weights(to: nn.Module, source: nn.Module) -> None:
    """Write a model's weights into another of its kind."""
    for mine, theirs in zip(to.parameters(), source.parameters(), strict=True):
        mine.copy_(theirs)


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


def project(block: nn.Module, x: Tensor) -> Tensor:
    """Return a block's queries, keys and values, (B, heads, L, D / heads) each, for x (B, L, D)."""
    heads = block.attn.c_attn(block.ln_1(x))
    return heads.unflatten(-1, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)


def finish(block: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Add attention's output y (B, heads, L, D / heads), then the MLP's, to a block's input x."""
    x = x + block.attn.resid_dropout(block.attn.c_proj(y.transpose(1, 2).flatten(2)))
    return x + block.mlp(block.ln_2(x))


@compilable
def run_layers(
    model: PreTrainedModel, token_ids: Tensor, position_ids: Tensor,
    visible: Tensor | None = None, read: Tensor | None = None,
) -> Tensor:
    """Send tokens through GPT-2's layers, as transformers does, but read only what is needed.

    The last block need not finish the states that nobody reads, such as those of the prompt.

    Args:
        model: with a GPT-2 `transformer`; only its residual dropout is used, in train mode.
        token_ids: (B, L) int.
        position_ids: (B, L) or (1, L) int.
        visible: (B, L, L) bool, True where the first token (row) sees the second; None: each sees
            itself and all before it.
        read: (B, R) int, the columns whose states are wanted; None: all.

    Returns:
        (B, R or L, D) last hidden states.
    """
    backbone = model.transformer
    x = backbone.wte(token_ids) + backbone.wpe(position_ids)
    if read is not None and visible is None:
        seen = read[:, :, None] >= torch.arange(x.shape[1], device=x.device)
    elif read is not None:
        seen = visible.gather(1, read[:, :, None].expand(-1, -1, x.shape[1]))
    for block in backbone.h:
        query, key, value = project(block, x)
        mask = visible
        if read is not None and block is backbone.h[-1]:
            rows = torch.arange(len(x), device=x.device)[:, None]
            query, x, mask = query.transpose(1, 2)[rows, read].transpose(1, 2), x[rows, read], seen
        y = F.scaled_dot_product_attention(
            query, key, value, None if mask is None else mask[:, None], is_causal=mask is None,
            scale=block.attn.scaling)
        x = finish(block, x, y)
    return backbone.ln_f(x)


def _states_at(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, wanted: Tensor
) -> Tensor:
    """Run the backbone on real tokens: rows of similar length together, padding cut off.

    Attention never looks right, so no mask is needed and the result is that of the padded rows.

    Args:
        model: with a GPT-2 `transformer`.
        input_ids: (B, L).
        attention_mask: (B, L) bool.
        wanted: (B, L) bool, the tokens whose states are wanted; in each row they stand together.

    Returns:
        (N, D) states at the N wanted tokens, row by row.
    """
    lengths, counts = attention_mask.sum(1), wanted.sum(1)
    by_length = lengths.argsort()
    real_first = (~attention_mask).long().argsort(dim=1, stable=True)
    begins = wanted.gather(1, real_first).long().argmax(1)
    parts = []
    for rows in by_length.split(ROWS_TOGETHER[input_ids.device.type]):
        columns = torch.arange(int(lengths[rows[-1]]), device=input_ids.device)
        offsets = columns[:int(counts[rows].max())]
        ids = input_ids[rows].gather(1, real_first[rows, :len(columns)])
        read = (begins[rows, None] + offsets).clamp(max=len(columns) - 1)
        states = run_layers(model, ids, columns[None], read=read)
        parts.append(states[offsets < counts[rows, None]])
    row_of = by_length.repeat_interleave(counts[by_length])
    return torch.cat(parts)[row_of.argsort(stable=True)]


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
    return temper(compute_logits(policy, _predicting_states(policy, batch)), temperature)


def compute_logits(policy: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Apply the output layer to hidden states (..., D); return logits (..., V) in float32.

    GPT-2's vocabulary of 50,257 is odd. On a GPU rows of zeros make it a multiple of 8; what they
    give is left out.
    """
    head, kind = policy.lm_head, hidden.device.type
    missing = -head.weight.shape[0] % ROUND[kind]
    if missing == 0 or head.bias is not None:  # GPT-2 has none
        return head(hidden).float()
    weight = head.weight
    if torch.is_autocast_enabled(kind):  # before padding: half the bytes to copy
        weight = weight.to(torch.get_autocast_dtype(kind))
    return F.linear(hidden, F.pad(weight, (0, 0, 0, missing)))[..., :-missing].float()


def _predicting_states(model: PreTrainedModel, batch: TokenBatch) -> Tensor:
    wanted = torch.zeros_like(batch.attention_mask)
    first = batch.prompt_ids.shape[1] - 1  # the last prompt token predicts the first response token
    wanted[:, first:-1] = batch.response_mask
    return _states_at(model, batch.input_ids, batch.attention_mask, wanted)


def compute_response_logprobs(
    policy: PreTrainedModel, batch: TokenBatch, temperature: float = 1.0, entropy: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Return log-probability and entropy at each response token.

    Args:
        policy: causal language model.
        batch: prompts and responses.
        temperature: divides the logits.
        entropy: False saves the time for it.

    Returns:
        logprobs (B, T) and entropies (B, T) or None, in nats, 0 off `batch.response_mask`; the
        entropies carry no gradient.
    """
    mask = batch.response_mask
    logprobs, entropies = compute_token_logprobs(
        policy, _predicting_states(policy, batch), batch.response_ids[mask], temperature, entropy)
    return unmask(logprobs, mask), unmask(entropies, mask) if entropy else None


def compute_token_logprobs(
    policy: PreTrainedModel, hidden: Tensor, token_ids: Tensor, temperature: float = 1.0,
    entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return log-probability and entropy of tokens, given the hidden states that predict them.

    The (N, V) logits are made `LOGITS_TOGETHER` at a time, and made again in the backward pass: for
    GPT-2's vocabulary all of them would be the largest tensor of the training.

    Args:
        policy: causal language model.
        hidden: (N, D) last hidden states.
        token_ids: (N,) int, the tokens that follow them.
        temperature: divides the logits.
        entropy: whether to compute it.

    Returns:
        logprobs (N,) and entropies (N,), without gradient, or None.
    """
    rows = max(1, LOGITS_TOGETHER // policy.config.vocab_size)
    if len(hidden) <= rows:
        return _predict(policy, hidden, token_ids, temperature, entropy)
    parts = [checkpoint(_predict, policy, *part, temperature, entropy, use_reentrant=False,
                        preserve_rng_state=False)
             for part in zip(hidden.split(rows), token_ids.split(rows), strict=True)]
    logprobs, entropies = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropies) if entropy else None


@compilable
def _predict(policy, hidden: Tensor, token_ids: Tensor, temperature: float, entropy: bool):
    logits = temper(compute_logits(policy, hidden), temperature)
    return gather_logprobs(logits, token_ids), compute_entropy(logits.detach()) if entropy else None


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
        model = read_weights(AutoModelForTokenClassification, path, num_labels=1)
        return cls(model.to(device).eval())

    def read(self, hidden: Tensor) -> Tensor:
        """Apply the head: (..., D) -> (...), in float32: a score may not be rounded."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.model.classifier(hidden.float())[..., 0]


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
        columns = torch.arange(input_ids.shape[1], device=input_ids.device)
        last = columns == last_index(attention_mask)[:, None]
        return self.read(_states_at(self.model, input_ids, attention_mask, last))

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
        return self.read(run_layers(self.model, rankings.input_ids, rankings.position_ids, visible,
                                    rankings.end_index))


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
            (B, T) values, in units of the score; 0 off `batch.response_mask`.
        """
        return unmask(self.read(_predicting_states(self.model, batch)), batch.response_mask)
