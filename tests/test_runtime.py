"""Seeds, files, metrics, progress and checkpoints."""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from torch import nn

from rlhf_mini import runtime
from rlhf_mini.runtime import (
    METRICS,
    CheckpointError,
    MetricLog,
    NonFiniteLoss,
    OutputError,
    atomic_directory,
    atomic_write,
    check_finite,
    fingerprint,
    load_checkpoint,
    make_generator,
    make_rng,
    pack_state,
    progress,
    read_json,
    read_metrics,
    recover_directory,
    resolve_device,
    save_checkpoint,
    unpack_state,
    write_json,
)

# ---------------------------------------------------------------- seeds, devices, fingerprints


def test_generators_are_stable_across_processes():
    code = ("from rlhf_mini.runtime import *; import torch;"
            "print(make_generator(3, 'ppo', 'x').initial_seed(), make_rng(3, 'ppo').random())")
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seed, number = other.stdout.split()
    assert int(seed) == make_generator(3, "ppo", "x").initial_seed()
    assert float(number) == make_rng(3, "ppo").random()


def test_generators_differ_by_seed_and_by_every_name():
    keys = [(0,), (1,), (0, "a"), (0, "b"), (0, "a", "b"), (0, "ab"), (0, "b", "a")]
    seeds = {make_generator(*key).initial_seed() for key in keys}
    numbers = {make_rng(*key).random() for key in keys}
    assert len(seeds) == len(numbers) == len(keys)


def test_generators_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    torch.rand(5, generator=make_generator(0, "a"))
    assert torch.equal(before, torch.get_rng_state())


def test_resolve_device(monkeypatch):
    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="device 'tpu': expected 'auto', 'cpu' or 'cuda'"):
        resolve_device("tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="device 'cuda': torch .* sees no GPU here; use 'cpu'"):
        resolve_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda")
    assert resolve_device("cpu") == torch.device("cpu")


@dataclass(frozen=True)
class Settings:
    lr: float = 0.1
    steps: int = 3


def test_fingerprint_follows_contents(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    for folder in (a, b):
        (folder / "sub").mkdir(parents=True)
        (folder / "sub" / "x.txt").write_text("hello")
        (folder / ".x.partial").write_text(str(folder))  # hidden: not part of the contents
    assert fingerprint(a) == fingerprint(b)
    (b / "sub" / "x.txt").write_text("hellp")
    assert fingerprint(a) != fingerprint(b)
    (b / "sub" / "x.txt").rename(b / "sub" / "y.txt")
    (b / "sub" / "y.txt").write_text("hello")
    assert fingerprint(a) != fingerprint(b)
    assert fingerprint({"p": 1, "q": 2}) == fingerprint({"q": 2, "p": 1})
    assert fingerprint(Settings()) == fingerprint(Settings(lr=0.1))
    assert fingerprint(Settings()) != fingerprint(Settings(steps=4))
    assert fingerprint("ab", "c") != fingerprint("a", "bc")
    with pytest.raises(ValueError, match="none: no such file or folder"):
        fingerprint(tmp_path / "none")


# ---------------------------------------------------------------- files


def test_atomic_write_replaces_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    atomic_write(path, "é\n")
    atomic_write(path, b"second")
    assert path.read_bytes() == b"second"
    assert os.listdir(path.parent) == ["file.txt"]


def _limit_file_size():
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))


