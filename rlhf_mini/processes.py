"""Several processes, one training: data parallelism by Hugging Face accelerate, under torchrun.

    torchrun --nproc_per_node=2 -m rlhf_mini run --out runs/two

Every process does all that one process would do, but of each batch it takes its share only. The
gradients are averaged over the processes, so that all take the same step. Every process holds all
models (PyTorch's DistributedDataParallel, DDP), or of those that are trained, between the steps, a
part only (`fully_shard`, FSDP), if accelerate is told so:

    accelerate launch --num_processes=2 --use_fsdp -m rlhf_mini run --out runs/split

The first process writes; what others write is thrown away.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlhf_mini.compute import side_by_side

Step = Callable[[], tuple]  # computes a loss, or several, and their stats
FSDP = "ACCELERATE_USE_FSDP"  # set by accelerate launch --use_fsdp


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
        ValueError: if accelerate is missing or told to use DeepSpeed, or there are fewer GPUs than
            processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    if _is_set("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError("ACCELERATE_USE_DEEPSPEED is set, and DeepSpeed is not supported: start "
                         "with torchrun, or with accelerate launch --multi_gpu or --use_fsdp")
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device.type == "cuda" and here > torch.cuda.device_count():
        raise ValueError(f"torchrun started {here} processes here, and there are "
                         f"{torch.cuda.device_count()} GPUs: give --nproc_per_node="
                         f"{torch.cuda.device_count()}, or --device cpu")
    _accelerator(device)


def _is_set(switch: str) -> bool:
    return os.environ.get(switch, "false").lower() in ("true", "1")


def _accelerator(device: torch.device):
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise ValueError("several processes need accelerate: pip install 'rlhf-mini[multi]'"
                         ) from error
    told = os.environ.pop(FSDP, None)  # accelerate connects the processes; `_split` splits
    try:
        return Accelerator(cpu=device.type == "cpu", mixed_precision="no")
    finally:
        if told is not None:
            os.environ[FSDP] = told


class _Computed(nn.Module):
    """Whatever is computed inside of its forward pass, with these models."""

    def __init__(self, models: Sequence[nn.Module]):
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, compute: Step):
        return compute()


class Together:
    """Models that all processes train together; with one process, models as they are.

    Where they are split, a process holds a part of each weight, its gradient and what the optimiser
    keeps about it. For each step all parts come together, and each process leaves with its own.

    Args:
        models: all that is trained; each of their parameters must take part in it.
        optimizers: of these parameters, in the state that training begins with.
    """

    def __init__(
        self, models: Sequence[nn.Module], optimizers: Sequence[torch.optim.Optimizer],
    ):
        self.computed: nn.Module = _Computed(models)
        self.split = process_count() > 1 and _is_set(FSDP)
        if self.split:
            _split(self.computed, optimizers)
        elif process_count() > 1:
            device = next(self.computed.parameters()).device
            self.computed = _accelerator(device).prepare_model(self.computed)

    def __call__(self, compute: Step) -> tuple:
        """Compute losses so that their backward pass averages the gradients over the processes.

        Args:
            compute: returns one or several scalar losses, and stats; so does this.
        """
        return self.computed(compute)

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Let whole weights be read; changes of them are lost, and state dicts hold parts."""
        if self.split:
            self.computed.unshard()
        yield
        if self.split:
            self.computed.reshard()

    def end(self) -> None:
        """Put whole weights into the models, as they were before; the optimisers are done with."""
        whole: dict[nn.Parameter, nn.Parameter] = {}  # tied weights stay tied
        for module in self.computed.modules() if self.split else ():
            for name, part in module.named_parameters(recurse=False, remove_duplicate=False):
                if part not in whole:
                    whole[part] = nn.Parameter(part.full_tensor(), part.requires_grad)
                setattr(module, name, whole[part])


def _split(module: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Deal a module's weights to the processes, and what optimisers keep of them."""
    from torch.distributed.device_mesh import init_device_mesh  # slow to import
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_tensor

    before = dict(module.named_parameters())
    kind = next(iter(before.values())).device.type
    fully_shard(module, mesh=init_device_mesh(kind, (process_count(),)),
                reshard_after_forward=False)
    part_of = {before[name]: part for name, part in module.named_parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"] = [part_of[weight] for weight in group["params"]]
        for weight in list(optimizer.state):
            part = part_of[weight]
            optimizer.state[part] = {
                name: distribute_tensor(value, part.device_mesh, part.placements)
                if getattr(value, "shape", None) == part.shape else value
                for name, value in optimizer.state.pop(weight).items()}


def run_backward(
    together: Together, sides: Sequence[Step], models: Sequence[nn.Module], max_norm: float,
) -> tuple[tuple, tuple]:
    """Compute the gradients of several losses, and clip each model's.

    Args:
        together: the models of all losses.
        sides: each returns a scalar loss and stats. The last two train a model each and run side by
            side, where that is faster.
        models: of the last two.
        max_norm: of each model's gradient.

    Returns:
        The stats of all sides, and the norms of the models' gradients before they were clipped.
    """
    def work(side: Step, model: nn.Module | None = None) -> tuple:
        loss, stats = side()
        loss.backward()
        return stats, None if model is None else clip(model)

    def clip(model: nn.Module) -> Tensor:
        return nn.utils.clip_grad_norm_(model.parameters(), max_norm)

    if process_count() > 1:
        losses, stats = together(lambda: tuple(zip(*[side() for side in sides], strict=True)))
        sum(losses).backward()  # DDP and FSDP average in one pass
        return stats, tuple(clip(model) for model in models)
    device = next(models[0].parameters()).device
    done = [work(side) for side in sides[:-2]] + list(side_by_side(
        device, *[partial(work, *pair) for pair in zip(sides[-2:], models, strict=True)]))
    return tuple(stats for stats, _ in done), tuple(norm for _, norm in done[-2:])


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

    Gradients are averaged over W processes, so the mean over all N items is reached by weighting
    each process's mean over its n items with $n W / N$.

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
