"""The stages joined: what runs, what is kept, what goes on where it stopped, and the report.

Each stage works in `DIR/.NAME.work` and is moved to `DIR/NAME` when it is complete, so a finished
stage is there until its replacement is. `stage.json` holds the settings that the result depends on
(its own and those of all stages before it); as long as they are the same, a stage is not run again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch

import rlhf_mini
from rlhf_mini import processes
from rlhf_mini.compute import computing
from rlhf_mini.config import RunConfig
from rlhf_mini.report import write_report
from rlhf_mini.runtime import (
    check_replaceable,
    fingerprint,
    lock_directory,
    name_full_folder,
    output_error,
    peak_memory_mb,
    read_json,
    recover_directory,
    replace_directory,
    write_json,
)
from rlhf_mini.stages import (
    run_base,
    run_evaluation,
    run_ppo,
    run_rankings,
    run_reward,
    run_sft,
    run_town,
)
from rlhf_mini.workspace import Run, in_round


@dataclass(frozen=True)
class Stage:
    """One stage of the plan.

    Attributes:
        name: of the stage and its folder.
        inputs: the stages it reads.
        settings: what its result depends on besides them.
        run: fills the folder it is given and returns one line about the result.
    """

    name: str
    inputs: tuple[str, ...]
    settings: dict[str, object] = field(hash=False)
    run: Callable[[Run, Path], str]


def plan_stages(run: Run) -> list[Stage]:
    """List all stages of a run in their order; config, seed, rounds and sources decide."""
    def parts(*names: str, without: tuple[str, ...] = ()) -> dict[str, object]:
        return {"seed": run.seed} | {
            f"{name}.{key}": value for name in (*names, "compute")
            for key, value in dataclasses.asdict(getattr(run.config, name)).items()
            if key not in ("checkpoint_every", *without)}

    def source(name: str) -> dict[str, object]:
        given = run.sources.get(name)
        path = Path(given).expanduser() if given else None
        return {name: fingerprint(path) if path and path.exists() else given} if given else {}

    town = {k: v for k, v in parts("town").items() if k.startswith("town.")}
    base = source("model") or parts("pretrain") | source("corpus")
    stages = [Stage("town", (), town, run_town), Stage("base", ("town",), base, run_base),
              Stage("sft", ("base",), parts("sft") | source("demonstrations"), run_sft)]
    models, pairs, start = ["base", "sft"], [("sft", "base")], "sft"
    for number in range(1, run.rounds + 1):
        rankings, reward, ppo = (in_round(n, number) for n in ("rankings", "reward", "ppo"))
        given = source("rankings") if number == 1 else {}
        earlier = [in_round(n, number - 1) for n in ("rankings", "reward")] if number > 1 else []
        stages += [
            Stage(rankings, ("town",) if given else (start,), parts("ranking") | given,
                  partial(run_rankings, start=start, number=number)),
            Stage(reward, ("sft", rankings, *earlier), parts("reward"),
                  partial(run_reward, number=number)),
            Stage(ppo, (start, reward),
                  parts("ppo", without=("ptx_coef", "ptx_rows")) | source("prompts"),
                  partial(run_ppo, start=start, number=number))]
        models, pairs = [*models, ppo], [*pairs, (ppo, "sft")]
        if number > 1:
            pairs.append((ppo, start))
        elif run.config.ppo.ptx_coef > 0:
            rows = source("corpus") | {"pretrain.row_tokens": run.config.pretrain.row_tokens}
            stages.append(Stage("ppo_ptx", (start, reward), parts("ppo") | rows | source("prompts"),
                                partial(run_ppo, start=start, number=number, ptx=True)))
            models, pairs = [*models, "ppo_ptx"], [*pairs, ("ppo_ptx", "sft")]
        start = ppo
    settings = {"models": models} | parts("evaluation") | source("prompts") | source("corpus")
    stages.append(Stage("evaluation", (*models, "reward"), settings,
                        partial(run_evaluation, models=models, pairs=pairs)))
    return stages


def select_stages(stages: list[Stage], targets: list[str]) -> list[Stage]:
    """Return the target stages and all that they need, in order."""
    by_name, wanted, open_names = {s.name: s for s in stages}, set(), list(targets)
    while open_names:
        name = open_names.pop()
        wanted.add(name)
        open_names += by_name[name].inputs
    return [s for s in stages if s.name in wanted]


def settings_of(stage: Stage, stages: list[Stage]) -> dict[str, object]:
    """Return all settings that a stage's result depends on, those of earlier stages included."""
    settings: dict[str, object] = {"version": rlhf_mini.__version__}
    for needed in select_stages(stages, [stage.name]):
        settings |= needed.settings
    return settings


