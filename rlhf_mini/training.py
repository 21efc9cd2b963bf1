"""What every training loop keeps on disk: its metrics and a checkpoint to resume from."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import torch
from torch import nn

from rlhf_mini.processes import is_first
from rlhf_mini.runtime import (
    MetricLog,
    load_checkpoint,
    pack_state,
    read_metrics,
    recover_directory,
    save_checkpoint,
    unpack_state,
)


class TrainingRecord:
    """Metrics and checkpoints of one training loop.

    Everything a loop draws at random follows from seed and step, so models, optimisers, the step
    and a few numbers are all that a resumed loop needs to repeat an unbroken one bit for bit.

    Args:
        directory: holds `metrics.jsonl` and `checkpoint/`; None keeps the metrics in memory only.
        modules: what is trained, by name.
        optimizers: their optimisers, by name.
        every: steps between checkpoints.
    """

    def __init__(
        self, directory: Path | None, modules: dict[str, nn.Module],
        optimizers: dict[str, torch.optim.Optimizer], every: int,
    ):
        self.directory, self.modules, self.optimizers = directory, modules, optimizers
        self.every = every
        self.history: list[dict[str, float]] = []
        self.metric_log = MetricLog(directory / "metrics.jsonl") if directory else None

    def restore(self, **start) -> tuple[int, dict]:
        """Load the checkpoint if there is one.

        Args:
            **start: what the loop keeps besides the models, as it is at step 0.

        Returns:
            The step to go on from (0 without a checkpoint) and the kept numbers.

        Raises:
            CheckpointError: if the checkpoint is damaged or does not fit.
        """
        step = 0
        if self.directory and recover_directory(self.directory / "checkpoint"):
            tensors, meta = load_checkpoint(self.directory / "checkpoint")
            unpack_state(tensors, meta, self.modules, self.optimizers)
            step, start = meta["step"], meta["kept"]
        if self.metric_log:
            self.metric_log.truncate(step)
            self.history = read_metrics(self.metric_log.path)
            if lost := step - len(self.history):
                warnings.warn(f"{self.metric_log.path}: lacks {lost} of the {step} rows before the "
                              "checkpoint; training goes on, its curve has a gap", stacklevel=3)
        return step, start

    def log(self, step: int, **metrics: float) -> None:
        """Keep the metrics of one step, in memory and in `metrics.jsonl`."""
        self.history.append({"step": step, **metrics})
        if self.metric_log:
            self.metric_log.write(step, **metrics)

    def save(self, step: int, **kept) -> None:
        """Write a checkpoint if `step` steps are done and it is time for one."""
        if self.directory and step % self.every == 0:
            tensors, meta = pack_state(self.modules, self.optimizers)
            if is_first():
                save_checkpoint(self.directory / "checkpoint", tensors,
                                meta | {"step": step, "kept": kept})


def cosine_lr(step: int, steps: int, warmup: int = 0, floor: float = 0.1) -> float:
    """Return the factor on the peak learning rate: linear warm-up, then cosine to `floor`.

    Args:
        step: from 0.
        steps: in all.
        warmup: steps of warm-up.
        floor: factor at the end.
    """
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(steps - warmup, 1)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


def warmup_factor(iteration: int, warmup_iterations: int) -> float:
    """Return the factor on the learning rate: from a tenth linearly to 1, then constant.

    Args:
        iteration: from 0.
        warmup_iterations: at which the factor reaches 1.

    Source: InstructGPT, appendix C.4.
    """
    if iteration >= warmup_iterations:
        return 1.0
    return 0.1 + 0.9 * iteration / warmup_iterations


def epoch_batch(
    step: int, lengths: list[int], batch_size: int, generator_of_epoch
) -> tuple[int, list[int], bool]:
    """Say which items step `step` takes, when each epoch visits all items in a new order.

    Items of similar length go together, so that little of a batch is padding: the shuffled items
    are cut into pools of 16 batches, each pool is sorted, and the batches are shuffled again.

    Args:
        step: from 0.
        lengths: of each item, in tokens.
        batch_size: at most so many per step; one batch of an epoch may be smaller.
        generator_of_epoch: epoch -> torch.Generator of its order.

    Returns:
        The epoch, the indices, and whether this is the epoch's last batch.
    """
    per_epoch = -(-len(lengths) // batch_size)
    epoch, index = divmod(step, per_epoch)
    generator = generator_of_epoch(epoch)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    pool = 16 * batch_size
    order = [item for i in range(0, len(order), pool)
             for item in sorted(order[i:i + pool], key=lengths.__getitem__)]
    turn = torch.randperm(per_epoch, generator=generator).tolist()[index]
    return epoch, order[turn * batch_size:(turn + 1) * batch_size], index == per_epoch - 1
