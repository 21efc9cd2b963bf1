"""Figures: what they show of the numbers they are given, with and without optional parts."""

from __future__ import annotations

import sys

import matplotlib
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.text import Text
from run_folders import make_metrics, make_report

from rlhf_mini import plots
from rlhf_mini.config import EvaluationConfig
from rlhf_mini.report import gold_by_family

KINDS = {"plain": {}, "no gold": {"gold": False}, "no ptx": {"ptx": False},
         "two rounds": {"rounds": 2}}
FAMILIES = {f: {m: {"mean": 0.5, "low": 0.4, "high": 0.6} for m in ("base", "sft", "ppo")}
            for f in ("closed", "list")}


@pytest.fixture(params=KINDS, scope="module")
def report(request) -> dict:
    return make_report(**KINDS[request.param])


def figures_of(report: dict) -> dict:
    metrics = make_metrics(report)
    figures = {"headline": plots.plot_headline(report), "tax": plots.plot_tax(report),
               "reward": plots.plot_reward_model(report["reward_model"]),
               "ppo": plots.plot_ppo({m: metrics[m] for m in report["models"][2:]}),
               "training": plots.plot_training(metrics), "families": plots.plot_families(FAMILIES)}
    if "gold" in report["eval"]["base"]["sampled"]:
        figures["qualities"] = plots.plot_qualities(report)
    if report["rounds"] == 2:
        figures["reward 2"] = plots.plot_reward_model(report["reward_model_2"])
    return figures


def points(axes) -> list[float]:
    """The x of all single dots."""
    return [line.get_xdata()[0] for line in axes.lines if len(line.get_xdata()) == 1]


def titles(figure) -> list[str]:
    return [axes.get_title(loc="left") for axes in figure.axes if axes.get_visible()]


def test_every_figure_can_be_drawn_and_its_words_stay_apart(report):
    for name, figure in figures_of(report).items():
        renderer = FigureCanvasAgg(figure).get_renderer()
        figure.draw_without_rendering()
        axes = [a for a in figure.axes if a.get_visible()]
        ticks = [t for a in axes for t in (*a.get_xticklabels(), *a.get_yticklabels())]
        texts = [t for t in figure.findobj(Text) if t.get_text() and t.get_visible()
                 and (t.axes is None or t.axes in axes) and t not in ticks]
        for text in texts:
            box = text.get_window_extent(renderer)
            assert box.x0 > -1 and box.x1 < figure.bbox.width + 1, (name, text.get_text())
            assert box.y0 > -1 and box.y1 < figure.bbox.height + 1, (name, text.get_text())
        headings = [t for t in texts if t.axes is None or t in (
            t.axes.title, t.axes._left_title, t.axes.xaxis.label, t.axes.yaxis.label)]
        boxes = [heading.get_window_extent(renderer) for heading in headings]
        for i, box in enumerate(boxes):
            assert not any(map(box.overlaps, boxes[i + 1:])), (name, headings[i].get_text())


def test_headline_shows_gold_of_all_models_and_wins():
    report = make_report()
    left, right = plots.plot_headline(report).axes
    assert points(left) == [report["eval"][m][mode]["gold"]["mean"] for m in report["models"]
                            for mode in ("sampled", "greedy")]
    assert [t.get_text() for t in left.get_yticklabels()] == ["base", "SFT", "PPO", "PPO-ptx"]
    bars = [bar.get_width() for bar in right.patches]
    won = report["win_rate"]["ppo_vs_sft"]["sampled"]["mean"] - 0.125 / 2
    assert won in bars and bars.count(0.125) == 6  # three models against SFT, twice


def test_headline_without_gold_shows_the_reward_model_and_says_so():
    report = make_report(gold=False)
    (axes,) = plots.plot_headline(report).axes
    assert points(axes)[0] == report["eval"]["base"]["sampled"]["rm_score"]["mean"]
    assert titles(plots.plot_headline(report))[0].startswith("RM score")


def test_win_rate_of_base_is_that_of_sft_turned_round():
    report = make_report()
    rate = report["win_rate"]["sft_vs_base"]["sampled"]
    base = plots.wins_over_sft(report, "base", "sampled")
    assert base["mean"] == 1 - rate["mean"] and base["ties"] == rate["ties"]
    assert base["low"] == 1 - rate["high"] and base["high"] == 1 - rate["low"]
    assert base["low"] < base["mean"] < base["high"]
    assert base["without_ties"] == 1 - rate["without_ties"]
    assert plots.wins_over_sft(report, "sft", "sampled") is None
    assert plots.wins_over_sft(report, "ppo", "greedy") == report["win_rate"]["ppo_vs_sft"][
        "greedy"]


