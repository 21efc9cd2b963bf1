"""JSONL files, the chat format, and token batches. The records themselves are in `records`.

One mask polarity everywhere: True = a real token. Prompts are padded on the left, so that every
response starts in the same column; responses are padded on the right.
"""

from __future__ import annotations

import gzip
import json
import lzma
import typing
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from .records import (
    SOURCES,
    SPLITS,
    DataError,
    Demonstration,
    Document,
    Prompt,
    Ranking,
    ZeroShotItem,
    check_record,
    fail,
    parse_record,
    schema_of,
    show,
)
from .runtime import atomic_write

__all__ = [
    "SOURCES", "SPLITS", "DataError", "Demonstration", "Document", "Prompt", "Ranking",
    "ZeroShotItem", "check_record", "parse_record", "iterate_jsonl", "read_jsonl", "write_jsonl",
    "format_prompt", "format_response", "encode_prompt", "encode_response", "encode_pair",
    "encode_ranking", "decode_response", "TokenBatch", "collate", "left_pad", "PackedRankings",
    "pack_rankings",
]

# ---- files -------------------------------------------------------------------------------------


def iterate_jsonl(path: str | Path, name: str = "") -> Iterator[tuple[str, dict]]:
    """Yield (`FILE:LINE`, object) for every line of a .jsonl, .jsonl.gz or .jsonl.xz file.

    Blank lines, CRLF and a byte-order mark are fine.

    Args:
        path: the file.
        name: what to call it in messages; by default its name without the folder.

    Raises:
        DataError: for a line that is not a JSON object, or a truncated file.
    """
    path = Path(path)
    name, number = name or path.name, 0
    try:
        unpack = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
        with unpack(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield f"{name}:{number}", _parse_line(line, f"{name}:{number}")
    except (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError) as error:
        raise DataError(f"{name}:{number + 1}: the packed data is damaged or cut off ({error}); "
                        "copy or download the file again") from error


def _parse_line(line: bytes, where: str) -> dict:
    try:
        row = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 text (byte {error.start + 1} of the line); "
                        "save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        hint = "" if line.endswith(b"\n") else "; the line has no end, the file looks truncated"
        raise DataError(f"{where}: not valid JSON: {error.msg.removesuffix(' at')} at column "
                        f"{error.colno}{hint}") from error
    except _Constant as error:
        raise DataError(f"{where}: not valid JSON: {error}; write a finite number") from error
    except (ValueError, RecursionError) as error:  # 5000 digits, 5000 brackets
        raise DataError(f"{where}: a number is too long or the brackets are too deep ({error})"
                        ) from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: got {show(row)}, expected one JSON object {{...}} per line")
    return row


class _Constant(Exception):
    """NaN or Infinity in a JSON file."""


def _refuse_constant(name: str) -> typing.NoReturn:
    raise _Constant(name)


def read_jsonl(path: str | Path, record_type: type) -> list:
    """Read and check all records of a .jsonl or .jsonl.gz file.

    Args:
        path: the file.
        record_type: Prompt, Demonstration, Ranking, Document or ZeroShotItem.

    Raises:
        DataError: naming file, line and field of the first bad record, or both lines of an id
            that occurs twice.
    """
    records, seen = [], {}
    for where, row in iterate_jsonl(path):
        record = parse_record(row, record_type, where)
        if record.id in seen:
            fail(where, "id", f"{record.id!r} is already the id of line {seen[record.id]}; "
                               "every id occurs once")
        seen[record.id] = where.rpartition(":")[2]
        records.append(record)
    return records


def write_jsonl(path: str | Path, records: Iterable[object]) -> None:
    """Check records and write them, atomically, one per line: UTF-8, no None, fields in order."""
    lines, seen = [], set()
    for record in records:
        check_record(record)
        if record.id in seen:
            fail(f"{type(record).__name__} {record.id!r}", "id", "occurs twice")
        seen.add(record.id)
        row = {name: getattr(record, name) for name in schema_of(type(record))}
        lines.append(json.dumps({k: v for k, v in row.items() if v is not None},
                                ensure_ascii=False, allow_nan=False))
    data = "".join(line + "\n" for line in lines).encode("utf-8")
    # mtime=0: the same records give the same bytes.
    atomic_write(path, gzip.compress(data, mtime=0) if Path(path).suffix == ".gz" else data)


# ---- chat format -------------------------------------------------------------------------------


def format_prompt(prompt: str) -> str:
    r"""Return the text that the policy continues.

    >>> format_prompt("Who is Ada?")
    'User: Who is Ada?\nAssistant:'
    """
    return f"User: {prompt}\nAssistant:"


def format_response(response: str) -> str:
    """Return the response as it follows "Assistant:"; EOS is added as a token."""
    return " " + response


def _encode_text(tokenizer, text: str) -> list[int]:
    # Typed text never becomes a special token: "<|endoftext|>" in a prompt is plain text.
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def encode_prompt(tokenizer, prompt: str) -> list[int]:
    """Return the token ids of the formatted prompt."""
    return _encode_text(tokenizer, format_prompt(prompt))


def encode_response(tokenizer, response: str) -> list[int]:
    """Return the token ids of the response, EOS last."""
    return [*_encode_text(tokenizer, format_response(response)), tokenizer.eos_token_id]


def encode_pair(tokenizer, prompt: str, response: str, max_prompt_tokens: int,
                max_response_tokens: int, where: str) -> tuple[list[int], list[int]]:
    """Return (prompt ids, response ids) that fit, EOS included.

    Args:
        where: names the record in messages, e.g. its id.

    Raises:
        DataError: if either is too long; nothing is cut in silence (`readers.fit_to_context`).
    """
    prompt_ids = encode_prompt(tokenizer, prompt)
    _check_length(prompt_ids, "prompt", max_prompt_tokens, where)
    response_ids = encode_response(tokenizer, response)
    _check_length(response_ids, "response", max_response_tokens, where)
    return prompt_ids, response_ids


def encode_ranking(tokenizer, ranking: Ranking, max_prompt_tokens: int, max_response_tokens: int,
                   ) -> tuple[list[int], list[list[int]], tuple[int, ...]]:
    """Return (prompt ids, K lists of response ids, K ranks), as `pack_rankings` takes them.

    Raises:
        DataError: if the prompt or a response is too long.
    """
    prompt_ids = encode_prompt(tokenizer, ranking.prompt)
    _check_length(prompt_ids, "prompt", max_prompt_tokens, ranking.id)
    responses = [encode_response(tokenizer, response) for response in ranking.responses]
    for j, ids in enumerate(responses):
        _check_length(ids, "response", max_response_tokens, ranking.id, f"responses[{j}]")
    return prompt_ids, responses, ranking.ranks


def _check_length(ids: list[int], kind: str, limit: int, where: str, name: str = "") -> None:
    if len(ids) > limit:
        raise DataError(f"{where}: {name or kind} has {len(ids)} tokens, at most {limit} fit; "
                        f"raise max_{kind}_tokens or shorten it")


def decode_response(tokenizer, ids: Iterable[int]) -> str:
    """Return the text of a response: up to the first EOS, without PAD, stripped.

    Args:
        ids: token ids (T,), a list or a 1-D tensor.
    """
    ids = ids.tolist() if isinstance(ids, torch.Tensor) else list(ids)
    if tokenizer.eos_token_id in ids:
        ids = ids[:ids.index(tokenizer.eos_token_id)]
    ids = [i for i in ids if i != tokenizer.pad_token_id]
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False).strip()