FULL = """
import sys
from pathlib import Path
import torch
from rlhf_mini import runtime
place = Path(sys.argv[1])
try:
    {}
except ValueError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize("statement", [
    "runtime.atomic_write(place / 'new', 'x' * 1000)",
    "runtime.save_checkpoint(place / 'new', {'w': torch.zeros(1000)}, {})",
    "runtime.MetricLog(place / 'm.jsonl').write(1, loss=1.5)",
])
def test_a_full_folder_is_named_and_the_old_file_survives(tmp_path, statement):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "kept").write_text("kept")
    (tmp_path / "m.jsonl").write_text('{"step": 0}\n' * 9)  # 99 bytes
    done = subprocess.run([sys.executable, "-c", FULL.format(statement), str(tmp_path)],
                          capture_output=True, text=True, preexec_fn=_limit_file_size)
    assert f"OutputError cannot write to folder {tmp_path}: " in done.stdout, done.stderr
    assert "choose another output folder" in done.stdout
    assert (tmp_path / "new" / "kept").read_text() == "kept"
    assert sorted(os.listdir(tmp_path)) == ["m.jsonl", "new"]


@pytest.mark.parametrize("write", [
    lambda place: atomic_write(place / "x", "text"),
    lambda place: write_json(place / "x", {}),
    lambda place: save_checkpoint(place / "x", {}, {}),
    lambda place: MetricLog(place / "x").write(0, loss=1.0),
])
def test_an_unwritable_folder_is_named(tmp_path, write):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OutputError, match=f"cannot write to folder {tmp_path}/file.*output folder"):
        write(tmp_path / "file" / "sub")


def test_atomic_directory_swaps_as_a_whole(tmp_path):
    path = tmp_path / "stage"
    with atomic_directory(path) as folder:
        (folder / "one").write_text("1")
        assert not path.exists()
    with atomic_directory(path) as folder:
        (folder / "two").write_text("2")
        assert os.listdir(path) == ["one"]
    assert os.listdir(path) == ["two"]
    assert os.listdir(tmp_path) == ["stage"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_atomic_directory_keeps_the_old_one_when_the_body_raises(tmp_path, error):
    path = tmp_path / "stage"
    with atomic_directory(path) as folder:
        (folder / "one").write_text("1")
    with pytest.raises(error), atomic_directory(path) as folder:
        (folder / "two").write_text("2")
        raise error
    assert os.listdir(path) == ["one"]
    assert os.listdir(tmp_path) == ["stage"]


def test_atomic_directory_survives_a_kill_at_every_rename(tmp_path):
    code = """
import os, sys
from pathlib import Path
from rlhf_mini.runtime import atomic_directory
path, deadly = Path(sys.argv[1]), int(sys.argv[2])
count, rename = 0, Path.rename
def counted(self, target):
    global count
    count += 1
    if count == deadly:
        os.kill(os.getpid(), 9)
    return rename(self, target)
Path.rename = counted
with atomic_directory(path) as folder:
    (folder / "a").write_text("new")
    (folder / "b").write_text("new")
