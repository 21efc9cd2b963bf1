"""The stages joined: what runs again, what is kept, and what a stopped run goes on from."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch

from rlhf_mini import pipeline, training
from rlhf_mini.__main__ import main
from rlhf_mini.config import load_preset, override
from rlhf_mini.data import Ranking, read_jsonl
from rlhf_mini.files import lock_directory
from rlhf_mini.pipeline import plan_stages, run_stages, select_stages, settings_of
from rlhf_mini.workspace import Run, in_round

STAGES = ["town", "base", "sft", "rankings", "reward", "ppo", "ppo_ptx", "evaluation"]
TRAINED = ["base", "sft", "reward", "ppo", "ppo_ptx"]


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """A finished run of the smoke preset; do not change it, copy it."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    assert main(["run", "--preset", "smoke", "--out", str(out)]) == 0
    return out


@pytest.fixture
def copied(finished, tmp_path):
    """A function that copies some stages of the finished run into a folder of its own."""
    def copy(*stages: str) -> Path:
        for stage in stages:
            shutil.copytree(finished / stage, tmp_path / "run" / stage)
        return tmp_path / "run"
    return copy


def smoke(out: Path, *settings: str, **kwargs) -> Run:
    return Run(out, override(load_preset("smoke"), list(settings)), **kwargs)


def lines(capsys) -> dict[str, list[str]]:
    """Return what each stage said."""
    said: dict[str, list[str]] = {}
    for line in capsys.readouterr().out.splitlines():
        if line.startswith("["):
            name, _, text = line.partition("] ")[2].partition(": ")
            said.setdefault(name, []).append(text)
    return said


def rerun(said: dict[str, list[str]]) -> list[str]:
    return [name for name, texts in said.items() if texts != ["unchanged, not run again"]]


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the bytes of what a stage made, all but its times."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*"))
            if p.is_file() and p.name != "stage.json"}


# ---- a whole run -------------------------------------------------------------------------------


def test_report_holds_every_number(finished):
    report = json.loads((finished / "report.json").read_text())
    assert list(report["seconds"]) == sorted([*STAGES, "total"])
    assert report["models"] == ["base", "sft", "ppo", "ppo_ptx"]
    for model in report["models"]:
        for mode in ("sampled", "greedy"):
            measures = report["eval"][model][mode]
            assert set(measures) == {"gold", "helpful", "truthful", "harmless", "kl", "rm_score",
                                     "response_tokens", "eos_rate"}
            for value in measures.values():
                assert value["low"] <= value["mean"] <= value["high"]
        assert set(report["zero_shot"][model]) >= {"facts", "reading", "corpus_loss"}
    for pair in ("sft_vs_base", "ppo_vs_sft", "ppo_ptx_vs_sft"):
        for mode in ("sampled", "greedy"):
            for name in ("win_rate", "win_rate_labelers"):
                assert set(report[name][pair][mode]) == {"mean", "low", "high", "ties",
                                                         "without_ties"}
            assert set(report["gain"][pair][mode]) == {"mean", "low", "high"}
    for name in ("accuracy_labelers", "accuracy_gold", "accuracy_length_baseline", "labelers_gold",
                 "labelers_agreement", "accuracy_decoys"):
        assert 0 <= report["reward_model"][name]["mean"] <= 1
    assert report["seed"] == 0 and report["config"]["ppo"]["iterations"] == 4
    assert set(report["versions"]) >= {"python", "torch", "transformers", "tokenizers", "numpy"}
    assert report["command"].startswith("rlhf-mini run --preset smoke")
    assert report["peak_memory_mb"] > 50
    assert all(math.isfinite(x) for x in numbers(report))


def numbers(value) -> list[float]:
    if isinstance(value, dict | list):
        inner = value.values() if isinstance(value, dict) else value
        return [x for v in inner for x in numbers(v)]
    return [value] if isinstance(value, float | int) else []


