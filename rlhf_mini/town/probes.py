"""Zero-shot probes of the base model's skills: texts that greedy decoding should continue."""

from __future__ import annotations

import random
from functools import cache

from rlhf_mini.data import ZeroShotItem
from rlhf_mini.town.questions import draw_scene, scene_question, scene_sentence
from rlhf_mini.town.tasks import draw_story, story_summaries, story_text
from rlhf_mini.town.words import Words, words_in


@cache
def _stems(words: Words) -> dict[str, str]:
    """Per attribute the first statement, without its value, that can go on in one way only.

    "Nils likes" could go on with "to eat", and "Nils has a" with "house".
    """
    stems = {a: [s.removesuffix(" {value}.") for s in templates if s.endswith(" {value}.")]
             for a, templates in words.statements.items()}
    every = [s for templates in words.statements.values() for s in templates]
    return {a: next(s for s in own if sum(t.startswith(f"{s} ") for t in every) == 1)
            for a, own in stems.items()}


def fact(world: dict, rng: random.Random) -> tuple[str, str]:
    """A statement about a resident without its value."""
    name = rng.choice(list(world["residents"]))
    attribute = rng.choice(list(world["residents"][name]))
    stem = _stems(words_in(world))[attribute].format(name=name)
    return stem, f" {world['residents'][name][attribute]}."


def reading(world: dict, rng: random.Random) -> tuple[str, str]:
    """A passage of three sentences, a question, and the answer up to what was asked for."""
    words, where = words_in(world), rng.random() < 0.5
    scene = draw_scene(words, rng, where, 3)
    row = rng.choice(scene)
    text = " ".join(scene_sentence(r) for r in scene)
    question = scene_question(words, "where" if where else "what", row)
    text += f" Question: {question} Answer: {row[0]}"
    if where:
        return f"{text} is at the", f" {row[1]}."
    return f"{text} {row[1]} a", f" {row[2]} {row[3]}."


def summary(world: dict, rng: random.Random) -> tuple[str, str]:
    """A story with "TL;DR:" and its ideal summary."""
    words = words_in(world)
    story = draw_story(words, rng)
    return f"{story_text(words, story)} TL;DR:", f" {story_summaries(words, story)[0]}"


def sentiment(world: dict, rng: random.Random) -> tuple[str, str]:
    """A review with clauses of both kinds, in three shapes of which the corpus has one."""
    words, label = words_in(world), rng.choice(("good", "bad"))
    right, wrong = words.praise, words.blame
    if label == "bad":
        right, wrong = wrong, right
    subjects = rng.sample(words.subjects, 3)
    clauses = [f"the {s} {rng.choice(w)}" for s, w in
               zip(subjects, (wrong, right, right), strict=True)]
    shape = rng.randrange(3)
    if shape == 0:
        text = f"{clauses[0]}, but {clauses[1]}"
    elif shape == 1:
        text = f"{clauses[1]}, although {clauses[0]}"
    else:
        text = f"{clauses[0]}, but {clauses[1]} and {clauses[2]}"
    text = text[0].upper() + text[1:]
    return f"Review: {text}. Rating:", f" {label}."


TASKS = {"facts": fact, "reading": reading, "summary": summary, "sentiment": sentiment}


def write_zero_shot(world: dict, count: int, rng: random.Random) -> list[ZeroShotItem]:
    """Write up to `count` different items of each task (fewer where the town is small)."""
    items = []
    for task, draw in TASKS.items():
        texts: set[str] = set()
        for _ in range(20 * count):
            text, target = draw(world, rng)
            if text in texts:
                continue
            texts.add(text)
            items.append(ZeroShotItem(f"{task}-{len(texts) - 1:03d}", task, text, target))
            if len(texts) == count:
                break
    return items
