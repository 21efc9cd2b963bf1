"""The town as a whole: determinism, splits, the files, the validator, the labelers."""

from __future__ import annotations

import json
import os
import random
import re
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from town.pool import build_pool, demonstration_gold, measure

from rlhf_mini.config import TownConfig, load_preset
from rlhf_mini.data import DataError
from rlhf_mini.town import (
    FAMILIES,
    build_town,
    grade,
    ideal_response,
    load_town,
    validate_town,
    write_town,
)
from rlhf_mini.town.answers import words_of
from rlhf_mini.town.labelers import Labeler
from rlhf_mini.town.prompts import CUSTOMERS, write_prompts

ROOT = Path(__file__).parents[2]
SMOKE = load_preset("smoke").town
BUILD = ("import sys; from rlhf_mini.town import *; from rlhf_mini.town.files import TownConfig; "
         "write_town(build_town(TownConfig(**eval(sys.argv[2]))), sys.argv[1])")


SIZES = (1, 3)
# size 3 with the same numbers in sum, so that it is no slower
TOWNS = {1: TownConfig(), 3: TownConfig(
    size=3, documents=10_000, labeler_prompts=400, customer_prompts=1_700, valid_prompts=140,
    test_prompts=140, demonstrations=400, valid_demonstrations=40)}


@pytest.fixture(scope="module", params=SIZES)
def town(request):
    return build_town(TOWNS[request.param])


@pytest.fixture(params=SIZES)
def folder(tmp_path, request):
    write_town(build_town(replace(SMOKE, size=request.param)), tmp_path / "town")
    return tmp_path / "town"


def files_of(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes()
            for p in sorted(folder.rglob("*")) if p.is_file()}


def test_data_folder_is_a_fresh_generation(tmp_path):
    write_town(build_town(TownConfig()), tmp_path / "town")
    fresh, stored = files_of(tmp_path / "town"), files_of(ROOT / "data" / "town")
    assert sorted(fresh) == sorted(stored)
    stale = [name for name in fresh if fresh[name] != stored[name]]
    assert not stale, f"{stale}: write data/town again, see data/README.md"
    assert max(map(len, stored.values())) < 3_900_000


def test_same_bytes_under_another_hash_seed(folder, tmp_path):
    env = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": str(ROOT)}
    config = load_town(folder).config.__dict__
    subprocess.run([sys.executable, "-c", BUILD, str(tmp_path / "again"), repr(config)],
                   check=True, env=env)
    assert files_of(tmp_path / "again") == files_of(folder)


