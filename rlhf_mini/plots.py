"""Figures of a run: each function takes plain numbers and returns a `matplotlib` figure.

Drawn for a phone's width, on no background, in the palette of Okabe and Ito and in a grey that can
be read on white and on black. A model has its colour and marker everywhere. pyplot is not used.
"""

from __future__ import annotations

import math

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK = "#777777"  # text and axes: 4.5 to 1 on white, 4.2 to 1 on nearly black
WIDTH = 4.8  # inches
STYLE = {"font.size": 9, "axes.titlesize": 9, "axes.titlelocation": "left", "axes.titlepad": 5,
         "axes.labelsize": 8.5, "xtick.labelsize": 8.5, "ytick.labelsize": 8.5,
         "axes.spines.top": False, "axes.spines.right": False, "lines.linewidth": 1.4,
         "axes.grid": True, "grid.alpha": 0.25, "grid.linewidth": 0.6, "svg.fonttype": "path",
         "font.family": "DejaVu Sans", "figure.constrained_layout.use": True}
STYLE |= dict.fromkeys(["axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "text.color",
                        "xtick.color", "ytick.color", "grid.color"], INK)
STYLE |= dict.fromkeys(["axes.facecolor", "figure.facecolor", "savefig.facecolor"], "none")
_LOOKS = {"base": ("#8c8c8c", "s"), "sft": ("#0072B2", "D"), "ppo": ("#D55E00", "o"),
          "ppo_ptx": ("#009E73", "^")}
_MORE = [("#CC79A7", "v"), ("#E69F00", "P"), ("#56B4E9", "X")]  # later rounds
DASHBOARD = [("score", "step", "RM score"), ("gold", "step", "Gold score"),  # (y, x, title)
    ("score", "kl_per_sequence", "RM score over KL"),
    ("gold", "kl_per_sequence", "Gold score over KL"),
    ("kl_per_sequence", "step", "KL to reference, nats"), ("entropy", "step", "Entropy, nats"),
    ("response_tokens", "step", "Response, tokens"), ("eos_rate", "step", "EOS rate"),
    ("clip_fraction", "step", "Clip fraction"), ("approx_kl", "step", "KL of one update, nats"),
    ("explained_variance", "step", "Explained variance"),
    ("value_loss", "step", "Value loss, score²")]
ACCURACIES = {  # rows of the reward model's figure and table
    "accuracy_labelers": "RM, against labelers", "accuracy_gold": "RM, against gold",
    "accuracy_length_baseline": "length alone", "labelers_gold": "a labeler, against gold",
    "labelers_agreement": "two labelers", "accuracy_decoys": "RM, against decoys"}
TASKS = {"facts": "Facts, closed book", "reading": "Reading comprehension",
         "summary": "Summarisation", "sentiment": "Sentiment",
         "corpus_loss": "Corpus loss, nats per token (lower is better)"}


def name_model(model: str) -> str:
    """Return what a model is called in figures and tables: "ppo_2" is PPO 2."""
    names = {"sft": "SFT", "ppo": "PPO", "ppo_ptx": "PPO-ptx"}
    return names.get(model, model.replace("ppo_", "PPO "))


def look_of(model: str) -> tuple[str, str]:
    """Return a model's colour and marker."""
    if model in _LOOKS:
        return _LOOKS[model]
    return _MORE[sum(map(ord, model)) % len(_MORE)]  # ppo_2 and ppo_3 follow each other


def wins_over_sft(report: dict, model: str, mode: str) -> dict[str, float] | None:
    """Return the win rate of a model over SFT; that of base is SFT's over base, turned round."""
    rates = report.get("win_rate", {})
    if f"{model}_vs_sft" in rates:
        return rates[f"{model}_vs_sft"][mode]
    if f"sft_vs_{model}" not in rates:
        return None
    other = rates[f"sft_vs_{model}"][mode]
    return {"mean": 1 - other["mean"], "low": 1 - other["high"], "high": 1 - other["low"],
            "ties": other["ties"], "without_ties": 1 - other["without_ties"]}


# ---- parts of figures --------------------------------------------------------------------------


def _figure(rows: int, columns: int, height: float, **kwargs) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH, height))
    axes = figure.subplots(rows, columns, squeeze=False, **kwargs)
    return figure, list(axes.flat)


