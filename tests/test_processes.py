"""Two processes against one, under torchrun with gloo."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from rlhf_mini import processes
from rlhf_mini.runtime import load_checkpoint, read_json, read_metrics, recover_directory

ROOT = Path(__file__).parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=2", "--use_fsdp",
          "--main_process_port=0"]
# Dropout draws other masks where a batch is dealt to two processes.
SMOKE = ["run", "--preset", "smoke", "--device", "cpu", "--set", "sft.dropout=0"]


def start(*arguments, launcher=TORCHRUN) -> subprocess.Popen:
    return subprocess.Popen([*launcher, *map(str, arguments)], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, cwd=ROOT / "tests",
                            env=os.environ | {"OMP_NUM_THREADS": "1"})


def run(*arguments, launcher=TORCHRUN) -> tuple[int, str]:
    process = start(*arguments, launcher=launcher)
    said, _ = process.communicate(timeout=300)
    return process.returncode, said


def test_deepspeed_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="DeepSpeed is not supported.*--use_fsdp"):
        processes.join_processes(torch.device("cpu"))


def test_two_processes_take_the_step_of_one():
    code, said = run("two_processes.py")
    assert code == 0, said
    assert said.count("one and two processes agree") == 1  # one of them speaks


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """The smoke chain of one process, of two, and of two that split the models."""
    launchers = {"one": [sys.executable], "two": TORCHRUN, "split": LAUNCH}
    folders = {name: tmp_path_factory.mktemp(name) / "run" for name in launchers}
    for name, folder in folders.items():
        code, said = run("-m", "rlhf_mini", *SMOKE, "--out", folder, launcher=launchers[name])
        assert code == 0, said
        assert said.count("[8/8] evaluation: done") == 1, said
    return folders


# Relative tolerances. Sums in another order differ by 1e-7; Adam divides each gradient by its own
# size, so that rounding errors of small gradients become steps of full size, and grow from stage to
# stage. Losses of PPO are differences of nearly equal numbers: their scale is 1.
TOLERANCES = {"base": 1e-3, "sft": 1e-3, "reward": 5e-3, "ppo": 2e-2, "ppo_ptx": 2e-2}


@pytest.mark.parametrize("name", ["two", "split"])
@pytest.mark.parametrize("stage", TOLERANCES)
def test_two_processes_have_the_loss_curve_of_one(runs, stage, name):
    one, two = (np.array([row["loss"] for row in read_metrics(run / stage / "metrics.jsonl")
                          if "loss" in row]) for run in (runs["one"], runs[name]))
    assert len(one) == len(two) >= 3
    scale = np.maximum(abs(one), 1) if stage.startswith("ppo") else abs(one)
    assert (abs(one - two) / scale).max() < TOLERANCES[stage]
    assert not np.array_equal(one, two)  # it was not the same computation


def test_the_number_of_processes_is_recorded_and_only_the_first_one_writes(runs):
    counts = [read_json(run / "ppo" / "stage.json")["processes"] for run in runs.values()]
    assert counts == [1, 2, 2]
    one, *others = ({file.relative_to(run).as_posix() for file in run.rglob("*") if file.is_file()}
                    for run in runs.values())
    assert others == [one, one]


def test_a_batch_that_cannot_be_dealt_is_refused(tmp_path):
    code, said = run("-m", "rlhf_mini", *SMOKE, "--set", "pretrain.batch_size=7",
                     "--out", tmp_path / "run")
    assert code != 0
    assert ("pretrain.batch_size = 7 cannot be dealt evenly to 2 processes; take a multiple of 2"
            in said)


def test_when_a_process_dies_the_others_stop_and_the_run_can_go_on(tmp_path):
    folder = tmp_path / "run"
    arguments = ["-m", "rlhf_mini", *SMOKE, "--set", "pretrain.steps=3000", "--out", folder]
    process = start(*arguments)
    for line in process.stdout:
        if line.startswith("pretrain  "):  # its first progress, after 200 steps
            break
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    second = int(children.stdout.split()[-1])
    os.kill(second, signal.SIGKILL)
    said, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and "SIGKILL" in said
    assert not subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True).stdout
    checkpoint = folder / ".base.work" / "checkpoint"
    assert recover_directory(checkpoint) and load_checkpoint(checkpoint)[1]["step"] > 0
    stopped = start(*arguments, "--resume", launcher=[sys.executable])
    for line in stopped.stdout:
        if "going on where it stopped" in line:
            break
    else:
        pytest.fail("it did not go on")
    stopped.kill()
    stopped.communicate()


# ---------------------------------------------------------------- without torchrun

def test_one_process_needs_nothing(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    processes.join_processes(torch.device("cpu"))
    assert (processes.process_count(), processes.process_index()) == (1, 0)
    loss, stats = torch.tensor(2.0), {"loss": 2.0, "ratio_max": 1.0}
    assert processes.combine(loss, stats, 3) == (loss, stats)
    assert processes.take_share([1, 2, 3]) == [1, 2, 3]
    assert processes.gather("x") == ["x"]
    processes.check_shares(any__size=7)


def test_shares_are_disjoint_and_cover_everything(monkeypatch):
    monkeypatch.setattr(processes, "process_count", lambda: 3)
    shares = []
    for index in range(3):
        monkeypatch.setattr(processes, "process_index", lambda index=index: index)
        shares.append(processes.take_share(list(range(8))))
    assert shares == [[0, 3, 6], [1, 4, 7], [2, 5]]
    with pytest.raises(ValueError, match=r"sft\.batch_size = 8 cannot be dealt evenly to 3"):
        processes.check_shares(sft__batch_size=8)


def test_missing_accelerate_says_how_to_get_it(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ValueError, match=r"need accelerate: pip install 'rlhf-mini\[multi\]'"):
        processes.join_processes(torch.device("cpu"))


def test_more_processes_than_gpus_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="torchrun started 4 processes here, and there are 1 GPUs"):
        processes.join_processes(torch.device("cuda"))
