"""The words of a town: few in a town of size 1, more in a larger one."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from functools import cached_property

from rlhf_mini.town import large, world

_WORD = re.compile(r"[^\W_]+")


def words_of(text: str) -> list[str]:
    """Lower-case words; "can't", "can not" and "don't" in their usual form.

    >>> words_of("I can't say, Nils.")
    ['i', 'cannot', 'say', 'nils']
    """
    text = text.lower().replace("’", "'").replace("can't", "cannot").replace("can not", "cannot")
    return _WORD.findall(text.replace("n't", " not").replace("'s", ""))


def word_set(*texts: str) -> frozenset[str]:
    """The words of some texts."""
    return frozenset(word for text in texts for word in words_of(text))


@dataclass(frozen=True, eq=False)
class Words:
    """The words and templates of a town; each field is the constant of its name in `world`.

    `large` replaces those constants that grow. A prompt's truth and a world say which of the two
    they are about (`words_in`), so the grader needs nothing but the prompt.
    """

    names: tuple[str, ...]
    attributes: dict[str, tuple[str, ...]]
    relations: dict[str, str | None]
    facts_together: tuple[int, ...]
    unknowable: tuple[str, ...]
    nouns: dict[str, str]
    any_question: tuple[str, ...]
    questions: dict[str, tuple[str, ...]]
    statements: dict[str, tuple[str, ...]]
    objects: tuple[str, ...]
    colours: tuple[str, ...]
    places: tuple[str, ...]
    copied: tuple[str, ...]
    verbs: dict[str, str]
    categories: dict[str, tuple[str, ...]]
    subjects: tuple[str, ...]
    praise: tuple[str, ...]
    blame: tuple[str, ...]
    harms: tuple[str, ...]
    harm_targets: tuple[str, ...]
    steps: tuple[str, ...]
    rude: tuple[str, ...]
    hedge_lines: tuple[str, ...]
    openings: tuple[str, ...]
    closings: tuple[str, ...]
    requests: dict[str, tuple[str, ...]]
    commands: tuple[str, ...]
    persons: tuple[str, ...]
    hello: tuple[str, ...]
    how: tuple[str, ...]
    thanked: tuple[str, ...]
    chat: dict[str, tuple[str, ...]]
    stories: tuple[tuple[str, str], ...]
    details: tuple[str, ...]
    wordings: dict[str, tuple[str, ...]]

    @cached_property
    def full_names(self) -> frozenset[str]:
        """Names of more than one word, lower case."""
        return frozenset(name.lower() for name in self.names if " " in name)

    def split(self, text: str) -> list[str]:
        """The words of a text, as `words_of`, but a full name is one word: "adam miller"."""
        words = words_of(text)
        if not self.full_names:
            return words
        joined: list[str] = []
        for word in words:
            if joined and f"{joined[-1]} {word}" in self.full_names:
                joined[-1] += f" {word}"
            else:
                joined.append(word)
        return joined

    def own(self, *texts: str) -> frozenset[str]:
        """The words of some texts and the parts of their full names."""
        return word_set(*texts).union(*(self.split(text) for text in texts))

    @cached_property
    def name_words(self) -> frozenset[str]:
        """All names and their parts."""
        return self.own(*self.names)

    @cached_property
    def thing_words(self) -> frozenset[str]:
        """Words that make a sentence about another scene: names, objects, colours, places."""
        return self.name_words | word_set(*self.objects, *self.colours, *self.places)

    @cached_property
    def claims(self) -> dict[str, frozenset[str]]:
        """Per attribute: words that state a value of it, or the name of somebody."""
        return {attribute: self.name_words | word_set(*self.attributes.get(attribute, ()))
                for attribute in self.nouns}


SMALL, LARGE = (
    Words(**{f.name: getattr(module, f.name.upper(), getattr(world, f.name.upper()))
             for f in fields(Words)})
    for module in (world, large))
MARK = {"words": "large"}  # stands in the world and in every truth of a large town


def words_in(record: dict) -> Words:
    """The words of a world or of a prompt's truth."""
    return LARGE if record.get("words") == MARK["words"] else SMALL
