"""The words of both towns: one meaning each, ordinary English, enough of them; the relations."""

from __future__ import annotations

import re
import string
from itertools import chain, combinations

import pytest

from rlhf_mini.config import TownConfig
from rlhf_mini.runtime import make_rng
from rlhf_mini.town.corpus import facts
from rlhf_mini.town.residents import build_world
from rlhf_mini.town.words import LARGE, MARK, SMALL, word_set, words_in

BOTH = pytest.mark.parametrize("words", [SMALL, LARGE], ids=["small", "large"])


def texts_in(value):
    """All texts of a field."""
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, dict) else value
    return list(chain.from_iterable(texts_in(x) for x in parts if isinstance(x, str | tuple)))


def test_the_large_town_has_more_of_everything():
    for name, small in vars(SMALL).items():
        large = getattr(LARGE, name)
        if isinstance(small, dict | tuple) and name != "wordings":
            assert len(large) >= len(small), name
            if name not in ("stories", "names", "copied", "relations", "facts_together"):
                assert set(small) <= set(large), name
    assert len(LARGE.attributes) == 3 * len(SMALL.attributes) == 15
    for part in ("attributes", "questions", "categories", "requests", "statements", "chat"):
        for key, small in getattr(SMALL, part).items():
            assert set(small) <= set(getattr(LARGE, part)[key]), key
            grows = part != "categories" or key != "days"
            assert (len(getattr(LARGE, part)[key]) > len(small)) == grows, key


def test_there_are_names_for_the_largest_town():
    per_unit = TownConfig().residents + 16  # residents and newcomers
    assert len(set(LARGE.names)) == len(LARGE.names)
    assert len(LARGE.names) // per_unit == 52
    TownConfig(size=52)
    firsts, lasts = ({name.split()[i] for name in LARGE.names} for i in (0, 1))
    assert all(re.fullmatch("[A-Z][a-z]+ [A-Z][a-z]+", name) for name in LARGE.names)
    assert len(firsts) == 175 and len(lasts) == 132 and not firsts & lasts
    assert len(LARGE.names) == 175 * 132 // 11


@BOTH
def test_names_are_no_other_words_of_the_town(words):
    relations = {a: v for a, v in words.attributes.items() if a not in words.relations}
    fields = {**vars(words), "attributes": relations, "names": ()}
    fields.pop("copied")  # repeats the names
    fields = {k: v for k, v in fields.items() if isinstance(v, dict | tuple)}
    assert not words.name_words & word_set(*texts_in(tuple(fields.values())))


@BOTH
def test_things_and_commands_are_of_one_kind(words):
    kinds = (words.objects, words.colours, words.places, words.commands, tuple(words.verbs))
    for kind in kinds:
        assert len(set(kind)) == len(kind)
    for one, two in combinations(kinds, 2):
        assert not set(one) & set(two)


@BOTH
def test_an_item_is_one_word_and_stands_in_one_category(words):
    for things, items in words.categories.items():
        assert len(items) >= 7 and all(re.fullmatch("[A-Za-z]+", item) for item in items), things
    every = [item.lower() for items in words.categories.values() for item in items]
    assert len(set(every)) == len(every)


@BOTH
def test_the_main_word_tells_the_values_of_an_attribute_apart(words):
    for attribute, values in words.attributes.items():
        assert len({words.split(value)[0] for value in values}) == len(values), attribute


@BOTH
def test_after_a_stands_a_consonant(words):
    after_a = set(words.colours) | set(words.objects)
    for attribute, templates in words.statements.items():
        if any(" a {value}" in template for template in templates):
            after_a |= set(words.attributes[attribute])
    assert not [word for word in after_a if word[0].lower() in "aeiou"]


@BOTH
def test_templates_have_their_parts(words):
    fields = {"closed": {"passage", "question"}, "summary": {"text"}, "list": {"n", "things"},
              "polite": {"c"}, "classify": {"r"}, "harmful": {"h"}}
    for family, templates in words.requests.items():
        for template in templates:
            assert {part for _, part, _, _ in string.Formatter().parse(template) if part} == fields[
                family], template
    for attribute in (*words.attributes, *words.unknowable):
        assert words.nouns[attribute] and len(words.questions[attribute]) >= 2
        assert all("{name}" in question for question in words.questions[attribute])
    for templates in words.statements.values():
        assert all("{name}" in s and s.endswith(" {value}.") for s in templates)
    for text, done in words.stories:
        parts = {part for _, part, _, _ in string.Formatter().parse(text) if part}
        assert parts == {"name", "object", "place", "colour", "day", "detail"}
        assert done in {*words.verbs, "found"}
    every = [*words.praise, *words.blame, *words.details, *words.openings]
    assert len(set(every)) == len(every)
    assert not word_set(*words.praise, *words.blame) & {"good", "bad"}


def test_full_names_are_one_word():
    assert LARGE.split("Adam Abbott's friend, Clara Dixon.") == [
        "adam abbott", "friend", "clara dixon"]
    assert LARGE.split("Adam met Clara Adam Abbott") == ["adam", "met", "clara", "adam abbott"]
    assert SMALL.split("Adam Abbott") == ["adam", "abbott"]
    assert LARGE.own("Adam Abbott") == {"adam abbott", "adam", "abbott"}


def test_relations_hold_both_ways_and_neighbours_share_a_street():
    world = build_world(LARGE, 400, 100, make_rng(0, "relations"))
    assert words_in(world) is LARGE and world["words"] == MARK["words"]
    facts = world["residents"]
    assert len(facts) == 400 and not set(facts) & set(world["newcomers"])
    for relation in ("friend", "neighbour"):
        pairs = {name: known[relation] for name, known in facts.items() if relation in known}
        assert all(pairs[other] == name != other for name, other in pairs.items())
    # 4 in 5 of those who could have one: all residents, and those on a street in pairs
    friends = sum("friend" in known for known in facts.values())
    assert 0.7 * 400 < friends < 0.9 * 400
    neighbours = [(known["street"], facts[known["neighbour"]]["street"])
                  for known in facts.values() if "neighbour" in known]
    assert all(one == two for one, two in neighbours)
    # of 400 residents .7 / 13 leave the street out; 34 streets, each with half a person left over
    could = 400 * (1 - 0.7 / 13) - 34 / 2
    assert 0.7 * could < len(neighbours) < 0.9 * could


def test_a_small_world_has_no_mark_and_no_relations():
    world = build_world(SMALL, 24, 16, make_rng(0, "small"))
    assert set(world) == {"residents", "newcomers"} and words_in(world) is SMALL
    assert {a for known in world["residents"].values() for a in known} == set(SMALL.attributes)


def test_the_first_statement_stands_in_three_of_four_facts_the_others_share_the_rest():
    world = build_world(LARGE, 60, 10, make_rng(0, "statements"))
    rng = make_rng(1, "statements")
    said = re.findall(r"[^.]+\.", " ".join(facts(world, rng) for _ in range(4_000)))
    for attribute in ("job", "language"):
        patterns = [re.compile(rf" ?{s.format(name='[A-Z][a-z]+ [A-Z][a-z]+', value='[A-Za-z]+')}")
                    for s in LARGE.statements[attribute]]
        counts = [sum(bool(pattern.fullmatch(text)) for text in said) for pattern in patterns]
        total, others = sum(counts), len(counts) - 1
        assert total > 400 and abs(counts[0] / total - 0.75) < 0.06
        assert all(abs(n / total - 0.25 / others) < 0.05 for n in counts[1:])
