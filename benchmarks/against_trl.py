"""Time SFT, reward model and PPO beside TRL's trainers: same model, data, batches, one run.

    pip install -e '.[test,parity]' -c constraints.txt
    python benchmarks/against_trl.py

The models are made once and saved; each side loads them with its own loader. TRL is timed twice.
"TRL" is what a user gets without further thought: its trainers' defaults, which are bfloat16 (on a
CPU too) and gradient checkpointing, and the activation that GPT-2's own checkpoint names,
`gelu_new`, which transformers computes in eight steps. "TRL, tuned" computes in our precision,
without checkpointing, and with the equal `gelu_pytorch_tanh`, as our loader does by itself.

Each measurement is a process of its own that trains a little to warm up and then is timed; the
sides take turns, so that a slow moment of the machine hits all. The texts are the town's, all
sides get the same token ids. On a CPU the model is a random GPT-2 of 4 layers x 128, on a GPU one
of GPT-2's size (124M), in bfloat16 on all sides. Writes speed.json (every measurement), speed.md
(the table) and manifest.json, after each stage.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from measuring import (
    add_common_options,
    begin,
    gpu_memory_mb,
    provenance,
    ratio_interval,
    show_ratio,
    time_once,
    write_result,
)
from record import RECORDED
from trl_sides import SETTINGS, Bench, K, Setting, make_training, save_models

from rlhf_mini.runtime import peak_memory_mb

SIDES = {"ours": "rlhf-mini", "trl": "TRL", "trl_tuned": "TRL, tuned"}
UNITS = {"ppo": "episodes", "sft": "demonstrations", "reward": f"rankings of {K}"}


def measure(side: str, stage: str, setting: Setting, models: Path, device: torch.device) -> dict:
    """Warm up, train, and return units per second and the peak memory of process and GPU."""
    bench = Bench(setting, models, device, tuned=side == "trl_tuned")
    warm, timed = setting.work[stage]
    with contextlib.redirect_stdout(io.StringIO()):
        make_training(side, stage, bench, warm)[0]()
        train, units = make_training(side, stage, bench, timed)
        seconds = time_once(train, device)
    return {"side": side, "stage": stage, "per_second": units / seconds, "seconds": seconds,
            "peak_memory_mb": peak_memory_mb(), "gpu_memory_mb": gpu_memory_mb(device)}


def in_own_process(side: str, stage: str, setting: str, models: Path, device: torch.device,
                   threads: int) -> dict:
    """Call `measure` in a new process."""
    result = subprocess.run(
        [sys.executable, __file__, "--device", device.type, "--setting", setting,
         "--measure", side, stage, str(models)], text=True, capture_output=True,
        env=os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1",
                          "TOKENIZERS_PARALLELISM": "false"})
    if result.returncode:
        raise RuntimeError(f"{side} {stage} failed:\n{result.stderr[-3000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def summarize(rows: list[dict], stages: list[str]) -> tuple[list[dict], str]:
    """Return mean speeds, our ratio to TRL's with a 95 % interval over processes, and a table.

    Args:
        rows: of `measure`, the sides in turns.
        stages: which to summarise.
    """
    summary = []
    sides = [side for side in SIDES if any(r["side"] == side for r in rows)]
    lines = ["| stage | unit | " + " | ".join(f"{SIDES[s]} /s" for s in sides) + " | "
             + " | ".join(f"ours / {SIDES[s]} [95 %]" for s in sides[1:])
             + " | peak memory, MiB |", "|---|---|" + "---|" * (2 * len(sides))]
    for stage in stages:
        found = {side: [r for r in rows if (r["side"], r["stage"]) == (side, stage)]
                 for side in sides}
        speeds = {side: [r["per_second"] for r in found[side]] for side in sides}
        row = {"stage": stage, "unit": UNITS[stage], "sides": {side: {
            "mean": float(np.mean(speeds[side])),
            "memory_mb": max(r["gpu_memory_mb"] or r["peak_memory_mb"] for r in found[side])}
            for side in sides}}
        for side in sides[1:]:
            row["sides"][side]["ours_over_it"] = ratio_interval(speeds["ours"], speeds[side])
        summary.append(row)
        cells = [f"{row['sides'][s]['mean']:.0f}" for s in sides]
        cells += [show_ratio(row["sides"][s]["ours_over_it"]) for s in sides[1:]]
        cells.append(" : ".join(f"{row['sides'][s]['memory_mb']:.0f}" for s in sides))
        lines.append(f"| {stage} | {UNITS[stage]} | " + " | ".join(cells) + " |")
    return summary, "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", choices=[[], *UNITS], default=[],
                        help=f"some of {', '.join(UNITS)}; all if none is named")
    parser.add_argument("--repeats", type=int, default=5, help="processes per side and stage")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each process")
    parser.add_argument("--setting", choices=SETTINGS, help="sizes (default: the device's)")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    add_common_options(parser, RECORDED / "speed")
    args = parser.parse_args()
    device, began = begin(args)
    setting = args.setting or device.type
    if args.measure:
        side, stage, models = args.measure
        print(json.dumps(measure(side, stage, SETTINGS[setting], Path(models), device)))
        return
    try:
        trl = version("trl")
    except PackageNotFoundError:
        parser.exit(3, "trl is not installed: pip install -e '.[parity]' -c constraints.txt\n")
    rows: list[dict] = []
    done: list[str] = []
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        save_models(SETTINGS[setting], Path(folder))
        for stage in args.stages or list(UNITS):
            try:
                for repeat, side in itertools.product(range(args.repeats), SIDES):
                    rows.append(in_own_process(side, stage, setting, Path(folder), device,
                                               args.threads))
                    print(f"{stage} {repeat + 1}/{args.repeats} {side:9}"
                          f"{rows[-1]['per_second']:8.1f} {UNITS[stage]} per second", flush=True)
            except RuntimeError as error:  # the other stages go on
                failed.append(stage)
                print(error, file=sys.stderr)
                continue
            done.append(stage)
            summary, table = summarize(rows, done)
            manifest = provenance(device, args.seed, began) | {"threads": args.threads}
            manifest["versions"] |= {"trl": trl}
            write_result(args.out, "speed", {"summary": summary, "measurements": rows}, table,
                         manifest)
            print(table)
    if failed:
        parser.exit(1, f"failed: {', '.join(failed)}\n")


if __name__ == "__main__":
    main()
