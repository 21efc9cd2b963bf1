"""What a family says about a right answer: accepted wordings, required parts, contradictions."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from rlhf_mini.town.world import COLOURS, NAMES, OBJECTS, PLACES

_WORD = re.compile(r"[^\W_]+")


def words_of(text: str) -> list[str]:
    """Lower-case words; "can't", "can not" and "don't" in their usual form.

    >>> words_of("I can't say, Nils.")
    ['i', 'cannot', 'say', 'nils']
    """
    text = text.lower().replace("’", "'").replace("can't", "cannot").replace("can not", "cannot")
    return _WORD.findall(text.replace("n't", " not").replace("'s", ""))


@dataclass(frozen=True)
class Answer:
    """How to recognise a good response to one prompt.

    Attributes:
        kind: "answer", "unknown", "refuse" or "list".
        wordings: accepted texts, the ideal one first; all of them score 1.
        parts: (words, weight): any of the words earns the weight; the first part is the main one,
            without it there is no answer. The weights sum to 1.
        wrong: words that contradict the truth.
        count: number of items asked for, "list" only.
        name: the person asked about, lower case, "unknown" only.
    """

    kind: str
    wordings: tuple[str, ...]
    parts: tuple[tuple[frozenset[str], float], ...] = ()
    wrong: frozenset[str] = frozenset()
    count: int = 0
    name: str = ""


@dataclass(frozen=True)
class Family:
    """One kind of prompt.

    Attributes:
        name: as in `Prompt.family`.
        weight: share of the prompts.
        keys: the keys of `Prompt.truth` and their types.
        draw: (world, rng) -> truth.
        text: (truth, rng) -> wording of the prompt.
        answer: truth -> Answer.
        mistake: (truth, rng) -> a wrong response.
    """

    name: str
    weight: float
    keys: dict[str, type]
    draw: Callable[[dict, random.Random], dict]
    text: Callable[[dict, random.Random], str]
    answer: Callable[[dict], Answer]
    mistake: Callable[[dict, random.Random], str]


def word_set(*texts: str) -> frozenset[str]:
    """The words of some texts."""
    return frozenset(word for text in texts for word in words_of(text))


NAME_WORDS = word_set(*NAMES)
THING_WORDS = NAME_WORDS | word_set(*OBJECTS, *COLOURS, *PLACES)


def other(values, not_this: str, rng: random.Random) -> str:
    """A value that differs from the given one."""
    return rng.choice([v for v in values if v != not_this])
