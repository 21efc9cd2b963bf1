"""benchmarks/samples.py: pieces of a run are the run, and the recorded numbers add up."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from rlhf_mini.config import load_preset
from rlhf_mini.data import Prompt, read_jsonl
from rlhf_mini.models import RewardModel, ValueModel
from rlhf_mini.pipeline import run_stages
from rlhf_mini.ppo import train_ppo
from rlhf_mini.rollout import collect_rollout, score_with
from rlhf_mini.runtime import make_generator
from rlhf_mini.town import grade
from rlhf_mini.workspace import Run

ROOT = Path(__file__).parent.parent
RECORDED = ROOT / "data" / "recorded" / "samples"


@pytest.fixture
def samples(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    yield importlib.import_module("samples")
    for name in ("measuring", "record", "sweeps", "samples"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """A smoke run that is finished up to the reward model."""
    config = load_preset("smoke")
    config = replace(config, ppo=replace(config.ppo, iterations=3, checkpoint_every=5))
    run = Run(tmp_path_factory.mktemp("samples"), config)
    run_stages(run, ["reward"], "test")
    return run


def test_a_run_in_pieces_is_the_run(samples, run):
    result = samples.follow(run)
    assert result["steps"] == [0, 1, 2, 3]
    assert [len(p["responses"]) for p in result["prompts"]] == [4] * samples.PROMPTS
    policy, tokenizer = run.policy("sft")
    reward_model = RewardModel.load(run.directory / "reward")
    value_model, score = ValueModel.from_reward_model(reward_model), score_with(reward_model)
    config = replace(run.config.ppo, ptx_coef=0.0)
    prompts = [Prompt(p["id"], p["prompt"], family=p["family"]) for p in result["prompts"]]
    train_ppo(policy, value_model, score, tokenizer, run.prompts("train", tokenizer), config,
              run.seed)
    rollout, _ = collect_rollout(policy, run.policy("sft")[0], value_model, score, tokenizer,
                                 prompts, config, make_generator(run.seed, "samples"))
    for row, logprobs, values, mask in zip(result["prompts"], rollout.old_logprobs, rollout.values,
                                           rollout.batch.response_mask, strict=True):
        last = row["responses"][-1]
        assert last["logprobs"] == pytest.approx(logprobs[mask].tolist(), abs=6e-4)
        assert last["values"] == pytest.approx(values[mask].tolist(), abs=6e-4)
    started, ended = ([p["responses"][k]["values"] for p in result["prompts"]] for k in (0, -1))
    assert started != ended
    assert all(p["responses"][0]["kl"] == 0 for p in result["prompts"])


def test_prompts_take_turns_by_family(samples):
    prompts = [Prompt(str(i), "?", family=f) for i, f in enumerate("aabacb")]
    assert [p.id for p in samples.choose_prompts(prompts, 5)] == ["0", "2", "4", "1", "5"]


def test_steps_double_up_to_the_last(samples):
    assert samples.list_steps(16) == [0, 1, 2, 4, 8, 16]
    assert samples.list_steps(5) == [0, 1, 2, 4, 5]
    assert samples.list_steps(1) == [0, 1]


@pytest.fixture(scope="module")
def recorded():
    return json.loads((RECORDED / "samples.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def config():
    return json.loads((RECORDED / "manifest.json").read_text())["run"]["config"]["ppo"]


def test_recorded_gold_is_the_grade_of_the_recorded_text(recorded):
    prompts = {p.id: p for p in read_jsonl(ROOT / "data" / "town" / "prompts.jsonl", Prompt)}
    assert len(recorded["prompts"]) == 12
    assert {p["family"] for p in recorded["prompts"]} == {p.family for p in prompts.values()
                                                          if p.split == "valid"}
    for row in recorded["prompts"]:
        prompt = prompts[row["id"]]
        assert (prompt.split, prompt.prompt, prompt.family) == (
            "valid", row["prompt"], row["family"])
        for response in row["responses"]:
            text = "".join(response["tokens"]).removesuffix("EOS")
            assert response["gold"] == pytest.approx(grade(prompt, text).overall, abs=6e-4)


def test_recorded_advantages_follow_from_the_recorded_rewards(recorded, config):
    assert recorded["steps"][0] == 0 and recorded["steps"][-1] == config["iterations"]
    for response in (r for p in recorded["prompts"] for r in p["responses"]):
        ratios = [a - b for a, b in zip(response["logprobs"], response["ref_logprobs"],
                                        strict=True)]
        assert response["kl"] == pytest.approx(sum(ratios), abs=1e-3 * len(ratios))
        rewards = [-config["kl_coef"] * ratio for ratio in ratios]
        rewards[-1] += response["score"]
        values = [*response["values"], 0.0]
        for t, advantage in enumerate(response["advantages"]):
            right = sum((config["gamma"] * config["gae_lambda"])**k * (
                rewards[t + k] + config["gamma"] * values[t + k + 1] - values[t + k])
                for k in range(len(ratios) - t))
            assert advantage == pytest.approx(right, abs=0.03)
