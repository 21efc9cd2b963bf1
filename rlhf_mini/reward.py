"""Step 2b: a reward model from K-way rankings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf_mini.config import RewardConfig
from rlhf_mini.data import (
    Demonstration,
    Ranking,
    collate,
    encode_pair,
    encode_ranking,
    pack_rankings,
)
from rlhf_mini.models import RewardModel
from rlhf_mini.processes import Together, check_shares, combine, take_share
from rlhf_mini.runtime import check_finite, make_generator, progress
from rlhf_mini.training import TrainingRecord, cosine_lr, epoch_batch


def reward_loss(scores: Tensor, ranks: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, float]]:
    r"""Compute the K-way loss $-\frac{1}{\binom K2}\sum_{w \succ l}\log\sigma(r_w - r_l)$.

    The mean over the pairs of a prompt comes first, then the mean over prompts: each prompt counts
    the same, whatever its K. Tied pairs are dropped from sum and count.

    Args:
        scores: (B, K) of the reward model.
        ranks: (B, K) int, 1 = best, equal = tie.
        mask: (B, K) bool, True = the response exists.

    Returns:
        Scalar loss in nats per pair, and stats, `accuracy` (share of pairs in the labelers' order,
        ties in score count half) and `margin` (mean score difference, chosen minus rejected).

    Raises:
        ValueError: if a prompt has no untied pair.

    Source: InstructGPT, equation 1.
    """
    pairs = mask[:, :, None] & mask[:, None, :] & (ranks[:, :, None] < ranks[:, None, :])
    counts = pairs.sum((1, 2))  # C(K, 2) without ties
    if not bool((counts > 0).all()):
        row = int((counts == 0).nonzero()[0, 0])
        raise ValueError(f"ranking {row} of the batch has no untied pair: nothing to learn from")
    scores = torch.where(mask, scores, 0)  # a gradient through inf - inf would be nan
    margins = scores[:, :, None] - scores[:, None, :]  # [b, w, l] = r_w - r_l
    losses = torch.where(pairs, -F.logsigmoid(margins), 0).sum((1, 2)) / counts
    loss = losses.mean()
    with torch.no_grad():
        chosen = margins[pairs]
        accuracy = (chosen > 0).float().mean() + 0.5 * (chosen == 0).float().mean()
    return loss, {"loss": loss.item(), "accuracy": accuracy.item(),
                  "margin": chosen.mean().item()}


def train_reward_model(
    reward_model: RewardModel, tokenizer: PreTrainedTokenizerBase, train: list[Ranking],
    valid: list[Ranking], config: RewardConfig, seed: int, directory: Path | None = None,
) -> list[dict]:
    """Train the reward model in place; each batch element is a prompt with all its pairs.

    Args:
        reward_model: from `RewardModel.from_policy`.
        tokenizer: its tokenizer.
        train: rankings to learn from.
        valid: rankings to report the loss on.
        config: settings.
        seed: of the order.
        directory: where checkpoints and metrics go; None keeps nothing on disk.

    Returns:
        The metrics of each step; the last row of an epoch holds `valid_loss`.

    Raises:
        ValueError: if there are no rankings or one is too long.
    """
    if not train:
        raise ValueError("there are no training rankings")
    check_shares(reward__batch_size=config.batch_size)
    encoded = encode_rankings(tokenizer, train, config)
    encoded_valid = encode_rankings(tokenizer, valid, config)
    lengths = [len(prompt) + sum(map(len, responses)) for prompt, responses, _ in encoded]
    optimizer = torch.optim.AdamW(reward_model.parameters(), lr=config.lr,
                                  weight_decay=config.weight_decay, fused=True)
    record = TrainingRecord(directory, {"reward_model": reward_model}, {"adamw": optimizer},
                            config.checkpoint_every)
    first, _ = record.restore()
    steps = config.epochs * -(-len(encoded) // config.batch_size)
    bar, together = progress(steps, "reward", first), Together([reward_model], [optimizer])
    reward_model.eval()  # no dropout
    for step in range(first, steps):
        epoch, rows, last = epoch_batch(step, lengths, config.batch_size,
                                        lambda epoch: make_generator(seed, "reward", str(epoch)))
        batch = pack_rankings([encoded[i] for i in take_share(rows)], tokenizer.pad_token_id)
        batch = batch.to(reward_model.model.device)
        lr = optimizer.param_groups[0]["lr"] = config.lr * cosine_lr(step, steps, warmup=10)
        optimizer.zero_grad()
        loss, stats = together(lambda batch=batch: combine(*reward_loss(
            reward_model.packed_scores(batch), batch.ranks, batch.mask), len(batch.ranks)))
        check_finite(loss, step, "batch of rankings")
        loss.backward()
        stats["grad_norm"] = nn.utils.clip_grad_norm_(reward_model.parameters(), 1.0).item()
        optimizer.step()
        if last and valid:
            with together.whole():
                scores = score_rankings(reward_model, encoded_valid, tokenizer.pad_token_id)
            stats["valid_loss"] = _mean_loss(scores, valid)
            check_finite(stats["valid_loss"], step, "validation rankings")
        record.log(step, epoch=epoch, lr=lr, **stats)
        bar.update(1, loss=stats["loss"], accuracy=stats["accuracy"])
        record.save(step + 1)
    bar.close()
    together.end()
    return record.history


def encode_rankings(tokenizer, rankings: list[Ranking], config: RewardConfig) -> list[tuple]:
    """Tokenize rankings for `pack_rankings`.

    Raises:
        DataError: if a prompt or response is too long.
    """
    return [encode_ranking(tokenizer, r, config.max_prompt_tokens, config.max_response_tokens)
            for r in rankings]


@torch.no_grad()
def score_rankings(reward_model: RewardModel, encoded: list[tuple], pad_id: int) -> list[Tensor]:
    """Score every response of encoded rankings.

    Returns:
        For each ranking its (K,) scores.
    """
    scores: list[Tensor] = []
    for start in range(0, len(encoded), 32):
        batch = pack_rankings(encoded[start:start + 32], pad_id).to(reward_model.model.device)
        packed = reward_model.packed_scores(batch)
        scores += [row[exists] for row, exists in zip(packed.cpu(), batch.mask.cpu(), strict=True)]
    return scores


def _mean_loss(scores: list[Tensor], rankings: list[Ranking]) -> float:
    losses = [reward_loss(s[None], torch.tensor([r.ranks]), torch.ones(1, len(s)).bool())[0]
              for s, r in zip(scores, rankings, strict=True)]
    return torch.stack(losses).mean().item()


@torch.no_grad()
def center_reward_model(
    reward_model: RewardModel, tokenizer: PreTrainedTokenizerBase,
    demonstrations: list[Demonstration], config: RewardConfig,
) -> float:
    """Shift the head's bias so that the demonstrations score 0 on average.

    The loss fixes differences only; PPO and the score of a missing EOS need a zero.

    Returns:
        The mean score before the shift.

    Source: InstructGPT, section 3.5.
    """
    pairs = [encode_pair(tokenizer, d.prompt, d.response, config.max_prompt_tokens,
                         config.max_response_tokens, where=d.id) for d in demonstrations]
    scores = []
    for start in range(0, len(pairs), 64):
        batch = collate(pairs[start:start + 64], tokenizer.pad_token_id)
        batch = batch.to(reward_model.model.device)
        scores.append(reward_model(batch.input_ids, batch.attention_mask))
    mean = torch.cat(scores).mean()
    reward_model.model.classifier.bias -= mean
    return mean.item()


def compare_pairs(
    scores: list[np.ndarray], targets: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """List all pairs of a prompt whose targets differ, the better one first.

    Args:
        scores: per prompt (K,), higher = better according to the model.
        targets: per prompt (K,), higher = better in truth (a gold score, or minus the rank).

    Returns:
        margins (N,) score of the better minus score of the worse; gaps (N,) the same for targets;
        prompt (N,) index of the prompt.
    """
    margins, gaps, prompts = [], [], []
    for index, (score, target) in enumerate(zip(scores, targets, strict=True)):
        better, worse = np.nonzero(target[:, None] > target[None, :])
        margins.append(score[better] - score[worse])
        gaps.append(target[better] - target[worse])
        prompts.append(np.full(len(better), index))
    if not margins:
        return np.zeros(0), np.zeros(0), np.zeros(0, dtype=int)
    return np.concatenate(margins), np.concatenate(gaps), np.concatenate(prompts)


def compute_accuracy(margins: np.ndarray) -> float:
    """Return the share of pairs in the right order; a margin of 0 counts half.

    >>> compute_accuracy(np.array([1.0, -1.0, 0.0]))
    0.5
    """
    if len(margins) == 0:
        return float("nan")
    return float((np.sign(margins) + 1).mean() / 2)


def compute_calibration(margins: np.ndarray, bins: int = 10) -> list[dict[str, float]]:
    r"""Compare the predicted probability of the preferred order with its frequency.

    Each pair is taken from the side of the response that scores higher, so predictions
    $\sigma(|r_a - r_b|)$ run from 0.5 to 1.

    Args:
        margins: (N,) score of the preferred minus score of the other.
        bins: of equal width on [0.5, 1].

    Returns:
        One row per bin that holds pairs, with `predicted`, `observed`, `pairs`.
    """
    predicted = 1 / (1 + np.exp(-np.abs(margins)))
    right = np.where(margins == 0, 0.5, margins > 0)
    index = np.minimum(((predicted - 0.5) * 2 * bins).astype(int), bins - 1)
    return [{"predicted": float(predicted[index == b].mean()),
             "observed": float(right[index == b].mean()), "pairs": int((index == b).sum())}
            for b in range(bins) if (index == b).any()]
