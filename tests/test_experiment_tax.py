"""The study of the alignment tax: the mixed loss and its loop, the policies, the other tasks."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from tolerances import EXACT, FORWARD

from rlhf_mini.config import load_preset
from rlhf_mini.data import Demonstration, collate, encode_pair
from rlhf_mini.experiments import Lab
from rlhf_mini.experiments import tax as study
from rlhf_mini.files import read_json
from rlhf_mini.loading import load_policy
from rlhf_mini.sft import train_sft

SMOKE = load_preset("smoke")


# ---------------------------------------------------------------- the mixed loss

DEMONSTRATIONS = [
    Demonstration("a", "Who bakes the bread?", "The baker."),
    Demonstration("b", "Where does Anna live?", "Anna lives on Mill Street."),
    Demonstration("c", "Tell me about the town.", "The town has a mill.")]


def separate_loss(policy, tokenizer, rows, ptx_coef):
    """The same by transformers' own loss, one demonstration at a time and without padding."""
    total, tokens = 0.0, 0
    for d in DEMONSTRATIONS:
        prompt, response = encode_pair(tokenizer, d.prompt, d.response, 99, 99, d.id)
        labels = torch.tensor([[-100] * len(prompt) + response])
        loss = policy(input_ids=torch.tensor([prompt + response]), labels=labels).loss
        total, tokens = total + loss * len(response), tokens + len(response)
    return total / tokens + ptx_coef * policy(input_ids=rows, labels=rows).loss


@pytest.mark.parametrize("ptx_coef", [0.0, 0.3, 3.0])
def test_loss_and_gradients_are_those_of_a_separate_computation(policy, tokenizer, ptx_coef):
    rows = torch.randint(2, len(tokenizer), (3, 20))
    batch = collate([encode_pair(tokenizer, d.prompt, d.response, 99, 99, d.id)
                     for d in DEMONSTRATIONS], tokenizer.pad_token_id)
    other = copy.deepcopy(policy)
    loss, stats = study.mixed_loss(policy, batch, rows, ptx_coef)
    wanted = separate_loss(other, tokenizer, rows, ptx_coef)
    loss.backward()
    wanted.backward()
    torch.testing.assert_close(loss, wanted, **FORWARD)
    assert stats["sft_loss"] + ptx_coef * stats["ptx_loss"] == pytest.approx(loss.item(), rel=1e-5)
    for (name, ours), theirs in zip(policy.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, **FORWARD, msg=name)


# ---------------------------------------------------------------- the loop

def train(lab, ptx_coef, seed=3, **changes):
    config = replace(SMOKE.sft, **changes)
    policy, tokenizer = lab.run.policy("base")
    train, valid = (lab.run.demonstrations(x, tokenizer, config) for x in ("train", "valid"))
    history = study.train_mixed_sft(policy, tokenizer, train, valid, lab.read_corpus(),
                                    ptx_coef, 4, config, seed)
    return policy, history


def assert_same(ours, theirs):
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, **EXACT, msg=name)


# The high rate overfits, so the best epoch is not the last: it has to be kept.
@pytest.mark.parametrize("changes", [dict(), dict(lr=0.03, epochs=6)])
def test_without_text_it_is_plain_sft_bit_for_bit(lab, changes):
    policy, history = train(lab, 0.0, **changes)
    config = replace(SMOKE.sft, dropout=0.0, **changes)
    other, tokenizer = lab.run.policy("base")
    wanted = train_sft(other, tokenizer, *[
        lab.run.demonstrations(x, tokenizer, config) for x in ("train", "valid")], config, 3)
    assert_same(policy, other)
    assert [row["sft_loss"] for row in history] == [row["loss"] for row in wanted if "loss" in row]


def test_the_loop_repeats_itself_and_depends_on_seed_and_text(lab):
    ours, history = train(lab, 1.0)
    again, repeated = train(lab, 1.0)
    assert_same(ours, again)
    assert history == repeated
    torch.rand(3)  # the global generator does not matter
    for other, _ in (train(lab, 1.0, seed=4), train(lab, 0.0)):
        with pytest.raises(AssertionError):
            assert_same(ours, other)


def test_text_keeps_the_corpus_loss_down(lab):
    def corpus_loss(policy) -> float:
        rows = lab.read_corpus()[:32]
        with torch.no_grad():
            return policy(input_ids=rows, labels=rows).loss.item()

    plain, mixed = (train(lab, x, epochs=6, lr=3e-3)[0] for x in (0.0, 3.0))
    assert corpus_loss(mixed) < corpus_loss(plain) - 0.05


# ---------------------------------------------------------------- policies and tasks

