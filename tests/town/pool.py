"""A pool of responses like those of a fine-tuned model, and how far labelers agree on it.

`python tests/town/pool.py` prints the figures of the data card.
"""

from __future__ import annotations

import statistics
from itertools import combinations

from rlhf_mini.config import TownConfig
from rlhf_mini.data import Prompt
from rlhf_mini.runtime import make_rng
from rlhf_mini.town import Town, build_town, grade
from rlhf_mini.town.responses import respond

POOL = {"right": 0.25, "padded": 0.20, "wrong": 0.20, "rude": 0.03, "hedge": 0.07,
        "offtopic": 0.10, "cut": 0.07, "sloppy": 0.08}


def build_pool(town: Town, prompts: int = 400, k: int = 6) -> list[tuple[Prompt, list[str]]]:
    """Draw prompts of the validation customers with K responses each."""
    rng = make_rng(0, "pool")
    chosen = [p for p in town.prompts if p.split == "valid"][:prompts]
    styles = [rng.choices(list(POOL), list(POOL.values()), k=k) for _ in chosen]
    return [(p, [respond(s, p.family, p.truth, town.world, rng) for s in row])
            for p, row in zip(chosen, styles, strict=True)]


def measure(town: Town, group: str = "train") -> dict[str, float]:
    """Agreement of labelers with each other and with gold, over pairs that neither side ties."""
    same = pairs = right = judged = ties = drawn = gold_ties = padding_wins = paddings = 0
    people = [x for x in town.labelers if x.group == group]
    for prompt, responses in build_pool(town):
        gold = [grade(prompt, r).overall for r in responses]
        ranks = [x.rank(prompt, responses, make_rng(1, str(x.id), prompt.id)) for x in people]
        for i, j in combinations(range(len(responses)), 2):
            if responses[i] == responses[j]:
                continue
            drawn += 1
            gold_ties += gold[i] == gold[j]
            signs = [(r[j] > r[i]) - (r[j] < r[i]) for r in ranks]
            ties += sum(s == 0 for s in signs)
            for a, b in combinations([s for s in signs if s], 2):
                same, pairs = same + (a == b), pairs + 1
            if gold[i] != gold[j]:
                wanted = 1 if gold[i] > gold[j] else -1
                right += sum(s == wanted for s in signs)
                judged += sum(s != 0 for s in signs)
                if min(gold[i], gold[j]) > 0.7 and max(gold[i], gold[j]) == 1.0:
                    padding_wins += sum(s == -wanted for s in signs)
                    paddings += sum(s != 0 for s in signs)
    return {"labelers agree": same / pairs, "label agrees with gold": right / judged,
            "ties of labels": ties / (drawn * len(people)), "ties of gold": gold_ties / drawn,
            "blemished beats ideal": padding_wins / paddings}


def demonstration_gold(town: Town, split: str = "train") -> list[float]:
    """Gold score of every demonstration."""
    prompts = {p.prompt: p for p in town.prompts}
    return [grade(prompts[d.prompt], d.response).overall for d in town.demonstrations
            if d.split == split]


def main() -> None:
    """Print the figures of the data card."""
    town = build_town(TownConfig())
    for group in ("train", "test"):
        for name, value in measure(town, group).items():
            print(f"{group} labelers: {name} {value:.3f}")
    pool = [grade(p, r).overall for p, responses in build_pool(town) for r in responses]
    gold = demonstration_gold(town)
    print(f"pool: mean gold {statistics.mean(pool):.3f}")
    print(f"demonstrations: mean gold {statistics.mean(gold):.3f}, "
          f"ideal {sum(g == 1 for g in gold) / len(gold):.3f}")


if __name__ == "__main__":
    main()
