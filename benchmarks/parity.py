"""Check that every fast path computes what the plain one does, each within a stated tolerance.

    python benchmarks/parity.py
    python benchmarks/parity.py --paths compiled

The plain path is eager float32 in one process. Each path is a process of its own. It trains with
SFT and with PPO from the same weights, on the same data, with the same seed, and it says what a
trained policy gives: log-probabilities of demonstrations, scores, samples. Prints a line per check,
writes parity.json, parity.md and manifest.json, and exits with 1 if a check failed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from measuring import add_common_options, begin, provenance, write_result
from parity_checks import judge, show_check, write_table
from record import RECORDED
from town_models import make_prompts, make_town_model, read_demonstrations

from rlhf_mini.compute import computing
from rlhf_mini.config import ComputeConfig, PPOConfig, SFTConfig
from rlhf_mini.data import TokenBatch, collate, encode_pair, encode_prompt, left_pad
from rlhf_mini.decoding import decode
from rlhf_mini.generation import generate
from rlhf_mini.kl import compute_exact_kl
from rlhf_mini.loading import load_policy, save_model
from rlhf_mini.models import (
    RewardModel,
    ValueModel,
    compute_response_logits,
    compute_response_logprobs,
)
from rlhf_mini.ppo import train_ppo
from rlhf_mini.processes import is_first, join_processes
from rlhf_mini.rollout import score_with
from rlhf_mini.runtime import make_generator, read_json, write_json
from rlhf_mini.sft import train_sft

PLAIN = "eager float32"
PATHS = {PLAIN: ComputeConfig(), "compiled float32": ComputeConfig(compile=True),
         "eager bfloat16": ComputeConfig(dtype="bfloat16"),
         "compiled bfloat16": ComputeConfig(dtype="bfloat16", compile=True),
         "two processes": ComputeConfig()}


@dataclass(frozen=True)
class Setting:
    """What is trained: sizes and rates."""

    sft: SFTConfig
    ppo: PPOConfig
    prompt_tokens: int


def _setting(batch: int, episodes: int, lr: float, ppo_lr: float) -> Setting:
    sft = SFTConfig(epochs=1000, batch_size=batch, lr=lr, dropout=0.0, min_eos_rate=0.0)
    ppo = PPOConfig(episodes=episodes, minibatches=4, epochs=1, lr=ppo_lr, value_lr=ppo_lr,
                    kl_coef=0.05, max_response_tokens=24, warmup_iterations=0)
    return Setting(sft, ppo, 16)


SETTINGS = {"tiny": _setting(8, 16, 3e-3, 3e-4), "small": _setting(16, 32, 1e-3, 2e-4),
            "gpt2": _setting(32, 128, 1e-4, 3e-6)}


# ---- one path ----------------------------------------------------------------------------------


def run_path(config: ComputeConfig, setting: Setting, models: Path, steps: int,
             device: torch.device, seed: int) -> dict:
    """Train and measure in one way of computing.

    Args:
        config: how to compute.
        setting: sizes and rates.
        models: holds `start`, a random policy, and `trained`, one after SFT.
        steps: of SFT, and iterations of PPO.
        device: of all models.
        seed: of everything random.

    Returns:
        The curves `sft` (loss), `score` and `kl`, `first_ratio_error`, and the differences.
    """
    if hasattr(torch._dynamo.config, "fail_on_recompile_limit_hit"):
        torch._dynamo.config.fail_on_recompile_limit_hit = True  # else eager code would be compared
    with computing(config, device):
        sft = run_sft(models / "start", setting, steps, device, seed)[1]
        policy, tokenizer = load_policy(models / "trained", device)
        reward_model = make_reward_model(policy, seed)
        found = {"sft": sft} | compare(policy, reward_model, tokenizer, setting, config, seed)
        history = train_ppo(policy, ValueModel.from_reward_model(reward_model),
                            score_with(reward_model), tokenizer,
                            make_prompts(tokenizer, setting.prompt_tokens),
                            replace(setting.ppo, iterations=steps), seed)
    return found | {"score": [h["score"] for h in history],
                    "kl": [h["kl_per_sequence"] for h in history],
                    "first_ratio_error": max(h["first_ratio_error"] for h in history)}


def run_sft(folder: Path, setting: Setting, steps: int, device: torch.device, seed: int):
    """Fine-tune a saved policy for `steps` steps; return it, its losses and its tokenizer."""
    policy, tokenizer = load_policy(folder, device)
    demonstrations = read_fitting(tokenizer, setting)[:steps * setting.sft.batch_size]
    per_epoch = -(-len(demonstrations) // setting.sft.batch_size)
    config = replace(setting.sft, epochs=-(-steps // per_epoch))
    history = train_sft(policy, tokenizer, demonstrations, demonstrations[:1], config, seed)
    return policy, [row["loss"] for row in history if "loss" in row][:steps], tokenizer


def read_fitting(tokenizer, setting: Setting) -> list:
    """Return the town's demonstrations that are short enough in this tokenizer's tokens."""
    limits = setting.sft.max_prompt_tokens, setting.sft.max_response_tokens
    found = []
    for record in read_demonstrations():
        with contextlib.suppress(ValueError):
            encode_pair(tokenizer, record.prompt, record.response, *limits, where=record.id)
            found.append(record)
    return found


def make_reward_model(policy, seed: int) -> RewardModel:
    """Return a random head on a policy's layers, so large that scores differ by about 1."""
    model = RewardModel.from_policy(policy, torch.Generator().manual_seed(seed))
    return model.to(policy.device)


