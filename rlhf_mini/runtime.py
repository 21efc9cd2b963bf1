"""What every stage needs around the arithmetic: seeds, devices, metrics, progress, checkpoints.

Nothing here knows about language models. The safe writing of files is in `rlhf_mini.files` and can
be imported from here.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import sys
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

try:
    import resource
except ImportError:  # Windows
    resource = None

import torch
from torch import Tensor, nn
from tqdm import tqdm

from rlhf_mini.files import (
    CheckpointError,
    OutputError,
    atomic_directory,
    atomic_write,
    check_replaceable,
    fingerprint,
    load_checkpoint,
    lock_directory,
    name_full_folder,
    output_error,
    read_json,
    recover_directory,
    replace_directory,
    save_checkpoint,
    write_json,
)

__all__ = [
    "METRICS", "CheckpointError", "Metric", "MetricLog", "NonFiniteLoss", "OutputError", "Progress",
    "atomic_directory", "atomic_write", "check_finite", "check_replaceable", "fingerprint",
    "load_checkpoint", "lock_directory", "make_generator", "make_rng", "name_full_folder",
    "pack_state", "peak_memory_mb", "progress", "read_json", "read_metrics", "recover_directory",
    "replace_directory", "resolve_device", "save_checkpoint", "unpack_state", "write_json",
]


def peak_memory_mb() -> float:
    """Return the most memory this process has held, in MiB; 0 where the system does not tell."""
    if resource is None:
        return 0.0
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)


class NonFiniteLoss(ValueError):
    """A loss that became NaN or infinite."""


# ---------------------------------------------------------------- seeds and devices

def _seed_of(seed: int, names: tuple[str, ...]) -> int:
    digest = hashlib.sha256(json.dumps([int(seed), *names]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # 63 bits


def make_generator(seed: int, *names: str, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a random generator of its own for one purpose, the same in every process.

    Args:
        seed: the seed of the run.
        *names: what the generator is for, e.g. "ppo", "rollout"; other names, other numbers.
        device: where the numbers are drawn.

    >>> make_generator(0, "a").initial_seed() == make_generator(0, "b").initial_seed()
    False
    """
    return torch.Generator(device=device).manual_seed(_seed_of(seed, names))


def make_rng(seed: int, *names: str) -> random.Random:
    """Return a `random.Random` of its own for one purpose; see `make_generator`."""
    return random.Random(_seed_of(seed, names))


def resolve_device(name: str) -> torch.device:
    """Return the device called "auto", "cpu" or "cuda"; "auto" takes a GPU where there is one.

    Raises:
        ValueError: for another name, or "cuda" where torch sees no GPU.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device {name!r}: expected 'auto', 'cpu' or 'cuda'")
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ValueError(f"device 'cuda': torch {torch.__version__} sees no GPU here; use 'cpu' or "
                         "'auto', or install a CUDA build of torch")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


# ---------------------------------------------------------------- metrics and progress

@dataclass(frozen=True)
class Metric:
    """One entry of the metric glossary (`metrics.toml`)."""

    name: str
    unit: str
    meaning: str
    healthy: str


METRICS: dict[str, Metric] = {name: Metric(name, **entry) for name, entry in tomllib.loads(
    Path(__file__).with_name("metrics.toml").read_text(encoding="utf-8")).items()}


class MetricLog:
    """A `metrics.jsonl`: one line per step, every name of it in `METRICS`, NaN written as null."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def write(self, step: int, **metrics: float | Tensor) -> None:
        """Append one row; tensors must hold one number.

        Raises:
            ValueError: for a name that is not in the glossary; OutputError if it cannot be written.
        """
        unknown = sorted(set(metrics) - set(METRICS))
        if unknown:
            raise ValueError(f"{self.path}: metric {unknown[0]!r} is not in the glossary; "
                             "describe it in rlhf_mini/metrics.toml first")
        row: dict[str, float | None] = {"step": int(step)}
        for name, value in metrics.items():
            number = value.item() if hasattr(value, "item") else value
            row[name] = number if math.isfinite(number) else None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise output_error(self.path.parent, error) from error

    def truncate(self, step: int) -> None:
        """Drop the rows of this and later steps (0: all), and a half-written last line."""
        rows = read_metrics(self.path) if self.path.exists() else []
        kept = [{k: None if v != v else v for k, v in row.items()}
                for row in rows if row["step"] < step]
        atomic_write(self.path, "".join(json.dumps(row) + "\n" for row in kept))


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """Read the rows of a metric log; null becomes NaN, a last line without its end is left out.

    Raises:
        ValueError: naming file and line, for a row that is not JSON or has no step.
    """
    rows = []
    text = Path(path).read_text(encoding="utf-8")
    for number, line in enumerate(text[:text.rfind("\n") + 1].splitlines(), 1):
        try:
            row = json.loads(line)
            row["step"] = int(row["step"])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}:{number}: expected one JSON object with a 'step'") from error
        rows.append({k: math.nan if v is None else v for k, v in row.items()})
    return rows


