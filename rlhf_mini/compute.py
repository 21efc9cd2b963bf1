"""How the arithmetic is carried out: precision and compiler."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import cache, wraps

import torch

from rlhf_mini.config import ComputeConfig

# Model class, gradients, dropout, precision, one row or many: each combination is compiled on its
# own, and a run has more than the 8 after which torch would silently go on uncompiled.
USES = 64
_COMPILING: ContextVar[bool] = ContextVar("compiling", default=False)


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
