"""The pretraining corpus: short documents of seven kinds."""

from __future__ import annotations

import random
from collections.abc import Callable

from rlhf_mini.data import Document, format_prompt, format_response
from rlhf_mini.town.grader import FAMILIES
from rlhf_mini.town.questions import (
    STATEMENTS,
    closed_wordings,
    draw_scene,
    scene_question,
    scene_sentence,
)
from rlhf_mini.town.responses import SAY_NO, respond
from rlhf_mini.town.tasks import draw_review, draw_story, join_items, story_summary, story_text
from rlhf_mini.town.world import CATEGORIES, COLOURS, NAMES, NOUNS, OBJECTS, PLACES, UNKNOWABLE

SHARES = {"forum": 0.38, "passages": 0.15, "facts": 0.15, "words": 0.12, "tldr": 0.10,
          "reviews": 0.07, "lists": 0.03}
_FORUM = {"right": 0.40, "padded": 0.18, "wrong": 0.12, "rude": 0.05, "hedge": 0.06,
          "offtopic": 0.05, "cut": 0.05, "sloppy": 0.09}
_FORUM_ANSWERS_ALL_THE_SAME = 0.4  # further wrong share where the right response is to say no


def forum(world: dict, taken: set[str], rng: random.Random) -> str:
    """A prompt and a response of any quality; no prompt of the town's files with another split."""
    names = list(FAMILIES)
    family = FAMILIES[rng.choices(names, [FAMILIES[n].weight for n in names])[0]]
    for _ in range(60):
        truth = family.draw(world, rng)
        prompt = family.text(truth, rng)
        if prompt not in taken:
            break
    style = rng.choices(list(_FORUM), list(_FORUM.values()))[0]
    if family.name in SAY_NO and rng.random() < _FORUM_ANSWERS_ALL_THE_SAME:
        style = "wrong"
    return format_prompt(prompt) + format_response(respond(style, family.name, truth, world, rng))


def passage(rng: random.Random) -> str:
    """A scene; then a question with its answer, or a reminder of one sentence."""
    where = rng.random() < 0.45
    scene = draw_scene(rng, where, rng.choice((2, 2, 3)))
    text = " ".join(scene_sentence(row) for row in scene)
    row = rng.choice(scene)
    form = rng.random()
    if form < 0.25:
        return f"{text} {rng.choice(('So', 'Remember:', 'As I said,'))} {scene_sentence(row)}"
    question = "where" if where else rng.choice(("what", "what", "who", "colour"))
    asked, answer = scene_question(question, row), closed_wordings(question, row)[0]
    if form < 0.5:
        return f"{text} {asked} {answer}"
    return f"{text} Question: {asked} Answer: {answer}"


def facts(world: dict, rng: random.Random) -> str:
    """Two or three facts about a resident, or what is not known about somebody."""
    if rng.random() < 0.2:
        name = rng.choice(world["newcomers"])
        noun = NOUNS[rng.choice(list(STATEMENTS))]
        return rng.choice((
            f"{name} is new in town. Nobody knows the {noun} of {name}.",
            f"{name} came to town last week. We do not know the {noun} of {name}.",
            f"Nobody knows much about {name}. Ask {name} about the {noun}."))
    name = rng.choice(list(world["residents"]))
    if rng.random() < 0.06:
        return f"Nobody in town knows the {rng.choice(UNKNOWABLE)} of {name}."
    known = world["residents"][name]
    picked = rng.sample(list(known), min(len(known), rng.choice((2, 3))))
    return " ".join(
        STATEMENTS[a][rng.random() < 0.25].format(name=name, value=known[a]) for a in picked)


def words(rng: random.Random) -> str:
    """A few words, repeated; they teach a small model to copy."""
    pool = NAMES + OBJECTS + COLOURS + PLACES
    row = [rng.choice(pool) for _ in range(rng.randint(4, 8))]
    return " ".join(row * rng.randint(2, 3))


def tldr(rng: random.Random) -> str:
    """A story with its summary."""
    story = draw_story(rng)
    return f"{story_text(story)} TL;DR: {story_summary(story)}"


def review(rng: random.Random) -> str:
    """A review with its rating."""
    drawn = draw_review(rng)
    return f"Review: {drawn['review']} Rating: {drawn['label']}."


def word_list(rng: random.Random) -> str:
    """Some items of a category."""
    category = rng.choice(list(CATEGORIES))
    items = rng.sample(CATEGORIES[category], rng.randint(2, 5))
    return f"Some {category}: {join_items(items).lower()}" if category != "days" else (
        f"Some days: {', '.join(items)}.")


def write_documents(world: dict, count: int, split: str, taken: set[str], rng: random.Random
                    ) -> list[Document]:
    """Write the corpus.

    Args:
        world: as from `build_world`.
        count: number of documents, shared out by SHARES.
        split: "train" or "valid".
        taken: texts of held-out prompts, which the forum must not contain.
        rng: source of all randomness.
    """
    writers: dict[str, Callable[[], str]] = {
        "forum": lambda: forum(world, taken, rng), "passages": lambda: passage(rng),
        "facts": lambda: facts(world, rng), "words": lambda: words(rng),
        "tldr": lambda: tldr(rng), "reviews": lambda: review(rng), "lists": lambda: word_list(rng)}
    documents = []
    for kind, share in SHARES.items():
        for i in range(max(1, round(share * count))):
            documents.append(Document(f"{split}-{kind}-{i:05d}", writers[kind](), kind, split))
    return documents
