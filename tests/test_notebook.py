"""What the pages call: finished stages are found, others are left alone, all text is escaped."""

from __future__ import annotations

import builtins
import io
import shutil
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import pytest
from run_folders import ATTACK

from rlhf_mini import notebook
from rlhf_mini.experiments import STUDIES
from rlhf_mini.notebook import (
    MAP,
    glue,
    new_figure,
    open_run,
    open_study,
    pipeline_map,
    recorded,
    runs_folder,
    show_figure,
    show_samples,
    show_table,
)
from rlhf_mini.runtime import read_json

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A runs folder with smoke's stages up to SFT; do not change it, copy it."""
    home = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLHF_MINI_RUNS", str(home))
        open_run("sft", preset="smoke")
    return home


@pytest.fixture
def home(finished, tmp_path, monkeypatch) -> Path:
    """A runs folder of one's own."""
    shutil.copytree(finished, tmp_path / "runs")
    monkeypatch.setenv("RLHF_MINI_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes()
            for p in sorted(folder.rglob("*")) if p.is_file()}


# ---- finished stages ---------------------------------------------------------------------------


def test_what_is_finished_is_found(home, capsys, monkeypatch):
    before = bytes_of(home)
    monkeypatch.setattr(notebook, "run_stages", lambda *args: pytest.fail("trained again"))
    run = open_run("sft", preset="smoke")
    assert run.directory == home / "smoke" and bytes_of(home) == before
    assert capsys.readouterr().out == "runs/smoke: town, base, sft are complete\n"
    policy, tokenizer = run.policy("sft")
    assert policy.config.vocab_size == len(tokenizer)


def test_what_is_missing_is_made(home, capsys):
    shutil.rmtree(home / "smoke" / "sft")
    assert (open_run("sft", preset="smoke").directory / "sft" / "model.safetensors").exists()
    out = capsys.readouterr().out
    assert "base: unchanged" in out and "sft: done in" in out


def test_a_stopped_stage_goes_on_or_starts_again(home, capsys):
    state = read_json(home / "smoke" / "sft" / "stage.json")
    shutil.move(home / "smoke" / "sft", home / "smoke" / ".sft.work")
    open_run("sft", preset="smoke")
    assert "going on where it stopped" in capsys.readouterr().out
    assert read_json(home / "smoke" / "sft" / "stage.json")["fingerprint"] == state["fingerprint"]
    shutil.move(home / "smoke" / "sft", home / "smoke" / ".sft.work")
    mark = home / "smoke" / ".sft.work" / "stage.json"
    mark.write_text(mark.read_text().replace(state["fingerprint"], "another"))
    open_run("sft", preset="smoke")
    assert "starting again" in capsys.readouterr().out


def test_other_settings_disturb_nothing_and_share_what_they_can(home, capsys):
    before = bytes_of(home / "smoke")
    run = open_run("sft", preset="smoke", settings=["sft.lr=1e-3"])
    assert run.directory == home / "smoke-sft.lr=1e_3" and run.config.sft.lr == 1e-3
    assert bytes_of(home / "smoke") == before
    out = capsys.readouterr().out
    assert "base: unchanged" in out and "sft: done in" in out
    assert (run.directory / "base" / "model.safetensors").read_bytes() == before[
        "base/model.safetensors"]


def test_seed_and_rounds_have_folders_of_their_own(home):
    assert open_run("town", preset="smoke", seed=3).directory == home / "smoke-seed-3"
    assert open_run("town", preset="smoke", rounds=2).directory == home / "smoke-rounds=2"
    both = open_run("town", preset="smoke", seed=1, settings=["ppo.lr=0.1"], rounds=2)
    assert both.directory == home / "smoke-seed-1-ppo.lr=0.1-rounds=2"


def test_who_must_wait_is_told_how_long_and_shown_what_comes(home, capsys, monkeypatch):
    monkeypatch.setattr(notebook, "run_stages", lambda *args: None)
    open_run("sft")
    seconds = read_json(recorded("rounds", "report.json"))["seconds"]
    minutes = -(-(seconds["town"] + seconds["base"] + seconds["sft"]) // 60)
    assert f"on one CPU core, this took {minutes:.0f} min." in capsys.readouterr().out
    drawn = []
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: object()))
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(
        Image=lambda path, alt, **size: (path.name, len(alt) > 30), display=drawn.append))
    open_run("sft")
    assert drawn == [("headline.png", True)]


def test_unknown_stage_and_setting_are_named(home):
    with pytest.raises(ValueError, match="no stage 'rm'; expected some of town, base, sft"):
        open_run("rm", preset="smoke")
    with pytest.raises(ValueError, match="no_such_field"):
        open_run("sft", preset="smoke", settings=["no_such_field=1"])


def test_the_default_is_the_folder_of_make_run(monkeypatch, tmp_path):
    monkeypatch.delenv("RLHF_MINI_RUNS", raising=False)
    assert runs_folder() == ROOT / "runs"
    assert "--preset cpu --out runs/cpu" in (ROOT / "Makefile").read_text(encoding="utf-8")
    monkeypatch.setattr(notebook, "CHECKOUT", tmp_path)  # only the wheel is installed
    assert runs_folder() == Path.home() / ".cache" / "rlhf-mini"
    monkeypatch.setenv("RLHF_MINI_RUNS", "~/there")
    assert runs_folder() == Path.home() / "there"


