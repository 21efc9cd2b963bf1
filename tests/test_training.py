"""Schedules, the order of an epoch, and what a training loop keeps on disk."""

from __future__ import annotations

import math

import pytest
import torch
from toys import same_weights

from rlhf_mini.files import CheckpointError
from rlhf_mini.runtime import make_generator, read_metrics
from rlhf_mini.training import TrainingRecord, cosine_lr, epoch_batch


def test_cosine_starts_at_one_and_ends_at_the_floor():
    factors = [cosine_lr(step, 101, floor=0.1) for step in range(102)]
    assert factors[0] == 1 and factors[101] == pytest.approx(0.1)
    assert factors == sorted(factors, reverse=True)
    for step in (10, 50, 77):
        expected = 0.1 + 0.9 * (1 + math.cos(math.pi * step / 101)) / 2
        assert factors[step] == pytest.approx(expected, rel=1e-12)


def test_warmup_is_linear_and_meets_the_peak():
    assert [cosine_lr(s, 100, warmup=4) for s in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert cosine_lr(3, 3, warmup=5) == 0.8  # a run shorter than its warm-up


def order(epoch):
    return make_generator(0, str(epoch))


@pytest.mark.parametrize("items, size", [(10, 3), (9, 3), (2, 5), (1, 1)])
def test_an_epoch_visits_every_item_once_in_a_new_order(items, size):
    per_epoch = math.ceil(items / size)
    epochs = []
    for epoch in range(3):
        batches = [epoch_batch(epoch * per_epoch + i, [5] * items, size, order)
                   for i in range(per_epoch)]
        assert {e for e, _, _ in batches} == {epoch}
        assert [last for _, _, last in batches] == [False] * (per_epoch - 1) + [True]
        visited = sum((rows for _, rows, _ in batches), [])
        assert sorted(visited) == list(range(items))
        assert sorted(len(rows) for _, rows, _ in batches)[1:] == [size] * (per_epoch - 1)
        epochs.append(visited)
    if items > 2:
        assert epochs[0] != epochs[1]


def test_a_batch_holds_items_of_similar_length():
    lengths = [i % 50 for i in range(200)]
    for step in range(50):
        _, rows, _ = epoch_batch(step, lengths, 4, order)
        assert max(lengths[i] for i in rows) - min(lengths[i] for i in rows) <= 20


def make_record(directory, every=2):
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.Adam(model.parameters())
    return model, TrainingRecord(directory, {"model": model}, {"adam": optimizer}, every)


def test_a_record_restores_model_step_history_and_what_was_kept(tmp_path):
    model, record = make_record(tmp_path)
    assert record.restore(best=math.inf) == (0, {"best": math.inf})
    for step in range(5):
        with torch.no_grad():
            model.weight.add_(1)
        record.log(step, loss=float(step))
        record.save(step + 1, best=step / 3)
    again, record = make_record(tmp_path)
    assert record.restore(best=math.inf) == (4, {"best": 1.0})
    assert torch.equal(again.weight, model.weight - 1)  # step 4 came after the last checkpoint
    assert record.history == [{"step": s, "loss": float(s)} for s in range(4)]
    assert read_metrics(tmp_path / "metrics.jsonl") == record.history


def test_a_record_without_folder_keeps_metrics_in_memory(tmp_path):
    _, record = make_record(None)
    assert record.restore(best=1) == (0, {"best": 1})
    record.log(0, loss=1.0)
    record.save(2)
    assert record.history == [{"step": 0, "loss": 1.0}]
    assert list(tmp_path.iterdir()) == []


def test_infinity_can_be_kept(tmp_path):
    _, record = make_record(tmp_path, every=1)
    record.log(0, loss=1.0)
    record.save(1, best=math.inf)
    assert make_record(tmp_path)[1].restore(best=0.0) == (1, {"best": math.inf})


def test_a_damaged_checkpoint_is_an_error_and_not_a_new_start(tmp_path):
    model, record = make_record(tmp_path, every=1)
    record.save(1)
    file = tmp_path / "checkpoint/tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    again, record = make_record(tmp_path)
    with pytest.raises(CheckpointError, match="is damaged: tensors.safetensors was changed or cut"):
        record.restore()
    assert same_weights(model, again)


def test_lost_rows_of_the_metrics_are_told_and_stop_nothing(tmp_path):
    _, record = make_record(tmp_path, every=1)
    for step in range(3):
        record.log(step, loss=1.0)
        record.save(step + 1)
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:1]))
    with pytest.warns(UserWarning, match="metrics.jsonl: lacks 2 of the 3 rows before the checkpo"):
        assert make_record(tmp_path)[1].restore()[0] == 3


def test_a_checkpoint_of_other_sizes_is_an_error(tmp_path):
    make_record(tmp_path, every=1)[1].save(1)
    other = torch.nn.Linear(3, 1)
    record = TrainingRecord(tmp_path, {"model": other},
                            {"adam": torch.optim.Adam(other.parameters())}, 1)
    with pytest.raises(CheckpointError, match="does not fit the models of this run"):
        record.restore()
