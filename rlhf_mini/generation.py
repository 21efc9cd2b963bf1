"""Sampling responses: one token at a time, with a key-value cache."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_mini.data import decode_response, encode_prompt, left_pad
from rlhf_mini.decoding import check_logits, check_sampling, decode
from rlhf_mini.models import compute_logits, compute_position_ids
from rlhf_mini.processes import gather, process_count, process_index
from rlhf_mini.tensors import gather_logprobs, pick_tokens, temper


@torch.no_grad()
def generate(
    policy: PreTrainedModel, prompt_ids: Tensor, prompt_mask: Tensor, *, max_response_tokens: int,
    eos_id: int, pad_id: int, temperature: float = 1.0, noise: Tensor | None = None,
    copies: list[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample responses from the policy's full distribution (no top-k, no top-p).

    The plain loop, to be read. What samples in a run is `decoding.decode`, the same but faster.

    Args:
        policy: causal language model in eval mode.
        prompt_ids: (B, P) left-padded.
        prompt_mask: (B, P) bool.
        max_response_tokens: longest response, EOS included.
        eos_id: the token that ends a response.
        pad_id: what stands after the end.
        temperature: divides the logits; 0 takes the likeliest token (greedy).
        noise: (B', max_response_tokens) uniform from [0, 1), what the tokens are picked with; None
            if the temperature is 0.
        copies: B numbers of responses, one per prompt if None; a prompt is read only once.

    Returns:
        response_ids (B', T), response_mask (B', T) and their logprobs (B', T) in nats, with B' =
        sum of `copies`, T <= max_response_tokens. EOS is a real token (mask True); a response
        without EOS was cut off.

    Raises:
        ValueError: if prompt and response do not fit into the policy's context, or the noise is
            missing; NonFiniteLoss if the policy's weights are not finite.
    """
    check_sampling(policy, prompt_ids.shape[1], max_response_tokens, temperature, noise)
    mask, position_ids = prompt_mask, compute_position_ids(prompt_mask)
    token_ids, cache = prompt_ids, None
    copies = torch.tensor(copies or [1] * len(prompt_ids), device=prompt_ids.device)
    prompt_of = torch.arange(len(copies), device=copies.device).repeat_interleave(copies)
    rows = torch.arange(len(prompt_of), device=copies.device)  # whose turn it still is
    response_ids = prompt_ids.new_full((len(rows), max_response_tokens), pad_id)
    response_mask = torch.zeros_like(response_ids, dtype=torch.bool)
    logprobs = torch.zeros(response_ids.shape, device=rows.device)
    for t in range(max_response_tokens):
        output = policy.transformer(token_ids, attention_mask=mask, position_ids=position_ids,
                                    past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits = compute_logits(policy, output.last_hidden_state[:, -1])
        if t == 0:  # from here on every response has a row of its own
            check_logits(logits)
            logits, mask, position_ids = (x[prompt_of] for x in (logits, mask, position_ids))
            cache.batch_select_indices(prompt_of)
        token = pick_tokens(logits, temperature, None if noise is None else noise[rows, t])
        response_ids[rows, t], response_mask[rows, t] = token, True
        logprobs[rows, t] = gather_logprobs(temper(logits, temperature), token)
        going = (token != eos_id).nonzero()[:, 0]
        if len(going) == 0:
            break
        if len(going) < len(rows):  # finished rows cost no more
            rows, token, mask, position_ids = (x[going] for x in (rows, token, mask, position_ids))
            cache.batch_select_indices(going)
        token_ids, position_ids = token[:, None], position_ids[:, -1:] + 1
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return response_ids[:, :t + 1], response_mask[:, :t + 1], logprobs[:, :t + 1]


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
        on_batch: called with the number of responses at each batch (progress).

    Returns:
        One `Response` per prompt, in the order of `prompts`.

    Raises:
        ValueError: if a prompt does not fit.
    """
    encoded = {prompt: encode_prompt(tokenizer, prompt) for prompt in dict.fromkeys(prompts)}
    order = sorted(range(len(prompts)), key=lambda i: (len(encoded[prompts[i]]), prompts[i]))
    responses: dict[int, Response] = {}  # by number of the prompt
    for turn, start in enumerate(range(0, len(order), batch_size)):
        rows = order[start:start + batch_size]
        noise = torch.rand(len(rows), max_response_tokens, generator=generator,
                           device=policy.device) if temperature > 0 else None
        if on_batch:
            on_batch(len(rows))
        if turn % process_count() != process_index():
            continue  # another process takes this batch
        copies = Counter(prompts[i] for i in rows)  # equal prompts stand side by side
        prompt_ids, prompt_mask = left_pad([encoded[p] for p in copies], tokenizer.pad_token_id)
        ids, mask, _ = decode(
            policy, prompt_ids.to(policy.device), prompt_mask.to(policy.device),
            max_response_tokens=max_response_tokens, eos_id=tokenizer.eos_token_id,
            pad_id=tokenizer.pad_token_id, temperature=temperature, noise=noise,
            copies=list(copies.values()))
        for i, row, length in zip(rows, ids.tolist(), mask.sum(1).tolist(), strict=True):
            tokens = tuple(row[:length])
            responses[i] = Response(decode_response(tokenizer, tokens), tokens,
                                    tokens[-1] == tokenizer.eos_token_id)
    every = {i: response for part in gather(responses) for i, response in part.items()}
    return [every[i] for i in range(len(prompts))]