class Progress:
    """A bar on a terminal, one line that changes in a notebook, elsewhere about 15 plain lines."""

    def __init__(self, total: int, desc: str, start: int = 0) -> None:
        self.total, self.desc, self.start, self.done = max(total, 1), desc, start, start
        self.began, self.reported, self.postfix = time.monotonic(), -1, ""
        self.bar = tqdm(total=total, desc=desc, initial=start, file=sys.stdout, dynamic_ncols=True,
                        leave=True) if sys.stdout.isatty() else None
        self.line = None
        if self.bar is None and hasattr(sys.stdout, "pub_thread"):  # ipykernel's stream
            from IPython.display import display
            self.line = display({"text/plain": desc}, raw=True, display_id=True)
            self.shown = self.began

    def update(self, n: int = 1, **postfix: float) -> None:
        """Count n more steps; `postfix` are the metrics to show."""
        self.done += n
        self.postfix = "  ".join(f"{k} {v:.4g}" if isinstance(v, int | float) else f"{k} {v}"
                                 for k, v in postfix.items())
        if self.bar is not None:
            self.bar.set_postfix_str(self.postfix, refresh=False)
            self.bar.update(n)
        elif self.line is not None:
            if time.monotonic() - self.shown > 0.5 or self.done >= self.total:
                self._redraw()
        elif 15 * self.done // self.total != 15 * (self.done - n) // self.total:
            self._report()

    def _redraw(self) -> None:
        self.shown = time.monotonic()
        self.line.update({"text/plain": tqdm.format_meter(
            self.done, self.total, self.shown - self.began, ncols=88, prefix=self.desc,
            postfix=self.postfix, initial=self.start)}, raw=True)

    def _report(self) -> None:
        self.reported = self.done
        seconds = max(time.monotonic() - self.began, 1e-9)
        rate = (self.done - self.start) / seconds
        left = round((self.total - self.done) / rate) if rate > 0 else 0
        speed = f"{rate:.1f} steps/s" if rate >= 1 else f"{1 / max(rate, 1e-9):.1f} s/step"
        print(f"{self.desc}  {self.done}/{self.total}  {speed}  {left // 60}:{left % 60:02d} left  "
              f"{self.postfix}".rstrip(), flush=True)

    def close(self) -> None:
        """End the bar, or show the last state if it was not shown yet."""
        if self.bar is not None:
            self.bar.close()
        elif self.line is not None:
            self._redraw()
        elif self.reported != self.done:
            self._report()


def progress(total: int, desc: str, start: int = 0) -> Progress:
    """Return a `Progress` over `total` steps, `start` of them done before (on resume)."""
    return Progress(total, desc, start)


def check_finite(loss: Tensor | float, step: int, what: str) -> None:
    """Raise `NonFiniteLoss` naming step and batch unless the loss (a scalar) is finite."""
    value = float(loss.detach() if isinstance(loss, Tensor) else loss)
    if not math.isfinite(value):
        raise NonFiniteLoss(f"step {step}, {what}: loss is {value}; the steps before it spoiled "
                            "the weights, or this batch is bad. Try a lower learning rate")


# ---------------------------------------------------------------- checkpoints