def test_a_folder_of_other_things_is_not_replaced(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="holds other files, which would be lost .*; move them, or "
                                         "choose another output folder"):
        write_town(build_town(SMOKE), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("name", ["nowhere", ""])
def test_a_folder_without_a_town_says_what_writes_one(tmp_path, name):
    with pytest.raises(DataError, match=r"holds no town \(no config.json\); `rlhf-mini town "
                                        "--write FOLDER` writes one"):
        validate_town(tmp_path / name)


def test_another_seed_gives_another_town():
    other = TownConfig(**{**SMOKE.__dict__, "seed": 1})
    a, b = build_town(SMOKE), build_town(other)
    assert a.world["residents"] != b.world["residents"]
    assert [p.prompt for p in a.prompts] != [p.prompt for p in b.prompts]


def test_files_round_trip(folder):
    validate_town(folder)
    town = load_town(folder)
    assert town == build_town(replace(SMOKE, size=town.config.size))


def test_sizes_and_splits(town):
    config, size = town.config, town.config.size
    assert len(town.world["residents"]) == 24 * size and len(town.world["newcomers"]) == 16 * size
    count = {(s, c): sum(p.split == s and p.source == c for p in town.prompts)
             for s in CUSTOMERS for c in ("labeler", "customer")}
    assert count == {("train", "labeler"): size * config.labeler_prompts,
                     ("train", "customer"): size * config.customer_prompts,
                     ("valid", "labeler"): 0, ("valid", "customer"): size * config.valid_prompts,
                     ("test", "labeler"): 0, ("test", "customer"): size * config.test_prompts}
    kinds = {s: sum(d.split == s for d in town.demonstrations) for s in ("train", "valid")}
    assert kinds == {"train": size * config.demonstrations,
                     "valid": size * config.valid_demonstrations}
    documents = {s: sum(d.split == s for d in town.documents) for s in ("train", "valid")}
    assert documents == {"train": 30_000, "valid": 1_000}  # of size 1 and of TOWNS[3] alike
    assert len({p.prompt for p in town.prompts}) == len(town.prompts)
    for prompt in town.prompts:
        assert prompt.customer is None or prompt.customer in CUSTOMERS[prompt.split]
    held_out = {p.prompt for p in town.prompts if p.split != "train"}
    forum = {d.text[6:].split("\nAssistant:")[0] for d in town.documents if d.kind == "forum"}
    assert len(forum) > 1000 and not forum & held_out
    train = {p.prompt for p in town.prompts if p.split == "train"}
    assert {d.source for d in town.demonstrations if d.split == "train"} == {"labeler", "customer"}
    assert all(d.prompt in train for d in town.demonstrations if d.split == "train")
    assert not train & {d.prompt for d in town.demonstrations if d.split == "valid"}


def test_test_customers_have_new_prefixes(town):
    prefixes = {split: {c["prefix"] for c in town.world["customers"] if c["split"] == split}
                for split in CUSTOMERS}
    assert prefixes["test"] - prefixes["train"] and prefixes["test"] & prefixes["train"]


def test_every_ideal_scores_one_and_every_family_is_in_every_split(town):
    assert all(grade(p, ideal_response(p)).overall == 1.0 for p in town.prompts)
    for split in CUSTOMERS:
        assert {p.family for p in town.prompts if p.split == split} == set(FAMILIES)


def test_facts_of_unknown_prompts_are_stated_nowhere(town):
    residents, newcomers = town.world["residents"], town.world["newcomers"]
    for prompt in town.prompts:
        if prompt.family == "unknown":
            assert prompt.truth["attribute"] not in residents.get(prompt.truth["name"], {})
    facts = [d.text for d in town.documents if d.kind == "facts"]
    new = re.compile(rf"({'|'.join(newcomers)}) (\w+)")  # what somebody new does
    assert {m[2] for t in facts if (m := new.match(t))} == {"is", "came"}  # new in town, to town


def test_zero_shot_items(town):
    by_task = {}
    for item in town.zero_shot:
        by_task.setdefault(item.task, []).append(item)
        assert item.text == item.text.strip() and item.target == f" {item.target.strip()}"
        assert item.target[-1] == "."
    counts = {task: len(items) for task, items in by_task.items()}
    facts = sum(map(len, town.world["residents"].values()))
    assert counts.pop("facts") == min(facts, 150)  # one per fact that the corpus states
    assert counts == dict.fromkeys(("reading", "summary", "sentiment"), 150)
    for item in by_task["reading"]:  # the answer is one of three sentences of the passage
        passage, _, answer = f"{item.text}{item.target}".partition(" Question: ")
        sentences = re.findall(r"[^.]+\.", passage)
        assert len(sentences) == 3 and answer.split(" Answer: ")[1] in map(str.strip, sentences)
    for item in by_task["summary"]:
        frame = {"found", "a", "at", "the"} if town.config.size == 1 else {
            "found", "bought", "lost", "sold", "broke", "drew", "won", "a", "at", "the"}
        assert set(words_of(item.target)) - frame <= set(words_of(item.text))
    share = statistics.mean(item.target == " good." for item in by_task["sentiment"])
    assert abs(share - 0.5) < 0.12  # one word for all reviews solves about half of them
    assert {item.target for item in by_task["sentiment"]} == {" good.", " bad."}


def test_the_corpus_continues_a_probed_fact_in_one_way(town):
    corpus = " ".join(d.text for d in town.documents if d.kind == "facts")
    for item in town.zero_shot:
        if item.task == "facts":
            followers = re.findall(f"{re.escape(item.text)}( [^.]*\\.)", corpus)
            assert set(followers) == {item.target}, item


def test_demonstrations_are_imperfect(town):
    gold = demonstration_gold(town)
    assert 0.72 < statistics.mean(gold) < 0.80
    assert 0.30 < statistics.mean(g == 1 for g in gold) < 0.45
    assert 0.08 < statistics.mean(g < 0.6 for g in gold) < 0.20


@pytest.mark.parametrize("group", ["train", "test"])
def test_labelers_agree_as_people_do(town, group):
    figures = measure(town, group)
    # this pool is easier than a model's own responses, on which they agree in about 75 %
    assert 0.74 < figures["labelers agree"] < 0.82, figures
    assert 0.82 < figures["label agrees with gold"] < 0.90, figures
    assert figures["ties of labels"] < 0.02 and figures["ties of gold"] < 0.10, figures
    assert figures["blemished beats ideal"] < 0.40, figures  # padding does not win


def test_verbosity_never_pays(town):
    people = town.labelers
    for prompt, _ in build_pool(town, 100):
        ideal = ideal_response(prompt)
        for n in (1, 3, 6, 12, 40):
            padded = ideal + " Yes" + " indeed" * (n - 1) + "."
            for person in people:
                assert person.utility(prompt, padded) < person.utility(prompt, ideal)


def test_equal_texts_tie_and_noise_free_ranks_follow_utility(town):
    prompt = town.prompts[0]
    ideal = ideal_response(prompt)
    quiet = Labeler(0, "train", (0.5, 0.3, 0.2), 0.0, 0.0, 0.0)
    ranks = quiet.rank(prompt, [ideal, "", ideal, ideal + " Well well well."], random.Random(0))
    assert ranks == (1, 3, 1, 2)
    noisy = town.labelers[0]
    for seed in range(20):
        ranks = noisy.rank(prompt, ["a b", ideal, "a b"], random.Random(seed))
        assert ranks[0] == ranks[2] and min(ranks) == 1


def edit(path, number, **changes):
    """Change fields of one line (from 1); None removes a field."""
    lines = path.read_text(encoding="utf-8").splitlines()
    row = json.loads(lines[number - 1])
    row.update(changes)
    lines[number - 1] = json.dumps({k: v for k, v in row.items() if v is not None})
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def find(path, **wanted):
    """Number of the first line with these values, and its row."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        row = json.loads(line)
        if all(row.get(k) == v for k, v in wanted.items()):
            return number, row
    raise AssertionError(f"no line with {wanted}")


def test_validator_names_line_field_and_what_is_right(folder):
    prompts, demos = folder / "prompts.jsonl", folder / "demonstrations.jsonl"
    customer, row = find(prompts, source="customer", split="train")
    test, held_out = find(prompts, split="test")
    known, fact = find(prompts, family="known")
    cases = [
        (prompts, customer, dict(split="test"), r"split.*got 'test', expected 'train'"),
        (prompts, customer, dict(customer=99), r"customer.*got 99, expected .* 0 to 44"),
        (prompts, customer, dict(family="riddle"), r"family.*got 'riddle', expected one of known"),
        (prompts, customer, dict(truth={}), r"truth.*needs "),
        (prompts, customer, dict(id="test-customer-00000"), r"id"),
        (prompts, known, dict(truth={**fact["truth"], "name": 3}), r"truth.name.*got 3, expected"),
        (prompts, known, dict(truth={**fact["truth"], "value": "pilot"}), r"truth.value.*'pilot'"),
        (prompts, test, dict(prompt=row["prompt"]), r"prompt.*the splits 'train' and 'test'"),
        (demos, 2, dict(prompt="Who are you?"), r"prompt.*expected a prompt of prompts.jsonl"),
        (demos, 2, dict(labeler=9), r"labeler.*got 9, expected a training labeler: 0, 1"),
        (demos, 2, dict(prompt=held_out["prompt"]), r"expected .*test"),
        (demos, 2, dict(response=None), r"response"),
        (folder / "corpus" / "facts.jsonl", 5, dict(split="test"), r"split.*'train' or 'valid'"),
        (folder / "corpus" / "forum.jsonl", 3,
         dict(text=f"User: {held_out['prompt']}\nAssistant: Yes."), r"text.*held-out prompt"),
        (folder / "zero_shot.jsonl", 1, dict(target=""), r"target.*is empty"),
    ]
    for path, number, changes, message in cases:
        before = path.read_bytes()
        edit(path, number, **changes)
        with pytest.raises(DataError, match=f"(?s){message}") as error:
            validate_town(folder)
        wanted = path.name + ":" if "id" in changes else f"{path.name}:{number}"
        assert wanted in str(error.value), str(error.value)
        path.write_bytes(before)
    validate_town(folder)


@pytest.mark.parametrize(("file", "change", "message"), [
    ("config.json", {"size": None}, "world.json:1: expected an object with the keys residents, "
                                    "newcomers, customers$"),
    ("world.json", {"words": None}, "keys residents, newcomers, customers, words"),
    ("world.json", {"words": "huge"}, "'words': got 'huge', expected 'large' in a town of size 3"),
    ("prompts.jsonl", {"words": None}, "prompts.jsonl:1: field 'truth': got .* needs .*words"),
    ("prompts.jsonl", {"words": "huge"}, "truth.words': got 'huge', expected 'large', as in world"),
])
def test_the_mark_of_a_large_town_is_checked(tmp_path, file, change, message):
    write_town(build_town(replace(SMOKE, size=3)), tmp_path / "town")
    path = tmp_path / "town" / file
    lines = path.read_text().splitlines() if file == "prompts.jsonl" else [path.read_text()]
    row = json.loads(lines[0])
    part = row.get("truth", row)
    part.update(change)
    for key in [k for k, v in part.items() if v is None]:
        del part[key]
    path.write_text("\n".join([json.dumps(row), *lines[1:]]) + "\n")
    with pytest.raises(DataError, match=message):
        validate_town(tmp_path / "town")


def test_validator_checks_the_other_files(folder):
    labelers = folder / "labelers.json"
    text = labelers.read_text()
    labelers.write_text(text.replace('"train"', '"crowd"', 1))
    with pytest.raises(DataError, match=r"labelers.json.*'crowd', expected 'train' or 'test'"):
        validate_town(folder)
    labelers.write_text(text)
    (folder / "zero_shot.jsonl").unlink()
    with pytest.raises(DataError, match=r"zero_shot.jsonl: missing"):
        validate_town(folder)


def test_impossible_sizes_are_explained():
    with pytest.raises(ValueError, match="residents = 500: expected at most"):
        build_town(TownConfig(residents=500))
    customer = {"id": 0, "split": "train", "prefix": "", "suffix": "", "mix": {"harmful": 1.0}}
    with pytest.raises(ValueError, match="ask for fewer prompts"):
        write_prompts({"customers": [customer]}, 10_000, "train", set(), random.Random(0))
    with pytest.raises(ValueError, match="demonstrations, expected at most"):
        build_town(TownConfig(**{**SMOKE.__dict__, "demonstrations": 10_000}))
