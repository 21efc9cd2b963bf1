"""The command line: users' own data, chat, and a clear message for everything that goes wrong."""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

import rlhf_mini
from rlhf_mini import stages
from rlhf_mini.__main__ import build_parser, main
from rlhf_mini.config import load_preset, override
from rlhf_mini.data import Demonstration, Prompt, Ranking, read_jsonl, write_jsonl

SMOKE = ["--preset", "smoke"]
WORDS = ("bread", "river", "mill", "school", "market", "bridge", "garden", "station")


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A smoke run up to PPO; do not change it, copy it."""
    out = tmp_path_factory.mktemp("cli") / "trained"
    assert main(["ppo", *SMOKE, "--out", str(out)]) == 0
    return out


def fails(capsys, *arguments: str) -> str:
    """Run a command that must end with code 2 and one line on stderr; return the line."""
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "Traceback" not in error
    return error


def user_rankings(count: int = 40) -> list[Ranking]:
    """Rankings in which the longer of three responses is the better one."""
    return [Ranking(f"r{i}", f"Where is the {WORDS[i % 8]} of house {i}?",
                    ("No.", f"The {WORDS[i % 8]} is there.",
                     f"The {WORDS[i % 8]} is right behind the old mill."), (3, 2, 1))
            for i in range(count)]


def reward_of(out: Path) -> dict:
    return json.loads((out / "reward" / "reward.json").read_text())


# ---- users' own data ---------------------------------------------------------------------------


def test_own_rankings_train_the_reward_model(trained, tmp_path, capsys):
    write_jsonl(tmp_path / "mine.jsonl", user_rankings())
    out = tmp_path / "run"
    assert main(["reward", *SMOKE, "--out", str(out), "--model", str(trained / "base"),
                 "--rankings", str(tmp_path / "mine.jsonl"), "--set", "reward.epochs=12",
                 "--set", "reward.lr=0.005"]) == 0
    result = reward_of(out)
    assert result["accuracy_labelers"]["mean"] > 0.9  # learnable: the longer, the better
    assert result["accuracy_length_baseline"]["mean"] == 1
    assert not {"accuracy_gold", "labelers_gold", "labelers_agreement"} & set(result)
    kept = {split: read_jsonl(out / "rankings" / name, Ranking) for split, name in
            (("train", "rankings.jsonl"), ("valid", "rankings_valid.jsonl"),
             ("test", "rankings_test.jsonl"))}
    assert {split: len(r) for split, r in kept.items()} == {"train": 32, "valid": 4, "test": 4}
    assert {r.prompt for r in kept["train"]}.isdisjoint({r.prompt for r in kept["test"]})


def test_hh_rlhf_pairs_in_gz_train_the_reward_model(trained, tmp_path, capsys):
    rows = [{"chosen": f"\n\nHuman: Where is the {w} {i}?\n\nAssistant: It is behind the mill.",
             "rejected": f"\n\nHuman: Where is the {w} {i}?\n\nAssistant: Go away!"}
            for i in range(5) for w in WORDS]
    path = tmp_path / "pairs.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in rows).encode()))
    out = tmp_path / "run"
    assert main(["reward", *SMOKE, "--out", str(out), "--model", str(trained / "base"),
                 "--rankings", str(path), "--set", "reward.epochs=8"]) == 0
    assert reward_of(out)["accuracy_labelers"]["mean"] > 0.9
    assert {len(r.ranks) for r in read_jsonl(out / "rankings/rankings.jsonl", Ranking)} == {2}


def test_own_demonstrations_and_prompts_go_through_the_chain(trained, tmp_path, capsys):
    texts = [(f"Where is the {w} of house {i}?", f"The {w} is behind the mill.")
             for i in range(5) for w in WORDS]
    write_jsonl(tmp_path / "demonstrations.jsonl",
                [Demonstration(f"d{i}", p, r) for i, (p, r) in enumerate(texts)])
    write_jsonl(tmp_path / "prompts.jsonl", [Prompt(f"p{i}", p) for i, (p, _) in enumerate(texts)])
    out = tmp_path / "run"
    assert main(["run", *SMOKE, "--out", str(out), "--model", str(trained / "base"),
                 "--demonstrations", str(tmp_path / "demonstrations.jsonl"),
                 "--prompts", str(tmp_path / "prompts.jsonl")]) == 0
    said = capsys.readouterr().out
    assert "fine-tuning on 32 demonstrations" in said
    report = json.loads((out / "report.json").read_text())
    # Nobody knows the truth about these prompts: no gold, and no win rate judged by it.
    assert set(report["eval"]["ppo"]["sampled"]) == {"kl", "rm_score", "response_tokens",
                                                     "eos_rate"}
    assert "win_rate" not in report and "gain" not in report
    assert "gold" not in (out / "ppo" / "metrics.jsonl").read_text()
    asked = {json.loads(line)["prompt"]
             for line in (out / "evaluation/responses.jsonl").read_text().splitlines()}
    assert asked <= {p for p, _ in texts} and len(asked) == 4
    assert "gold" not in said.splitlines()[-4]


def test_model_takes_a_folder_of_save_pretrained(policy, tokenizer, tmp_path, capsys):
    folder = tmp_path / "mine"
    policy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    limits = [f"--set={name}={n}" for name, n in (
        ("sft.max_prompt_tokens", 48), ("sft.max_response_tokens", 16),
        ("reward.max_prompt_tokens", 48), ("reward.max_response_tokens", 16),
        ("ppo.max_prompt_tokens", 48))]
    out = tmp_path / "run"
    command = ["pretrain", *SMOKE, "--out", str(out), "--model", str(folder), *limits]
    assert main(command) == 0
    from transformers import AutoModelForCausalLM
    loaded = AutoModelForCausalLM.from_pretrained(out / "base")
    for name, value in policy.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    capsys.readouterr()
    assert main(command) == 0
    assert "base: unchanged" in capsys.readouterr().out
    # Other weights in the same folder are another model.
    with torch.no_grad():
        policy.transformer.wte.weight += 1
    policy.save_pretrained(folder)
    assert main(command) == 0
    assert "base: done" in capsys.readouterr().out


def test_a_model_with_too_small_a_context_is_named_at_once(policy, tokenizer, tmp_path, capsys):
    policy.save_pretrained(tmp_path / "mine")
    tokenizer.save_pretrained(tmp_path / "mine")
    error = fails(capsys, "sft", *SMOKE, "--out", tmp_path / "run", "--model", tmp_path / "mine")
    assert "sft: max_prompt_tokens and max_response_tokens add up to" in error
    assert "context is 64 tokens" in error


# ---- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments, words", [
    (["--set", "ppo.klcoef=0"], "--set ppo.klcoef: ppo has the fields"),
    (["--set", "nothing=0"], "--set nothing: no such field"),
    (["--set", "ppo.lr=fast"], "--set ppo.lr=fast: expected a value of type float"),
    (["--set", "ppo.lr=-1"], "PPOConfig.lr = -1.0: expected a number above 0"),
    (["--preset", "huge"], "preset 'huge': expected one of smoke, cpu, gpu, real-cpu"),
    (["--rounds", "0"], "--rounds 0: expected at least 1"),
    (["--device", "tpu"], "device 'tpu': expected 'auto', 'cpu' or 'cuda'"),
    (["--set", "ppo.lr=1e400"], "PPOConfig.lr = inf: expected a number above 0"),
    (["--rankings", "no/such.jsonl"], "--rankings no/such.jsonl: no such file or folder"),
    (["--prompts", "no/such.jsonl"], "--prompts no/such.jsonl: no such file or folder"),
    (["--demonstrations", "no/such.jsonl"],
     "--demonstrations no/such.jsonl: no such file or folder"),
])
def test_bad_options(arguments, words, tmp_path, capsys):
    assert words in fails(capsys, "run", *SMOKE, "--out", tmp_path / "run", *arguments)
    assert not list(tmp_path.glob("run/*"))  # before anything ran


@pytest.mark.parametrize("option", ["--out", "--model", "--demonstrations", "--rankings",
                                    "--prompts"])
def test_an_option_that_is_empty_is_an_error_and_not_left_out(option, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:  # --rankings "$FILE" with FILE unset
        main(["run", *SMOKE, "--out", str(tmp_path / "run"), option, ""])
    assert stop.value.code == 2
    assert f"argument {option}: it is empty; name a file or folder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_cuda_without_a_gpu(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    error = fails(capsys, "run", *SMOKE, "--out", tmp_path / "run", "--device", "cuda")
    assert "device 'cuda'" in error and "sees no GPU here" in error


def test_a_missing_model(tmp_path, capsys):
    error = fails(capsys, "sft", *SMOKE, "--out", tmp_path / "run", "--model", tmp_path / "none")
    assert f"{tmp_path / 'none'}: no model could be read there" in error


def test_a_reward_model_is_no_language_model(trained, tmp_path, capsys):
    error = fails(capsys, "sft", *SMOKE, "--out", tmp_path / "run", "--model", trained / "reward")
    assert "holds a GPT2ForTokenClassification, a reward or value model" in error


def test_a_bad_line_is_named_before_anything_runs(tmp_path, capsys):
    path = tmp_path / "mine.jsonl"
    write_jsonl(path, user_rankings(3))
    path.write_text(path.read_text() + '{"prompt": "Hello.", "responses": ["a", "b"]}\n')
    error = fails(capsys, "reward", *SMOKE, "--out", tmp_path / "run", "--rankings", path)
    assert "mine.jsonl:4: field 'ranks': missing" in error
    assert not list((tmp_path / "run").glob("*"))


def test_out_that_cannot_be_a_folder(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    error = fails(capsys, "town", *SMOKE, "--out", tmp_path / "file" / "run")
    assert f"cannot write to folder {tmp_path / 'file' / 'run'}" in error
    assert "choose another output folder" in error


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, "No space left on device", "model.safetensors"),
    SafetensorError("I/O error: No space left on device (os error 28)")])
def test_a_full_disk_loses_nothing(error, trained, tmp_path, capsys, monkeypatch):
    shutil.copytree(trained, tmp_path / "run")
    before = (tmp_path / "run/sft/model.safetensors").read_bytes()

    def full(*_):
        raise error

    monkeypatch.setattr(stages, "save_model", full)
    said = fails(capsys, "sft", *SMOKE, "--out", tmp_path / "run", "--force")
    assert f"cannot write to folder {tmp_path / 'run'}: " in said
    assert "No space left on device" in said and "free some space there" in said
    assert (tmp_path / "run/sft/model.safetensors").read_bytes() == before


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"), MemoryError(),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ...")])
def test_too_little_memory_is_told_with_a_way_out(error, trained, tmp_path, capsys, monkeypatch):
    def greedy_for_memory(*_, **__):
        raise error

    shutil.copytree(trained / "town", tmp_path / "run" / "town")
    monkeypatch.setattr(stages, "train_base_model", greedy_for_memory)
    said = fails(capsys, "pretrain", *SMOKE, "--out", tmp_path / "run")
    assert ("out of memory: stage base; halve what is in memory at a time with --set "
            "pretrain.batch_size=4 (is 8), or take a smaller model.") in said
    override(load_preset("smoke"), ["pretrain.batch_size=4"])  # what it advises is accepted


@pytest.mark.parametrize("episodes, minibatches, advice, accepted", [
    (8, 2, "hold less in memory at a time with --set ppo.minibatches=4 (is 2), and if that is not "
           "enough with --set ppo.episodes=4 (is 8)", ["ppo.minibatches=4", "ppo.episodes=4"]),
    (15, 3, "--set ppo.minibatches=15 (is 3). ", ["ppo.episodes=15", "ppo.minibatches=15"]),
    (6, 6, "take shorter responses (ppo.max_response_tokens) or a smaller model", [])])
def test_ppo_without_memory_is_told_what_to_change(trained, tmp_path, capsys, monkeypatch, episodes,
                                                   minibatches, advice, accepted):
    def greedy_for_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    shutil.copytree(trained, tmp_path / "run")
    monkeypatch.setattr(stages, "train_ppo", greedy_for_memory)
    said = fails(capsys, "ppo", *SMOKE, "--out", tmp_path / "run", "--force", "--set",
                 f"ppo.episodes={episodes}", "--set", f"ppo.minibatches={minibatches}")
    assert "out of memory: stage ppo; " in said and advice in said
    override(load_preset("smoke"), accepted)  # what it advises is a valid configuration


def test_other_errors_of_torch_are_not_hidden(tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(stages, "build_town", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["town", *SMOKE, "--out", str(tmp_path / "run")])


def test_a_report_needs_an_evaluation(trained, capsys):
    error = fails(capsys, "report", "--out", trained)
    assert "no finished evaluation there" in error and "rlhf-mini run" in error


def test_an_unknown_command_shows_the_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train"])
    assert stop.value.code == 2
    assert "invalid choice: 'train'" in capsys.readouterr().err


# ---- town, chat, help --------------------------------------------------------------------------


def test_town_files_are_written_and_checked(tmp_path, capsys):
    folder = tmp_path / "files"
    assert main(["town", *SMOKE, "--write", str(folder), "--check", str(folder)]) == 0
    assert "the town's files are sound" in capsys.readouterr().out
    assert not (folder / "stage.json").exists()
    lines = (folder / "prompts.jsonl").read_text().splitlines()
    (folder / "prompts.jsonl").write_text("\n".join([*lines[:2], lines[2][:-9]]) + "\n")
    error = fails(capsys, "town", "--check", folder)
    assert "prompts.jsonl:3" in error and "not valid JSON" in error


@pytest.mark.parametrize("place", ["folder", "file"])
def test_town_files_replace_nothing_else(place, tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    for name in ("folder/thesis.txt", "file"):
        (tmp_path / name).write_text("precious")
    error = fails(capsys, "town", *SMOKE, "--write", tmp_path / place)
    assert str(tmp_path / place) in error and "choose another output folder" in error
    for name in ("folder/thesis.txt", "file"):
        assert (tmp_path / name).read_text() == "precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize("command", [["report", "--out", "runs/none"], ["chat", "runs/none"],
                                     ["town", "--check", "runs/none"]])
def test_ctrl_c_promises_no_resume_where_there_is_none(command, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    for module, name in (("__main__", "_find_checkpoint"), ("pipeline", "report_run"),
                         ("town", "validate_town")):
        monkeypatch.setattr(f"rlhf_mini.{module}.{name}", stop)
    assert main(command) == 130
    assert capsys.readouterr().err.strip() == "stopped"


def chat(monkeypatch, capsys, lines: list[str], *arguments: str) -> list[str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
    capsys.readouterr()
    assert main(["chat", *map(str, arguments)]) == 0
    return capsys.readouterr().out.splitlines()


def test_chat_answers_with_several_models_side_by_side(trained, monkeypatch, capsys):
    said = chat(monkeypatch, capsys, ["Hello.", "Who is Ada?"], "--out", trained, "base", "ppo",
                "--max-response-tokens", 5)
    assert [line.partition(":")[0].strip() for line in said if not line.startswith("you>")
            and ":" in line][:2] == ["base", "ppo"]
    assert [line for line in said if line.startswith("you>")] == ["you> Hello.", "you> Who is Ada?"]


def test_chat_is_greedy_on_demand_and_takes_folders(trained, monkeypatch, capsys):
    runs = [chat(monkeypatch, capsys, ["Hello."], trained / "sft", "--greedy", "--seed", seed)
            for seed in (0, 1)]
    assert runs[0] == runs[1]


def test_chat_goes_on_after_a_prompt_that_is_too_long(trained, monkeypatch, capsys):
    said = chat(monkeypatch, capsys, ["long " * 300, "Hello."], "--out", trained, "sft")
    text = "\n".join(said)
    assert "do not fit into the model's context of 128 tokens" in text
    assert "you> Hello." in said and said.index("you> Hello.") < len(said) - 1


def test_chat_ends_at_an_empty_line(trained, monkeypatch, capsys):
    said = chat(monkeypatch, capsys, ["", "Hello."], "--out", trained, "sft")
    assert said == []


def test_chat_names_what_there_is(trained, capsys):
    assert "has base, ppo, ppo_ptx, reward, sft" in fails(capsys, "chat", "--out", trained, "best")
    assert "give a folder with config.json" in fails(capsys, "chat", "nowhere")


@pytest.mark.parametrize("temperature", ["-1", "nan"])
def test_chat_refuses_a_bad_temperature(temperature, trained, capsys):
    error = fails(capsys, "chat", "--out", trained, "sft", f"--temperature={temperature}")
    assert "--temperature" in error and "expected a number above 0" in error


def test_help_shows_commands_and_examples(capsys):
    text = build_parser().format_help()
    for command in ("run", "town", "pretrain", "sft", "rank", "reward", "ppo", "evaluate", "chat",
                    "report"):
        assert f"\n    {command} " in text
    assert "--resume" in text and "--set kl_coef=0.02" in text


def test_module_and_errors_in_a_process_of_its_own(tmp_path):
    """As users run it: exit codes, stderr, no traceback, no noise of the libraries."""
    root = Path(rlhf_mini.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-m", "rlhf_mini", "pretrain", "--preset", "smoke", "--out",
         str(tmp_path / "run")], cwd=root, capture_output=True, text=True, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and done.stderr == ""
    assert "[2/2] base: done in" in done.stdout
    assert all(line.startswith(("[", "pretrain  ")) for line in done.stdout.splitlines())
    done = subprocess.run([sys.executable, "-m", "rlhf_mini", "run", "--preset", "x"], cwd=root,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: preset 'x'")
