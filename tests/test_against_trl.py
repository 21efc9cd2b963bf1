"""The comparison with TRL: ratios are paired and geometric, all sides train the same weights."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import against_trl  # noqa: E402
import town_models  # noqa: E402
import trl_sides  # noqa: E402

from rlhf_mini.loading import load_policy  # noqa: E402
from rlhf_mini.models import RewardModel  # noqa: E402

TINY = trl_sides.SETTINGS["tiny"]


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> trl_sides.Bench:
    folder = tmp_path_factory.mktemp("models")
    trl_sides.save_models(TINY, folder)
    return trl_sides.Bench(TINY, folder, torch.device("cpu"), tuned=False)


def row(side: str, speed: float, memory: float = 100.0, gpu: float | None = None) -> dict:
    return {"side": side, "stage": "ppo", "per_second": speed, "peak_memory_mb": memory,
            "gpu_memory_mb": gpu}


def test_ratio_is_the_geometric_mean_of_pairs_with_its_interval():
    rows = [row("ours", 20), row("trl", 10), row("ours", 8), row("trl", 1, 300.0)]
    (summary,), table = against_trl.summarize(rows, ["ppo"])
    found = summary["sides"]["trl"]["ours_over_it"]
    assert found["ratio"] == pytest.approx(4.0)  # sqrt(2 * 8)
    # two logs, ln 2 and ln 8: standard error ln 2, Student's quantile with one degree 12.706
    assert found["high"] == pytest.approx(4 * 2**12.7062, rel=1e-3)
    assert found["low"] == pytest.approx(4 / 2**12.7062, rel=1e-3)
    assert [summary["sides"][s]["mean"] for s in ("ours", "trl")] == [14.0, 5.5]
    assert summary["sides"]["trl"]["memory_mb"] == 300.0
    assert "| ppo | episodes | 14 | 6 | 4.00 [" in table


def test_each_column_of_trl_has_its_own_ratio_and_a_gpus_memory_counts_there():
    rows = [row("ours", 20, gpu=7.0), row("trl", 10, gpu=9.0), row("trl_tuned", 16, gpu=8.0)]
    (summary,), table = against_trl.summarize(rows, ["ppo"])
    assert table.splitlines()[-1] == "| ppo | episodes | 20 | 10 | 16 | 2.00 | 1.25 | 7 : 9 : 8 |"
    assert table.count("\n") == 2 and len({line.count("|") for line in table.splitlines()}) == 1


def test_prompts_have_the_stated_length_and_rankings_have_no_ties():
    for size, tokens in (("small", 16), ("small", 64)):
        _, tokenizer = town_models.make_town_model(size)
        prompts = town_models.make_prompts(tokenizer, tokens)
        assert len({p.id for p in prompts}) == len(prompts) >= 64
        assert all(len(trl_sides.encode_prompt(tokenizer, p.prompt)) == tokens for p in prompts)
    rankings = trl_sides.make_rankings(5)
    assert all(sorted(r.ranks) == [1, 2, 3, 4] for r in rankings)


def test_a_filled_vocabulary_has_the_size_and_reads_texts_as_before():
    _, tokenizer = town_models.make_town_model("tiny")
    filled = town_models.fill_vocabulary(tokenizer, 1500)
    assert (len(tokenizer), len(filled)) == (1024, 1500)
    assert filled("Who bakes?")["input_ids"] == tokenizer("Who bakes?")["input_ids"]
    assert (filled.eos_token_id, filled.pad_token_id) == (
        tokenizer.eos_token_id, tokenizer.pad_token_id)


def test_all_sides_load_the_same_weights_and_only_the_activation_differs(bench):
    ours, tokenizer = load_policy(bench.models / "policy")
    hub = trl_sides.load_for_trl(bench, "AutoModelForCausalLM", "policy")
    told = trl_sides.load_for_trl(
        trl_sides.Bench(TINY, bench.models, bench.device, tuned=True),
        "AutoModelForCausalLM", "policy")
    plain = AutoModelForCausalLM.from_pretrained(bench.models / "policy")
    assert plain.config.activation_function == hub.config.activation_function == "gelu_new"
    assert ours.config.activation_function == told.config.activation_function == "gelu_pytorch_tanh"
    ids = torch.randint(1024, (2, 9))
    wanted = plain(ids).logits
    for model in (ours, hub, told):
        torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-5, atol=1e-5)
    reward_model = RewardModel.load(bench.models / "reward")
    classifier = AutoModelForSequenceClassification.from_pretrained(bench.models / "classifier")
    mask = torch.ones_like(ids, dtype=torch.bool)
    torch.testing.assert_close(reward_model(ids, mask), classifier(ids).logits[:, 0],
                               rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stage, work, units, rows", [
    ("ppo", 1, 8, 1), ("sft", 6, 12, 5), ("reward", 8, 8, 2)])
def test_our_side_does_the_work_that_it_counts(bench, stage, work, units, rows):
    train, counted = trl_sides.make_training("ours", stage, bench, work)
    assert counted == units
    assert len(train()) == rows  # ppo 1 iteration; sft 2 epochs of 4 + 2, EOS rate; reward 2 of 4
