"""Record what SFT does with more, other and worse demonstrations, over several seeds.

    rlhf-mini run --out runs/cpu
    python benchmarks/sft_sweep.py runs/cpu

Starts every time from the base model of the given run and judges on the prompts of its validation
customers, sampled once at T = 1 and greedy. Writes data/recorded/sft/sweep.json: one row per model
with what was changed and what came out, and what made it; rows that are there are kept. A seed
draws the demonstrations, their order and the dropout.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from rlhf_mini.config import RunConfig
from rlhf_mini.data import collate, encode_pair
from rlhf_mini.generation import sample_responses
from rlhf_mini.models import compute_response_logprobs, set_residual_dropout
from rlhf_mini.runtime import make_generator, make_rng, progress, read_json, write_json
from rlhf_mini.sft import compute_sft_loss, sft_loss, train_sft
from rlhf_mini.town.prompts import write_demonstrations
from rlhf_mini.town.responses import SAY_NO, respond
from rlhf_mini.training import cosine_lr, epoch_batch
from rlhf_mini.workspace import Run, grade_prompt

ROOT = Path(__file__).parent.parent
OUT = ROOT / "data" / "recorded" / "sft"


class Bench:
    """The base model, the town and the prompts that judge."""

    def __init__(self, folder: Path):
        self.run = Run(folder, RunConfig())
        self.tokenizer = self.run.policy("base")[1]
        self.config = replace(self.run.config.sft, min_eos_rate=0.0)
        town = self.run.town
        self.train = [p for p in town.prompts if p.split == "train"]
        self.people = [x for x in town.labelers if x.group == "train"]
        self.judged = self.run.prompts("valid", self.tokenizer)
        self.valid = self.run.demonstrations("valid", self.tokenizer, self.config)

    def encode(self, demonstrations) -> list[tuple[list[int], list[int]]]:
        """Return (prompt ids, response ids) of each demonstration."""
        limits = self.config.max_prompt_tokens, self.config.max_response_tokens
        return [encode_pair(self.tokenizer, d.prompt, d.response, *limits, where=d.id)
                for d in demonstrations]

    def fit(self, demonstrations) -> list:
        """Leave out what is too long."""
        limits = self.config.max_prompt_tokens, self.config.max_response_tokens
        return self.run.fit(demonstrations, self.tokenizer, *limits)

    def draw(self, count: int, seed: int) -> list:
        """Return demonstrations as the town's labelers write them; fewer are the first of more."""
        town, config = self.run.town, self.run.town.config
        shares = config.demonstration_errors, config.demonstration_padding
        return self.fit(write_demonstrations(self.train, 1200, self.people, town.world, *shares,
                                             make_rng(seed, "sft-sweep")))[:count]

    def draw_flawless(self, count: int, seed: int, share: float) -> list:
        """Return ideal demonstrations, but a share of those that should say no answer."""
        world, rng = self.run.town.world, make_rng(seed, "sft-say-no")
        drawn = write_demonstrations(self.train, count, self.people, world, 0.0, 0.0, rng)
        prompts = {p.prompt: p for p in self.train}
        changed = []
        for d in drawn:
            prompt, yields = prompts[d.prompt], rng.random() < share
            if prompt.family in SAY_NO and yields:
                text = respond("wrong", prompt.family, prompt.truth, world, rng)
                d = replace(d, response=text)
            changed.append(d)
        return changed

    def measure(self, policy, seed: int, count: int = 400) -> dict[str, float]:
        """Let a policy answer the validation customers, sampled and greedy."""
        results = {}
        for name, temperature in (("sampled", 1.0), ("greedy", 0.0)):
            prompts = self.judged[:count]
            responses = sample_responses(
                policy, self.tokenizer, [p.prompt for p in prompts], max_response_tokens=48,
                batch_size=200, temperature=temperature, generator=make_generator(seed, "sweep"))
            gold = np.array([grade_prompt(p, r.text)["gold"]
                             for p, r in zip(prompts, responses, strict=True)])
            no = np.array([p.family in SAY_NO for p in prompts])
            results |= {f"gold_{name}": gold.mean(), f"perfect_{name}": (gold == 1).mean(),
                        f"says_no_{name}": (gold[no] > 0.5).mean(),
                        f"tokens_{name}": np.mean([len(r.token_ids) for r in responses]),
                        f"eos_rate_{name}": np.mean([r.finished for r in responses])}
        pairs = self.encode(self.valid)
        results["valid_loss"] = compute_sft_loss(policy, pairs, self.tokenizer.pad_token_id)
        return {name: float(value) for name, value in results.items()}

    def finetune(self, pairs, seed: int, epochs: int, dropout: float, after_epoch=None):
        """Fine-tune the base model on pairs for a fixed number of epochs."""
        policy, _ = self.run.policy("base")
        set_residual_dropout(policy, dropout)
        torch.manual_seed(seed)
        config, lengths = self.config, [len(x) + len(y) for x, y in pairs]
        optimizer = torch.optim.AdamW(policy.parameters(), lr=config.lr, weight_decay=0.01)
        steps = epochs * math.ceil(len(pairs) / config.batch_size)
        losses = []
        for step in range(steps):
            epoch, rows, last = epoch_batch(
                step, lengths, config.batch_size,
                lambda epoch: make_generator(seed, "sft", str(epoch)))
            batch = collate([pairs[i] for i in rows], self.tokenizer.pad_token_id)
            optimizer.param_groups[0]["lr"] = config.lr * cosine_lr(step, steps)
            logprobs, _ = compute_response_logprobs(policy.train(), batch)
            loss, _ = sft_loss(logprobs, batch.response_mask)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
            policy.eval()
            if last and after_epoch:
                after_epoch(epoch + 1, policy, float(np.mean(losses)))
                losses = []
        return policy