@torch.no_grad()
def compare(policy, reward_model, tokenizer, setting: Setting, config: ComputeConfig,
            seed: int) -> dict[str, float]:
    """Compute the same with the same weights, as asked and plainly; return the differences."""
    limits = setting.sft.max_prompt_tokens, setting.sft.max_response_tokens
    batch = collate([encode_pair(tokenizer, d.prompt, d.response, *limits, where=d.id)
                     for d in read_fitting(tokenizer, setting)[:32]],
                    tokenizer.pad_token_id).to(policy.device)
    mask, plain = batch.response_mask, computing(ComputeConfig(), policy.device)
    logprobs, _ = compute_response_logprobs(policy, batch)
    logits, scores = compute_response_logits(policy, batch), reward_model(batch.input_ids,
                                                                          batch.attention_mask)
    with plain:
        wanted, _ = compute_response_logprobs(policy, batch)
        wanted_logits = compute_response_logits(policy, batch)
        wanted_scores = reward_model(batch.input_ids, batch.attention_mask)
    away = (logprobs - wanted).abs()[mask]
    kl = torch.cat([compute_exact_kl(a.double(), b.double()) for a, b in
                    zip(wanted_logits.split(256), logits.split(256), strict=True)])
    return {"logprob_max": away.max().item(), "logprob_mean": away.mean().item(),
            "kl_mean": kl.mean().item(), "score_max": (scores - wanted_scores).abs().max().item(),
            **compare_samples(policy, tokenizer, setting, seed)}


