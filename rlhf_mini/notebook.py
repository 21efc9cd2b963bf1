"""What the pages of the book need beside the algorithms: finished stages, figures, tables.

Written for a notebook cell: what is to be seen is returned as the value of the cell's last line.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
from cycler import cycler
from matplotlib.figure import Figure
from transformers.utils import logging

from rlhf_mini.config import load_preset, override
from rlhf_mini.experiments import STUDIES, Lab, read_rows
from rlhf_mini.experiments.figures import PALETTE
from rlhf_mini.pipeline import (
    finished_stage,
    plan_stages,
    run_stages,
    select_stages,
    settings_of,
)
from rlhf_mini.plots import STYLE, WIDTH
from rlhf_mini.runtime import fingerprint, read_json, resolve_device
from rlhf_mini.workspace import Run

CHECKOUT = Path(__file__).resolve().parent.parent
# Boxes of the map: name, two lines of text, place in a grid of three columns and two rows.
MAP = {"base": ("Pretrain", "a base model", 0, 0), "sft": ("SFT", "on demonstrations", 1, 0),
       "rankings": ("Rankings", "of K responses", 2, 0),
       "reward": ("Reward model", "scores them", 2, 1), "ppo": ("PPO", "with a KL leash", 1, 1),
       "evaluation": ("Evaluation", "against gold", 0, 1)}
MAP_TEXT = ("pretrain a base model, fine-tune it on demonstrations (SFT), collect rankings of K "
            "responses, train a reward model (RM), optimise the policy with PPO, evaluate; from "
            "PPO a loop leads back to new rankings")


# ---- finished stages ---------------------------------------------------------------------------


def open_run(*stages: str, seed: int = 0, settings: Sequence[str] = (), rounds: int = 1,
             preset: str = "cpu") -> Run:
    """Return a run in which the named stages are complete; train what is missing.

    The run of seed 0 with no settings is that of `make run`. Any other has a folder of its own,
    into which the stages that it shares with `make run` are copied, so nothing is disturbed.

    Args:
        *stages: "town", "base", "sft", "rankings", "reward", "ppo", "ppo_ptx", "evaluation", and
            with more rounds "rankings_2" and so on; what they need comes with them.
        seed: of everything but the town.
        settings: such as "ppo.kl_coef=0".
        rounds: how often rankings, reward model and PPO are made.
        preset: "cpu", or "smoke" for a trial.

    Raises:
        ValueError: if a stage or a setting does not exist.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    config = override(load_preset(preset), list(settings))
    home = runs_folder() / (preset if seed == 0 else f"{preset}-seed-{seed}")
    extra = [*sorted(settings), *([f"rounds={rounds}"] if rounds > 1 else [])]
    folder = home.with_name("-".join([home.name, *map(_slug, extra)])) if extra else home
    run = Run(folder, config, seed, resolve_device("cpu"), rounds)
    plan = plan_stages(run)
    known = [stage.name for stage in plan]
    if unknown := [name for name in stages if name not in known]:
        raise ValueError(f"open_run: there is no stage {unknown[0]!r}; expected some of "
                         f"{', '.join(known)}")
    needed = select_stages(plan, list(stages))
    marks = {stage.name: fingerprint(stage.name, settings_of(stage, plan)) for stage in needed}
    missing = {name for name, mark in marks.items() if not _is_finished(folder / name, mark)}
    for name in sorted(missing) if folder != home else ():
        if _is_finished(home / name, marks[name]):
            shutil.rmtree(folder / name, ignore_errors=True)
            shutil.copytree(home / name, folder / name)
            missing.discard(name)
    shown = f"{folder.parent.name}/{folder.name}"
    if missing:
        if preset == "cpu":
            _say_what_comes(missing, shown)
        run_stages(run, list(stages), f"open_run{stages}", _can_go_on(run, missing, marks))
    print(f"{shown}: {', '.join(marks)} {'are' if len(marks) > 1 else 'is'} complete")
    return run


def open_lab(*settings: str, seed: int = 0) -> Lab:
    """Return a lab for the live version of a study: on the SFT model of `make run`.

    Args:
        *settings: that make the study small, such as "ranking.prompts=400".
        seed: of what is made in the lab.
    """
    run = open_run("sft")
    return Lab(run, seed, run.directory / "lab" / f"seed-{seed}").with_settings(*settings)


