"""How the arithmetic is carried out: precision and compiler."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextvars import ContextVar
from functools import cache, wraps

import torch
from torch.overrides import TorchFunctionMode

from rlhf_mini.config import ComputeConfig

# Model class, gradients, dropout, precision, one row or many: each combination is compiled on its
# own, and a run has more than the 8 after which torch would silently go on uncompiled.
USES = 64
_COMPILING: ContextVar[bool] = ContextVar("compiling", default=False)
_SECOND = ThreadPoolExecutor(1)  # a thread for `side_by_side`; to start one each time takes long


@contextlib.contextmanager
def computing(config: ComputeConfig, device: torch.device) -> Iterator[None]:
    """Run what is inside in the precision, and with the compiler, that the config asks for.

    With bfloat16 the weights, their gradients and the optimiser's state stay float32; matrix
    products round their inputs to 8 bits of precision and add up in float32 (autocast).

    Args:
        config: dtype, compile.
        device: where the models are.

    Raises:
        ValueError: if the device cannot do what is asked for.
    """
    if config.dtype == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ValueError(f"compute.dtype = 'bfloat16': {torch.cuda.get_device_name()} does not "
                         "compute in it; give --set compute.dtype=float32")
    token = _COMPILING.set(config.compile)
    try:
        # No cache of rounded weights: it would outlive an optimiser step.
        with torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16",
                            cache_enabled=False):
            yield
    finally:
        _COMPILING.reset(token)


class _KeepFloat32(TorchFunctionMode):
    """Inside, `tensor.bfloat16()` returns a copy in the precision that the tensor has."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.bfloat16:
            return args[0].clone()
        return function(*args, **(kwargs or {}))


class Muon(torch.optim.Muon):
    """PyTorch's Muon, which on a CPU makes a gradient's matrix orthogonal in float32.

    PyTorch does it in bfloat16. Many CPUs have no arithmetic for that and imitate it, which takes
    many times as long.
    """

    def step(self, closure: Callable | None = None):
        """Take a step, as any optimiser of PyTorch."""
        on_cpu = self.param_groups[0]["params"][0].device.type == "cpu"
        with _KeepFloat32() if on_cpu else contextlib.nullcontext():
            return super().step(closure)


def compilable(function: Callable) -> Callable:
    """Let a function be compiled by torch, for any shapes, where the config asks for it."""
    @cache
    def compiled() -> Callable:
        from torch._dynamo import config as dynamo  # slow to import
        dynamo.recompile_limit = max(dynamo.recompile_limit, USES)
        return torch.compile(function, dynamic=True)

    @wraps(function)
    def choose(*args, **kwargs):
        return (compiled() if _COMPILING.get() else function)(*args, **kwargs)
    return choose


@contextlib.contextmanager
def one_thread(device: torch.device) -> Iterator[bool]:
    """Keep operations from using a CPU's second thread; tell whether there is one.

    For milliseconds after its last operation such a thread looks for the next one, and takes a
    processor away from `side_by_side`.
    """
    spare = device.type == "cpu" and torch.get_num_threads() == 2 and not _COMPILING.get()
    if spare:
        torch.set_num_threads(1)
    try:
        yield spare
    finally:
        if spare:
            torch.set_num_threads(2)


def side_by_side(device: torch.device, first: Callable, second: Callable) -> tuple:
    """Return what two functions return; where a CPU lends two threads, each runs in one of them.

    That is faster for small matrices, which are not worth splitting. More threads than two are
    not dealt out: OpenMP's fall asleep between operations if there are more than processors.

    Args:
        device: where the functions compute.
        first: runs in this thread.
        second: runs in another, with gradients if this thread has them, in the same precision.
    """
    with one_thread(device) as spare:
        if not spare:
            return first(), second()
        precision = torch.autocast("cpu", enabled=torch.is_autocast_enabled("cpu"),
                                   cache_enabled=False)
        gradients = torch.set_grad_enabled(torch.is_grad_enabled())
        found = _SECOND.submit(gradients(precision(second)))
        try:
            return first(), found.result()
        finally:
            wait([found])