def _panels(count: int, row_height: float, extra: float) -> tuple[Figure, list[Axes]]:
    """Return a figure with `count` panels in two columns."""
    rows = -(-count // 2)
    figure, axes = _figure(rows, 2, extra + row_height * rows)
    for panel in axes[count:]:
        panel.set_visible(False)
    return figure, axes[:count]


def _bare(axes: Axes) -> None:
    """Take the lines off an axis whose rows are named."""
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False, axis="y")


def _end_at_one(axes: Axes) -> None:
    """Take away the ticks that no share can reach."""
    axes.set_xlim(axes.get_xlim())
    axes.set_xticks([x for x in axes.get_xticks() if axes.get_xlim()[0] <= x <= 1.001])


def _rows_of_models(axes: Axes, models: list[str]) -> None:
    axes.set_yticks(range(len(models)), [name_model(m) for m in models])
    axes.set_ylim(len(models) - 0.5, -0.5)
    _bare(axes)


def _interval(axes: Axes, y: float, value: dict, look: tuple[str, str], hollow: bool = False,
              label: bool = True) -> None:
    """Draw mean and interval as a dot with a line, and write the mean."""
    color, marker = look
    axes.plot([value["low"], value["high"]], [y, y], color=color, solid_capstyle="butt")
    axes.plot(value["mean"], y, marker=marker, color=color, markersize=6, linestyle="none",
              markerfacecolor="none" if hollow else color, markeredgewidth=1.3)
    if label:
        _note(axes, f"{value['mean']:.2f}", (value["high"], y))


def _note(axes: Axes, text: str, point: tuple[float, float], shift=(5, 0), ha="left") -> None:
    axes.annotate(text, point, shift, textcoords="offset points", ha=ha, va="center", fontsize=8)


def _modes(axes: Axes, report: dict, measure: str) -> None:
    """Draw one measure of all models: sampled filled, greedy hollow below it."""
    for row, model in enumerate(report["models"]):
        for mode, shift in (("sampled", -0.17), ("greedy", 0.2)):
            _interval(axes, row + shift, report["eval"][model][mode][measure], look_of(model),
                      hollow=mode == "greedy")
    axes.margins(x=0.2)
    _bare(axes)


def _legend(figure: Figure, models: list[str]) -> None:
    """Name the models' lines above all panels."""
    handles = [matplotlib.lines.Line2D([], [], color=look_of(m)[0], marker=look_of(m)[1],
                                       markersize=5, label=name_model(m)) for m in models]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(models), frameon=False,
                  handlelength=1.8, columnspacing=1.2)


@matplotlib.rc_context(STYLE)
def plot_headline(report: dict) -> Figure:
    """Draw the gold score (RM score if unknown) and, beside it, wins and ties against SFT."""
    models, measure = report["models"], headline_measure(report)
    rates = {(m, mode): wins_over_sft(report, m, mode) for m in models
             for mode in ("sampled", "greedy")}
    wins = any(rates.values())
    figure, axes = _figure(1, 2 if wins else 1, 0.75 + 0.55 * len(models), sharey=True)
    _modes(axes[0], report, measure)
    axes[0].set_title(f"{'Gold score, 0 to 1' if measure == 'gold' else 'RM score'}\n"
                      "● sampled, ○ greedy")
    if wins:
        _draw_wins(axes[1], models, rates)
    _rows_of_models(axes[0], models)
    return figure


def headline_measure(report: dict) -> str:
    """Return "gold", or "rm_score" where the truth about the prompts is unknown."""
    known = all("gold" in modes["sampled"] for modes in report["eval"].values())
    return "gold" if known else "rm_score"


def _draw_wins(axes: Axes, models: list[str], rates: dict) -> None:
    for row, model in enumerate(models):
        color = look_of(model)[0]
        if model == "sft":
            _note(axes, "(reference)", (0.5, row))
        for mode, y in (("sampled", row - 0.19), ("greedy", row + 0.19)):
            if (rate := rates[model, mode]) is None:
                continue
            won = rate["mean"] - rate["ties"] / 2
            axes.barh(y, won, 0.3, color=color, alpha=1 if mode == "sampled" else 0.55)
            axes.barh(y, rate["ties"], 0.3, left=won, color=INK, alpha=0.3)
            axes.plot([rate["low"], rate["high"]], [y, y], color="black", linewidth=3.4)
            axes.plot([rate["low"], rate["high"]], [y, y], color="white", linewidth=1.6)
            _note(axes, f"{rate['mean']:.2f}", (1, y))
    axes.axvline(0.5, color=INK, linewidth=0.8, linestyle="--")
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    _bare(axes)
    axes.set_title("Win rate over SFT, ties half\nbar: won, grey: tied, pale: greedy")