def test_numbers_of_the_report_follow_from_the_responses(finished):
    report = json.loads((finished / "report.json").read_text())
    rows = [json.loads(line) for line in
            (finished / "evaluation" / "responses.jsonl").read_text().splitlines()]
    gold = {m: [row["models"][m]["sampled"][0]["gold"] for row in rows] for m in report["models"]}
    for model, values in gold.items():
        assert report["eval"][model]["sampled"]["gold"]["mean"] == pytest.approx(
            sum(values) / len(values), abs=1e-12)
    gains = [a - b for a, b in zip(gold["ppo"], gold["sft"], strict=True)]
    assert report["gain"]["ppo_vs_sft"]["sampled"]["mean"] == pytest.approx(
        sum(gains) / len(gains), abs=1e-12)
    wins = sum((g > 0) + 0.5 * (g == 0) for g in gains) / len(gains)
    assert report["win_rate"]["ppo_vs_sft"]["sampled"]["mean"] == pytest.approx(wins, abs=1e-12)
    assert {row["customer"] for row in rows}.isdisjoint(
        {p["customer"] for p in map(json.loads, (finished / "town" / "prompts.jsonl").read_text()
                                    .splitlines()) if p["split"] != "test" and "customer" in p})


def test_a_stage_folder_is_a_transformers_directory(finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    for stage in ("base", "sft", "ppo", "ppo_ptx"):
        model = AutoModelForCausalLM.from_pretrained(finished / stage)
        tokenizer = AutoTokenizer.from_pretrained(finished / stage)
        assert model.config.vocab_size == len(tokenizer)
    for stage in TRAINED:
        assert (finished / stage / "metrics.jsonl").read_text().count("\n") >= 3
        assert (finished / stage / "samples.jsonl").read_text().count("\n") == 12
        assert not (finished / stage / "checkpoint").exists()
    assert (finished / "ppo" / "value_model" / "model.safetensors").exists()
    assert not list(finished.glob(".*"))


def test_rankings_are_split_by_customers_and_labelers(finished):
    labelers = json.loads((finished / "town" / "labelers.json").read_text())
    people = {x["id"]: x["group"] for x in labelers}
    for name, split, group in (("rankings", "train", "train"), ("rankings_valid", "valid", "train"),
                               ("rankings_test", "test", "test")):
        rankings = read_jsonl(finished / "rankings" / f"{name}.jsonl", Ranking)
        assert {r.split for r in rankings} == {split}
        assert {people[r.labeler] for r in rankings} == {group}
        assert all(r.gold is not None and any(r.decoys) for r in rankings)


def test_ppo_and_ppo_ptx_start_alike_and_differ(finished):
    first, second = ([json.loads(line) for line in
                      (finished / name / "metrics.jsonl").read_text().splitlines()]
                     for name in ("ppo", "ppo_ptx"))
    assert first[0]["score"] == second[0]["score"]
    assert "ptx_loss" not in first[0] and "ptx_loss" in second[0]
    assert ((finished / "ppo/model.safetensors").read_bytes()
            != (finished / "ppo_ptx/model.safetensors").read_bytes())


# ---- what runs again ---------------------------------------------------------------------------


def test_nothing_runs_twice(finished, copied, capsys):
    out = copied(*STAGES)
    before = {stage: (out / stage / "stage.json").read_bytes() for stage in STAGES}
    assert main(["run", "--preset", "smoke", "--out", str(out)]) == 0
    assert rerun(lines(capsys)) == []
    assert before == {stage: (out / stage / "stage.json").read_bytes() for stage in STAGES}
    theirs, ours = (json.loads((d / "report.json").read_text()) for d in (finished, out))
    assert theirs == ours


@pytest.mark.parametrize("setting, stages", [
    ("town.residents=13", STAGES),
    ("pretrain.lr=0.002", STAGES[1:]),
    ("sft.lr=0.001", STAGES[2:]),
    ("ranking.k_high=8", STAGES[3:]),
    ("reward.lr=0.002", STAGES[4:]),
    ("ppo.kl_coef=0.4", STAGES[5:]),
    ("ppo.ptx_coef=2", STAGES[6:]),
    ("evaluation.samples=2", STAGES[7:]),
    ("ppo.checkpoint_every=3", []),
])
def test_a_changed_setting_changes_the_stages_downstream(setting, stages, tmp_path):
    """The plan alone: which stages have other settings than before."""
    def marks(run: Run) -> dict[str, dict]:
        plan = plan_stages(run)
        return {stage.name: settings_of(stage, plan) for stage in plan}
    before, after = marks(smoke(tmp_path)), marks(smoke(tmp_path, setting))
    assert [name for name in STAGES if before[name] != after[name]] == stages


def test_the_seed_changes_all_but_the_town(tmp_path):
    plans = [plan_stages(smoke(tmp_path, seed=seed)) for seed in (0, 1)]
    changed = [a.name for a, b in zip(*plans, strict=True)
               if settings_of(a, plans[0]) != settings_of(b, plans[1])]
    assert changed == STAGES[1:]


def test_a_changed_setting_runs_exactly_the_stages_downstream(finished, copied, capsys):
    out = copied(*STAGES)
    assert main(["run", "--preset", "smoke", "--out", str(out), "--set", "ppo.kl_coef=0.4"]) == 0
    assert rerun(lines(capsys)) == ["ppo", "ppo_ptx", "evaluation"]
    assert files_of(out / "reward") == files_of(finished / "reward")
    assert files_of(out / "ppo") != files_of(finished / "ppo")


def test_force_runs_one_stage_again_and_gives_the_same_bytes(finished, copied, capsys):
    out = copied("town", "base", "sft")
    assert main(["sft", "--preset", "smoke", "--out", str(out), "--force"]) == 0
    assert rerun(lines(capsys)) == ["sft"]
    assert files_of(out / "sft") == files_of(finished / "sft")


def test_a_single_stage_runs_what_it_needs_and_no_more(tmp_path):
    plan = plan_stages(smoke(tmp_path))
    assert [s.name for s in select_stages(plan, ["reward"])] == STAGES[:5]
    assert [s.name for s in select_stages(plan, ["ppo"])] == STAGES[:6]
    given = plan_stages(smoke(tmp_path, sources={"rankings": "mine.jsonl"}))
    assert [s.name for s in select_stages(given, ["rankings"])] == ["town", "rankings"]


def test_without_ptx_there_is_no_ppo_ptx(tmp_path):
    names = [s.name for s in plan_stages(smoke(tmp_path, "ppo.ptx_coef=0"))]
    assert names == [s for s in STAGES if s != "ppo_ptx"]


def test_a_finished_stage_stays_until_its_replacement_is_complete(finished, copied, monkeypatch):
    out = copied("town", "base", "sft")
    monkeypatch.setattr(training, "save_checkpoint", interrupt)
    assert main(["sft", "--preset", "smoke", "--out", str(out), "--set", "sft.lr=0.001"]) == 130
    assert files_of(out / "sft") == files_of(finished / "sft")
    assert (out / ".sft.work" / "stage.json").exists()


# ---- rounds ------------------------------------------------------------------------------------


def test_a_second_round_starts_from_the_first_policy(finished, copied, capsys):
    out = copied(*STAGES)
    assert main(["run", "--preset", "smoke", "--out", str(out), "--rounds", "2"]) == 0
    assert rerun(lines(capsys)) == ["rankings_2", "reward_2", "ppo_2", "evaluation"]
    report = json.loads((out / "report.json").read_text())
    assert report["models"] == ["base", "sft", "ppo", "ppo_ptx", "ppo_2"]
    assert {"ppo_2_vs_ppo", "ppo_2_vs_sft"} <= set(report["win_rate"])
    for older in (report["reward_model_2"], report["reward_model_2"]["round_before"]):
        assert 0 <= older["accuracy_labelers"]["mean"] <= 1
    # Iteration 0 measures the start policy against its reference: the first policy against itself.
    first = json.loads((out / "ppo_2" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["kl_per_sequence"] == 0
    assert in_round("ppo", 1) == "ppo" and in_round("ppo", 3) == "ppo_3"


# ---- stop and resume ---------------------------------------------------------------------------


def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt(*_, **__):
    signal.raise_signal(signal.SIGINT)


def stop_at_save(monkeypatch, stop, saves: int) -> None:
    """Let the process stop right after it saved its n-th checkpoint, and a few metrics later."""
    save, log, done = training.save_checkpoint, training.MetricLog.write, []

    def saving(*args):
        save(*args)
        done.append(1)

    def logging(self, step, **metrics):
        log(self, step, **metrics)
        if len(done) == saves:
            stop()

    monkeypatch.setattr(training, "save_checkpoint", saving)
    monkeypatch.setattr(training.MetricLog, "write", logging)


COMMAND = {"base": "pretrain", "sft": "sft", "reward": "reward", "ppo": "ppo"}


@pytest.mark.parametrize("stage", COMMAND)
def test_killed_and_resumed_is_bit_identical_to_unbroken(stage, finished, copied, monkeypatch):
    out = copied(*STAGES[:STAGES.index(stage)])
    command = [COMMAND[stage], "--preset", "smoke", "--out", str(out)]
    child = os.fork()
    if child == 0:
        stop_at_save(monkeypatch, kill, saves=1)
        main(command)
        os._exit(0)  # not reached
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert not (out / stage).exists()
    assert (out / f".{stage}.work" / "checkpoint" / "tensors.safetensors").exists()
    assert main([*command, "--resume"]) == 0
    assert files_of(out / stage) == files_of(finished / stage)
    assert json.loads((out / stage / "stage.json").read_text())["resumed"] is True
    assert not list(out.glob(".*"))


def test_ctrl_c_keeps_the_checkpoint_and_says_how_to_go_on(finished, copied, monkeypatch, capsys):
    out = copied("town", "base", "sft", "rankings", "reward")
    command = ["ppo", "--preset", "smoke", "--out", str(out), "--set", "ptx_coef=0"]
    with monkeypatch.context() as patch:
        stop_at_save(patch, interrupt, saves=2)
        assert main(command) == 130
    error = capsys.readouterr().err
    assert "the last checkpoint are kept" in error and len(error.strip().splitlines()) == 1
    assert f"rlhf-mini ppo --preset smoke --out {out} --set ptx_coef=0 --resume" in error
    assert main([*command, "--resume"]) == 0
    assert "going on where it stopped" in lines(capsys)["ppo"]
    assert files_of(out / "ppo") == files_of(finished / "ppo")


def stopped_sft(copied, monkeypatch) -> tuple[Path, list[str]]:
    out = copied("town", "base")
    command = ["sft", "--preset", "smoke", "--out", str(out)]
    with monkeypatch.context() as patch:
        stop_at_save(patch, interrupt, saves=1)
        assert main(command) == 130
    return out, command


def test_without_resume_a_stopped_stage_starts_again(finished, copied, monkeypatch, capsys):
    out, command = stopped_sft(copied, monkeypatch)
    assert main(command) == 0
    assert ("was stopped before it was complete; starting again, as --resume was not given"
            in lines(capsys)["sft"])
    assert files_of(out / "sft") == files_of(finished / "sft")


def test_resume_refuses_other_settings_and_names_them(copied, monkeypatch, capsys):
    out, command = stopped_sft(copied, monkeypatch)
    assert main([*command, "--resume", "--set", "sft.lr=0.001", "--set", "sft.epochs=3"]) == 2
    error = capsys.readouterr().err
    assert "sft in" in error and "was begun with other settings" in error
    assert "sft.lr was 0.0005, is 0.001" in error and "sft.epochs was 2, is 3" in error
    assert "leave --resume out" in error
    assert main([*command, "--resume", "--set", "pretrain.lr=0.001"]) == 2
    assert "pretrain.lr was 0.003, is 0.001" in capsys.readouterr().err
    assert (out / ".sft.work" / "checkpoint").exists()  # nothing lost


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_damaged_checkpoint_is_named(damage, copied, monkeypatch, capsys):
    out, command = stopped_sft(copied, monkeypatch)
    file = out / ".sft.work" / "checkpoint" / "tensors.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-9] if damage == "cut" else data[:-9] + b"!" + data[-8:])
    assert main([*command, "--resume"]) == 2
    error = capsys.readouterr().err
    assert ".sft.work/checkpoint is damaged" in error and "its checksum differs" in error
    assert "delete it to start the stage again" in error


def test_a_non_finite_loss_stops_the_run_and_keeps_the_checkpoint(copied, monkeypatch, capsys):
    from rlhf_mini import sft
    out, loss, calls = copied("town", "base"), sft.sft_loss, []

    def broken(logprobs, mask):
        calls.append(1)
        value, stats = loss(logprobs, mask)
        return (value * math.nan, stats) if torch.is_grad_enabled() and len(calls) > 4 else (
            value, stats)

    monkeypatch.setattr(sft, "sft_loss", broken)
    assert main(["sft", "--preset", "smoke", "--out", str(out)]) == 2
    assert "SFT batch: loss is nan" in capsys.readouterr().err
    assert (out / ".sft.work" / "checkpoint").exists() and not (out / "sft").exists()


def test_a_policy_that_its_last_step_spoiled_is_no_finished_stage(copied, capsys):
    out = copied("town", "base", "sft", "rankings", "reward")
    command = ["ppo", "--preset", "smoke", "--out", str(out), "--set", "iterations=1", "--set",
               "minibatches=1", "--set", "ptx_coef=0"]
    assert main([*command, "--set", "ppo.lr=1e30"]) == 2
    assert "the policy's logits are not finite" in capsys.readouterr().err
    assert not (out / "ppo").exists() and (out / "sft" / "model.safetensors").exists()
    assert main(command) == 0  # with a sound rate it starts again


# ---- what is in the folder ---------------------------------------------------------------------


@pytest.mark.parametrize(("harm", "words"), [
    (lambda file: file.write_bytes(file.read_bytes()[:-9]),
     r"model\.safetensors has \d+ bytes and not \d+"),
    (lambda file: file.unlink(), r"model\.safetensors is missing"),
    (lambda file: file.with_name("stage.json").write_text('{"finished": tr'),
     r"stage\.json:1: not valid JSON"),
    (lambda file: file.with_name("stage.json").write_text("[]"), "stage.json lacks what a stage"),
])
def test_a_damaged_stage_is_named_before_anything_runs(harm, words, finished, copied, capsys):
    out = copied("town", "base", "sft", "rankings")
    harm(out / "sft" / "model.safetensors")
    command = ["reward", "--preset", "smoke", "--out", str(out)]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert re.search(rf"{out}/sft is damaged: .*{words}", error)
    assert "delete this folder to run the stage again" in error
    assert sorted(p.name for p in out.iterdir()) == ["base", "rankings", "sft", "town"]
    shutil.rmtree(out / "sft")  # as told
    assert main(command) == 0
    for stage in ("sft", "reward"):
        assert files_of(out / stage) == files_of(finished / stage)


def test_a_report_needs_no_weights(finished, copied, capsys):
    out = copied(*STAGES)
    (out / "base" / "model.safetensors").unlink()  # to save space
    assert main(["report", "--out", str(out)]) == 0
    (out / "ppo" / "stage.json").unlink()
    capsys.readouterr()
    assert main(["report", "--out", str(out)]) == 2
    assert (f"{out}: no finished ppo there; `rlhf-mini run --out {out}` makes one"
            in capsys.readouterr().err)


def test_a_stopped_stage_with_a_damaged_record_is_named(copied, monkeypatch, capsys):
    out, command = stopped_sft(copied, monkeypatch)
    (out / ".sft.work" / "stage.json").write_text("{}")
    capsys.readouterr()
    assert main([*command, "--resume"]) == 2
    assert f"{out}/.sft.work is damaged" in capsys.readouterr().err
    assert main(command) == 0


def test_a_folder_of_the_user_is_not_replaced_by_a_stage(copied, capsys):
    out = copied("town")
    (out / "sft").mkdir()
    (out / "sft" / "thesis.txt").write_text("precious")
    assert main(["sft", "--preset", "smoke", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert f"{out}/sft: holds other files, which would be lost (it has no stage.json)" in error
    assert (out / "sft" / "thesis.txt").read_text() == "precious"
    assert not (out / "base").exists()  # said before anything ran


def test_two_processes_do_not_share_a_folder(copied, capsys):
    out = copied("town")
    command = ["town", "--preset", "smoke", "--out", str(out)]
    with lock_directory(out):
        assert main(command) == 2
    assert f"{out}: another process is at work in this folder" in capsys.readouterr().err
    assert main(command) == 0


# ---- limits and stored state -------------------------------------------------------------------


def test_limits_beyond_the_context_are_an_error_before_training(copied, capsys):
    out = copied("town")
    assert main(["pretrain", "--preset", "smoke", "--out", str(out), "--set",
                 "reward.max_response_tokens=100"]) == 2
    error = capsys.readouterr().err
    assert "reward: max_prompt_tokens and max_response_tokens add up to" in error
    assert "the model's context is 128 tokens" in error


def test_limits_that_are_raised_later_are_an_error_too(copied, capsys):
    out = copied("town", "base")  # the base model is finished and not made again
    assert main(["sft", "--preset", "smoke", "--out", str(out), "--set",
                 "sft.max_response_tokens=65"]) == 2
    assert ("sft: max_prompt_tokens and max_response_tokens add up to 129, but the model's context "
            "is 128 tokens" in capsys.readouterr().err)


def test_prompts_too_long_to_be_answered_are_not_ranked(copied, capsys):
    out = copied("town", "base", "sft")
    command = ["rank", "--preset", "smoke", "--out", str(out), "--set"]
    assert main([*command, "ranking.max_response_tokens=64"]) == 0  # 64 tokens are left for each
    said = capsys.readouterr().out
    assert re.search(r"rankings: \d+ of 180 prompts have more than 64 prompt tokens", said)
    assert main([*command, "ranking.max_response_tokens=12"]) == 0
    assert "left out" not in capsys.readouterr().out


def test_stage_json_records_how_the_stage_was_made(finished):
    state = json.loads((finished / "ppo" / "stage.json").read_text())
    assert state["finished"] is True and state["resumed"] is False
    assert state["device"] == "cpu" and state["threads"] == torch.get_num_threads()
    assert state["settings"]["ppo.lr"] == state["config"]["ppo"]["lr"]
    assert state["seconds"] > 0 and len(state["fingerprint"]) == 64


def test_a_report_of_another_version_says_so(finished, copied):
    out = copied(*STAGES)
    path = out / "evaluation" / "stage.json"
    state = json.loads(path.read_text())
    state["config"]["ppo"]["a_field_of_old"] = 1
    path.write_text(json.dumps(state))
    with pytest.raises(ValueError, match="made by another version of rlhf-mini"):
        pipeline.build_report(out)


def test_one_run_object_twice(tmp_path, capsys):
    """The functions that the book calls: a `Run` and `run_stages`."""
    run = smoke(tmp_path / "run")
    run_stages(run, ["town"])
    run_stages(run, ["town"])
    assert rerun(lines(capsys)) == ["town"]
    assert len(run.town.prompts) == 260
