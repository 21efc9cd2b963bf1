"""The pretraining corpus: short documents of seven kinds."""

from __future__ import annotations

import random
from collections.abc import Callable

from rlhf_mini.data import Document, format_prompt, format_response
from rlhf_mini.town.grader import FAMILIES
from rlhf_mini.town.questions import closed_wordings, draw_scene, scene_question, scene_sentence
from rlhf_mini.town.responses import SAY_NO, respond
from rlhf_mini.town.tasks import draw_review, draw_story, story_summaries, story_text
from rlhf_mini.town.words import Words, words_in

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


def passage(words: Words, rng: random.Random) -> str:
    """A scene; then a question with its answer, or a reminder of one sentence."""
    where = rng.random() < 0.45
    scene = draw_scene(words, rng, where, rng.choice((2, 2, 3)))
    text = " ".join(scene_sentence(row) for row in scene)
    row = rng.choice(scene)
    form = rng.random()
    if form < 0.25:
        return f"{text} {rng.choice(('So', 'Remember:', 'As I said,'))} {scene_sentence(row)}"
    question = "where" if where else rng.choice(("what", "what", "who", "colour"))
    asked, answer = scene_question(words, question, row), closed_wordings(question, row)[0]
    if form < 0.5:
        return f"{text} {asked} {answer}"
    return f"{text} Question: {asked} Answer: {answer}"


def facts(world: dict, rng: random.Random) -> str:
    """Two or three facts about a resident, or what is not known about somebody."""
    words = words_in(world)
    if rng.random() < 0.2:
        name = rng.choice(world["newcomers"])
        noun = words.nouns[rng.choice(list(words.statements))]
        return rng.choice((
            f"{name} is new in town. Nobody knows the {noun} of {name}.",
            f"{name} came to town last week. We do not know the {noun} of {name}.",
            f"Nobody knows much about {name}. Ask {name} about the {noun}."))
    name = rng.choice(list(world["residents"]))
    if rng.random() < 0.06:
        return f"Nobody in town knows the {rng.choice(words.unknowable)} of {name}."
    known = world["residents"][name]
    picked = rng.sample(list(known), min(len(known), rng.choice(words.facts_together)))
    return " ".join(_statement(words.statements[a], rng).format(name=name, value=known[a])
                    for a in picked)


def _statement(templates: tuple[str, ...], rng: random.Random) -> str:
    """The first template in three cases out of four, else one of the others."""
    u = 4 * rng.random()
    return templates[0] if u >= 1 else templates[1 + int(u * (len(templates) - 1))]


def copies(words: Words, rng: random.Random) -> str:
    """A few words, repeated; they teach a small model to copy."""
    row = [rng.choice(words.copied) for _ in range(rng.randint(4, 8))]
    return " ".join(row * rng.randint(2, 3))


def tldr(words: Words, rng: random.Random) -> str:
    """A story with its summary."""
    story = draw_story(words, rng)
    return f"{story_text(words, story)} TL;DR: {story_summaries(words, story)[0]}"


def review(words: Words, rng: random.Random) -> str:
    """A review with its rating."""
    drawn = draw_review(words, rng)
    return f"Review: {drawn['review']} Rating: {drawn['label']}."


def word_list(words: Words, rng: random.Random) -> str:
    """Some items of a category."""
    category = rng.choice(list(words.categories))
    items = rng.sample(words.categories[category], rng.randint(2, 5))
    return f"Some {category}: {', '.join(items)}."


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
    words = words_in(world)
    writers: dict[str, Callable[[], str]] = {
        "forum": lambda: forum(world, taken, rng), "passages": lambda: passage(words, rng),
        "facts": lambda: facts(world, rng), "words": lambda: copies(words, rng),
        "tldr": lambda: tldr(words, rng), "reviews": lambda: review(words, rng),
        "lists": lambda: word_list(words, rng)}
    documents = []
    for kind, share in SHARES.items():
        for i in range(max(1, round(share * count))):
            documents.append(Document(f"{split}-{kind}-{i:05d}", writers[kind](), kind, split))
    return documents
