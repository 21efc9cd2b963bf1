"""report.html: self-contained, escaped, and every number as in report.json."""

from __future__ import annotations

import json
import re
import tomllib
from fnmatch import fnmatch
from html.parser import HTMLParser
from pathlib import Path

import pytest
from run_folders import ATTACK, make_report, make_responses, write_run

from rlhf_mini import report as module
from rlhf_mini.report import (
    choose_samples,
    draw_figures,
    format_interval,
    read_report,
    show_controls,
    write_report,
)


class Page(HTMLParser):
    """What stands in a page: tables by id, elements, text by article."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.elements: list[tuple[str, dict]] = []
        self.articles: list[str] = []
        self.text, self.table, self.cell, self.skip = "", None, False, None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.elements.append((tag, attrs))
        if tag == "table":
            self.table = self.tables.setdefault(attrs.get("id", ""), [])
        elif tag == "tr":
            self.table.append([])
        elif tag in ("th", "td"):
            self.table[-1].append("")
            self.cell = True
        elif tag == "article":
            self.articles.append("")
        elif tag in ("script", "style"):
            self.skip = tag

    def handle_endtag(self, tag):
        self.cell = self.cell and tag not in ("th", "td")
        self.skip = None if tag == self.skip else self.skip

    def handle_data(self, data):
        if self.skip:
            return
        self.text += data
        if self.cell:
            self.table[-1][-1] += data
        if self.articles:
            self.articles[-1] += data


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folder, report and page of a run with all parts."""
    report = make_report()
    folder = write_run(tmp_path_factory.mktemp("run"), report)
    write_report(folder)
    return folder, report, Page((folder / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """The same of a run on a user's prompts: no gold."""
    report = make_report(gold=False)
    folder = write_run(tmp_path_factory.mktemp("own"), report)
    write_report(folder)
    return folder, report, Page((folder / "report.html").read_text(encoding="utf-8"))


@pytest.fixture
def no_figures(monkeypatch):
    """Leave the figures out where a test is about something else."""
    monkeypatch.setattr(module, "draw_figures", lambda *_: iter(()))


# ---- numbers -----------------------------------------------------------------------------------


def cells(value: dict, digits: int = 3) -> str:
    return f"{value['mean']:.{digits}f} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"


def test_main_table_holds_the_numbers_of_the_report(run):
    _, report, page = run
    head, *rows = page.tables["table-results"]
    assert [row[0] for row in rows] == ["base", "SFT", "PPO", "PPO-ptx"]
    for model, row in zip(report["models"], rows, strict=True):
        assert len(row) == len(head)
        by_mode = report["eval"][model]
        assert row[1:3] == [cells(by_mode["sampled"]["gold"]), cells(by_mode["greedy"]["gold"])]
        assert row[6:] == [cells(by_mode["sampled"]["kl"], 2),
                           cells(by_mode["sampled"]["eos_rate"]),
                           cells(by_mode["sampled"]["response_tokens"], 1)]
    rate = report["win_rate"]["ppo_vs_sft"]["sampled"]
    assert rows[2][3:6] == [cells(rate), "0.125", "0.625"]
    assert rows[1][3:6] == ["-", "-", "-"]


def test_gains_wins_and_labelers_hold_the_numbers_of_the_report(run):
    _, report, page = run
    rows = page.tables["table-gain"][1:]
    assert [row[:2] for row in rows[:3]] == [["SFT over base", "sampled"],
                                             ["SFT over base", "greedy"],
                                             ["PPO over SFT", "sampled"]]
    assert len(rows) == 6
    gain = report["gain"]["ppo_vs_sft"]["sampled"]
    assert rows[2][2] == f"{gain['mean']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]"
    assert rows[2][3] == cells(report["win_rate"]["ppo_vs_sft"]["sampled"])
    assert rows[2][6] == cells(report["win_rate_labelers"]["ppo_vs_sft"]["sampled"])
    assert rows[2][8] == cells(report["rm_agreement"]["ppo_vs_sft"]["sampled"])


def test_other_tables_hold_the_numbers_of_the_report(run):
    _, report, page = run
    measures, digits = page.tables["table-measures"], module.MEASURES
    for row, (model, mode) in zip(measures[1:], [(m, mode) for m in report["models"] for mode in
                                                 ("sampled", "greedy")], strict=True):
        assert row[2:] == [cells(report["eval"][model][mode][name], digits[name])
                           for name in measures[0][2:]]
    assert page.tables["table-tax"][1] == ["base"] + [
        cells(report["zero_shot"]["base"][t]) for t in ("facts", "reading", "corpus_loss")]
    accuracies = {row[0]: row[1:] for row in page.tables["table-reward_model"][1:]}
    assert accuracies["RM, against gold"] == [cells(report["reward_model"]["accuracy_gold"]), "102"]
    assert len(accuracies) == 6
    assert page.tables["table-seconds"][1:] == [
        ["town", "0.1"], ["base", "5.5"], ["sft", "2.5"], ["rankings", "0.5"], ["reward", "1.5"],
        ["ppo", "9.9"], ["evaluation", "3.2"], ["total", "23.2"]]


def test_how_the_run_was_made_stands_in_the_page(run):
    _, _, page = run
    for words in ("rlhf-mini run --out 'a<b'", "seed 7", "321 MiB", "torch 2.13.0",
                  "stopped and resumed: ppo", "95 % bootstrap"):
        assert words in " ".join(page.text.split())
    assert ["iterations", "4"] in page.tables[""]
    glossary = {row[0] for row in page.tables["table-glossary"]}
    assert {"kl_per_sequence", "first_ratio_error"} <= glossary


@pytest.mark.parametrize("sign, text", [("", "-0.50 [-1.00, 0.26]"), ("+", "-0.50 [-1.00, +0.26]")])
def test_intervals_are_rounded_not_cut(sign, text):
    assert format_interval({"mean": -0.5, "low": -0.999, "high": 0.256}, 2, sign) == text
    assert format_interval(None) == "-"


# ---- figures and files -------------------------------------------------------------------------


def test_figures_have_alt_text_with_numbers_and_a_png(run):
    folder, report, page = run
    labels = {}
    for tag, attrs in page.elements:
        assert tag != "img"
        if tag == "svg":
            assert attrs["role"] == "img"
            labels[attrs["aria-label"].split(":")[0].split(".")[0]] = attrs["aria-label"]
    assert len(labels) == 7
    for label in labels.values():
        assert label.endswith(".") and re.search(r"\d\.\d\d", label)
    gold = report["eval"]["ppo"]["sampled"]["gold"]["mean"]
    assert f"PPO {gold:.2f} sampled" in labels["Gold score"]
    assert "RM score from 0.00 to 0.40" in labels["PPO dashboard"]
    assert "off by 0.10 on average" in labels["Share of held-out pairs in the right order"]
    assert {p.stem for p in (folder / "figures").iterdir()} == {
        "headline", "qualities", "families", "ppo", "training", "tax", "reward_model"}
    for path in (folder / "figures").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")


def test_nothing_is_loaded_from_elsewhere(run):
    folder, _, page = run
    for tag, attrs in page.elements:
        for name in ("src", "href", "xlink:href", "data", "poster", "srcset", "action"):
            assert attrs.get(name, "#").startswith(("#", "data:")), (tag, attrs)
        assert not any(name.startswith("on") for name in attrs)
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert "@import" not in text and "@font-face" not in text
    assert not re.search(r"url\((?!#)", text)


def test_ids_are_unique_and_links_have_targets(run):
    _, _, page = run
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    links = [attrs.get("href", attrs.get("xlink:href", "")) for _, attrs in page.elements]
    assert {link[1:] for link in links if link.startswith("#")} <= set(ids)


def test_two_calls_give_the_same_bytes(run):
    folder, _, _ = run
    before = {p.name: p.read_bytes() for p in [folder / "report.html",
                                               *(folder / "figures").iterdir()]}
    write_report(folder)
    assert before == {p.name: p.read_bytes() for p in [folder / "report.html",
                                                       *(folder / "figures").iterdir()]}


def test_figures_that_no_longer_belong_to_the_run_go_others_stay(tmp_path, no_figures):
    folder = write_run(tmp_path, make_report())
    (folder / "figures").mkdir()
    for name in ("families.png", "reward_model_2.png", "mine.png"):
        (folder / "figures" / name).write_bytes(b"old")
    write_report(folder)
    assert [p.name for p in (folder / "figures").iterdir()] == ["mine.png"]


# ---- samples -----------------------------------------------------------------------------------


def test_texts_are_escaped_and_readable(run):
    _, _, page = run
    assert [tag for tag, _ in page.elements].count("script") == 1
    assert "alert" not in str(page.elements)
    assert ATTACK.replace("\x01", "␁") in page.articles[0]


def test_samples_show_all_models_side_by_side(run):
    _, report, page = run
    assert len(page.articles) == 24
    chosen = choose_samples(make_responses(report), 7)
    for row, article in zip(chosen, page.articles, strict=True):
        number = row["id"][1:]
        assert f"Where is house {number}?" in article
        for model in report["models"]:
            for mode in ("sampled", "greedy"):
                assert f"{model} {mode} {number} <script>" in article
        assert article.count("[0.75]") == 8
        assert ("…" in article) == (int(number) % 2 == 0)  # cut at the length limit


def test_samples_are_drawn_by_seed_and_not_by_quality():
    rows = [{"id": i, "gold": i} for i in range(100)]
    ids = [row["id"] for row in choose_samples(rows, 0)]
    assert len(set(ids)) == 24 and ids != sorted(ids)
    assert ids == [row["id"] for row in choose_samples(rows, 0)]
    assert ids != [row["id"] for row in choose_samples(rows, 1)]
    worse = [row | {"gold": -row["gold"]} for row in rows]
    assert ids == [row["id"] for row in choose_samples(worse, 0)]
    assert len(choose_samples(rows[:3], 0)) == 3


def test_control_characters_are_shown():
    assert show_controls("a\x00\x1b\x7f\x85b\nc é") == "a␀␛␡␡b\nc é"


# ---- runs with other parts ---------------------------------------------------------------------


def test_without_gold_it_is_left_out_and_said(own):
    folder, report, page = own
    assert "Your own prompts, so no gold score." in page.text
    assert "own prompts: mine.jsonl" in page.text
    assert "table-gain" not in page.tables
    row = page.tables["table-results"][1]
    assert row[1] == cells(report["eval"]["base"]["sampled"]["rm_score"], 2)
    assert not {"gold", "helpful"} & set(page.tables["table-measures"][0])
    assert "so what they say about gold is absent" in " ".join(page.text.split())
    assert {p.stem for p in (folder / "figures").iterdir()} == {
        "headline", "ppo", "training", "tax", "reward_model"}
    assert page.articles[0].count("[0.50]") == 8  # the RM score


@pytest.mark.parametrize("kind", [{"ptx": False}, {"rounds": 2}], ids=["no ptx", "two rounds"])
def test_other_models_are_in_all_tables(tmp_path, no_figures, kind):
    report = make_report(**kind)
    write_report(write_run(tmp_path, report))
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    names = [row[0] for row in page.tables["table-results"][1:]]
    assert names == (["base", "SFT", "PPO"] if "ptx" in kind else
                     ["base", "SFT", "PPO", "PPO-ptx", "PPO 2"])
    if "rounds" in kind:
        assert "PPO 2 over PPO" in [row[0] for row in page.tables["table-gain"]]
        row = page.tables["table-reward_model_2"][1]
        assert row[1] == cells(report["reward_model_2"]["accuracy_labelers"])
        assert row[3] == cells(report["reward_model"]["accuracy_labelers"])
        order = [row[0] for row in page.tables["table-seconds"][1:]]
        assert order[6:] == ["rankings_2", "reward_2", "ppo_2", "evaluation", "total"]


def test_two_rounds_have_a_figure_per_reward_model():
    names = [name for name, _, _ in draw_figures(make_report(rounds=2), {}, [])]
    assert names == ["headline", "qualities", "reward_model", "reward_model_2", "tax"]


def test_absent_metrics_and_responses_are_said(tmp_path, no_figures):
    write_report(write_run(tmp_path, make_report(), metrics=False, responses=False))
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "No metrics of PPO are in this folder." in text
    assert "evaluation/responses.jsonl is not in this folder" in text


# ---- errors ------------------------------------------------------------------------------------


def test_missing_report_says_what_to_run(tmp_path):
    with pytest.raises(ValueError, match=r"report\.json: no such file; `rlhf-mini report --out"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("text, words", [
    ('{"models": [', r"report\.json:1: not valid JSON"),
    ("[1, 2]", r"report\.json: field 'models': expected list"),
    ("{}", r"report\.json: field 'models': expected list")])
def test_damaged_report_names_file_and_what_to_run(tmp_path, text, words):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(ValueError, match=words) as error:
        write_report(tmp_path)
    assert f"`rlhf-mini report --out {tmp_path}` writes it" in str(error.value)


@pytest.mark.parametrize("place, field", [
    (("eval", "ppo", "greedy", "kl"), r"'eval\.ppo\.greedy\.kl': expected mean, low and high"),
    (("eval", "base"), r"'eval\.base\.sampled\.rm_score'"), (("seconds",), "'seconds'")])
def test_report_with_a_hole_names_the_field(tmp_path, place, field):
    report = inner = make_report()
    for key in place[:-1]:
        inner = inner[key]
    del inner[place[-1]]
    (tmp_path / "report.json").write_text(json.dumps(report))
    with pytest.raises(ValueError, match=field):
        read_report(tmp_path / "report.json")


@pytest.mark.parametrize("line", ["{", "[]", '{"prompt": "a"}'])
def test_damaged_responses_name_the_line(tmp_path, line):
    folder = write_run(tmp_path, make_report())
    path = folder / "evaluation" / "responses.jsonl"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=r"responses\.jsonl:31: expected one JSON object"):
        write_report(folder)


def test_a_page_that_cannot_be_made_leaves_the_old_one(tmp_path, no_figures):
    folder = write_run(tmp_path, make_report())
    (folder / "report.html").write_text("old")
    (folder / "ppo" / "metrics.jsonl").write_text("nonsense\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl:1"):
        write_report(folder)
    assert (folder / "report.html").read_text() == "old"


def test_files_beside_the_code_are_declared_as_package_data():
    package = Path(module.__file__).parent
    project = tomllib.loads((package.parent / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["rlhf_mini"]
    files = [p.name for p in package.iterdir() if p.is_file() and p.suffix != ".py"]
    assert {"metrics.toml", "report.html.j2"} <= set(files)
    assert all(any(fnmatch(name, pattern) for pattern in patterns) for name in files)