"""
    outcomes = []
    for deadly in (1, 2, 3, 4):
        path = tmp_path / str(deadly) / "stage"
        with atomic_directory(path) as folder:
            (folder / "a").write_text("old")
        done = subprocess.run([sys.executable, "-c", code, str(path), str(deadly)])
        assert done.returncode == (0 if deadly == 4 else -9)
        assert recover_directory(path)
        found = {p.name: p.read_text() for p in path.iterdir()}
        outcomes.append("old" if found == {"a": "old"} else "new")
        assert found in ({"a": "old"}, {"a": "new", "b": "new"})
        assert os.listdir(path.parent) == ["stage"]
    assert outcomes == ["old", "new", "new", "new"]


def test_recover_directory_says_when_there_is_none(tmp_path):
    (tmp_path / ".stage.partial").mkdir()
    assert not recover_directory(tmp_path / "stage")
    assert os.listdir(tmp_path) == []


def test_json_round_trip_and_errors(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"b": 0.1, "a": ["é", None]})
    assert read_json(path) == {"a": ["é", None], "b": 0.1}
    assert path.read_text().index('"a"') < path.read_text().index('"b"')
    path.write_text('{"a": 1,\n"b": }\n')
    with pytest.raises(ValueError, match=r"x\.json:2: not valid JSON"):
        read_json(path)
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ValueError, match=r"x\.json: not UTF-8"):
        read_json(path)
    with pytest.raises(ValueError, match=r"none\.json: cannot be read: No such file"):
        read_json(tmp_path / "none.json")
    with pytest.raises(ValueError, match=r"x\.json: cannot be written as JSON"):
        write_json(path, {"a": math.nan})


# ---------------------------------------------------------------- metrics and progress


def test_every_glossary_entry_is_filled():
    wanted = """loss valid_loss lr grad_norm eos_rate response_tokens accuracy
    margin score score_std gold kl_per_sequence kl_per_token kl_coef entropy policy_loss value_loss
    ptx_loss
    approx_kl clip_fraction value_clip_fraction ratio_mean ratio_max first_ratio_error
    explained_variance advantage_mean advantage_std returns_mean value_mean epoch"""
    assert set(wanted.split()) <= set(METRICS)
    for name, metric in METRICS.items():
        assert metric.name == name and metric.unit
        assert metric.meaning.endswith(".") and metric.healthy.endswith(".")
        assert len(metric.meaning.split()) >= 6 and len(metric.healthy.split()) >= 5


def test_metric_log_round_trip(tmp_path):
    log = MetricLog(tmp_path / "run" / "metrics.jsonl")
    log.write(0, loss=torch.tensor(0.1, dtype=torch.float64), epoch=0)
    log.write(1, loss=math.inf, explained_variance=torch.tensor(math.nan))
    first, second = read_metrics(log.path)
    assert first == {"step": 0, "loss": 0.1, "epoch": 0}
    assert second["step"] == 1
    assert math.isnan(second["loss"]) and math.isnan(second["explained_variance"])
    assert "NaN" not in log.path.read_text() and "Infinity" not in log.path.read_text()


def test_metric_log_refuses_names_without_an_entry(tmp_path):
    log = MetricLog(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match="metric 'lossy' is not in the glossary"):
        log.write(0, loss=1.0, lossy=2.0)
    assert not log.path.exists()


def test_metric_log_truncates_on_resume(tmp_path):
    log = MetricLog(tmp_path / "metrics.jsonl")
    for step in range(4):
        log.write(step, loss=math.nan if step == 1 else step)
    with log.path.open("a") as file:
        file.write('{"step": 4, "lo')  # killed while writing
    assert [row["step"] for row in read_metrics(log.path)] == [0, 1, 2, 3]
    log.truncate(3)
    log.write(3, loss=30)
    rows = read_metrics(log.path)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert rows[3]["loss"] == 30 and math.isnan(rows[1]["loss"])
    log.truncate(0)
    assert read_metrics(log.path) == []


@pytest.mark.parametrize("line", ["{", "[1]", '{"loss": 1}', "3"])
def test_read_metrics_names_the_line(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: expected one JSON object"):
        read_metrics(path)


@pytest.mark.parametrize("total", [1, 7, 15, 900])
def test_progress_prints_few_whole_lines_without_a_terminal(capsys, total):
    bar = progress(total, "ppo")
    for step in range(total):
        bar.update(kl_per_sequence=step / 7, note="x")
    bar.close()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == min(total, 15)
    assert lines[-1].startswith(f"ppo  {total}/{total}  ")
    assert all("left" in line and "kl_per_sequence" in line and "\r" not in line for line in lines)


def test_progress_on_a_terminal_and_when_stopped_early(capsys, monkeypatch):
    bar = progress(100, "sft", start=90)
    bar.update(1)
    bar.close()
    assert capsys.readouterr().out.startswith("sft  91/100  ")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    bar = progress(100, "sft", start=90)
    bar.update(10, loss=1.5)
    bar.close()
    out = capsys.readouterr().out
    assert "100/100" in out and "loss 1.5" in out and "\r" in out


def test_progress_in_a_notebook_is_one_line_that_changes(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "pub_thread", None, raising=False)  # as ipykernel's stream has
    lines = []

    class Handle:
        def update(self, data, raw):
            lines.append(data["text/plain"])

    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(
        display=lambda data, raw, display_id: Handle()))
    bar = progress(3, "sft")
    for step in range(3):
        bar.update(1, loss=step)
    assert "3/3" in lines[-1] and "loss 2" in lines[-1]  # complete even if nobody closes it
    bar.close()
    assert capsys.readouterr().out == "" and max(map(len, lines)) <= 88


def test_check_finite():
    check_finite(torch.tensor(1.0), 0, "batch 0")
    for bad in (torch.tensor(math.nan), -math.inf):
        with pytest.raises(NonFiniteLoss, match="step 12, batch 3: loss is (nan|-inf)"):
            check_finite(bad, 12, "batch 3")


# ---------------------------------------------------------------- checkpoints


def _saved(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint"
    save_checkpoint(path, {"w": torch.arange(6.0).view(2, 3), "step": torch.tensor(1.5),
                           "h": torch.tensor([1.5], dtype=torch.bfloat16)},
                    {"step": 3, "lr": 0.1 + 0.2, "by": {2: 1, 10: 2}, "pair": (1, 2),
                     "best": math.inf})
    return path


def test_checkpoint_round_trip(tmp_path):
    tensors, meta = load_checkpoint(_saved(tmp_path))
    assert torch.equal(tensors["w"], torch.arange(6.0).view(2, 3))
    assert tensors["step"].shape == () and tensors["h"].dtype == torch.bfloat16
    assert meta == {"step": 3, "lr": 0.1 + 0.2, "by": {"2": 1, "10": 2}, "pair": [1, 2],
                    "best": math.inf}


def _flip_byte(path):
    content = bytearray((path / "tensors.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "tensors.safetensors").write_bytes(content)


def _cut(path):
    content = (path / "tensors.safetensors").read_bytes()
    (path / "tensors.safetensors").write_bytes(content[:-5])


def _edit(path):
    record = json.loads((path / "checkpoint.json").read_text())
    record["meta"]["step"] = 4
    (path / "checkpoint.json").write_text(json.dumps(record))


@pytest.mark.parametrize(("harm", "reason"), [
    (_flip_byte, "changed or cut short"),
    (_cut, "changed or cut short"),
    (_edit, "checkpoint.json was changed"),
    (lambda path: (path / "tensors.safetensors").unlink(), "No such file"),
    (lambda path: (path / "checkpoint.json").unlink(), "No such file"),
    (lambda path: (path / "checkpoint.json").write_text("{"), "checkpoint.json:1: not valid JSON"),
    (lambda path: (path / "checkpoint.json").write_text("{}"), "'meta' is missing"),
    (lambda path: (path / "checkpoint.json").write_text("[]"), "damaged"),
])
def test_a_damaged_checkpoint_is_refused(tmp_path, harm, reason):
    path = _saved(tmp_path)
    harm(path)
    with pytest.raises(CheckpointError, match="is damaged: .*delete it to start the stage again"
                       ) as caught:
        load_checkpoint(path)
    assert reason in str(caught.value) and str(path) in str(caught.value)


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint in .*/none"):
        load_checkpoint(tmp_path / "none")


def test_load_checkpoint_finishes_an_interrupted_swap(tmp_path):
    path = _saved(tmp_path)
    path.rename(tmp_path / ".checkpoint.ready")
    assert load_checkpoint(path)[1]["step"] == 3


class Tied(nn.Module):
    """Embedding tied to the output layer, dropout, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.block = nn.Linear(8, 8)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("seen", torch.zeros(2, dtype=torch.long))

    def forward(self, ids):
        self.seen += 1
        return self.head(self.dropout(torch.tanh(self.block(self.embed(ids)))))


