"""Do everything that wants a GPU, piece by piece, each in minutes.

    python benchmarks/gpu_suite.py --list                 the pieces and their files
    python benchmarks/gpu_suite.py                        all of them
    python benchmarks/gpu_suite.py chain overoptimisation two of them
    python benchmarks/gpu_suite.py --preset smoke         all with tiny models, on a CPU too

A piece is a process of its own with a time limit. It leaves small files in OUT/gpu/PIECE/, with a
manifest.json that says what made them; weights stay in RUNS. What fails or takes too long is
reported, its last lines are kept in failed.json, and the next piece begins. `chain` and
`overoptimisation` go on where they were stopped. OUT/gpu/suite.json says how each piece ended.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from record import RECORDED, ROOT

from rlhf_mini.experiments.study import describe_device, source_state
from rlhf_mini.pipeline import versions
from rlhf_mini.runtime import read_json, write_json

HERE = Path(__file__).resolve().parent
TAIL = 40  # lines of a failed piece's output that are kept
GRACE = 20  # seconds between asking a piece to stop and ending it


@dataclass(frozen=True)
class Piece:
    """One part of the suite.

    Attributes:
        about: what it does.
        files: what it leaves, besides manifest.json.
        gpu: words of its command in the preset "gpu".
        smoke: the same in the preset "smoke"; empty: not part of it.
        resumes: whether a second call goes on with what the first left.
    """

    about: str
    files: tuple[str, ...]
    gpu: str
    smoke: str
    resumes: bool = False


TINY = "--size tiny --prompt 8 --response 8"
TINY_STEPS = "--sft-batch 4 --reward-batch 4 --episodes 8 --minibatches 2 --steps 2"
BETAS = "0 0.03 0.1 0.3 1"
PIECES = {
    "parity": Piece(
        "fast paths compute what the plain one does", ("parity.json", "parity.md"),
        "parity.py --paths 'eager bfloat16' 'two processes'",
        "parity.py --size tiny --steps 10 --paths 'eager bfloat16' 'two processes'"),
    "rollout": Piece(
        "speed of sampling", ("rollout.json", "rollout.md"),
        "rollout.py", f"rollout.py {TINY} --batch 4 --repeats 2"),
    "throughput": Piece(
        "speed of training", ("throughput.json", "throughput.md"),
        "throughput.py --modes 'eager float32' 'eager bfloat16'",
        f"throughput.py {TINY} {TINY_STEPS}"),
    "kernels": Piece(
        "which kernels take the time", ("kernels.json", "kernels.md"),
        "where_time_goes.py", "where_time_goes.py"),
    "trl": Piece(
        "speed beside TRL's trainers", ("speed.json", "speed.md"),
        "against_trl.py ppo sft --repeats 2",
        "against_trl.py sft --setting tiny --repeats 1 --threads 1"),
    "chain": Piece(
        "all stages from scratch on the town, and its report",
        ("report.json", "stages.json", "reward.json", "ppo.jsonl", "ppo_ptx.jsonl",
         "ppo-samples.jsonl", "headline.png"),
        # a checkpoint of this size takes seconds to write: few of them
        "--preset gpu --set ppo.checkpoint_every=1000 --set sft.checkpoint_every=1000 "
        "--set reward.checkpoint_every=1000",
        "--preset smoke", resumes=True),
    "overoptimisation": Piece(
        "gold score against KL and RM score, by kl_coef", ("sweeps.json",),
        f"sweeps.py RUNS/chain --betas {BETAS} --gammas",
        "sweeps.py RUNS/chain --betas 0 1 --gammas --set ppo.iterations=3", resumes=True),
    "rollout-cost": Piece(
        "sampling against batch, length and model size", ("rollout.json", "rollout.md"),
        "rollout.py --batch 256 16 64 1024 --response 64 256 --size gpt2 medium large "
        "--repeats 3 --ways decode transformers",
        f"rollout.py {TINY} --batch 2 4 --response 4 8 --repeats 1 --ways decode transformers"),
    "throughput-cost": Piece(
        "training against model size", ("throughput.json", "throughput.md"),
        "throughput.py --size gpt2 medium large --episodes 128 --minibatches 2 --steps 3 "
        "--modes 'eager bfloat16'",
        f"throughput.py --prompt 8 --response 8 --size tiny small {TINY_STEPS} --modes "
        "'eager float32'"),
    "parity-compiled": Piece(
        "compiled paths too, of a small model: compiling takes minutes",
        ("parity.json", "parity.md"),
        "parity.py --size small --paths 'compiled float32' 'compiled bfloat16'", ""),
    "throughput-compiled": Piece(
        "what compiling gains", ("throughput.json", "throughput.md"),
        "throughput.py sft ppo --modes 'eager bfloat16' 'compiled bfloat16'", ""),
    "figures": Piece(
        "pictures of what the other pieces found",
        ("overoptimisation.png", "rollout.png", "throughput.png"),
        "gpu_figures.py OUT", "gpu_figures.py OUT"),
}


def shorten(path: Path) -> str:
    """Return a path as seen from here, if it lies below."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def command_of(name: str, args, device: str) -> list[str]:
    """Return the command of a piece."""
    piece, out = PIECES[name], args.out / "gpu"
    places = {"RUNS/chain": shorten(args.runs / "chain"), "OUT": shorten(out)}
    words = [places.get(word, word) for word in shlex.split(getattr(piece, args.preset))]
    if name == "chain":
        words = ["-m", "rlhf_mini", "run", *words, "--out", places["RUNS/chain"], "--resume"]
    else:
        words = [shorten(HERE / words[0]), *words[1:], "--out", shorten(out / name)]
    if name in ("chain", "overoptimisation"):
        words += [word for setting in args.assignments for word in ("--set", setting)]
    if name != "figures":
        words += ["--device", device]
    return [sys.executable, *words]


