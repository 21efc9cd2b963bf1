"""Sampling responses: one token at a time, with a key-value cache."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_mini.data import decode_response, encode_prompt, left_pad
from rlhf_mini.models import compute_position_ids
from rlhf_mini.runtime import NonFiniteLoss


@torch.no_grad()
def generate(
    policy: PreTrainedModel, prompt_ids: Tensor, prompt_mask: Tensor, *, max_response_tokens: int,
    eos_id: int, pad_id: int, temperature: float = 1.0, generator: torch.Generator | None = None,
    copies: list[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample responses from the policy's full distribution (no top-k, no top-p).

    Args:
        policy: causal language model in eval mode.
        prompt_ids: (B, P) left-padded.
        prompt_mask: (B, P) bool.
        max_response_tokens: longest response, EOS included.
        eos_id: the token that ends a response.
        pad_id: what stands after the end.
        temperature: divides the logits; 0 takes the likeliest token (greedy).
        generator: source of randomness, on the policy's device.
        copies: B numbers of responses, one per prompt if None; a prompt is read only once.

    Returns:
        response_ids (B', T) and response_mask (B', T) with B' = sum of `copies`, T <=
        max_response_tokens. EOS is a real token (mask True); a response without EOS was cut off.

    Raises:
        ValueError: if prompt and response do not fit into the policy's context; NonFiniteLoss if
            the policy's weights are not finite.
    """
    _check_context(policy, prompt_ids.shape[1], max_response_tokens)
    mask, position_ids = prompt_mask, compute_position_ids(prompt_mask)
    token_ids, cache = prompt_ids, None
    copies = torch.tensor(copies or [1] * len(prompt_ids), device=prompt_ids.device)
    prompt_of = torch.arange(len(copies), device=copies.device).repeat_interleave(copies)
    rows = torch.arange(len(prompt_of), device=copies.device)  # whose turn it still is
    response_ids = prompt_ids.new_full((len(rows), max_response_tokens), pad_id)
    response_mask = torch.zeros_like(response_ids, dtype=torch.bool)
    for t in range(max_response_tokens):
        output = policy.transformer(token_ids, attention_mask=mask, position_ids=position_ids,
                                    past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits = policy.lm_head(output.last_hidden_state[:, -1]).float()
        if t == 0 and not logits.isfinite().all():
            raise NonFiniteLoss("the policy's logits are not finite: training spoiled its weights, "
                                "or they were bad before. Try a lower learning rate")
        if t == 0:  # from here on every response has a row of its own
            logits, mask, position_ids = (x[prompt_of] for x in (logits, mask, position_ids))
            cache.batch_select_indices(prompt_of)
        token = _pick(logits, temperature, generator)
        response_ids[rows, t], response_mask[rows, t] = token, True
        going = (token != eos_id).nonzero()[:, 0]
        if len(going) == 0:
            break
        if len(going) < len(rows):  # finished rows cost no more
            rows, token, mask, position_ids = (x[going] for x in (rows, token, mask, position_ids))
            cache.batch_select_indices(going)
        token_ids, position_ids = token[:, None], position_ids[:, -1:] + 1
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return response_ids[:, :t + 1], response_mask[:, :t + 1]


def _pick(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    # inverse of the distribution function; on a CPU much faster than torch.multinomial
    below = (logits / temperature).softmax(-1).cumsum(-1)
    u = torch.rand(len(below), 1, generator=generator, device=below.device) * below[:, -1:]
    return torch.searchsorted(below, u, right=True)[:, 0].clamp(max=below.shape[1] - 1)


def _check_context(policy: PreTrainedModel, prompt_tokens: int, response_tokens: int) -> None:
    context = policy.config.n_positions
    if prompt_tokens + response_tokens > context:
        raise ValueError(
            f"a prompt of {prompt_tokens} tokens and a response of up to {response_tokens} do not "
            f"fit into the model's context of {context} tokens; shorten the prompt or lower "
            "max_response_tokens")


@dataclass(frozen=True)
class Response:
    """A sampled response: its text, its tokens (EOS included), and whether it ended with EOS."""

    text: str
    token_ids: tuple[int, ...]
    finished: bool


def sample_responses(
    policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], *,
    max_response_tokens: int, batch_size: int, temperature: float = 1.0,
    generator: torch.Generator | None = None, on_batch=None,
) -> list[Response]:
    """Sample one response to each prompt, in batches of prompts of similar length.

    Args:
        policy: causal language model in eval mode.
        tokenizer: its tokenizer.
        prompts: texts; repeat a prompt to get several responses.
        max_response_tokens: longest response, EOS included.
        batch_size: prompts at a time.
        temperature: divides the logits; 0 is greedy.
        generator: source of randomness.
        on_batch: called with the number of responses after each batch (progress).

    Returns:
        One `Response` per prompt, in the order of `prompts`.

    Raises:
        ValueError: if a prompt does not fit.
    """
    encoded = {prompt: encode_prompt(tokenizer, prompt) for prompt in dict.fromkeys(prompts)}
    order = sorted(range(len(prompts)), key=lambda i: (len(encoded[prompts[i]]), prompts[i]))
    responses: list[Response | None] = [None] * len(prompts)
    for start in range(0, len(order), batch_size):
        rows = order[start:start + batch_size]
        copies = Counter(prompts[i] for i in rows)  # equal prompts stand side by side
        prompt_ids, prompt_mask = left_pad([encoded[p] for p in copies], tokenizer.pad_token_id)
        ids, mask = generate(
            policy, prompt_ids.to(policy.device), prompt_mask.to(policy.device),
            max_response_tokens=max_response_tokens, eos_id=tokenizer.eos_token_id,
            pad_id=tokenizer.pad_token_id, temperature=temperature, generator=generator,
            copies=list(copies.values()))
        for i, row, length in zip(rows, ids.tolist(), mask.sum(1).tolist(), strict=True):
            tokens = tuple(row[:length])
            responses[i] = Response(decode_response(tokenizer, tokens), tokens,
                                    tokens[-1] == tokenizer.eos_token_id)
        if on_batch:
            on_batch(len(rows))
    return responses
