"""Several processes, one training: data parallelism by Hugging Face accelerate, under torchrun.

    torchrun --nproc_per_node=2 -m rlhf_mini run --out runs/two

Every process holds all models and does all that one process would do, but of each batch it takes
its share only. Gradients are averaged over the processes (PyTorch's DistributedDataParallel), so
that all take the same step. Models are not split over processes (FSDP): sampling, checkpoints and
the average policy read whole weights. The first process writes; what others write is thrown away.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlhf_mini.compute import side_by_side

Step = Callable[[], tuple]  # computes a loss, or several, and their stats


def process_count() -> int:
    """Return how many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def process_index() -> int:
    """Return this process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """Return whether this process is the one that writes and speaks."""
    return process_index() == 0


def join_processes(device: torch.device) -> None:
    """Let the processes that torchrun started find each other; one alone needs nothing.

    Args:
        device: "cpu" (gloo connects) or "cuda" (NCCL connects, one GPU per process).

    Raises:
        ValueError: if accelerate is missing or told to split models (FSDP, DeepSpeed), or there are
            fewer GPUs than processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    for splitter in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{splitter}", "false").lower() in ("true", "1"):
            raise ValueError(f"ACCELERATE_USE_{splitter} is set, and here each process must hold "
                             "whole models: start with torchrun, or accelerate launch --multi_gpu")
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device.type == "cuda" and here > torch.cuda.device_count():
        raise ValueError(f"torchrun started {here} processes here, and there are "
                         f"{torch.cuda.device_count()} GPUs: give --nproc_per_node="
                         f"{torch.cuda.device_count()}, or --device cpu")
    _accelerator(device)


def _accelerator(device: torch.device):
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise ValueError("several processes need accelerate: pip install 'rlhf-mini[multi]'"
                         ) from error
    return Accelerator(cpu=device.type == "cpu", mixed_precision="no")


class _Computed(nn.Module):
    """Whatever is computed inside of its forward pass, with these models."""

    def __init__(self, models: tuple[nn.Module, ...]):
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, compute: Step):
        return compute()


def share_gradients(*models: nn.Module) -> Callable[[Step], tuple]:
    """Return a function that computes losses so that their backward pass averages the gradients.

    Args:
        *models: all that is trained; each of their parameters must take part in it.

    Returns:
        A function that calls the function it is given, which returns one or several scalar losses
        and stats.
    """
    together = _Computed(models)
    if process_count() == 1:
        return together
    return _accelerator(next(together.parameters()).device).prepare_model(together)


def run_backward(losses: Sequence[Tensor]) -> None:
    """Compute the gradients of two scalar losses that train different models."""
    if process_count() > 1:
        sum(losses).backward()  # DDP averages in one pass
    else:
        side_by_side(losses[0].device, *[loss.backward for loss in losses])


def take_share(items):
    """Return every n-th item, a list's or a tensor's row, from this process's number on."""
    return items[process_index()::process_count()]


def check_shares(**sizes: int) -> None:
    """Raise ValueError naming the size that cannot be dealt evenly to the processes."""
    count = process_count()
    for name, size in sizes.items():
        if size % count:
            raise ValueError(f"{name.replace('__', '.')} = {size} cannot be dealt evenly to "
                             f"{count} processes; take a multiple of {count}")


def combine(loss: Tensor, stats: dict[str, float], count: int | Tensor
            ) -> tuple[Tensor, dict[str, float]]:
    r"""Turn means over this process's items into its part of the means over all items.

    DDP averages over W processes, so the mean over all N items is reached by weighting each
    process's mean over its n items with $n W / N$.

    Args:
        loss: scalar, a mean over this process's items.
        stats: means over the same items; names in _min and _max are extremes.
        count: n, of this process.

    Returns:
        The weighted loss, and the stats over all processes.
    """
    if process_count() == 1:
        return loss, stats
    mine = torch.tensor([float(count), *stats.values()], dtype=torch.float64, device=loss.device)
    rows = [torch.empty_like(mine) for _ in range(process_count())]
    dist.all_gather(rows, mine)
    table = torch.stack(rows)
    weights = table[:, 0] / table[:, 0].sum()
    merged = {}
    for name, column in zip(stats, table[:, 1:].T, strict=True):
        kind = name.rpartition("_")[2]
        merged[name] = {"min": column.min(), "max": column.max()}.get(
            kind, (weights * column).sum()).item()
    return loss * (weights[process_index()] * process_count()).to(loss.dtype), merged


def gather(own: object) -> list:
    """Return the objects of all processes, by process number."""
    found: list = [own] * process_count()
    if process_count() > 1:
        dist.all_gather_object(found, own)
    return found


def wait_for_all() -> None:
    """Return when all processes have come here."""
    gather(None)


@contextlib.contextmanager
def first_before_others() -> Iterator[None]:
    """Let the first process through a block of code before the others."""
    if not is_first():
        wait_for_all()
    yield
    if is_first():
        wait_for_all()


@contextlib.contextmanager
def own_folder(folder: Path) -> Iterator[Path]:
    """Give the first process the folder itself, and each other one a copy to be thrown away."""
    wait_for_all()
    if is_first():
        yield folder
    else:
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(shutil.copytree(folder, Path(scratch) / folder.name))
