"""Ask the questions of `rlhf_mini.experiments.real` of a run on real data, and record the answers.

    python benchmarks/real_data.py SOURCE --out data/real --max-words 80
    rlhf-mini run --preset real-cpu --out runs/real --corpus data/real/corpus.jsonl.gz \\
        --demonstrations data/real/demonstrations.jsonl.gz \\
        --rankings data/real/rankings.jsonl.gz --prompts data/real/prompts.jsonl.gz
    python benchmarks/real.py runs/real data/real --pairs hh-rlhf/harmless-base

`--pairs` is anything that holds pairs in HH-RLHF's form; without it that part is left out. Writes
real.json, manifest.json, samples.json and three figures to data/recorded/real (`--out`). Of the
texts of others only the prompts of the few samples are written.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from measuring import begin, provenance

from rlhf_mini.compute import computing
from rlhf_mini.config import EvaluationConfig
from rlhf_mini.data import encode_response, iterate_jsonl
from rlhf_mini.evaluation import compute_win_rate, mean_interval
from rlhf_mini.experiments import real
from rlhf_mini.experiments.overoptimisation import best_of_n, best_of_n_kl
from rlhf_mini.experiments.real_figures import draw_agreement, draw_calibration, draw_policies
from rlhf_mini.generation import sample_responses
from rlhf_mini.models import RewardModel
from rlhf_mini.pipeline import config_from, finished_stage
from rlhf_mini.readers import read_rankings
from rlhf_mini.report import to_png
from rlhf_mini.runtime import (
    atomic_write,
    fingerprint,
    make_generator,
    read_json,
    write_json,
)
from rlhf_mini.selection import assign_splits
from rlhf_mini.workspace import Run

OUT = Path(__file__).parent.parent / "data" / "recorded" / "real"
MEASURES = EvaluationConfig()  # how intervals are made


def open_finished(directory: Path, rankings: Path, device: torch.device) -> tuple[Run, dict]:
    """Return a finished run on the user's data, and the record of its evaluation.

    Raises:
        ValueError: if it is not finished, or was made with other rankings.
    """
    state = finished_stage(directory / "evaluation")
    if state is None or not {"prompts", "rankings"} <= set(state["sources"]):
        raise ValueError(f"{directory}: no finished run with --prompts and --rankings there; the "
                         "head of benchmarks/real.py has the command")
    if fingerprint(rankings) != state["settings"]["rankings"]:
        raise ValueError(f"{rankings}: not the rankings that {directory} was made with; their "
                         "held-out prompts may be others")
    run = Run(directory, config_from(state["config"]), state["seed"], device,
              sources=state["sources"], label="real")
    return run, state


def train_second(run: Run, rankings: Path, tokenizer) -> tuple[RewardModel, dict]:
    """Train a second reward model on the prompts that the first never saw, the held-out ones.

    Returns:
        The model, and its agreement with the judge on the first one's training prompts.
    """
    limits = run.config.reward
    drawn = assign_splits(read_rankings(rankings, run.seed + 1, 9, 9), run.seed)
    unseen = run.fit([r for r in drawn if r.split != "train"], tokenizer,
                     limits.max_prompt_tokens, limits.max_response_tokens)
    model = real.train_on(run, run.policy("sft")[0], tokenizer, unseen, run.seed + 1)
    others = real.read_judged(rankings, run, tokenizer, "train")
    trained = {r.prompt for r in unseen}
    others = [j for j in others if j.prompt not in trained]
    right, pairs = real.count_right(real.score_judged(model, tokenizer, others), others,
                                    real.choose_pairs(others)["all"])
    accuracy = {"accuracy": float(right.sum() / pairs.sum()), "prompts": len(unseen)}
    return model, accuracy


def sample_best(run: Run, reward_model: RewardModel, second: RewardModel
                ) -> tuple[list[dict], dict]:
    """Let SFT answer each held-out prompt as often as the largest n, and choose by the score.

    Args:
        run: its SFT model and lengths.
        reward_model: chooses; a response without EOS has the score that PPO gives it.
        second: another reward model, which did not choose.

    Returns:
        Rows of `n`, `kl` (bound, nats), `score`, `second`, `tokens`, means over prompts; and the
        best response of all to each prompt, as text.
    """
    policy, tokenizer = run.policy("sft")
    config, count = run.config.evaluation, real.SIZES[-1]
    prompts = run.prompts(config.split, tokenizer)
    sampled = sample_responses(
        policy, tokenizer, [p.prompt for p in prompts for _ in range(count)],
        max_response_tokens=config.max_response_tokens, batch_size=config.batch_size,
        generator=make_generator(run.seed, "real best", device=policy.device))
    groups = [sampled[i:i + count] for i in range(0, len(sampled), count)]
    texts, ids = [p.prompt for p in prompts], [[list(r.token_ids) for r in g] for g in groups]
    scores, others = (np.stack(real.score_responses(model, tokenizer, texts, ids))
                      for model in (reward_model, second))
    finished = np.array([[r.finished for r in g] for g in groups])
    scores = np.where(finished, scores, run.config.ppo.missing_eos_score)
    tokens = np.array([[float(len(r.token_ids)) for r in g] for g in groups])
    rows = [{"n": n, "kl": best_of_n_kl(n)} | {
        name: float(best_of_n(scores, values, n).mean())
        for name, values in (("score", scores), ("second", others), ("tokens", tokens))}
        for n in real.SIZES]
    best = {p.prompt: g[int(row.argmax())].text
            for p, g, row in zip(prompts, groups, scores, strict=True)}
    return rows, best


def compare_policies(run: Run, tokenizer, second: RewardModel) -> tuple[dict, dict]:
    """Compare PPO with SFT on held-out prompts, by the reward model and by the second one.

    Returns:
        Per mode the measures of both policies, `score` among them (the reward model's, or that of a
        response without EOS, as in PPO), and their paired difference by both reward models; and
        the first response of each policy to each prompt, by mode.
    """
    rows = [json.loads(line) for line in
            (run.directory / "evaluation" / "responses.jsonl").read_text("utf-8").splitlines()]
    measured = read_json(run.directory / "evaluation" / "evaluation.json")["eval"]
    results, texts, room = {}, {}, run.config.evaluation.max_response_tokens
    missing = run.config.ppo.missing_eos_score
    for mode in ("sampled", "greedy"):
        scores = {}
        for name in ("sft", "ppo"):
            answers = [[x["response"] for x in row["models"][name][mode]] for row in rows]
            texts.setdefault(mode, {})[name] = [a[0] for a in answers]
            others = real.score_responses(second, tokenizer, [row["prompt"] for row in rows],
                                           [[real.cut_response(encode_response(tokenizer, t), room)
                                             for t in a] for a in answers])
            scores[name] = (np.array([[x["rm_score"] if x["eos_rate"] else missing
                                       for x in row["models"][name][mode]] for row in rows]),
                            np.stack(others))
        results[mode] = {name: measured[name][mode] | {"score": mean_interval(found[0], MEASURES)}
                         for name, found in scores.items()} | {
            f"{what} by {who}": function(scores["ppo"][i], scores["sft"][i])
            for i, who in enumerate(("reward model", "second"))
            for what, function in (
                ("gain", lambda ours, theirs: mean_interval(ours - theirs, MEASURES)),
                ("win rate", lambda ours, theirs: compute_win_rate(ours, theirs, MEASURES)))}
    return results, {"prompts": [row["prompt"] for row in rows]} | texts


def describe_data(folder: Path) -> dict:
    """Return how many prompts and systems the rankings hold, and how long responses are."""
    rows = [row for _, row in iterate_jsonl(folder / "rankings.jsonl.gz")]
    responses = [x for row in rows for x in row["responses"]]
    return {"prompts": len(rows), "test": sum(row["split"] == "test" for row in rows),
            "systems": len({x["model"] for x in responses}),
            "responses": float(np.median([len(row["responses"]) for row in rows])),
            "words": max(len(x["text"].split()) for x in responses),
            "files": {p.name: fingerprint(p) for p in sorted(folder.glob("*.jsonl.gz"))}}


def ask(run: Run, folder: Path, pairs: str | None, seeds: int, show: list[int],
        ) -> tuple[dict, list[dict]]:
    """Ask all questions.

    Returns:
        The answers, and the samples.
    """
    rankings = folder / "rankings.jsonl.gz"
    policy, tokenizer = run.policy("sft")
    reward_model = RewardModel.load(run.directory / "reward", run.device)
    judged = real.read_judged(rankings, run, tokenizer)
    if not judged:
        raise ValueError(f"{rankings}: no prompt of the split test has two responses within the "
                         "reward model's limits and with different scores")
    run.say(f"{len(judged)} held-out prompts")
    scores = real.score_judged(reward_model, tokenizer, judged)
    file = folder / "nonsense.jsonl.gz"
    nonsense = {row["prompt"]: (row["response"], float(row["score"]))
                for _, row in (iterate_jsonl(file) if file.exists() else ())}
    results = {
        "parameters": sum(p.numel() for p in policy.parameters()),
        "data": describe_data(folder),
        "stage": read_json(run.directory / "reward" / "reward.json"),
        "prompts": {"held out": len(judged),
                    "responses": sum(len(j.systems) for j in judged),
                    "train": len(run.rankings("rankings", "train", tokenizer)),
                    "demonstrations": len(run.demonstrations("train", tokenizer, run.config.sft))},
        "agreement": real.measure_agreement(scores, judged, real.measure_strength(rankings),
                                            MEASURES),
        "calibration": real.measure_calibration(scores, [j.scores for j in judged]),
        "length": real.measure_length(scores, judged, MEASURES)}
    if nonsense:
        results["nonsense"] = real.measure_nonsense(reward_model, tokenizer, judged, scores,
                                                    nonsense, MEASURES)
    second, results["second"] = train_second(run, rankings, tokenizer)
    results["best_of_n"], best = sample_best(run, reward_model, second)
    results["policies"], texts = compare_policies(run, tokenizer, second)
    results["ppo"] = [{"kl": row["kl_per_sequence"], "score": row["score"],
                       "tokens": row["response_tokens"], "eos_rate": row["eos_rate"]}
                      for _, row in iterate_jsonl(run.directory / "ppo" / "metrics.jsonl")]
    results["learning"] = real.learn_more(run, rankings, judged, seeds)
    if pairs:
        results["pairs"] = real.learn_pairs(run, pairs, seeds, MEASURES)
    samples = [{"prompt": prompt, "sft": texts["sampled"]["sft"][i], "best of n": best[prompt],
                "ppo": texts["sampled"]["ppo"][i], "sft, greedy": texts["greedy"]["sft"][i],
                "ppo, greedy": texts["greedy"]["ppo"][i]}
               for i, prompt in enumerate(texts["prompts"]) if i in show]
    return results, samples


def main(arguments: list[str] | None = None) -> int:
    """Ask, write; return 0, or 2 after an error that was explained."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of the finished run")
    parser.add_argument("data", type=Path, help="folder that real_data.py filled")
    parser.add_argument("--pairs", help="pairs in HH-RLHF's form: file, folder or hub dataset")
    parser.add_argument("--seeds", type=int, default=3, help="of subsets (default: 3)")
    parser.add_argument("--show", type=int, nargs="*", default=[0, 1, 2, 3], metavar="N",
                        help="held-out prompts in samples.json, from 0: someone has to read them "
                        "before they are published (default: 0 1 2 3)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the results")
    args = parser.parse_args(arguments)
    device, began = begin(args)
    try:
        run, state = open_finished(args.run, args.data / "rankings.jsonl.gz", device)
        with computing(run.config.compute, device):
            results, samples = ask(run, args.data, args.pairs, args.seeds, args.show)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    stages = {p.parent.name: read_json(p) for p in sorted(args.run.glob("*/stage.json"))}
    write_json(args.out / "real.json", results)
    write_json(args.out / "samples.json", samples)
    for name, draw in (("agreement", draw_agreement), ("calibration", draw_calibration),
                       ("policies", draw_policies)):
        atomic_write(args.out / f"{name}.png", to_png(draw(results)))
    write_json(args.out / "manifest.json", provenance(device, run.seed, began) | {
        "run": state["command"], "settings": state["config"],
        "stages": {name: {"seconds": s["seconds"], "peak_memory_mb": s["peak_memory_mb"],
                          "summary": s["summary"]} for name, s in stages.items()}})
    print(f"wrote {args.out} in {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
