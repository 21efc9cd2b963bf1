"""Figures of what `benchmarks/real.py` records."""

from __future__ import annotations

from matplotlib.figure import Figure

from rlhf_mini.experiments.figures import MARKERS, PALETTE, draw_line, new_panels
from rlhf_mini.experiments.real import KS, SHARES

KINDS = {"all": "all pairs", "near": "equally long", "against": "shorter is better"}
FEWEST = 10  # pairs of a bin in the figure of calibration
READERS = {"reward model": "reward model", "system": "system's average", "length": "longer wins"}


def draw_agreement(results: dict) -> Figure:
    """Draw accuracy by kind of pairs, and how it grows with prompts and K.

    Args:
        results: of `benchmarks/real.py`.
    """
    figure, (left, right) = new_panels(1, 2, 2.7)
    for number, (name, label) in enumerate(READERS.items()):
        for i, kind in enumerate(KINDS):
            if found := results["agreement"][kind].get(name):
                at, colour = i + 0.2 * (number - 1), PALETTE[number]
                left.plot([at, at], [found["low"], found["high"]], color=colour)
                left.plot(at, found["mean"], MARKERS[number], color=colour, ms=5,
                          label=label if i == 0 else None)
    left.axhline(0.5, lw=0.8, color="#777777")
    left.set_xticks(range(len(KINDS)), [label.replace(" ", "\n", 1) for label in KINDS.values()])
    left.set(title="Right pairs", ylim=(0, 1))
    right.axhline(results["agreement"]["all"]["length"]["mean"], ls="--", lw=1, color=PALETTE[2])
    rows = results["learning"]
    for number, k in enumerate(KS, start=3):
        draw_line(right, rows, [{"k": k, "share": s} for s in SHARES], "prompts", "accuracy",
                  f"K = {k}", number)
    right.set(xscale="log", xlabel="ranked prompts", title="With more data")
    ticks = sorted({row["prompts"] for row in rows if row["k"] == KS[-1] and row["seed"] == 0})
    right.set_xticks(ticks, [f"{n:,}" for n in ticks])
    right.minorticks_off()
    for axes, columns in ((left, 1), (right, 3)):
        axes.legend(frameon=False, fontsize=7, loc="upper center", ncols=columns,
                    bbox_to_anchor=(0.5, -0.22))
    return figure


def draw_calibration(results: dict) -> Figure:
    """Draw the observed share of right pairs over the predicted one.

    Args:
        results: of `benchmarks/real.py`.
    """
    sets = {"AlpacaEval": results["calibration"]}
    if "pairs" in results:
        sets["HH-RLHF"] = results["pairs"]["calibration"]
    figure, panels = new_panels(1, len(sets), 2.4, sharey=True)
    for axes, (name, bins) in zip(panels, sets.items(), strict=True):
        bins = [b for b in bins if b["pairs"] >= FEWEST]
        axes.plot([0.5, 1], [0.5, 1], lw=0.8, color="#777777")
        axes.plot([b["predicted"] for b in bins], [b["observed"] for b in bins], "o-", ms=4,
                  color=PALETTE[0])
        axes.set(title=name, xlabel="predicted", xlim=(0.48, 1.02))
    panels[0].set(ylabel="right pairs")
    return figure


def draw_policies(results: dict) -> Figure:
    """Draw score and length over the KL from SFT, of PPO on its way and of best of n.

    Args:
        results: of `benchmarks/real.py`.
    """
    figure, panels = new_panels(1, 2, 2.5)
    columns = {"score": "Reward model's score", "tokens": "Tokens"}
    for axes, (column, title) in zip(panels, columns.items(), strict=True):
        for number, (name, label) in enumerate((("ppo", "PPO, iterations"),
                                                ("best_of_n", "best of n"))):
            rows = results[name]
            axes.plot([row["kl"] for row in rows], [row[column] for row in rows],
                      MARKERS[number] + "-", ms=4, color=PALETTE[number], label=label)
        axes.set(xlabel="KL in nats", title=title)
    panels[0].legend(frameon=False, fontsize=8)
    return figure
