"""Real responses and judgements: how they are prepared, and what is asked of a run on them."""

from __future__ import annotations

import gzip
import hashlib
import importlib
import json
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from rlhf_mini.__main__ import main
from rlhf_mini.config import EvaluationConfig, load_preset
from rlhf_mini.experiments import real
from rlhf_mini.experiments.real_figures import draw_agreement, draw_calibration, draw_policies
from rlhf_mini.models import RewardModel
from rlhf_mini.readers import read_demonstrations, read_documents, read_prompts, read_rankings
from rlhf_mini.workspace import Run

ROOT = Path(__file__).parent.parent
CONFIG = EvaluationConfig(bootstrap=200)
NONSENSE = "} } } bridge } } }"
SYSTEMS = {"good": 0.9, "fair": 0.5, "poor": 0.1}


def import_benchmark(monkeypatch, name: str):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module(name)


@pytest.fixture
def real_data(monkeypatch):
    yield import_benchmark(monkeypatch, "real_data")
    sys.modules.pop("real_data", None)


def make_rows(count: int) -> list[dict]:
    """Judged responses: a system's quality and a little noise make the score."""
    rng, rows = random.Random(0), []
    words = ("bread", "river", "mill", "school", "market", "bridge", "garden", "station")
    for i in range(count):
        responses = [{"model": name, "text": f"The {rng.choice(words)} is {where} number {i}.",
                      "score": round(min(1.0, max(0.0, quality + rng.uniform(-0.3, 0.3))), 4)}
                     for name, quality in SYSTEMS.items()
                     for where in ("here, near zorble", "behind the old mill of house")]
        rows.append({"prompt": f"Where is the {words[i % 8]} of house {i}?",
                     "split": "test" if i % 5 == 0 else "train",
                     "responses": [*responses,
                                   {"model": "NullModel", "text": NONSENSE, "score": 0.95}]})
    return rows


def pack(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in rows).encode()))
    return path


def unpack(path: Path) -> list[dict]:
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]


# ---- preparing the data ------------------------------------------------------------------------


def write_results(folder: Path) -> Path:
    """AlpacaEval's `results`, as published: two judged systems, the nonsense, one not judged."""
    prompts = [f"Question {i}?" for i in range(40)]
    for system, preference in (("a", 1.75), ("b", 1.25), ("NullModel", 1.875)):
        file = folder / system / "weighted_alpaca_eval_gpt4_turbo" / "annotations.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps([
            {"instruction": p, "output_1": "reference", "generator_2": "example",
             "output_2": " ".join([system] * (i + 1)),
             "preference": None if (system, i) == ("b", 3) else preference}
            for i, p in enumerate(prompts)]))
    (folder / "c").mkdir()
    (folder / "c" / "model_outputs.json").write_text(json.dumps(
        [{"instruction": p, "output": "an answer of c"} for p in prompts]))
    (folder / "README.md").write_text("not a system")
    return folder


def test_published_results_become_rankings_demonstrations_prompts_and_text(real_data, tmp_path):
    source = write_results(tmp_path / "results")
    assert real_data.main([str(source), "--out", str(tmp_path / "out"), "--max-words", "30"]) == 0
    test = {f"Question {i}?" for i in range(40)
            if int(hashlib.sha256(f"Question {i}?".encode()).hexdigest()[:2], 16) < 26}
    assert 0 < len(test) < 12
    rankings = read_rankings(tmp_path / "out" / "rankings.jsonl.gz")
    # Question 3 has one judged response left, questions 30 to 39 have only longer ones.
    assert [r.prompt for r in rankings] == [f"Question {i}?" for i in range(30) if i != 3]
    for ranking in rankings:
        number = int(ranking.prompt[9:-1]) + 1
        assert dict(zip(ranking.responses, ranking.ranks, strict=True)) == {
            " ".join(["a"] * number): 1, " ".join(["b"] * number): 2}
        assert ranking.split == ("test" if ranking.prompt in test else "train")
    best = read_demonstrations(tmp_path / "out" / "demonstrations.jsonl.gz")
    assert len(best) == 58 and best[0].response == "a" and best[1].response == "b"
    assert len(read_prompts(tmp_path / "out" / "prompts.jsonl.gz")) == 29
    nonsense = unpack(tmp_path / "out" / "nonsense.jsonl.gz")
    assert len(nonsense) == 40 and {row["score"] for row in nonsense} == {0.875}
    texts = {d.text for d in read_documents(tmp_path / "out" / "corpus.jsonl.gz")}
    assert texts == {f"Question {i}?\n\nan answer of c" for i in range(40)
                     if f"Question {i}?" not in test}


