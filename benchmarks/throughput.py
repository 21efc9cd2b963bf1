"""Time the training steps of SFT, reward model and PPO, and compare with what the device can do.

    python benchmarks/throughput.py                             one model
    python benchmarks/throughput.py --size gpt2 medium large    cost against the model's size

A step is the package's own, from batch to changed weights: losses, backward pass, clipping, Adam,
and for PPO `ppo.update` over a whole rollout. Tokens are random, all prompts and responses have
one length; tokens per second count prompt and response, each epoch anew. The modes take turns on
the same weights; a step of each beforehand (compiling) is reported and not counted.

Operations are counted from the shapes. A matrix of N weights costs 2 N per token forward and 4 N
backward, so 6 N in all, and attention 4 D forward and 8 D backward per pair of tokens of which one
sees the other. Counted is what the method needs: the last block's output, and logits, only where a
state is read; no embedding look-ups, no norms, nothing twice that is computed twice (logits are,
to save memory). The use is these operations per second over those of a large matrix product in the
same precision.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from measuring import (
    SIZES,
    add_common_options,
    begin,
    build_gpt2,
    forget_peak_memory,
    gpu_memory_mb,
    measure_matmul,
    provenance,
    time_once,
    write_result,
)
from record import RECORDED
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from rlhf_mini.compute import computing
from rlhf_mini.config import ComputeConfig, PPOConfig
from rlhf_mini.data import TokenBatch, pack_rankings
from rlhf_mini.models import RewardModel, ValueModel, compute_response_logprobs
from rlhf_mini.ppo import build_optimizer, update
from rlhf_mini.reward import reward_loss
from rlhf_mini.rollout import Rollout, Targets
from rlhf_mini.runtime import make_generator
from rlhf_mini.sft import sft_loss

MODES = {"eager float32": ComputeConfig(), "compiled float32": ComputeConfig(compile=True),
         "eager bfloat16": ComputeConfig(dtype="bfloat16"),
         "compiled bfloat16": ComputeConfig(dtype="bfloat16", compile=True)}
STAGES = {"sft": "SFT step", "reward": "reward model step", "ppo": "PPO update"}
K = 4  # responses per ranking
DEFAULTS = {"cuda": dict(size=["gpt2"], prompt=64, response=64, sft_batch=64, reward_batch=32,
                         episodes=512, minibatches=8, modes=list(MODES)),
            "cpu": dict(size=["small"], prompt=16, response=16, sft_batch=16, reward_batch=16,
                        episodes=64, minibatches=4, modes=["eager float32", "eager bfloat16"])}


@dataclass
class Work:
    """One unit of a stage: what to call, and what is in it."""

    step: Callable[[], object]
    tokens: int
    flops: int


def forward_flops(config, tokens: int, pairs: int, read: int, read_pairs: int, outputs: int) -> int:
    """Count the operations of a forward pass, products and additions, of its matrix products.

    Args:
        config: of the GPT-2.
        tokens: that go in, over all rows.
        pairs: of tokens of which the first sees the second, itself included, over all rows.
        read: tokens whose last state is read.
        read_pairs: the pairs among `pairs` whose first token is read.
        outputs: numbers made from each state that is read: V logits, or 1.
    """
    hidden, layers = config.n_embd, config.n_layer
    inner = config.n_inner or 4 * hidden
    project, finish = 2 * 3 * hidden**2, 2 * (hidden**2 + 2 * hidden * inner)
    block = tokens * (project + finish) + 4 * hidden * pairs
    last = tokens * project + read * finish + 4 * hidden * read_pairs
    return (layers - 1) * block + last + 2 * read * hidden * outputs


def response_flops(config, rows: int, prompt: int, response: int, outputs: int) -> int:
    """Return `forward_flops` of prompts and responses; the states before response tokens are read.
    """
    length = prompt + response
    seen = response * prompt + response * (response - 1) // 2  # token i of T sees P + i - 1
    return forward_flops(config, rows * length, rows * length * (length + 1) // 2,
                         rows * response, rows * seen, outputs)


def ranking_flops(config, rows: int, prompt: int, response: int) -> int:
    """Return `forward_flops` of packed rankings of K responses; each response's end is read."""
    own = response * prompt + response * (response + 1) // 2
    pairs = prompt * (prompt + 1) // 2 + K * own
    return forward_flops(config, rows * (prompt + K * response), rows * pairs, rows * K,
                         rows * K * (prompt + response), 1)


