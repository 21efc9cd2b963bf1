"""What the speed benchmarks share: models of known sizes, a clock, ceilings, intervals, provenance.

A GPU works behind the program's back, so its clock is read after all work is done. The two ceilings
are measured where they are used: how fast memory is copied, and how fast large matrices are
multiplied.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

from rlhf_mini.experiments.study import describe_device, source_state
from rlhf_mini.pipeline import versions
from rlhf_mini.runtime import atomic_write, resolve_device, write_json

# layers, hidden, heads, vocabulary
SIZES = {"tiny": (2, 32, 2, 1024), "small": (4, 128, 4, 1024), "gpt2": (12, 768, 12, 50257),
         "medium": (24, 1024, 16, 50257), "large": (36, 1280, 20, 50257)}


def build_gpt2(size: str, context: int, device: torch.device, seed: int = 0) -> GPT2LMHeadModel:
    """Return a random GPT-2 in float32, dropout off, that knows no EOS token.

    Args:
        size: a name in `SIZES`.
        context: longest sequence, in tokens.
        device: where it goes.
        seed: of the weights.
    """
    layers, hidden, heads, vocabulary = SIZES[size]
    config = GPT2Config(
        vocab_size=vocabulary, n_positions=context, n_embd=hidden, n_layer=layers, n_head=heads,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, activation_function="gelu_pytorch_tanh",
        bos_token_id=None, eos_token_id=None, pad_token_id=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config).to(device).eval()


def finish_work(device: torch.device) -> None:
    """Wait until the device has done all it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_once(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that `work` takes, all of it."""
    finish_work(device)
    began = time.perf_counter()
    work()
    finish_work(device)
    return time.perf_counter() - began


def time_best(work: Callable[[], object], device: torch.device, repeats: int = 10) -> float:
    """Return the fewest seconds of several runs, after one that is not counted: a ceiling."""
    work()
    return min(time_once(work, device) for _ in range(repeats))


def forget_peak_memory(device: torch.device) -> None:
    """Let `gpu_memory_mb` begin anew."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def gpu_memory_mb(device: torch.device) -> float | None:
    """Return the most memory that tensors held on a GPU, in MiB; None on a CPU.

    A process's memory on a CPU has no such peak that could be set back.
    """
    if device.type != "cuda":
        return None
    return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)


def measure_bandwidth(device: torch.device) -> float:
    """Return bytes per second of a large copy, bytes read and bytes written both counted."""
    size = 2**30 if device.type == "cuda" else 2**27
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / time_best(lambda: target.copy_(source), device)


def measure_matmul(device: torch.device, dtype: torch.dtype) -> float:
    """Return operations per second of a large matrix product, additions and products counted."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in "ab")
    out: Tensor = torch.empty_like(a)
    return 2 * n**3 / time_best(lambda: torch.mm(a, b, out=out), device)


def ratio_interval(ours: list[float], theirs: list[float]) -> dict[str, float | None]:
    """Return the geometric mean of paired ratios with Student's 95 % interval.

    Args:
        ours: speeds, in the order of measurement.
        theirs: the speeds measured beside them.

    Returns:
        `ratio`, `low` and `high`; the last two are None for a single pair.
    """
    logs = np.log(np.array(ours) / np.array(theirs))
    if len(logs) < 2:
        return {"ratio": float(np.exp(logs.mean())), "low": None, "high": None}
    half = stats.t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / len(logs) ** 0.5
    low, ratio, high = np.exp(logs.mean() + half * np.array([-1, 0, 1]))
    return {"ratio": float(ratio), "low": float(low), "high": float(high)}


def show_ratio(row: dict) -> str:
    """Return `ratio_interval`'s result as text."""
    interval = "" if row["low"] is None else f" [{row['low']:.2f}, {row['high']:.2f}]"
    return f"{row['ratio']:.2f}{interval}"


def add_common_options(parser, out: Path) -> None:
    """Add the options that all speed benchmarks have."""
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and tokens")
    parser.add_argument("--out", type=Path, default=out, help="folder of the results")


def begin(args) -> tuple[torch.device, float]:
    """Return the device that was asked for, and the time; silence transformers."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return resolve_device(args.device), time.monotonic()


def provenance(device: torch.device, seed: int, began: float) -> dict:
    """Say what made the numbers of this process.

    Args:
        device: the models' device.
        seed: of weights and tokens.
        began: from `time.monotonic`.
    """
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    return {"command": command, **source_state(), "device": describe_device(device),
            "threads": torch.get_num_threads(), "processors": os.cpu_count(),
            "versions": versions(), "seed": seed, "seconds": round(time.monotonic() - began, 1)}


def write_result(out: Path, name: str, result: dict, text: str, manifest: dict) -> None:
    """Write NAME.json, NAME.md and manifest.json."""
    write_json(out / f"{name}.json", result)
    atomic_write(out / f"{name}.md", text + "\n")
    write_json(out / "manifest.json", manifest)