# ---- token batches -----------------------------------------------------------------------------


def _move(batch, device):
    def move(x: torch.Tensor) -> torch.Tensor:
        if torch.device(device).type != "cuda":
            return x.to(device)
        return x.pin_memory().to(device, non_blocking=True)  # copied while the GPU works
    return type(batch)(**{f.name: move(getattr(batch, f.name)) for f in fields(batch)})


@dataclass
class TokenBatch:
    """B prompts with one response each; P and T are the longest of the batch."""

    prompt_ids: torch.Tensor  # (B, P) int64, left-padded
    prompt_mask: torch.Tensor  # (B, P) bool
    response_ids: torch.Tensor  # (B, T) int64, right-padded
    response_mask: torch.Tensor  # (B, T) bool, True up to and with EOS

    @property
    def input_ids(self) -> torch.Tensor:
        """(B, P+T) int64: prompt and response joined."""
        return torch.cat([self.prompt_ids, self.response_ids], dim=1)

    @property
    def attention_mask(self) -> torch.Tensor:
        """(B, P+T) bool: True = a real token."""
        return torch.cat([self.prompt_mask, self.response_mask], dim=1)

    def to(self, device):
        """Return a copy with every tensor on `device`."""
        return _move(self, device)


def _rows(rows: list[list[int]], value: int, left: bool = False) -> torch.Tensor:
    """Return lists of different length as one int64 tensor, filled up with `value`."""
    width = max(map(len, rows), default=0)
    if left:
        rows = [[value] * (width - len(row)) + row for row in rows]
    else:
        rows = [row + [value] * (width - len(row)) for row in rows]
    return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), width)


