"""Run one study over its conditions and seeds, in parallel processes, and keep its rows.

A study's results are a folder with `rows.jsonl` (one line per run and measure), `manifest.json`
(what made them) and `figure.png`. Each finished run is written at once, so that a study that was
stopped goes on where it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from rlhf_mini.compute import computing
from rlhf_mini.config import RunConfig
from rlhf_mini.experiments.lab import Lab
from rlhf_mini.files import atomic_write, lock_directory, output_error, read_json, write_json
from rlhf_mini.pipeline import finished_stage, run_stages, versions
from rlhf_mini.report import to_png
from rlhf_mini.runtime import progress
from rlhf_mini.workspace import Run

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Study:
    """A question to the method, and how it is put.

    Attributes:
        name: on the command line, and of the folder of results.
        question: in one sentence.
        conditions: what is compared, each with the same keys; "seed" is not among them.
        measure: makes the runs of one condition and seed; returns one or more rows of measures.
        draw: draws the figure from all rows.
        settings: what a study changes of preset "cpu", to keep it affordable.
    """

    name: str
    question: str
    conditions: tuple[dict, ...]
    measure: Callable[[Lab, dict], list[dict]]
    draw: Callable[[list[dict]], Figure]
    settings: tuple[str, ...] = ()


def run_study(
    study: Study, config: RunConfig, base: Path, out: Path, seeds: int, jobs: int,
    device: torch.device, command: str,
) -> list[dict]:
    """Make the runs of a study that `out` does not hold yet, then draw its figure.

    Args:
        study: which.
        config: all sizes.
        base: folder of a run; its stages up to SFT are made if they are missing.
        out: folder of the results.
        seeds: runs per condition, from seed 0.
        jobs: processes; with more than one, each computes on one thread.
        device: of all models.
        command: for the manifest.

    Returns:
        All rows, those of earlier calls included.

    Raises:
        ValueError: for fewer than 2 seeds, or if `out` holds anything else than this study with
            these settings; nothing is overwritten then.
    """
    if seeds < 2:
        raise ValueError(f"--seeds {seeds}: expected at least 2, an interval over seeds needs them")
    if jobs < 1:
        raise ValueError(f"--jobs {jobs}: expected at least 1")
    settings = {f"{part}.{key}": value for part, values in dataclasses.asdict(config).items()
                for key, value in values.items() if key != "checkpoint_every"}
    rows, manifest = open_results(out, study, settings)
    todo = [(condition, seed) for condition in study.conditions for seed in range(seeds)
            if not find_rows(rows, condition, seed)]
    done = len(study.conditions) * seeds - len(todo)
    if not todo:
        print(f"{study.name}: all {done} runs are in {out}; --out DIR repeats them elsewhere")
        _draw(study, rows, out)
        return rows
    run = Run(base, config, device=device)
    run_stages(run, ["sft"], command)
    manifest |= {"study": study.name, "settings": settings, "command": command,
                 "sft": finished_stage(base / "sft")["fingerprint"], "jobs": jobs,
                 "processors": os.cpu_count(), "device": describe_device(device),
                 "versions": versions(), **source_state()}
    make_folder(out)
    with lock_directory(out):
        write_json(out / "manifest.json", manifest)
        bar, began = progress(done + len(todo), study.name, done), time.monotonic()
        earlier = manifest.get("seconds", 0)
        for condition, seed, new in _carry_out(study, run, todo, jobs):
            rows += [{"seed": seed} | condition | row for row in new]
            write_rows(out / "rows.jsonl", rows)
            manifest["seconds"] = round(earlier + time.monotonic() - began)
            write_json(out / "manifest.json", manifest)
            bar.update(1, seed=seed, **condition)
        bar.close()
        _draw(study, rows, out)
    return rows


def _carry_out(study: Study, run: Run, todo: list, jobs: int
               ) -> Iterator[tuple[dict, int, list[dict]]]:
    if jobs == 1:
        for condition, seed in todo:
            yield condition, seed, work(study, run, condition, seed)
        return
    # Neighbours in `todo` differ in the seed, so they do not make the same models.
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), torch.set_num_threads,
                             (1,)) as pool:
        waiting = {pool.submit(work, study, run, condition, seed): (condition, seed)
                   for condition, seed in todo}
        try:
            for future in as_completed(waiting):
                yield *waiting[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def work(study: Study, run: Run, condition: dict, seed: int) -> list[dict]:
    """Make the runs of one condition and seed; what they print goes to a log in the lab.

    Raises:
        ValueError: naming study, condition and seed, if one of the stages refuses.
    """
    lab = Lab(run, seed, run.directory / "lab" / f"seed-{seed}")
    make_folder(lab.folder)
    log = lab.folder / f"{study.name}.log"
    with log.open("a", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        print(f"--- {study.name} {condition}", flush=True)
        try:
            with computing(run.config.compute, run.device):
                return study.measure(lab, condition)
        except ValueError as error:
            raise ValueError(f"{study.name}, {condition}, seed {seed}: {error} (log: {log}; "
                             "finished runs are kept)") from error


def make_folder(folder: Path) -> None:
    """Make a folder and its parents.

    Raises:
        OutputError: if it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise output_error(folder, error) from error