def pack_state(
    modules: dict[str, nn.Module],
    optimizers: dict[str, torch.optim.Optimizer],
    generators: dict[str, torch.Generator] | None = None,
) -> tuple[dict[str, Tensor], dict]:
    """Copy all that training depends on into flat tensors and JSON.

    Weights and buffers (tied ones once), optimiser states, the given generators, and torch's global
    generators, which dropout uses; not modes (train, eval) and schedules that follow from the step.

    Returns:
        The tensors (CPU copies) and the meta data for `save_checkpoint`; add your own keys to meta
        next to "state", such as the step.
    """
    tensors: dict[str, Tensor] = {}
    state: dict[str, dict] = {"tied": {}, "optimizers": {}}
    kept: dict[int, str] = {}
    for name, module in modules.items():
        state.setdefault("modules", {})[name] = []
        for key, value in module.state_dict(keep_vars=True).items():
            full = f"module/{name}/{key}"
            state["modules"][name].append(key)
            if id(value) in kept:
                state["tied"][full] = kept[id(value)]
            else:
                kept[id(value)] = full
                tensors[full] = _copy(value)
    for name, optimizer in optimizers.items():
        saved = optimizer.state_dict()
        scalars: dict[str, dict] = {}
        for index, values in saved["state"].items():
            for key, value in values.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer/{name}/{index}/{key}"] = _copy(value)
                else:
                    scalars.setdefault(str(index), {})[key] = value
        state["optimizers"][name] = {"groups": saved["param_groups"], "scalars": scalars}
    for name, generator in (generators or {}).items():
        tensors[f"generator/{name}"] = generator.get_state()
    for index, value in enumerate(_global_states()):
        tensors[f"global_generator/{index}"] = value
    return tensors, {"state": state}


def unpack_state(
    tensors: dict[str, Tensor],
    meta: dict,
    modules: dict[str, nn.Module],
    optimizers: dict[str, torch.optim.Optimizer],
    generators: dict[str, torch.Generator] | None = None,
) -> None:
    """Put a packed state back, in place, into objects built the same way.

    Raises:
        CheckpointError: if the names or shapes are not those of the packed objects.
    """
    try:
        state = meta["state"]
        wanted = {"modules": modules, "optimizers": optimizers}
        for kind, given in wanted.items():
            if set(state.get(kind, {})) != set(given):
                raise ValueError(f"it holds the {kind} {sorted(state.get(kind, {}))}, "
                                 f"not {sorted(given)}")
        for name, module in modules.items():
            full = {key: f"module/{name}/{key}" for key in state["modules"][name]}
            module.load_state_dict({key: tensors[state["tied"].get(place, place)]
                                    for key, place in full.items()}, strict=True)
        for name, optimizer in optimizers.items():
            _unpack_optimizer(tensors, f"optimizer/{name}/", state["optimizers"][name], optimizer)
        for name, generator in (generators or {}).items():
            generator.set_state(tensors[f"generator/{name}"])
    except (KeyError, ValueError, RuntimeError) as error:
        why = f"it has no {error}" if isinstance(error, KeyError) else error
        raise CheckpointError("the checkpoint does not fit the models of this run (was it made "
                              f"with another config?): {why}") from error
    torch.set_rng_state(tensors["global_generator/0"])
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(devices):
        if f"global_generator/{index + 1}" in tensors:
            torch.cuda.set_rng_state(tensors[f"global_generator/{index + 1}"], index)


def _unpack_optimizer(
    tensors: dict[str, Tensor], prefix: str, saved: dict, optimizer: torch.optim.Optimizer
) -> None:
    values: dict[int, dict] = {int(i): dict(scalars) for i, scalars in saved["scalars"].items()}
    for place, value in tensors.items():
        if place.startswith(prefix):
            index, _, key = place.removeprefix(prefix).partition("/")
            values.setdefault(int(index), {})[key] = value.clone()
    groups = [{key: tuple(v) if isinstance(v, list) and key != "params" else v
               for key, v in group.items()} for group in saved["groups"]]
    optimizer.load_state_dict({"state": values, "param_groups": groups})


def _copy(value: Tensor) -> Tensor:
    if hasattr(value, "full_tensor"):  # split over processes; all of them come here
        value = value.full_tensor()
    return value.detach().to("cpu", copy=True).contiguous()


def _global_states() -> list[Tensor]:
    return [torch.get_rng_state(),
            *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]
