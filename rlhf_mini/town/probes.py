"""Zero-shot probes of the base model's skills, scored by the likelihood of the choices."""

from __future__ import annotations

import random

from rlhf_mini.data import ZeroShotItem
from rlhf_mini.town.answers import other
from rlhf_mini.town.questions import STATEMENTS, draw_scene, scene_question, scene_sentence
from rlhf_mini.town.tasks import draw_story, story_summary, story_text
from rlhf_mini.town.world import ATTRIBUTES, BLAME, OBJECTS, PLACES, PRAISE, SUBJECTS


def _shuffled(right: str, wrong: list[str], rng: random.Random) -> tuple[tuple[str, ...], int]:
    choices = [right, *wrong]
    rng.shuffle(choices)
    return tuple(choices), choices.index(right)


def fact(world: dict, rng: random.Random) -> tuple[str, str, list[str]]:
    """A statement about a resident without its last word."""
    name = rng.choice(list(world["residents"]))
    attribute = rng.choice(list(world["residents"][name]))
    value = world["residents"][name][attribute]
    wrong = rng.sample([v for v in ATTRIBUTES[attribute] if v != value], 3)
    stem = STATEMENTS[attribute][0].split("{value}")[0].strip().format(name=name)
    return stem, f" {value}.", [f" {v}." for v in wrong]


def reading(world: dict, rng: random.Random) -> tuple[str, str, list[str]]:
    """A passage of three sentences and a question; the choices all stand in the passage."""
    where = rng.random() < 0.5
    scene = draw_scene(rng, where, 3)
    row, *rest = rng.sample(scene, 3)
    text = " ".join(scene_sentence(r) for r in scene)
    asked = scene_question("where" if where else "what", row)
    if where:
        return (f"{text} Question: {asked} Answer: {row[0]} is at the", f" {row[1]}.",
                [f" {r[1]}." for r in rest])
    return (f"{text} Question: {asked} Answer: {row[0]} {row[1]} a", f" {row[2]} {row[3]}.",
            [f" {r[2]} {r[3]}." for r in rest])


def summary(world: dict, rng: random.Random) -> tuple[str, str, list[str]]:
    """A story with "TL;DR:"; wrong summaries differ in object or place."""
    story = draw_story(rng)
    wrong = [{**story, "object": other(OBJECTS, story["object"], rng)},
             {**story, "place": other(PLACES, story["place"], rng)},
             {**story, "object": other(OBJECTS, story["object"], rng),
              "place": other(PLACES, story["place"], rng)}]
    return (f"{story_text(story)} TL;DR:", f" {story_summary(story)}",
            [f" {story_summary(s)}" for s in wrong])


def sentiment(world: dict, rng: random.Random) -> tuple[str, str, list[str]]:
    """A review with clauses of both kinds, in three shapes of which the corpus has one."""
    label, opposite = rng.choice((("good", "bad"), ("bad", "good")))
    right, wrong = (PRAISE, BLAME) if label == "good" else (BLAME, PRAISE)
    subjects = rng.sample(SUBJECTS, 3)
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
    return f"Review: {text}. Rating:", f" {label}.", [f" {opposite}."]


TASKS = {"facts": fact, "reading": reading, "summary": summary, "sentiment": sentiment}


def write_zero_shot(world: dict, count: int, rng: random.Random) -> list[ZeroShotItem]:
    """Write up to `count` different items of each task (fewer where the town is small)."""
    items = []
    for task, draw in TASKS.items():
        texts: set[str] = set()
        for _ in range(20 * count):
            text, right, wrong = draw(world, rng)
            if text in texts:
                continue
            texts.add(text)
            choices, index = _shuffled(right, wrong, rng)
            items.append(ZeroShotItem(f"{task}-{len(texts) - 1:03d}", task, text, choices, index))
            if len(texts) == count:
                break
    return items
