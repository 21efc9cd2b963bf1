"""Beside PPO: REINFORCE with a leave-one-out baseline, several samples instead of a value model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_mini.advantages import compute_rewards
from rlhf_mini.config import PPOConfig
from rlhf_mini.data import Prompt
from rlhf_mini.models import compute_response_logprobs, freeze
from rlhf_mini.rollout import PromptSampler, Rollout, ScoreFunction, collect_rollout
from rlhf_mini.runtime import check_finite, make_generator, progress
from rlhf_mini.training import warmup_factor


def rloo_advantages(returns: Tensor, samples: int) -> Tensor:
    r"""Compare each response with the others to its prompt, $A_i = R_i - \frac1{k-1}\sum_{j\ne
    i}R_j$.

    The others are independent of response i, so their mean is a baseline without bias.

    Args:
        returns: (B,) of whole responses, the k responses to a prompt side by side.
        samples: k, at least 2.

    Returns:
        (B,) advantages; those of a prompt add up to 0.

    Raises:
        ValueError: if k is below 2 or does not divide B.

    Source: Kool et al. 2019, equation 8; Ahmadian et al. 2024 (arXiv 2402.14740), section 3.

    >>> rloo_advantages(torch.tensor([1.0, 0.0, 5.0, 5.0]), 2).tolist()
    [1.0, -1.0, 0.0, 0.0]
    """
    if samples < 2:
        raise ValueError(f"samples = {samples}: expected at least 2 responses per prompt, a single "
                         "one has no others to be compared with")
    if len(returns) % samples:
        raise ValueError(f"{len(returns)} episodes are no multiple of samples = {samples}")
    groups = returns.view(-1, samples)
    return (samples / (samples - 1) * (groups - groups.mean(1, keepdim=True))).flatten()


def rloo_loss(
    logprobs: Tensor, advantages: Tensor, response_mask: Tensor
) -> tuple[Tensor, dict[str, float]]:
    r"""Compute $-\frac1B\sum_b A_b\sum_t m_{bt}\log\pi(y_{bt}\mid x_b, y_{b,<t})$.

    The whole response is one action. The sum over its tokens is not divided by their number: only
    so is the gradient an unbiased estimate of that of the expected return.

    Args:
        logprobs: (B, T) nats, under the policy that sampled the responses.
        advantages: (B,), one number per response.
        response_mask: (B, T) bool, EOS included.

    Returns:
        Scalar loss, of which only the gradient has a meaning, and stats.

    Source: Williams 1992; Ahmadian et al. 2024 (arXiv 2402.14740), equation 6.
    """
    sequence = torch.where(response_mask, logprobs, 0).sum(1)
    loss = -(advantages * sequence).mean()
    return loss, {"policy_loss": loss.item()}


def compute_returns(rollout: Rollout, kl_coef: float) -> Tensor:
    """Return score minus KL penalty of each response (B,): the sum of PPO's rewards."""
    return compute_rewards(rollout.scores, rollout.old_logprobs, rollout.ref_logprobs,
                           rollout.batch.response_mask, kl_coef).sum(1)


def train_rloo(
    policy: PreTrainedModel, score: ScoreFunction, tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt], config: PPOConfig, samples: int, seed: int,
    grade: Callable[[Prompt, str], float] | None = None,
) -> list[dict]:
    """Optimise the policy against the score, in place; the start policy is the reference.

    Each iteration answers `config.episodes / samples` prompts `samples` times and takes one step.
    So the responses always come from the policy that learns from them: no ratio, no clip.

    Args:
        policy: the SFT model, dropout off.
        score: a reward model (`score_with`) or any function of the responses.
        tokenizer: of both.
        prompts: the environment's prompts.
        config: iterations, episodes, lr, warm-up, kl_coef, lengths; what concerns value model,
            epochs and minibatches, pretraining text or average is not used.
        samples: k, responses per prompt.
        seed: of prompts and samples.
        grade: true score of a response, logged as `gold` and never trained on.

    Returns:
        The metrics of each iteration.

    Raises:
        ValueError: if k is below 2 or does not divide `config.episodes`, a prompt is too long, or
            the loss is not finite.
    """
    rloo_advantages(torch.zeros(config.episodes), samples)  # refuses numbers that do not fit
    ref_policy = freeze(policy)
    optimizer = torch.optim.Adam(policy.parameters(), eps=config.adam_eps, fused=True)
    sampler = PromptSampler(prompts, config.episodes // samples, seed)
    bar, history = progress(config.iterations, "rloo"), []
    for iteration in range(config.iterations):
        drawn = [prompt for prompt in sampler.draw(iteration) for _ in range(samples)]
        rollout, responses = collect_rollout(
            policy, ref_policy, None, score, tokenizer, drawn, config,
            make_generator(seed, "rollout", str(iteration), device=policy.device))
        advantages = rloo_advantages(compute_returns(rollout, config.kl_coef), samples)
        stats = _summarise(rollout) | {"advantage_std": advantages.std().item()}
        if grade:
            stats["gold"] = sum(map(grade, drawn, responses)) / len(drawn)
        optimizer.param_groups[0]["lr"] = config.lr * warmup_factor(iteration,
                                                                    config.warmup_iterations)
        stats |= _step(policy, optimizer, rollout, advantages, config, iteration)
        history.append({"step": iteration} | stats)
        bar.update(1, **{n: stats[n] for n in ("score", "gold", "kl_per_sequence") if n in stats})
    bar.close()
    return history


def _step(policy, optimizer, rollout: Rollout, advantages: Tensor, config: PPOConfig,
          iteration: int) -> dict[str, float]:
    logprobs, _ = compute_response_logprobs(policy, rollout.batch, config.temperature,
                                            entropy=False)
    loss, stats = rloo_loss(logprobs, advantages, rollout.batch.response_mask)
    check_finite(loss, iteration, "RLOO batch")
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
    optimizer.step()
    return stats | {"grad_norm": norm.item()}


def _summarise(rollout: Rollout) -> dict[str, float]:
    mask = rollout.batch.response_mask
    log_ratio = torch.where(mask, rollout.old_logprobs - rollout.ref_logprobs, 0)
    return {"score": rollout.scores.mean().item(),
            "kl_per_sequence": log_ratio.sum(1).mean().item(),
            "response_tokens": mask.sum(1).float().mean().item(),
            "eos_rate": rollout.finished.float().mean().item()}
