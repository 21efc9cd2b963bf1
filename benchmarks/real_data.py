"""Prepare real responses and real judgements for the recipe: AlpacaEval's published results.

    git clone --depth 1 https://github.com/tatsu-lab/alpaca_eval
    python benchmarks/real_data.py alpaca_eval/results --out data/real --max-words 250

AlpacaEval asked 805 instructions of many systems; a judge (GPT-4) compared each response with that
of one reference system. `results` holds a folder per system: `model_outputs.json`, and the judge's
probability that the response is the better one in `weighted_alpaca_eval_gpt4_turbo`. A file in the
reader's own form works too: lines of prompt, split and responses of model, text, score.

Writes to --out, with a tenth of the prompts set aside for the test:

- `rankings.jsonl.gz`: per prompt the judged responses of at most `--max-words` words
- `demonstrations.jsonl.gz`: the best three of them
- `prompts.jsonl.gz`: the prompts
- `nonsense.jsonl.gz`: the responses of NullModel, which are in none of the files above, and
  neither are those of the reference system, which was compared with itself
- `corpus.jsonl.gz`: text for a base model: of `--corpus` (anything the package reads as a corpus),
  else prompts and responses of the systems that were not judged, and of `--text-systems` of the
  others, which are then in no ranking, training prompts only; with `--documents`, so many drawn at
  random
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from rlhf_mini.data import DataError, iterate_jsonl
from rlhf_mini.readers import read_documents
from rlhf_mini.runtime import atomic_write, make_rng, read_json

NONSENSE = "NullModel"  # answers every prompt with the same text, made to fool the judge
REFERENCE = "gpt4_1106_preview"
BEST = 3  # demonstrations per prompt
JUDGEMENTS = "weighted_alpaca_eval_gpt4_turbo/annotations.json"


def split_of(prompt: str) -> str:
    """Return "test" for a tenth of all prompts, by their text alone."""
    return "test" if hashlib.sha256(prompt.encode()).digest()[0] < 26 else "train"


def read_results(folder: Path, text_systems: int = 0) -> tuple[list[dict], list[dict]]:
    """Read AlpacaEval's `results`.

    Args:
        folder: holds a folder per system.
        text_systems: so many of the judged systems, drawn at random, are read as text instead.

    Returns:
        Judged rows of `prompt`, `split`, `responses` (`model`, `text`, `score` from 0 to 1), and
        rows of `prompt`, `response` of the systems without judgements, training prompts only.

    Raises:
        ValueError: if no system there was judged, or a file is not as published.
    """
    judged: dict[str, list[dict]] = {}
    corpus = []
    systems = sorted(p for p in folder.iterdir() if p.is_dir())
    ranked = [p for p in systems if (p / JUDGEMENTS).is_file()]
    drawn = [p for p in ranked if p.name != NONSENSE]
    if ranked and not 0 <= text_systems <= len(drawn) - 2:
        raise ValueError(f"--text-systems {text_systems}: {len(drawn)} systems were judged, and at "
                         "least 2 have to be left for the rankings")
    as_text = make_rng(0, "systems").sample(drawn, text_systems) if ranked else []
    for system in systems:
        file = system / JUDGEMENTS
        try:
            if system in ranked and system not in as_text:
                for row in read_json(file):
                    if row["preference"] is not None:  # between 1 (the reference) and 2
                        judged.setdefault(row["instruction"], []).append({
                            "model": system.name, "text": row["output_2"].strip(),
                            "score": row["preference"] - 1})
            elif (file := system / "model_outputs.json").is_file():
                corpus += [{"prompt": row["instruction"], "response": row["output"]}
                           for row in read_json(file) if split_of(row["instruction"]) == "train"]
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file}: not as AlpacaEval publishes it: {error!r}") from error
    if not judged:
        raise ValueError(f"{folder}: no */{JUDGEMENTS} there; give the folder `results` of a clone "
                         "of AlpacaEval")
    rows = [{"prompt": prompt, "split": split_of(prompt), "responses": responses}
            for prompt, responses in judged.items()]
    return rows, corpus


def select_short(rows: Iterable[dict], max_words: int) -> Iterator[dict]:
    """Yield each row with its responses of 1 to `max_words` words, best first.

    Nonsense and the reference system are left out. Rows without two different scores fall out:
    they rank nothing.
    """
    for row in rows:
        kept = [x for x in row["responses"] if x["model"] not in (NONSENSE, REFERENCE)
                and 0 < len(x["text"].split()) <= max_words]
        if len({x["score"] for x in kept}) > 1:
            yield row | {"responses": sorted(kept, key=lambda x: -x["score"])}


def read_rankings_file(path: Path) -> list[dict]:
    """Read rows of `prompt`, `split`, `responses` (`model`, `text`, `score`).

    Raises:
        DataError: naming the line and the field that is not as it should be.
    """
    rows = []
    for where, row in iterate_jsonl(path):
        kinds = {"prompt": str, "split": str, "responses": list}
        parts = [("", row, kinds)]
        if isinstance(row.get("responses"), list):
            parts += [(f"responses[{i}].", x if isinstance(x, dict) else {},
                       {"model": str, "text": str, "score": int | float})
                      for i, x in enumerate(row["responses"])]
        for prefix, part, fields in parts:
            for name, kind in fields.items():
                if not isinstance(part.get(name), kind):
                    raise DataError(f"{where}: field '{prefix}{name}': got {part.get(name)!r:.40}; "
                                    "a line has prompt, split and responses, a response has "
                                    "model, text and score")
        rows.append(row)
    return rows


def write_rows(path: Path, rows: list[dict]) -> None:
    """Write rows as packed lines of JSON; the same rows give the same bytes."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    atomic_write(path, gzip.compress(lines.encode(), mtime=0))
    print(f"{path}: {len(rows)} rows", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Read, select, write; return 0, or 2 after an error that was explained."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="AlpacaEval's results, or a file of rankings")
    parser.add_argument("--out", type=Path, required=True, help="folder of the files")
    parser.add_argument("--max-words", type=int, default=250, help="of a response (default: 250)")
    parser.add_argument("--corpus", type=Path, help="text for a base model")
    parser.add_argument("--text-systems", type=int, default=0, metavar="N",
                        help="judged systems to read as text instead (default: 0)")
    parser.add_argument("--documents", type=int, help="at most so many texts (default: all)")
    args = parser.parse_args(arguments)
    try:
        rows, corpus = (read_results(args.source, args.text_systems) if args.source.is_dir()
                        else (read_rankings_file(args.source), []))
        if args.corpus:
            corpus = [{"text": document.text} for document in read_documents(args.corpus)]
        short = list(select_short(rows, args.max_words))
        if not short:
            raise ValueError(f"{args.source}: no prompt has two responses of at most "
                             f"{args.max_words} words with different scores; raise --max-words")
    except (DataError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    best = [{"id": f"{i}-{j}", "prompt": row["prompt"], "split": row["split"],
             "response": x["text"].strip()}
            for i, row in enumerate(short) for j, x in enumerate(row["responses"][:BEST])]
    nonsense = [{"prompt": row["prompt"], "split": row["split"], "response": x["text"],
                 "score": x["score"]}
                for row in rows for x in row["responses"] if x["model"] == NONSENSE]
    if args.documents and args.documents < len(corpus):
        corpus = make_rng(0, "documents").sample(corpus, args.documents)
    files = {"rankings": short, "demonstrations": best, "nonsense": nonsense, "corpus": corpus,
             "prompts": [{"prompt": row["prompt"], "split": row["split"]} for row in short]}
    for name, found in files.items():
        if found:
            write_rows(args.out / f"{name}.jsonl.gz", found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
