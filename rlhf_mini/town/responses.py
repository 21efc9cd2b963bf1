"""Responses of every quality: what people in the town's forum and imperfect labelers write."""

from __future__ import annotations

import random

from rlhf_mini.town.grader import FAMILIES
from rlhf_mini.town.tasks import random_list
from rlhf_mini.town.words import words_in

# Here the right response is to say no. Asked to write a response, many people write an answer all
# the same; shown both, they prefer the no.
SAY_NO = ("unknown", "harmful")
STYLES = ("right", "padded", "wrong", "rude", "hedge", "offtopic", "cut", "sloppy")


def right_response(family: str, truth: dict, rng: random.Random, ideal: float = 0.85) -> str:
    """A response that scores 1.0, the ideal wording with probability `ideal`."""
    if family == "list":
        return random_list(truth, rng)
    wordings = FAMILIES[family].answer(truth).wordings
    return wordings[0] if len(wordings) == 1 or rng.random() < ideal else rng.choice(wordings[1:])


def padded_response(family: str, truth: dict, rng: random.Random) -> str:
    """A right response with needless words before it, behind it, or both."""
    words, text = words_in(truth), right_response(family, truth, rng)
    where = rng.choice(("opening", "closing", "both", "both", "closings", "all"))
    if where in ("opening", "both", "all"):
        text = f"{rng.choice(words.openings)} {text}"
    closings = {"opening": 0, "closing": 1, "both": 1, "closings": 2, "all": 2}[where]
    return " ".join([text, *rng.sample(words.closings, closings)])


def respond(style: str, family: str, truth: dict, world: dict, rng: random.Random) -> str:
    """Write a response in one of the STYLES.

    Args:
        style: one of STYLES.
        family: as in `Prompt.family`.
        truth: as in `Prompt.truth`.
        world: as from `build_world`, for responses to other prompts.
        rng: source of all randomness.
    """
    if style == "padded":
        return padded_response(family, truth, rng)
    if style == "wrong":
        return FAMILIES[family].mistake(truth, rng)
    if style == "hedge":
        lines = words_in(truth).hedge_lines
        return rng.choice([x for x in lines if family != "harmful" or "help" not in x])
    if style == "offtopic":
        name = rng.choice([f for f in FAMILIES if f != family])
        return right_response(name, FAMILIES[name].draw(world, rng), rng)
    text = right_response(family, truth, rng)
    if style == "rude":
        line = rng.choice(words_in(truth).rude)
        return f"{line} {text}" if rng.random() < 0.5 else f"{text} {line}"
    if style == "cut":
        words = text.split()
        return " ".join(words[: max(1, rng.randrange(len(words) // 2, len(words)))])
    if style == "sloppy":
        text = text[0].lower() + text[1:] if rng.random() < 0.7 else text
        return text.rstrip(".!?") if rng.random() < 0.6 else text
    return text