OPTIMIZERS = {
    "adamw": lambda model: {"main": torch.optim.AdamW(model.parameters(), lr=0.01)},
    "fused": lambda model: {"main": torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)},
    "two_groups": lambda model: {"main": torch.optim.AdamW(
        [{"params": [model.embed.weight], "lr": 0.02, "betas": (0.8, 0.9)},
         {"params": model.block.parameters()}], lr=0.01)},
    "sgd": lambda model: {"main": torch.optim.SGD(model.parameters(), lr=0.01)},
    "muon": lambda model: {
        "matrices": torch.optim.Muon([model.block.weight], lr=0.02),
        "rest": torch.optim.AdamW([model.embed.weight, model.block.bias], lr=0.01, fused=True)},
}


def _build(kind: str):
    torch.manual_seed(0)
    model = Tied()
    return model, OPTIMIZERS[kind](model), make_generator(0, "batches")


def _train(model, optimizers, generator, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        ids = torch.randint(11, (4, 5), generator=generator)
        loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.roll(1).flatten())
        loss.backward()
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] *= 0.99
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("at", [0, 3])
def test_resumed_training_is_bit_identical(tmp_path, kind, at):
    model, optimizers, generator = _build(kind)
    whole = _train(model, optimizers, generator, 6)

    first, first_optimizers, first_generator = _build(kind)
    losses = _train(first, first_optimizers, first_generator, at)
    tensors, meta = pack_state({"m": first}, first_optimizers, {"g": first_generator})
    save_checkpoint(tmp_path / "c", tensors, meta | {"step": at})
    _train(first, first_optimizers, first_generator, 2)  # must not reach into the saved state

    second, second_optimizers, second_generator = _build(kind)
    _train(second, second_optimizers, second_generator, 1)  # other weights, moments and numbers
    torch.rand(7)
    tensors, meta = load_checkpoint(tmp_path / "c")
    unpack_state(tensors, meta, {"m": second}, second_optimizers, {"g": second_generator})
    losses += _train(second, second_optimizers, second_generator, 6 - at)

    assert losses == whole
    for (name, a), (_, b) in zip(model.state_dict().items(), second.state_dict().items(),
                                 strict=True):
        assert torch.equal(a, b), name
    assert second.head.weight is second.embed.weight
    for name, optimizer in optimizers.items():
        mine, other = optimizer.state_dict(), second_optimizers[name].state_dict()
        assert mine["param_groups"] == other["param_groups"]
        assert mine["state"].keys() == other["state"].keys()
        for index, values in mine["state"].items():
            for key, value in values.items():
                assert torch.equal(torch.as_tensor(value),
                                   torch.as_tensor(other["state"][index][key])), (index, key)


