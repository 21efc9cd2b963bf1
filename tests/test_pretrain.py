"""The tokenizer, the rows, the loss and the loop that make the base model."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tolerances import EXACT, FP32
from toys import same_weights, stop_at

from rlhf_mini.config import PretrainConfig
from rlhf_mini.data import Document
from rlhf_mini.pretrain import (
    build_model,
    build_optimizers,
    copy_rows,
    encode_documents,
    lm_loss,
    pack_rows,
    train_base_model,
    train_tokenizer,
)
from rlhf_mini.runtime import NonFiniteLoss, read_metrics

NAMES, PLACES = ("Anna", "Bob", "Clara", "David", "Emma"), ("mill", "school", "river", "market")
DOCUMENTS = [Document(f"d{i}", f"{NAMES[i % 5]} walks to the {PLACES[i % 4]} in the morning.")
             for i in range(60)]
CONFIG = PretrainConfig(vocab_size=300, layers=1, hidden=32, heads=2, context=32, steps=12,
                        copy_steps=3, batch_size=4, row_tokens=16, checkpoint_every=4)
TOKENIZER = train_tokenizer([d.text for d in DOCUMENTS], CONFIG.vocab_size)


# ---------------------------------------------------------------- tokenizer

@given(st.text())
@example("<|endoftext|> naïve 日本語 🦊\u200d \x00\t\r\n  two  spaces ")
def test_any_text_survives_the_tokenizer(text):
    ids = TOKENIZER.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.eos_token_id not in ids and TOKENIZER.pad_token_id not in ids


def test_pad_and_eos_are_two_tokens():
    assert TOKENIZER.pad_token_id != TOKENIZER.eos_token_id
    assert {TOKENIZER.pad_token_id, TOKENIZER.eos_token_id} == {0, 1}
    assert TOKENIZER.padding_side == "left"
    assert len(TOKENIZER) == CONFIG.vocab_size


def test_the_tokenizer_merges_what_is_frequent():
    text = "Anna walks to the mill in the morning."
    assert len(TOKENIZER.encode(text)) < len(text.encode()) / 2


def test_documents_end_in_eos():
    encoded = encode_documents(TOKENIZER, DOCUMENTS[:3])
    for document, ids in zip(DOCUMENTS, encoded, strict=False):
        assert ids == TOKENIZER.encode(document.text) + [TOKENIZER.eos_token_id]


# ---------------------------------------------------------------- rows

@given(st.lists(st.lists(st.integers(2, 99), min_size=1, max_size=9), min_size=4, max_size=20),
       st.integers(1, 4), st.integers(0, 99))
def test_rows_hold_every_token_but_the_cut_tail(documents, row_tokens, seed):
    documents = [[*d, 0] for d in documents]
    rows = pack_rows(documents, row_tokens, torch.Generator().manual_seed(seed))
    total = sum(map(len, documents))
    assert rows.shape == (total // row_tokens, row_tokens)
    packed, given_tokens = Counter(rows.flatten().tolist()), Counter(sum(documents, []))
    assert sum((given_tokens - packed).values()) == total % row_tokens
    assert not packed - given_tokens
    stream = rows.flatten().tolist()  # documents stay whole: every piece between EOS is one
    pieces = " ".join(map(str, stream)).split(" 0 ")
    whole = [" ".join(map(str, d[:-1])) for d in documents]
    assert all(piece in whole for piece in pieces[:-1])


def test_rows_are_shuffled_by_the_generator():
    documents = [[i, 0] for i in range(2, 40)]
    first, again, other = (pack_rows(documents, 4, torch.Generator().manual_seed(s))
                           for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_corpus_below_one_row_is_an_error():
    with pytest.raises(ValueError, match="the corpus has 3 tokens; one row needs 4"):
        pack_rows([[5, 6, 0]], 4, torch.Generator())


def test_copy_rows_repeat_with_one_period_per_row():
    rows = copy_rows(40, 64, 300, torch.Generator().manual_seed(0)).numpy()
    periods = []
    for row in rows:
        fits = [p for p in range(1, 33) if (row[p:] == row[:-p]).all()]
        periods.append(fits[0])
        assert 5 <= fits[0] < 20
        assert row.min() >= 2 and row.max() < 300  # neither EOS nor PAD
    assert len(set(periods)) > 8


# ---------------------------------------------------------------- loss and optimisers

def test_loss_of_a_nearly_uniform_model_is_ln_v():
    model = build_model(dataclasses.replace(CONFIG, init_std=1e-4), TOKENIZER, seed=0)
    rows = copy_rows(4, 16, 300, torch.Generator().manual_seed(0))
    assert lm_loss(model, rows).item() == pytest.approx(math.log(300), abs=1e-3)


def test_loss_and_gradient_equal_those_of_transformers_labels():
    model = build_model(CONFIG, TOKENIZER, seed=0)
    rows = copy_rows(4, 16, 300, torch.Generator().manual_seed(0))
    gradients = []
    expected, loss = model(rows, labels=rows).loss, lm_loss(model, rows)
    torch.testing.assert_close(loss, expected, **FP32)
    for x in (loss, expected):
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(
            x, list(model.parameters()))]))
    torch.testing.assert_close(*gradients, **FP32)


def test_weights_follow_from_the_seed_and_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    one, same, other = (build_model(CONFIG, TOKENIZER, seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert same_weights(one, same) and not same_weights(one, other)
    std = one.transformer.h[0].mlp.c_fc.weight.std().item()
    assert std == pytest.approx(CONFIG.init_std, rel=0.1)


def test_every_parameter_has_exactly_one_optimiser():
    model = build_model(CONFIG, TOKENIZER, seed=0)
    owned = [id(p) for o in build_optimizers(model, CONFIG) for g in o.param_groups
             for p in g["params"]]
    assert sorted(owned) == sorted(id(p) for p in model.parameters())


# ---------------------------------------------------------------- the loop

def train(tmp_path=None, config=CONFIG, seed=0):
    model = build_model(config, TOKENIZER, seed)
    history = train_base_model(model, TOKENIZER, DOCUMENTS, config, seed, tmp_path)
    return model, history


def test_training_is_deterministic_and_logs_every_step(tmp_path):
    one, history = train(tmp_path)
    two, _ = train()
    assert same_weights(one, two)
    assert not same_weights(one, train(seed=1)[0])
    assert [row["step"] for row in history] == list(range(12))
    assert read_metrics(tmp_path / "metrics.jsonl") == history
    assert not one.training


@pytest.mark.parametrize("stop", [2, 5, 11])
def test_a_stopped_training_resumes_bit_for_bit(tmp_path, monkeypatch, stop):
    unbroken, history = train(tmp_path / "unbroken")
    stop_at(monkeypatch, stop)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "broken")
    resumed, again = train(tmp_path / "broken")
    assert same_weights(resumed, unbroken)
    assert again == history
    assert ((tmp_path / "broken/metrics.jsonl").read_bytes()
            == (tmp_path / "unbroken/metrics.jsonl").read_bytes())


def test_a_resumed_training_does_not_start_again(tmp_path, monkeypatch):
    stop_at(monkeypatch, 9)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path)
    steps = []
    monkeypatch.setattr("rlhf_mini.pretrain.check_finite", lambda loss, step, what:
                        steps.append(step))
    train(tmp_path)
    assert steps == [8, 9, 10, 11]


def test_the_first_steps_are_copying_and_the_rest_is_the_corpus(monkeypatch):
    seen = []
    monkeypatch.setattr("rlhf_mini.pretrain.lm_loss", lambda model, rows:
                        (seen.append(rows), lm_loss(model, rows))[1])
    train()
    assert [tuple(rows.shape) for rows in seen] == [(4, 16)] * 12
    corpus = set(sum(encode_documents(TOKENIZER, DOCUMENTS), []))
    assert all((rows >= 2).all() and not set(rows.flatten().tolist()) <= corpus
               for rows in seen[:3])
    assert all(set(rows.flatten().tolist()) <= corpus for rows in seen[3:])


def test_a_non_finite_loss_stops_with_the_step(tmp_path, monkeypatch):
    def poisoned(model, rows):
        loss = lm_loss(model, rows)
        return loss * math.nan if len(read_metrics(tmp_path / "metrics.jsonl")) == 6 else loss

    monkeypatch.setattr("rlhf_mini.pretrain.lm_loss", poisoned)
    with pytest.raises(NonFiniteLoss, match="step 6, pretraining batch: loss is nan"):
        train(tmp_path)
    assert (tmp_path / "checkpoint/checkpoint.json").exists()  # step 4 is kept


def test_the_schedule_warms_up_and_decays_to_a_tenth():
    config = dataclasses.replace(CONFIG, steps=40, copy_steps=0)
    _, history = train(config=config)
    rates = np.array([row["lr"] for row in history])
    assert rates[0] == pytest.approx(config.lr / 4)
    assert rates.max() == pytest.approx(config.lr, rel=1e-6)
    assert rates[-1] == pytest.approx(config.lr * 0.1, rel=0.05)
    assert (np.diff(rates[4:]) <= 0).all()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_model_learns_the_corpus(seed):
    config = dataclasses.replace(CONFIG, steps=60, copy_steps=0, lr=1e-2)
    model, history = train(config=config, seed=seed)
    rows = pack_rows(encode_documents(TOKENIZER, DOCUMENTS), 16, torch.Generator().manual_seed(9))
    assert history[0]["loss"] > 4.5  # near ln 300 = 5.7
    with torch.no_grad():
        # the corpus is two choices of 5 x 4 per sentence: a learnt model is far below the start
        assert lm_loss(model, rows).item() < 1.5


def test_rows_of_an_epoch_are_all_different():
    generator = torch.Generator().manual_seed(0)
    documents = [[i] * 3 + [0] for i in range(2, 50)]
    rows = pack_rows(documents, 4, generator)
    torch.testing.assert_close(rows.sort(0).values, torch.tensor(documents), **EXACT)


def test_documents_are_encoded_whole_and_as_typed_whatever_the_tokenizer_was_told(tokenizer):
    texts = ["a <|endoftext|> b", "c" * 40, "d"]
    tokenizer = copy.deepcopy(tokenizer)
    typed = [tokenizer.encode(t, add_special_tokens=False, split_special_tokens=True)
             for t in texts]
    tokenizer.backend_tokenizer.encode_special_tokens = False
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(pad_id=tokenizer.pad_token_id)
    eos = tokenizer.eos_token_id
    found = encode_documents(tokenizer, [Document(str(i), t) for i, t in enumerate(texts)])
    assert found == [[*ids, eos] for ids in typed]
    assert found[0].count(eos) == 1
