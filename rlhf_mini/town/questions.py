"""Families that ask: facts about residents, what nobody knows, a passage."""

from __future__ import annotations

import random

from rlhf_mini.town.answers import NAME_WORDS, THING_WORDS, Answer, Family, other, word_set
from rlhf_mini.town.world import (
    ATTRIBUTES,
    COLOURS,
    NAMES,
    NOUNS,
    OBJECTS,
    PLACES,
    UNKNOWABLE,
    VERBS,
)

_ANY_QUESTION = (
    "What is the {noun} of {name}?", "Tell me the {noun} of {name}.",
    "Do you know the {noun} of {name}?", "Can you tell me the {noun} of {name}?",
    "I would like to know the {noun} of {name}.", "Please tell me the {noun} of {name}.",
    "{name} is on my list. What is the {noun} of {name}?",
)
_QUESTIONS = {
    "job": ("What does {name} work as?", "What does {name} do for a living?",
            "Which job does {name} have?", "What kind of work does {name} do?",
            "I met {name}. What is the job of {name}?"),
    "street": ("Where does {name} live?", "On which street does {name} live?",
               "Which street does {name} live on?", "I want to visit {name}. Where is the house?",
               "Where is the home of {name}?"),
    "pet": ("What pet does {name} have?", "Which animal does {name} keep?",
            "What kind of pet does {name} own?", "Which animal lives with {name}?",
            "What animal does {name} have at home?"),
    "hobby": ("What does {name} like to do?", "What does {name} do for fun?",
              "Which hobby does {name} have?", "How does {name} spend a free day?",
              "What does {name} enjoy at the weekend?"),
    "food": ("What does {name} like to eat?", "What should I cook for {name}?",
             "Which food does {name} like best?", "I am cooking for {name}. What would be good?",
             "What does {name} want for dinner?"),
    "age": ("How old is {name}?", "How many years old is {name}?"),
    "birthday": ("When was {name} born?", "On which day does {name} have a birthday?"),
    "salary": ("How much money does {name} make?", "What does {name} earn?"),
    "phone number": ("How can I call {name}?", "Which phone number does {name} have?"),
    "shoe size": ("How big are the feet of {name}?", "Which shoe size does {name} wear?"),
}
STATEMENTS = {
    "job": ("{name} works as a {value}.", "{name} is a {value}."),
    "street": ("{name} lives on {value}.", "{name} has a house on {value}."),
    "pet": ("{name} has a {value}.", "The pet of {name} is a {value}."),
    "hobby": ("{name} likes {value}.", "The hobby of {name} is {value}."),
    "food": ("{name} likes to eat {value}.", "The favourite food of {name} is {value}."),
}
_CLAIM_WORDS = (
    "one two three four five six seven eight nine ten twenty thirty forty fifty sixty "
    "hundred thousand january february march april may june july august september october "
    "november december works lives earns enjoys")


def _question_text(truth: dict, rng: random.Random) -> str:
    attribute = truth["attribute"]
    template = rng.choice(_ANY_QUESTION + _QUESTIONS[attribute])
    return template.format(name=truth["name"], noun=NOUNS[attribute])


# --- open question with a known answer ---------------------------------------------------------


def _known_draw(world: dict, rng: random.Random) -> dict:
    name = rng.choice(list(world["residents"]))
    attribute = rng.choice(list(world["residents"][name]))
    return {"name": name, "attribute": attribute, "value": world["residents"][name][attribute]}


def _known_answer(truth: dict) -> Answer:
    name, value = truth["name"].lower(), truth["value"].split()[0].lower()
    wordings = tuple(s.format(**truth) for s in STATEMENTS[truth["attribute"]])
    wrong = NAME_WORDS | word_set(*ATTRIBUTES[truth["attribute"]])
    return Answer("answer", wordings, ((frozenset({value}), 0.9), (frozenset({name}), 0.1)),
                  wrong - {name, value, "street"})


def _known_mistake(truth: dict, rng: random.Random) -> str:
    attribute = truth["attribute"]
    value = other(ATTRIBUTES[attribute], truth["value"], rng)
    return rng.choice(STATEMENTS[attribute]).format(name=truth["name"], value=value)


# --- open question that nobody in town can answer -----------------------------------------------


def _unknown_draw(world: dict, rng: random.Random) -> dict:
    kind = rng.choice(("newcomer", "newcomer", "unstated", "unknowable", "unknowable"))
    if kind == "unstated":
        gaps = [(n, a) for n, facts in world["residents"].items() for a in ATTRIBUTES
                if a not in facts]
        if gaps:
            name, attribute = rng.choice(gaps)
            return {"name": name, "attribute": attribute}
    if kind == "newcomer":
        attribute = rng.choice(list(ATTRIBUTES))
        return {"name": rng.choice(world["newcomers"]), "attribute": attribute}
    people = list(world["residents"]) + world["newcomers"]
    return {"name": rng.choice(people), "attribute": rng.choice(UNKNOWABLE)}