def test_some_systems_are_text_instead(real_data, tmp_path):
    source = write_results(tmp_path / "results")
    shutil.copytree(source / "b", source / "d")
    for name in "abd":
        (source / name / "model_outputs.json").write_text(json.dumps(
            [{"instruction": f"Question {i}?", "output": f"text of {name}"} for i in range(40)]))
    rows, corpus = real_data.read_results(source, text_systems=1)
    ranked = [len(row["responses"]) for row in rows]
    assert max(ranked) == 3  # two systems, and the nonsense
    assert {row["response"][-1] for row in corpus} - {"c"} < set("abd")
    assert len({row["response"] for row in corpus}) == 2
    with pytest.raises(ValueError, match="--text-systems 2: 3 systems were judged, and at least 2"):
        real_data.read_results(source, text_systems=2)


def test_a_file_of_rankings_and_a_corpus_of_ones_own(real_data, tmp_path):
    source = pack(tmp_path / "judged.jsonl.gz", make_rows(10))
    (tmp_path / "text.jsonl").write_text("".join(f'{{"text": "text {i}"}}\n' for i in range(9)))
    assert real_data.main([str(source), "--out", str(tmp_path), "--corpus",
                           str(tmp_path / "text.jsonl"), "--documents", "4"]) == 0
    rows = unpack(tmp_path / "rankings.jsonl.gz")
    assert len(rows) == 10 and not any(x["model"] == "NullModel" for r in rows
                                       for x in r["responses"])
    texts = [row["text"] for row in unpack(tmp_path / "corpus.jsonl.gz")]
    assert len(set(texts)) == 4 and set(texts) <= {f"text {i}" for i in range(9)}
    scores = [[x["score"] for x in row["responses"]] for row in rows]
    assert scores == [sorted(row, reverse=True) for row in scores]


def test_wrong_sources_are_named(real_data, tmp_path, capsys):
    def says(*arguments: str) -> str:
        assert real_data.main([*arguments, "--out", str(tmp_path / "out")]) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    (tmp_path / "empty").mkdir()
    assert "no */weighted_alpaca_eval_gpt4_turbo/annotations.json there" in says(
        str(tmp_path / "empty"))
    results = write_results(tmp_path / "results")
    assert "no prompt has two responses of at most 0 words" in says(str(results), "--max-words",
                                                                    "0")
    (results / "c" / "model_outputs.json").write_text('[{"instruction": "x"}]')
    assert "c/model_outputs.json: not as AlpacaEval publishes it: KeyError('output')" in says(
        str(results))
    assert "no such file" in says(str(tmp_path / "missing.jsonl")).lower()


@pytest.mark.parametrize("change, field", [
    ({"split": None}, "split"), ({"responses": "x"}, "responses"),
    ({"responses": ["a", "b"]}, "responses[0].model"),
    ({"responses": [{"model": "m", "text": None, "score": 1}]}, "responses[0].text")])
def test_a_wrong_line_is_named(real_data, tmp_path, capsys, change, field):
    file = pack(tmp_path / "judged.jsonl.gz", [*make_rows(2), make_rows(1)[0] | change])
    assert real_data.main([str(file), "--out", str(tmp_path / "out")]) == 2
    assert f"judged.jsonl.gz:3: field '{field}': got" in capsys.readouterr().err


# ---- agreement, by hand ------------------------------------------------------------------------


def judged(lengths, scores, systems=None) -> real.Judged:
    return real.Judged("p", [[7] * n for n in lengths], systems or ["s"] * len(lengths),
                       np.array(scores))