def why_not(name: str, args, device: str) -> str | None:
    """Say why a piece cannot be done here, or None."""
    if not getattr(PIECES[name], args.preset):
        return f"not part of --preset {args.preset}: compiling takes minutes"
    if args.preset == "gpu" and device == "cpu" and name != "figures":
        return "needs a GPU; --preset smoke tries the suite without"
    if name == "trl":
        missing = [m for m in ("trl", "datasets") if importlib.util.find_spec(m) is None]
        if missing:
            return f"needs {' and '.join(missing)}: pip install -e '.[parity]' -c constraints.txt"
    if name == "overoptimisation" and not (args.runs / "chain" / "report.json").is_file():
        return f"needs the finished chain in {args.runs / 'chain'}"
    return None


def run_limited(command: list[str], log: Path, limit: float) -> int | None:
    """Run a command, its output into a file; return its exit code, or None if it took too long.

    Too long a run is asked to stop, as by Ctrl-C, so that it can save what it has; then it is
    ended.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg", "PYTHONUNBUFFERED": "1"}
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT,
                                   env=environment, start_new_session=True)
        for sign, seconds in ((None, limit), (signal.SIGINT, GRACE), (signal.SIGKILL, None)):
            if sign is not None:
                with contextlib.suppress(ProcessLookupError):  # it has just ended
                    os.killpg(process.pid, sign)
            try:
                code = process.wait(seconds)
                return code if sign is None else None
            except subprocess.TimeoutExpired:
                continue
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                raise
    return None


def keep_chain(args) -> None:
    """Copy what the finished stages of the chain measured, and its report if it came to that."""
    run, folder = args.runs / "chain", args.out / "gpu" / "chain"
    shutil.rmtree(folder, ignore_errors=True)  # nothing of an earlier chain may stay
    folder.mkdir(parents=True)
    paths = sorted(run.glob("[!.]*/stage.json"), key=lambda path: path.stat().st_mtime)
    states = [read_json(path) for path in paths]
    sources = {f"{state['stage']}{end}": run / state["stage"] / name for state in states
               for end, name in ((".jsonl", "metrics.jsonl"), ("-samples.jsonl", "samples.jsonl"),
                                 (".json", "reward.json"))}
    sources |= {"report.json": run / "report.json"}
    sources |= {path.name: path for path in run.glob("figures/*.png")}
    for name, source in sources.items():
        if source.is_file():
            shutil.copyfile(source, folder / name)
    write_json(folder / "stages.json", [
        {key: state[key] for key in ("stage", "seconds", "resumed", "peak_memory_mb", "summary")}
        for state in states])
    last = states[-1]
    write_json(folder / "manifest.json", source_state() | {
        key: last[key] for key in ("command", "config", "seed", "versions", "threads")} | {
        "device": describe_device(last["device"]),
        "seconds": round(sum(state["seconds"] for state in states), 1)})


def run_piece(name: str, args, device: str) -> dict:
    """Run a piece and say how it ended.

    Returns:
        `piece`, `status` (done, failed, stopped, skipped), `seconds`, `command`, and `why` unless
        it is done.
    """
    if missing := why_not(name, args, device):
        return {"piece": name, "status": "skipped", "why": missing}
    folder, log = args.out / "gpu" / name, args.runs / "logs" / f"{name}.log"
    if PIECES[name].resumes:
        (folder / "failed.json").unlink(missing_ok=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)
    command, began = command_of(name, args, device), time.monotonic()
    code = run_limited(command, log, args.limit)
    row = {"piece": name, "status": "done", "command": shlex.join(["python", *command[1:]]),
           "seconds": round(time.monotonic() - began, 1)}
    if code is None:
        row |= {"status": "stopped", "why": f"took more than {args.limit:g} s"
                + ("; run the piece again to go on" if PIECES[name].resumes else "")}
    elif code:
        row |= {"status": "failed", "why": f"exit code {code}"}
    if name == "chain" and any((args.runs / "chain").glob("[!.]*/stage.json")):
        row |= _try(lambda: keep_chain(args))  # also of a chain that was stopped
    if row["status"] == "done":
        row |= check_files(folder, PIECES[name])
    tail = log.read_text("utf-8", errors="replace").splitlines()[-TAIL:]
    if row["status"] != "done":
        write_json(folder / "failed.json", row | {"log_tail": tail, "device": device,
                                                  "versions": versions()} | source_state())
    print("\n".join(f"    {line}" for line in tail), flush=True)
    return row


def check_files(folder: Path, piece: Piece) -> dict:
    """Say which of its files a piece did not leave; its manifest may say that some could not be."""
    absent = [f for f in ("manifest.json", *piece.files) if not (folder / f).is_file()]
    if not absent:
        return {}
    known = {} if "manifest.json" in absent else read_json(folder / "manifest.json")
    said = known.get("missing", [])
    return {"status": "done" if set(absent) <= set(said) else "failed",
            "why": f"left no {', '.join(absent)}"}


def _try(work: Callable[[], None]) -> dict:
    try:
        work()
    except (OSError, ValueError, KeyError) as error:
        return {"status": "failed", "why": f"{type(error).__name__}: {error}"}
    return {}


def list_pieces() -> str:
    """Return the pieces and their files as text."""
    return "\n".join(f"{name:20}{piece.about}\n{'':20}-> "
                     + ", ".join(("manifest.json", *piece.files))
                     for name, piece in PIECES.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pieces", nargs="*", choices=[[], *PIECES], default=[], metavar="PIECE",
                        help=f"some of {', '.join(PIECES)}; all if none is named")
    parser.add_argument("--list", action="store_true", help="name the pieces and their files")
    parser.add_argument("--preset", choices=["gpu", "smoke"], default="gpu",
                        help="gpu: GPT-2's size; smoke: tiny models, seconds each")
    parser.add_argument("--out", type=Path, default=RECORDED, help="files go to OUT/gpu/PIECE")
    parser.add_argument("--runs", type=Path, help="weights and logs (default: runs/PRESET-suite)")
    parser.add_argument("--limit", type=float, default=530, help="seconds for each piece")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE",
                        dest="assignments", help="change a setting of chain and overoptimisation")
    args = parser.parse_args()
    if args.list:
        print(list_pieces())
        return 0
    args.out = args.out.resolve()
    args.runs = (args.runs or ROOT / "runs" / f"{args.preset}-suite").resolve()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = args.out / "gpu" / "suite.json"
    old = read_json(path)["pieces"] if path.exists() else {}
    print(f"{describe_device(device)}, results in {args.out / 'gpu'}", flush=True)
    rows: list[dict] = []
    for name in args.pieces or PIECES:
        print(f"== {name}: {PIECES[name].about}", flush=True)
        rows.append(run_piece(name, args, device))
        old[name] = rows[-1]
        write_json(path, {"pieces": old, "device": describe_device(device),
                          "preset": args.preset, "versions": versions()} | source_state())
        print(f"   {rows[-1]['status']} {rows[-1].get('seconds', '')} "
              f"{rows[-1].get('why', '')}".rstrip(), flush=True)
    print("\n" + "\n".join(f"{r['status']:8} {r['piece']:20} {r.get('seconds', 0):6.0f} s  "
                           f"{r.get('why', '')}".rstrip() for r in rows))
    return int(any(row["status"] in ("failed", "stopped") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
