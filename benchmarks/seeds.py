"""Join the reports of several seeds: one row per quantity, mean with a 95 % interval over seeds.

    for seed in 0 1 2 3 4; do rlhf-mini run --preset cpu --seed $seed --out runs/seed-$seed; done
    python benchmarks/seeds.py runs/seed-*

Writes seeds.json (every value of every seed, with what made it) and seeds.md (the README's tables)
to data/recorded/seeds/.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import scipy.stats

from rlhf_mini.runtime import atomic_write, read_json, write_json

OUT = Path(__file__).parent.parent / "data" / "recorded" / "seeds"
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
COST = [("seconds of the chain", "seconds.total"), ("peak memory (MB)", "peak_memory_mb")]
TABLES = {"Gold score": GOLD, "PPO against SFT": EFFECT, "Reward model": REWARD,
          "Zero-shot tasks (accuracy; corpus loss in nats per token)": TAX, "Cost": COST}


def look_up(report: dict, path: str) -> float:
    """Return the number at a dotted path of a report."""
    value = report
    for key in path.split("."):
        value = value[key]
    return value


def interval_over_seeds(values: list[float], confidence: float = 0.95) -> dict[str, float]:
    """Return the mean with Student's t interval."""
    mean = statistics.mean(values)
    half = (scipy.stats.t.ppf((1 + confidence) / 2, len(values) - 1)
            * statistics.stdev(values) / len(values) ** 0.5)
    return {"mean": mean, "low": mean - half, "high": mean + half}


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
    rows, text = {}, []
    for title, quantities in TABLES.items():
        text += [f"### {title}", "", "| | mean [95 % over seeds] | "
                 + " | ".join(f"seed {r['seed']}" for r in reports) + " |",
                 "|---|---|" + "---|" * len(reports)]
        for label, path in quantities:
            values = [look_up(report, path) for report in reports]
            rows[path] = {"seeds": values} | interval_over_seeds(values)
            digits = 0 if values[0] > 100 else 3
            mean, low, high = (f"{rows[path][k]:.{digits}f}" for k in ("mean", "low", "high"))
            text.append(f"| {label} | {mean} [{low}, {high}] | "
                        + " | ".join(f"{v:.{digits}f}" for v in values) + " |")
        text.append("")
    manifest = {"command": __doc__.split("\n\n")[1].strip(), "config": reports[0]["config"],
                "seeds": [r["seed"] for r in reports], "versions": reports[0]["versions"]}
    write_json(OUT / "seeds.json", {"manifest": manifest, "quantities": rows})
    atomic_write(OUT / "seeds.md", "\n".join(text))
    print(f"wrote {OUT}/seeds.json and seeds.md")


if __name__ == "__main__":
    main()
