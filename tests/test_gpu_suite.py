"""The GPU suite: its commands are understood, it bears failures, and with tiny models it works."""

from __future__ import annotations

import json
import os
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import against_trl  # noqa: E402
import gpu_figures  # noqa: E402
import gpu_suite  # noqa: E402
import parity  # noqa: E402
import rollout  # noqa: E402
import sweeps  # noqa: E402
import throughput  # noqa: E402
import where_time_goes  # noqa: E402

from rlhf_mini.__main__ import build_parser  # noqa: E402
from rlhf_mini.config import load_preset, override  # noqa: E402

SCRIPTS = {module.__name__: module for module in (against_trl, gpu_figures, parity, rollout, sweeps,
                                                  throughput, where_time_goes)}


class Understood(Exception):
    """Raised in place of the work, once a script has read its arguments."""


def stop(*args, **kwargs):
    raise Understood


def options(tmp_path: Path, **changes) -> Namespace:
    return Namespace(**{"preset": "smoke", "out": tmp_path / "out", "runs": tmp_path / "runs",
                        "limit": 60, "assignments": []} | changes)


def make_piece(monkeypatch, code: str, files: tuple = ("a.json",), **more) -> None:
    """Let the suite have one piece, which runs Python code in its folder OUT/gpu/piece."""
    monkeypatch.setattr(gpu_suite, "PIECES", {
        "piece": gpu_suite.Piece("a test", files, "-", "-", **more)})
    monkeypatch.setattr(gpu_suite, "command_of", lambda name, args, device: [
        sys.executable, "-c", "import json, os, pathlib, sys, time\n"
        f"out = pathlib.Path({str(args.out / 'gpu' / name)!r}); out.mkdir(parents=True, "
        f"exist_ok=True)\n{code}"])


WRITE = "[(out / name).write_text('{}') for name in ('a.json', 'manifest.json')]"


@pytest.mark.parametrize("preset", ["gpu", "smoke"])
@pytest.mark.parametrize("name", list(gpu_suite.PIECES))
def test_every_command_is_understood_by_its_script(name, preset, tmp_path, monkeypatch):
    if not getattr(gpu_suite.PIECES[name], preset):
        return
    args = options(tmp_path, preset=preset, assignments=["ppo.iterations=7"])
    words = gpu_suite.command_of(name, args, "cpu")[1:]
    if name == "chain":
        assert words[:3] == ["-m", "rlhf_mini", "run"]
        parsed = build_parser().parse_args(words[2:])
        config = override(load_preset(parsed.preset), parsed.assignments)
        assert parsed.resume and config.ppo.iterations == 7
        assert config.compute.dtype == {"gpu": "bfloat16", "smoke": "float32"}[preset]
        return
    script = SCRIPTS[Path(words[0]).stem]
    assert Path(words[0]).resolve() == Path(script.__file__).resolve()
    monkeypatch.setattr(sys, "argv", words)
    for work in ("begin", "sweep", "provenance"):
        if hasattr(script, work):
            monkeypatch.setattr(script, work, stop)
    with pytest.raises(Understood):
        script.main()


def test_a_piece_that_works_is_done(monkeypatch, tmp_path, capsys):
    make_piece(monkeypatch, f"{WRITE}\ntime.sleep(0.2)\nprint('all is well')")
    row = gpu_suite.run_piece("piece", options(tmp_path), "cpu")
    assert row["status"] == "done" and "why" not in row and row["seconds"] > 0
    assert "    all is well" in capsys.readouterr().out


def test_a_failing_piece_keeps_its_last_lines_and_its_files(monkeypatch, tmp_path):
    make_piece(monkeypatch, f"{WRITE}\n[print('line', i) for i in range(99)]\nsys.exit(3)")
    row = gpu_suite.run_piece("piece", options(tmp_path), "cpu")
    assert (row["status"], row["why"]) == ("failed", "exit code 3")
    kept = json.loads((tmp_path / "out/gpu/piece/failed.json").read_text())
    assert kept["log_tail"] == [f"line {i}" for i in range(99 - gpu_suite.TAIL, 99)]
    assert {"command", "commit", "device", "versions", "seconds", "status"} <= set(kept)
    assert (tmp_path / "out/gpu/piece/a.json").exists()
    make_piece(monkeypatch, WRITE)  # the next time it works, and the failure is gone
    assert gpu_suite.run_piece("piece", options(tmp_path), "cpu")["status"] == "done"
    assert not (tmp_path / "out/gpu/piece/failed.json").exists()


def test_a_piece_that_leaves_a_file_out_has_failed(monkeypatch, tmp_path):
    make_piece(monkeypatch, WRITE, files=("a.json", "b.png"))
    assert gpu_suite.run_piece("piece", options(tmp_path), "cpu")["why"] == "left no b.png"


