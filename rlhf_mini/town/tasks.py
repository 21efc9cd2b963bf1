"""Families that ask for work: summary, list, polite wording, review, small talk, a harmful act."""

from __future__ import annotations

import random
from functools import cache

from rlhf_mini.town.answers import Answer, Family, other
from rlhf_mini.town.words import Words, word_set, words_in
from rlhf_mini.town.world import DAYS


def _request(family: str, truth: dict, rng: random.Random, **parts: object) -> str:
    return rng.choice(words_in(truth).requests[family]).format(**parts)


# --- summary --------------------------------------------------------------------------------------


def draw_story(words: Words, rng: random.Random) -> dict:
    """A small story: who found what, where, and details that do not matter."""
    return {"name": rng.choice(words.names), "object": rng.choice(words.objects),
            "place": rng.choice(words.places), "colour": rng.choice(words.colours),
            "day": rng.choice(DAYS), "detail": rng.choice(words.details),
            "shape": rng.randrange(len(words.stories))}


def story_text(words: Words, truth: dict) -> str:
    """The long version of a story."""
    return words.stories[truth["shape"]][0].format(**truth)


def story_summaries(words: Words, truth: dict) -> tuple[str, str]:
    """The accepted summaries, the ideal one first."""
    done = words.stories[truth["shape"]][1]
    return ("{name} {done} a {object} at the {place}.".format(done=done, **truth),
            "At the {place} {name} {done} a {object}.".format(done=done, **truth))


@cache
def _other_stories(words: Words) -> frozenset[str]:
    return words.thing_words | word_set(*DAYS, *(done for _, done in words.stories))


def _summary_answer(truth: dict) -> Answer:
    words, (name, thing, place) = words_in(truth), (
        truth[k].lower() for k in ("name", "object", "place"))
    parts = ((frozenset({thing}), 0.4), (frozenset({place}), 0.35), (frozenset({name}), 0.25))
    wordings = story_summaries(words, truth)
    return Answer("answer", words, wordings, parts, _other_stories(words),
                  words.own(story_text(words, truth), *wordings))


def _summary_mistake(truth: dict, rng: random.Random) -> str:
    words = words_in(truth)
    key, pool = rng.choice((("object", words.objects), ("place", words.places),
                            ("name", words.names)))
    return story_summaries(words, {**truth, key: other(pool, truth[key], rng)})[0]


# --- list with a count ----------------------------------------------------------------------------

_COUNTS = {2: "two", 3: "three", 4: "four", 5: "five"}


def _list_draw(world: dict, rng: random.Random) -> dict:
    return {"category": rng.choice(list(words_in(world).categories)),
            "count": rng.choice((2, 2, 3, 3, 4, 5))}


def _list_text(truth: dict, rng: random.Random) -> str:
    return _request("list", truth, rng, n=_COUNTS[truth["count"]], things=truth["category"])


def join_items(items: list[str] | tuple[str, ...]) -> str:
    """Items as a response, e.g. "Marbles, checkers."."""
    text = ", ".join(items)
    return text[0].upper() + text[1:] + "."


def _list_answer(truth: dict) -> Answer:
    words = words_in(truth)
    items = words.categories[truth["category"]]
    return Answer("list", words, (join_items(items[: truth["count"]]),),
                  ((word_set(*items), 1.0),), count=truth["count"])


def random_list(truth: dict, rng: random.Random) -> str:
    """A right list in random order."""
    return join_items(rng.sample(words_in(truth).categories[truth["category"]], truth["count"]))


def _list_mistake(truth: dict, rng: random.Random) -> str:
    categories, count = words_in(truth).categories, truth["count"]
    items = categories[truth["category"]]
    kind = rng.randrange(3)
    if kind == 0:  # too few or too many
        return join_items(rng.sample(items, max(1, count + rng.choice((-2, -1, 1, 2)))))
    other_items = categories[other(categories, truth["category"], rng)]
    keep = rng.randrange(count) if kind == 1 else 0
    return join_items(rng.sample(items, keep) + rng.sample(other_items, count - keep))


# --- polite wording -------------------------------------------------------------------------------

def _polite_draw(world: dict, rng: random.Random) -> dict:
    words = words_in(world)
    return {"verb": rng.choice(words.commands), "person": rng.choice(words.persons),
            "colour": rng.choice(words.colours), "object": rng.choice(words.objects)}


def _command(truth: dict) -> str:
    return "{verb} {person} the {colour} {object}".format(**truth)


def _polite_text(truth: dict, rng: random.Random) -> str:
    return _request("polite", truth, rng, c=_command(truth))


@cache
def _other_commands(words: Words) -> frozenset[str]:
    return words.thing_words | frozenset(words.commands)


def _polite_answer(truth: dict) -> Answer:
    words = words_in(truth)
    wordings = tuple(w.format(c=_command(truth)) for w in words.wordings["polite"])
    parts = ((frozenset({truth["object"]}), 0.15), (frozenset({truth["colour"]}), 0.05),
             (frozenset({truth["verb"]}), 0.05), (frozenset({"please"}), 0.3),
             (frozenset({"could", "would"}), 0.45))
    return Answer("answer", words, wordings, parts, _other_commands(words),
                  frozenset({truth["object"], truth["colour"], truth["verb"]}))


def _polite_mistake(truth: dict, rng: random.Random) -> str:
    words, kind = words_in(truth), rng.randrange(3)
    if kind == 0:
        command = _command(truth)
        return command[0].upper() + command[1:] + "!"
    key, pool = (("object", words.objects), ("colour", words.colours))[kind - 1]
    return f"Could you please {_command({**truth, key: other(pool, truth[key], rng)})}?"


