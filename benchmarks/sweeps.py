"""Sweep two coefficients of PPO over finished runs: the KL leash and the pretraining mix.

    for seed in 0 1 2; do rlhf-mini run --seed $seed --out runs/seed-$seed; done
    python benchmarks/sweeps.py runs/seed-0 runs/seed-1 runs/seed-2

Only PPO is trained again, from the SFT model and against the reward model of each run: once per
kl_coef (beta) without pretraining mix, and once per ptx_coef (gamma) without a leash. The policies
are judged on the validation customers, so the test customers stay unseen while settings are chosen.
Writes data/recorded/sweeps/: sweeps.json and manifest.json, after every policy; what is there with
the same inputs is not trained again, so a sweep that was stopped goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import textwrap
from pathlib import Path

import torch
from record import RECORDED, make_manifest
from transformers.utils import logging

from rlhf_mini.compute import computing
from rlhf_mini.config import override
from rlhf_mini.evaluation import evaluate_policy, evaluate_zero_shot, mean_interval, summarize
from rlhf_mini.experiments.study import describe_device, source_state
from rlhf_mini.loading import load_policy
from rlhf_mini.models import RewardModel
from rlhf_mini.pipeline import config_from, finished_stage, versions
from rlhf_mini.runtime import fingerprint, read_json, read_metrics, resolve_device, write_json
from rlhf_mini.stages import run_ppo
from rlhf_mini.workspace import Run, grader_of

OUT = RECORDED / "sweeps"
BETAS = (0.0, 0.03, 0.1, 0.3, 1.0, 3.0)  # kl_coef, with ptx_coef = 0
GAMMAS = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0)  # ptx_coef, with kl_coef = 0

CURVE = ("kl_per_sequence", "score", "gold")


def list_points(betas: list[float], gammas: list[float]) -> list[tuple[float, float]]:
    """Return all pairs (kl_coef, ptx_coef) of both sweeps, each once.

    >>> list_points([0.0, 0.3], [0.0, 1.0])
    [(0.0, 0.0), (0.3, 0.0), (0.0, 1.0)]
    """
    return list(dict.fromkeys([*((beta, 0.0) for beta in betas),
                               *((0.0, gamma) for gamma in gammas)]))


def open_finished(directory: Path, assignments: list[str], device: str = "cpu",
                  ) -> tuple[Run, dict]:
    """Return a finished run with changed settings, and its report.

    Raises:
        ValueError: if its SFT or reward model is not finished.
    """
    for stage in ("sft", "reward"):
        if finished_stage(directory / stage) is None:
            raise ValueError(f"{directory}: no finished stage {stage!r}; `rlhf-mini run --out "
                             f"{directory}` makes it")
    report = read_json(directory / "report.json")
    config = override(config_from(report["config"]), [*assignments, "evaluation.split=valid"])
    return Run(directory, config, report["seed"], resolve_device(device), label="sweep"), report


def inputs_of(run: Run) -> str:
    """Return a fingerprint of what a point depends on, its two coefficients left out."""
    ppo = dataclasses.replace(run.config.ppo, kl_coef=0.0, kl_target=0.0, ptx_coef=0.0)
    return fingerprint({"ppo": dataclasses.asdict(ppo), "seed": run.seed,
                        "evaluation": dataclasses.asdict(run.config.evaluation)},
                       *(finished_stage(run.directory / stage) for stage in ("sft", "reward")))


def measure_sft(run: Run) -> tuple[dict, dict]:
    """Judge the policy that all points start from.

    Returns:
        `sampled`, `greedy` and `zero_shot` measures; and the gold scores (N, S) by mode.
    """
    return _judge(run, run.directory / "sft")


def measure_point(run: Run, kl_coef: float, ptx_coef: float, start: dict) -> dict:
    """Train one policy and judge it.

    Args:
        run: finished up to the reward model.
        kl_coef: beta.
        ptx_coef: gamma.
        start: gold scores (N, S) of SFT by mode.

    Returns:
        The coefficients, `sampled`, `greedy` and `zero_shot` measures, the paired `gain` over SFT
        by mode, `last`, the metrics of the last PPO iteration, and `curve`, of each iteration what
        the rollout said of the policy that drew it: KL, score and gold score.
    """
    ppo = dataclasses.replace(run.config.ppo, kl_coef=kl_coef, ptx_coef=ptx_coef, kl_target=0.0)
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, ppo=ppo))
    with tempfile.TemporaryDirectory() as folder:
        run_ppo(run, Path(folder), "sft", 1, ptx=ptx_coef > 0)
        history = read_metrics(Path(folder) / "metrics.jsonl")
        results, gold = _judge(run, Path(folder))
    gain = {mode: mean_interval(gold[mode] - start[mode], run.config.evaluation) for mode in gold}
    curve = {name: [row[name] for row in history] for name in CURVE if name in history[0]}
    return {"kl_coef": kl_coef, "ptx_coef": ptx_coef, "last": history[-1], "curve": curve,
            "gain": gain} | results


def _judge(run: Run, folder: Path) -> tuple[dict, dict]:
    config = run.config.evaluation
    policy, tokenizer = load_policy(folder, run.device)
    ref_policy, _ = run.policy("sft")
    reward_model = RewardModel.load(run.directory / "reward", run.device)
    prompts = run.prompts("valid", tokenizer)
    answers = {mode: evaluate_policy(policy, ref_policy, tokenizer, prompts, grader_of(run),
                                     reward_model, config, run.seed, mode == "greedy")
               for mode in ("sampled", "greedy")}
    documents = [d for d in run.town.documents if d.split == "valid"]
    return ({mode: summarize(answer, config) for mode, answer in answers.items()}
            | {"zero_shot": evaluate_zero_shot(policy, tokenizer, run.town.zero_shot, documents,
                                               config)},
            {mode: answer.measures["gold"] for mode, answer in answers.items()})


def sweep(directories: list[Path], betas: list[float], gammas: list[float],
          assignments: list[str], out: Path = OUT, device: str = "cpu") -> dict:
    """Train and judge all points of all runs that `out` does not hold yet.

    Args:
        directories: of finished runs, one per seed.
        betas: values of kl_coef.
        gammas: values of ptx_coef.
        assignments: further settings for all points, as after `--set`.
        out: folder of the results.
        device: of all models.

    Returns:
        `grid`, `settings` and `runs`, each with `seed`, `inputs`, `sft` and `points`.
    """
    path, points = out / "sweeps.json", list_points(betas, gammas)
    old = {row["inputs"]: row for row in read_json(path)["runs"]} if path.exists() else {}
    opened = [open_finished(directory, assignments, device) for directory in directories]
    rows = [old.get(inputs_of(run), {"seed": run.seed, "inputs": inputs_of(run), "points": []})
            for run, _ in opened]
    result = {"grid": {"kl_coef": betas, "ptx_coef": gammas}, "settings": assignments, "runs": rows}
    commands = textwrap.dedent(__doc__.split("\n\n")[1]).splitlines()
    manifest = {"commands": commands, "settings": assignments,
                "versions": versions(), "threads": torch.get_num_threads(), **source_state(),
                "device": describe_device(resolve_device(device)),
                "runs": [make_manifest(report) for _, report in opened]}
    for (run, _), row in zip(opened, rows, strict=True):
        row["points"] = [p for p in row["points"] if (p["kl_coef"], p["ptx_coef"]) in points]
        todo = [point for point in points
                if point not in {(p["kl_coef"], p["ptx_coef"]) for p in row["points"]}]
        gold = None
        for number, point in enumerate(todo, start=1):
            run.label = f"seed {run.seed} [{number}/{len(todo)}]"
            run.say(f"kl_coef {point[0]:g}, ptx_coef {point[1]:g}")
            with computing(run.config.compute, run.device):
                if gold is None:
                    row["sft"], gold = measure_sft(run)
                row["points"].append(measure_point(run, *point, gold))
            write_json(path, result)
            write_json(out / "manifest.json", manifest)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
    parser.add_argument("--betas", nargs="*", type=float, default=list(BETAS),
                        help="values of kl_coef, with ptx_coef = 0")
    parser.add_argument("--gammas", nargs="*", type=float, default=list(GAMMAS),
                        help="values of ptx_coef, with kl_coef = 0")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE",
                        dest="assignments", help="change a setting of PPO or of the evaluation")
    parser.add_argument("--device", default="cpu", help="auto, cpu or cuda (default: cpu)")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the results")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    sweep(args.runs, args.betas, args.gammas, args.assignments, args.out, args.device)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