def test_recorded_results_come_from_the_checkout_or_the_wheel(monkeypatch, tmp_path):
    assert recorded("seeds", "seeds.json") == ROOT / "data" / "recorded" / "seeds" / "seeds.json"
    with pytest.raises(ValueError, match="seeds/none.json: no such .*seeds/seeds.json"):
        recorded("seeds", "none.json")
    package = tmp_path / "site" / "rlhf_mini"
    (package / "recorded").mkdir(parents=True)
    (package / "recorded" / "x.json").write_text("{}")
    monkeypatch.setattr(notebook, "CHECKOUT", tmp_path / "site")
    monkeypatch.setattr(notebook, "__file__", str(package / "notebook.py"))
    assert recorded("x.json") == package / "recorded" / "x.json"


def test_a_recorded_study_is_opened_with_its_sizes(monkeypatch):
    glued = {}
    monkeypatch.setattr(notebook, "glue", glued.__setitem__)
    rows = open_study("noise")
    manifest = read_json(ROOT / "data" / "recorded" / "noise" / "manifest.json")
    assert len(rows) == glued["noise_runs"] == glued["noise_seeds"] * len(
        STUDIES["noise"].conditions)
    assert glued["noise_rankings"] == manifest["settings"]["ranking.prompts"]
    assert glued["noise_minutes"] == pytest.approx(manifest["seconds"] / 60, abs=0.5)


def test_glue_prints_where_the_tools_of_the_book_are_missing(monkeypatch, capsys):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "myst_nb":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    glue("gold", 0.123456)
    glue("count", 7)
    assert capsys.readouterr().out == "gold = 0.1235\ncount = 7\n"


def test_glue_keeps_where_they_are_there(monkeypatch, capsys):
    kept = {}

    class Fake:
        @staticmethod
        def glue(name, value, display):
            print("noise")
            kept[name] = (value, display)

    monkeypatch.setitem(sys.modules, "myst_nb", Fake)
    glue("gold", 0.5)
    assert kept == {"gold": (0.5, False)} and capsys.readouterr().out == ""


# ---- what a cell shows -------------------------------------------------------------------------


class Texts(HTMLParser):
    """The tags of a page, and the texts in them."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.texts.append(data)


def test_samples_are_escaped_and_have_a_plain_form():
    shown = show_samples([ATTACK, "b"], {"SFT": [ATTACK, "y"], "PPO": ["<b>", "z"]},
                         {"PPO": [0.25, 1.0]})
    page = Texts(shown._repr_html_())
    assert set(page.tags) == {"div", "table", "thead", "tbody", "tr", "th", "td"}
    assert page.texts == ["prompt", "SFT", "PPO (gold)", ATTACK, ATTACK, "<b> (0.25)", "b", "y",
                          "z (1.00)"]
    assert repr(shown).endswith("prompt: b\nSFT: y\nPPO (gold): z (1.00)")


def test_samples_of_another_number_are_refused():
    with pytest.raises(ValueError, match="1 values of 'SFT' for 2 prompts"):
        show_samples(["a", "b"], {"SFT": ["x"]})
    with pytest.raises(ValueError, match="3 values of 'PPO' for 2 prompts"):
        show_samples(["a", "b"], {"PPO": ["x", "y"]}, {"PPO": [1, 2, 3]})


def test_table_rounds_floats_and_puts_numbers_on_the_right():
    shown = show_table(["a", "b", "c"], [[1, 0.12345, "x"]])
    page = shown._repr_html_()
    assert page.count("text-align: right") == 2 and ">0.123<" in page
    assert repr(shown) == "a: 1\nb: 0.123\nc: x"
    assert repr(show_table(["a"], [[-0.0001]])) == "a: 0.000"


@pytest.mark.parametrize("current", [(), *[(name,) for name in MAP], ("base", "sft")])
def test_map_lights_its_boxes_and_says_so(current):
    shown = pipeline_map(*current)
    svg = ElementTree.fromstring(shown._repr_html_())
    assert svg.get("role") == "img" and svg.get("aria-label") == repr(shown)
    rows = [e for e in svg if e.tag.endswith("rect")]
    lit = [title for rect, title in zip(rows, MAP, strict=True) if rect.get("fill") != "none"]
    assert lit == [name for name in MAP if name in current]
    assert [MAP[name][0] in repr(shown).partition("about")[2] for name in current] == [
        True] * len(current)
    assert "about" in repr(shown) or not current
    assert svg.get("viewBox") and "width" not in svg.attrib  # as wide as the page lets it be


def test_map_refuses_what_is_no_box():
    with pytest.raises(ValueError, match="no box 'rm'; expected some of base, sft"):
        pipeline_map("rm")


def test_figures_are_transparent_and_legible_in_both_modes():
    with matplotlib.rc_context():
        figure, axes = new_figure(1, 2, height=2.0)
        axes[0].plot([1, 2])
        axes[0].set_title("t")
        png, size = show_figure(figure)._repr_png_()
        image = matplotlib.image.imread(io.BytesIO(png))
        assert image.shape[1] == 2 * size["width"] and image[0, 0, 3] == 0  # sharp, transparent
        assert axes[0].title.get_color() == "#777777"
        assert axes[0].lines[0].get_color() == "#0072B2"


def test_the_same_figure_gives_the_same_bytes():
    with matplotlib.rc_context():
        pictures = [show_figure(new_figure()[0]).png for _ in range(2)]
    assert pictures[0] == pictures[1]