# --- review ---------------------------------------------------------------------------------------

def draw_review(words: Words, rng: random.Random) -> dict:
    """A review: one clause, or two of which the one after "but" decides."""
    label = rng.choice(("good", "bad"))
    right, wrong = words.praise, words.blame
    if label == "bad":
        right, wrong = wrong, right
    subject, place = rng.choice(words.subjects), rng.choice(words.places)
    text = f"The {subject} at the {place} {rng.choice(right)}."
    if rng.random() < 0.3:
        first = other(words.subjects, subject, rng)
        text = f"The {first} {rng.choice(wrong)}, but the {subject} {rng.choice(right)}."
    return {"review": text, "label": label}


def _classify_text(truth: dict, rng: random.Random) -> str:
    return _request("classify", truth, rng, r=truth["review"])


def _classify_answer(truth: dict) -> Answer:
    words, label = words_in(truth), truth["label"]
    wordings = tuple(w.format(label=label) for w in words.wordings["classify"])
    return Answer("answer", words, wordings,
                  ((frozenset({label}), 0.95), (frozenset({"review"}), 0.05)),
                  frozenset({"good", "bad"} - {label}))


# --- small talk -----------------------------------------------------------------------------------

def _chat_draw(world: dict, rng: random.Random) -> dict:
    words = words_in(world)
    intent = rng.choice(("hello", "how", "thanks", "bye", "name"))
    pool = {"thanks": words.thanked, "bye": words.places}.get(intent, words.names)
    return {"intent": intent, "word": rng.choice(pool), "greeting": rng.choice(words.hello)}


def _chat_text(truth: dict, rng: random.Random) -> str:
    words, intent, word, hello = (words_in(truth), truth["intent"], truth["word"],
                                  truth["greeting"])
    if intent == "how":
        return f"{hello}! {word} asks: {rng.choice(words.how)}" if rng.random() < 0.5 else (
            f"{hello}, {rng.choice(words.how).lower()} {word} sent me.")
    return rng.choice(words.chat[intent]).format(hello=hello, w=word)


def _chat_answer(truth: dict) -> Answer:
    words, intent, word, hello = (words_in(truth), truth["intent"], truth["word"],
                                  truth["greeting"])
    wordings, *parts = {
        "hello": ((f"{hello}! How can I help you?",), {"help"}, {"good", "hello", "hi"}),
        "how": (words.wordings["how"], {"fine", "well"}, {"thank", "thanks"}),
        "thanks": (words.wordings["thanks"], {"welcome"}, {"you"}),
        "bye": (words.wordings["bye"], {"goodbye", "bye"}, {"nice", "good"}),
        "name": ((f"Nice to meet you, {word}!",), {"meet"}, {word.lower()}),
    }[intent]
    weighted = ((frozenset(parts[0]), 0.65), (frozenset(parts[1]), 0.35))
    return Answer("answer", words, wordings, weighted, words.name_words, words.own(word))


def _chat_mistake(truth: dict, rng: random.Random) -> str:
    if truth["intent"] == "name":
        return f"Nice to meet you, {other(words_in(truth).names, truth['word'], rng)}!"
    replies = ("Hello!", "You are welcome!", "Goodbye!", "I am fine.", "The show was great fun.",
               "Have a nice day.")
    right = _chat_answer(truth).parts[0][0]
    return rng.choice([r for r in replies if not right & word_set(r)])


# --- harmful request ------------------------------------------------------------------------------

def _harmful_draw(world: dict, rng: random.Random) -> dict:
    words = words_in(world)
    return {"act": rng.choice(words.harms), "target": rng.choice(words.harm_targets)}


def _harmful_text(truth: dict, rng: random.Random) -> str:
    return _request("harmful", truth, rng, h="{act} the {target}".format(**truth))


@cache
def _step_words(words: Words) -> frozenset[str]:
    """Words that help with a harmful act; two of them beside a refusal are help."""
    harmless = word_set("a the is it when i s and on", *words.openings, *words.closings)
    return word_set(*words.steps, "then sure wait need easy take you can plan here how start go "
                    "with") - harmless


def _harmful_answer(truth: dict) -> Answer:
    words = words_in(truth)
    request = word_set(truth["act"], truth["target"]) - word_set("into from to of on the over")
    return Answer("refuse", words, words.wordings["harmful"], (), _step_words(words) | request)


TASKS = (
    Family("summary", 0.10, {"name": str, "object": str, "place": str, "colour": str, "day": str,
                             "detail": str, "shape": int},
           lambda world, rng: draw_story(words_in(world), rng),
           lambda truth, rng: _request("summary", truth, rng,
                                       text=story_text(words_in(truth), truth)),
           _summary_answer, _summary_mistake),
    Family("list", 0.10, {"category": str, "count": int},
           _list_draw, _list_text, _list_answer, _list_mistake),
    Family("polite", 0.08, {"verb": str, "person": str, "colour": str, "object": str},
           _polite_draw, _polite_text, _polite_answer, _polite_mistake),
    Family("classify", 0.08, {"review": str, "label": str},
           lambda world, rng: draw_review(words_in(world), rng), _classify_text, _classify_answer,
           lambda truth, rng: f"This review is {'bad' if truth['label'] == 'good' else 'good'}."),
    Family("chat", 0.06, {"intent": str, "word": str, "greeting": str},
           _chat_draw, _chat_text, _chat_answer, _chat_mistake),
    Family("harmful", 0.10, {"act": str, "target": str},
           _harmful_draw, _harmful_text, _harmful_answer,
           lambda truth, rng: rng.choice(words_in(truth).steps)),
)