def _unknown_answer(truth: dict) -> Answer:
    name, noun = truth["name"], NOUNS[truth["attribute"]]
    wrong = NAME_WORDS | word_set(*ATTRIBUTES.get(truth["attribute"], ())) | word_set(_CLAIM_WORDS)
    wordings = (f"Sorry, I do not know that about {name}.",
                f"Sorry, I do not know the {noun} of {name}.")
    return Answer("unknown", wordings, (), wrong - {name.lower(), "street"}, name=name.lower())


def _unknown_mistake(truth: dict, rng: random.Random) -> str:
    name, attribute = truth["name"], truth["attribute"]
    if attribute in ATTRIBUTES:
        value = rng.choice(ATTRIBUTES[attribute])
        return rng.choice(STATEMENTS[attribute]).format(name=name, value=value)
    number = rng.choice(("ten", "twenty", "thirty", "forty", "fifty", "sixty"))
    return f"The {attribute} of {name} is {number}."


# --- closed question: the answer stands in the prompt -------------------------------------------


def draw_scene(rng: random.Random, where: bool, sentences: int = 2) -> list[list[str]]:
    """People who do something: [name, verb, colour, object], or [name, place] when `where`."""
    names = rng.sample(NAMES, sentences)
    if where:
        return [[n, p] for n, p in zip(names, rng.sample(PLACES, sentences), strict=True)]
    things = [rng.sample(pool, sentences) for pool in (list(VERBS), COLOURS, OBJECTS)]
    return [list(row) for row in zip(names, *things, strict=True)]


def scene_sentence(row: list[str]) -> str:
    """One sentence of a scene."""
    if len(row) == 2:
        return f"{row[0]} is at the {row[1]}."
    return f"{row[0]} {row[1]} a {row[2]} {row[3]}."


def scene_question(question: str, row: list[str]) -> str:
    """The question of a closed-QA prompt about one row of a scene."""
    if question == "where":
        return f"Where is {row[0]}?"
    name, verb, colour, thing = row
    return {"what": f"What did {name} {VERBS[verb]}?",
            "who": f"Who {verb} the {colour} {thing}?",
            "colour": f"What colour is the {thing}?"}[question]


def _closed_draw(world: dict, rng: random.Random) -> dict:
    question = rng.choices(("what", "where", "colour", "who"), (0.45, 0.35, 0.1, 0.1))[0]
    scene = draw_scene(rng, question == "where", 3 if rng.random() < 0.25 else 2)
    return {"question": question, "scene": scene, "about": rng.randrange(len(scene))}


_CLOSED = ("Read: {passage} {question}", "{passage} {question}", "Read this: {passage} {question}",
           "Passage: {passage} Question: {question}", "{question} {passage}",
           "Here is a text. {passage} {question}", "Text: {passage} {question}",
           "Please read this. {passage} {question}", "{passage} Now tell me: {question}",
           "{passage} My question is: {question}", "Look at this. {passage} {question}",
           "{passage} Can you say? {question}")


def _closed_text(truth: dict, rng: random.Random) -> str:
    passage = " ".join(scene_sentence(row) for row in truth["scene"])
    question = scene_question(truth["question"], truth["scene"][truth["about"]])
    return rng.choice(_CLOSED).format(passage=passage, question=question)


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
    question, row = truth["question"], truth["scene"][truth["about"]]
    own = [word.lower() for word in row]
    main, minor = {"where": (own[1], own[0]), "what": (own[-1], own[0]),
                   "who": (own[0], None), "colour": (own[-2], None)}[question]
    parts = [(frozenset({main}), 0.9 if minor else 1.0)]
    if minor:
        parts.append((frozenset({minor}), 0.1))
    return Answer("answer", closed_wordings(question, row), tuple(parts), THING_WORDS - set(own))


def _closed_mistake(truth: dict, rng: random.Random) -> str:
    row = list(truth["scene"][truth["about"]])
    rest = [r for i, r in enumerate(truth["scene"]) if i != truth["about"]]
    taken = rng.choice(rest) if rng.random() < 0.7 else None
    question = truth["question"]
    slot = {"where": 1, "what": 3, "who": 0, "colour": 2}[question]
    pool = {"where": PLACES, "what": OBJECTS, "who": NAMES, "colour": COLOURS}[question]
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
