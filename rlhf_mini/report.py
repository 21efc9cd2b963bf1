"""The report of a run as one HTML file: figures, tables and samples, nothing loaded from elsewhere.

Every number stands in `report.json`; only the figure by kind of prompt and the samples are made
from `evaluation/responses.jsonl`, the curves from the stages' `metrics.jsonl`. Responses are
untrusted text: all of it is escaped. The same run gives the same bytes.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

import jinja2
import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from rlhf_mini import plots
from rlhf_mini.config import EvaluationConfig
from rlhf_mini.evaluation import mean_interval
from rlhf_mini.plots import name_model
from rlhf_mini.runtime import METRICS, atomic_write, make_rng, read_json, read_metrics

SAMPLES = 24  # prompts whose responses are shown
FIGURES = ("headline", "qualities", "families", "ppo", "training", "tax", "reward_model")
MEASURES = {"gold": 3, "helpful": 3, "truthful": 3, "harmless": 3, "rm_score": 2, "kl": 2,
            "eos_rate": 3, "response_tokens": 1}  # and how many digits they are shown with
REQUIRED = {"models": list, "eval": dict, "zero_shot": dict, "reward_model": dict, "seconds": dict,
            "versions": dict, "config": dict, "seed": int, "rounds": int, "command": str,
            "device": str, "threads": int, "peak_memory_mb": float, "sources": dict,
            "resumed": list}


def write_report(directory: Path) -> None:
    """Write `report.html` and `figures/*.png` from `report.json` and the folders of the stages.

    Args:
        directory: of a finished run.

    Raises:
        ValueError: naming the file, if `report.json` or a file of a stage is missing or damaged;
            OutputError if the folder cannot be written.
    """
    directory = Path(directory)
    report = read_report(directory / "report.json")
    responses = read_responses(directory / "evaluation" / "responses.jsonl")
    curves = {name: read_metrics(directory / name / "metrics.jsonl")
              for name in ["base", "sft", "reward", *_policies_of_ppo(report)]
              if (directory / name / "metrics.jsonl").exists()}
    figures = {}
    for name, alt, figure in draw_figures(report, curves, responses):
        figures[name] = {"alt": alt, "svg": to_svg(figure, name, alt)}
        atomic_write(directory / "figures" / f"{name}.png", to_png(figure))
    for path in (directory / "figures").glob("*.png"):  # of an earlier run with other parts
        if path.stem.startswith(FIGURES) and path.stem not in figures:
            path.unlink()
    page = _template().render(
        report=report, figures=figures, models=report["models"],
        known=plots.headline_measure(report) == "gold", measures=_measures(report),
        pairs=_pairs(report), reward_models=_reward_models(report), tasks=plots.tasks_of(report),
        stages=_stages(report), samples=choose_samples(responses, report["seed"]), glossary=METRICS,
        accuracies=plots.ACCURACIES, task_names=plots.TASKS, digits=MEASURES,
        prompts=len(responses))
    atomic_write(directory / "report.html", page)


def read_report(path: Path) -> dict:
    """Read a `report.json` and check that it holds what a report needs.

    Raises:
        ValueError: naming the file, what is wrong, and what to run.
    """
    again = f"`rlhf-mini report --out {path.parent}` writes it from a finished run"
    if not path.exists():
        raise ValueError(f"{path}: no such file; {again}, `rlhf-mini run` makes one")
    try:
        report = read_json(path)
    except ValueError as error:
        raise ValueError(f"{error}; {again}") from error
    for key, kind in REQUIRED.items():
        value = report.get(key) if isinstance(report, dict) else None
        if not isinstance(value, (int, float) if kind is float else kind):
            raise ValueError(f"{path}: field {key!r}: expected {kind.__name__}; {again}")
    for model in report["models"]:
        for mode in ("sampled", "greedy"):
            for measure in MEASURES:
                value = report["eval"].get(model, {}).get(mode, {}).get(measure)
                if value is None and measure in ("gold", "helpful", "truthful", "harmless"):
                    continue
                if not isinstance(value, dict) or not {"mean", "low", "high"} <= set(value):
                    raise ValueError(f"{path}: field 'eval.{model}.{mode}.{measure}': expected "
                                     f"mean, low and high; {again}")
    return report


def read_responses(path: Path) -> list[dict]:
    """Read the responses of all policies; an absent file gives none.

    Raises:
        ValueError: naming file and line.
    """
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else [], 1):
        try:
            rows.append(json.loads(line))
            _ = rows[-1]["prompt"], rows[-1]["models"].values()
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path}:{number}: expected one JSON object with a prompt and the "
                             "models' responses; `rlhf-mini evaluate --force` makes it") from error
    return rows


# ---- figures -----------------------------------------------------------------------------------


def draw_figures(
    report: dict, curves: dict[str, list[dict]], responses: list[dict]
) -> Iterator[tuple[str, str, Figure]]:
    """Yield name, alt text and figure of all that the run has numbers for.

    Args:
        report: of the run.
        curves: rows of `metrics.jsonl` per stage.
        responses: rows of `responses.jsonl`.
    """
    yield "headline", describe_headline(report), plots.plot_headline(report)
    if plots.headline_measure(report) == "gold":
        yield "qualities", describe_qualities(report), plots.plot_qualities(report)
    if families := gold_by_family(responses, EvaluationConfig(**report["config"]["evaluation"])):
        yield "families", describe_families(families), plots.plot_families(families)
    for name, results in _reward_models(report).items():
        yield name, describe_reward_model(results), plots.plot_reward_model(results)
    if policies := {name: curves[name] for name in _policies_of_ppo(report) if curves.get(name)}:
        yield "ppo", describe_ppo(policies), plots.plot_ppo(policies)
    if stages := {name: curves[name] for name in ("base", "sft", "reward") if curves.get(name)}:
        yield "training", describe_training(stages), plots.plot_training(stages)
    if any(report["zero_shot"].values()):
        yield "tax", describe_tax(report), plots.plot_tax(report)


def gold_by_family(
    responses: list[dict], config: EvaluationConfig
) -> dict[str, dict[str, dict[str, float]]]:
    """Return the mean gold score of sampled responses per kind of prompt and model.

    Args:
        responses: rows of `responses.jsonl`; without family or gold the result is empty.
        config: for the intervals.
    """
    values: dict[str, dict[str, list[list[float]]]] = {}
    for row in responses:
        for model, modes in row["models"].items():
            if row.get("family") and all("gold" in answer for answer in modes["sampled"]):
                values.setdefault(row["family"], {}).setdefault(model, []).append(
                    [answer["gold"] for answer in modes["sampled"]])
    return {family: {model: mean_interval(np.array(gold), config)
                     for model, gold in values[family].items()} for family in sorted(values)}


def to_svg(figure: Figure, name: str, alt: str) -> Markup:
    """Return a figure as an inline SVG that takes the page's text colour.

    Args:
        figure: with `plots.INK` as the colour of text and axes.
        name: makes the ids in it differ from those of other figures.
        alt: what a screen reader says.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None,
                                                       "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg"):].replace(plots.INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    opening = Markup('<svg role="img" aria-label="{}" ').format(alt)
    return opening + Markup(svg.removeprefix("<svg "))


def to_png(figure: Figure) -> bytes:
    """Return a figure as a PNG of 150 dots per inch without a background."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()


# ---- alt texts: one sentence, from the numbers -------------------------------------------------


def _list(parts: list[str]) -> str:
    return " and ".join([", ".join(parts[:-1])] * (len(parts) > 1) + parts[-1:])


def describe_headline(report: dict) -> str:
    """Return the alt text of `plots.plot_headline`."""
    measure = plots.headline_measure(report)
    scores = [f"{name_model(m)} " + ", ".join(
        f"{modes[mode][measure]['mean']:.2f} {mode}" for mode in ("sampled", "greedy"))
        for m in report["models"] for modes in [report["eval"][m]]]
    wins = [f"{name_model(m)} {rate['mean']:.2f}" for m in report["models"]
            if m != "sft" and (rate := plots.wins_over_sft(report, m, "sampled"))]
    text = f"{'Gold score' if measure == 'gold' else 'Reward model score'}: {'; '.join(scores)}"
    return text + ("; win rate over SFT, sampled, ties half: " + _list(wins) if wins else "") + "."


def describe_qualities(report: dict) -> str:
    """Return the alt text of `plots.plot_qualities`."""
    parts = [f"{name_model(m)} " + ", ".join(
        f"{q} {report['eval'][m]['sampled'][q]['mean']:.2f}"
        for q in ("helpful", "truthful", "harmless")) for m in report["models"]]
    return f"Grades of sampled responses: {'; '.join(parts)}."


def describe_families(families: dict[str, dict[str, dict]]) -> str:
    """Return the alt text of `plots.plot_families`."""
    parts = [f"{family} " + ", ".join(f"{name_model(m)} {v['mean']:.2f}" for m, v in values.items())
             for family, values in families.items()]
    return f"Gold score of sampled responses by kind of prompt: {'; '.join(parts)}."


def describe_reward_model(results: dict) -> str:
    """Return the alt text of `plots.plot_reward_model`."""
    parts = [f"{words} {results[name]['mean']:.2f}" for name, words in plots.ACCURACIES.items()
             if name in results]
    pairs = sum(row["pairs"] for row in results["calibration"])
    gap = sum(row["pairs"] * abs(row["predicted"] - row["observed"])
              for row in results["calibration"]) / max(pairs, 1)
    return (f"Share of held-out pairs in the right order: {_list(parts)}; over {pairs} pairs the "
            f"predicted probability is off by {gap:.2f} on average.")


def describe_ppo(policies: dict[str, list[dict]]) -> str:
    """Return the alt text of `plots.plot_ppo`."""
    def change(rows: list[dict], name: str, words: str) -> str:
        values = [row[name] for row in rows if name in row]
        return f"{words} from {values[0]:.2f} to {values[-1]:.2f}" if values else ""

    parts = []
    for model, rows in policies.items():
        changes = [change(rows, name, words) for name, words in
                   (("score", "RM score"), ("gold", "gold score"), ("kl_per_sequence", "KL"),
                    ("entropy", "entropy"), ("response_tokens", "length"))]
        parts.append(f"{name_model(model)} in {len(rows)} iterations: "
                     + _list([c for c in changes if c]))
    return f"PPO dashboard. {'; '.join(parts)}."


def describe_training(stages: dict[str, list[dict]]) -> str:
    """Return the alt text of `plots.plot_training`."""
    names = {"base": "pretraining", "sft": "SFT", "reward": "reward model"}
    parts = []
    for stage, rows in stages.items():
        losses = [row["loss"] for row in rows if "loss" in row]
        parts.append(f"{names[stage]} from {losses[0]:.2f} to {losses[-1]:.2f} nats in "
                     f"{len(losses)} steps")
    return f"Training loss: {_list(parts)}."


def describe_tax(report: dict) -> str:
    """Return the alt text of `plots.plot_tax`."""
    parts = [f"{task.replace('_', ' ')} " + ", ".join(
        f"{name_model(m)} {report['zero_shot'][m][task]['mean']:.2f}" for m in report["models"]
        if task in report["zero_shot"].get(m, {})) for task in plots.tasks_of(report)]
    return f"Zero-shot tasks: {'; '.join(parts)}."


# ---- parts of the page -------------------------------------------------------------------------


def _policies_of_ppo(report: dict) -> list[str]:
    return [m for m in report["models"] if m.startswith("ppo")]


def _reward_models(report: dict) -> dict[str, dict]:
    names = ["reward_model", *(f"reward_model_{n}" for n in range(2, report["rounds"] + 1))]
    return {name: report[name] for name in names if name in report}


def _measures(report: dict) -> list[str]:
    return [name for name in MEASURES if any(name in modes["sampled"]
                                             for modes in report["eval"].values())]


def _pairs(report: dict) -> list[tuple[str, str, str]]:
    """Return key, our and their model of every comparison."""
    return [(key, *key.split("_vs_")) for key in sorted(
        report.get("gain", {}), key=lambda key: report["models"].index(key.split("_vs_")[0]))]


def _stages(report: dict) -> list[str]:
    """Return the stages in the order in which they ran, `total` last."""
    order = ["town", "base", "sft", "rankings", "reward", "ppo", "ppo_ptx"]

    def place(name: str) -> tuple[int, int]:
        stem, _, number = name.rpartition("_")
        if name in ("evaluation", "total"):
            return 1_000, int(name == "total")
        in_later_round = number.isdigit()
        return (int(number) if in_later_round else 1,
                order.index(stem if in_later_round else name))

    return sorted(report["seconds"], key=place)


def choose_samples(responses: list[dict], seed: int) -> list[dict]:
    """Return up to `SAMPLES` rows chosen at random, never by quality."""
    rng = make_rng(seed, "report", "samples")
    return rng.sample(responses, min(SAMPLES, len(responses)))


def show_controls(text: str) -> str:
    """Make control characters visible, which HTML cannot hold.

    >>> show_controls("a\\x00b")
    'a␀b'
    """
    return "".join(chr(0x2400 + ord(c)) if ord(c) < 32 and c != "\n" else
                   "␡" if 127 <= ord(c) < 160 else c for c in text)


def format_interval(value: dict | None, digits: int = 3, sign: str = "") -> str:
    """Return mean and interval.

    >>> format_interval({"mean": 0.5, "low": 0.4, "high": 0.61}, 2)
    '0.50 [0.40, 0.61]'
    """
    if value is None:
        return "-"
    mean, low, high = (f"{value[key]:{sign}.{digits}f}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"interval": format_interval, "model": name_model,
                            "visible": show_controls}
    environment.globals |= {"wins_over_sft": plots.wins_over_sft, "look_of": plots.look_of}
    return environment.get_template("report.html.j2")
