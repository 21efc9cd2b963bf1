r"""Users' own data: files, folders and hub datasets in the project's and in other formats.

Formats are recognised per record by its keys:

- the project's own (`records`): `prompt`; `prompt, response`; `prompt, responses, ranks`; `text`
- HH-RLHF: `chosen, rejected`, dialogues of ``\n\nHuman: ...\n\nAssistant: ...`` that begin alike
- AlpacaEval rankings: `prompt, responses: [{model, text, score}, ...]`; `sample_k` draws K of them

Richer data serve for poorer purposes: rankings as demonstrations (the best response) and as
prompts, demonstrations as text. Records that a reader must leave out are counted in one warning.
"""

from __future__ import annotations

import importlib
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from .data import iterate_jsonl
from .files import could_be_hub_name
from .records import (
    DataError,
    Demonstration,
    Document,
    Prompt,
    Ranking,
    fail,
    parse_record,
    schema_of,
    show,
)
from .selection import FitReport, assign_splits, fit_to_context, sample_k

__all__ = ["read_prompts", "read_demonstrations", "read_rankings", "read_documents", "FitReport",
           "assign_splits", "fit_to_context", "sample_k"]

Record = Prompt | Demonstration | Ranking | Document

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.xz")
_EXAMPLES = {
    Prompt: '{"prompt": "..."}', Demonstration: '{"prompt": "...", "response": "..."}',
    Ranking: '{"prompt": "...", "responses": ["...", "..."], "ranks": [1, 2]}',
    Document: '{"text": "..."}'}
_HUB_COLUMNS = ("prompt", "response", "responses", "ranks", "chosen", "rejected", "text")


class _Skip(Exception):
    """A record to leave out; the message is the reason."""


def read_prompts(source: str | Path) -> list[Prompt]:
    """Read prompts from a file, a folder or a hub dataset.

    Args:
        source: a .jsonl file, packed as .gz or .xz or not, a folder with such files, or the name of
            a hub dataset.

    Raises:
        DataError: naming file, line, field and what would be right.
    """
    return _read(source, Prompt)


def read_demonstrations(source: str | Path) -> list[Demonstration]:
    """Read demonstrations; of a ranking the best response, of a pair the chosen one.

    Args, Raises: as `read_prompts`.
    """
    return _read(source, Demonstration)


def read_rankings(source: str | Path, seed: int = 0, k_low: int = 4, k_high: int = 9,
                  ) -> list[Ranking]:
    """Read rankings; of graded responses (AlpacaEval) K in k_low..k_high are drawn per prompt.

    Args:
        source: as `read_prompts`.
        seed: of the draws; each depends on the seed and the record's id only.
        k_low: smallest K.
        k_high: largest K.

    Raises:
        DataError: naming file, line, field and what would be right.
    """
    return _read(source, Ranking, (k_low, k_high, seed))


def read_documents(source: str | Path) -> list[Document]:
    """Read texts to pretrain on; of a demonstration the prompt, an empty line and the response.

    Args, Raises: as `read_prompts`.
    """
    return _read(source, Document)


def _read(source: str | Path, record_type: type, draw: tuple[int, int, int] | None = None) -> list:
    records, seen, skipped = [], {}, Counter()
    for where, split, row in _rows(source):
        try:
            record, graded = _parse(row, record_type, where, split)
            if graded and draw:
                record = sample_k([record], *draw)[0]
        except _Skip as reason:
            skipped[str(reason)] += 1
            continue
        if record.id in seen:
            fail(where, "id", f"{record.id!r} is already the id at {seen[record.id]}; "
                              "every id occurs once")
        seen[record.id] = where
        records.append(_as(record, record_type))
    if skipped:
        reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(skipped.items()))
        warnings.warn(f"{source}: left out {skipped.total()} of {skipped.total() + len(records)} "
                      f"records: {reasons}", stacklevel=3)
    if not records:
        raise DataError(f"{source}: holds no usable {record_type.__name__.lower()}s; a line is "
                        f"{_EXAMPLES[record_type]}")
    return records


# ---- sources -----------------------------------------------------------------------------------


def _rows(source: str | Path) -> Iterator[tuple[str, str | None, dict]]:
    """Yield (`FILE:LINE`, split of the file or None, JSON object) over all files of a source."""
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.name.endswith(SUFFIXES))
        if not files:
            raise DataError(f"{source}: no {' or '.join(SUFFIXES)} file in this folder")
        for file in files:
            name = file.relative_to(path).as_posix()
            for where, row in iterate_jsonl(file, name):
                yield where, _split_of(file.name), row
    elif path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise DataError(f"{source}: expected a {' or '.join(SUFFIXES)} file, one record per "
                            "line")
        for where, row in iterate_jsonl(path):
            yield where, None, row
    elif not could_be_hub_name(str(source)) or path.suffix in (".jsonl", ".gz", ".xz",
                                                                      ".json"):
        raise DataError(f"{source}: no such file or folder")
    else:
        yield from _hub_rows(str(source))


def _hub_rows(name: str) -> Iterator[tuple[str, str | None, dict]]:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise DataError(f"{name}: no such file or folder; to read it as a dataset of the hub, "
                        "pip install rlhf-mini[hub]") from error
    try:
        splits = datasets.load_dataset(name)
    except (OSError, ValueError) as error:
        raise DataError(f"{name}: neither a file, a folder, nor a readable dataset of the hub "
                        f"({error})") from error
    for split, rows in splits.items():
        for number, row in enumerate(rows, start=1):
            # Other columns (source, category, ...) may mean anything: texts and ranks only.
            keep = {k: row[k] for k in _HUB_COLUMNS if row.get(k) is not None}
            yield f"{name}/{split}:{number}", _split_of(split), keep


