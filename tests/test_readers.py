"""Users' data: their formats, files, folders and the hub."""

from __future__ import annotations

import gzip
import json
import sys
import types
from collections import Counter

import pytest

from rlhf_mini.data import DataError, Demonstration, Document, Prompt, Ranking, write_jsonl
from rlhf_mini.readers import (
    read_demonstrations,
    read_documents,
    read_prompts,
    read_rankings,
)


def write_lines(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def hh(*turns):
    speakers = ["Human", "Assistant"] * len(turns)
    return "".join(f"\n\n{s}: {t}" for s, t in zip(speakers, turns, strict=False))


PAIR = {"chosen": hh("a", "b", "c", "d"), "rejected": hh("a", "b", "c", "e")}


def graded(prompt, *scored, **more):
    return {"prompt": prompt, **more,
            "responses": [{"model": f"m{i}", "text": t, "score": s}
                          for i, (t, s) in enumerate(scored)]}


# ---- HH-RLHF -----------------------------------------------------------------------------------


def test_hh_pair_becomes_a_ranking_of_two(tmp_path):
    path = write_lines(tmp_path / "test.jsonl.gz", PAIR)
    prompt = "a\nAssistant: b\nUser: c"
    assert read_rankings(path) == [Ranking("test:1", prompt, ("d", "e"), (1, 2))]
    assert read_demonstrations(path) == [Demonstration("test:1", prompt, "d")]
    assert read_prompts(path) == [Prompt("test:1", prompt)]


def test_hh_one_turn_and_answers_that_hold_a_second_assistant_turn(tmp_path):
    longer = hh("a", "x") + "\n\nAssistant: y"
    path = write_lines(tmp_path / "f.jsonl",
                       {"chosen": hh("a", "x"), "rejected": hh("a", "z")},
                       {"chosen": longer, "rejected": hh("a", "x")})
    assert [(r.prompt, r.responses) for r in read_rankings(path)] == [
        ("a", ("x", "z")), ("a", ("x\n\ny", "x"))]


def test_hh_useless_pairs_are_counted_in_one_warning(tmp_path):
    path = write_lines(tmp_path / "f.jsonl", PAIR,
                       {"chosen": PAIR["chosen"], "rejected": PAIR["chosen"]},
                       {"chosen": hh("a", ""), "rejected": hh("a", "z")},
                       {"chosen": hh("a", "b", "c", "d"), "rejected": hh("a", "b", "other", "d")})
    with pytest.warns(UserWarning) as caught:
        assert len(read_rankings(path)) == 1
    assert len(caught) == 1
    assert str(caught[0].message) == (
        f"{path}: left out 3 of 4 records: 1 whose dialogues part before the last turn of the "
        "human, 1 with an empty response, 1 with chosen equal to rejected")
    assert caught[0].filename == __file__


@pytest.mark.parametrize(("change", "expected"), [
    ({"chosen": "Human: a"}, r"field 'chosen': a dialogue starts with '\n\nHuman:'"),
    ({"chosen": "x" + hh("a", "b")}, r"field 'chosen': a dialogue starts with '\n\nHuman:'"),
    ({"rejected": hh("a", "b", "c")},
     r"field 'rejected': a dialogue ends with a turn '\n\nAssistant: ...'"),
    ({"rejected": hh("z", "b")}, "field 'rejected': does not begin like 'chosen'; both"),
    ({"rejected": [{"role": "user"}]},
     "field 'rejected': got [{\"role\": \"user\"}], expected the text of a dialogue"),
    ({"rejected": None}, "field 'rejected': got null, expected the text of a dialogue"),
])
def test_malformed_hh_names_file_line_and_field(tmp_path, change, expected):
    path = write_lines(tmp_path / "f.jsonl", PAIR, PAIR | change)
    with pytest.raises(DataError) as error:
        read_rankings(path)
    assert str(error.value).startswith("f.jsonl:2: " + expected)


def test_hh_without_a_partner(tmp_path):
    with pytest.raises(DataError, match="f.jsonl:1: field 'rejected': missing; a pair needs"):
        read_rankings(write_lines(tmp_path / "f.jsonl", {"chosen": PAIR["chosen"]}))


# ---- graded responses --------------------------------------------------------------------------


def test_graded_responses_are_ranked_by_score_with_ties(tmp_path):
    path = write_lines(tmp_path / "f.jsonl", graded(
        "p", ("a", 0.9), (" b ", 0.5), ("c", 0.5), ("", 0.3), ("a", 0.1), ("d", 0), split="test"))
    [record] = read_rankings(path, k_low=9, k_high=9)  # all four texts; "a" keeps its best score
    ranks = dict(zip(record.responses, record.ranks, strict=True))
    assert ranks == {"a": 1, "b": 2, "c": 2, "d": 3}
    assert (record.id, record.prompt, record.split, record.gold) == ("f:1", "p", "test", None)
    assert read_demonstrations(path) == [Demonstration("f:1", "p", "a", split="test")]
    assert read_prompts(path) == [Prompt("f:1", "p", split="test")]


@pytest.mark.parametrize(("response", "expected"), [
    ({"text": "a"}, "field 'responses[1].score': got None, expected a number, higher = better"),
    ({"text": "a", "score": True}, "field 'responses[1].score': got True, expected a number"),
    ({"text": 3, "score": 1}, "field 'responses[1].text': got 3, expected text"),
    ("a", "field 'responses[1].text': got None, expected text"),
])
def test_malformed_graded_responses(tmp_path, response, expected):
    row = graded("p", ("b", 1.0))
    row["responses"].append(response)
    with pytest.raises(DataError) as error:
        read_rankings(write_lines(tmp_path / "f.jsonl", row))
    assert str(error.value).startswith("f.jsonl:1: " + expected)


def test_graded_responses_without_a_difference_are_left_out(tmp_path):
    path = write_lines(tmp_path / "f.jsonl", graded("p", ("a", 1), ("b", 1)))
    with pytest.warns(UserWarning, match="1 with fewer than two different scores"), \
            pytest.raises(DataError, match="holds no usable rankings; a line is"):
        read_rankings(path)


def many(n, scores=50):
    rows = [graded(f"p{i}", *[(f"t{j}", float(j % scores)) for j in range(50)]) for i in range(n)]
    return rows


def test_draws_depend_on_seed_and_id_only_and_cover_k(tmp_path):
    path = write_lines(tmp_path / "f.jsonl", *many(60))
    records = read_rankings(path, seed=3)
    assert records == read_rankings(path, seed=3) != read_rankings(path, seed=4)
    assert {len(r.responses) for r in records} == set(range(4, 10))
    shorter = write_lines(tmp_path / "g" / "f.jsonl", *many(20))
    assert read_rankings(shorter, seed=3) == records[:20]
    first = [r.ranks.index(1) for r in records]
    assert max(Counter(first).values()) < 40  # the best does not always come first


# ---- sources -----------------------------------------------------------------------------------


def test_own_formats_serve_for_poorer_purposes(tmp_path):
    ranking = Ranking("r", "p", ("a", "b"), (2, 1), split="valid", labeler=5)
    demonstration = Demonstration("d", "q", "c", source="labeler", customer=4, labeler=2)
    write_jsonl(tmp_path / "f.jsonl", [ranking])
    write_jsonl(tmp_path / "g.jsonl", [demonstration])
    assert read_rankings(tmp_path / "f.jsonl") == [ranking]
    assert read_demonstrations(tmp_path / "f.jsonl") == [
        Demonstration("r", "p", "b", split="valid")]
    assert read_prompts(tmp_path / "f.jsonl") == [Prompt("r", "p", split="valid")]
    assert read_demonstrations(str(tmp_path / "g.jsonl")) == [demonstration]
    assert read_prompts(tmp_path / "g.jsonl") == [Prompt("d", "q", "labeler", 4)]
    assert read_documents(tmp_path / "f.jsonl") == [Document("r", "p\n\nb", split="valid")]
    assert read_documents(tmp_path / "g.jsonl") == [Document("d", "q\n\nc")]
    (tmp_path / "t.jsonl").write_text('{"text": "Once."}\n')
    assert read_documents(tmp_path / "t.jsonl") == [Document("t:1", "Once.")]
    with pytest.raises(DataError, match="t.jsonl:1: field 'text': unknown; .* of a Prompt"):
        read_prompts(tmp_path / "t.jsonl")
    with pytest.raises(DataError, match="g.jsonl:1: field 'response': unknown; .* of a Ranking"):
        read_rankings(tmp_path / "g.jsonl")


def test_a_large_k_of_the_users_own_rankings_is_kept(tmp_path):
    ranking = Ranking("r", "p", tuple("abcdefghijkl"), tuple(range(1, 13)))
    write_jsonl(tmp_path / "f.jsonl", [ranking])
    assert read_rankings(tmp_path / "f.jsonl") == [ranking]


def test_folder_takes_splits_from_file_names_and_ids_from_paths(tmp_path):
    for name in ("a/test.jsonl", "a/train.jsonl.gz", "b/latest.jsonl", "b/my-validation_1.jsonl"):
        write_lines(tmp_path / name, {"prompt": name})
    write_lines(tmp_path / "c_test.jsonl", {"prompt": "wins", "split": "valid"})
    (tmp_path / "notes.txt").write_text("not data")
    assert [(r.id, r.split) for r in read_prompts(tmp_path)] == [
        ("a/test:1", "test"), ("a/train:1", "train"), ("b/latest:1", "train"),
        ("b/my-validation_1:1", "valid"), ("c_test:1", "valid")]
    assert read_prompts(tmp_path / "a" / "test.jsonl")[0].split == "train"


def test_id_in_two_files_names_both(tmp_path):
    write_lines(tmp_path / "a.jsonl", {"id": "x", "prompt": "p"})
    write_lines(tmp_path / "b.jsonl", {"id": "x", "prompt": "q"})
    with pytest.raises(DataError, match="b.jsonl:1: field 'id': 'x' is already .* at a.jsonl:1"):
        read_prompts(tmp_path)


def test_sources_that_are_not_there(tmp_path):
    with pytest.raises(DataError, match="no .jsonl or .jsonl.gz or .jsonl.xz file in this"):
        read_prompts(tmp_path)
    for missing in (tmp_path / "no", "mine.jsonl", "./mine", "a/b/c"):
        with pytest.raises(DataError, match="no such file or folder$"):
            read_prompts(missing)
    (tmp_path / "f.csv").write_text("a,b\n")
    with pytest.raises(DataError, match="expected a .jsonl or .jsonl.gz or .jsonl.xz file, one"):
        read_prompts(tmp_path / "f.csv")
    (tmp_path / "f.jsonl").write_text("\n")
    with pytest.raises(DataError, match="f.jsonl: holds no usable prompts"):
        read_prompts(tmp_path / "f.jsonl")


def test_hub_name_without_the_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"^some/set: no such .* pip install rlhf-mini\[hub\]$"):
        read_prompts("some/set")


def test_hub_dataset(monkeypatch):
    splits = {"train": [PAIR | {"source": "web", "ranks": None}], "test": [PAIR]}
    fake = types.SimpleNamespace(load_dataset=lambda name: {"some/set": splits}[name])
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert [(r.id, r.split, r.responses) for r in read_rankings("some/set")] == [
        ("some/set/train:1", "train", ("d", "e")), ("some/set/test:1", "test", ("d", "e"))]
    splits["test"] = [{"chosen": "no dialogue", "rejected": "x"}]
    with pytest.raises(DataError, match="some/set/test:1: field 'chosen': a dialogue starts with"):
        read_rankings("some/set")


def test_hub_dataset_that_cannot_be_read(monkeypatch):
    def load_dataset(name):
        raise FileNotFoundError("nothing there")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(DataError, match=r"x/y: neither a file, .* of the hub \(nothing there\)"):
        read_prompts("x/y")
