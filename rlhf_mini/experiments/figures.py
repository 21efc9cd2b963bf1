"""Parts of the studies' figures: means over seeds with their intervals."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlhf_mini.experiments.study import find_rows, seed_interval
from rlhf_mini.plots import STYLE, WIDTH

PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9",
           "#777777"]  # Okabe and Ito, and grey
MARKERS = "oD^vPXs"


def new_sheet(height: float) -> Figure:
    """Return an empty figure of a phone's width."""
    matplotlib.rcParams.update(STYLE)
    return Figure(figsize=(WIDTH, height))


def new_panels(rows: int, columns: int, height: float, **kwargs) -> tuple[Figure, list[Axes]]:
    """Return a figure of a phone's width and its axes, row by row."""
    figure = new_sheet(height)
    return figure, list(figure.subplots(rows, columns, squeeze=False, **kwargs).flat)


def draw_line(axes: Axes, rows: Sequence[dict], conditions: Sequence[dict], x: str, y: str,
              label: str, number: int = 0) -> None:
    """Draw the mean over seeds of y against that of x, with y's interval and each seed's point.

    Args:
        axes: where.
        rows: of a study.
        conditions: points of the line, in order.
        x: column.
        y: column.
        label: for the legend.
        number: of the line, gives colour and marker.
    """
    colour, marker = PALETTE[number], MARKERS[number]
    found = [find_rows(rows, c) for c in conditions]
    found = [f for f in found if f]
    xs = [sum(r[x] for r in f) / len(f) for f in found]
    means = [seed_interval([r[y] for r in f]) for f in found]
    axes.plot(xs, [m["mean"] for m in means], color=colour, marker=marker, markersize=5,
              label=label)
    for at, mean, f in zip(xs, means, found, strict=True):
        axes.plot([at, at], [mean["low"], mean["high"]], color=colour, lw=1.2)
        axes.plot([r[x] for r in f], [r[y] for r in f], ".", color=colour, ms=3, alpha=0.5)


def draw_rows(axes: Axes, rows: Sequence[dict], conditions: dict[str, dict], measures: dict,
              ) -> None:
    """Draw each condition as a row with the mean over seeds and its interval.

    Args:
        axes: where.
        rows: of a study.
        conditions: name in the figure -> condition.
        measures: name in the legend -> column.
    """
    for number, (label, column) in enumerate(measures.items()):
        shift = 0.18 * (2 * number - len(measures) + 1) / max(len(measures) - 1, 1)
        for i, condition in enumerate(conditions.values()):
            found = find_rows(rows, condition)
            mean = seed_interval([r[column] for r in found])
            colour = PALETTE[number]
            axes.plot([mean["low"], mean["high"]], [i + shift] * 2, color=colour)
            axes.plot(mean["mean"], i + shift, MARKERS[number], color=colour, ms=5,
                      label=label if i == 0 else None)
            axes.plot([r[column] for r in found], [i + shift] * len(found), ".", color=colour,
                      ms=3, alpha=0.5)
    axes.set_yticks(range(len(conditions)), list(conditions))
    axes.set_ylim(len(conditions) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
