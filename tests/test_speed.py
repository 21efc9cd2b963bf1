"""The speed benchmarks: what they count is what is computed, and what they report is consistent."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import scipy.stats
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import measuring  # noqa: E402
import rollout  # noqa: E402
import throughput  # noqa: E402

from rlhf_mini.experiments import study  # noqa: E402

CPU = torch.device("cpu")
TINY = Namespace(seed=0, prompt=5, response=3, sft_batch=4, reward_batch=3, episodes=4,
                 minibatches=2, size=["tiny"])
MANIFEST = {"command", "commit", "changed", "device", "threads", "processors", "versions", "seed",
            "seconds"}


def run_script(script, monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, arguments)])
    script.main()


def check_manifest(folder: Path, script: str) -> dict:
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest) == MANIFEST
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    assert manifest["commit"] == (head.stdout.strip() or None)
    assert manifest["command"].startswith(f"python benchmarks/{script} ")
    assert manifest["device"].startswith("cpu (") and manifest["threads"] == 1
    assert manifest["versions"]["torch"] == torch.__version__ and manifest["seconds"] > 0
    return manifest


# ---------------------------------------------------------------- operations

@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_counted_operations_are_those_of_torchs_counter(stage):
    policy = measuring.build_gpt2("tiny", 17, CPU)
    work = {"sft": throughput.sft_work, "reward": throughput.reward_work,
            "ppo": throughput.ppo_work}[stage](policy, TINY)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work.step()
    found = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    linear = sum(n for op, n in found.items() if "bmm" not in op)
    square = found["aten.bmm"]  # attention, each token to each: the unseen half is computed too
    config = policy.config
    rows, length, read = {"sft": (4, 8, 3), "reward": (3, 17, 4), "ppo": (2 * 4, 8, 3)}[stage]
    # by hand: first block all to all, last block only what is read; backward twice as much
    assert square == 3 * rows * 4 * config.n_embd * length * (length + read)
    no_attention = {"sft": throughput.response_flops(config, 4, 5, 3, 1024)
                    - 4 * 4 * 32 * (36 + 18),  # 1 + .. + 8 pairs; 5 + 6 + 7 are read
                    "reward": throughput.ranking_flops(config, 3, 5, 3)
                    - 4 * 3 * 32 * (15 + 4 * (15 + 6) + 4 * 8),
                    "ppo": throughput.response_flops(config, 4, 5, 3, 1024)
                    + throughput.response_flops(config, 4, 5, 3, 1)
                    - 4 * 8 * 32 * (36 + 18)}[stage]
    assert linear == 3 * no_attention
    assert work.flops == linear + 3 * 4 * rows * 32 * {"sft": 54, "reward": 131, "ppo": 54}[stage]


def test_without_attention_a_trained_token_costs_six_operations_per_weight():
    config = measuring.build_gpt2("tiny", 8, CPU).config
    weights = 2 * 12 * 32**2 + 32 * 1024
    assert 3 * throughput.forward_flops(config, 10, 0, 10, 0, 1024) == 6 * weights * 10


def test_known_sizes_are_gpt2s():
    with torch.device("meta"):
        for name, millions in (("gpt2", 124.4), ("medium", 354.8), ("large", 774.0)):
            layers, hidden, heads, vocabulary = measuring.SIZES[name]
            model = measuring.GPT2LMHeadModel(measuring.GPT2Config(
                n_layer=layers, n_embd=hidden, n_head=heads, vocab_size=vocabulary))
            assert model.num_parameters() / 1e6 == pytest.approx(millions, abs=0.1)


# ---------------------------------------------------------------- measuring

def test_intervals_of_ratios_are_students_over_pairs():
    found = measuring.ratio_interval([20.0, 8.0, 9.0], [10.0, 1.0, 3.0])
    logs = [0.6931471805599453, 2.0794415416798357, 1.0986122886681098]
    low, high = scipy.stats.t.interval(0.95, 2, sum(logs) / 3, scipy.stats.sem(logs))
    assert found["ratio"] == pytest.approx(48 ** (1 / 3))  # of 2, 8 and 3
    assert [found["low"], found["high"]] == pytest.approx(
        [2.718281828459045**low, 2.718281828459045**high])
    assert measuring.ratio_interval([3.0], [2.0]) == {"ratio": pytest.approx(1.5), "low": None,
                                                      "high": None}


def test_the_clock_waits_and_the_ceilings_are_positive(monkeypatch):
    ticks = iter([10.0, 13.5])
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: next(ticks))
    assert measuring.time_once(lambda: None, CPU) == 3.5
    monkeypatch.undo()
    assert measuring.measure_matmul(CPU, torch.float32) > 1e8
    assert measuring.measure_bandwidth(CPU) > 1e7


def test_without_git_the_commit_comes_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setattr(study, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setenv("GIT_COMMIT", "abc")
    assert study.source_state() == {"commit": "abc", "changed": None}


# ---------------------------------------------------------------- rollout.py

def test_all_ways_sample_the_same_number_of_tokens_and_none_ends_early():
    policy = measuring.build_gpt2("tiny", 10, CPU)
    prompts = torch.randint(1024, (3, 4))
    ways = rollout.make_ways(policy, prompts, 6, "float32", 0)
    found = {name: ways[name]() for name in ("decode", "generate", "transformers")}
    assert all(ids.shape == (3, 6) for ids in found.values())
    assert torch.equal(found["decode"], found["generate"])  # same noise, same tokens


def test_bytes_of_a_step_are_weights_and_cache():
    policy = measuring.build_gpt2("tiny", 12, CPU)
    # per block 12 D^2 weights, 13 D biases and norms; embedding 1024 D; final norm 2 D
    weights = 2 * (12 * 32**2 + 13 * 32) + 1024 * 32 + 2 * 32
    found = rollout.count_bytes(policy, rows=3, prompt=4, response=8, width=2)
    assert found == {"weights_bytes": 2 * weights, "cache_bytes": 2 * 3 * 8 * 2 * 2 * 32}


def test_rollout_writes_every_measurement(monkeypatch, tmp_path):
    run_script(rollout, monkeypatch, "--size", "tiny", "--batch", 2, 4, "--prompt", 4, "--response",
               4, "--repeats", 2, "--device", "cpu", "--out", tmp_path)
    check_manifest(tmp_path, "rollout.py")
    result = json.loads((tmp_path / "rollout.json").read_text())
    assert [(p["size"], p["batch"], p["response"]) for p in result["points"]] == [
        ("tiny", 2, 4), ("tiny", 4, 4)]
    decode, plain, _ = result["points"][0]["ways"]
    assert len(decode["tokens_per_second"]) == 2 and "decode_over_it" not in decode
    assert decode["mean"] == pytest.approx(sum(decode["tokens_per_second"]) / 2)
    pairs = zip(decode["tokens_per_second"], plain["tokens_per_second"], strict=True)
    (a, b), (c, d) = pairs
    assert plain["decode_over_it"]["ratio"] == pytest.approx(((a / b) * (c / d)) ** 0.5)
    assert (tmp_path / "rollout.md").read_text().count("| tiny |") == 6


def test_a_way_that_fails_is_reported_and_the_others_go_on(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(rollout, "generate", broken)
    policy = measuring.build_gpt2("tiny", 8, CPU)
    rows = rollout.summarize(rollout.measure(policy, torch.randint(1024, (2, 4)), 4, "float32",
                                             ["decode", "generate"], 1, 0))
    assert rows[1] == {"way": "generate", "error": "RuntimeError: no such kernel"}
    assert rows[0]["mean"] > 0


# ---------------------------------------------------------------- throughput.py

def test_throughput_writes_every_step(monkeypatch, tmp_path):
    run_script(throughput, monkeypatch, "--size", "tiny", "--prompt", 5, "--response", 3,
               "--sft-batch", 4, "--reward-batch", 3, "--episodes", 4, "--minibatches", 2,
               "--steps", 2, "--device", "cpu", "--out", tmp_path)
    check_manifest(tmp_path, "throughput.py")
    result = json.loads((tmp_path / "throughput.json").read_text())
    assert {(r["stage"], r["mode"]) for r in result["rows"]} == {
        (s, f"eager {t}") for s in ("sft", "reward", "ppo") for t in ("float32", "bfloat16")}
    for row in result["rows"]:
        mean = sum(row["seconds"]) / 2
        assert row["tokens"] == {"sft": 4 * 8, "reward": 3 * 17, "ppo": 4 * 8}[row["stage"]]
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / mean)
        rate = result["matmul_flops_per_second"][row["mode"].split()[1]]
        assert row["use"] == pytest.approx(row["flops"] / mean / rate)
    assert (tmp_path / "throughput.md").read_text().count("| tiny |") == 6


def test_a_step_changes_the_weights_and_ppo_starts_at_ratio_one():
    policy = measuring.build_gpt2("tiny", 17, CPU)
    before = policy.transformer.wte.weight.clone()
    stats = throughput.ppo_work(policy, TINY).step()
    assert stats["first_ratio_error"] < 1e-5
    assert not torch.equal(before, policy.transformer.wte.weight)


def test_a_mode_that_fails_is_reported(monkeypatch):
    def step() -> None:
        if torch.is_autocast_enabled("cpu"):
            raise RuntimeError("out of memory")

    rows = throughput.measure(throughput.Work(step, 1, 1), ["eager float32", "eager bfloat16"], 2,
                              CPU)
    assert len(rows[0]["seconds"]) == 2
    assert rows[1]["error"] == "RuntimeError: out of memory"