def test_mixed_sft_starts_from_the_base_model(lab, monkeypatch):
    def check(policy, tokenizer, train, valid, rows, ptx_coef, ptx_rows, config, seed):
        assert_same(policy, load_policy(lab.run.directory / "base", "cpu")[0])
        assert {d.split for d in train} == {"train"} and {d.split for d in valid} == {"valid"}
        assert (ptx_coef, ptx_rows, config) == (0.7, SMOKE.ppo.ptx_rows, SMOKE.sft)
        checked.append(rows.shape[1])

    checked: list[int] = []
    monkeypatch.setattr(study, "train_mixed_sft", check)
    study.train_mixed_policy(lab, 0.7)
    assert checked == [SMOKE.pretrain.row_tokens]


def test_each_condition_gets_its_policy(lab, monkeypatch):
    monkeypatch.setattr(study, "LONGER", 1)
    assert study.make_policy(lab, study.BASE) == lab.run.directory / "base"
    assert study.make_policy(lab, study.SFT) == lab.policy
    seen = []
    monkeypatch.setattr(Lab, "train_policy", lambda *args: seen.append(args[2]))
    conditions = (*study.BY_KL, *study.BY_PTX, study.BOTH)
    for condition in conditions:
        study.make_policy(lab, condition)
    for config, condition in zip(seen, conditions, strict=True):
        assert config == replace(SMOKE.ppo, kl_coef=condition["kl_coef"],
                                 ptx_coef=condition["ptx_coef"])


def test_ppo_with_text_learns_the_text_from_the_same_rollouts(lab):
    reward = lab.train_reward_model(lab.collect("train", SMOKE.ranking.prompts))
    config = replace(SMOKE.ppo, lr=3e-3, ptx_coef=10.0)
    folders = [lab.train_policy(reward, replace(config, ptx_coef=x)) for x in (0.0, 10.0)]
    without, mixed = (study.measure_tasks(lab, folder)["corpus_loss"] for folder in folders)
    assert mixed < without - 0.05
    histories = [read_json(folder / "history.json") for folder in folders]
    assert len(histories[1]) == config.iterations
    for name in ("score", "gold", "entropy"):  # before the first step all is the same
        assert histories[0][0][name] == histories[1][0][name]


def test_tasks_are_measured_as_greedy_decoding_and_the_loss_one_document_at_a_time(lab):
    folder = lab.run.directory / "base"
    policy, tokenizer = load_policy(folder, "cpu")
    found, eos = study.measure_tasks(lab, folder), tokenizer.eos_token_id
    assert set(found) == {"facts", "reading", "summary", "corpus_loss"}
    losses = []
    for document in lab.run.town.documents:
        if document.split == "valid":
            ids = torch.tensor([[eos, *tokenizer.encode(document.text), eos]])
            with torch.no_grad():
                losses.append(policy(input_ids=ids, labels=ids).loss.item())
    assert found["corpus_loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    solved = []
    for item in lab.run.town.zero_shot:
        if item.task == "facts":
            ids, target = [eos, *tokenizer.encode(item.text)], tokenizer.encode(item.target)
            for _ in target:
                with torch.no_grad():
                    ids.append(int(policy(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            solved.append(ids[-len(target):] == target)
    assert found["facts"] == pytest.approx(np.mean(solved))


@pytest.mark.parametrize("condition", [study.SFT, study.MIXED[2], study.BOTH],
                         ids=lambda c: c["method"])
def test_rows_are_complete_and_finite(lab, condition, monkeypatch):
    monkeypatch.setattr(study, "LONGER", 1)
    row, = study.measure(lab, condition)
    judged = {f"{name}_{mode}" for mode in ("sampled", "greedy") for name in (
        "gold", "helpful", "truthful", "harmless", "kl", "response_tokens", "gain", "win")}
    assert set(row) == judged | set(study.TASKS)
    assert all(isinstance(x, float) and np.isfinite(x) for x in row.values())
    if condition == study.SFT:
        assert row["gain_sampled"] == row["gain_greedy"] == row["kl_sampled"] == 0


# ---------------------------------------------------------------- the figure

def test_the_figure_shows_gain_against_each_task():
    made = [{"seed": seed, "gain_sampled": number / 10 + seed} | condition | {
        task: place + number / 100 for place, task in enumerate(study.TASKS)}
        for number, condition in enumerate(study.STUDY.conditions) for seed in (0, 1)]
    number_of = {str(c): i for i, c in enumerate(study.STUDY.conditions)}
    figure = study.draw(made)
    assert isinstance(figure, Figure)
    for place, axes in enumerate(figure.axes):
        lines = {line.get_label(): line for line in axes.get_lines()}
        for label, conditions in (("PPO, KL penalty", study.BY_KL), ("SFT with text", study.MIXED),
                                  ("PPO, text", (study.BY_KL[0], *study.BY_PTX))):
            numbers = np.array([number_of[str(c)] for c in conditions])
            assert lines[label].get_xdata() == pytest.approx(place + numbers / 100)
            assert lines[label].get_ydata() == pytest.approx(numbers / 10 + 0.5)
    study.draw([row for row in made if row["method"] == "ppo"])  # the rest is not there yet
