"""What the stages share: the user's own records, limits, and what is said of texts too long."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from rlhf_mini.config import load_preset, override
from rlhf_mini.data import DataError, Demonstration, Prompt, Ranking
from rlhf_mini.workspace import Run, check_limits

LONG = "bread " * 60  # more tokens than any limit below


def make_run(tmp_path: Path, **sources: str) -> Run:
    return Run(tmp_path, load_preset("smoke"), sources=sources, label="[5/8] reward")


def write_lines(path: Path, *rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# ---- the user's own records --------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["corpus", "demonstrations", "rankings", "prompts"])
def test_the_option_and_the_whole_path_are_named(tmp_path, kind):
    path = write_lines(tmp_path / "mine.jsonl", {"prompt": 3, "response": "a"})
    with pytest.raises(DataError) as error:
        make_run(tmp_path, **{kind: path}).user_records(kind)
    assert str(error.value).startswith(f"--{kind} {path}: mine.jsonl:1: field '")


def test_a_file_without_records_says_what_a_line_is(tmp_path):
    path = write_lines(tmp_path / "mine.jsonl")
    with pytest.raises(DataError) as error:
        make_run(tmp_path, rankings=path).user_records("rankings")
    text = str(error.value)
    assert text.startswith(f"--rankings {path}: holds no usable rankings; a line is {{")
    example = json.loads(text.partition("a line is ")[2])
    assert len(example["responses"]) == len(example["ranks"]) and example["prompt"]


def test_too_few_prompts_to_split_are_named_with_their_file(tmp_path):
    path = write_lines(tmp_path / "mine.jsonl", {"prompt": "a"})
    with pytest.raises(DataError) as error:
        make_run(tmp_path, prompts=path).user_records("prompts")
    assert str(error.value) == (f"--prompts {path}: 1 different prompts cannot be split into "
                                "train, valid, test; give at least 3")


# ---- texts that are too long -------------------------------------------------------------------


def test_texts_that_fit_are_kept_in_silence(tmp_path, tokenizer, capsys):
    prompts = [Prompt("p0", "Who?"), Prompt("p1", "Where?")]
    assert make_run(tmp_path).fit(prompts, tokenizer, 30, 2) == prompts
    assert make_run(tmp_path).fit([], tokenizer, 30, 2) == []
    assert capsys.readouterr().out == ""


def test_what_is_too_long_is_counted(tmp_path, tokenizer, capsys):
    records = [Demonstration("d0", "Who?", "Ada."), Demonstration("d1", "Who?", LONG),
               Demonstration("d2", LONG, "Ada.")]
    kept = make_run(tmp_path).fit(records, tokenizer, 30, 10)
    assert [d.id for d in kept] == ["d0", "d1"] and kept[0] == records[0]
    assert LONG.startswith(kept[1].response) and len(kept[1].response) < len(LONG)
    assert capsys.readouterr().out == (
        "[5/8] reward: 2 of 3 demonstrations have more than 30 prompt tokens or 10 response "
        "tokens: 1 shortened, 1 left out\n")


def test_responses_that_only_differ_behind_the_limit_are_told_apart(tmp_path, tokenizer, capsys):
    records = [Ranking("r0", "Who?", (LONG + "a", LONG + "b"), (1, 2)),
               Ranking("r1", LONG, ("a", "b"), (1, 2)), Ranking("r2", "Who?", ("a", "b"), (1, 2))]
    assert make_run(tmp_path).fit(records, tokenizer, 30, 10) == records[2:]
    assert "0 shortened, 2 left out, 1 of them equal once cut" in capsys.readouterr().out


@pytest.mark.parametrize(("records", "words"), [
    ([Demonstration("d0", LONG, "Ada.")], "1 of 1 demonstrations have more than 30 prompt tokens"),
    ([Prompt("p0", LONG), Prompt("p1", LONG)], "2 of 2 prompts have more than 30 prompt tokens"),
    ([Ranking("r0", "Who?", (LONG + "a", LONG + "b"), (1, 2))], "1 of them equal once cut"),
])
def test_if_none_is_left_the_stage_and_the_limits_are_named(tmp_path, tokenizer, records, words):
    with pytest.raises(DataError) as error:
        make_run(tmp_path).fit(records, tokenizer, 30, 10)
    text = str(error.value)
    assert text.startswith("[5/8] reward: ") and words in text
    assert text.endswith("none is left. Raise max_prompt_tokens or max_response_tokens of this "
                         "stage with --set, or shorten them")


# ---- limits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["sft", "ranking", "reward", "ppo", "evaluation"])
def test_limits_that_exceed_the_context_name_the_stage_and_a_value_that_fits(stage):
    config = override(load_preset("smoke"), [f"{stage}.max_response_tokens=65"])
    check_limits(config, 64 + 65)
    with pytest.raises(ValueError) as error:
        check_limits(config, 64 + 64)
    text = str(error.value)
    assert text.startswith(f"{stage}: max_prompt_tokens and max_response_tokens add up to 129, but "
                           "the model's context is 128 tokens; lower them, e.g. --set ")
    check_limits(override(config, [text.split()[-1]]), 64 + 64)  # what it proposes is right


def test_rows_of_pretraining_text_must_fit_too():
    config = override(load_preset("smoke"), ["pretrain.row_tokens=128"])
    small = replace(config, pretrain=replace(config.pretrain, row_tokens=64))
    check_limits(small, 128)
    short = [f"{s}.max_prompt_tokens=20" for s in ("sft", "reward", "ppo")] + [
        f"{s}.max_response_tokens=20" for s in ("sft", "ranking", "reward", "ppo", "evaluation")]
    config = override(config, short)
    with pytest.raises(ValueError, match="pretrain.row_tokens = 128: .* context is 100 tokens; "
                                         "--set pretrain.row_tokens=100, or ptx_coef=0"):
        check_limits(config, 100)
    check_limits(override(config, ["pretrain.row_tokens=100"]), 100)
    check_limits(override(config, ["ptx_coef=0"]), 100)
