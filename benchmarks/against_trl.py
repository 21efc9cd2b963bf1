"""Time SFT, reward model and PPO beside TRL's trainers: same model, data, batches, one run.

    pip install -e '.[test,parity]' -c constraints.txt
    python benchmarks/against_trl.py

Each measurement is a process of its own that trains a little to warm up and then is timed; the two
sides take turns, so that a slow moment of the machine hits both. The model is a random GPT-2 of 4
layers x 128, the texts are the town's; both sides get the same token ids. Writes
data/recorded/speed/: speed.json (every measurement), speed.md (the table) and manifest.json.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from record import RECORDED, ROOT
from scipy import stats

from rlhf_mini.config import PPOConfig, PretrainConfig, RewardConfig, SFTConfig
from rlhf_mini.data import (
    Demonstration,
    Prompt,
    Ranking,
    encode_pair,
    encode_prompt,
    encode_ranking,
    format_prompt,
    read_jsonl,
)
from rlhf_mini.models import RewardModel, ValueModel
from rlhf_mini.pipeline import versions
from rlhf_mini.pretrain import build_model, train_tokenizer
from rlhf_mini.runtime import make_rng, peak_memory_mb, write_json

TOWN = ROOT / "data" / "town"
PROMPT_TOKENS = RESPONSE_TOKENS = 16
PPO = PPOConfig(episodes=64, minibatches=4, epochs=4, kl_coef=0.05, vf_coef=0.1, lr=3e-6,
                value_lr=3e-6, max_prompt_tokens=PROMPT_TOKENS, warmup_iterations=0,
                max_response_tokens=RESPONSE_TOKENS, missing_eos_score=0.0)
SFT = SFTConfig(epochs=2, batch_size=16, dropout=0.0, min_eos_rate=0.0)
REWARD = RewardConfig(epochs=1, batch_size=16)
K = 4  # responses per ranking, 6 pairs
UNITS = {"ppo": "episodes", "sft": "demonstrations", "reward": "rankings of 4"}
WORK = {"ppo": (2, 10), "sft": (64, 300), "reward": (64, 320)}  # to warm up, and timed


def make_models():
    """Return tokenizer, policy and reward model, all random."""
    records = read_demonstrations()
    tokenizer = train_tokenizer([format_prompt(d.prompt) + d.response for d in records], 1024)
    policy = build_model(PretrainConfig(), tokenizer, seed=0)
    return tokenizer, policy, RewardModel.from_policy(policy, torch.Generator().manual_seed(0))


def read_demonstrations() -> list[Demonstration]:
    """Return the town's demonstrations."""
    return read_jsonl(TOWN / "demonstrations.jsonl", Demonstration)


def make_prompts(tokenizer) -> list[Prompt]:
    """Return the town's prompts of exactly PROMPT_TOKENS tokens."""
    prompts = read_jsonl(TOWN / "prompts.jsonl", Prompt)
    return [p for p in prompts if len(encode_prompt(tokenizer, p.prompt)) == PROMPT_TOKENS]


def make_rankings(count: int) -> list[Ranking]:
    """Rank responses of the town in random order: the time does not depend on who is right."""
    rng, pool = make_rng(0, "benchmark"), read_demonstrations()
    return [Ranking(f"r{i}", rng.choice(pool).prompt,
                    tuple(d.response for d in rng.sample(pool, K)),
                    tuple(rng.sample(range(1, K + 1), K))) for i in range(count)]


# ---- ours --------------------------------------------------------------------------------------


def ours_ppo(work: int):
    """Return a function that trains PPO for `work` iterations, and the episodes in it."""
    from rlhf_mini.ppo import train_ppo
    from rlhf_mini.rollout import score_with
    tokenizer, policy, reward_model = make_models()
    prompts, value_model = make_prompts(tokenizer), ValueModel.from_reward_model(reward_model)
    return lambda: train_ppo(policy, value_model, score_with(reward_model), tokenizer, prompts,
                             replace(PPO, iterations=work), seed=0), work * PPO.episodes


