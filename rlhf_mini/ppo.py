"""Step 3b: proximal policy optimisation, and the pretraining mix (PPO-ptx).

Departures from InstructGPT: the value loss has its own optimiser group, the pretraining loss is a
mean over tokens (so `ptx_coef` is near 1 and not 27.8), and prompts need not all be new.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_mini.compute import one_thread
from rlhf_mini.config import PPOConfig
from rlhf_mini.data import Prompt
from rlhf_mini.kl import KLController
from rlhf_mini.models import ValueModel, compute_response_logprobs, copy_weights, freeze
from rlhf_mini.pretrain import lm_loss
from rlhf_mini.processes import Together, check_shares, combine, run_backward, take_share
from rlhf_mini.rollout import (
    PromptSampler,
    Rollout,
    ScoreFunction,
    Targets,
    collect_rollout,
    compute_rollout_stats,
    compute_targets,
)
from rlhf_mini.runtime import check_finite, make_generator, progress
from rlhf_mini.tensors import masked_mean
from rlhf_mini.training import TrainingRecord, warmup_factor


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, response_mask: Tensor,
    clip_range: float,
) -> tuple[Tensor, dict[str, float]]:
    r"""Compute $\mathrm{mean}\,\max(-A\rho, -A\,\mathrm{clip}(\rho, 1-\epsilon, 1+\epsilon))$.

    $\rho = \pi(a)/\pi_\mathrm{old}(a)$; where the clip binds, the gradient is 0.

    Args:
        logprobs: (B, T) nats, current policy.
        old_logprobs: (B, T) nats, policy at rollout.
        advantages: (B, T).
        response_mask: (B, T) bool.
        clip_range: $\epsilon$.

    Returns:
        Scalar loss; stats `policy_loss`, `approx_kl` (nats per token, from the rollout policy to
        the current one, k3), `clip_fraction`, `ratio_mean`, `ratio_min`, `ratio_max`.

    Source: Schulman et al. 2017 (arXiv 1707.06347), equation 7.
    """
    log_ratio = torch.where(response_mask, logprobs - old_logprobs, 0)
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = masked_mean(torch.max(unclipped, clipped), response_mask)
    with torch.no_grad():
        stats = {
            "policy_loss": loss.item(),
            "approx_kl": masked_mean(torch.expm1(log_ratio) - log_ratio, response_mask).item(),
            "clip_fraction": masked_mean((clipped > unclipped).float(), response_mask).item(),
            "ratio_mean": masked_mean(ratio, response_mask).item(),
            "ratio_min": torch.where(response_mask, ratio, torch.inf).min().item(),
            "ratio_max": torch.where(response_mask, ratio, 0).max().item(),
        }
    return loss, stats


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, response_mask: Tensor,
    value_clip_range: float,
) -> tuple[Tensor, dict[str, float]]:
    r"""Compute $\frac12\,\mathrm{mean}\max\big((V-R)^2, (V_\mathrm{clip}-R)^2\big)$.

    $V_\mathrm{clip}$ is $V$ kept within $V_\mathrm{old}\pm\epsilon_v$.

    Args:
        values: (B, T), current value model.
        old_values: (B, T), at rollout.
        returns: (B, T).
        response_mask: (B, T) bool.
        value_clip_range: $\epsilon_v$, in units of the score.

    Returns:
        Scalar loss; stats `value_loss`, `value_clip_fraction`.

    Source: Huang et al. 2024 (arXiv 2403.17031), detail 20.
    """
    real = [torch.where(response_mask, x, 0) for x in (values, old_values, returns)]
    values, old_values, returns = real  # a gradient through (inf - R)**2 would be nan
    near = values.clamp(old_values - value_clip_range, old_values + value_clip_range)
    unclipped, clipped = (values - returns) ** 2, (near - returns) ** 2
    loss = 0.5 * masked_mean(torch.max(unclipped, clipped), response_mask)
    bound = masked_mean((clipped > unclipped).float(), response_mask)
    return loss, {"value_loss": loss.item(), "value_clip_fraction": bound.item()}


def ptx_loss(policy: PreTrainedModel, rows: Tensor) -> tuple[Tensor, dict[str, float]]:
    r"""Compute the pretraining loss $-\mathrm{mean}\log\pi(x_t\mid x_{<t})$ of PPO-ptx.

    Args:
        policy: current policy.
        rows: (N, L) int, corpus text.

    Returns:
        Scalar loss in nats per token, and stats.

    Source: InstructGPT, equation 2, as a mean over tokens.
    """
    loss = lm_loss(policy, rows)
    return loss, {"ptx_loss": loss.item()}


def build_optimizer(
    policy: PreTrainedModel, value_model: ValueModel, config: PPOConfig
) -> torch.optim.Optimizer:
    """Return one Adam with two groups, policy and value model, each with its learning rate."""
    return torch.optim.Adam([{"params": list(policy.parameters()), "lr": config.lr},
                             {"params": list(value_model.parameters()), "lr": config.value_lr}],
                            eps=config.adam_eps, fused=True)


def update_minibatch(
    policy: PreTrainedModel, value_model: ValueModel, optimizer: torch.optim.Optimizer,
    rollout: Rollout, targets: Targets, config: PPOConfig, ptx_rows: Tensor | None, step: int,
    together: Together | None = None,
) -> dict[str, float]:
    """Take one optimiser step on a minibatch of episodes.

    Args:
        policy: current policy, dropout off.
        value_model: current value model.
        optimizer: from `build_optimizer`.
        rollout: the minibatch.
        targets: its advantages and returns.
        config: clip ranges and coefficients.
        ptx_rows: (N, L) corpus text, or None without pretraining mix.
        step: iteration, for the message of a non-finite loss.
        together: policy and value model, if several processes train them.

    Returns:
        Stats of the losses and gradients before the step.

    Raises:
        NonFiniteLoss: before anything was changed.
    """
    batch, mask = rollout.batch, rollout.batch.response_mask

    def policy_side() -> tuple[Tensor, dict[str, float]]:
        logprobs, _ = compute_response_logprobs(policy, batch, config.temperature, entropy=False)
        return combine(*policy_loss(logprobs, rollout.old_logprobs, targets.advantages, mask,
                                    config.clip_range), mask.sum())

    def value_side() -> tuple[Tensor, dict[str, float]]:
        loss, stats = combine(*value_loss(value_model(batch), rollout.values, targets.returns, mask,
                                          config.value_clip_range), mask.sum())
        return config.vf_coef * loss, stats

    def ptx_side() -> tuple[Tensor, dict[str, float]]:
        loss, stats = combine(*ptx_loss(policy, ptx_rows), len(ptx_rows))
        return config.ptx_coef * loss, stats

    sides = [policy_side, value_side] if ptx_rows is None else [ptx_side, policy_side, value_side]
    optimizer.zero_grad()
    found, (norm, _) = run_backward(
        together or Together([policy, value_model], [optimizer]), sides, [policy, value_model],
        config.max_grad_norm)
    stats = {name: value for part in found for name, value in part.items()}
    stats["loss"] = (stats["policy_loss"] + config.vf_coef * stats["value_loss"]
                     + config.ptx_coef * stats.get("ptx_loss", 0.0))
    check_finite(stats["loss"], step, "PPO minibatch")
    with one_thread(mask.device):
        optimizer.step()
    return stats | {"grad_norm": norm.item()}


def update(
    policy: PreTrainedModel, value_model: ValueModel, optimizer: torch.optim.Optimizer,
    rollout: Rollout, targets: Targets, config: PPOConfig, generator: torch.Generator,
    ptx_rows: Tensor | None = None, step: int = 0, together: Together | None = None,
) -> dict[str, float]:
    """Go over the rollout `config.epochs` times in random minibatches.

    Args:
        policy, value_model, optimizer: what is updated, in place.
        rollout: B episodes.
        targets: their advantages and returns.
        config: epochs, minibatches, `update_kl_stop`.
        generator: of the minibatches, on the CPU.
        ptx_rows: (N, L) corpus text, split over the minibatches; None without pretraining mix.
        step: iteration, for messages.
        together: policy and value model, if several processes train them.

    Returns:
        Means of the stats over the minibatches; `first_ratio_error` is max |ratio - 1| of the first
        one, which must be 0 up to rounding.
    """
    history: list[dict[str, float]] = []
    episodes = len(rollout.scores)
    size = episodes // config.minibatches
    steps = config.epochs * config.minibatches
    together = together or Together([policy, value_model], [optimizer])
    chunks = [None] * steps if ptx_rows is None else [
        take_share(rows) for rows in ptx_rows.tensor_split(steps)]
    for epoch in range(config.epochs):
        order = torch.randperm(episodes, generator=generator).to(rollout.scores.device)
        for i in range(config.minibatches):
            rows = take_share(order[i * size:(i + 1) * size])
            part = Targets(targets.advantages[rows], targets.returns[rows])
            stats = update_minibatch(policy, value_model, optimizer, rollout.rows(rows), part,
                                     config, chunks[epoch * config.minibatches + i], step,
                                     together)
            history.append(stats)
        if 0 < config.update_kl_stop < history[-1]["approx_kl"]:
            break
    first = history[0]
    means = {name: sum(h[name] for h in history) / len(history) for name in first}
    return means | {"ratio_min": min(h["ratio_min"] for h in history),
                    "ratio_max": max(h["ratio_max"] for h in history),
                    "first_ratio_error": max(first["ratio_max"] - 1, 1 - first["ratio_min"])}


@torch.no_grad()
def update_ema(average: nn.Module, model: nn.Module, decay: float) -> None:
    r"""Move averaged weights towards the model's, $\bar\theta\leftarrow d\bar\theta+(1-d)\theta$.

    Args:
        average: changed in place.
        model: the current weights.
        decay: d, from 0 to 1.
    """
    for mean, current in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(current, 1 - decay)


def train_ppo(
    policy: PreTrainedModel, value_model: ValueModel, score: ScoreFunction,
    tokenizer: PreTrainedTokenizerBase, prompts: list[Prompt], config: PPOConfig, seed: int,
    corpus_rows: Tensor | None = None, directory: Path | None = None,
    grade: Callable[[Prompt, str], float] | None = None,
) -> list[dict]:
    """Optimise the policy against the score, in place; the start policy is the reference.

    Args:
        policy: the SFT model. Afterwards: the trained one, averaged if `ema_decay` > 0.
        value_model: starts from the reward model.
        score: a reward model (`score_with`) or any function of the responses.
        tokenizer: of all of them.
        prompts: the environment's prompts.
        config: settings.
        seed: of prompts, samples and minibatches.
        corpus_rows: (N, L) corpus text, needed if `ptx_coef` > 0.
        directory: where checkpoints and metrics go; None keeps nothing on disk.
        grade: true score of a response, logged as `gold` and never trained on.

    Returns:
        The metrics of each iteration.

    Raises:
        ValueError: if ptx_coef lacks a corpus, a prompt is too long, or a loss is not finite.
    """
    _check(config, corpus_rows)
    ref_policy, average = freeze(policy), freeze(policy) if config.ema_decay > 0 else policy
    optimizer = build_optimizer(policy, value_model, config)
    models = dict(policy=policy, value_model=value_model, ref_policy=ref_policy, average=average)
    record = TrainingRecord(directory, models, {"adam": optimizer}, config.checkpoint_every)
    first, kept = record.restore(kl_coef=config.kl_coef, stopped=False)
    controller = KLController(kept["kl_coef"], config.kl_target, config.kl_horizon)
    sampler = PromptSampler(prompts, config.episodes, seed)
    bar = progress(config.iterations, "ppo", first)
    together = Together([policy, value_model], [optimizer])
    for iteration in range(first, config.iterations):
        if kept["stopped"]:
            break
        drawn = sampler.draw(iteration)
        with together.whole():
            rollout, responses = collect_rollout(
                policy, ref_policy, value_model, score, tokenizer, drawn, config,
                make_generator(seed, "rollout", str(iteration), device=policy.device))
        targets = compute_targets(rollout, controller.kl_coef, config)
        stats = compute_rollout_stats(rollout, targets) | {"kl_coef": controller.kl_coef}
        stats |= {"gold": sum(map(grade, drawn, responses)) / len(drawn)} if grade else {}
        kept["stopped"] = 0 < config.kl_stop < stats["kl_per_sequence"]
        if not kept["stopped"]:
            stats |= _learn(policy, value_model, average, optimizer, rollout, targets, config,
                            corpus_rows, seed, iteration, together)
            controller.update(stats["kl_per_sequence"], config.episodes)
        record.log(iteration, **stats)
        bar.update(1, **{n: stats[n] for n in ("score", "gold", "kl_per_sequence") if n in stats})
        record.save(iteration + 1, kl_coef=controller.kl_coef, stopped=kept["stopped"])
    bar.close()
    together.end()
    copy_weights(policy, average)
    return record.history


def _check(config: PPOConfig, corpus_rows: Tensor | None) -> None:
    check_shares(**{"ppo.episodes / ppo.minibatches": config.episodes // config.minibatches})
    if config.ptx_coef > 0 and corpus_rows is None:
        raise ValueError("ptx_coef > 0 mixes in pretraining text, and there is none: give a corpus "
                         "or set ptx_coef=0")
    if config.ptx_coef > 0:
        check_shares(ppo__ptx_rows=config.ptx_rows)


def _learn(policy, value_model, average, optimizer, rollout, targets, config: PPOConfig,
           corpus_rows, seed: int, iteration: int, together: Together) -> dict[str, float]:
    generator = make_generator(seed, "minibatches", str(iteration))
    factor = warmup_factor(iteration, config.warmup_iterations)
    for group, peak in zip(optimizer.param_groups, (config.lr, config.value_lr), strict=True):
        group["lr"] = peak * factor
    ptx_rows = _draw_ptx_rows(corpus_rows, config, generator, policy.device)
    stats = update(policy, value_model, optimizer, rollout, targets, config, generator, ptx_rows,
                   iteration, together)
    with together.whole():
        update_ema(average, policy, config.ema_decay)
    return stats | {"lr": config.lr * factor}


def _draw_ptx_rows(corpus_rows, config: PPOConfig, generator, device) -> Tensor | None:
    if config.ptx_coef == 0:
        return None
    count = config.ptx_rows * config.epochs * config.minibatches
    index = torch.randint(len(corpus_rows), (count,), generator=generator)
    return corpus_rows[index].to(device)
