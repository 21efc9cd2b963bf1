"""Build the town: world, prompts, demonstrations, corpus, probes and labelers from one seed."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_mini.config import TownConfig
from rlhf_mini.data import Demonstration, Document, Prompt, ZeroShotItem
from rlhf_mini.runtime import make_rng
from rlhf_mini.town.corpus import write_documents
from rlhf_mini.town.labelers import Labeler, build_labelers
from rlhf_mini.town.probes import write_zero_shot
from rlhf_mini.town.prompts import build_customers, write_demonstrations, write_prompts
from rlhf_mini.town.residents import build_world
from rlhf_mini.town.words import LARGE, SMALL

NEWCOMERS = 16  # people about whom nothing is known, per unit of size
LABELERS, TEST_LABELERS = 8, 4
VALID_DOCUMENTS = 30  # one held-out document for so many training documents
ZERO_SHOT_ITEMS = 150  # per task


@dataclass(frozen=True)
class Town:
    """The synthetic world and everything that was written in it.

    Attributes:
        config: what it was built from.
        world: {"residents": {name: {attribute: value}}, "newcomers": [name], "customers": [...]},
            and the mark of a large town.
        prompts: all splits; labelers' prompts are in "train".
        demonstrations: splits "train" and "valid".
        documents: the corpus, splits "train" and "valid".
        zero_shot: probes of the base model.
        labelers: groups "train" and "test".
    """

    config: TownConfig
    world: dict
    prompts: list[Prompt]
    demonstrations: list[Demonstration]
    documents: list[Document]
    zero_shot: list[ZeroShotItem]
    labelers: list[Labeler]


def build_town(config: TownConfig) -> Town:
    """Build a town; the same config gives the same town everywhere.

    Args:
        config: seed, numbers and shares; all numbers are multiplied by `config.size`.

    Raises:
        ValueError: if the town is too small for what the config asks for.
    """
    def rng(*names: str):
        return make_rng(config.seed, "town", *names)

    size = config.size
    words = SMALL if size == 1 else LARGE
    world = build_world(words, size * config.residents, size * NEWCOMERS, rng("world"))
    world["customers"] = build_customers(rng("customers"))
    labelers = build_labelers(LABELERS, TEST_LABELERS, config.label_noise, rng("labelers"))
    taken: set[str] = set()
    test = write_prompts(world, size * config.test_prompts, "test", taken, rng("test"))
    valid = write_prompts(world, size * config.valid_prompts, "valid", taken, rng("valid"))
    held_out = set(taken)
    train = write_prompts(world, size * config.labeler_prompts, "train", taken, rng("labeler"),
                          labelers=True)
    train += write_prompts(world, size * config.customer_prompts, "train", taken,
                           rng("customer"))
    people = [x for x in labelers if x.group == "train"]
    shares = (config.demonstration_errors, config.demonstration_padding)
    demonstrations = write_demonstrations(
        train, size * config.demonstrations, people, world, *shares, rng("demonstrations"))
    demonstrations += write_demonstrations(
        valid, size * config.valid_demonstrations, people, world, *shares,
        rng("valid demonstrations"))
    documents = write_documents(world, size * config.documents, "train", held_out, rng("corpus"))
    documents += write_documents(world, -(-size * config.documents // VALID_DOCUMENTS), "valid",
                                 held_out, rng("valid corpus"))
    return Town(config, world, train + valid + test, demonstrations, documents,
                write_zero_shot(world, ZERO_SHOT_ITEMS, rng("zero shot")), labelers)