def ours_sft(work: int):
    """Return a function that fine-tunes on `work` demonstrations, and how many it reads."""
    from rlhf_mini.sft import train_sft
    tokenizer, policy, _ = make_models()
    train = read_demonstrations()[:work]
    return lambda: train_sft(policy, tokenizer, train, train[:1], SFT, seed=0), \
        SFT.epochs * len(train)


def ours_reward(work: int):
    """Return a function that trains a reward model on `work` rankings, and their number."""
    from rlhf_mini.reward import train_reward_model
    tokenizer, _, reward_model = make_models()
    rankings = make_rankings(work)
    return lambda: train_reward_model(reward_model, tokenizer, rankings, [], REWARD, seed=0), work


# ---- TRL ---------------------------------------------------------------------------------------


def common_arguments() -> dict:
    """Return what all of TRL's trainers are told: float32, no checkpointing, nothing reported."""
    return dict(output_dir=tempfile.mkdtemp(), report_to="none", bf16=False, save_strategy="no",
                gradient_checkpointing=False, logging_strategy="no", disable_tqdm=True,
                use_cpu=True)


def with_score_head(reward_model: RewardModel, pad_id: int):
    """Return a sequence classifier, which TRL takes, with the weights of our reward model."""
    from transformers import AutoModelForSequenceClassification
    classifier = AutoModelForSequenceClassification.from_config(reward_model.model.config)
    classifier.transformer.load_state_dict(reward_model.model.transformer.state_dict())
    classifier.score.weight.data.copy_(reward_model.model.classifier.weight.data)
    classifier.config.pad_token_id = pad_id
    return classifier


def trl_ppo(work: int):
    """As `ours_ppo`."""
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig as Arguments
    from trl.experimental.ppo import PPOTrainer
    tokenizer, policy, reward_model = make_models()
    rows = [{"input_ids": encode_prompt(tokenizer, p.prompt)} for p in make_prompts(tokenizer)]
    arguments = Arguments(
        **common_arguments(), per_device_train_batch_size=PPO.episodes, temperature=1.0,
        num_mini_batches=PPO.minibatches, num_ppo_epochs=PPO.epochs, kl_coef=PPO.kl_coef,
        total_episodes=work * PPO.episodes, response_length=RESPONSE_TOKENS, stop_token="eos",
        local_rollout_forward_batch_size=PPO.episodes, num_sample_generations=0,
        learning_rate=PPO.lr)
    heads = [with_score_head(reward_model, tokenizer.pad_token_id) for _ in range(2)]
    trainer = PPOTrainer(
        args=arguments, processing_class=tokenizer, model=policy, ref_model=copy.deepcopy(policy),
        reward_model=heads[0], value_model=heads[1], train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:1]))
    return trainer.train, work * PPO.episodes


def trl_sft(work: int):
    """As `ours_sft`."""
    from datasets import Dataset
    from trl import SFTConfig as Arguments
    from trl import SFTTrainer
    tokenizer, policy, _ = make_models()
    pairs = [encode_pair(tokenizer, d.prompt, d.response, SFT.max_prompt_tokens,
                         SFT.max_response_tokens, where=d.id)
             for d in read_demonstrations()[:work]]
    rows = [{"input_ids": p + r, "completion_mask": [0] * len(p) + [1] * len(r)} for p, r in pairs]
    arguments = Arguments(**common_arguments(), num_train_epochs=SFT.epochs, max_length=None,
                          per_device_train_batch_size=SFT.batch_size, learning_rate=SFT.lr,
                          completion_only_loss=True)
    trainer = SFTTrainer(model=policy, args=arguments, processing_class=tokenizer,
                         train_dataset=Dataset.from_list(rows))
    return trainer.train, SFT.epochs * len(rows)


def trl_reward(work: int):
    """As `ours_reward`: all pairs of each ranking."""
    from datasets import Dataset
    from trl import RewardConfig as Arguments
    from trl import RewardTrainer
    tokenizer, _, reward_model = make_models()
    rows = []
    for ranking in make_rankings(work):
        prompt, responses, ranks = encode_ranking(tokenizer, ranking, 64, 64)
        rows += [{"chosen_ids": prompt + responses[a], "rejected_ids": prompt + responses[b]}
                 for a, b in itertools.permutations(range(K), 2) if ranks[a] < ranks[b]]
    pairs = REWARD.batch_size * K * (K - 1) // 2
    arguments = Arguments(**common_arguments(), num_train_epochs=1, max_length=None,
                          per_device_train_batch_size=pairs, learning_rate=REWARD.lr)
    trainer = RewardTrainer(model=with_score_head(reward_model, tokenizer.pad_token_id),
                            args=arguments, processing_class=tokenizer,
                            train_dataset=Dataset.from_list(rows))
    return trainer.train, work


