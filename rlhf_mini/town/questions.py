"""Families that ask: facts about residents, what nobody knows, a passage."""

from __future__ import annotations

import random
from functools import cache

from rlhf_mini.town.answers import Answer, Family, other
from rlhf_mini.town.words import Words, word_set, words_in

_CLAIM_WORDS = word_set(
    "one two three four five six seven eight nine ten twenty thirty forty fifty sixty "
    "hundred thousand january february march april may june july august september october "
    "november december works lives earns enjoys")


def _question_text(truth: dict, rng: random.Random) -> str:
    words, attribute = words_in(truth), truth["attribute"]
    template = rng.choice(words.any_question + words.questions[attribute])
    return template.format(name=truth["name"], noun=words.nouns[attribute])


# --- open question with a known answer ---------------------------------------------------------


def _known_draw(world: dict, rng: random.Random) -> dict:
    name = rng.choice(list(world["residents"]))
    attribute = rng.choice(list(world["residents"][name]))
    return {"name": name, "attribute": attribute, "value": world["residents"][name][attribute]}


def _known_answer(truth: dict) -> Answer:
    words, name, value = words_in(truth), truth["name"], truth["value"]
    wordings = tuple(s.format(**truth) for s in words.statements[truth["attribute"]])
    main = words.split(value)[0]  # of "Mill Street" the first word, of a full name all
    parts = ((frozenset({main}), 0.9), (frozenset({name.lower()}), 0.1))
    return Answer("answer", words, wordings, parts, words.claims[truth["attribute"]],
                  words.own(name, value))


def _known_mistake(truth: dict, rng: random.Random) -> str:
    words, attribute = words_in(truth), truth["attribute"]
    value = other(words.attributes[attribute], truth["value"], rng)
    return rng.choice(words.statements[attribute]).format(name=truth["name"], value=value)


# --- open question that nobody in town can answer -----------------------------------------------


def _unknown_draw(world: dict, rng: random.Random) -> dict:
    words = words_in(world)
    kind = rng.choice(("newcomer", "newcomer", "unstated", "unknowable", "unknowable"))
    if kind == "unstated":
        gaps = [(n, a) for n, facts in world["residents"].items() for a in words.attributes
                if a not in facts]
        if gaps:
            name, attribute = rng.choice(gaps)
            return {"name": name, "attribute": attribute}
    if kind == "newcomer":
        attribute = rng.choice(list(words.attributes))
        return {"name": rng.choice(world["newcomers"]), "attribute": attribute}
    people = list(world["residents"]) + world["newcomers"]
    return {"name": rng.choice(people), "attribute": rng.choice(words.unknowable)}


@cache
def _inventions(words: Words, attribute: str) -> frozenset[str]:
    return words.claims[attribute] | _CLAIM_WORDS


def _unknown_answer(truth: dict) -> Answer:
    words, name, attribute = words_in(truth), truth["name"], truth["attribute"]
    noun = words.nouns[attribute]
    wordings = tuple(w.format(name=name, noun=noun) for w in words.wordings["unknown"])
    return Answer("unknown", words, wordings, (), _inventions(words, attribute),
                  words.own(name, noun), name=name.lower())


def _unknown_mistake(truth: dict, rng: random.Random) -> str:
    words, name, attribute = words_in(truth), truth["name"], truth["attribute"]
    if attribute in words.attributes:
        value = rng.choice(words.attributes[attribute])
        return rng.choice(words.statements[attribute]).format(name=name, value=value)
    number = rng.choice(("ten", "twenty", "thirty", "forty", "fifty", "sixty"))
    return f"The {attribute} of {name} is {number}."


# --- closed question: the answer stands in the prompt -------------------------------------------