def compare_samples(policy, tokenizer, setting: Setting, seed: int) -> dict[str, float]:
    """Sample with `decode`; compare its log-probabilities and tokens with the plain loop's."""
    device, tokens = policy.device, setting.ppo.max_response_tokens
    prompts = [encode_prompt(tokenizer, p.prompt) for p in
               make_prompts(tokenizer, setting.prompt_tokens)[:setting.ppo.episodes]]
    ids, mask = (x.to(device) for x in left_pad(prompts, tokenizer.pad_token_id))
    noise = torch.rand(len(prompts), tokens, device=device,
                       generator=make_generator(seed, "parity", device=device))
    same = dict(max_response_tokens=tokens, eos_id=tokenizer.eos_token_id,
                pad_id=tokenizer.pad_token_id, noise=noise)
    for _ in range(2):  # the second time, on a GPU, replays what the first recorded
        response_ids, response_mask, logprobs = decode(policy, ids, mask, **same)
    with computing(ComputeConfig(), device):
        plain_ids, plain_mask, _ = generate(policy, ids, mask, **same)
        wanted, _ = compute_response_logprobs(
            policy, TokenBatch(ids, mask, response_ids, response_mask))
    away = (logprobs - wanted).abs()[response_mask]
    rows = zip(response_ids, response_mask, plain_ids, plain_mask, strict=True)
    equal = [a[m].tolist() == b[n].tolist() for a, m, b, n in rows]
    return {"decode_max": away.max().item(), "decode_mean": away.mean().item(),
            "decode_other_rows": 1 - sum(equal) / len(equal)}


# ---- all paths ---------------------------------------------------------------------------------


def why_not(path: str, device: torch.device) -> str | None:
    """Say why a path cannot be taken here, or None."""
    if path == "two processes":
        if device.type == "cuda" and torch.cuda.device_count() < 2:
            return f"needs 2 GPUs, there is {torch.cuda.device_count()}"
        try:
            import accelerate  # noqa: F401
        except ImportError:
            return "needs accelerate"
    if "bfloat16" in path and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        return "needs a GPU that computes in bfloat16"
    return None


def in_own_process(path: str, args, models: Path, device: torch.device) -> dict:
    """Run a path in processes of its own; return what it found, or `error`."""
    result = models / f"{path.replace(' ', '-')}.json"
    start = [sys.executable]
    if path == "two processes":
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*start, __file__, "--device", device.type, "--size", args.size, "--steps",
               str(args.steps), "--seed", str(args.seed), "--one", path, str(models), str(result)]
    done = subprocess.run(command, text=True, capture_output=True, env=os.environ | {
        "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})
    if done.returncode or not result.exists():
        return {"error": done.stderr[-3000:] or f"exit code {done.returncode}"}
    return read_json(result)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--paths", nargs="+", choices=[p for p in PATHS if p != PLAIN],
                        default=[p for p in PATHS if p != PLAIN], metavar="PATH",
                        help=f"some of {', '.join(PATHS)} (default: all)")
    parser.add_argument("--size", choices=SETTINGS, help="of the models (GPU: gpt2, CPU: small)")
    parser.add_argument("--steps", type=int, default=50, help="of SFT, and iterations of PPO")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    add_common_options(parser, RECORDED / "parity")
    args = parser.parse_args()
    device, began = begin(args)
    args.size = args.size or ("gpt2" if device.type == "cuda" else "small")
    if args.one:
        path, models, result = args.one
        join_processes(device)
        with contextlib.redirect_stdout(io.StringIO()):
            found = run_path(PATHS[path], SETTINGS[args.size], Path(models), args.steps, device,
                             args.seed)
        if is_first():
            write_json(result, found)
        return 0
    found: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder)
        save_model(*make_town_model(args.size, seed=args.seed), models / "start")
        with contextlib.redirect_stdout(io.StringIO()):
            policy, _, tokenizer = run_sft(models / "start", SETTINGS[args.size], args.steps,
                                           device, args.seed)
        save_model(policy, tokenizer, models / "trained")
        del policy
        for path in [PLAIN, *args.paths]:
            missing = why_not(path, device)
            found[path] = {"skipped": missing} if missing else in_own_process(path, args, models,
                                                                              device)
            checks = judge(found, PLAIN)
            for row in checks:
                if row["path"] == path:
                    print(show_check(row), flush=True)
            write_result(args.out, "parity", {"size": args.size, "steps": args.steps,
                                              "checks": checks, "paths": found},
                         write_table(checks), provenance(device, args.seed, began))
    failed = sum(check["result"] == "FAIL" for check in checks)
    print(f"{failed} of {len(checks)} checks failed; wrote {args.out}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
