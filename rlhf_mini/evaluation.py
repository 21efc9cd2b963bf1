"""Step 4: judge policies on held-out customers, in gold, in wins, in KL, and on zero-shot tasks."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_mini.config import EvaluationConfig, RewardConfig
from rlhf_mini.data import Document, Prompt, Ranking, ZeroShotItem, collate, encode_prompt
from rlhf_mini.generation import Response, sample_responses
from rlhf_mini.kl import compute_exact_kl
from rlhf_mini.models import LOGITS_TOGETHER, RewardModel, compute_response_logits
from rlhf_mini.reward import compare_pairs, compute_calibration, encode_rankings, score_rankings
from rlhf_mini.runtime import make_generator
from rlhf_mini.tensors import gather_logprobs, masked_mean, unmask

# (prompt, response) -> true scores by name, e.g. gold, helpful, truthful, harmless
GradeFunction = Callable[[Prompt, str], dict[str, float]]


@dataclass
class Evaluation:
    """What a policy answered to N prompts, S times each, and how good it was."""

    responses: list[list[str]]  # N x S texts
    measures: dict[str, np.ndarray]  # each (N, S): gold, kl, rm_score, ...


def mean_interval(values: np.ndarray, config: EvaluationConfig) -> dict[str, float]:
    """Return the mean over prompts with a percentile bootstrap interval.

    Args:
        values: (N,) or (N, S); samples of one prompt are averaged first and stay together.
        config: number of resamples and confidence.

    Returns:
        `mean`, `low`, `high`.
    """
    from scipy.stats import bootstrap  # slow to import
    values = np.asarray(values, dtype=float)
    per_prompt = values.mean(1) if values.ndim == 2 else values
    mean = float(per_prompt.mean())
    if len(per_prompt) < 2 or per_prompt.std() == 0:
        return {"mean": mean, "low": mean, "high": mean}
    interval = bootstrap(
        (per_prompt,), np.mean, n_resamples=config.bootstrap, method="percentile", batch=200,
        confidence_level=config.confidence, rng=np.random.default_rng(0)).confidence_interval
    return {"mean": mean, "low": float(interval.low), "high": float(interval.high)}


def ratio_interval(
    counts: np.ndarray, totals: np.ndarray, config: EvaluationConfig
) -> dict[str, float]:
    """Return sum(counts) / sum(totals) with a percentile bootstrap interval over prompts.

    Args:
        counts: (N,) e.g. pairs of a prompt in the right order.
        totals: (N,) e.g. all pairs of the prompt; not all 0.
        config: number of resamples and confidence.

    Returns:
        `mean`, `low`, `high`, and `pairs` (the sum of totals).
    """
    counts, totals = np.asarray(counts, dtype=float), np.asarray(totals, dtype=float)
    rows = np.random.default_rng(0).integers(len(counts), size=(config.bootstrap, len(counts)))
    sums = totals[rows].sum(1)
    ratios = counts[rows].sum(1)[sums > 0] / sums[sums > 0]
    tail = 50 * (1 - config.confidence)
    low, high = np.percentile(ratios, [tail, 100 - tail])
    return {"mean": float(counts.sum() / totals.sum()), "low": float(low), "high": float(high),
            "pairs": int(totals.sum())}


def compute_pair_accuracy(
    scores: list[np.ndarray], targets: list[np.ndarray], keep: list[np.ndarray],
    config: EvaluationConfig,
) -> dict[str, float] | None:
    """Count the pairs of a prompt that scores and targets put in the same order.

    Args:
        scores: per prompt (K,), higher = better; an equal score counts half.
        targets: per prompt (K,), higher = better; pairs with equal targets are left out.
        keep: per prompt (K, K) bool, the pairs that count.
        config: for the interval over prompts.

    Returns:
        `mean`, `low`, `high`, `pairs`; None if no pair counts.
    """
    right, pairs = [], []
    for score, target, counted in zip(scores, targets, keep, strict=True):
        better, worse = np.nonzero((target[:, None] > target[None, :]) & counted)
        right.append(((np.sign(score[better] - score[worse]) + 1) / 2).sum())
        pairs.append(len(better))
    return ratio_interval(np.array(right), np.array(pairs), config) if sum(pairs) else None


def measure_reward_model(
    reward_model: RewardModel, tokenizer: PreTrainedTokenizerBase, rankings: list[Ranking],
    limits: RewardConfig, config: EvaluationConfig,
) -> dict[str, object]:
    """Compare a reward model with labelers and, where it is known, with the true score.

    Pairs with a decoy count in `accuracy_decoys` only; the other numbers are about responses of
    the policy to the prompt itself.

    Args:
        reward_model: what is judged.
        tokenizer: its tokenizer.
        rankings: held-out ones.
        limits: `max_prompt_tokens` and `max_response_tokens`.
        config: for intervals.

    Returns:
        `accuracy_labelers`, `accuracy_gold`, `accuracy_length_baseline` (the better of "shorter
        wins" and "longer wins", against gold or else labels), `labelers_gold`, `accuracy_decoys`,
        each as `compute_pair_accuracy`; `calibration` against the labels. What the rankings cannot
        tell is left out.
    """
    encoded = encode_rankings(tokenizer, rankings, limits)
    scores = [s.double().numpy()
              for s in score_rankings(reward_model, encoded, tokenizer.pad_token_id)]
    lengths = [np.array([float(len(ids)) for ids in responses]) for _, responses, _ in encoded]
    labels = [-np.array(r.ranks, dtype=float) for r in rankings]
    decoys = [np.array(r.decoys or (False,) * len(r.ranks)) for r in rankings]
    own = [~(d[:, None] | d[None, :]) for d in decoys]
    known = all(r.gold is not None for r in rankings)
    truth = [np.array(r.gold, dtype=float) for r in rankings] if known else labels
    results = {
        "accuracy_labelers": compute_pair_accuracy(scores, labels, own, config),
        "accuracy_length_baseline": max(
            (compute_pair_accuracy([sign * n for n in lengths], truth, own, config)
             for sign in (-1, 1)), key=lambda result: result["mean"] if result else 0),
        "accuracy_decoys": compute_pair_accuracy(
            scores, truth, [d[:, None] ^ d[None, :] for d in decoys], config),
    }
    if known:
        results["accuracy_gold"] = compute_pair_accuracy(scores, truth, own, config)
        results["labelers_gold"] = compute_pair_accuracy(labels, truth, own, config)
    margins, _, _ = compare_pairs([s[~d] for s, d in zip(scores, decoys, strict=True)],
                                  [x[~d] for x, d in zip(labels, decoys, strict=True)])
    results = {name: result for name, result in results.items() if result}
    return results | {"calibration": compute_calibration(margins), "prompts": len(rankings)}


def compute_win_rate(
    ours: np.ndarray, theirs: np.ndarray, config: EvaluationConfig
) -> dict[str, float]:
    """Compare two policies prompt by prompt; a tie counts half.

    Args:
        ours: (N, S) judgements, higher = better.
        theirs: (N, S) judgements of the other policy on the same prompts.
        config: for the interval over prompts.

    Returns:
        `mean`, `low`, `high` of the win rate, `ties` (share), and `without_ties` (wins among the
        decided comparisons; 0.5 if there are none).
    """
    wins, ties, decided = (np.mean(x) for x in (ours > theirs, ours == theirs, ours != theirs))
    rate = mean_interval((ours > theirs) + 0.5 * (ours == theirs), config)
    return rate | {"ties": float(ties),
                   "without_ties": float(wins / decided) if decided > 0 else 0.5}


def evaluate_policy(
    policy: PreTrainedModel, ref_policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt], grade: GradeFunction | None, reward_model: RewardModel | None,
    config: EvaluationConfig, seed: int, greedy: bool = False,
) -> Evaluation:
    """Let a policy answer held-out prompts and measure the answers.

    Args:
        policy: what is judged.
        ref_policy: the SFT model, for the KL.
        tokenizer: of both.
        prompts: N prompts of held-out customers.
        grade: the gold grader; None where the truth is unknown.
        reward_model: for `rm_score`; None leaves it out.
        config: samples per prompt, lengths.
        seed: of the samples; the same seed for all policies pairs them.
        greedy: take the likeliest token (one sample per prompt) instead of sampling at T = 1.

    Returns:
        Responses and measures. `kl` is the exact per-token KL to the reference summed along each
        response, in nats.
    """
    samples = 1 if greedy else config.samples
    repeated = [p for p in prompts for _ in range(samples)]
    sampled = sample_responses(
        policy, tokenizer, [p.prompt for p in repeated],
        max_response_tokens=config.max_response_tokens, batch_size=config.batch_size,
        temperature=0.0 if greedy else 1.0,
        generator=make_generator(seed, "evaluation", device=policy.device))
    measures = {
        "response_tokens": [len(r.token_ids) for r in sampled],
        "eos_rate": [r.finished for r in sampled],
    } | _score_tokens(policy, ref_policy, reward_model, tokenizer, repeated, sampled,
                      config.batch_size)
    if grade:
        grades = [grade(p, r.text) for p, r in zip(repeated, sampled, strict=True)]
        measures |= {name: [g[name] for g in grades] for name in grades[0]}
    shape = len(prompts), samples
    texts = [r.text for r in sampled]
    return Evaluation(
        [texts[i:i + samples] for i in range(0, len(texts), samples)],
        {name: np.asarray(values, dtype=float).reshape(shape) for name, values in measures.items()})


@torch.no_grad()
def _score_tokens(
    policy, ref_policy, reward_model, tokenizer, prompts: list[Prompt], sampled: list[Response],
    batch_size: int,
) -> dict[str, list[float]]:
    pairs = [(encode_prompt(tokenizer, p.prompt), list(r.token_ids))
             for p, r in zip(prompts, sampled, strict=True)]
    kl, scores = torch.zeros(len(pairs)), torch.zeros(len(pairs))
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
    batch_size = _rows_at_once(policy, pairs, batch_size)
    for start in range(0, len(order), batch_size):
        rows = order[start:start + batch_size]
        batch = collate([pairs[i] for i in rows], tokenizer.pad_token_id).to(policy.device)
        per_token = compute_exact_kl(compute_response_logits(policy, batch),
                                     compute_response_logits(ref_policy, batch))
        kl[rows] = unmask(per_token, batch.response_mask).sum(1).cpu()
        if reward_model:
            scores[rows] = reward_model(batch.input_ids, batch.attention_mask).cpu()
    return {"kl": kl.tolist()} | ({"rm_score": scores.tolist()} if reward_model else {})


def summarize(evaluation: Evaluation, config: EvaluationConfig) -> dict[str, dict[str, float]]:
    """Return mean and interval of every measure."""
    return {name: mean_interval(values, config) for name, values in evaluation.measures.items()}


@torch.no_grad()
def evaluate_zero_shot(
    policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: list[ZeroShotItem],
    documents: list[Document], config: EvaluationConfig,
) -> dict[str, dict[str, float]]:
    """Measure what the model can do without a chat prompt: the place where alignment is taxed.

    An item is solved if greedy decoding from the text writes the target, i.e. if each target token
    is the argmax given the text and the target tokens before it: one forward pass shows them all.

    Args:
        policy: causal language model.
        tokenizer: its tokenizer.
        items: texts with their targets, of several tasks.
        documents: held-out corpus, for `corpus_loss`; read as far as the context goes.
        config: for intervals and batch size.

    Returns:
        Per task the share of solved items, and `corpus_loss` (nats per token, mean over
        documents), each with `mean`, `low`, `high`.

    Source: exact match as in LAMBADA, Paperno et al. 2016 (arXiv 1606.06031).
    """
    start = [tokenizer.eos_token_id]  # documents follow EOS in the corpus

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    def score(texts: list[tuple[str, tuple[list[int], list[int]]]]):
        context = policy.config.n_positions
        short = [(name, pair) for name, pair in texts if sum(map(len, pair)) <= context]
        if len(short) < len(texts):
            warnings.warn(f"{len(texts) - len(short)} of {len(texts)} zero-shot texts do not fit "
                          f"into the context of {context} tokens and are left out", stacklevel=3)
        scores = _score_continuations(policy, [pair for _, pair in short], tokenizer.pad_token_id,
                                      config.batch_size)
        return [(name, *values) for (name, _), values in zip(short, scores, strict=True)]

    solved: dict[str, list[bool]] = {}
    for task, _, greedy in score([(i.task, (start + encode(i.text), encode(i.target)))
                                  for i in items]):
        solved.setdefault(task, []).append(greedy)
    results = {task: mean_interval(np.array(right), config) for task, right in solved.items()}
    room = policy.config.n_positions - len(start)
    losses = [-mean for _, mean, _ in score([(d.id, (start, (encode(d.text) + start)[:room]))
                                             for d in documents])]
    if losses:
        results["corpus_loss"] = mean_interval(np.array(losses), config)
    return results


def _rows_at_once(policy, pairs, batch_size: int) -> int:
    """Return how many rows have at most `LOGITS_TOGETHER` logits together, or `batch_size`."""
    longest = max((len(response) for _, response in pairs), default=1)
    return max(1, min(batch_size, LOGITS_TOGETHER // (longest * policy.config.vocab_size)))


def _score_continuations(policy, pairs, pad_id: int, batch_size: int) -> list[tuple[float, bool]]:
    """Return of each pair the mean log p per token, and whether every token is the argmax."""
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
    scores = [(0.0, False)] * len(pairs)
    batch_size = _rows_at_once(policy, pairs, batch_size)
    for first in range(0, len(order), batch_size):
        rows = order[first:first + batch_size]
        batch = collate([pairs[i] for i in rows], pad_id).to(policy.device)
        logits, mask = compute_response_logits(policy, batch), batch.response_mask
        targets = batch.response_ids[mask]
        means = masked_mean(unmask(gather_logprobs(logits, targets), mask), mask, dim=1)
        greedy = (unmask(logits.argmax(-1) == targets, mask) | ~mask).all(1)
        for i, mean, solved in zip(rows, means.tolist(), greedy.tolist(), strict=True):
            scores[i] = mean, solved
    return scores