def draw_scene(words: Words, rng: random.Random, where: bool, sentences: int = 2
               ) -> list[list[str]]:
    """People who do something: [name, verb, colour, object], or [name, place] when `where`."""
    names = rng.sample(words.names, sentences)
    if where:
        return [[n, p] for n, p in zip(names, rng.sample(words.places, sentences), strict=True)]
    pools = (list(words.verbs), words.colours, words.objects)
    things = [rng.sample(pool, sentences) for pool in pools]
    return [list(row) for row in zip(names, *things, strict=True)]


def scene_sentence(row: list[str]) -> str:
    """One sentence of a scene."""
    if len(row) == 2:
        return f"{row[0]} is at the {row[1]}."
    return f"{row[0]} {row[1]} a {row[2]} {row[3]}."


def scene_question(words: Words, question: str, row: list[str]) -> str:
    """The question of a closed-QA prompt about one row of a scene."""
    if question == "where":
        return f"Where is {row[0]}?"
    name, verb, colour, thing = row
    return {"what": f"What did {name} {words.verbs[verb]}?",
            "who": f"Who {verb} the {colour} {thing}?",
            "colour": f"What colour is the {thing}?"}[question]


def _closed_draw(world: dict, rng: random.Random) -> dict:
    question = rng.choices(("what", "where", "colour", "who"), (0.45, 0.35, 0.1, 0.1))[0]
    scene = draw_scene(words_in(world), rng, question == "where", 3 if rng.random() < 0.25 else 2)
    return {"question": question, "scene": scene, "about": rng.randrange(len(scene))}


def _closed_text(truth: dict, rng: random.Random) -> str:
    words, passage = words_in(truth), " ".join(scene_sentence(row) for row in truth["scene"])
    question = scene_question(words, truth["question"], truth["scene"][truth["about"]])
    return rng.choice(words.requests["closed"]).format(passage=passage, question=question)


def closed_wordings(question: str, row: list[str]) -> tuple[str, ...]:
    """Accepted answers to a question about one row of a scene, the ideal one first."""
    if question == "where":
        return (scene_sentence(row),)
    name, verb, colour, thing = row
    if question == "colour":
        return (f"The {thing} is {colour}.", f"The colour is {colour}.")
    if question == "who":
        return (f"{name} {verb} the {colour} {thing}.", scene_sentence(row))
    return (scene_sentence(row), f"{name} {verb} a {thing}.")


def _closed_answer(truth: dict) -> Answer:
    words, question, row = words_in(truth), truth["question"], truth["scene"][truth["about"]]
    own = [word.lower() for word in row]
    main, minor = {"where": (own[1], own[0]), "what": (own[-1], own[0]),
                   "who": (own[0], None), "colour": (own[-2], None)}[question]
    parts = [(frozenset({main}), 0.9 if minor else 1.0)]
    if minor:
        parts.append((frozenset({minor}), 0.1))
    return Answer("answer", words, closed_wordings(question, row), tuple(parts),
                  words.thing_words, words.own(*row))


def _closed_mistake(truth: dict, rng: random.Random) -> str:
    row = list(truth["scene"][truth["about"]])
    rest = [r for i, r in enumerate(truth["scene"]) if i != truth["about"]]
    taken = rng.choice(rest) if rng.random() < 0.7 else None
    words, question = words_in(truth), truth["question"]
    slot = {"where": 1, "what": 3, "who": 0, "colour": 2}[question]
    pool = {"where": words.places, "what": words.objects, "who": words.names,
            "colour": words.colours}[question]
    row[slot] = taken[slot] if taken else other(pool, row[slot], rng)
    if question == "what" and taken:
        row[2] = taken[2]
    return closed_wordings(question, row)[0]


QUESTIONS = (
    Family("known", 0.22, {"name": str, "attribute": str, "value": str},
           _known_draw, _question_text, _known_answer, _known_mistake),
    Family("unknown", 0.14, {"name": str, "attribute": str},
           _unknown_draw, _question_text, _unknown_answer, _unknown_mistake),
    Family("closed", 0.12, {"question": str, "scene": list, "about": int},
           _closed_draw, _closed_text, _closed_answer, _closed_mistake),
)
