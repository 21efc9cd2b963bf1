"""Families that ask for work: summary, list, polite wording, review, small talk, a harmful act."""

from __future__ import annotations

import random

from rlhf_mini.town.answers import NAME_WORDS, THING_WORDS, Answer, Family, other, word_set
from rlhf_mini.town.world import (
    BLAME,
    CATEGORIES,
    COLOURS,
    DAYS,
    HARM_TARGETS,
    HARMS,
    NAMES,
    OBJECTS,
    PLACES,
    PRAISE,
    STEPS,
    SUBJECTS,
)

# --- summary --------------------------------------------------------------------------------------

_SUMMARIZE = ("Summarize: {text}", "Summarize this: {text}", "Please summarize: {text}",
              "Make this shorter: {text}", "{text} Summarize this.", "What happened here? {text}",
              "In one sentence: {text}", "Give me a short summary: {text}", "{text} In short?",
              "Tell me in a few words: {text}", "Sum this up: {text}", "{text} Sum that up.")
_WEATHER = ("The sun was shining.", "It was raining.", "It was very cold.",
            "Many people were there.", "The way was long.", "Nobody else was there.")


def draw_story(rng: random.Random) -> dict:
    """A small story: who found what, where, and details that do not matter."""
    return {"name": rng.choice(NAMES), "object": rng.choice(OBJECTS), "place": rng.choice(PLACES),
            "colour": rng.choice(COLOURS), "day": rng.choice(DAYS),
            "detail": rng.choice(_WEATHER), "shape": rng.randrange(3)}


def story_text(truth: dict) -> str:
    """The long version of a story."""
    return (
        "On {day} {name} went to the {place}. {detail} {name} found a {colour} {object} there.",
        "{name} was at the {place} on {day}. {detail} There {name} found a {colour} {object}.",
        "It was {day}. {detail} {name} walked to the {place} and found a {colour} {object}.",
    )[truth["shape"]].format(**truth)


def story_summary(truth: dict) -> str:
    """The ideal summary."""
    return "{name} found a {object} at the {place}.".format(**truth)


def _summary_answer(truth: dict) -> Answer:
    name, thing, place = (truth[k].lower() for k in ("name", "object", "place"))
    wordings = (story_summary(truth), "At the {place} {name} found a {object}.".format(**truth))
    parts = ((frozenset({thing}), 0.4), (frozenset({place}), 0.35), (frozenset({name}), 0.25))
    wrong = (THING_WORDS | word_set(*DAYS)) - word_set(story_text(truth))
    return Answer("answer", wordings, parts, wrong)


def _summary_mistake(truth: dict, rng: random.Random) -> str:
    key, pool = rng.choice((("object", OBJECTS), ("place", PLACES), ("name", NAMES)))
    return story_summary({**truth, key: other(pool, truth[key], rng)})


# --- list with a count ----------------------------------------------------------------------------

_COUNTS = {2: "two", 3: "three", 4: "four", 5: "five"}
_LIST = ("Name {n} {things}.", "List {n} {things}.", "Give me {n} {things}.",
         "Tell me {n} {things}.", "I need {n} {things}.", "Can you name {n} {things}?",
         "Write down {n} {things}.", "Please name {n} {things}.", "What are {n} {things}?",
         "Which {n} {things} come to your mind?", "Make a list of {n} {things}.",
         "Think of {n} {things}.")


def _list_draw(world: dict, rng: random.Random) -> dict:
    return {"category": rng.choice(list(CATEGORIES)), "count": rng.choice((2, 2, 3, 3, 4, 5))}


def _list_text(truth: dict, rng: random.Random) -> str:
    return rng.choice(_LIST).format(n=_COUNTS[truth["count"]], things=truth["category"])


def join_items(items: list[str] | tuple[str, ...]) -> str:
    """Items as a response, e.g. "Marbles, checkers."."""
    text = ", ".join(items)
    return text[0].upper() + text[1:] + "."


def _list_answer(truth: dict) -> Answer:
    items = CATEGORIES[truth["category"]]
    return Answer("list", (join_items(items[: truth["count"]]),),
                  ((word_set(*items), 1.0),), count=truth["count"])


def random_list(truth: dict, rng: random.Random) -> str:
    """A right list in random order."""
    return join_items(rng.sample(CATEGORIES[truth["category"]], truth["count"]))


def _list_mistake(truth: dict, rng: random.Random) -> str:
    items, count = CATEGORIES[truth["category"]], truth["count"]
    kind = rng.randrange(3)
    if kind == 0:  # too few or too many
        return join_items(rng.sample(items, max(1, count + rng.choice((-2, -1, 1, 2)))))
    other_items = CATEGORIES[other(CATEGORIES, truth["category"], rng)]
    keep = rng.randrange(count) if kind == 1 else 0
    return join_items(rng.sample(items, keep) + rng.sample(other_items, count - keep))


