"""The comparison of fast paths with the plain one: it passes what is equal and nothing else."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import parity  # noqa: E402
import parity_checks  # noqa: E402
from town_models import make_town_model  # noqa: E402

from rlhf_mini.compute import compilable, computing  # noqa: E402
from rlhf_mini.config import ComputeConfig  # noqa: E402
from rlhf_mini.data import TokenBatch  # noqa: E402
from rlhf_mini.decoding import decode  # noqa: E402
from rlhf_mini.loading import load_policy, save_model  # noqa: E402
from rlhf_mini.models import compute_response_logprobs  # noqa: E402

CPU = torch.device("cpu")
TINY = parity.SETTINGS["tiny"]
FOUND = {"logprob_max": 1e-6, "logprob_mean": 1e-7, "kl_mean": 0.0, "score_max": 0.0,
         "decode_max": 1e-6, "decode_mean": 1e-7, "decode_other_rows": 0.0,
         "first_ratio_error": 1e-6, "sft": [4.0, 2.0], "score": [0.0] * 5 + [1.0, 1.2, 0.8, 1, 1],
         "kl": [0.0] * 5 + [2.0, 2.2, 1.8, 2, 2]}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_model(*make_town_model("tiny"), folder / "start")
    policy, _, tokenizer = parity.run_sft(folder / "start", TINY, 6, CPU, 0)
    save_model(policy, tokenizer, folder / "trained")
    return folder


@pytest.fixture(scope="module")
def plain(models) -> dict:
    return parity.run_path(ComputeConfig(), TINY, models, 6, CPU, 0)


def results(checks: list[dict], path: str) -> dict[str, str]:
    return {row["check"]: row["result"] for row in checks if row["path"] == path}


def test_equal_paths_pass_and_each_quantity_can_fail():
    same = results(parity_checks.judge({"eager float32": FOUND, "other": FOUND}, "eager float32"),
                   "other")
    assert len(same) == len(parity_checks.CHECKS) and set(same.values()) == {"PASS"}
    for name, worse in (("logprob_max", 2e-4), ("logprob_mean", 2e-5), ("kl_mean", 1e-8),
                        ("score_max", 1e-3), ("decode_max", 1e-3), ("decode_mean", 1e-4),
                        ("decode_other_rows", 0.1), ("first_ratio_error", 0.01),
                        ("sft", [4.0, 2.02]), ("score", [3.0] * 10), ("kl", [3.0] * 10)):
        checks = parity_checks.judge({"eager float32": FOUND, "other": FOUND | {name: worse}},
                                     "eager float32")
        assert list(results(checks, "other").values()).count("FAIL") == 1, name


def test_late_curves_may_differ_by_four_standard_errors():
    # the last five: standard deviation sqrt(0.08 / 4), of a difference of means sqrt(2 / 5) times
    limit = parity_checks.late_limit("score")(FOUND)
    assert limit == pytest.approx(4 * 0.02**0.5 * 0.4**0.5)
    assert parity_checks.late_mean(FOUND["score"]) == pytest.approx(1.0)


def test_the_plain_path_passes_with_real_numbers(plain):
    checks = parity_checks.judge({"eager float32": plain}, "eager float32")
    assert len(checks) == 4 and {row["result"] for row in checks} == {"PASS"}
    assert len(plain["sft"]) == len(plain["score"]) == len(plain["kl"]) == 6
    assert plain["sft"][-1] < plain["sft"][0]


def test_bfloat16_differs_from_float32_but_within_its_tolerance(models, plain):
    found = parity.run_path(ComputeConfig(dtype="bfloat16"), TINY, models, 6, CPU, 0)
    for name in ("logprob_max", "decode_max", "kl_mean", "score_max"):
        assert found[name] > 100 * plain[name]  # it was rounded, the sampler's weights too
    checks = parity_checks.judge({"eager float32": plain, "eager bfloat16": found},
                                 "eager float32")
    assert set(results(checks, "eager bfloat16").values()) == {"PASS"}
    strict = parity_checks.judge({"eager float32": plain, "two processes": found}, "eager float32")
    assert "FAIL" in results(strict, "two processes").values()


def test_a_sampler_with_wrong_numbers_is_found(models, monkeypatch):
    policy, tokenizer = load_policy(models / "trained")
    right = parity.compare_samples(policy, tokenizer, TINY, 0)
    decode = parity.decode
    monkeypatch.setattr(parity, "decode", lambda *args, **kwargs: (
        lambda ids, mask, logprobs: (ids, mask, logprobs + 0.01))(*decode(*args, **kwargs)))
    wrong = parity.compare_samples(policy, tokenizer, TINY, 0)
    assert right["decode_max"] < 1e-5 and wrong["decode_max"] == pytest.approx(0.01, abs=1e-4)


def test_a_path_that_dies_fails_and_one_that_is_not_possible_is_skipped(monkeypatch, tmp_path,
                                                                       capsys):
    answers = {"eager float32": FOUND, "eager bfloat16": {"error": "Traceback\nno memory\n"}}
    monkeypatch.setattr(parity, "in_own_process", lambda path, *rest: answers[path])
    monkeypatch.setattr(parity, "why_not",
                        lambda path, device: "needs 2 GPUs" if path == "two processes" else None)
    monkeypatch.setattr(sys, "argv", [
        "parity.py", "--device", "cpu", "--size", "tiny", "--steps", "2", "--out", str(tmp_path),
        "--paths", "eager bfloat16", "two processes"])
    assert parity.main() == 1
    result = json.loads((tmp_path / "parity.json").read_text())
    ends = {row["path"]: (row["result"], row["why"]) for row in result["checks"]
            if row["path"] != "eager float32"}
    assert ends == {"eager bfloat16": ("FAIL", "no memory"),
                    "two processes": ("skipped", "needs 2 GPUs")}
    assert json.loads((tmp_path / "manifest.json").read_text())["device"].startswith("cpu")
    assert "needs 2 GPUs | " in (tmp_path / "parity.md").read_text()
    assert "1 of 6 checks failed" in capsys.readouterr().out


# ---------------------------------------------------------------- what it found in the package

def test_in_bfloat16_the_sampler_reads_rounded_weights(policy):
    prompts = torch.randint(2, 320, (4, 5))
    mask = torch.ones_like(prompts, dtype=torch.bool)
    same = dict(max_response_tokens=6, eos_id=-1, pad_id=1, noise=torch.rand(4, 6))
    for dtype, low, high in (("float32", 0, 1e-5), ("bfloat16", 1e-4, 0.3)):
        with computing(ComputeConfig(dtype=dtype), CPU):
            ids, response_mask, logprobs = decode(policy, prompts, mask, **same)
        wanted, _ = compute_response_logprobs(policy, TokenBatch(prompts, mask, ids, response_mask))
        assert low <= (logprobs - wanted).abs().max() < high, dtype
    assert policy.dtype == torch.float32


def test_a_function_may_be_compiled_for_more_uses_than_torch_allows_by_default(monkeypatch):
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile",
                        lambda f, **kwargs: compiler(f, backend="eager", **kwargs))
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)

    @compilable
    def times(x: torch.Tensor, word: str) -> torch.Tensor:
        return x * word.count("a")

    with computing(ComputeConfig(compile=True), CPU):
        for count in range(12):  # each text is a use of its own
            assert times(torch.ones(3), "a" * count).sum() == 3 * count