def draw_batch(policy: GPT2LMHeadModel, rows: int, prompt: int, response: int,
               seed: int) -> TokenBatch:
    """Return random prompts and responses without padding, on the policy's device."""
    ids = torch.randint(policy.config.vocab_size, (rows, prompt + response),
                        generator=make_generator(seed, "tokens"))
    ones = torch.ones_like(ids, dtype=torch.bool)
    return TokenBatch(ids[:, :prompt], ones[:, :prompt], ids[:, prompt:],
                      ones[:, prompt:]).to(policy.device)


def descend(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """Take a step as `train_sft` and `train_reward_model` do."""
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
    optimizer.step()


def sft_work(policy: GPT2LMHeadModel, args) -> Work:
    """Return a step of SFT."""
    rows = args.sft_batch
    batch = draw_batch(policy, rows, args.prompt, args.response, args.seed)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, fused=True)

    def step() -> None:
        logprobs, _ = compute_response_logprobs(policy, batch, entropy=False)
        descend(policy, optimizer, sft_loss(logprobs, batch.response_mask)[0])

    flops = response_flops(policy.config, rows, args.prompt, args.response,
                           policy.config.vocab_size)
    return Work(step, rows * (args.prompt + args.response), 3 * flops)


def reward_work(policy: GPT2LMHeadModel, args) -> Work:
    """Return a step of the reward model."""
    rows = args.reward_batch
    model = RewardModel.from_policy(policy, torch.Generator().manual_seed(args.seed))
    batch = draw_batch(policy, rows, args.prompt, K * args.response, args.seed)
    rankings = pack_rankings([
        (prompt, [response[i::K] for i in range(K)], tuple(range(1, K + 1)))
        for prompt, response in zip(batch.prompt_ids.tolist(), batch.response_ids.tolist(),
                                    strict=True)], 0).to(policy.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def step() -> None:
        scores = model.packed_scores(rankings)
        descend(model, optimizer, reward_loss(scores, rankings.ranks, rankings.mask)[0])

    return Work(step, rankings.input_ids.numel(),
                3 * ranking_flops(policy.config, rows, args.prompt, args.response))


def ppo_work(policy: GPT2LMHeadModel, args) -> Work:
    """Return an update over a rollout whose old log-probabilities are the policy's own."""
    rows, config = args.episodes, PPOConfig(episodes=args.episodes, minibatches=args.minibatches,
                                            epochs=1, lr=1e-6, value_lr=1e-6)
    value_model = ValueModel.from_reward_model(
        RewardModel.from_policy(policy, torch.Generator().manual_seed(args.seed)))
    batch = draw_batch(policy, rows, args.prompt, args.response, args.seed)
    with torch.no_grad():
        logprobs, entropy = compute_response_logprobs(policy, batch)
        values = value_model(batch)
    advantages = torch.randn(logprobs.shape, generator=make_generator(args.seed, "advantages"))
    targets = Targets(advantages.to(policy.device), values + advantages.to(policy.device))
    scores = torch.zeros(rows, device=policy.device)
    rollout = Rollout(batch, logprobs, logprobs, values, scores, scores > 0, entropy)
    optimizer = build_optimizer(policy, value_model, config)
    order = make_generator(args.seed, "minibatches")
    flops = sum(response_flops(policy.config, rows, args.prompt, args.response, outputs)
                for outputs in (policy.config.vocab_size, 1))
    return Work(lambda: update(policy, value_model, optimizer, rollout, targets, config, order),
                rows * (args.prompt + args.response), 3 * flops)


def measure(work: Work, modes: list[str], steps: int, device: torch.device) -> list[dict]:
    """Time a stage's step in all modes, in turns.

    Returns:
        Per mode `mode`, `seconds` (one per step), `first_seconds` and `memory_mb`, or `error`.
    """
    if hasattr(torch._dynamo.config, "fail_on_recompile_limit_hit"):
        torch._dynamo.config.fail_on_recompile_limit_hit = True  # else it would time eager code
    torch._dynamo.reset()
    rows = {mode: {"mode": mode, "seconds": []} for mode in modes}

    def run(mode: str) -> float:
        with computing(MODES[mode], device):
            return time_once(work.step, device)

    for turn in range(steps + 1):
        for mode, row in rows.items():
            if "error" in row:
                continue
            forget_peak_memory(device)
            try:
                seconds = run(mode)
            except Exception as error:  # out of memory, or a compiler's trouble
                row["error"] = f"{type(error).__name__}: {error}"[:500]
                continue
            if turn == 0:
                row["first_seconds"] = seconds
            else:
                row["seconds"].append(seconds)
                row["memory_mb"] = gpu_memory_mb(device)
    return list(rows.values())


def run_stage(size: str, stage: str, args, device: torch.device, rates: dict[str, float],
              ) -> list[dict]:
    """Measure a stage of one model in all modes."""
    policy = build_gpt2(size, args.prompt + K * args.response, device, args.seed)
    work = {"sft": sft_work, "reward": reward_work, "ppo": ppo_work}[stage](policy, args)
    rows = measure(work, args.modes, args.steps, device)
    for row in rows:
        row |= {"size": size, "parameters": policy.num_parameters(), "stage": stage,
                "tokens": work.tokens, "flops": work.flops}
        if "error" not in row:
            seconds = statistics.mean(row["seconds"])
            row |= {"tokens_per_second": work.tokens / seconds,
                    "flops_per_second": work.flops / seconds}
            row["use"] = row["flops_per_second"] / rates[MODES[row["mode"]].dtype]
    return rows


def write_table(rows: list[dict]) -> str:
    """Return the results as Markdown."""
    lines = ["| model | step | mode | tokens | tokens/s | operations, 1e9 | 1e12/s | use |"
             " GPU memory, MiB | first step, s |", "|" + "---|" * 10]
    for row in rows:
        head = f"| {row['size']} | {STAGES[row['stage']]} | {row['mode']} | {row['tokens']} | "
        if "error" in row:
            lines.append(head + f"failed: {row['error'].splitlines()[0][:80]} |" + " |" * 5)
            continue
        memory = "-" if row["memory_mb"] is None else f"{row['memory_mb']:.0f}"
        lines.append(head + f"{row['tokens_per_second']:.0f} | {row['flops'] / 1e9:.1f} | "
                     f"{row['flops_per_second'] / 1e12:.3g} | {row['use']:.0%} | {memory} | "
                     f"{row['first_seconds']:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", choices=[[], *STAGES], default=[], metavar="STAGE",
                        help=f"some of {', '.join(STAGES)}; all if none is named")
    parser.add_argument("--size", nargs="+", choices=SIZES, help="of the models")
    parser.add_argument("--modes", nargs="+", choices=MODES, help="all on a GPU, eager on a CPU")
    for name, text in (("prompt", "tokens of each prompt"), ("response", "tokens of each response"),
                       ("sft-batch", "demonstrations per step"), ("episodes", "of the rollout"),
                       ("reward-batch", f"rankings of {K} per step"),
                       ("minibatches", "optimiser steps over the rollout")):
        parser.add_argument(f"--{name}", type=int, help=text)
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each mode")
    add_common_options(parser, RECORDED / "throughput")
    args = parser.parse_args()
    device, began = begin(args)
    args.stages = args.stages or list(STAGES)
    for name, value in DEFAULTS[device.type].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    rates = {dtype: measure_matmul(device, getattr(torch, dtype))
             for dtype in sorted({MODES[mode].dtype for mode in args.modes})}
    shown = ", ".join(f"{rate / 1e12:.3g}e12/s in {dtype}" for dtype, rate in rates.items())
    rows: list[dict] = []
    for size, stage in itertools.product(args.size, args.stages):
        rows += run_stage(size, stage, args, device, rates)
        text = f"a large matrix product: {shown}\n\n{write_table(rows)}"
        write_result(args.out, "throughput", {"matmul_flops_per_second": rates, "rows": rows},
                     text, provenance(device, args.seed, began))
    print(f"{text}\nwrote {args.out}")


if __name__ == "__main__":
    main()