@matplotlib.rc_context(STYLE)
def plot_qualities(report: dict) -> Figure:
    """Draw how helpful, truthful and harmless each model is (parts of gold, each 0 to 1)."""
    models = report["models"]
    figure, axes = _figure(1, 3, 0.75 + 0.55 * len(models), sharey=True)
    for panel, measure in zip(axes, ("helpful", "truthful", "harmless"), strict=True):
        _modes(panel, report, measure)
        panel.set_title(measure.capitalize())
        panel.set_xlim(-0.05, 1.3)
        panel.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    _rows_of_models(axes[0], models)
    figure.supxlabel("grade, 0 to 1; ● sampled, ○ greedy", fontsize=8.5)
    return figure


@matplotlib.rc_context(STYLE)
def plot_ppo(metrics: dict[str, list[dict]]) -> Figure:
    """Draw the PPO dashboard from the rows of each model's `metrics.jsonl`."""
    panels = [(y, x, title) for y, x, title in DASHBOARD
              if any(y in row for rows in metrics.values() for row in rows)]
    figure, axes = _panels(len(panels), 1.45, 0.5)
    for panel, (y, x, title) in zip(axes, panels, strict=True):
        for model, history in metrics.items():
            color, marker = look_of(model)
            points = [(row[x] + (x == "step"), row[y]) for row in history if y in row and x in row]
            if points:
                panel.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=3.5,
                           markevery=max(1, len(points) // 6))
        panel.set_title(title)
        panel.locator_params(nbins=5)
        if y == "explained_variance" and panel.dataLim.y1 > -1:
            panel.set_ylim(bottom=max(-1, panel.get_ylim()[0]))
        if x != "step":
            panel.set_xlabel("KL, nats")
        elif panel in axes[-2:]:
            panel.set_xlabel("PPO iteration")
    _legend(figure, list(metrics))
    return figure


@matplotlib.rc_context(STYLE)
def plot_training(metrics: dict[str, list[dict]]) -> Figure:
    """Draw the curves of pretraining, supervised fine-tuning and the reward model.

    Args:
        metrics: rows of `metrics.jsonl` of `base`, `sft`, `reward`; what is absent is left out.
    """
    wanted = [("base", "loss", "Pretraining loss, nats per token", None),
              ("sft", "loss", "SFT loss, nats per token", None),
              ("reward", "loss", "RM loss, nats per pair", math.log(2)),
              ("reward", "accuracy", "RM accuracy, share of pairs", 0.5)]
    panels = [p for p in wanted if any(p[1] in row for row in metrics.get(p[0], []))]
    figure, axes = _panels(len(panels), 1.75, 0.4)
    for panel, (stage, name, title, chance) in zip(axes, panels, strict=True):
        _draw_curve(panel, metrics[stage], name)
        if chance:
            panel.axhline(chance, color=INK, linewidth=0.8, linestyle="--")
            _note(panel, "chance", (panel.get_xlim()[1], chance), (0, 6), "right")
        panel.set_title(title)
        panel.set_xlabel("step")
        panel.locator_params(nbins=5)
    return figure


def _draw_curve(axes: Axes, rows: list[dict], name: str) -> None:
    """Draw steps thinly, means of 3 % of them at a time thickly, validation as dots."""
    steps, values = zip(*((r["step"] + 1, r[name]) for r in rows if name in r), strict=True)
    width = max(1, len(values) // 30)
    axes.plot(steps, values, color="#56B4E9", linewidth=0.8)
    if width > 1:
        means = [sum(values[i:i + width]) / width for i in range(0, len(values) - width + 1, width)]
        axes.plot(steps[width // 2::width][:len(means)], means, color=INK)
    valid = [(r["step"] + 1, r["valid_loss"]) for r in rows if "valid_loss" in r]
    if valid and name == "loss":
        axes.plot(*zip(*valid, strict=True), color="#D55E00", marker="o", markersize=4)
        _note(axes, "validation", valid[-1], (0, 9), "right")
        axes.margins(y=0.15)


@matplotlib.rc_context(STYLE)
def plot_reward_model(results: dict) -> Figure:
    """Draw what share of pairs the reward model gets right, beside baselines, and its calibration.

    Args:
        results: `reward_model` of a report; with `round_before` the older model is drawn hollow.
    """
    names = [name for name in ACCURACIES if name in results]
    older = results.get("round_before", {})
    top = 0.36 * len(names) + (0.3 if older else 0)
    figure = Figure(figsize=(WIDTH, 3.7 + top))
    axes, below = figure.subplots(2, 1, height_ratios=[0.4 + top, 2.6])
    for row, name in enumerate(names):
        own = name.startswith("accuracy") and "length" not in name
        look = ("#009E73", "o") if own else (INK, "s")
        _interval(axes, row, results[name], look)
        if own and name in older:
            _interval(axes, row + 0.28, older[name], look, hollow=True, label=False)
    axes.set_yticks(range(len(names)), [ACCURACIES[name] for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.axvline(0.5, color=INK, linewidth=0.8, linestyle="--")
    axes.set_xlim(right=axes.get_xlim()[1] + 0.05)
    _end_at_one(axes)
    axes.grid(visible=False, axis="y")
    axes.set_title("Pairs in the right order (dashed: chance)"
                   + ("\nhollow: the RM of the round before" if older else ""))
    _draw_calibration(below, results["calibration"])
    return figure


def _draw_calibration(axes: Axes, rows: list[dict]) -> None:
    most = max((row["pairs"] for row in rows), default=1)
    axes.plot([0.5, 1], [0.5, 1], color=INK, linewidth=0.8, linestyle="--")
    axes.plot([r["predicted"] for r in rows], [r["observed"] for r in rows], color="#009E73")
    for row in rows:
        axes.plot(row["predicted"], row["observed"], "o", color="#009E73",
                  markersize=3 + 6 * math.sqrt(row["pairs"] / most))
        _note(axes, str(row["pairs"]), (row["predicted"], row["observed"]), (4, -9))
    axes.set_xlabel("probability that the reward model gives to its favourite")
    axes.set_ylabel("how often labelers agree")
    axes.set_title("Calibration, with the number of pairs")
    axes.margins(y=0.15)


def tasks_of(report: dict) -> list[str]:
    """Return the names of the zero-shot tasks, those of `TASKS` first and in its order."""
    tasks = {task for results in report["zero_shot"].values() for task in results}
    return sorted(tasks, key=lambda task: ([*TASKS, task].index(task), task))


@matplotlib.rc_context(STYLE)
def plot_tax(report: dict) -> Figure:
    """Draw the zero-shot tasks and the corpus loss of all models: the alignment tax."""
    models = [m for m in report["models"] if m in report["zero_shot"]]
    tasks = tasks_of(report)
    figure, axes = _panels(len(tasks), 0.6 + 0.26 * len(models), 0)
    for index, (panel, task) in enumerate(zip(axes, tasks, strict=True)):
        for row, model in enumerate(models):
            if task in report["zero_shot"][model]:
                _interval(panel, row, report["zero_shot"][model][task], look_of(model))
        _rows_of_models(panel, models)
        if index % 2:
            panel.set_yticklabels([])
        panel.set_title(TASKS.get(task, task).replace(" (", "\n("))
        panel.margins(x=0.25)
        panel.locator_params(axis="x", nbins=4)
        if task != "corpus_loss":
            _end_at_one(panel)
    return figure


@matplotlib.rc_context(STYLE)
def plot_families(families: dict[str, dict[str, dict]]) -> Figure:
    """Draw the gold score of sampled responses by kind of prompt: an interval per model."""
    models = list(next(iter(families.values())))
    figure, (axes,) = _figure(1, 1, 0.9 + 0.17 * len(models) * len(families))
    for row, values in enumerate(families.values()):
        for j, model in enumerate(models):
            _interval(axes, row + 0.7 * ((j + 0.5) / len(models) - 0.5), values[model],
                      look_of(model), label=False)
        if row % 2:
            axes.axhspan(row - 0.5, row + 0.5, color=INK, alpha=0.1, linewidth=0)
    axes.set_yticks(range(len(families)), list(families))
    axes.set_ylim(len(families) - 0.5, -0.5)
    _bare(axes)
    axes.set_xlabel("gold score of sampled responses, 0 to 1")
    _legend(figure, models)
    return figure
