"""Step 3a: the bandit environment. A prompt comes in, the policy answers, a score comes back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_mini.advantages import compute_gae, compute_rewards
from rlhf_mini.compute import side_by_side
from rlhf_mini.config import PPOConfig
from rlhf_mini.data import DataError, Prompt, TokenBatch, decode_response, encode_prompt, left_pad
from rlhf_mini.decoding import decode
from rlhf_mini.kl import estimate_kl
from rlhf_mini.models import RewardModel, ValueModel, compute_response_logprobs
from rlhf_mini.processes import gather, process_count, take_share
from rlhf_mini.runtime import make_generator
from rlhf_mini.tensors import last_index, masked_mean, masked_var, masked_whiten

# (prompts, responses as text, tokens) -> (B,) scores: a reward model or any function of the text
ScoreFunction = Callable[[list[Prompt], list[str], TokenBatch], Tensor]


@dataclass
class Rollout:
    """One batch of episodes: B prompts, the responses, and what four networks say of them."""

    batch: TokenBatch  # prompts (B, P) and responses (B, T)
    old_logprobs: Tensor  # (B, T) nats, policy that sampled
    ref_logprobs: Tensor  # (B, T) nats, frozen reference
    values: Tensor  # (B, T) value model, before each token
    scores: Tensor  # (B,) score of each whole response
    finished: Tensor  # (B,) bool, True = ended with EOS
    entropy: Tensor  # (B, T) nats, policy that sampled

    def rows(self, index: Tensor) -> Rollout:
        """Return the episodes at `index` (N,) as a rollout of their own."""
        parts = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "batch"}
        batch = TokenBatch(*[getattr(self.batch, f.name)[index] for f in fields(self.batch)])
        return Rollout(batch=batch, **{name: x[index] for name, x in parts.items()})

    def to(self, device: torch.device | str) -> Rollout:
        """Return a copy with every tensor on `device`."""
        return Rollout(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


class PromptSampler:
    """Draws prompts in random order, each once before any comes again.

    The draw of an iteration depends on seed and iteration alone, so a resumed run sees the same.

    Args:
        prompts: to draw from.
        episodes: prompts per draw, B.
        seed: of the order.
    """

    def __init__(self, prompts: list[Prompt], episodes: int, seed: int):
        if not prompts:
            raise ValueError("PPO needs at least one prompt")
        self.prompts, self.episodes, self.seed = prompts, episodes, seed

    def draw(self, iteration: int) -> list[Prompt]:
        """Return the B prompts of an iteration."""
        first = iteration * self.episodes
        return [self._at(i) for i in range(first, first + self.episodes)]

    def _at(self, index: int) -> Prompt:
        epoch, place = divmod(index, len(self.prompts))
        if getattr(self, "_epoch", None) != epoch:
            generator = make_generator(self.seed, "ppo-prompts", str(epoch))
            self._order = torch.randperm(len(self.prompts), generator=generator).tolist()
            self._epoch = epoch
        return self.prompts[self._order[place]]


def score_with(reward_model: RewardModel) -> ScoreFunction:
    """Turn a reward model into a score function."""
    def score(prompts: list[Prompt], responses: list[str], batch: TokenBatch) -> Tensor:
        return reward_model(batch.input_ids, batch.attention_mask)
    return score


@torch.no_grad()
def collect_rollout(
    policy: PreTrainedModel, ref_policy: PreTrainedModel, value_model: ValueModel | None,
    score: ScoreFunction, tokenizer: PreTrainedTokenizerBase, prompts: list[Prompt],
    config: PPOConfig, generator: torch.Generator,
) -> tuple[Rollout, list[str]]:
    """Answer each prompt once and score the answers; several processes share the prompts.

    Args:
        policy: samples the responses; dropout off.
        ref_policy: frozen, usually the SFT model.
        value_model: predicts the return at each token; None: all values are 0.
        score: judges whole responses.
        tokenizer: of all of them.
        prompts: B prompts.
        config: lengths, temperature, the score of a response without EOS.
        generator: source of randomness, on the policy's device.

    Returns:
        The rollout and the responses as text.

    Raises:
        DataError: if a prompt is longer than `max_prompt_tokens`.
    """
    noise = torch.rand(len(prompts), config.max_response_tokens, generator=generator,
                       device=policy.device)
    prompts, noise = take_share(prompts), take_share(noise)
    encoded = [encode_prompt(tokenizer, p.prompt) for p in prompts]
    for prompt, ids in zip(prompts, encoded, strict=True):
        if len(ids) > config.max_prompt_tokens:
            raise DataError(f"{prompt.id}: prompt has {len(ids)} tokens, at most "
                            f"{config.max_prompt_tokens} fit; raise ppo.max_prompt_tokens or "
                            "shorten it")
    prompt_ids, prompt_mask = (x.to(policy.device)
                               for x in left_pad(encoded, tokenizer.pad_token_id))
    response_ids, response_mask, _ = decode(
        policy, prompt_ids, prompt_mask, max_response_tokens=config.max_response_tokens,
        eos_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id,
        temperature=config.temperature, noise=noise)
    batch = TokenBatch(prompt_ids, prompt_mask, response_ids, response_mask)
    last_token = response_ids.gather(1, last_index(response_mask)[:, None])[:, 0]
    finished = last_token == tokenizer.eos_token_id
    responses = [decode_response(tokenizer, ids[mask].tolist())
                 for ids, mask in zip(response_ids, response_mask, strict=True)]
    scores, values = side_by_side(
        policy.device, lambda: score(prompts, responses, batch).float(),
        lambda: value_model(batch) if value_model else batch.response_mask * 0.0)
    (old_logprobs, entropy), (ref_logprobs, _) = side_by_side(
        policy.device, lambda: compute_response_logprobs(policy, batch, config.temperature),
        lambda: compute_response_logprobs(ref_policy, batch, config.temperature, entropy=False))
    rollout = Rollout(
        batch=batch, old_logprobs=old_logprobs, ref_logprobs=ref_logprobs, values=values,
        scores=torch.where(finished, scores, config.missing_eos_score), finished=finished,
        entropy=entropy)
    if process_count() == 1:
        return rollout, responses
    texts = [text for row in zip(*gather(responses), strict=True) for text in row]
    return deal_back(gather(rollout.to("cpu"))).to(policy.device), texts


def deal_back(shares: list[Rollout]) -> Rollout:
    """Join the rollouts of all processes' shares of the prompts, in the order of the prompts.

    Args:
        shares: of each process, with equally many episodes and widths of their own.
    """
    def join(parts: list[Tensor], left: bool = False) -> Tensor:
        width = max(part.shape[-1] for part in parts)
        padded = parts if parts[0].ndim == 1 else [
            F.pad(part, (width - part.shape[1], 0) if left else (0, width - part.shape[1]))
            for part in parts]
        return torch.stack(padded, dim=1).flatten(0, 1)

    batch = TokenBatch(*[join([getattr(s.batch, f.name) for s in shares], "prompt" in f.name)
                         for f in fields(TokenBatch)])
    return replace(shares[0], batch=batch, **{
        f.name: join([getattr(s, f.name) for s in shares]) for f in fields(Rollout)
        if f.name != "batch"})


@dataclass
class Targets:
    """What the update aims at, computed once per rollout."""

    advantages: Tensor  # (B, T), whitened if the config says so
    returns: Tensor  # (B, T), from the advantages before whitening


def compute_targets(rollout: Rollout, kl_coef: float, config: PPOConfig) -> Targets:
    """Turn scores, log-probabilities and values into advantages and returns.

    Args:
        rollout: B episodes.
        kl_coef: the coefficient of the KL penalty at this iteration.
        config: gamma, lambda, whitening.
    """
    mask = rollout.batch.response_mask
    rewards = compute_rewards(rollout.scores, rollout.old_logprobs, rollout.ref_logprobs, mask,
                              kl_coef)
    advantages, returns = compute_gae(rewards, rollout.values, mask, config.gamma,
                                      config.gae_lambda)
    if config.whiten_advantages:
        advantages = masked_whiten(advantages, mask)
    return Targets(advantages, returns)


def compute_rollout_stats(rollout: Rollout, targets: Targets) -> dict[str, float]:
    """Summarise a rollout for the dashboard; every mean over tokens is masked.

    Args:
        rollout: B episodes.
        targets: their advantages and returns.
    """
    mask = rollout.batch.response_mask
    kl = torch.where(mask, estimate_kl(rollout.old_logprobs, rollout.ref_logprobs), 0)
    advantages = targets.returns - rollout.values  # before whitening
    return {
        "score": rollout.scores.mean().item(),
        "score_std": rollout.scores.std().item(),
        "kl_per_sequence": kl.sum(1).mean().item(),
        "kl_per_token": masked_mean(kl, mask).item(),
        "entropy": masked_mean(rollout.entropy, mask).item(),
        "response_tokens": mask.sum(1).float().mean().item(),
        "eos_rate": rollout.finished.float().mean().item(),
        "value_mean": masked_mean(rollout.values, mask).item(),
        "returns_mean": masked_mean(targets.returns, mask).item(),
        "advantage_mean": masked_mean(advantages, mask).item(),
        "advantage_std": masked_var(advantages, mask).sqrt().item(),
        "explained_variance": (
            1 - masked_var(advantages, mask) / masked_var(targets.returns, mask)).item(),
    }
