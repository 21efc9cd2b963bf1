"""Step 1: supervised fine-tuning on demonstrations."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_mini.config import SFTConfig
from rlhf_mini.data import Demonstration, collate, encode_pair
from rlhf_mini.generation import sample_responses
from rlhf_mini.models import compute_response_logprobs, copy_weights, freeze, set_residual_dropout
from rlhf_mini.processes import Together, check_shares, combine, take_share
from rlhf_mini.runtime import check_finite, make_generator, progress
from rlhf_mini.tensors import masked_mean
from rlhf_mini.training import TrainingRecord, cosine_lr, epoch_batch


def sft_loss(logprobs: Tensor, response_mask: Tensor) -> tuple[Tensor, dict[str, float]]:
    r"""Compute $-\frac1N\sum_{b,t} m_{bt}\log\pi(y_{bt}\mid x_b, y_{b,<t})$, response tokens only.

    Args:
        logprobs: (B, T) nats at the response tokens.
        response_mask: (B, T) bool, EOS included: a model that never sees EOS never stops.

    Returns:
        Scalar loss in nats per token, and stats.

    Source: InstructGPT, section 3.5.
    """
    loss = -masked_mean(logprobs, response_mask)
    return loss, {"loss": loss.item()}


@torch.no_grad()
def compute_sft_loss(
    policy: PreTrainedModel, pairs: list[tuple[list[int], list[int]]], pad_id: int
) -> float:
    """Return the SFT loss over all pairs, in nats per response token.

    Args:
        policy: in eval mode.
        pairs: (prompt ids, response ids).
        pad_id: id of PAD.
    """
    total, tokens = 0.0, 0
    for start in range(0, len(pairs), 64):
        batch = collate(pairs[start:start + 64], pad_id).to(policy.device)
        logprobs, _ = compute_response_logprobs(policy, batch, entropy=False)
        count = int(batch.response_mask.sum())
        total += sft_loss(logprobs, batch.response_mask)[0].item() * count
        tokens += count
    return total / tokens


def compute_eos_rate(
    policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str],
    max_response_tokens: int, seed: int,
) -> float:
    """Return the share of responses, sampled at T = 1, that end with EOS."""
    responses = sample_responses(
        policy, tokenizer, prompts, max_response_tokens=max_response_tokens, batch_size=256,
        generator=make_generator(seed, "eos-rate", device=policy.device))
    return sum(r.finished for r in responses) / len(responses)


def train_sft(
    policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, train: list[Demonstration],
    valid: list[Demonstration], config: SFTConfig, seed: int, directory: Path | None = None,
) -> list[dict]:
    """Fine-tune the policy in place and leave it at the epoch with the lowest validation loss.

    Args:
        policy: pretrained causal language model.
        tokenizer: its tokenizer.
        train: demonstrations to learn from.
        valid: demonstrations to choose the epoch on, and prompts to measure the EOS rate on.
        config: settings.
        seed: of order and dropout.
        directory: where checkpoints and metrics go; None keeps nothing on disk.

    Returns:
        The metrics of each step; the last row of an epoch holds `valid_loss`.

    Raises:
        ValueError: if there is no data, a prompt is too long, or the EOS rate stays below
            `config.min_eos_rate`.
    """
    _check(train, valid, config)
    limits = config.max_prompt_tokens, config.max_response_tokens
    pairs, valid_pairs = ([encode_pair(tokenizer, d.prompt, d.response, *limits, where=d.id)
                           for d in split] for split in (train, valid))
    lengths = [len(prompt) + len(response) for prompt, response in pairs]
    best = freeze(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.lr,
                                  weight_decay=0.01, fused=True)  # torch's default
    record = TrainingRecord(directory, {"policy": policy, "best": best}, {"adamw": optimizer},
                            config.checkpoint_every)
    first, kept = record.restore(valid_loss=math.inf)
    if first == 0:
        torch.manual_seed(seed)  # dropout
    set_residual_dropout(policy, config.dropout)
    steps = config.epochs * -(-len(pairs) // config.batch_size)
    bar, together = progress(steps, "sft", first), Together([policy], [optimizer])
    for step in range(first, steps):
        epoch, rows, last = epoch_batch(step, lengths, config.batch_size,
                                        lambda epoch: make_generator(seed, "sft", str(epoch)))
        lr = config.lr * cosine_lr(step, steps)
        stats = _sft_step(policy, together, optimizer, [pairs[i] for i in take_share(rows)], lr,
                          step, tokenizer.pad_token_id)
        if last:
            with together.whole():
                stats["valid_loss"] = compute_sft_loss(policy, valid_pairs, tokenizer.pad_token_id)
                check_finite(stats["valid_loss"], step, "validation demonstrations")
                if stats["valid_loss"] < kept["valid_loss"]:
                    kept["valid_loss"] = stats["valid_loss"]
                    copy_weights(best, policy)
        record.log(step, epoch=epoch, lr=lr, **stats)
        bar.update(1, **stats)
        record.save(step + 1, **kept)
    bar.close()
    together.end()
    copy_weights(policy, best)
    set_residual_dropout(policy, 0.0)
    _gate_on_eos(policy, tokenizer, valid, config, seed, record, steps)
    return record.history


def _check(train: list[Demonstration], valid: list[Demonstration], config: SFTConfig) -> None:
    check_shares(sft__batch_size=config.batch_size)
    if not train or not valid:
        raise ValueError(f"SFT needs training and validation demonstrations; there are "
                         f"{len(train)} and {len(valid)}")


def _sft_step(policy, together, optimizer, pairs, lr: float, step: int, pad_id: int) -> dict:
    batch = collate(pairs, pad_id).to(policy.device)

    def compute_loss() -> tuple[Tensor, dict[str, float]]:
        logprobs, _ = compute_response_logprobs(policy, batch, entropy=False)
        return combine(*sft_loss(logprobs, batch.response_mask), batch.response_mask.sum())

    optimizer.param_groups[0]["lr"] = lr
    optimizer.zero_grad()
    policy.train()  # dropout on
    loss, stats = together(compute_loss)
    check_finite(loss, step, "SFT batch")
    loss.backward()
    stats["grad_norm"] = nn.utils.clip_grad_norm_(policy.parameters(), 1.0).item()
    optimizer.step()
    policy.eval()
    return stats


def _gate_on_eos(policy, tokenizer, valid, config, seed, record, steps) -> None:
    rate = compute_eos_rate(policy, tokenizer, [d.prompt for d in valid],
                            config.max_response_tokens, seed)
    record.log(steps, eos_rate=rate)
    if rate < config.min_eos_rate:
        raise ValueError(
            f"after SFT {rate:.0%} of the responses end with EOS, fewer than min_eos_rate = "
            f"{config.min_eos_rate:.0%}: PPO would be trained on cut-off responses. Train for more "
            "epochs, check that demonstrations end in EOS, or raise max_response_tokens.")
