"""Choosing from users' data: K responses of many, splits, and what fits into a model's context."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, replace
from random import Random

from .data import decode_response, encode_prompt, encode_response
from .records import SPLITS, DataError, Demonstration, Document, Prompt, Ranking
from .runtime import make_rng


def sample_k(records: list[Ranking], k_low: int, k_high: int, seed: int) -> list[Ranking]:
    """Draw K in k_low..k_high responses of every ranking, in random order, ranked anew from 1.

    A draw in which all are tied is drawn again. K is smaller where there are fewer responses.

    Args:
        records: rankings of any K.
        k_low: smallest K, at least 2.
        k_high: largest K.
        seed: each draw depends on the seed and the record's id only.
    """
    if not 2 <= k_low <= k_high:
        raise ValueError(f"k_low={k_low}, k_high={k_high}: expected 2 <= k_low <= k_high")
    return [_sample(record, k_low, k_high, make_rng(seed, "sample_k", record.id))
            for record in records]


def _sample(record: Ranking, k_low: int, k_high: int, rng: Random) -> Ranking:
    n = len(record.responses)
    k = min(n, rng.randint(k_low, k_high))
    chosen = rng.sample(range(n), k)
    while len({record.ranks[j] for j in chosen}) == 1:
        chosen = rng.sample(range(n), k)
    return _pick(record, chosen)


def _pick(record: Ranking, chosen: list[int]) -> Ranking:
    """Return the ranking of some of its responses, with dense ranks from 1."""
    order = sorted({record.ranks[j] for j in chosen})
    lists = {name: tuple(getattr(record, name)[j] for j in chosen)
             for name in ("responses", "gold", "decoys") if getattr(record, name) is not None}
    return replace(record, ranks=tuple(order.index(record.ranks[j]) + 1 for j in chosen), **lists)


def assign_splits(records: list, seed: int, valid: float = 0.1, test: float = 0.1) -> list:
    """Fill the splits that no record has; records with the same prompt stay together.

    The missing ones are taken from "train"; where there is no "train", everything is split anew.
    Nothing changes if all three are there.

    Args:
        records: prompts, demonstrations, rankings or documents (which have no "test").
        seed: of the assignment, which depends on the text of the prompts only.
        valid: share of the prompts for "valid", at least one prompt.
        test: share of the prompts for "test", at least one prompt.

    Raises:
        DataError: if there are too few different prompts.
    """
    def text_of(record) -> str:
        if isinstance(record, Document):
            return record.text.partition("\n\n")[0]  # with the same first paragraph: together
        return record.prompt

    splits = SPLITS[:2] if isinstance(records[0], Document) else SPLITS
    missing = set(splits) - {record.split for record in records}
    if not missing:
        return list(records)
    everything = "train" in missing
    sizes = {name: share for name, share in (("valid", valid), ("test", test))
             if name in splits and (everything or name in missing)}
    texts = {text_of(record) for record in records if everything or record.split == "train"}
    if len(texts) <= len(sizes):
        raise DataError(f"{len(texts)} different prompts cannot be split into train, "
                        f"{', '.join(sizes)}; give at least {len(sizes) + 1}")
    order = sorted(texts, key=lambda t: hashlib.sha256(f"{seed}:{t}".encode()).digest())
    split = dict.fromkeys(order, "train")
    for name, share in sizes.items():
        count = min(max(1, round(share * len(texts))), len(order) - 1)
        split.update(dict.fromkeys(order[:count], name))
        order = order[count:]
    return [replace(record, split=split[text_of(record)])
            if everything or record.split == "train" else record for record in records]


@dataclass
class FitReport:
    """What `fit_to_context` did, in records unless said otherwise."""

    kept: int = 0
    dropped_prompt_too_long: int = 0
    dropped_all_equal: int = 0  # rankings left without two responses of different rank
    dropped_empty: int = 0  # demonstrations of which no text was left
    truncated: int = 0  # responses, in the records kept
    merged: int = 0  # responses that became equal to a better one, in the records kept

    def __str__(self) -> str:
        names = {"merged": "responses merged", "truncated": "responses truncated"}
        return ", ".join(f"{count} {names.get(name, name.replace('_', ' '))}"
                         for name, count in asdict(self).items() if count or name == "kept")


class _Dropped(Exception):
    """A record that cannot be kept; the message is the field of FitReport that counts it."""


def fit_to_context(records: list, tokenizer, max_prompt_tokens: int, max_response_tokens: int,
                   context: int | None = None, strict: bool = False) -> tuple[list, FitReport]:
    """Make every record fit: the one place where a text is shortened.

    A record whose prompt is too long is dropped. A response that is too long keeps its first
    tokens; as everywhere, EOS then follows. Responses of one ranking that are equal as tokens
    become one, with the better rank.

    Args:
        records: prompts, demonstrations or rankings.
        tokenizer: of the model that will read them.
        max_prompt_tokens: with "User:" and "Assistant:" around the prompt.
        max_response_tokens: EOS included, at least 2.
        context: most tokens the model can read, prompt and response together.
        strict: raise instead of shortening or dropping anything.

    Returns:
        The records that are left, in order, and the counts.

    Raises:
        ValueError: if the two limits together exceed the context.
        DataError: with strict, naming the first record that does not fit.
    """
    if max_response_tokens < 2:
        raise ValueError(f"max_response_tokens={max_response_tokens}: expected at least 2 "
                         "(one token and EOS)")
    if context is not None and max_prompt_tokens + max_response_tokens > context:
        raise ValueError(f"max_prompt_tokens={max_prompt_tokens} and max_response_tokens="
                         f"{max_response_tokens}: together at most context={context} fit")
    kept, report = [], FitReport()
    for record in records:
        tokens = len(encode_prompt(tokenizer, record.prompt))
        if tokens > max_prompt_tokens:
            if strict:
                raise DataError(f"{record.id}: prompt has {tokens} tokens, at most "
                                f"{max_prompt_tokens} fit; raise max_prompt_tokens or shorten it")
            report.dropped_prompt_too_long += 1
            continue
        try:
            kept.append(_fit_responses(record, tokenizer, max_response_tokens, strict, report))
            report.kept += 1
        except _Dropped as reason:
            setattr(report, str(reason), getattr(report, str(reason)) + 1)
    return kept, report


def _fit_responses(record, tokenizer, limit: int, strict: bool, report: FitReport):
    if isinstance(record, Prompt):
        return record
    texts = [record.response] if isinstance(record, Demonstration) else record.responses
    fitted = [_fit_text(text, tokenizer, limit) for text in texts]
    cut = [new != old for new, old in zip(fitted, texts, strict=True)]
    if strict:
        for j, text in enumerate(texts):
            if cut[j]:
                tokens = len(encode_response(tokenizer, text))
                raise DataError(f"{record.id}: response {j} has {tokens} tokens, at most {limit} "
                                "fit; raise max_response_tokens or shorten it")
        return record
    if isinstance(record, Demonstration):
        if not fitted[0]:
            raise _Dropped("dropped_empty")
        report.truncated += cut[0]
        return replace(record, response=fitted[0]) if cut[0] else record
    best: dict[tuple[int, ...], int] = {}  # tokens -> the best response with these tokens
    for j in sorted(range(len(texts)), key=lambda j: record.ranks[j]):
        if fitted[j]:
            best.setdefault(tuple(encode_response(tokenizer, fitted[j])), j)
    chosen = sorted(best.values())
    if len({record.ranks[j] for j in chosen}) < 2:
        raise _Dropped("dropped_all_equal")
    report.truncated += sum(cut[j] for j in chosen)
    report.merged += len(texts) - len(chosen)
    return _pick(replace(record, responses=tuple(fitted)), chosen)


def _fit_text(text: str, tokenizer, limit: int) -> str:
    """Return the text, or its longest beginning of at most `limit` tokens with EOS."""
    ids = encode_response(tokenizer, text)
    if len(ids) <= limit:
        return text
    ids = ids[:limit - 1]
    while True:
        # A cut inside a character leaves U+FFFD; a shorter text may also split into more tokens.
        short = decode_response(tokenizer, ids).rstrip("\ufffd").rstrip()
        if not short or len(encode_response(tokenizer, short)) <= limit:
            return short
        ids = ids[:-1]
