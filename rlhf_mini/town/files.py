"""The town's files: write, load and check them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

from rlhf_mini.config import TownConfig
from rlhf_mini.data import (
    DataError,
    Demonstration,
    Document,
    Prompt,
    ZeroShotItem,
    iterate_jsonl,
    parse_record,
    write_jsonl,
)
from rlhf_mini.runtime import atomic_directory, check_replaceable, read_json, write_json
from rlhf_mini.town.build import Town
from rlhf_mini.town.corpus import SHARES
from rlhf_mini.town.grader import FAMILIES, grade, ideal_response
from rlhf_mini.town.labelers import Labeler
from rlhf_mini.town.prompts import CUSTOMERS
from rlhf_mini.town.words import MARK, words_in


def write_town(town: Town, directory: str | Path) -> None:
    """Write all files of a town; the folder is replaced as a whole.

    Raises:
        OutputError: if it cannot be written, or holds other things than a town.
    """
    check_replaceable(directory, "world.json", "stage.json")
    with atomic_directory(directory) as folder:
        (folder / "corpus").mkdir()
        write_jsonl(folder / "prompts.jsonl", town.prompts)
        write_jsonl(folder / "demonstrations.jsonl", town.demonstrations)
        write_jsonl(folder / "zero_shot.jsonl", town.zero_shot)
        for kind in SHARES:
            write_jsonl(folder / "corpus" / f"{kind}.jsonl",
                        [d for d in town.documents if d.kind == kind])
        write_json(folder / "world.json", town.world)
        write_json(folder / "labelers.json", [dataclasses.asdict(x) for x in town.labelers])
        settings = dataclasses.asdict(town.config)
        if settings["size"] == 1:  # the files of size 1 are those from before there were sizes
            del settings["size"]
        write_json(folder / "config.json", settings)


def load_town(directory: str | Path) -> Town:
    """Read and check the files that `write_town` wrote.

    Raises:
        DataError: naming file, line, field and what would be right.
    """
    folder = Path(directory)
    if not (folder / "config.json").is_file():
        raise DataError(f"{folder}: holds no town (no config.json); `rlhf-mini town --write "
                        "FOLDER` writes one")
    settings = read_json(folder / "config.json")
    if isinstance(settings, dict):
        settings = {"size": 1, **settings}
    config = _build(folder / "config.json", TownConfig, settings)
    world = read_json(folder / "world.json")
    _check_world(folder / "world.json", world, config.size)
    labelers = _labelers(folder / "labelers.json")
    prompts = _read(folder / "prompts.jsonl", Prompt, _prompt_checker(world))
    by_text = {p.prompt: p for p in prompts}
    people = {x.id for x in labelers if x.group == "train"}
    demonstrations = _read(folder / "demonstrations.jsonl", Demonstration,
                           _demonstration_checker(by_text, people))
    held_out = {p.prompt for p in prompts if p.split != "train"}
    documents = []
    for kind in SHARES:
        documents += _read(folder / "corpus" / f"{kind}.jsonl", Document,
                           _document_checker(kind, held_out))
    documents.sort(key=lambda d: d.split)  # stable: train before valid, kinds in order
    zero_shot = _read(folder / "zero_shot.jsonl", ZeroShotItem, lambda item: None)
    return Town(config, world, prompts, demonstrations, documents, zero_shot, labelers)


def validate_town(directory: str | Path) -> None:
    """Check a town's files.

    Raises:
        DataError: naming file, line, field and what would be right.
    """
    load_town(directory)


class _Problem(Exception):
    """A field that is wrong; the reader adds file and line."""


def _problem(field: str, message: str) -> _Problem:
    return _Problem(f"field '{field}': {message}")


def _read(path: Path, record_type: type, check: Callable) -> list:
    """Read one file; the check may raise _Problem."""
    if not path.exists():
        raise DataError(f"{path}: missing; `write_town` writes it")
    records, ids = [], set()
    for where, row in iterate_jsonl(path):
        record = parse_record(row, record_type, where)
        try:
            if record.id in ids:
                raise _problem("id", f"{record.id!r} occurs twice, expected a new one")
            check(record)
        except _Problem as error:
            raise DataError(f"{where}: {error}") from None
        ids.add(record.id)
        records.append(record)
    if not records:
        raise DataError(f"{path}: no records, expected at least one")
    return records


def _build(path: Path, kind: type, row: object) -> object:
    """A config or labeler from JSON."""
    names = {f.name for f in dataclasses.fields(kind)}
    if not isinstance(row, dict) or set(row) != names:
        got = sorted(row) if isinstance(row, dict) else row
        raise DataError(f"{path}:1: got {got}, expected the fields {sorted(names)}")
    try:
        return kind(**row)
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}:1: {error}") from error


def _check_world(path: Path, world: object, size: int) -> None:
    mark = {} if size == 1 else MARK
    wanted = ("residents", "newcomers", "customers", *mark)
    if not isinstance(world, dict) or sorted(world) != sorted(wanted):
        raise DataError(f"{path}:1: expected an object with the keys {', '.join(wanted)}")
    if words_in(world) is not words_in(mark):
        raise DataError(f"{path}:1: field 'words': got {world['words']!r}, expected "
                        f"{mark['words']!r} in a town of size {size}")
    for customer in world["customers"]:
        split = _split_of(customer["id"])
        if customer["split"] != split:
            raise DataError(f"{path}:1: field 'customers': customer {customer['id']} has split "
                            f"{customer['split']!r}, expected {split!r}")


def _labelers(path: Path) -> list[Labeler]:
    labelers = []
    for row in read_json(path):
        labeler = _build(path, Labeler, row)
        labeler = dataclasses.replace(labeler, weights=tuple(labeler.weights))
        if labeler.group not in ("train", "test"):
            raise DataError(f"{path}:1: field 'group': labeler {labeler.id} has "
                            f"{labeler.group!r}, expected 'train' or 'test'")
        if len(labeler.weights) != 3 or not math.isclose(sum(labeler.weights), 1, abs_tol=1e-3):
            raise DataError(f"{path}:1: field 'weights': labeler {labeler.id} has "
                            f"{labeler.weights}, expected three numbers that sum to 1")
        labelers.append(labeler)
    return labelers


def _split_of(customer: int) -> str | None:
    return next((split for split, ids in CUSTOMERS.items() if customer in ids), None)


def _prompt_checker(world: dict) -> Callable[[Prompt], None]:
    seen: dict[str, str] = {}

    def check(p: Prompt) -> None:
        if p.source == "labeler" and (p.customer is not None or p.split != "train"):
            raise _problem("source", "a labeler's prompt has split 'train' and no customer, got "
                           f"split {p.split!r} and customer {p.customer}")
        if p.source == "customer":
            split = _split_of(p.customer) if p.customer is not None else None
            if split is None:
                raise _problem("customer", f"got {p.customer}, expected a customer of the town, "
                               f"0 to {max(CUSTOMERS['test'])}")
            if p.split != split:
                raise _problem("split", f"got {p.split!r}, expected {split!r}, the split of "
                               f"customer {p.customer}")
        if p.source not in ("labeler", "customer"):
            raise _problem("source", f"got {p.source!r}, expected 'labeler' or 'customer'")
        _check_truth(p, world)
        other = seen.setdefault(p.prompt, p.split)
        if other != p.split:
            raise _problem("prompt", f"the same text stands in the splits {other!r} and "
                           f"{p.split!r}, expected one of them only")

    return check


def _check_truth(p: Prompt, world: dict) -> None:
    if p.family not in FAMILIES:
        raise _problem("family", f"got {p.family!r}, expected one of {', '.join(FAMILIES)}")
    keys = FAMILIES[p.family].keys | ({"words": str} if "words" in world else {})
    if p.truth is None or set(p.truth) != set(keys):
        got = "nothing" if p.truth is None else ", ".join(sorted(p.truth))
        raise _problem("truth", f"got {got}; family {p.family!r} needs {', '.join(keys)}")
    for key, kind in keys.items():
        if type(p.truth[key]) is not kind:
            raise _problem(f"truth.{key}", f"got {p.truth[key]!r}, expected a {kind.__name__}")
    if words_in(p.truth) is not words_in(world):
        raise _problem("truth.words", f"got {p.truth['words']!r}, expected {world['words']!r}, as "
                       "in world.json")
    if p.family == "known":
        fact = world["residents"].get(p.truth["name"], {}).get(p.truth["attribute"])
        if fact != p.truth["value"]:
            raise _problem("truth.value", f"got {p.truth['value']!r}, expected {fact!r}, "
                           "as in world.json")
    try:
        score = grade(p, ideal_response(p)).overall
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise _problem("truth", f"cannot be graded ({error!r}), expected values like those of the "
                       f"other prompts of family {p.family!r}") from None
    if score != 1.0:
        raise _problem("truth", f"its ideal response scores {score}, expected 1.0: the truth "
                       "contradicts itself")


def _demonstration_checker(by_text: dict[str, Prompt], people: set[int]
                           ) -> Callable[[Demonstration], None]:
    def check(d: Demonstration) -> None:
        prompt = by_text.get(d.prompt)
        if prompt is None:
            raise _problem("prompt", f"got {d.prompt!r}, expected a prompt of prompts.jsonl")
        for name in ("split", "source", "customer"):
            if getattr(d, name) != getattr(prompt, name):
                raise _problem(name, f"got {getattr(d, name)!r}, expected "
                               f"{getattr(prompt, name)!r}, as in prompts.jsonl ({prompt.id})")
        if d.split == "test":
            raise _problem("split", "got 'test', expected 'train' or 'valid': test prompts have "
                           "no demonstrations")
        if d.labeler not in people:
            raise _problem("labeler", f"got {d.labeler}, expected a training labeler: "
                           f"{', '.join(map(str, sorted(people)))}")

    return check


def _document_checker(kind: str, held_out: set[str]) -> Callable[[Document], None]:
    def check(d: Document) -> None:
        if d.kind != kind:
            raise _problem("kind", f"got {d.kind!r}, expected {kind!r}, as the file's name")
        if d.split not in ("train", "valid"):
            raise _problem("split", f"got {d.split!r}, expected 'train' or 'valid'")
        if kind == "forum":
            prompt = d.text.removeprefix("User: ").split("\nAssistant:")[0]
            if prompt in held_out:
                raise _problem("text", f"holds the held-out prompt {prompt!r}, expected only "
                               "texts that no validation or test customer wrote")

    return check
