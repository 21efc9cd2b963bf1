"""Beside PPO: direct preference optimisation, in which the policy is its own reward model.

No reward model, no sampling, no value model: the rankings are all it sees.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_mini.config import RewardConfig
from rlhf_mini.data import PackedRankings, Ranking, pack_rankings
from rlhf_mini.models import compute_token_logprobs, run_layers
from rlhf_mini.reward import encode_rankings, reward_loss
from rlhf_mini.runtime import check_finite, make_generator, progress
from rlhf_mini.tensors import masked_mean, unmask
from rlhf_mini.training import cosine_lr, epoch_batch


def dpo_loss(
    logprobs: Tensor, ref_logprobs: Tensor, ranks: Tensor, mask: Tensor, beta: float
) -> tuple[Tensor, dict[str, float]]:
    r"""Compute `reward_loss` of the implicit rewards $\beta\log(\pi(y|x)/\pi_\mathrm{ref}(y|x))$.

    With two responses this is $-\log\sigma(\beta\log\frac{\pi(y_w)}{\pi_\mathrm{ref}(y_w)} -
    \beta\log\frac{\pi(y_l)}{\pi_\mathrm{ref}(y_l)})$, with K the mean over all untied pairs.

    Args:
        logprobs: (B, K) nats, of whole responses under the policy.
        ref_logprobs: (B, K) nats, the same under the reference.
        ranks: (B, K) int, 1 = best, equal = tie.
        mask: (B, K) bool, True = the response exists.
        beta: coefficient of the KL penalty in the objective that the loss stands for.

    Returns:
        Scalar loss in nats per pair; stats `loss`, `accuracy` and `margin` of the implicit rewards,
        and in nats per response `log_ratio`, the mean of $\log(\pi/\pi_\mathrm{ref})$ (where the
        reference wrote the responses: minus an estimate of $\mathrm{KL}(\pi_\mathrm{ref}\|\pi)$),
        and `log_ratio_best`, that of the best.

    Raises:
        ValueError: if a prompt has no untied pair.

    Source: Rafailov et al. 2023 (arXiv 2305.18290), equation 7.
    """
    log_ratio = torch.where(mask, logprobs - ref_logprobs, 0)
    loss, stats = reward_loss(beta * log_ratio, ranks, mask)
    best = mask & (ranks == 1)
    return loss, stats | {"log_ratio": masked_mean(log_ratio, mask).item(),
                          "log_ratio_best": masked_mean(log_ratio, best).item()}


def sum_logprobs(policy: PreTrainedModel, batch: PackedRankings) -> Tensor:
    r"""Sum $\log\pi$ over the tokens of each response, EOS included.

    Args:
        policy: causal language model.
        batch: B rankings, each in one row: the prompt once, then its responses, which do not see
            each other.

    Returns:
        (B, K) nats, 0 where there is no response.
    """
    segments = batch.segments
    columns = torch.arange(segments.shape[1], device=segments.device)
    key, query = segments[:, None, :], segments[:, :, None]
    visible = (columns <= columns[:, None]) & ((key == 0) | (key == query))
    hidden = run_layers(policy, batch.input_ids, batch.position_ids, visible)
    # A token is predicted by the one before it, the first of a response by the prompt's last.
    token = segments > 0
    first = token & (segments != segments.roll(1, dims=1))
    before = torch.where(first, (segments == 0).sum(1, keepdim=True) - 1, columns - 1)
    rows = torch.arange(len(segments), device=segments.device)[:, None]
    logprobs, _ = compute_token_logprobs(policy, hidden[rows, before][token],
                                         batch.input_ids[token])
    sums = torch.zeros(len(segments), int(segments.max()) + 1, device=segments.device)
    sums = sums.scatter_add(1, segments.clamp(min=0), unmask(logprobs, token))
    return sums.gather(1, segments.gather(1, batch.end_index))


@torch.no_grad()
def compute_ref_logprobs(
    policy: PreTrainedModel, encoded: list[tuple], pad_id: int
) -> list[Tensor]:
    """Return of each encoded ranking the (K,) log-probabilities of its responses, in nats."""
    found: list[Tensor] = []
    for start in range(0, len(encoded), 32):
        batch = pack_rankings(encoded[start:start + 32], pad_id).to(policy.device)
        found += [row[exists] for row, exists in zip(sum_logprobs(policy, batch), batch.mask,
                                                     strict=True)]
    return found


def train_dpo(
    policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rankings: list[Ranking],
    config: RewardConfig, beta: float, seed: int,
) -> list[dict]:
    """Train the policy on rankings, in place; the start policy is the reference.

    The reference's log-probabilities are computed once, while the policy still is the reference,
    so no second network is held. Settings are those of a reward model, which learns from the same.

    Args:
        policy: the SFT model; dropout stays off.
        tokenizer: its tokenizer.
        rankings: to learn from; each is one element of a batch, with all its pairs.
        config: epochs, batch size, learning rate (cosine to 10 %), weight decay, lengths.
        beta: above 0; the smaller, the farther the policy may go.
        seed: of the order.

    Returns:
        The metrics of each step.

    Raises:
        ValueError: if beta is not above 0, there are no rankings, one is too long or has no untied
            pair, or the loss is not finite.
    """
    if not beta > 0:
        raise ValueError(f"beta = {beta}: expected a number above 0, DPO divides by it")
    if not rankings:
        raise ValueError("there are no rankings to train on")
    encoded, pad_id = encode_rankings(tokenizer, rankings, config), tokenizer.pad_token_id
    lengths = [len(prompt) + sum(map(len, responses)) for prompt, responses, _ in encoded]
    policy.eval()  # no dropout
    reference = compute_ref_logprobs(policy, encoded, pad_id)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.lr,
                                  weight_decay=config.weight_decay, fused=True)
    steps = config.epochs * -(-len(encoded) // config.batch_size)
    bar, history = progress(steps, "dpo"), []
    for step in range(steps):
        epoch, rows, _ = epoch_batch(step, lengths, config.batch_size,
                                     lambda epoch: make_generator(seed, "dpo", str(epoch)))
        lr = optimizer.param_groups[0]["lr"] = config.lr * cosine_lr(step, steps, warmup=10)
        batch = pack_rankings([encoded[i] for i in rows], pad_id).to(policy.device)
        ref_logprobs = unmask(torch.cat([reference[i] for i in rows]), batch.mask)
        loss, stats = dpo_loss(sum_logprobs(policy, batch), ref_logprobs, batch.ranks, batch.mask,
                               beta)
        check_finite(loss, step, "batch of rankings")
        optimizer.zero_grad()
        loss.backward()
        stats["grad_norm"] = nn.utils.clip_grad_norm_(policy.parameters(), 1.0).item()
        optimizer.step()
        history.append({"step": step, "epoch": epoch, "lr": lr} | stats)
        bar.update(1, loss=stats["loss"], accuracy=stats["accuracy"])
    bar.close()
    return history
