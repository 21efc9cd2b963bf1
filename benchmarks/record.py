"""Keep what a finished run showed, without its weights.

    python benchmarks/record.py NAME RUN [FIGURE ...]

Copies from the run folder RUN to data/recorded/NAME/: report.json, the metrics of PPO stages as
STAGE.jsonl, the samples of the first as samples.jsonl, and the named figures. Adds manifest.json,
which says what made them.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from rlhf_mini.experiments.study import source_state
from rlhf_mini.runtime import read_json, write_json

ROOT = Path(__file__).parent.parent
RECORDED = ROOT / "data" / "recorded"


def make_manifest(report: dict) -> dict:
    """Say what made a result: command, commit, machine kind, versions, seed, seconds."""
    return {"command": report["command"], **source_state(),
            **{key: report[key] for key in ("device", "threads", "versions", "seed", "seconds",
                                            "config")}}


def record(run: Path, folder: Path, figures: list[str]) -> None:
    """Copy the small results of a run.

    Raises:
        FileNotFoundError: if the run has no report or lacks a figure.
    """
    report = read_json(run / "report.json")
    pictures = [run / "figures" / f"{figure}.png" for figure in figures]
    for path in pictures:
        path.stat()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in [run / "report.json", *pictures]:
        shutil.copyfile(path, folder / path.name)
    for path in sorted(run.glob("ppo*/metrics.jsonl")):
        shutil.copyfile(path, folder / f"{path.parent.name}.jsonl")
    shutil.copyfile(run / "ppo" / "samples.jsonl", folder / "samples.jsonl")
    write_json(folder / "manifest.json", make_manifest(report))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="folder below data/recorded")
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("figures", nargs="*", help="names of figures, without .png")
    args = parser.parse_args()
    record(args.run, RECORDED / args.name, args.figures)
    print(f"wrote {RECORDED / args.name}")


if __name__ == "__main__":
    main()
