"""Step 2a: sample K responses per prompt and have them ranked."""

from __future__ import annotations

import random
from collections.abc import Callable

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_mini.config import RankingConfig
from rlhf_mini.data import Prompt, Ranking
from rlhf_mini.generation import sample_responses
from rlhf_mini.runtime import make_generator, make_rng, progress

# (prompt, responses, rng) -> (ranks, 1 = best; true scores or None; the labeler's id or None)
RankFunction = Callable[[Prompt, list[str], random.Random],
                        tuple[tuple[int, ...], tuple[float, ...] | None, int | None]]


def collect_rankings(
    policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[Prompt],
    rank: RankFunction, config: RankingConfig, seed: int,
) -> list[Ranking]:
    """Sample K responses to each prompt, K drawn from `k_low` to `k_high`, and rank them.

    `config.decoys` of the K are responses to other prompts: a reward model that never sees such
    responses does not learn to look at the prompt. A prompt whose responses are all tied says
    nothing and is left out.

    Args:
        policy: the model whose responses are ranked.
        tokenizer: its tokenizer.
        prompts: one ranking each.
        rank: the labelers.
        config: K, temperature, lengths.
        seed: of K, the samples and the labelers' noise.

    Returns:
        Rankings in the order of `prompts`, at most one per prompt.
    """
    rng = make_rng(seed, "rankings")
    wanted = [rng.randint(config.k_low, config.k_high) for _ in prompts]
    owners = [i for i, k in enumerate(wanted) for _ in range(k - config.decoys)]
    bar = progress(len(owners), "rank")
    sampled = sample_responses(
        policy, tokenizer, [prompts[i].prompt for i in owners],
        max_response_tokens=config.max_response_tokens, batch_size=config.batch_size,
        temperature=config.temperature, on_batch=bar.update,
        generator=make_generator(seed, "rankings", device=policy.device))
    bar.close()
    responses: list[list[str]] = [[] for _ in prompts]
    for i, response in zip(owners, sampled, strict=True):
        if response.text:
            responses[i].append(response.text)
    rankings = []
    for i, prompt in enumerate(prompts):
        own = responses[i]
        decoys = _draw_decoys(responses, i, config.decoys, rng)
        if len(own) + len(decoys) < 2:
            continue
        ranks, gold, labeler = rank(prompt, own + decoys, rng)
        if max(ranks) > 1:
            rankings.append(Ranking(
                id=f"{prompt.id}-ranking", prompt=prompt.prompt, responses=tuple(own + decoys),
                ranks=ranks, split=prompt.split, labeler=labeler, gold=gold,
                decoys=(False,) * len(own) + (True,) * len(decoys)))
    return rankings


def _draw_decoys(
    responses: list[list[str]], owner: int, count: int, rng: random.Random
) -> list[str]:
    others = [i for i in rng.sample(range(len(responses)), min(len(responses), 4 * count + 4))
              if i != owner and responses[i]]
    decoys = [rng.choice(responses[i]) for i in others]
    return [text for text in dict.fromkeys(decoys) if text not in responses[owner]][:count]
