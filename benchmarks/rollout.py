"""Time the sampling of responses: the package's two samplers beside transformers' `generate`.

    python benchmarks/rollout.py                              one size
    python benchmarks/rollout.py --batch 32 256 1024          cost against the batch
    python benchmarks/rollout.py --size gpt2 medium large     cost against the model

The model is a random GPT-2, the prompts are random tokens, all of one length, and no response ends
early: every way computes the same number of tokens at T = 1 from the full distribution. With
bfloat16 each way reads bfloat16 weights. The package also returns the tokens' log-probabilities,
transformers does not. The ways take turns, so that a slow moment hits all of them; a run of each
beforehand (compiling, recording graphs) is reported and not counted.

`decode` must read all weights and all filled slots of its cache in every step. The time that takes
at the speed of a large copy is the least a step could need: time over it is the distance to go.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable

import torch
from measuring import (
    SIZES,
    add_common_options,
    begin,
    build_gpt2,
    forget_peak_memory,
    gpu_memory_mb,
    measure_bandwidth,
    provenance,
    ratio_interval,
    show_ratio,
    time_once,
    write_result,
)
from record import RECORDED
from torch import Tensor
from transformers import GenerationConfig, GPT2LMHeadModel

from rlhf_mini.compute import computing
from rlhf_mini.config import ComputeConfig
from rlhf_mini.decoding import decode
from rlhf_mini.generation import generate
from rlhf_mini.runtime import make_generator

WAYS = {"decode": "`decoding.decode`", "generate": "`generation.generate`, the plain loop",
        "transformers": "transformers `generate`",
        "static": "transformers `generate`, static cache, compiled"}
NO_TOKEN = -1  # an EOS that is never sampled
DEFAULTS = {"cuda": dict(size=["gpt2"], batch=[256], prompt=64, response=[64], dtype="bfloat16",
                         ways=["decode", "generate", "transformers", "static"]),
            "cpu": dict(size=["small"], batch=[64], prompt=16, response=[16], dtype="float32",
                        ways=["decode", "generate", "transformers"])}


def make_ways(policy: GPT2LMHeadModel, prompt_ids: Tensor, response_tokens: int, dtype: str,
              seed: int) -> dict[str, Callable[[], Tensor]]:
    """Return functions that sample responses (B, T), by name.

    Args:
        policy: in float32.
        prompt_ids: (B, P).
        response_tokens: T.
        dtype: "float32" or "bfloat16".
        seed: of the samples.
    """
    device = policy.device
    mask = torch.ones_like(prompt_ids, dtype=torch.bool)
    noise = torch.rand(len(prompt_ids), response_tokens, device=device,
                       generator=make_generator(seed, "noise", device=device))
    same = dict(max_response_tokens=response_tokens, eos_id=NO_TOKEN, pad_id=0, noise=noise)
    rounded = policy if dtype == "float32" else copy.deepcopy(policy).to(getattr(torch, dtype))

    def ours() -> Tensor:
        with computing(ComputeConfig(dtype=dtype), device):
            return decode(policy, prompt_ids, mask, **same)[0]

    def theirs(**kwargs) -> Tensor:
        config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                                  max_new_tokens=response_tokens, pad_token_id=0, **kwargs)
        found = rounded.generate(prompt_ids, attention_mask=mask.long(), generation_config=config)
        return found[:, prompt_ids.shape[1]:]

    def static() -> Tensor:
        more = {}
        if device.type == "cpu":  # transformers compiles on its own on a GPU only
            from transformers import CompileConfig
            more["compile_config"] = CompileConfig(mode="default")
            more["compile_config"]._compile_all_devices = True
        return theirs(cache_implementation="static", **more)

    return {"decode": ours, "generate": lambda: generate(rounded, prompt_ids, mask, **same)[0],
            "transformers": theirs, "static": static}


def measure(policy: GPT2LMHeadModel, prompt_ids: Tensor, response_tokens: int, dtype: str,
            names: list[str], repeats: int, seed: int) -> list[dict]:
    """Time all ways in turns.

    Returns:
        Per way `way`, `tokens_per_second` (one per repeat), `first_call_seconds` and `memory_mb`,
        or `way` and `error`.
    """
    device, shape = policy.device, (len(prompt_ids), response_tokens)
    ways = make_ways(policy, prompt_ids, response_tokens, dtype, seed)
    rows: dict[str, dict] = {}
    for name in names:
        forget_peak_memory(device)
        try:
            found: list[Tensor] = []
            seconds = time_once(lambda name=name, found=found: found.append(ways[name]()), device)
            if found[0].shape != shape:
                raise RuntimeError(f"gave responses of shape {tuple(found[0].shape)}, not {shape}")
            rows[name] = {"way": name, "first_call_seconds": seconds,
                          "memory_mb": gpu_memory_mb(device), "tokens_per_second": []}
        except Exception as error:  # one way's trouble is not the others'
            rows[name] = {"way": name, "error": f"{type(error).__name__}: {error}"[:500]}
    for _ in range(repeats):
        for name in names:
            if "error" not in rows[name]:
                seconds = time_once(ways[name], device)
                rows[name]["tokens_per_second"].append(shape[0] * shape[1] / seconds)
    return list(rows.values())


def count_bytes(policy: GPT2LMHeadModel, rows: int, prompt: int, response: int, width: int) -> dict:
    """Return the bytes that the mean step of decoding must read: the weights, and the cache.

    The embedding of the tokens is the output layer too, so it counts; positions do not.

    Args:
        policy: the model.
        rows: B.
        prompt: P, tokens.
        response: T, tokens; the mean step sees P + T/2.
        width: bytes per number.
    """
    config = policy.config
    weights = sum(p.numel() for p in policy.parameters()) - policy.transformer.wpe.weight.numel()
    cache = rows * (prompt + response / 2) * 2 * config.n_embd * config.n_layer
    return {"weights_bytes": weights * width, "cache_bytes": int(cache * width)}


def summarize(rows: list[dict]) -> list[dict]:
    """Add to each way its mean speed and the ratio of decode's speed to it."""
    base = next((r for r in rows if r["way"] == "decode" and "error" not in r), None)
    for row in rows:
        if "error" not in row:
            row["mean"] = statistics.mean(row["tokens_per_second"])
            if base and row is not base:
                row["decode_over_it"] = ratio_interval(base["tokens_per_second"],
                                                       row["tokens_per_second"])
    return rows