def _say_what_comes(missing: Iterable[str], shown: str) -> None:
    """Say how long the missing stages took when they were recorded, and show what came out."""
    seconds = read_json(recorded("rounds", "report.json"))["seconds"]
    minutes = math.ceil(sum(seconds.get(name, 0) for name in missing) / 60)
    print(f"{shown}: these models are not there yet, so they are trained now, once. When they were "
          f"recorded,\non one CPU core, this took {minutes} min. Below: how such models fare "
          "(recorded, seed 0).", flush=True)
    with contextlib.suppress(ImportError):
        from IPython import get_ipython
        from IPython.display import Image, display
        if get_ipython():
            display(Image(recorded("seeds", "headline.png"), width=600, alt="Gold scores of base, "
                          "SFT, PPO and PPO-ptx, sampled and greedy, and win rates over SFT"))


def _is_finished(folder: Path, mark: str) -> bool:
    return (finished_stage(folder) or {}).get("fingerprint") == mark


def _can_go_on(run: Run, missing: Iterable[str], marks: Mapping[str, str]) -> bool:
    """Whether all stopped stages were begun with these settings, so that they can go on."""
    states = [run.directory / f".{name}.work" / "stage.json" for name in missing]
    return all(read_json(path)["fingerprint"] == marks[read_json(path)["stage"]]
               for path in states if path.exists())


def _slug(text: str) -> str:
    return re.sub(r"[^\w.=]+", "_", text)


def runs_folder() -> Path:
    """Return where runs are: RLHF_MINI_RUNS, `runs` of the checkout, or ~/.cache/rlhf-mini."""
    if given := os.environ.get("RLHF_MINI_RUNS"):
        return Path(given).expanduser()
    if (CHECKOUT / "pyproject.toml").is_file():
        return CHECKOUT / "runs"
    return Path.home() / ".cache" / "rlhf-mini"


