"""Draw what the pieces of `gpu_suite.py` found; what is not there is left out and named.

    python benchmarks/gpu_figures.py data/recorded/gpu --out data/recorded/gpu/figures
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from measuring import SIZES, provenance
from rollout import WAYS
from throughput import STAGES

from rlhf_mini.report import to_png
from rlhf_mini.runtime import read_json, write_json


def draw_overoptimisation(folder: Path) -> Figure:
    """Draw gold score against KL and against the reward model's score, a line per kl_coef."""
    points = read_json(folder / "overoptimisation" / "sweeps.json")["runs"][0]["points"]
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for number, point in enumerate(sorted(points, key=lambda p: p["kl_coef"])):
        curve, end = point["curve"], point["sampled"]
        colour = f"C{number}"
        for axes, x, last in ((left, "kl_per_sequence", "kl"), (right, "score", "rm_score")):
            axes.plot(curve[x], curve["gold"], color=colour, lw=1, alpha=0.6)
            axes.plot(end[last]["mean"], end["gold"]["mean"], "o", color=colour,
                      label=f"{point['kl_coef']:g}")
    left.set(xlabel="KL to SFT, nats per response", ylabel="gold score")
    right.set(xlabel="reward model's score")
    left.legend(title="kl_coef", fontsize=8)
    figure.suptitle("Over-optimisation: lines are rollouts, dots the evaluation", fontsize=10)
    return figure


def draw_rollout(folder: Path) -> Figure:
    """Draw tokens per second by way of sampling, and against the batch if that was measured."""
    point = read_json(folder / "rollout" / "rollout.json")["points"][0]
    cost = folder / "rollout-cost" / "rollout.json"
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = [row for row in point["ways"] if "mean" in row][::-1]
    left.barh([WAYS[r["way"]].replace("`", "") for r in rows], [r["mean"] for r in rows],
              color="C0")
    left.tick_params(axis="y", labelsize=7)
    left.set(xlabel="tokens per second", title=f"{point['size']}, batch {point['batch']}")
    for point in read_json(cost)["points"] if cost.exists() else []:
        for row in point["ways"]:
            if "mean" in row:
                right.plot(point["batch"], row["mean"], "o" if row["way"] == "decode" else "x",
                           color=f"C{list(SIZES).index(point['size'])}")
                right.annotate(f"{point['size']}, {point['response']}",
                               (point["batch"], row["mean"]), fontsize=6)
    right.set(xlabel="batch", ylabel="tokens per second", xscale="log", yscale="log")
    right.set_title("o decode, x transformers; model, length of responses", fontsize=8)
    return figure


def draw_throughput(folder: Path) -> Figure:
    """Draw tokens per second of training by stage and mode."""
    rows = [r for r in read_json(folder / "throughput" / "throughput.json")["rows"]
            if "tokens_per_second" in r]
    modes = list(dict.fromkeys(r["mode"] for r in rows))
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    for number, mode in enumerate(modes):
        own = [r for r in rows if r["mode"] == mode]
        places = [list(STAGES).index(r["stage"]) + 0.8 * number / len(modes) for r in own]
        axes.bar(places, [r["tokens_per_second"] for r in own], 0.8 / len(modes), label=mode)
        for place, row in zip(places, own, strict=True):
            axes.annotate(f"{row['use']:.0%}", (place, row["tokens_per_second"]), ha="center",
                          fontsize=7)
    middle = 0.4 - 0.4 / len(modes)
    axes.set_xticks([i + middle for i in range(len(STAGES))], STAGES.values())
    axes.set(ylabel="tokens per second", title="Training; above each bar its use of the device")
    axes.legend(fontsize=8)
    return figure


FIGURES = {"overoptimisation": draw_overoptimisation, "rollout": draw_rollout,
           "throughput": draw_throughput}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="holds a folder per piece")
    parser.add_argument("--out", type=Path, required=True, help="folder of the figures")
    args = parser.parse_args()
    began, missing = time.monotonic(), []
    args.out.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        try:
            (args.out / f"{name}.png").write_bytes(to_png(draw(args.folder)))
        except ValueError as error:  # its piece has not been run
            missing.append(f"{name}.png")
            print(f"no {name}.png: {error}")
    write_json(args.out / "manifest.json", provenance(torch.device("cpu"), 0, began)
               | {"missing": missing})
    return int(len(missing) == len(FIGURES))


if __name__ == "__main__":
    sys.exit(main())