def run_point(size: str, batch: int, prompt: int, response: int, args, device: torch.device,
              bandwidth: float) -> dict:
    """Measure one model, batch and length."""
    policy = build_gpt2(size, prompt + response, device, args.seed)
    prompt_ids = torch.randint(SIZES[size][3], (batch, prompt), device=device,
                               generator=make_generator(args.seed, "prompts", device=device))
    rows = summarize(measure(policy, prompt_ids, response, args.dtype, args.ways, args.repeats,
                             args.seed))
    point = {"size": size, "parameters": sum(p.numel() for p in policy.parameters()),
             "batch": batch, "prompt": prompt, "response": response, "ways": rows}
    point |= count_bytes(policy, batch, prompt, response, 4 if args.dtype == "float32" else 2)
    point["weights_ms"] = 1e3 * point["weights_bytes"] / bandwidth
    point["least_step_ms"] = point["weights_ms"] + 1e3 * point["cache_bytes"] / bandwidth
    for row in rows:
        if "mean" in row:
            row["step_ms"] = 1e3 * batch / row["mean"]
    return point


def list_points(sizes: list[str], batches: list[int], responses: list[int]) -> list[tuple]:
    """Return (size, batch, response): the first of each, then one of them varied at a time.

    >>> list_points(["a", "b"], [1, 2], [8])
    [('a', 1, 8), ('b', 1, 8), ('a', 2, 8)]
    """
    first = sizes[0], batches[0], responses[0]
    return list(dict.fromkeys([*((size, *first[1:]) for size in sizes),
                               *((first[0], batch, first[2]) for batch in batches),
                               *((*first[:2], response) for response in responses)]))


def write_table(points: list[dict]) -> str:
    """Return the results as Markdown."""
    lines = ["| model | batch | tokens | sampled by | tokens/s | decode / it [95 %] | ms per step |"
             " weights read, ms | weights and cache, ms | step / that |", "|" + "---|" * 10]
    for point in points:
        for row in point["ways"]:
            head = (f"| {point['size']} | {point['batch']} | {point['prompt']} + "
                    f"{point['response']} | {WAYS[row['way']]} | ")
            if "error" in row:
                lines.append(head + f"failed: {row['error'].splitlines()[0][:80]} |" + " |" * 5)
                continue
            ratio = show_ratio(row["decode_over_it"]) if "decode_over_it" in row else "-"
            lines.append(head + f"{row['mean']:.0f} | {ratio} | {row['step_ms']:.3f} | "
                         f"{point['weights_ms']:.3f} | {point['least_step_ms']:.3f} | "
                         f"{row['step_ms'] / point['least_step_ms']:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", nargs="+", choices=SIZES, help="of the models")
    parser.add_argument("--batch", nargs="+", type=int, help="responses at a time")
    parser.add_argument("--prompt", type=int, help="tokens of each prompt")
    parser.add_argument("--response", nargs="+", type=int, help="tokens of each response")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"])
    parser.add_argument("--ways", nargs="+", choices=WAYS,
                        help="what to time; static is left out on a CPU: compiling takes minutes")
    parser.add_argument("--repeats", type=int, default=5, help="of each way, in turns")
    add_common_options(parser, RECORDED / "rollout")
    args = parser.parse_args()
    device, began = begin(args)
    for name, value in DEFAULTS[device.type].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    bandwidth = measure_bandwidth(device)
    points: list[dict] = []
    for size, batch, response in list_points(args.size, args.batch, args.response):
        points.append(run_point(size, batch, args.prompt, response, args, device, bandwidth))
        text = (f"{args.dtype}, a large copy moves {bandwidth / 1e9:.0f} GB/s\n\n"
                + write_table(points))
        write_result(args.out, "rollout",
                     {"dtype": args.dtype, "bytes_per_second": bandwidth, "points": points}, text,
                     provenance(device, args.seed, began))
    print(f"{text}\nwrote {args.out}")


if __name__ == "__main__":
    main()