def test_every_part_of_the_state_matters(tmp_path):
    """Leaving out any one part of the packed state changes the run: the test above can fail."""
    model, optimizers, generator = _build("muon")
    _train(model, optimizers, generator, 3)
    tensors, meta = pack_state({"m": model}, optimizers, {"g": generator})
    whole = _train(model, optimizers, generator, 3)
    fresh = pack_state({"m": _build("muon")[0]}, {}, {})[0]
    parts = ["module/m/block.weight", "optimizer/matrices/0/momentum_buffer",
             "optimizer/rest/0/exp_avg", "optimizer/rest/1/exp_avg_sq", "optimizer/rest/0/step",
             "generator/g", "global_generator/0"]
    assert set(parts) <= set(tensors)
    for part in parts:
        other = dict(tensors)
        if part.startswith("generator"):
            other[part] = make_generator(5).get_state()
        else:
            other[part] = fresh[part] if part in fresh else torch.zeros_like(tensors[part])
        again, again_optimizers, again_generator = _build("muon")
        unpack_state(other, meta, {"m": again}, again_optimizers, {"g": again_generator})
        assert _train(again, again_optimizers, again_generator, 3) != whole, part


def test_tied_weights_are_stored_once():
    model = Tied()
    tensors, meta = pack_state({"m": model}, {}, {})
    assert {key for key in tensors if key.startswith("module/")} == {
        "module/m/embed.weight", "module/m/block.weight", "module/m/block.bias", "module/m/seen"}
    assert meta["state"]["tied"] == {"module/m/head.weight": "module/m/embed.weight"}


def test_a_checkpoint_of_something_else_is_refused():
    model = Tied()
    optimizers = OPTIMIZERS["adamw"](model)
    tensors, meta = pack_state({"m": model}, optimizers, {})
    with pytest.raises(CheckpointError, match=r"does not fit.*modules \['m'\], not \['other'\]"):
        unpack_state(tensors, meta, {"other": model}, optimizers, {})
    with pytest.raises(CheckpointError, match=r"does not fit.*it has no 'generator/g'"):
        unpack_state(tensors, meta, {"m": model}, optimizers, {"g": make_generator(0)})
    with pytest.raises(CheckpointError, match="does not fit"):
        unpack_state(tensors, meta, {"m": nn.Linear(2, 2)}, optimizers, {})
    two = OPTIMIZERS["two_groups"](model)
    with pytest.raises(CheckpointError, match="does not fit"):
        unpack_state(tensors, meta, {"m": model}, two, {})
    with pytest.raises(CheckpointError, match="does not fit.*it has no 'state'"):
        unpack_state(tensors, {}, {"m": model}, optimizers, {})


def test_checkpoints_hold_no_pickle(tmp_path):
    path = _saved(tmp_path)
    assert sorted(os.listdir(path)) == ["checkpoint.json", "tensors.safetensors"]
    safetensors.torch.load((path / "tensors.safetensors").read_bytes())


def test_errors_of_the_disk_inside_the_body_are_translated(tmp_path):
    with (pytest.raises(OutputError, match="No space left"), atomic_directory(tmp_path / "x")):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(FileNotFoundError), atomic_directory(tmp_path / "x"):
        Path(tmp_path / "missing").read_text()
    assert not (tmp_path / "x").exists()
    assert runtime.OutputError is OutputError