def _split_of(name: str) -> str:
    """Return the split that a file's name says: a whole word test, valid, validation, val, dev."""
    words = re.findall(r"[a-z]+", name.lower())
    if "test" in words:
        return "test"
    return "valid" if {"valid", "validation", "val", "dev"} & set(words) else "train"


# ---- formats -----------------------------------------------------------------------------------


def _parse(row: dict, record_type: type, where: str, split: str | None) -> tuple[Record, bool]:
    """Return the record in its own format, and whether it holds graded responses to draw from."""
    given = {} if split is None else {"split": split}
    if "chosen" in row or "rejected" in row:
        return _parse_hh(row, where, given), False
    responses = row.get("responses")
    if isinstance(responses, list) and responses and isinstance(responses[0], dict):
        return _parse_graded(row, where, given), True
    own_type = record_type
    if "response" in row and (record_type is Prompt or record_type is Document):
        own_type = Demonstration
    if record_type is not Ranking and "responses" in row:
        own_type = Ranking
    return parse_record({**given, **row}, own_type, where), False


def _as(record: Record, record_type: type) -> Record:
    """Return a record as one of a poorer type."""
    if isinstance(record, record_type):
        return record
    if record_type is Document:
        best = _as(record, Demonstration)
        return Document(best.id, f"{best.prompt}\n\n{best.response}", split=best.split)
    shared = {name: getattr(record, name) for name in schema_of(record_type)
              if hasattr(record, name)}
    if record_type is Demonstration:
        shared["response"] = record.responses[record.ranks.index(1)]
        shared["labeler"] = None  # who ranked did not write
    return record_type(**shared)


def _parse_hh(row: dict, where: str, given: dict) -> Ranking:
    """Return the HH-RLHF pair as a ranking of K = 2."""
    chosen, rejected = (_dialogue(row, name, where) for name in ("chosen", "rejected"))
    common = 0
    while common < min(len(chosen), len(rejected)) and chosen[common] == rejected[common]:
        common += 1
    while common and chosen[common - 1][0] != "Human":
        common -= 1  # the prompt ends with the last turn of the human that both share
    if not common:
        fail(where, "rejected", "does not begin like 'chosen'; both must answer the same dialogue")
    if any(speaker == "Human" for speaker, _ in chosen[common:] + rejected[common:]):
        raise _Skip("whose dialogues part before the last turn of the human")
    # A few answers hold the text "\n\nAssistant:" themselves; they stay one response.
    responses = tuple("\n\n".join(text for _, text in dialogue[common:]).strip()
                      for dialogue in (chosen, rejected))
    if responses[0] == responses[1]:
        raise _Skip("with chosen equal to rejected")
    if not all(responses):
        raise _Skip("with an empty response")
    prompt = "\n".join({"Human": "User: ", "Assistant": "Assistant: "}[speaker] + text
                       for speaker, text in chosen[:common]).removeprefix("User: ")
    extra = {k: v for k, v in row.items() if k in ("id", "split")}
    return parse_record({**given, **extra, "prompt": prompt, "responses": list(responses),
                         "ranks": [1, 2]}, Ranking, where)


def _dialogue(row: dict, name: str, where: str) -> list[tuple[str, str]]:
    """Return [(speaker, text), ...] of an HH-RLHF dialogue."""
    if name not in row:
        fail(where, name, "missing; a pair needs 'chosen' and 'rejected'")
    if not isinstance(row[name], str):
        fail(where, name, f"got {show(row[name])}, expected the text of a dialogue")
    start, *parts = re.split(r"\n\n(Human|Assistant):", row[name])
    turns = [(speaker, text.strip()) for speaker, text in zip(parts[::2], parts[1::2], strict=True)]
    if start or not turns or turns[0][0] != "Human":
        fail(where, name, r"a dialogue starts with '\n\nHuman:'")
    if turns[-1][0] != "Assistant":
        fail(where, name, r"a dialogue ends with a turn '\n\nAssistant: ...'")
    return turns


def _parse_graded(row: dict, where: str, given: dict) -> Ranking:
    """Return all graded responses to a prompt as one ranking, equal scores tied."""
    best: dict[str, float] = {}
    for i, response in enumerate(row["responses"]):
        for name, kind in (("text", str), ("score", int | float)):
            value = response.get(name) if isinstance(response, dict) else None
            if not isinstance(value, kind) or isinstance(value, bool) or value != value:
                fail(where, f"responses[{i}].{name}", f"got {value!r:.40}, expected "
                     + ("text" if name == "text" else "a number, higher = better"))
        text = response["text"].strip()
        if text:  # some systems gave no answer
            best[text] = max(best.get(text, float("-inf")), response["score"])
    order = sorted(set(best.values()), reverse=True)
    if len(order) < 2:
        raise _Skip("with fewer than two different scores")
    extra = {k: v for k, v in row.items() if k in ("id", "prompt", "split")}
    return parse_record({**given, **extra, "responses": list(best),
                         "ranks": [order.index(score) + 1 for score in best.values()]},
                        Ranking, where)
