"""What a family says about a right answer: accepted wordings, required parts, contradictions."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from rlhf_mini.town.words import MARK, Words, word_set, words_of

__all__ = ["Answer", "Family", "other", "word_set", "words_of"]


@dataclass(frozen=True)
class Answer:
    """How to recognise a good response to one prompt.

    Attributes:
        kind: "answer", "unknown", "refuse" or "list".
        words: of the town that the prompt comes from.
        wordings: accepted texts, the ideal one first; all of them score 1.
        parts: (words, weight): any of the words earns the weight; the first part is the main one,
            without it there is no answer. The weights sum to 1.
        wrong: words that contradict the truth,
        own: unless they are among these.
        count: number of items asked for, "list" only.
        name: the person asked about, lower case, "unknown" only.
    """

    kind: str
    words: Words
    wordings: tuple[str, ...]
    parts: tuple[tuple[frozenset[str], float], ...] = ()
    wrong: frozenset[str] = frozenset()
    own: frozenset[str] = frozenset()
    count: int = 0
    name: str = ""


@dataclass(frozen=True)
class Family:
    """One kind of prompt.

    Attributes:
        name: as in `Prompt.family`.
        weight: share of the prompts.
        keys: the keys of `Prompt.truth` and their types.
        draw_truth: (world, rng) -> truth.
        text: (truth, rng) -> wording of the prompt.
        answer: truth -> Answer.
        mistake: (truth, rng) -> a wrong response.
    """

    name: str
    weight: float
    keys: dict[str, type]
    draw_truth: Callable[[dict, random.Random], dict]
    text: Callable[[dict, random.Random], str]
    answer: Callable[[dict], Answer]
    mistake: Callable[[dict, random.Random], str]

    def draw(self, world: dict, rng: random.Random) -> dict:
        """Draw a truth; that of a large town says so."""
        truth = self.draw_truth(world, rng)
        return {**truth, **MARK} if "words" in world else truth


def other(values, not_this: str, rng: random.Random) -> str:
    """A value that differs from the given one."""
    return rng.choice([v for v in values if v != not_this])
