"""The customers with their habits, and the prompts that they and the labelers write."""

from __future__ import annotations

import dataclasses
import random

from rlhf_mini.data import Demonstration, Prompt
from rlhf_mini.town.grader import FAMILIES
from rlhf_mini.town.labelers import Labeler
from rlhf_mini.town.responses import SAY_NO, respond, right_response

CUSTOMERS = {"train": range(0, 30), "valid": range(30, 35), "test": range(35, 45)}
_PREFIXES = ("", "", "Hello. ", "Please help me. ", "Quick question. ", "Hi there. ",
             "For my class: ", "One more thing. ", "I am in a hurry. ", "Dear helper, ")
_NEW_PREFIXES = ("Good day to you. ", "My boss wants this: ", "Here is a new task. ",
                 "A friend asks me: ", "This is for the paper. ", "I am back. ")
_SUFFIXES = ("", "", "", " Thanks!", " Thank you.", " Please be brief.", " Can you help?")
_TRIES = 60


def build_customers(rng: random.Random) -> list[dict]:
    """Draw the customers' habits; test customers also use prefixes of no other split.

    Returns:
        [{"id", "split", "prefix", "suffix", "mix": {family: share}}].
    """
    customers = []
    for split, ids in CUSTOMERS.items():
        for i in ids:
            new = split == "test" and i % 2 == 1
            raw = {f.name: f.weight * rng.uniform(0.4, 1.6) for f in FAMILIES.values()}
            total = sum(raw.values())
            customers.append({
                "id": i, "split": split, "prefix": rng.choice(_NEW_PREFIXES if new else _PREFIXES),
                "suffix": rng.choice(_SUFFIXES),
                "mix": {name: round(w / total, 4) for name, w in raw.items()}})
    return customers


def _wording(family: str, truth: dict, customer: dict | None, rng: random.Random) -> str:
    text = FAMILIES[family].text(truth, rng)
    if customer is None or family == "chat":
        return text
    prefix, suffix = customer["prefix"], customer["suffix"]
    if prefix.endswith(", ") and not text.startswith("I "):
        name_first = truth.get("name") and text.startswith(truth["name"])
        text = text if name_first else text[0].lower() + text[1:]
    return prefix + text + (suffix if rng.random() < 0.7 else "")


def write_prompts(world: dict, count: int, split: str, taken: set[str], rng: random.Random,
                  labelers: bool = False) -> list[Prompt]:
    """Write prompts whose texts are all new.

    Args:
        world: facts and customers.
        count: number of prompts.
        split: whose customers write them.
        taken: texts in use; the new ones are added.
        rng: source of all randomness.
        labelers: written by labelers instead of customers.

    Raises:
        ValueError: if the town has no `count` different prompts.
    """
    customers = [c for c in world["customers"] if c["split"] == split]
    prompts = []
    for i in range(count):
        customer = None if labelers else customers[i % len(customers)]
        mix = customer["mix"] if customer else {f.name: f.weight for f in FAMILIES.values()}
        family = rng.choices(list(mix), list(mix.values()))[0]
        for _ in range(_TRIES):
            truth = FAMILIES[family].draw(world, rng)
            text = _wording(family, truth, customer, rng)
            if text not in taken:
                break
            family = rng.choices(list(mix), list(mix.values()))[0]
        else:
            raise ValueError(f"TownConfig asks for {count} more prompts of split {split}, but the "
                             f"town ran out of new texts after {i}: ask for fewer prompts")
        taken.add(text)
        number = len(prompts)
        prompts.append(Prompt(
            f"{split}-{'labeler' if labelers else 'customer'}-{number:05d}", text,
            "labeler" if labelers else "customer", customer["id"] if customer else None,
            split, family, truth))
    return prompts


def reword(prompt: Prompt, rng: random.Random) -> Prompt:
    """The same request in other words, without the customer's habits.

    Raises:
        ValueError: if the prompt does not come from the town.
    """
    if prompt.family not in FAMILIES or prompt.truth is None:
        raise ValueError(f"prompt {prompt.id!r}: only prompts of the town can be reworded")
    text = prompt.prompt
    for _ in range(_TRIES):
        if text != prompt.prompt and text not in prompt.prompt:
            break
        text = FAMILIES[prompt.family].text(prompt.truth, rng)
    return dataclasses.replace(prompt, id=f"{prompt.id}-reworded", prompt=text)


def write_demonstrations(prompts: list[Prompt], count: int, labelers: list[Labeler], world: dict,
                         errors: float, padding: float, rng: random.Random
                         ) -> list[Demonstration]:
    """Let imperfect labelers write responses to some of the prompts.

    Args:
        prompts: one split; `count` of them are drawn.
        count: number of demonstrations, at most len(prompts).
        labelers: who writes them.
        world: as from `build_world`.
        errors: share of wrong or weak responses; where the right response is to say no, twice as
            many labelers answer all the same before that.
        padding: of the other responses, the share with needless words or bad form.
        rng: source of all randomness.

    Raises:
        ValueError: if there are too few prompts.
    """
    if count > len(prompts):
        raise ValueError(f"TownConfig asks for {count} demonstrations, expected at most the "
                         f"{len(prompts)} prompts of that split")
    demonstrations = []
    for i, prompt in enumerate(rng.sample(prompts, count)):
        if prompt.family in SAY_NO and rng.random() < 2 * errors:
            style = "wrong"
        elif rng.random() < errors:
            style = rng.choice(("wrong",) * 6 + ("hedge", "offtopic", "cut", "rude"))
        elif rng.random() < padding:
            style = rng.choice(("padded",) * 8 + ("sloppy",))
        else:
            style = "right"
        if style == "right":
            text = right_response(prompt.family, prompt.truth, rng, ideal=0.95)
        else:
            text = respond(style, prompt.family, prompt.truth, world, rng)
        demonstrations.append(Demonstration(
            f"{prompt.split}-demo-{i:04d}", prompt.prompt, text, prompt.source, prompt.customer,
            prompt.split, rng.choice(labelers).id))
    return demonstrations
