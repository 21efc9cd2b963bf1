"""The alignment tax: what does alignment cost on other tasks, and does pretraining text refund it?

Two remedies are compared: a stronger KL penalty, and pretraining text that is mixed into PPO
(PPO-ptx) or already into supervised fine-tuning.
"""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_mini.config import SFTConfig
from rlhf_mini.data import Demonstration, TokenBatch, collate, encode_pair
from rlhf_mini.evaluation import evaluate_zero_shot
from rlhf_mini.experiments.figures import PALETTE, draw_line, new_sheet
from rlhf_mini.experiments.lab import Lab
from rlhf_mini.experiments.study import Study, find_rows
from rlhf_mini.loading import load_policy, save_model
from rlhf_mini.models import compute_response_logprobs, freeze, set_residual_dropout
from rlhf_mini.pretrain import lm_loss
from rlhf_mini.runtime import check_finite, make_generator
from rlhf_mini.sft import compute_sft_loss, sft_loss
from rlhf_mini.training import cosine_lr, epoch_batch

LONGER = 3  # PPO's iterations here, as a multiple of the run's: the tax comes late
TASKS = {"facts": "facts solved", "reading": "reading solved", "summary": "summaries solved",
         "corpus_loss": "corpus loss, nats per token"}  # all but sentiment, which never changes


def _condition(method: str, kl_coef: float = 0.0, ptx_coef: float = 0.0) -> dict:
    return {"method": method, "kl_coef": kl_coef, "ptx_coef": ptx_coef}


BASE, SFT = _condition("base"), _condition("sft")
MIXED = tuple(_condition("mixed_sft", ptx_coef=x) for x in (0.0, 0.3, 1.0, 3.0))
BY_KL = tuple(_condition("ppo", kl_coef=x) for x in (0.0, 0.1, 0.3, 1.0))
BY_PTX = tuple(_condition("ppo", ptx_coef=x) for x in (1.0, 3.0, 10.0))
BOTH = _condition("ppo", 0.3, 1.0)


# ---- supervised fine-tuning with pretraining text ----------------------------------------------


def mixed_loss(policy: PreTrainedModel, batch: TokenBatch, rows: Tensor, ptx_coef: float
               ) -> tuple[Tensor, dict[str, float]]:
    r"""Compute $L_{SFT} + \gamma L_{LM}$: demonstrations, and $\gamma$ times pretraining text.

    Args:
        policy: causal language model.
        batch: B demonstrations.
        rows: (N, L) corpus text.
        ptx_coef: gamma.

    Returns:
        Scalar loss, a sum of two means in nats per token, and stats.
    """
    logprobs, _ = compute_response_logprobs(policy, batch, entropy=False)
    loss, stats = sft_loss(logprobs, batch.response_mask)
    text = lm_loss(policy, rows)
    return loss + ptx_coef * text, {"sft_loss": stats["loss"], "ptx_loss": text.item()}


