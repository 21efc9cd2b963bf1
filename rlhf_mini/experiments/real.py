"""Questions to a reward model of real responses and real judgements.

There is no gold here. What is held against the reward model is the judge whose scores it learned
from, on held-out prompts; beside it stand two readers that understand nothing: the longer response
wins, and the response of the system with the better average wins. `benchmarks/real.py` asks all
questions of a run and records the answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from rlhf_mini.config import EvaluationConfig
from rlhf_mini.data import Ranking, collate, encode_prompt, encode_response, iterate_jsonl
from rlhf_mini.evaluation import compute_pair_accuracy, mean_interval, ratio_interval
from rlhf_mini.models import RewardModel
from rlhf_mini.readers import read_rankings
from rlhf_mini.reward import (
    compare_pairs,
    compute_calibration,
    encode_rankings,
    score_rankings,
    train_reward_model,
)
from rlhf_mini.runtime import make_generator, make_rng
from rlhf_mini.selection import assign_splits
from rlhf_mini.workspace import Run

RESPONSES = 16  # of a held-out prompt that are compared
SHARES = (1 / 4, 1 / 2, 1.0)  # of the training prompts
KS = (2, 4, 9)
SIZES = (1, 2, 4, 8, 16)  # n of best-of-n
NEAR = 0.1  # lengths that differ by at most this share count as equal


@dataclass(frozen=True)
class Judged:
    """A held-out prompt, K responses of known systems, and what the judge says of them."""

    prompt: str
    responses: list[list[int]]  # K token ids, EOS included
    systems: list[str]
    scores: np.ndarray  # (K,) the judge's, higher = better

    @property
    def lengths(self) -> np.ndarray:
        """Return the (K,) numbers of tokens."""
        return np.array([float(len(ids)) for ids in self.responses])


def read_judged(path: Path, run: Run, tokenizer, split: str = "test") -> list[Judged]:
    """Read graded responses, at most `RESPONSES` to a prompt, drawn at random.

    Prompts and responses beyond the reward model's limits are left out: nobody judged a response
    that was cut.

    Args:
        path: a file of rows of `prompt`, `split`, `responses` (`model`, `text`, `score`).
        run: its limits, and the seed of the draw.
        tokenizer: of the reward model.
        split: which rows.
    """
    limits, judged = run.config.reward, []
    for where, row in iterate_jsonl(path):
        if row.get("split", "train") != split:
            continue
        if len(encode_prompt(tokenizer, row["prompt"])) > limits.max_prompt_tokens:
            continue
        found = [(encode_response(tokenizer, x["text"].strip()), x["model"], float(x["score"]))
                 for x in row["responses"]]
        found = [x for x in found if len(x[0]) <= limits.max_response_tokens]
        found = make_rng(run.seed, "judged", where).sample(found, min(RESPONSES, len(found)))
        if len({score for _, _, score in found}) > 1:
            ids, systems, scores = zip(*found, strict=True)
            judged.append(Judged(row["prompt"], list(ids), list(systems), np.array(scores)))
    return judged


def measure_strength(path: Path) -> dict[str, float]:
    """Return each system's mean score over the training prompts."""
    scores: dict[str, list[float]] = {}
    for _, row in iterate_jsonl(path):
        if row.get("split", "train") == "train":
            for x in row["responses"]:
                scores.setdefault(x["model"], []).append(float(x["score"]))
    return {system: float(np.mean(values)) for system, values in scores.items()}


def cut_response(ids: list[int], room: int) -> list[int]:
    """Return a response of at most `room` tokens: its beginning, and EOS."""
    return ids if len(ids) <= room else [*ids[:room - 1], ids[-1]]


@torch.no_grad()
def score_responses(reward_model: RewardModel, tokenizer, prompts: Sequence[str],
                    responses: Sequence[Sequence[Sequence[int]]], batch_size: int = 64
                    ) -> list[np.ndarray]:
    """Score K responses (token ids) to each of N prompts.

    Returns:
        N arrays of shape (K,).
    """
    pairs = [(encode_prompt(tokenizer, prompt), list(ids))
             for prompt, row in zip(prompts, responses, strict=True) for ids in row]
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
    scores = np.zeros(len(pairs))
    for start in range(0, len(order), batch_size):
        rows = order[start:start + batch_size]
        batch = collate([pairs[i] for i in rows], tokenizer.pad_token_id)
        batch = batch.to(reward_model.model.device)
        scores[rows] = reward_model(batch.input_ids, batch.attention_mask).double().cpu().numpy()
    return np.split(scores, np.cumsum([len(row) for row in responses])[:-1])


def score_judged(reward_model: RewardModel, tokenizer, judged: Sequence[Judged]
                 ) -> list[np.ndarray]:
    """Score the responses of held-out prompts."""
    return score_responses(reward_model, tokenizer, [j.prompt for j in judged],
                           [j.responses for j in judged])


# ---- agreement with the judge ------------------------------------------------------------------


