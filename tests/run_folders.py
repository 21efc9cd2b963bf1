"""Small folders as a finished run leaves them, with made-up numbers: for tests of the report."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from rlhf_mini.config import load_preset

GRADES = ("gold", "helpful", "truthful", "harmless")
POLICY = ("score", "gold", "kl_per_sequence", "entropy", "response_tokens", "eos_rate",
          "clip_fraction", "approx_kl", "explained_variance", "value_loss")
ATTACK = '<script>alert("x")</script><img src=x onerror=alert(1)> & \x01'


class Numbers:
    """Hands out numbers that are all different, so that a wrong one is seen."""

    def __init__(self) -> None:
        self.used = 0

    def interval(self, **more: float) -> dict[str, float]:
        self.used += 1
        mean = 0.2 + 0.00137 * self.used
        return {"mean": mean, "low": mean - 0.011, "high": mean + 0.013} | more


def make_report(gold: bool = True, ptx: bool = True, rounds: int = 1) -> dict:
    """A report.json of base, SFT, PPO, and PPO-ptx or a second round if asked for."""
    numbers = Numbers()
    models = ["base", "sft", "ppo"] + ["ppo_ptx"] * ptx + ["ppo_2"] * (rounds == 2)
    names = (*(GRADES if gold else ()), "kl", "rm_score", "response_tokens", "eos_rate")
    pairs = ["sft_vs_base", "ppo_vs_sft"] + ["ppo_ptx_vs_sft"] * ptx
    pairs += ["ppo_2_vs_sft", "ppo_2_vs_ppo"] * (rounds == 2)
    modes = ("sampled", "greedy")
    accuracies = ["accuracy_labelers", "accuracy_length_baseline"] + [
        "accuracy_gold", "labelers_gold", "labelers_agreement", "accuracy_decoys"] * gold
    config = dataclasses.asdict(load_preset("smoke"))
    report = {
        "command": "rlhf-mini run --out 'a<b'", "config": config, "device": "cpu", "models": models,
        "eval": {m: {mode: {n: numbers.interval() for n in names} for mode in modes}
                 for m in models},
        "zero_shot": {m: {t: numbers.interval() for t in ("facts", "reading", "corpus_loss")}
                      for m in models},
        "peak_memory_mb": 321.0, "resumed": ["ppo"], "rounds": rounds, "seed": 7,
        "seconds": {"evaluation": 3.2, "ppo": 9.9, "base": 5.5, "reward": 1.5, "sft": 2.5,
                    "rankings": 0.5, "town": 0.1, "total": 23.2},
        "sources": {} if gold else {"prompts": "mine.jsonl"}, "threads": 1,
        "versions": {"python": "3.11.7", "rlhf_mini": "0.1.0", "torch": "2.13.0"}}
    if gold:
        report |= {name: {p: {mode: numbers.interval() for mode in modes} for p in pairs}
                   for name in ("gain", "rm_agreement")}
        report |= {name: {p: {mode: numbers.interval(ties=0.125, without_ties=0.625)
                              for mode in modes} for p in pairs}
                   for name in ("win_rate", "win_rate_labelers")}
    for name in ["reward_model", "reward_model_2"][:rounds]:
        report[name] = {n: numbers.interval(pairs=100 + i) for i, n in enumerate(accuracies)}
        report[name]["calibration"] = [{"predicted": 0.6, "observed": 0.5, "pairs": 30},
                                       {"predicted": 0.9, "observed": 0.8, "pairs": 10}]
    if rounds == 2:
        report["reward_model_2"]["round_before"] = dict(report["reward_model"])
        report["seconds"] |= {"ppo_2": 8.0, "reward_2": 1.25, "rankings_2": 0.75}
    return report


def make_metrics(report: dict, steps: int = 5) -> dict[str, list[dict]]:
    """Rows of metrics.jsonl per stage."""
    gold = "gold" in report["eval"]["base"]["sampled"]
    train = [{"step": i, "loss": 2.0 - 0.1 * i} for i in range(steps)]
    rows = {"base": train, "sft": [*train[:-1], train[-1] | {"valid_loss": 1.75}, {
        "step": steps, "eos_rate": 1.0}],
        "reward": [row | {"accuracy": 0.5 + 0.05 * i} for i, row in enumerate(train)]}
    names = [name for name in POLICY if gold or name != "gold"]
    for model in report["models"][2:]:
        rows[model] = [{"step": i} | {name: 0.1 * i - 0.05 * j for j, name in enumerate(names)}
                       for i in range(steps)]
    return rows


def make_responses(report: dict, prompts: int = 30) -> list[dict]:
    """Rows of responses.jsonl; every response is an attack and says whose it is."""
    gold = "gold" in report["eval"]["base"]["sampled"]
    grades = {"gold": 0.75} if gold else {}
    return [{"id": f"p{i}", "prompt": f"Where is house {i}? {ATTACK}",
             "family": ["closed", "list"][i % 2] if gold else None,
             "customer": 40 if gold else None, "models": {
                 m: {mode: [{"response": f"{m} {mode} {i} {ATTACK}", "eos_rate": float(i % 2),
                             "rm_score": 0.5, "kl": 0.1, "response_tokens": 9.0} | grades]
                     for mode in ("sampled", "greedy")} for m in report["models"]}}
            for i in range(prompts)]


def write_run(folder: Path, report: dict, metrics: bool = True, responses: bool = True) -> Path:
    """Write the files that the report reads."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report))
    files = {f"{stage}/metrics.jsonl": rows for stage, rows in make_metrics(report).items()
             if metrics}
    if responses:
        files["evaluation/responses.jsonl"] = make_responses(report)
    for name, rows in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