def train_mixed_sft(
    policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, train: list[Demonstration],
    valid: list[Demonstration], corpus_rows: Tensor, ptx_coef: float, ptx_rows: int,
    config: SFTConfig, seed: int,
) -> list[dict[str, float]]:
    """Fine-tune as `train_sft` does, but with pretraining text in each step and without dropout.

    Pretraining had no dropout either. With `ptx_coef` 0 it is `train_sft` at dropout 0: what the
    other coefficients are to be compared with.

    Args:
        policy: the base model; left at the epoch with the lowest loss on `valid`.
        tokenizer: its tokenizer.
        train: demonstrations to learn from.
        valid: demonstrations to choose the epoch on.
        corpus_rows: (N, L) text, drawn from at random.
        ptx_coef: weight of the text.
        ptx_rows: rows of text per step.
        config: of the rest.
        seed: of both orders.

    Returns:
        The stats of each step.
    """
    limits = config.max_prompt_tokens, config.max_response_tokens
    pairs, valid_pairs = ([encode_pair(tokenizer, d.prompt, d.response, *limits, where=d.id)
                           for d in split] for split in (train, valid))
    lengths = [len(prompt) + len(response) for prompt, response in pairs]
    best, lowest, history = freeze(policy), math.inf, []
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.lr, weight_decay=0.01, fused=True)
    set_residual_dropout(policy, 0.0)
    steps = config.epochs * -(-len(pairs) // config.batch_size)
    for step in range(steps):
        _, chosen, last = epoch_batch(step, lengths, config.batch_size,
                                      lambda epoch: make_generator(seed, "sft", str(epoch)))
        batch = collate([pairs[i] for i in chosen], tokenizer.pad_token_id).to(policy.device)
        index = torch.randint(len(corpus_rows), (ptx_rows,),
                              generator=make_generator(seed, "text", str(step)))
        optimizer.param_groups[0]["lr"] = config.lr * cosine_lr(step, steps)
        optimizer.zero_grad()
        loss, stats = mixed_loss(policy, batch, corpus_rows[index].to(policy.device), ptx_coef)
        check_finite(loss, step, "demonstrations and text")
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        history.append(stats)
        if last:
            valid_loss = compute_sft_loss(policy, valid_pairs, tokenizer.pad_token_id)
            if valid_loss < lowest:
                lowest = valid_loss
                best.load_state_dict(policy.state_dict())
    policy.load_state_dict(best.state_dict())
    return history


# ---- the policies ------------------------------------------------------------------------------


def train_mixed_policy(lab: Lab, ptx_coef: float) -> Path:
    """Fine-tune the base model on demonstrations and text; return the folder of the policy."""
    config, ptx_rows = lab.run.config.sft, lab.run.config.ppo.ptx_rows

    def make(folder: Path) -> None:
        policy, tokenizer = lab.run.policy("base")
        train, valid = (lab.run.demonstrations(split, tokenizer, config)
                        for split in ("train", "valid"))
        train_mixed_sft(policy, tokenizer, train, valid, lab.read_corpus(), ptx_coef, ptx_rows,
                        config, make_generator(lab.seed, "lab mixed sft").initial_seed())
        save_model(policy, tokenizer, folder)

    row_tokens = lab.run.config.pretrain.row_tokens
    return lab.keep("mixed-sft", [asdict(config), ptx_coef, ptx_rows, row_tokens], make)


def make_policy(lab: Lab, condition: dict) -> Path:
    """Return the folder of a condition's policy, trained now unless it was before."""
    if condition["method"] == "base":
        return lab.run.directory / "base"
    if condition["method"] == "sft":
        return lab.policy
    if condition["method"] == "mixed_sft":
        return train_mixed_policy(lab, condition["ptx_coef"])
    reward = lab.train_reward_model(lab.collect("train", lab.run.config.ranking.prompts))
    config = lab.run.config.ppo
    config = replace(config, iterations=LONGER * config.iterations, kl_target=0.0,
                     kl_coef=condition["kl_coef"], ptx_coef=condition["ptx_coef"])
    return lab.train_policy(reward, config)


# ---- the study ---------------------------------------------------------------------------------


def measure_tasks(lab: Lab, policy: Path) -> dict[str, float]:
    """Measure a policy without a chat prompt.

    Returns:
        The shares of items solved, and `corpus_loss` on held-out documents: the keys of TASKS.
    """
    model, tokenizer = load_policy(policy, lab.run.device)
    town = lab.run.town
    results = evaluate_zero_shot(
        model, tokenizer, [item for item in town.zero_shot if item.task in TASKS],
        [d for d in town.documents if d.split == "valid"], lab.run.config.evaluation)
    return {task: results[task]["mean"] for task in TASKS}


def measure(lab: Lab, condition: dict) -> list[dict]:
    """Make the policy, judge its answers to customers, and measure it on the other tasks."""
    policy = make_policy(lab, condition)
    return [lab.judge(policy) | measure_tasks(lab, policy)]


def draw(rows: list[dict]) -> Figure:
    """Draw the gain in gold over SFT against each task; a dashed line marks the base model.

    In the panel of the corpus loss each mean of PPO bears its coefficient.
    """
    figure = new_sheet(5.0)
    *small, wide = TASKS
    panels = figure.subplot_mosaic([small, [wide] * len(small)], sharey=True,
                                   height_ratios=(2, 3))
    lines = {"PPO, KL penalty": BY_KL, "PPO, text": (BY_KL[0], *BY_PTX), "PPO, both": (BOTH,),
             "SFT": (SFT,), "SFT with text": MIXED}
    base = find_rows(rows, BASE)
    for task, title in TASKS.items():
        axes = panels[task]
        axes.axhline(0, lw=0.8, color="#777777")
        if base:
            axes.axvline(sum(r[task] for r in base) / len(base), lw=0.8, ls="--", color="#777777")
        for number, (label, conditions) in enumerate(lines.items()):
            if any(find_rows(rows, c) for c in conditions):
                draw_line(axes, rows, conditions, task, "gain_sampled", label, number)
        axes.locator_params(axis="x", nbins=3 if task in small else 6)
        axes.set_title(title)
    for number, (conditions, name) in enumerate(((BY_KL, "kl_coef"), (BY_PTX, "ptx_coef"))):
        for c in conditions:
            found = find_rows(rows, c)
            if found:
                place = [sum(r[x] for r in found) / len(found) for x in (wide, "gain_sampled")]
                panels[wide].annotate(f"{c[name]:g}", place, xytext=(5, 3), fontsize=8,
                                      textcoords="offset points", color=PALETTE[number])
    figure.supylabel("gain in gold over SFT, T = 1", fontsize=8.5)
    figure.legend(*panels[wide].get_legend_handles_labels(), loc="outside upper center", ncols=3,
                  fontsize=8, frameon=False)
    return figure


STUDY = Study(
    "tax", "What does alignment cost on other tasks, and does pretraining text buy it back?",
    (BASE, SFT, *MIXED, *BY_KL, *BY_PTX, BOTH), measure, draw,
    ("ranking.prompts=1600", "ppo.iterations=12"))