def run_stages(
    run: Run, targets: list[str], command: str = "", resume: bool = False,
    force: tuple[str, ...] = (),
) -> None:
    """Run the target stages, and those before them as far as they are not done.

    Args:
        run: settings and folder.
        targets: names of stages.
        command: how the run was started, for the record.
        resume: go on from the checkpoint of a stage that was stopped.
        force: stages to run even if nothing changed.

    Raises:
        ValueError: if a stopped stage was started with other settings, or the folder cannot be
            written.
    """
    try:
        run.directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise output_error(run.directory, error) from error
    with lock_directory(run.directory) if processes.is_first() else contextlib.nullcontext():
        _run_stages(run, targets, command, resume, force)


def _run_stages(run: Run, targets: list[str], command: str, resume: bool, force) -> None:
    stages = plan_stages(run)
    plan = select_stages(stages, targets)
    settings = {stage.name: settings_of(stage, stages) for stage in plan}
    marks = {name: fingerprint(name, values) for name, values in settings.items()}
    with processes.first_before_others():  # it may have to move an interrupted folder back
        if resume:
            _refuse_other_settings(run, settings)
        done = {name for name, mark in marks.items() if name not in force
                and (finished_stage(run.directory / name) or {}).get("fingerprint") == mark}
        for name in marks:
            if name in done:
                check_sizes(run.directory / name)
            else:
                check_replaceable(run.directory / name, "stage.json")
    for kind in ("corpus", "demonstrations", "rankings", "prompts"):  # bad data now, not later
        if any(kind in stage.settings for stage in plan if stage.name not in done):
            run.user_records(kind)
    for number, stage in enumerate(plan, start=1):
        run.label = f"[{number}/{len(plan)}] {stage.name}"
        if stage.name in done:
            run.say("unchanged, not run again")
        else:
            state = {"stage": stage.name, "fingerprint": marks[stage.name],
                     "settings": settings[stage.name]}
            _run_stage(run, stage, state, command, resume)


def finished_stage(folder: Path) -> dict | None:
    """Return the `stage.json` of a finished stage, or None if the folder holds none."""
    if not recover_directory(folder) or not (folder / "stage.json").exists():
        return None
    state = _read_state(folder)
    return state if state["finished"] else None


def check_sizes(folder: Path) -> None:
    """Raise ValueError if a file of a finished stage is missing or has not its size."""
    for name, size in _read_state(folder).get("sizes", {}).items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size:
            why = "is missing" if found is None else f"has {found} bytes and not {size}"
            raise _damaged(folder, f"{name} {why}")


def _read_state(folder: Path) -> dict:
    try:
        state = read_json(folder / "stage.json")
    except ValueError as error:
        raise _damaged(folder, str(error)) from error
    if not isinstance(state, dict) or not {"finished", "fingerprint", "settings"} <= set(state):
        raise _damaged(folder, "stage.json lacks what a stage writes there")
    return state


def _damaged(folder: Path, why: str) -> ValueError:
    return ValueError(f"{folder} is damaged: {why}; delete this folder to run the stage again")


def _changes(work: Path, settings: dict[str, object]) -> str:
    """Say in which settings a stopped stage differs from what is asked now."""
    old = _read_state(work)["settings"]
    return "; ".join(f"{name} was {old.get(name)!r}, is {settings.get(name)!r}"
                     for name in sorted({*old, *settings}) if old.get(name) != settings.get(name))


def _refuse_other_settings(run: Run, settings: dict[str, dict]) -> None:
    for name, values in settings.items():
        work = run.directory / f".{name}.work"
        if (work / "stage.json").exists() and (changes := _changes(work, values)):
            raise ValueError(f"--resume: {name} in {run.directory} was begun with other settings: "
                             f"{changes}. Give the same settings, or leave --resume out to start "
                             f"{name} again")


def _run_stage(run: Run, stage: Stage, state: dict, command: str, resume: bool) -> None:
    work, began = run.directory / f".{stage.name}.work", time.monotonic()
    resumed = resume and (work / "stage.json").exists()
    if processes.is_first():
        if resumed:
            run.say("going on where it stopped")
        elif work.exists():
            run.say("was stopped before it was complete; starting again, as --resume was not given")
            shutil.rmtree(work)
        write_json(work / "stage.json", state | {"finished": False})
    with name_full_folder(run.directory), processes.own_folder(work) as folder, computing(
            run.config.compute, run.device):
        summary = stage.run(run, folder)
    if processes.is_first():
        _finish_stage(run, work, state | {
            "resumed": resumed, "seconds": round(time.monotonic() - began, 2), "summary": summary,
            "command": command})
    processes.wait_for_all()


