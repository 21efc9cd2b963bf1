"""The records that the project's files hold, and the one place where they are checked.

A record type is the schema of its file: every reader and every writer goes through
`check_record`, so no file holds a record that a later stage would stumble over.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import types
import typing
from dataclasses import dataclass

SPLITS = ("train", "valid", "test")
SOURCES = ("labeler", "customer", "user")


class DataError(ValueError):
    """Bad data; the message names file, line, field and what would be right."""


@dataclass(frozen=True)
class Prompt:
    """What a labeler, a customer or a user types."""

    id: str
    prompt: str
    source: str = "user"  # "labeler" | "customer" | "user"
    customer: int | None = None
    split: str = "train"  # "train" | "valid" | "test"
    family: str | None = None  # the town's kind of prompt
    truth: dict | None = None  # what the gold grader needs


@dataclass(frozen=True)
class Demonstration:
    """A prompt with the response that a labeler wrote."""

    id: str
    prompt: str
    response: str
    source: str = "user"
    customer: int | None = None
    split: str = "train"
    labeler: int | None = None


@dataclass(frozen=True)
class Ranking:
    """K responses to one prompt, ranked by one labeler."""

    id: str
    prompt: str
    responses: tuple[str, ...]  # K texts
    ranks: tuple[int, ...]  # K ranks, 1 = best, equal = tie
    split: str = "train"
    labeler: int | None = None
    gold: tuple[float, ...] | None = None  # K true scores, for analysis only, never trained on
    decoys: tuple[bool, ...] | None = None  # K flags, True = written to another prompt


@dataclass(frozen=True)
class Document:
    """A text to pretrain on."""

    id: str
    text: str
    kind: str = "text"
    split: str = "train"  # "train" | "valid"


@dataclass(frozen=True)
class ZeroShotItem:
    """A text that greedy decoding should continue with the target."""

    id: str
    task: str
    text: str
    target: str  # begins with a space


def fail(where: str, name: str, problem: str) -> typing.NoReturn:
    raise DataError(f"{where or 'record'}: field {name!r}: {problem}")


@functools.cache
def schema_of(record_type: type) -> dict[str, tuple[object, bool]]:
    """Return {field: (type hint, required)} in the order of the fields."""
    hints = typing.get_type_hints(record_type)
    return {f.name: (hints[f.name], f.default is dataclasses.MISSING)
            for f in dataclasses.fields(record_type)}


_KINDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false",
          dict: "an object", list: "a list"}


def _convert(value: object, hint: object, where: str, name: str) -> object:
    """Return a JSON value as the type of its field, or raise DataError."""
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        hint = next(h for h in typing.get_args(hint) if h is not type(None))
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            fail(where, name, f"got {show(value)}, expected a list")
        inner = typing.get_args(hint)[0]
        return tuple(_convert(v, inner, where, f"{name}[{i}]") for i, v in enumerate(value))
    if type(value) is int and abs(value) >= 10**18:
        fail(where, name, f"got {show(value)}, expected a number of at most 18 digits")
    if hint is float and type(value) is int:
        value = float(value)
    if type(value) is not hint:
        fail(where, name, f"got {show(value)}, expected {_KINDS[hint]}")
    if hint is float and not math.isfinite(value):
        fail(where, name, f"got {value}, expected a finite number")
    if hint is str and not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            fail(where, name, f"half of a surrogate pair at character {error.start}; "
                               "write the whole character")
    return value


def show(value: object) -> str:
    text = json.dumps(value, default=repr)
    return text if len(text) <= 40 else text[:37] + "..."


def check_record(record: object, where: str = "") -> None:
    """Check the types and the meaning of a record's fields.

    Args:
        record: a Prompt, Demonstration, Ranking, Document or ZeroShotItem.
        where: `FILE:LINE`, or empty to name the record by its id.

    Raises:
        DataError: naming where, field, value and what would be right.
    """
    where = where or f"{type(record).__name__} {getattr(record, 'id', '?')!r}"
    for name, (hint, _) in schema_of(type(record)).items():
        value = getattr(record, name)
        _convert(value, hint, where, name)
        if name in ("id", "prompt", "response", "text", "task", "target") and not value.strip():
            fail(where, name, "is empty; write a text or remove the record")
        if name == "responses":
            _check_texts(value, where, name)
        if name == "split" and value not in SPLITS:
            fail(where, name, f"got {value!r}, expected one of {', '.join(SPLITS)}")
        if name == "source" and value not in SOURCES:
            fail(where, name, f"got {value!r}, expected one of {', '.join(SOURCES)}")
    if isinstance(record, Ranking):
        _check_ranking(record, where)
    if isinstance(record, ZeroShotItem) and record.target[0] != " ":
        fail(where, "target", f"got {show(record.target)}, expected a space before the first word")


def _check_texts(texts: tuple[str, ...], where: str, name: str) -> None:
    if len(texts) < 2:
        fail(where, name, f"has {len(texts)} entries; give at least 2")
    for i, text in enumerate(texts):
        if not text.strip():
            fail(where, f"{name}[{i}]", "is empty; write a text or remove it")


def _check_ranking(record: Ranking, where: str) -> None:
    ranks, k = record.ranks, len(record.responses)
    for name in ("ranks", "gold", "decoys"):
        values = getattr(record, name)
        if values is not None and len(values) != k:
            wanted = {"ranks": "rank", "gold": "score", "decoys": "flag"}[name]
            fail(where, name, f"has {len(values)} entries, 'responses' has {k}; "
                               f"give one {wanted} per response")
    if min(ranks) != 1:
        fail(where, "ranks", f"the best is {min(ranks)}; ranks start at 1 = best")
    if max(ranks) == 1:
        fail(where, "ranks", "all responses are tied; a ranking needs at least one better response")
    first: dict[str, int] = {}
    for j, text in enumerate(record.responses):
        i = first.setdefault(text, j)
        if ranks[i] != ranks[j]:
            fail(where, "ranks", f"responses {i} and {j} are the same text with ranks {ranks[i]} "
                                  f"and {ranks[j]}; give them one rank or remove one")


def parse_record(row: dict, record_type: type, where: str) -> object:
    """Build a checked record from a JSON object; a missing `id` becomes "FILE-stem:LINE".

    Args:
        row: field -> JSON value; fields with a default may be missing.
        record_type: one of the record types above.
        where: `FILE:LINE` for messages.

    Raises:
        DataError: for an unknown, missing, wrong-typed or meaningless field.
    """
    schema = schema_of(record_type)
    unknown = [name for name in row if name not in schema]
    if unknown:
        fail(where, unknown[0], f"unknown; the fields of a {record_type.__name__} are "
                                f"{', '.join(schema)}")
    row = {"id": re.sub(r"\.jsonl(\.gz|\.xz)?:", ":", where), **row}
    for name, (_, required) in schema.items():
        if required and name not in row:
            fail(where, name, f"missing; {record_type.__name__} needs it")
    record = record_type(**{n: _convert(v, schema[n][0], where, n) for n, v in row.items()})
    check_record(record, where)
    return record