# ---- measuring ---------------------------------------------------------------------------------


def measure(side: str, stage: str) -> dict:
    """Warm up, train, and return units per second and the peak memory of the process."""
    make = globals()[f"{side}_{stage}"]
    warm, timed = WORK[stage]
    with contextlib.redirect_stdout(io.StringIO()):
        make(warm)[0]()
        train, units = make(timed)
        began = time.perf_counter()
        train()
        seconds = time.perf_counter() - began
    return {"side": side, "stage": stage, "per_second": units / seconds, "seconds": seconds,
            "peak_memory_mb": peak_memory_mb()}


def in_own_process(side: str, stage: str, threads: int) -> dict:
    """Call `measure` in a new process."""
    result = subprocess.run(
        [sys.executable, __file__, "--measure", side, stage], text=True, capture_output=True,
        env=os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1",
                          "TOKENIZERS_PARALLELISM": "false"})
    if result.returncode:
        raise RuntimeError(f"{side} {stage} failed:\n{result.stderr[-3000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def summarize(rows: list[dict], stages: list[str]) -> tuple[list[dict], str]:
    """Return mean speeds, their ratio with a 95 % interval over pairs of processes, and a table.

    Args:
        rows: of `measure`, the two sides in turns.
        stages: which to summarise.
    """
    summary = []
    lines = ["| stage | unit | rlhf-mini /s | TRL /s | ratio [95 %] | peak memory, MiB |",
             "|---|---|---|---|---|---|"]
    for stage in stages:
        ours, trl = ([r for r in rows if (r["side"], r["stage"]) == (side, stage)]
                     for side in ("ours", "trl"))
        logs = np.log([a["per_second"] / b["per_second"] for a, b in zip(ours, trl, strict=True)])
        half = (stats.t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / len(logs) ** 0.5
                if len(logs) > 1 else float("nan"))
        row = {"stage": stage, "unit": UNITS[stage], "ratio": float(np.exp(logs.mean())),
               "low": float(np.exp(logs.mean() - half)), "high": float(np.exp(logs.mean() + half))}
        for name, side in (("ours", ours), ("trl", trl)):
            row[name] = float(np.mean([r["per_second"] for r in side]))
            row[f"{name}_memory_mb"] = max(r["peak_memory_mb"] for r in side)
        summary.append(row)
        lines.append(f"| {stage} | {row['unit']} | {row['ours']:.0f} | {row['trl']:.0f} | "
                     f"{row['ratio']:.2f} [{row['low']:.2f}, {row['high']:.2f}] | "
                     f"{row['ours_memory_mb']:.0f} : {row['trl_memory_mb']:.0f} |")
    return summary, "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", choices=[[], *WORK], default=[],
                        help=f"some of {', '.join(WORK)}; all if none is named")
    parser.add_argument("--repeats", type=int, default=5, help="processes per side and stage")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each process")
    parser.add_argument("--out", type=Path, default=RECORDED / "speed", help="of the results")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(*args.measure)))
        return
    stages, rows = args.stages or list(WORK), []
    for stage in stages:
        for repeat in range(args.repeats):
            for side in ("ours", "trl"):
                rows.append(in_own_process(side, stage, args.threads))
                print(f"{stage} {repeat + 1}/{args.repeats} {side:5}"
                      f"{rows[-1]['per_second']:8.1f} {UNITS[stage]} per second", flush=True)
    summary, table = summarize(rows, stages)
    print(table)
    write_json(args.out / "speed.json", {"summary": summary, "measurements": rows})
    write_json(args.out / "manifest.json", {
        "command": "python benchmarks/against_trl.py", "threads": args.threads,
        "processor": platform.machine(), "versions": versions() | {"trl": version("trl")}})
    (args.out / "speed.md").write_text(table + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