def _finish_stage(run: Run, work: Path, state: dict) -> None:
    write_json(work / "stage.json", state | {
        "finished": True, "config": dataclasses.asdict(run.config), "seed": run.seed,
        "rounds": run.rounds, "sources": run.sources, "versions": versions(),
        "threads": torch.get_num_threads(), "processes": processes.process_count(),
        "device": str(run.device), "peak_memory_mb": peak_memory_mb(), "sizes": {
            file.relative_to(work).as_posix(): file.stat().st_size
            for file in sorted(work.rglob("*")) if file.is_file()
            and file.name != "stage.json" and file.parent.name != "checkpoint"}})
    shutil.rmtree(work / "checkpoint", ignore_errors=True)
    replace_directory(work, run.directory / state["stage"])
    run.say(f"done in {state['seconds']:.1f} s: {state['summary']}")


def versions() -> dict[str, str]:
    """Return the versions that a result may depend on."""
    names = ("torch", "transformers", "tokenizers", "numpy")
    return {"rlhf_mini": rlhf_mini.__version__, "python": platform.python_version()} | {
        name: version(name) for name in names}


# ---- the report --------------------------------------------------------------------------------


def build_report(directory: Path) -> dict:
    """Join what the stages of a finished run measured.

    Args:
        directory: of the run.

    Raises:
        ValueError: if the evaluation has not been run.
    """
    state = _state_of(directory, "evaluation")
    run = Run(directory, config_from(state["config"]), state["seed"], rounds=state["rounds"],
              sources=state["sources"])
    states = {stage.name: _state_of(directory, stage.name) for stage in plan_stages(run)}
    seconds = {name: s["seconds"] for name, s in states.items()}
    report = {key: state[key] for key in ("command", "config", "seed", "rounds", "sources",
                                          "versions", "threads", "device")}
    report |= {
        "seconds": seconds | {"total": round(sum(seconds.values()), 2)},
        "models": state["settings"]["models"],
        "peak_memory_mb": max(s["peak_memory_mb"] for s in states.values()),
        "resumed": sorted(name for name, s in states.items() if s["resumed"]),
    } | read_json(directory / "evaluation" / "evaluation.json")
    for number in range(1, run.rounds + 1):
        report[in_round("reward_model", number)] = read_json(
            directory / in_round("reward", number) / "reward.json")
    return report


def _state_of(directory: Path, name: str) -> dict:
    if (state := finished_stage(directory / name)) is None:
        raise ValueError(f"{directory}: no finished {name} there; `rlhf-mini run --out "
                         f"{directory}` makes one")
    return state


def config_from(values: dict[str, dict]) -> RunConfig:
    """Return the settings that a `stage.json` or a report holds as `config`."""
    parts = {f.name: type(getattr(RunConfig(), f.name)) for f in dataclasses.fields(RunConfig)}
    try:
        return RunConfig(**{name: kind(**values[name]) for name, kind in parts.items()})
    except (TypeError, KeyError) as error:
        raise ValueError(f"the run was made by another version of rlhf-mini ({error}); "
                         "run it again") from error


def report_run(directory: Path) -> None:
    """Write `report.json` and `report.html`, and print the main table."""
    report = build_report(directory)
    write_json(directory / "report.json", report)
    write_report(directory)
    print(f"\n{format_table(report)}\n\nreport: {directory / 'report.html'} "
          f"({report['seconds']['total']:.0f} s in all)")


def format_table(report: dict) -> str:
    """Return the main results as text, one line per model."""
    def interval(value: dict | None) -> str:
        return f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]" if value else "-"

    rows = [("model", "gold sampled", "gold greedy", "win rate over SFT", "RM score", "KL", "EOS",
             "tokens")]
    for model in report["models"]:
        modes = report["eval"][model]
        sampled = modes["sampled"]
        wins = report.get("win_rate", {}).get(f"{model}_vs_sft", {}).get("sampled")
        rows.append((model, interval(sampled.get("gold")), interval(modes["greedy"].get("gold")),
                     interval(wins), f"{sampled['rm_score']['mean']:.2f}",
                     f"{sampled['kl']['mean']:.2f}", f"{sampled['eos_rate']['mean']:.3f}",
                     f"{sampled['response_tokens']['mean']:.1f}"))
    columns = [column for column in zip(*rows, strict=True) if set(column[1:]) != {"-"}]
    padded = [[cell.ljust(max(map(len, column))) for cell in column] for column in columns]
    return "\n".join("  ".join(row).rstrip() for row in zip(*padded, strict=True))