def choose_pairs(judged: Sequence[Judged]) -> dict[str, list[np.ndarray]]:
    """Return the kinds of pairs, each as N matrices (K, K), True = the pair counts.

    "near" pairs have lengths within `NEAR` of each other; in "against" pairs the judge prefers the
    response that is shorter by more than that.
    """
    kinds: dict[str, list[np.ndarray]] = {"all": [], "near": [], "against": []}
    for j in judged:
        first, second = j.lengths[:, None], j.lengths[None, :]
        near = np.abs(first - second) <= NEAR * np.maximum(first, second)
        kinds["all"].append(np.ones_like(near))
        kinds["near"].append(near)
        kinds["against"].append(~near & (first < second))  # [better, worse]
    return kinds


def count_right(scores: Sequence[np.ndarray], judged: Sequence[Judged],
                keep: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Count per prompt the pairs in the judge's order, ties in score half, and all pairs.

    Returns:
        Two arrays of shape (N,); pairs that the judge scores alike are in neither.
    """
    counts = []
    for score, j, kept in zip(scores, judged, keep, strict=True):
        better, worse = np.nonzero((j.scores[:, None] > j.scores[None, :]) & kept)
        counts.append((((np.sign(score[better] - score[worse]) + 1) / 2).sum(), len(better)))
    right, pairs = zip(*counts, strict=True)
    return np.array(right), np.array(pairs)


def measure_agreement(scores: Sequence[np.ndarray], judged: Sequence[Judged],
                      strength: dict[str, float], config: EvaluationConfig) -> dict[str, dict]:
    """Compare a reward model with the judge, and with two baselines on the same pairs.

    Args:
        scores: the reward model's.
        judged: held-out prompts.
        strength: each system's average.
        config: for intervals, over prompts.

    Returns:
        Per kind of pairs (`choose_pairs`) the accuracy of "reward model", "length" (longer wins)
        and "system", and how far the reward model is above each, "above length", "above system".
    """
    readers = {"reward model": list(scores), "length": [j.lengths for j in judged],
               "system": [np.array([strength.get(s, 0.0) for s in j.systems]) for j in judged]}
    results: dict[str, dict] = {}
    for kind, keep in choose_pairs(judged).items():
        targets = [j.scores for j in judged]
        row = {name: compute_pair_accuracy(by, targets, keep, config)
               for name, by in readers.items()}
        ours, pairs = count_right(scores, judged, keep)
        if pairs.sum():
            for name in ("length", "system"):
                theirs, _ = count_right(readers[name], judged, keep)
                row[f"above {name}"] = ratio_interval(ours - theirs, pairs, config)
        results[kind] = {name: value for name, value in row.items() if value}
    return results


def measure_calibration(scores: Sequence[np.ndarray], targets: Sequence[np.ndarray]) -> list[dict]:
    """Return predicted and observed shares of pairs in the judge's order, in bins."""
    return compute_calibration(compare_pairs(list(scores), list(targets))[0])


def measure_length(scores: Sequence[np.ndarray], judged: Sequence[Judged],
                   config: EvaluationConfig) -> dict[str, dict]:
    """Return the share of pairs in which the longer response has the higher score, ties half."""
    lengths = [j.lengths for j in judged]
    every = choose_pairs(judged)["all"]
    return {name: compute_pair_accuracy(list(by), lengths, every, config)
            for name, by in (("reward model", scores), ("judge", [j.scores for j in judged]))}


def measure_nonsense(reward_model: RewardModel, tokenizer, judged: Sequence[Judged],
                     scores: Sequence[np.ndarray], nonsense: dict[str, tuple[str, float]],
                     config: EvaluationConfig) -> dict[str, dict]:
    """Return the share of real responses that a nonsense response to the same prompt beats.

    For the reward model there is a control, "repeated": one word as often as nonsense has tokens.
    "tokens" are those of nonsense, whole and as it was scored, and of the real responses.

    Args:
        reward_model: judges it, cut to as many tokens as its context holds.
        tokenizer: its tokenizer.
        judged: held-out prompts.
        scores: the reward model's, of the real responses.
        nonsense: prompt -> text, the judge's score.
        config: for the interval over prompts.
    """
    asked = [i for i, j in enumerate(judged) if j.prompt in nonsense]
    context = reward_model.model.config.n_positions
    texts = []
    for i in asked:
        room = context - len(encode_prompt(tokenizer, judged[i].prompt))
        ids = encode_response(tokenizer, nonsense[judged[i].prompt][0])
        texts.append([cut_response(ids, room)])
    word = encode_response(tokenizer, " the")
    both = [[ids, [word[0]] * (len(ids) - 1) + word[-1:]] for [ids] in texts]
    found = score_responses(reward_model, tokenizer, [judged[i].prompt for i in asked], both)
    beaten = {"reward model": [(score[0] > scores[i]).mean()
                               for i, score in zip(asked, found, strict=True)],
              "repeated": [(score[1] > scores[i]).mean()
                           for i, score in zip(asked, found, strict=True)],
              "judge": [(nonsense[judged[i].prompt][1] > judged[i].scores).mean() for i in asked]}
    tokens = {"whole": [len(encode_response(tokenizer, nonsense[judged[i].prompt][0]))
                        for i in asked],
              "scored": [len(ids) for [ids] in texts],
              "real": np.concatenate([j.lengths for j in judged])}
    return {name: mean_interval(np.array(shares), config) for name, shares in beaten.items()} | {
        "tokens": {name: float(np.mean(counts)) for name, counts in tokens.items()}}


# ---- more data ---------------------------------------------------------------------------------


def train_on(run: Run, policy, tokenizer, rankings: list[Ranking], seed: int) -> RewardModel:
    """Train a reward model from the SFT model, with the run's settings."""
    reward_model = RewardModel.from_policy(policy, make_generator(seed, "real head"))
    train_reward_model(reward_model, tokenizer, rankings, [], run.config.reward, seed)
    return reward_model


def learn_more(run: Run, path: Path, judged: Sequence[Judged], seeds: int) -> list[dict]:
    """Train reward models on more and more prompts, with K responses each.

    Returns:
        Rows of `seed`, `k`, `share`, `prompts`, `accuracy` on the held-out prompts.
    """
    policy, tokenizer = run.policy("sft")
    rows = []
    for k in KS:
        for seed in range(seeds):
            drawn = assign_splits(read_rankings(path, seed, k, k), run.seed)
            limits = run.config.reward
            train = run.fit([r for r in drawn if r.split == "train"], tokenizer,
                            limits.max_prompt_tokens, limits.max_response_tokens)
            train = make_rng(seed, "real prompts").sample(train, len(train))
            for share in SHARES:
                some = train[:round(share * len(train))]
                scores = score_judged(train_on(run, policy, tokenizer, some, seed), tokenizer,
                                      judged)
                right, pairs = count_right(scores, judged, choose_pairs(judged)["all"])
                rows.append({"seed": seed, "k": k, "share": share, "prompts": len(some),
                             "accuracy": float(right.sum() / pairs.sum())})
                run.say(f"K {k}, {len(some)} prompts, seed {seed}: {rows[-1]['accuracy']:.3f}")
    return rows


def learn_pairs(run: Run, source: str, seeds: int, config: EvaluationConfig) -> dict:
    """Ask the same of pairs, such as HH-RLHF's: accuracy, length, calibration, more data.

    Args:
        run: reward models start from its SFT model; longer prompts than its own may be kept.
        source: what `read_rankings` reads.
        seeds: of subsets and heads.
        config: for intervals.

    Returns:
        `rows` of `seed`, `share`, `pairs`, `accuracy`; accuracy of the reward models of all pairs,
        mean over seeds with an interval over held-out pairs, and how far it is above the two rules
        of length; their calibration; numbers of pairs that were read and kept.
    """
    policy, tokenizer = run.policy("sft")
    limits = run.config.reward
    room = policy.config.n_positions - limits.max_response_tokens
    limits = replace(limits, max_prompt_tokens=room)
    longer = replace(run, config=replace(run.config, reward=limits))
    records = assign_splits(read_rankings(source), run.seed, valid=0.02, test=0.2)
    sets = {split: run.fit([r for r in records if r.split == split], tokenizer, room,
                           limits.max_response_tokens) for split in ("train", "test")}
    encoded = encode_rankings(tokenizer, sets["test"], limits)
    targets = [-np.array(r.ranks, dtype=float) for r in sets["test"]]
    lengths = [np.array([float(len(ids)) for ids in responses]) for _, responses, _ in encoded]
    rules = {"longer wins": lengths, "shorter wins": [-n for n in lengths]}
    rows, right, margins = [], [], []
    for seed in range(seeds):
        train = make_rng(seed, "real pairs").sample(sets["train"], len(sets["train"]))
        for share in SHARES:
            some = train[:round(share * len(train))]
            reward_model = train_on(longer, policy, tokenizer, some, seed)
            scores = [s.double().numpy() for s in score_rankings(reward_model, encoded,
                                                                 tokenizer.pad_token_id)]
            accuracy = float(_right(scores, targets).mean())
            rows.append({"seed": seed, "share": share, "pairs": len(some), "accuracy": accuracy})
            run.say(f"{len(some)} pairs, seed {seed}: {accuracy:.3f}")
        right.append(_right(scores, targets))
        margins.append(compare_pairs(scores, targets)[0])
    ours = np.mean(right, axis=0)
    by_rule = {name: _right(by, targets) for name, by in rules.items()}
    return {"rows": rows, "read": len(records), "train": len(sets["train"]),
            "test": len(sets["test"]), "calibration": compute_calibration(np.concatenate(margins)),
            "reward model": mean_interval(ours, config)} | {
        name: mean_interval(theirs, config) for name, theirs in by_rule.items()} | {
        f"above {name}": mean_interval(ours - theirs, config)
        for name, theirs in by_rule.items()}


def _right(scores: Sequence[np.ndarray], targets: Sequence[np.ndarray]) -> np.ndarray:
    """Return for each pair 1 if it is in the right order, 0 if not, one half for a tie."""
    return np.array([(np.sign((s[0] - s[1]) * (t[0] - t[1])) + 1) / 2
                     for s, t in zip(scores, targets, strict=True)])
