"""Say which kernels take the time of a training step, and of a sampled batch.

    python benchmarks/where_time_goes.py

The models, batches and steps are those of `throughput.py` and `rollout.py`. Writes kernels.json
(for each piece of work the seconds of a run without the profiler, and the seconds of each kernel,
longest first), kernels.md and manifest.json. Where a run outlasts its kernels, a GPU waits.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from measuring import (
    SIZES,
    add_common_options,
    begin,
    build_gpt2,
    provenance,
    time_once,
    write_result,
)
from record import RECORDED
from rollout import make_ways
from throughput import DEFAULTS, MODES, K, ppo_work, reward_work, sft_work
from torch.profiler import ProfilerActivity, profile

from rlhf_mini.compute import computing
from rlhf_mini.runtime import make_generator

WARM_UP, SHOWN = 3, 15  # runs before any is timed, and timed runs; kernels per table
TINY = dict(sft_batch=4, reward_batch=4, episodes=8, minibatches=2, prompt=8, response=8)


def make_work(size: str, args, device: torch.device) -> dict[str, Callable[[], object]]:
    """Return the pieces of work by name: three training steps, and sampling."""
    def model():
        return build_gpt2(size, args.prompt + K * args.response, device, args.seed)

    policy = model()
    prompts = torch.randint(SIZES[size][3], (4 * args.sft_batch, args.prompt), device=device,
                            generator=make_generator(args.seed, "prompts", device=device))
    dtype = MODES[args.mode].dtype
    return {"sft": sft_work(model(), args).step, "reward": reward_work(model(), args).step,
            "ppo": ppo_work(model(), args).step,
            "sampling": make_ways(policy, prompts, args.response, dtype, args.seed)["decode"]}


def list_kernels(work: Callable[[], object], device: torch.device) -> list[dict]:
    """Run a piece of work once under the profiler; return `kernel`, `seconds` and `calls`."""
    gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as found:
        work()
        if gpu:
            torch.cuda.synchronize()
    name = "self_device_time_total" if gpu else "self_cpu_time_total"
    rows = [{"kernel": event.key, "seconds": getattr(event, name) / 1e6, "calls": event.count}
            for event in found.key_averages() if getattr(event, name) > 0]
    return sorted(rows, key=lambda row: -row["seconds"])


def write_table(found: dict[str, dict]) -> str:
    """Return the longest kernels of each piece of work as Markdown."""
    lines = []
    for name, rows in found.items():
        total = sum(row["seconds"] for row in rows["kernels"])
        calls = sum(row["calls"] for row in rows["kernels"])
        lines += [f"{name}: {1e3 * rows['seconds']:.1f} ms, of which {1e3 * total:.1f} ms in "
                  f"{calls} calls of kernels", "",
                  "| share | ms | calls | kernel |", "|---|---|---|---|"]
        lines += [f"| {row['seconds'] / total:.1%} | {1e3 * row['seconds']:.2f} | {row['calls']} "
                  f"| `{row['kernel'][:90]}` |" for row in rows["kernels"][:SHOWN]]
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, help="of the model (GPU: gpt2, CPU: tiny)")
    parser.add_argument("--mode", choices=MODES, default="eager bfloat16")
    add_common_options(parser, RECORDED / "kernels")
    args = parser.parse_args()
    device, began = begin(args)
    gpu = device.type == "cuda"
    args.size = args.size or ("gpt2" if gpu else "tiny")
    for name, value in (DEFAULTS["cuda"] | {"episodes": 64, "minibatches": 1} if gpu
                        else TINY).items():
        vars(args).setdefault(name, value)
    found = {}
    with computing(MODES[args.mode], device):
        for name, work in make_work(args.size, args, device).items():
            for _ in range(WARM_UP):
                work()
            seconds = min(time_once(work, device) for _ in range(WARM_UP))
            found[name] = {"seconds": seconds, "kernels": list_kernels(work, device)}
    text = f"{args.size}, {args.mode}\n\n{write_table(found)}"
    write_result(args.out, "kernels", found, text, provenance(device, args.seed, began))
    print(f"{text}wrote {args.out}")


if __name__ == "__main__":
    main()
