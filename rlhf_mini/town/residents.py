"""The facts about the residents."""

from __future__ import annotations

import random

from rlhf_mini.town.words import LARGE, MARK, Words

STATED = 0.8  # of the residents who could have a friend or a neighbour, the share who have


def build_world(words: Words, residents: int, newcomers: int, rng: random.Random) -> dict:
    """Draw the residents' facts; some are left out and stated nowhere.

    Seven residents in ten lack one of the drawn facts. Relations hold both ways.

    Args:
        words: the names, attributes and values.
        residents: number of people with facts.
        newcomers: number of people without.
        rng: source of all randomness.

    Returns:
        {"residents": {name: {attribute: value}}, "newcomers": [name]}, and MARK in a large town.

    Raises:
        ValueError: if there are not enough names.
    """
    most = len(words.names) - newcomers
    if residents > most:
        raise ValueError(f"TownConfig.residents = {residents}: expected at most {most}, "
                         "there are no more names")
    names = rng.sample(words.names, residents + newcomers)
    facts: dict[str, dict[str, str]] = {}
    drawn_attributes = [a for a in words.attributes if a not in words.relations]
    for name in sorted(names[:residents]):
        drawn = {a: rng.choice(words.attributes[a]) for a in drawn_attributes}
        unstated = rng.choice(drawn_attributes) if rng.random() < 0.7 else None
        facts[name] = {a: v for a, v in drawn.items() if a != unstated}
    for relation, shared in words.relations.items():
        _relate(facts, relation, shared, rng)
    mark = MARK if words is LARGE else {}
    return {"residents": facts, "newcomers": sorted(names[residents:]), **mark}


def _relate(facts: dict[str, dict[str, str]], relation: str, shared: str | None,
            rng: random.Random) -> None:
    """Join residents in pairs, only such as state the same value of the shared attribute."""
    groups: dict[str | None, list[str]] = {}
    for name, known in facts.items():
        if shared is None or shared in known:
            groups.setdefault(known.get(shared), []).append(name)
    for group in groups.values():
        rng.shuffle(group)
        for one, two in zip(group[::2], group[1::2], strict=False):
            if rng.random() < STATED:
                facts[one][relation], facts[two][relation] = two, one