def test_agreement_counts_pairs_by_hand():
    # pairs (better, worse): lengths 10/20 and 10/21 against, 20/21 near; the tie is no pair
    one = judged([10, 20, 21], [0.9, 0.5, 0.1], ["x", "y", "z"])
    two = judged([5, 50], [0.4, 0.4])
    scores = [np.array([1.0, 2.0, 0.0]), np.array([1.0, 0.0])]
    found = real.measure_agreement(scores, [one, two], {"x": 0.5, "y": 0.5, "z": 0.1}, CONFIG)
    wanted = {"all": (2 / 3, 0, 2.5 / 3, 3), "near": (1, 0, 1, 1), "against": (0.5, 0, 0.75, 2)}
    for kind, (ours, length, system, pairs) in wanted.items():
        row = found[kind]
        assert [row[name]["mean"] for name in ("reward model", "length", "system")] == (
            pytest.approx([ours, length, system]))
        assert row["above length"]["mean"] == pytest.approx(ours - length)
        assert row["above system"]["mean"] == pytest.approx(ours - system)
        assert {row[name]["pairs"] for name in row} == {pairs}


def test_agreement_equals_a_loop_over_pairs():
    rng = np.random.default_rng(0)
    sets = [judged(rng.integers(1, 40, k).tolist(), rng.integers(0, 4, k) / 4.0)
            for k in rng.integers(2, 9, 12)]
    scores = [rng.integers(0, 3, len(j.scores)) / 2.0 for j in sets]
    right = total = 0
    for j, score in zip(sets, scores, strict=True):
        for a in range(len(score)):
            for b in range(len(score)):
                if j.scores[a] > j.scores[b]:
                    total += 1
                    right += 1.0 if score[a] > score[b] else 0.5 * (score[a] == score[b])
    found = real.measure_agreement(scores, sets, {}, CONFIG)["all"]["reward model"]
    assert found["pairs"] == total and found["mean"] == pytest.approx(right / total)


def test_length_is_counted_over_pairs_by_hand():
    sets = [judged([3, 9, 30], [0.1, 0.2, 0.9]), judged([5, 6, 6], [0.3, 0.2, 0.2])]
    scores = [np.array([3.0, 2.0, 1.0]), np.array([1.0, 2.0, 1.0])]
    found = real.measure_length(scores, sets, CONFIG)
    # pairs of different lengths: 3 and 2; the longer scores higher in 0 + 1, a tie in 1
    assert found["reward model"]["mean"] == pytest.approx((0 + 1 + 0.5) / 5)
    assert found["judge"]["mean"] == pytest.approx(3 / 5) and found["judge"]["pairs"] == 5


# ---- the whole way, at smoke size --------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, Path]:
    """A smoke run on made-up data, and the folder of the data."""
    folder = tmp_path_factory.mktemp("real")
    data, out = folder / "data", folder / "run"
    sys.path.insert(0, str(ROOT / "benchmarks"))
    prepare = importlib.import_module("real_data")
    sys.path.pop(0)
    sys.modules.pop("real_data")
    pack(folder / "judged.jsonl.gz", make_rows(60))
    text = pack(folder / "text.jsonl.gz", [
        {"prompt": r["prompt"], "response": r["responses"][0]["text"]} for r in make_rows(60)])
    assert prepare.main([str(folder / "judged.jsonl.gz"), "--out", str(data), "--corpus",
                         str(text)]) == 0
    sources = [f"--{kind}={data / kind}.jsonl.gz"
               for kind in ("corpus", "demonstrations", "rankings", "prompts")]
    assert main(["run", "--preset", "smoke", "--out", str(out), *sources,
                 "--set", "ptx_coef=0"]) == 0
    return out, data