@pytest.mark.parametrize("resumes", [True, False])
def test_a_slow_piece_is_asked_to_stop_and_saves_what_it_has(monkeypatch, tmp_path, resumes):
    make_piece(monkeypatch, f"{WRITE}\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n"
               "    print('saved'); sys.exit(130)", resumes=resumes)
    began = time.monotonic()
    row = gpu_suite.run_piece("piece", options(tmp_path, limit=2), "cpu")
    assert time.monotonic() - began < 20
    assert row["status"] == "stopped" and "took more than 2 s" in row["why"]
    assert ("run the piece again" in row["why"]) == resumes
    assert json.loads((tmp_path / "out/gpu/piece/failed.json").read_text())["log_tail"] == ["saved"]


def test_a_chain_that_was_stopped_keeps_what_its_finished_stages_measured(monkeypatch, tmp_path):
    chain, folder = tmp_path / "runs/chain", tmp_path / "out/gpu/chain"
    settings = dict(command="rlhf-mini run", config={}, seed=3, versions={}, threads=2,
                    device="cpu", resumed=False, peak_memory_mb=9, summary="fine")
    for age, name in enumerate(("sft", ".ppo.work", "base")):  # base was made before sft
        (chain / name).mkdir(parents=True)
        (chain / name / "metrics.jsonl").write_text(f"{name}\n")
        (chain / name / "stage.json").write_text(json.dumps(
            settings | {"stage": name, "seconds": 1.5}))
        os.utime(chain / name / "stage.json", (10 - age, 10 - age))
    monkeypatch.setattr(gpu_suite, "command_of", lambda *a: [sys.executable, "-c", "exit(130)"])
    row = gpu_suite.run_piece("chain", options(tmp_path), "cpu")
    assert row["status"] == "failed" and row["why"] == "exit code 130"
    assert sorted(p.name for p in folder.iterdir()) == [
        "base.jsonl", "failed.json", "manifest.json", "sft.jsonl", "stages.json"]
    assert (folder / "sft.jsonl").read_text() == "sft\n"
    stages = json.loads((folder / "stages.json").read_text())
    assert [stage["stage"] for stage in stages] == ["base", "sft"]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["seconds"] == 3 and manifest["seed"] == 3 and "commit" in manifest


def test_a_piece_that_does_not_stop_is_ended(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_suite, "GRACE", 1)
    make_piece(monkeypatch, "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
               "time.sleep(60)")
    began = time.monotonic()
    assert gpu_suite.run_piece("piece", options(tmp_path, limit=2), "cpu")["status"] == "stopped"
    assert time.monotonic() - began < 20


def test_what_cannot_be_done_here_is_skipped_with_its_reason(monkeypatch, tmp_path):
    smoke, gpu = options(tmp_path), options(tmp_path, preset="gpu")
    assert "needs a GPU" in gpu_suite.run_piece("rollout", gpu, "cpu")["why"]
    assert gpu_suite.why_not("rollout", gpu, "cuda") is None
    assert "needs the finished chain" in gpu_suite.why_not("overoptimisation", smoke, "cpu")
    assert "compiling takes minutes" in gpu_suite.why_not("parity-compiled", smoke, "cpu")
    monkeypatch.setattr(gpu_suite.importlib.util, "find_spec", lambda name: None)
    assert "needs trl and datasets" in gpu_suite.why_not("trl", smoke, "cpu")
    assert not (tmp_path / "out").exists()  # nothing is written in their place


def test_the_list_names_every_piece_and_file(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_suite.py", "--list"])
    assert gpu_suite.main() == 0
    text = capsys.readouterr().out
    for name, piece in gpu_suite.PIECES.items():
        assert name in text and all(file in text for file in piece.files)


def test_with_tiny_models_the_pieces_leave_what_they_promise(monkeypatch, tmp_path):
    names = ["rollout", "kernels", "chain", "overoptimisation", "figures"]
    monkeypatch.setattr(sys, "argv", [
        "gpu_suite.py", *names, "--preset", "smoke", "--out", str(tmp_path / "out"), "--runs",
        str(tmp_path / "runs"), "--set", "ppo.iterations=2"])
    assert gpu_suite.main() == 0
    folder = tmp_path / "out" / "gpu"
    suite = json.loads((folder / "suite.json").read_text())
    assert {name: row["status"] for name, row in suite["pieces"].items()} == dict.fromkeys(
        names, "done")
    missing = json.loads((folder / "figures/manifest.json").read_text())["missing"]
    assert missing == ["throughput.png"]  # its piece was not run
    assert suite["pieces"]["figures"]["why"] == "left no throughput.png"
    for name in names:
        for file in set(gpu_suite.PIECES[name].files) - set(missing):
            assert (folder / name / file).stat().st_size > 0, (name, file)
            if file.endswith(".png"):
                assert (folder / name / file).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        manifest = json.loads((folder / name / "manifest.json").read_text())
        assert manifest["device"].startswith("cpu (") and "versions" in manifest
    assert list(folder.rglob("*.safetensors")) == []
    (run,) = json.loads((folder / "overoptimisation/sweeps.json").read_text())["runs"]
    assert [p["kl_coef"] for p in run["points"]] == [0.0, 1.0]
    assert all(len(p["curve"]["gold"]) == 2 for p in run["points"])
    rows = (folder / "chain/ppo.jsonl").read_text().splitlines()
    assert len(rows) == 2 and "gold" in json.loads(rows[0])