def _draw(study: Study, rows: list[dict], out: Path) -> None:
    atomic_write(out / "figure.png", to_png(study.draw(rows)))


# ---- results -----------------------------------------------------------------------------------


def open_results(out: Path, study: Study, settings: dict) -> tuple[list[dict], dict]:
    """Read what a folder holds of a study.

    Returns:
        Rows and manifest, both empty if the folder is not there or empty.

    Raises:
        ValueError: if it holds anything else, a broken file, or rows of other settings.
    """
    elsewhere = "choose another --out, or delete it"
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return [], {}
    if not (out / "manifest.json").is_file():
        raise ValueError(f"{out}: holds no manifest.json, so nobody knows what its files are; "
                         f"{elsewhere}")
    manifest = read_json(out / "manifest.json")
    if not isinstance(manifest, dict) or manifest.get("study") != study.name:
        found = manifest.get("study") if isinstance(manifest, dict) else None
        raise ValueError(f"{out}: holds results of {found or 'something else'}, not of "
                         f"{study.name!r}; {elsewhere}")
    old = manifest.get("settings", {})
    changed = [f"{name} {old.get(name)!r} -> {settings.get(name)!r}"
               for name in sorted({*old, *settings}) if old.get(name) != settings.get(name)]
    if changed:
        raise ValueError(f"{out}: its rows were made with other settings ({', '.join(changed)}); "
                         f"{elsewhere}")
    path = out / "rows.jsonl"
    return (read_rows(path, study) if path.exists() else []), manifest


def read_rows(path: Path, study: Study) -> list[dict]:
    """Read a study's rows.

    Raises:
        ValueError: naming file and line, if a row is broken or not of this study.
    """
    rows = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not a whole row ({error.msg}); delete this line, "
                             "and the run is made again") from error
        needed = {"seed", *study.conditions[0]}
        if not isinstance(row, dict) or not needed <= set(row):
            raise ValueError(f"{path}:{number}: expected an object with {', '.join(sorted(needed))}"
                             f", as {study.name!r} writes them")
        rows.append(row)
    return rows


def write_rows(path: Path, rows: list[dict]) -> None:
    """Write rows, one per line, by condition and seed as they came."""
    atomic_write(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))


def find_rows(rows: Sequence[dict], condition: dict, seed: int | None = None) -> list[dict]:
    """Return the rows of a condition, of one seed or of all."""
    wanted = condition if seed is None else condition | {"seed": seed}
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def seed_interval(values: Sequence[float], confidence: float = 0.95) -> dict[str, float]:
    """Return mean and Student's t interval over seeds.

    Args:
        values: one number per seed, at least 2.
        confidence: of the interval.

    Returns:
        `mean`, `low`, `high`.
    """
    from scipy.stats import t  # slow to import
    values = np.asarray(values, dtype=float)
    mean, spread = float(values.mean()), float(values.std(ddof=1))
    half = t.ppf((1 + confidence) / 2, len(values) - 1) * spread / len(values) ** 0.5
    return {"mean": mean, "low": mean - float(half), "high": mean + float(half)}


def over_seeds(rows: Sequence[dict], condition: dict, measure: str) -> dict[str, float]:
    """Return the mean of a condition's measure over seeds, with its interval."""
    return seed_interval([row[measure] for row in find_rows(rows, condition)])


def show_interval(interval: dict[str, float], digits: int = 3) -> str:
    """Return a mean and its interval as text.

    >>> show_interval({"mean": 0.11, "low": -0.0001, "high": 0.2})
    '0.110 [0.000, 0.200]'
    """
    mean, low, high = (f"{interval[name]:z.{digits}f}" for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def effect(rows: Sequence[dict], measure: str, condition: dict, against: dict) -> dict[str, float]:
    """Return the difference of two conditions, paired by seed, with its interval.

    Args:
        rows: of a study.
        measure: name of a column.
        condition: one.
        against: the other.
    """
    ours, theirs = ({row["seed"]: row[measure] for row in find_rows(rows, c)}
                    for c in (condition, against))
    return seed_interval([ours[seed] - theirs[seed] for seed in sorted(ours) if seed in theirs])


# ---- what made them ----------------------------------------------------------------------------


def source_state() -> dict:
    """Say which code made a result: `commit`, and the files `changed` or new since then, by name.

    Where git or its folder is missing, the variable GIT_COMMIT may name the commit; what was
    changed is not known then (None).
    """
    def ask(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True,
                              check=True).stdout

    try:
        changed = ask("status", "--porcelain", "--", "rlhf_mini", "benchmarks").splitlines()
        return {"commit": ask("rev-parse", "HEAD").strip(), "changed": [x[3:] for x in changed]}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": os.environ.get("GIT_COMMIT") or None, "changed": None}


def describe_device(device: torch.device | str) -> str:
    """Return a GPU's name, or the kind of the processor."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({platform.machine()})"