def test_the_corpus_is_what_is_read_and_measured(finished):
    out, data = finished
    results = json.loads((out / "evaluation" / "evaluation.json").read_text())
    assert {name: set(row) for name, row in results["zero_shot"].items()} == {
        name: {"corpus_loss"} for name in ("base", "sft", "ppo")}
    run = Run(out, load_preset("smoke"), sources={"corpus": str(data / "corpus.jsonl.gz")})
    train, valid = (run.documents(split) for split in ("train", "valid"))
    assert (len(train), len(valid)) == (59, 1)  # a hundredth, at least one
    assert set(json.loads((out / "base" / "stage.json").read_text())["settings"]) >= {"corpus"}
    tokenizer = run.policy("base")[1]
    assert len(tokenizer.encode(" zorble")) == 1  # a word of this corpus, learned from it


def test_real_questions_of_a_small_run(finished, tmp_path, monkeypatch):
    out, data = finished
    pairs = pack(tmp_path / "pairs.jsonl.gz", [
        {"chosen": f"\n\nHuman: Is it {i}?\n\nAssistant: Yes, it is.",
         "rejected": f"\n\nHuman: Is it {i}?\n\nAssistant: No."} for i in range(60)])
    benchmark = import_benchmark(monkeypatch, "real")
    assert benchmark.main([str(out), str(data), "--pairs", str(pairs), "--seeds", "2", "--device",
                           "cpu", "--out", str(tmp_path / "rec")]) == 0
    for name in ("real", "measuring"):
        sys.modules.pop(name, None)
    results = json.loads((tmp_path / "rec" / "real.json").read_text())
    assert results["prompts"] == {"held out": 12, "responses": 72, "train": 43,
                                  "demonstrations": 129}
    assert results["nonsense"]["judge"]["mean"] == pytest.approx(np.mean(
        [np.mean([x["score"] < 0.95 for x in row["responses"]])
         for row in unpack(data / "rankings.jsonl.gz") if row["split"] == "test"]))
    assert {(r["k"], r["share"], r["seed"]) for r in results["learning"]} == {
        (k, share, seed) for k in real.KS for share in real.SHARES for seed in (0, 1)}
    pairs = results["pairs"]
    assert pairs["longer wins"]["mean"] == 1 and pairs["shorter wins"]["mean"] == 0
    for rule in ("longer wins", "shorter wins"):
        assert pairs[f"above {rule}"]["mean"] == pytest.approx(
            pairs["reward model"]["mean"] - pairs[rule]["mean"])
    assert pairs["test"] == 12
    assert len(pairs["rows"]) == 2 * len(real.SHARES)
    assert [row["n"] for row in results["best_of_n"]] == list(real.SIZES)
    answers = [json.loads(line) for line in
               (out / "evaluation" / "responses.jsonl").read_text().splitlines()]
    for mode in ("sampled", "greedy"):
        row, means = results["policies"][mode], {}
        for name in ("sft", "ppo"):
            found = [x["rm_score"] if x["eos_rate"] else -1.0
                     for answer in answers for x in answer["models"][name][mode]]
            means[name] = row[name]["score"]["mean"]
            assert means[name] == pytest.approx(np.mean(found), abs=1e-6)
        assert row["gain by reward model"]["mean"] == pytest.approx(means["ppo"] - means["sft"],
                                                                    abs=1e-6)
    tokens = results["nonsense"]["tokens"]
    assert tokens["scored"] <= tokens["whole"] and tokens["real"] > 2
    assert results["data"]["systems"] == 3 and results["data"]["test"] == 12
    samples = json.loads((tmp_path / "rec" / "samples.json").read_text())
    assert len(samples) == 4 and all(set(s) == {"prompt", "sft", "best of n", "ppo",
                                                "sft, greedy", "ppo, greedy"} for s in samples)
    manifest = json.loads((tmp_path / "rec" / "manifest.json").read_text())
    assert manifest["stages"]["reward"]["seconds"] > 0 and "--corpus" in manifest["run"]
    for draw in (draw_agreement, draw_calibration, draw_policies):
        draw(results)
    for name in ("agreement", "calibration", "policies"):
        assert (tmp_path / "rec" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


def test_scores_of_judged_responses_are_those_of_one_at_a_time(finished):
    out, data = finished
    run = Run(out, load_preset("smoke"))
    reward_model, tokenizer = RewardModel.load(out / "reward"), run.policy("sft")[1]
    found = real.read_judged(data / "rankings.jsonl.gz", run, tokenizer)
    scores = real.score_judged(reward_model, tokenizer, found)
    for j, row in zip(found[:3], scores, strict=False):
        for ids, score in zip(j.responses, row, strict=True):
            text = real.encode_prompt(tokenizer, j.prompt) + ids
            with torch.no_grad():
                alone = reward_model(torch.tensor([text]), torch.ones(1, len(text)).bool())
            assert score == pytest.approx(alone.item(), abs=1e-4)
    strength = real.measure_strength(data / "rankings.jsonl.gz")
    assert strength["good"] > strength["fair"] > strength["poor"]


def test_no_reward_model_is_trained_on_what_it_is_judged_by(finished, monkeypatch):
    out, data = finished
    run = Run(out, load_preset("smoke"),
              sources={"rankings": str(data / "rankings.jsonl.gz")}, label="real")
    tokenizer, seen = run.policy("sft")[1], []
    train = real.train_on

    def see(run, policy, tokenizer, rankings, seed):
        seen.append({r.prompt for r in rankings})
        return train(run, policy, tokenizer, rankings, seed)

    monkeypatch.setattr(real, "train_on", see)
    held_out = real.read_judged(data / "rankings.jsonl.gz", run, tokenizer)
    real.learn_more(run, data / "rankings.jsonl.gz", held_out, 2)
    assert len(seen) == 2 * len(real.KS) * len(real.SHARES)
    assert all(prompts.isdisjoint({j.prompt for j in held_out}) for prompts in seen)
    first = {r.prompt for r in run.rankings("rankings", "train", tokenizer)}
    import_benchmark(monkeypatch, "real").train_second(run, data / "rankings.jsonl.gz", tokenizer)
    for name in ("real", "measuring"):
        sys.modules.pop(name, None)
    assert seen[-1] and seen[-1].isdisjoint(first)


def test_other_rankings_than_the_runs_are_refused(finished, tmp_path, monkeypatch, capsys):
    out, _ = finished
    pack(tmp_path / "rankings.jsonl.gz", make_rows(30))
    assert import_benchmark(monkeypatch, "real").main([str(out), str(tmp_path)]) == 2
    for name in ("real", "measuring"):
        sys.modules.pop(name, None)
    assert "not the rankings that" in capsys.readouterr().err


def test_a_folder_without_such_a_run_is_named(tmp_path, monkeypatch, capsys):
    benchmark = import_benchmark(monkeypatch, "real")
    assert benchmark.main([str(tmp_path), str(tmp_path), "--out", str(tmp_path / "x")]) == 2
    for name in ("real", "measuring"):
        sys.modules.pop(name, None)
    assert "no finished run with --prompts and --rankings" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_recorded_answers_are_whole_and_hold_no_texts_of_others():
    folder = ROOT / "data" / "recorded" / "real"
    results, samples, manifest = (json.loads((folder / f"{name}.json").read_text("utf-8"))
                                  for name in ("real", "samples", "manifest"))
    for draw in (draw_agreement, draw_calibration, draw_policies):
        draw(results)
    assert manifest["command"].startswith("python benchmarks/real.py ")
    assert manifest["commit"] and manifest["changed"] == []
    assert manifest["run"].startswith("rlhf-mini run --preset real")
    known = {"prompt", "best of n", "sft", "ppo", "sft, greedy", "ppo, greedy"}
    assert len(samples) <= 4 and set().union(*samples) <= known
    leaves = [results]
    while leaves:
        leaf = leaves.pop()
        leaf = list(leaf.values()) if isinstance(leaf, dict) else leaf
        leaves += leaf if isinstance(leaf, list) else []
        assert not isinstance(leaf, str) or len(leaf) == 64  # a fingerprint, no text
    seeds = {row["seed"] for row in results["learning"]}
    assert len(seeds) >= 3
    for k in real.KS:
        for share in real.SHARES:
            found = [r for r in results["learning"] if (r["k"], r["share"]) == (k, share)]
            assert {r["seed"] for r in found} == seeds
    size = sum(p.stat().st_size for p in folder.iterdir())
    assert size < 300_000