def left_pad(sequences: list[list[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad prompts on the left, for sampling.

    Returns:
        ids (B, P) int64 and mask (B, P) bool, True = a real token.

    >>> left_pad([[5, 6], [7]], pad_id=0)[0].tolist()
    [[5, 6], [0, 7]]
    """
    ones = _rows([[1] * len(row) for row in sequences], 0, left=True)
    return _rows(sequences, pad_id, left=True), ones.bool()


def collate(pairs: list[tuple[list[int], list[int]]], pad_id: int) -> TokenBatch:
    """Batch (prompt ids, response ids) pairs.

    Masks come from the lengths, not from `pad_id`: a real token may have any id.
    """
    prompt_ids, prompt_mask = left_pad([prompt for prompt, _ in pairs], pad_id)
    mask = _rows([[1] * len(response) for _, response in pairs], 0).bool()
    return TokenBatch(prompt_ids, prompt_mask, _rows([r for _, r in pairs], pad_id), mask)


@dataclass
class PackedRankings:
    """B rankings, each packed into one row: the prompt once, then its responses in turn.

    A response token sees the prompt and its own response only (`segments`), at the positions it
    would have if it followed the prompt directly (`position_ids`).
    """

    input_ids: torch.Tensor  # (B, L) int64
    segments: torch.Tensor  # (B, L) int64: 0 prompt, 1.. its different responses, -1 padding
    position_ids: torch.Tensor  # (B, L) int64, 0 in padding
    end_index: torch.Tensor  # (B, K) int64, column of each response's last token, else 0
    ranks: torch.Tensor  # (B, K) int64, 1 = best, 0 where there is no response
    mask: torch.Tensor  # (B, K) bool, True = response exists

    def to(self, device):
        """Return a copy with every tensor on `device`."""
        return _move(self, device)


def pack_rankings(rankings: list[tuple[list[int], list[list[int]], tuple[int, ...]]], pad_id: int,
                  ) -> PackedRankings:
    """Pack (prompt ids, [response ids, ...], ranks) into rows, right-padded to the longest.

    Args:
        rankings: B of them, with K_b responses each; K is the largest K_b.
        pad_id: fills `input_ids`.
    """
    ids, segments, positions, ends, mask = [], [], [], [], []
    for prompt, responses, ranks in rankings:
        if len(responses) != len(ranks):
            raise ValueError(f"{len(responses)} responses but {len(ranks)} ranks")
        row, segment, position = list(prompt), [0] * len(prompt), list(range(len(prompt)))
        last: dict[tuple[int, ...], int] = {}  # of each different response; equal ones share it
        for response in map(tuple, responses):
            if response not in last:
                row += response
                segment += [len(last) + 1] * len(response)
                position += range(len(prompt), len(prompt) + len(response))
                last[response] = len(row) - 1
        end = [last[tuple(response)] for response in responses]
        for rows, values in ((ids, row), (segments, segment), (positions, position), (ends, end),
                             (mask, [1] * len(end))):
            rows.append(values)
    return PackedRankings(
        input_ids=_rows(ids, pad_id), segments=_rows(segments, -1),
        position_ids=_rows(positions, 0), end_index=_rows(ends, 0),
        ranks=_rows([list(ranks) for _, _, ranks in rankings], 0), mask=_rows(mask, 0).bool(),
    )
