"""Join the reports of several seeds: one row per quantity, mean with a 95 % interval over seeds.

    for seed in 0 1 2 3 4; do rlhf-mini run --seed $seed --out runs/seed-$seed; done
    python benchmarks/seeds.py runs/seed-*

Writes to data/recorded/seeds/: seeds.json (every value of every seed, with what made it), seeds.md
(the same as tables) and, from the first run, headline.png and samples.md (the first test prompt of
each family and the first response sampled at T = 1). Puts the README's part of it between the
README's "recorded" marks.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path

from record import RECORDED, ROOT, make_manifest

from rlhf_mini.experiments import seed_interval
from rlhf_mini.runtime import atomic_write, read_json, write_json

OUT = RECORDED / "seeds"
GOLD = [(f"{name}, gold {how}", f"eval.{name}.{how}.gold.mean")
        for how in ("sampled", "greedy") for name in ("base", "sft", "ppo", "ppo_ptx")]
EFFECT = [(f"{label}, {how}", f"{key}.{how}.{part}") for how in ("sampled", "greedy")
          for label, key, part in (
              ("gain of PPO over SFT in gold", "gain.ppo_vs_sft", "mean"),
              ("win rate of PPO over SFT, ties half", "win_rate.ppo_vs_sft", "mean"),
              ("ties", "win_rate.ppo_vs_sft", "ties"),
              ("win rate without ties", "win_rate.ppo_vs_sft", "without_ties"),
              ("win rate by held-out labelers", "win_rate_labelers.ppo_vs_sft", "mean"),
              ("KL of PPO to SFT (nats per response)", "eval.ppo", "kl.mean"),
              ("EOS rate of PPO", "eval.ppo", "eos_rate.mean"),
              ("response tokens of SFT", "eval.sft", "response_tokens.mean"),
              ("response tokens of PPO", "eval.ppo", "response_tokens.mean"))]
REWARD = [("RM accuracy against gold", "reward_model.accuracy_gold.mean"),
          ("RM accuracy against held-out labelers", "reward_model.accuracy_labelers.mean"),
          ("accuracy of length alone, against gold", "reward_model.accuracy_length_baseline.mean"),
          ("accuracy of one label, against gold", "reward_model.labelers_gold.mean"),
          ("agreement of two labelers", "reward_model.labelers_agreement.mean")]
TASKS = ("facts", "reading", "summary", "sentiment", "corpus_loss")
TAX = [(f"{task}, {name}", f"zero_shot.{name}.{task}.mean")
       for task in TASKS for name in ("base", "sft", "ppo", "ppo_ptx")]
TABLES = {"Gold score": GOLD, "PPO against SFT": EFFECT, "Reward model": REWARD,
          "Zero-shot tasks (accuracy; corpus loss in nats per token)": TAX}


def look_up(report: dict, path: str) -> float:
    """Return the number at a dotted path of a report."""
    value = report
    for key in path.split("."):
        value = value[key]
    return value


def write_table(title: str, rows: dict, seeds: list[int]) -> list[str]:
    """Return the lines of one Markdown table."""
    lines = [f"### {title}", "", "| | mean [95 % over seeds] | "
             + " | ".join(f"seed {seed}" for seed in seeds) + " |",
             "|---|---|" + "---|" * len(seeds)]
    for label, path in TABLES[title]:
        row = rows[path]
        digits = 0 if row["mean"] > 100 else 3
        mean, low, high = (f"{row[k]:.{digits}f}" for k in ("mean", "low", "high"))
        lines.append(f"| {label} | {mean} [{low}, {high}] | "
                     + " | ".join(f"{v:.{digits}f}" for v in row["seeds"]) + " |")
    return [*lines, ""]


def write_samples(folder: Path, models: tuple[str, ...] = ("base", "sft", "ppo")) -> list[str]:
    """Return a Markdown table: the first prompt of each family, one sample per model."""
    lines = ["| prompt | " + " | ".join(models) + " |", "|---|" + "---|" * len(models)]
    seen = set()
    for line in (folder / "evaluation" / "responses.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        if row["family"] not in seen:
            seen.add(row["family"])
            cells = [row["models"][m]["sampled"][0] for m in models]
            cells = [f"{c['response']} *({c['gold']:.2f})*" for c in cells]
            lines.append("| " + " | ".join(x.replace("|", "\\|").replace("\n", " ")
                                          for x in [row["prompt"], *cells]) + " |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
    folders = parser.parse_args().runs
    if len(folders) < 2:
        parser.error("an interval over seeds needs at least two runs")
    reports = [read_json(folder / "report.json") for folder in folders]
    if len({report["seed"] for report in reports}) < len(reports):
        parser.error("two of the runs have the same seed")
    if any(report["config"] != reports[0]["config"] for report in reports):
        parser.error("the runs have different configurations")
    seeds = [report["seed"] for report in reports]
    rows = {}
    for quantities in TABLES.values():
        for _, path in quantities:
            values = [look_up(report, path) for report in reports]
            rows[path] = {"seeds": values} | seed_interval(values)
    manifest = {"commands": __doc__.split("\n\n")[1].split("\n"), "seeds": seeds,
                "versions": reports[0]["versions"], "threads": reports[0]["threads"],
                "runs": [make_manifest(report) for report in reports]}
    tables = {title: write_table(title, rows, seeds) for title in TABLES}
    samples = write_samples(folders[0])
    write_json(OUT / "seeds.json", {"manifest": manifest, "quantities": rows})
    atomic_write(OUT / "seeds.md", "\n".join(line for t in tables.values() for line in t))
    atomic_write(OUT / "samples.md", "\n".join(samples))
    shutil.copyfile(folders[0] / "figures" / "headline.png", OUT / "headline.png")
    parts = [line for title in ("Gold score", "PPO against SFT", "Reward model")
             for line in tables[title]]
    shown = "\n".join([*parts, "### The same prompts, three models", "", *samples])
    readme = ROOT / "README.md"
    begin, end = "<!-- recorded: begin -->\n", "<!-- recorded: end -->"
    text = re.sub(f"{begin}.*{end}", lambda _: f"{begin}\n{shown}\n{end}",
                  readme.read_text("utf-8"), flags=re.DOTALL)
    atomic_write(readme, text)
    print(f"wrote {OUT} and README.md")


if __name__ == "__main__":
    main()