def test_dashboard_has_a_panel_per_metric_and_a_line_per_model():
    metrics = {"ppo": make_metrics(make_report())["ppo"],
               "ppo_ptx": make_metrics(make_report())["ppo_ptx"][:3]}
    figure = plots.plot_ppo(metrics)
    assert len(titles(figure)) == 12
    score, _, over_kl = figure.axes[:3]
    ppo, ptx = score.lines
    assert list(ppo.get_xdata()) == [1, 2, 3, 4, 5] and list(ptx.get_xdata()) == [1, 2, 3]
    assert list(ppo.get_ydata()) == [row["score"] for row in metrics["ppo"]]
    assert list(over_kl.lines[0].get_xdata()) == [row["kl_per_sequence"] for row in metrics["ppo"]]


def test_dashboard_without_gold_leaves_its_panels_out():
    report = make_report(gold=False)
    assert not any("gold" in t.lower() for t in titles(plots.plot_ppo(
        {"ppo": make_metrics(report)["ppo"]})))


@pytest.mark.parametrize("value, bottom", [(0.5, -1), (-9.0, None)])
def test_first_explained_variances_do_not_hide_the_others(value, bottom):
    rows = [{"step": i, "explained_variance": v} for i, v in enumerate([-40.0, value])]
    low = plots.plot_ppo({"ppo": rows}).axes[0].get_ylim()[0]
    assert low == bottom if bottom else low < -40


def test_training_shows_what_is_there():
    metrics = make_metrics(make_report())
    assert len(titles(plots.plot_training(metrics))) == 4
    given = {k: v for k, v in metrics.items() if k != "base"}  # --model has no curve
    assert titles(plots.plot_training(given))[0].startswith("SFT loss")
    sft = plots.plot_training(given).axes[0]
    assert sft.lines[-1].get_xdata()[0] == 5 and sft.lines[-1].get_ydata()[0] == 1.75


def test_long_curves_are_averaged():
    rows = [{"step": i, "loss": float(i % 2)} for i in range(120)]
    thin, thick = plots.plot_training({"base": rows}).axes[0].lines
    assert len(thin.get_xdata()) == 120 and set(thick.get_ydata()) == {0.5}


def test_reward_model_of_the_round_before_is_hollow():
    report = make_report(rounds=2)
    axes = plots.plot_reward_model(report["reward_model_2"]).axes[0]
    hollow = [line.get_xdata()[0] for line in axes.lines if line.get_markerfacecolor() == "none"
              and line.get_marker() != "None"]
    before = report["reward_model"]
    assert hollow == [before[n]["mean"] for n in ("accuracy_labelers", "accuracy_gold",
                                                  "accuracy_decoys")]


def test_gold_by_family_averages_prompts_not_responses():
    rows = [{"family": "list", "models": {"ppo": {"sampled": [{"gold": a}, {"gold": b}]}}}
            for a, b in ((0.0, 1.0), (1.0, 1.0))]
    config = EvaluationConfig(bootstrap=50)
    assert gold_by_family(rows, config)["list"]["ppo"]["mean"] == 0.75
    assert gold_by_family([rows[0] | {"family": None}], config) == {}
    assert gold_by_family([{"family": "list", "models": {"ppo": {"sampled": [{}]}}}], config) == {}


def contrast(a: str, b: str) -> float:
    """The contrast ratio of WCAG 2."""
    def luminance(color: str) -> float:
        parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_ink_and_colours_can_be_seen_on_white_and_on_black():
    for page in ("#ffffff", "#0d1117"):
        assert contrast(plots.INK, page) > 4
        for model in ("base", "sft", "ppo", "ppo_ptx"):
            assert contrast(plots.look_of(model)[0], page) > 3
    assert len({to_hex(plots.look_of(m)[0]) for m in ("base", "sft", "ppo", "ppo_ptx", "ppo_2",
                                                      "ppo_3")}) == 6


def test_no_global_state_is_touched(report):
    before = dict(matplotlib.rcParams)
    figures_of(report)
    assert dict(matplotlib.rcParams) == before
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()