def scaling(bench: Bench, demonstrations: int, seed: int) -> list[dict]:
    """The package's own SFT on some demonstrations, checkpoint chosen by validation loss."""
    if demonstrations == 0:
        return [{"demonstrations": 0} | bench.measure(bench.run.policy("base")[0], seed)]
    policy, tokenizer = bench.run.policy("base")
    train_sft(policy, tokenizer, bench.draw(demonstrations, seed), bench.valid, bench.config, seed)
    return [{"demonstrations": demonstrations} | bench.measure(policy, seed)]


def say_no(bench: Bench, share: float, seed: int) -> list[dict]:
    """300 flawless demonstrations, but some demonstrators answer where they should say no."""
    pairs = bench.encode(bench.draw_flawless(300, seed, share))
    policy = bench.finetune(pairs, seed, epochs=2, dropout=bench.config.dropout)
    return [{"share": share} | bench.measure(policy, seed)]


def prompt_loss(bench: Bench, kind: str, seed: int) -> list[dict]:
    """300 demonstrations; loss on the response alone, or on all tokens but the first."""
    pairs = bench.encode(bench.draw(300, seed))
    if kind == "all tokens":
        pairs = [(x[:1], x[1:] + y) for x, y in pairs]
    policy = bench.finetune(pairs, seed, epochs=2, dropout=bench.config.dropout)
    return [{"kind": kind} | bench.measure(policy, seed)]


def epochs(bench: Bench, dropout: float, seed: int) -> list[dict]:
    """100 demonstrations for 16 epochs, as many as in InstructGPT."""
    rows, pairs = [], bench.encode(bench.draw(100, seed))

    def look(epoch: int, policy, loss: float) -> None:
        if epoch in (1, 2, 4, 8, 16):
            rows.append({"epoch": epoch, "dropout": dropout, "train_loss": loss}
                        | bench.measure(policy, seed))
    bench.finetune(pairs, seed, 16, dropout, look)
    return rows


def main() -> None:
    """Run all experiments and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a finished run, such as runs/cpu")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(args.run)
    jobs = [job for s in range(3) for job in (
        *((scaling, {"demonstrations": n}, s) for n in (0, 30, 100, 300)),
        *((say_no, {"share": q}, s) for q in (0.0, 0.5, 1.0)),
        *((prompt_loss, {"kind": kind}, s) for kind in ("response", "all tokens")))]
    jobs += [(scaling, {"demonstrations": 1000}, s) for s in range(3)]
    jobs += [(epochs, {"dropout": p}, s) for s in range(3) for p in (0.0, 0.2)]
    made_with = {"base": read_json(args.run / "base" / "stage.json")["fingerprint"],
                 "commands": ["rlhf-mini run --out runs/cpu",
                              "python benchmarks/sft_sweep.py runs/cpu"],
                 "judged_on": f"{len(bench.judged)} prompts of validation customers",
                 "versions": {"torch": torch.__version__}, "threads": 1}
    file, rows = args.out / "sweep.json", {}
    if file.exists() and read_json(file)["manifest"] == made_with:
        rows = read_json(file)["rows"]
    bar = progress(len(jobs), "sweep")
    for job, change, seed in jobs:
        known = rows.setdefault(job.__name__, [])
        if not any({"seed": seed, **change}.items() <= row.items() for row in known):
            known += [{"seed": seed} | row for row in job(bench, seed=seed, **change)]
            known.sort(key=lambda row: (row["seed"], *(row[name] for name in change)))
            write_json(file, {"rows": rows, "manifest": made_with})
        bar.update(1)


if __name__ == "__main__":
    main()
