"""Does a reward model look at the prompt if it never saw an answer to another one?

    rlhf-mini rank --out runs/cpu
    python benchmarks/decoys.py runs/cpu

Trains two reward models per seed on the same ranked prompts with the same number of responses each:
one keeps the response that was written to another prompt (the decoy), the other loses it, while the
first loses one of its own responses instead. Writes data/recorded/decoys/decoys.json.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from rlhf_mini.config import EvaluationConfig, load_preset
from rlhf_mini.data import Ranking
from rlhf_mini.evaluation import measure_reward_model
from rlhf_mini.models import RewardModel
from rlhf_mini.reward import encode_rankings, score_rankings, train_reward_model
from rlhf_mini.runtime import make_generator, make_rng, write_json
from rlhf_mini.workspace import Run

OUT = Path(__file__).parent.parent / "data" / "recorded" / "decoys"


def keep_responses(ranking: Ranking, keep: list[int]) -> Ranking | None:
    """Return the ranking of some of its responses, or None if they are all tied."""
    places = sorted({ranking.ranks[j] for j in keep})
    if len(places) < 2:
        return None
    return replace(
        ranking, responses=tuple(ranking.responses[j] for j in keep),
        ranks=tuple(places.index(ranking.ranks[j]) + 1 for j in keep),
        gold=tuple(ranking.gold[j] for j in keep), decoys=tuple(ranking.decoys[j] for j in keep))


def split_ranking(ranking: Ranking) -> tuple[Ranking, Ranking] | None:
    """Return a ranking with its decoy and one without, of K - 1 responses each."""
    own = [j for j, decoy in enumerate(ranking.decoys) if not decoy]
    decoys = [j for j, decoy in enumerate(ranking.decoys) if decoy]
    if len(decoys) != 1 or len(own) < 3:
        return None
    both = keep_responses(ranking, own[:-1] + decoys), keep_responses(ranking, own)
    return both if all(both) else None


def measure_swap(reward_model, tokenizer, rankings: list[Ranking], config) -> float:
    """Return how often a right response scores higher below its own prompt than below another."""
    good = [r for r in rankings if max(r.gold) >= 0.95 and not r.decoys[int(np.argmax(r.gold))]]
    texts = [r.responses[int(np.argmax(r.gold))] for r in good]
    scores = []
    for shift in (0, 1):
        moved = [replace(r, prompt=good[(i + shift) % len(good)].prompt,
                         responses=(texts[i], ""), ranks=(1, 2)) for i, r in enumerate(good)]
        encoded = encode_rankings(tokenizer, moved, config)
        scores.append(torch.stack(score_rankings(reward_model, encoded,
                                                 tokenizer.pad_token_id))[:, 0])
    return float((scores[0] > scores[1]).float().mean())


def main() -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rankings", type=int, default=1_500)
    args = parser.parse_args()
    run, began = Run(args.run, load_preset("cpu")), time.monotonic()
    policy, tokenizer = run.policy("sft")
    train, test = (run.rankings("rankings", split, tokenizer) for split in ("train", "test"))
    pairs = [pair for pair in map(split_ranking, train) if pair]
    results: dict[str, list] = {"with decoys": [], "without decoys": []}
    for seed in range(args.seeds):
        chosen = make_rng(seed, "decoys").sample(pairs, args.rankings)
        for arm, name in enumerate(results):
            reward_model = RewardModel.from_policy(policy, make_generator(seed, "reward-head"))
            train_reward_model(reward_model, tokenizer, [pair[arm] for pair in chosen], [],
                               run.config.reward, seed)
            measured = measure_reward_model(reward_model, tokenizer, test, run.config.reward,
                                            EvaluationConfig())
            results[name].append({
                "seed": seed, "own": measured["accuracy_gold"]["mean"],
                "decoys": measured["accuracy_decoys"]["mean"],
                "swap": measure_swap(reward_model, tokenizer, test, run.config.reward)})
            print(name, results[name][-1], flush=True)
    OUT.mkdir(parents=True, exist_ok=True)
    write_json(OUT / "decoys.json", {"results": results, "manifest": {
        "commands": ["rlhf-mini rank --out runs/cpu",
                     f"python benchmarks/decoys.py runs/cpu --seeds {args.seeds} "
                     f"--rankings {args.rankings}"],
        "rankings": args.rankings, "seeds": list(range(args.seeds)),
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy")},
        "threads": torch.get_num_threads(), "seconds": round(time.monotonic() - began, 1)}})


if __name__ == "__main__":
    main()