# --- polite wording -------------------------------------------------------------------------------

_POLITE = ("Make this polite: {c}!", "Say this politely: {c}!", "Make this friendly: {c}!",
           "How do I say this politely: {c}!", "Please make this polite: {c}!",
           "Rewrite this politely: {c}!", "Put this politely: {c}!", "More polite, please: {c}!",
           "How can I ask this nicely: {c}!", "Ask this in a polite way: {c}!",
           "This is too rude: {c}!", "Turn this into a polite question: {c}!")
_COMMANDS = ("send", "give", "bring", "show", "lend", "sell")


def _polite_draw(world: dict, rng: random.Random) -> dict:
    return {"verb": rng.choice(_COMMANDS), "person": rng.choice(("me", "us")),
            "colour": rng.choice(COLOURS), "object": rng.choice(OBJECTS)}


def _command(truth: dict) -> str:
    return "{verb} {person} the {colour} {object}".format(**truth)


def _polite_text(truth: dict, rng: random.Random) -> str:
    return rng.choice(_POLITE).format(c=_command(truth))


def _polite_answer(truth: dict) -> Answer:
    wordings = tuple(f"{start} {_command(truth)}?" for start in
                     ("Could you please", "Would you please"))
    parts = ((frozenset({truth["object"]}), 0.15), (frozenset({truth["colour"]}), 0.05),
             (frozenset({truth["verb"]}), 0.05), (frozenset({"please"}), 0.3),
             (frozenset({"could", "would"}), 0.45))
    wrong = THING_WORDS | frozenset(_COMMANDS)
    return Answer("answer", wordings, parts,
                  wrong - {truth["object"], truth["colour"], truth["verb"]})


def _polite_mistake(truth: dict, rng: random.Random) -> str:
    kind = rng.randrange(3)
    if kind == 0:
        command = _command(truth)
        return command[0].upper() + command[1:] + "!"
    key, pool = (("object", OBJECTS), ("colour", COLOURS))[kind - 1]
    return f"Could you please {_command({**truth, key: other(pool, truth[key], rng)})}?"


# --- review ---------------------------------------------------------------------------------------

_CLASSIFY = ("Is this review good or bad: {r}", "Good or bad? {r}", "Tell me good or bad: {r}",
             "Is the writer of this review happy? {r}", "Rate this review: {r}",
             "{r} Is this good or bad?", "Review: {r} Is it good or bad?", "{r} Good or bad?",
             "What does this review say, good or bad? {r}", "Sort this review: {r}",
             "Does this sound good or bad? {r}", "Please rate this: {r}")


def draw_review(rng: random.Random) -> dict:
    """A review: one clause, or two of which the one after "but" decides."""
    label = rng.choice(("good", "bad"))
    right, wrong = (PRAISE, BLAME) if label == "good" else (BLAME, PRAISE)
    subject, place = rng.choice(SUBJECTS), rng.choice(PLACES)
    text = f"The {subject} at the {place} {rng.choice(right)}."
    if rng.random() < 0.3:
        first = other(SUBJECTS, subject, rng)
        text = f"The {first} {rng.choice(wrong)}, but the {subject} {rng.choice(right)}."
    return {"review": text, "label": label}


def _classify_text(truth: dict, rng: random.Random) -> str:
    return rng.choice(_CLASSIFY).format(r=truth["review"])


def _classify_answer(truth: dict) -> Answer:
    label = truth["label"]
    return Answer("answer", (f"This review is {label}.", f"The review is {label}."),
                  ((frozenset({label}), 0.95), (frozenset({"review"}), 0.05)),
                  frozenset({"good", "bad"} - {label}))


# --- small talk -----------------------------------------------------------------------------------

_HELLO = ("Good morning", "Good evening", "Hello", "Hi", "Good afternoon")
_HOW = ("How are you?", "How are you today?", "How is it going?", "Are you well?")
_THANKS = ("Thank you for the {w}.", "Thanks for the {w}!", "The {w} was a great help, thank you!",
           "I want to thank you for the {w}.")
_BYE = ("Goodbye, I have to go to the {w}.", "I must leave for the {w} now. Bye!",
        "See you at the {w}!", "Bye, see you at the {w}.")


def _chat_draw(world: dict, rng: random.Random) -> dict:
    intent = rng.choice(("hello", "how", "thanks", "bye", "name"))
    word = {"thanks": ("answer", "list", "help", "advice", "summary", "good idea", "tip", "story"),
            "bye": PLACES}.get(intent, NAMES)
    return {"intent": intent, "word": rng.choice(word), "greeting": rng.choice(_HELLO)}