def recorded(*parts: str) -> Path:
    """Return the path of a recorded result, such as `recorded("seeds", "seeds.json")`.

    Raises:
        ValueError: if there is none.
    """
    folders = [CHECKOUT / "data" / "recorded", Path(__file__).parent / "recorded"]
    folder = next((f for f in folders if f.is_dir()), folders[0])
    if not (path := folder.joinpath(*parts)).exists():
        there = ", ".join(sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.*")))
        raise ValueError(f"{'/'.join(parts)}: no such recorded result; there are {there}")
    return path


def open_study(name: str) -> list[dict]:
    """Return the recorded rows of a study, and glue its sizes, `<name>_...`.

    Glued are `seeds`, `runs`, `rankings` (ranked prompts of a run), `iterations` (of PPO), and what
    the runs took: `minutes` on `jobs` processes.
    """
    rows = read_rows(recorded(name, "rows.jsonl"), STUDIES[name])
    manifest = read_json(recorded(name, "manifest.json"))
    seeds, settings = len({row["seed"] for row in rows}), manifest["settings"]
    for key, value in {
            "seeds": seeds, "runs": seeds * len(STUDIES[name].conditions),
            "rankings": settings["ranking.prompts"], "iterations": settings["ppo.iterations"],
            "minutes": round(manifest["seconds"] / 60), "jobs": manifest["jobs"]}.items():
        glue(f"{name}_{key}", value)
    return rows


def glue(name: str, value: Any) -> None:
    """Keep a value for the text of the book; where the book's tools are missing, print it.

    Args:
        name: how the text calls it; use the page's name as a prefix.
        value: what the text prints, usually a number.
    """
    value = value.item() if hasattr(value, "item") else value  # the text cannot format numpy's
    try:
        from myst_nb import glue as keep
    except ImportError:
        print(f"{name} = {value:.4g}" if isinstance(value, float) else f"{name} = {value}")
        return
    with contextlib.redirect_stdout(io.StringIO()):
        keep(name, value, display=False)


# ---- what a cell shows -------------------------------------------------------------------------


class Shown:
    """Something that a notebook draws, with a plain text for where it cannot."""

    def __init__(self, html: str, text: str):
        self.html, self.text = html, text

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return self.text


class Picture:
    """A figure as PNG, sharp on every screen; a notebook shows it `width` pixels wide."""

    def __init__(self, png: bytes, width: int):
        self.png, self.width = png, width

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        return self.png, {"width": self.width}

    def __repr__(self) -> str:
        return f"a figure, {self.width} pixels wide"


def new_figure(rows: int = 1, columns: int = 1, height: float = 2.4, **kwargs):
    """Return a figure and its axes in the style of the book, readable on white and on black.

    Args:
        rows: of axes.
        columns: of axes.
        height: inches; the width is a phone's.
        **kwargs: for `Figure.subplots`, such as `sharey=True`.
    """
    matplotlib.rcParams.update(STYLE | {"axes.prop_cycle": cycler(color=PALETTE)})
    figure = Figure(figsize=(WIDTH, height))
    return figure, figure.subplots(rows, columns, **kwargs)


def show_figure(figure: Figure) -> Picture:
    """Return a figure as a cell shows it; the caption and the alt text are the cell's."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=200, metadata={"Software": None})
    return Picture(file.getvalue(), round(figure.get_figwidth() * 100))


def show_samples(prompts: Sequence[str], responses: Mapping[str, Sequence[str]],
                 scores: Mapping[str, Sequence[float]] | None = None, unit: str = "gold") -> Shown:
    """Return a table of prompts and the responses of several models, side by side.

    Args:
        prompts: N texts.
        responses: by the model's name, N texts each.
        scores: by the model's name, N numbers, shown in brackets; may lack models.
        unit: what the numbers are, for the heading.

    Raises:
        ValueError: if a model has another number of responses than there are prompts.
    """
    scores = scores or {}
    for name, values in [*responses.items(), *scores.items()]:
        if len(values) != len(prompts):
            raise ValueError(f"show_samples: {len(values)} values of {name!r} for {len(prompts)} "
                             "prompts")
    head = ["prompt", *(f"{n} ({unit})" if n in scores else n for n in responses)]
    rows = [[prompt, *(values[i] + (f" ({scores[n][i]:.2f})" if n in scores else "")
                       for n, values in responses.items())] for i, prompt in enumerate(prompts)]
    return show_table(head, rows)


def show_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> Shown:
    """Return a table; every cell is text, escaped, and numbers stand on the right.

    Args:
        head: the columns' names.
        rows: cells; a float is shown with three decimals.
    """
    def cell(value: object) -> str:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        side = "right" if number else "left"
        return f'<td style="text-align: {side}">{escape(_plain(value), quote=False)}</td>'

    rows = [list(row) for row in rows]
    lines = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    names = "".join(f'<th scope="col" style="text-align: left">{escape(name, quote=False)}</th>'
                    for name in head)
    html = ('<div class="samples" style="overflow-x: auto" tabindex="0"><table class="table">'
            f"<thead><tr>{names}</tr></thead><tbody>{lines}</tbody></table></div>")
    text = "\n\n".join("\n".join(f"{name}: {_plain(value)}" for name, value
                                 in zip(head, row, strict=True)) for row in rows)
    return Shown(html, text)


def _plain(value: object) -> str:
    return f"{value:z.3f}" if isinstance(value, float) else str(value)  # z: no -0.000


# ---- the map of the recipe ---------------------------------------------------------------------


def pipeline_map(*current: str) -> Shown:
    """Return the map of the recipe with one or more boxes lit.

    Args:
        *current: "base", "sft", "rankings", "reward", "ppo" or "evaluation"; none lights none.

    Raises:
        ValueError: if there is no such box.
    """
    if unknown := [name for name in current if name not in MAP]:
        raise ValueError(f"pipeline_map: no box {unknown[0]!r}; expected some of {', '.join(MAP)}")
    lit = ", ".join(MAP[name][0] for name in current)
    text = f"Map of the recipe: {MAP_TEXT}." + (f" This page is about: {lit}." if lit else "")
    arrows = ["M118 35 H138", "M260 35 H280", "M341 62 V96", "M282 125 H262", "M140 125 H120"]
    lines = "".join(f'<path d="{d}" marker-end="url(#tip)"/>' for d in arrows)
    loop = '<path d="M232 98 L284 62" stroke-dasharray="4 3" marker-end="url(#tip)"/>'
    boxes = "".join(_box(name, name in current) for name in MAP)
    return Shown(
        f'<svg class="pipeline-map" role="img" aria-label="{escape(text)}" viewBox="0 0 402 160" '
        'style="width: 100%; max-width: 36rem; height: auto; display: block; margin: 1rem auto" '
        'xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" text-anchor="middle">'
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="#808080"/></marker></defs>'
        f'<g stroke="#808080" stroke-width="1.6" fill="none">{lines}{loop}</g>'
        '<text x="240" y="84" font-size="11" fill="currentColor" text-anchor="end">again</text>'
        f"{boxes}</svg>", text)


def _box(name: str, lit: bool) -> str:
    title, note, column, row = MAP[name]
    x, y = 2 + 141 * column, 10 + 90 * row
    look = ('fill="#0072B2" stroke="#0072B2"' if lit
            else 'fill="none" stroke="#808080" stroke-width="1.2"')
    color = "#ffffff" if lit else "currentColor"
    return (f'<rect x="{x}" y="{y}" width="116" height="50" rx="7" {look}/>'
            f'<g fill="{color}"><text x="{x + 58}" y="{y + 22}" font-size="13" '
            f'font-weight="bold">{title}</text>'
            f'<text x="{x + 58}" y="{y + 39}" font-size="11">{note}</text></g>')