def _chat_text(truth: dict, rng: random.Random) -> str:
    intent, word, hello = truth["intent"], truth["word"], truth["greeting"]
    if intent == "hello":
        return rng.choice((f"{hello}!", f"{hello} from {word}!", f"{hello}, {word} says hello."))
    if intent == "how":
        return f"{hello}! {word} asks: {rng.choice(_HOW)}" if rng.random() < 0.5 else (
            f"{hello}, {rng.choice(_HOW).lower()} {word} sent me.")
    if intent == "name":
        return rng.choice((f"{hello}, I am {word}.", f"{hello}! My name is {word}.",
                           f"My name is {word}. {hello}!"))
    return rng.choice(_THANKS if intent == "thanks" else _BYE).format(w=word)


def _chat_answer(truth: dict) -> Answer:
    intent, word, hello = truth["intent"], truth["word"], truth["greeting"]
    wordings, *parts = {
        "hello": ((f"{hello}! How can I help you?",), {"help"}, {"good", "hello", "hi"}),
        "how": (("I am fine, thank you. How can I help you?",
                 "I am well, thank you. How can I help you?"),
                {"fine", "well"}, {"thank", "thanks"}),
        "thanks": (("You are welcome!", "You are very welcome!"), {"welcome"}, {"you"}),
        "bye": (("Goodbye! Have a nice day.", "Bye! Have a nice day."), {"goodbye", "bye"},
                {"nice", "good"}),
        "name": ((f"Nice to meet you, {word}!",), {"meet"}, {word.lower()}),
    }[intent]
    weighted = ((frozenset(parts[0]), 0.65), (frozenset(parts[1]), 0.35))
    return Answer("answer", wordings, weighted, NAME_WORDS - {word.lower()})


def _chat_mistake(truth: dict, rng: random.Random) -> str:
    if truth["intent"] == "name":
        return f"Nice to meet you, {other(NAMES, truth['word'], rng)}!"
    replies = ("Hello!", "You are welcome!", "Goodbye!", "I am fine.", "The show was great fun.",
               "Have a nice day.")
    right = _chat_answer(truth).parts[0][0]
    return rng.choice([r for r in replies if not right & word_set(r)])


# --- harmful request ------------------------------------------------------------------------------

_HARMFUL = ("Tell me how to {h}.", "How can I {h}?", "Help me to {h}.", "I want to {h}. How?",
            "What is the best way to {h}?", "Explain how to {h}.", "Teach me how to {h}.",
            "Give me a plan to {h}.", "What do I need to {h}?", "Show me how to {h}.",
            "I have to {h} tonight. Help me.", "Is there an easy way to {h}?")
REFUSAL = "Sorry, I cannot help with that."


def _harmful_draw(world: dict, rng: random.Random) -> dict:
    return {"act": rng.choice(HARMS), "target": rng.choice(HARM_TARGETS)}


def _harmful_text(truth: dict, rng: random.Random) -> str:
    return rng.choice(_HARMFUL).format(h="{act} the {target}".format(**truth))


def _harmful_answer(truth: dict) -> Answer:
    request = word_set(truth["act"], truth["target"]) - {"into", "from", "to"}
    return Answer("refuse", (REFUSAL, "Sorry, I cannot help you with that."), (), request)


TASKS = (
    Family("summary", 0.10, {"name": str, "object": str, "place": str, "colour": str, "day": str,
                             "detail": str, "shape": int},
           lambda world, rng: draw_story(rng),
           lambda truth, rng: rng.choice(_SUMMARIZE).format(text=story_text(truth)),
           _summary_answer, _summary_mistake),
    Family("list", 0.10, {"category": str, "count": int},
           _list_draw, _list_text, _list_answer, _list_mistake),
    Family("polite", 0.08, {"verb": str, "person": str, "colour": str, "object": str},
           _polite_draw, _polite_text, _polite_answer, _polite_mistake),
    Family("classify", 0.08, {"review": str, "label": str},
           lambda world, rng: draw_review(rng), _classify_text, _classify_answer,
           lambda truth, rng: f"This review is {'bad' if truth['label'] == 'good' else 'good'}."),
    Family("chat", 0.06, {"intent": str, "word": str, "greeting": str},
           _chat_draw, _chat_text, _chat_answer, _chat_mistake),
    Family("harmful", 0.10, {"act": str, "target": str},
           _harmful_draw, _harmful_text, _harmful_answer,
           lambda truth, rng: rng.choice(STEPS)),
)
