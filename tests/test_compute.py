"""Precision and compiler: what runs in which type, and that nothing else changes."""

from __future__ import annotations

import copy
import shutil
import threading
import time

import numpy as np
import pytest
import torch
from tolerances import FP32
from toys import make_batch, make_reward_model

from rlhf_mini.compute import Muon, compilable, computing, one_thread, side_by_side
from rlhf_mini.config import ComputeConfig, SFTConfig, load_preset, override
from rlhf_mini.models import RewardModel, ValueModel, compute_response_logprobs
from rlhf_mini.sft import sft_loss

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BF16 = ComputeConfig(dtype="bfloat16")
# bfloat16 keeps 8 bits: each product's inputs are rounded by up to 2**-9 of their size. The toy's
# logits are below 4 in size and pass through two layers.
ROUNDED = dict(rtol=0, atol=0.1)


def step(policy, batch) -> tuple[float, list[torch.Tensor]]:
    """The SFT loss and its gradients."""
    logprobs, _ = compute_response_logprobs(policy, batch)
    loss, stats = sft_loss(logprobs, batch.response_mask)
    return stats["loss"], list(torch.autograd.grad(loss, list(policy.parameters())))


def test_bfloat16_rounds_products_and_nothing_else(policy):
    batch = make_batch(6)
    exact, _ = compute_response_logprobs(policy, batch)
    with computing(BF16, CPU):
        rounded, entropy = compute_response_logprobs(policy, batch)
        loss, gradients = step(policy, batch)
    assert rounded.dtype == entropy.dtype == torch.float32
    assert {p.dtype for p in policy.parameters()} == {g.dtype for g in gradients} == {torch.float32}
    torch.testing.assert_close(rounded, exact, **ROUNDED)
    assert (rounded - exact).abs().max() > 1e-4  # it did round
    assert abs(loss - step(policy, batch)[0]) < 0.02


def test_the_rounded_weights_follow_the_optimizer(policy):
    # A cache of rounded weights would survive the step and freeze the loss.
    batch = make_batch(6)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.5)
    with computing(BF16, CPU):
        losses = []
        for _ in range(3):
            loss, gradients = step(policy, batch)
            for parameter, gradient in zip(policy.parameters(), gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            losses.append(loss)
    assert losses[0] > losses[1] > losses[2]


def test_scores_and_values_are_not_rounded_at_the_end(policy):
    # A score in bfloat16 could take 256 values between 1 and 2 only.
    reward_model = make_reward_model(policy)
    with torch.no_grad():
        reward_model.model.classifier.bias.fill_(1000.0)
    batch = make_batch(6)
    with computing(BF16, CPU), torch.no_grad():
        scores = reward_model(batch.input_ids, batch.attention_mask)
        values = ValueModel.from_reward_model(reward_model)(batch)
    assert scores.dtype == values.dtype == torch.float32
    assert len(set(scores.tolist())) > 1  # near 1000 two neighbours in bfloat16 are 4 apart
    assert isinstance(reward_model, RewardModel)


def test_the_precision_ends_with_the_block():
    with pytest.raises(KeyError), computing(BF16, CPU):
        assert torch.is_autocast_enabled("cpu")
        raise KeyError
    assert not torch.is_autocast_enabled("cpu")


def test_float32_is_exactly_what_it_is_without(policy):
    batch = make_batch(6)
    with computing(ComputeConfig(), CPU):
        inside = compute_response_logprobs(policy, batch)
    for a, b in zip(inside, compute_response_logprobs(policy, batch), strict=True):
        assert torch.equal(a, b)


def test_compiling_is_asked_for_and_ends_with_the_block(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: compiled.append(dynamic) or (
        lambda x: ("compiled", function(x))))
    double = compilable(lambda x: 2 * x)
    assert double(2) == 4 and not compiled
    with computing(ComputeConfig(compile=True), CPU):
        assert double(2) == ("compiled", 4) and double(3) == ("compiled", 6)
    assert double(2) == 4 and compiled == [True]  # once, for any shapes


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None,
                    reason="compiling needs a C++ compiler")
def test_compiled_layers_give_the_same_loss_and_gradients(policy):
    small, large = make_batch(3), make_batch(5, seed=1, response=(6, 12))
    eager = [step(copy.deepcopy(policy), batch) for batch in (small, large)]
    with computing(ComputeConfig(compile=True), CPU):
        fused = [step(policy, batch) for batch in (small, large)]
    for (loss, gradients), (other, others) in zip(eager, fused, strict=True):
        assert abs(loss - other) < 1e-5
        for a, b in zip(gradients, others, strict=True):  # sums in another order
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_a_gpu_without_bfloat16_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla P100")
    with (pytest.raises(ValueError, match="compute.dtype = 'bfloat16': Tesla P100 does not"),
          computing(BF16, torch.device("cuda"))):
        pass


def test_other_types_are_refused():
    with pytest.raises(ValueError, match="ComputeConfig.dtype = 'float16': expected 'float32' or "
                                         "'bfloat16'"):
        override(load_preset("cpu"), ["compute.dtype=float16"])


def test_settings_of_computing_have_no_name_of_another_stage():
    assert override(load_preset("cpu"), ["dtype=bfloat16"]).compute.dtype == "bfloat16"
    assert not hasattr(SFTConfig(), "compile")


# ---- two threads ---------------------------------------------------------------------------------


@pytest.fixture
def threads():
    """Set the number of threads, and set it back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def look(barrier=None):
    """What a thread sees of torch's settings; waits until another looks too."""
    if barrier:
        barrier.wait(timeout=20)
    return (threading.get_ident(), torch.get_num_threads(), torch.is_grad_enabled(),
            torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"))


@pytest.mark.parametrize("config", [ComputeConfig(), BF16])
def test_with_two_threads_two_functions_run_at_once_each_in_one(threads, config):
    threads(2)
    barrier = threading.Barrier(2)
    with computing(config, CPU):
        first, second = side_by_side(CPU, lambda: look(barrier), lambda: look(barrier))
    assert first[0] == threading.get_ident() != second[0]
    assert first[1:] == second[1:]
    assert first[1:4] == (1, True, config is BF16)
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("count, device, config", [
    (1, CPU, ComputeConfig()), (3, CPU, ComputeConfig()), (2, CUDA, ComputeConfig()),
    (2, CPU, ComputeConfig(compile=True))])
def test_otherwise_they_run_one_after_the_other(threads, count, device, config):
    threads(count)
    with computing(config, CPU):
        first, second = side_by_side(device, look, look)
    assert first == second == look() and first[1] == count


def test_without_gradients_here_there_are_none_in_the_other_thread(threads):
    threads(2)
    with torch.no_grad():
        first, second = side_by_side(CPU, look, look)
    assert first[1:] == second[1:] and not second[2]
    assert side_by_side(CPU, look, look)[1][2]  # and the thread does not stay so


@pytest.mark.parametrize("count, device, free", [
    (1, CPU, False), (2, CPU, True), (3, CPU, False), (2, CUDA, False)])
def test_of_two_threads_of_a_cpu_one_can_be_kept_out(threads, count, device, free):
    threads(count)
    with pytest.raises(ZeroDivisionError), one_thread(device) as spare:
        assert spare is free and torch.get_num_threads() == (1 if free else count)
        raise ZeroDivisionError
    assert torch.get_num_threads() == count


@pytest.mark.parametrize("bad", [0, 1])
def test_an_error_in_one_of_two_threads_is_raised_when_both_are_done(threads, bad):
    threads(2)
    done = []

    def work(number):
        if number == bad:
            raise ZeroDivisionError(str(number))
        time.sleep(0.2)
        done.append(number)

    with pytest.raises(ZeroDivisionError, match=str(bad)):
        side_by_side(CPU, lambda: work(0), lambda: work(1))
    assert done == [1 - bad] and torch.get_num_threads() == 2


# ---- Muon ----------------------------------------------------------------------------------------


def muon_by_hand(weight, gradients, lr, decay, momentum=0.95):
    """Jordan's Muon in double precision: Nesterov's momentum, five Newton-Schulz iterations."""
    average = np.zeros_like(weight)
    for gradient in gradients:
        average = momentum * average + (1 - momentum) * gradient
        x = momentum * average + (1 - momentum) * gradient
        x = x.T if x.shape[0] > x.shape[1] else x
        x = x / np.linalg.norm(x)
        for _ in range(5):
            square = x @ x.T
            x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
        x = x.T if weight.shape[0] > weight.shape[1] else x
        scale = max(1, weight.shape[0] / weight.shape[1]) ** 0.5
        weight = weight * (1 - lr * decay) - lr * scale * x
    return weight


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (16, 16)])
def test_muon_rounds_as_float32_on_a_cpu(shape):
    rng = np.random.default_rng(0)
    start, *gradients = rng.normal(size=(4, *shape))
    weight = torch.nn.Parameter(torch.tensor(start, dtype=torch.float32))
    optimizer = Muon([weight], lr=0.1, weight_decay=0.1)
    for gradient in gradients:
        weight.grad = torch.tensor(gradient, dtype=torch.float32)
        optimizer.step()
    expected = muon_by_hand(start, gradients, lr=0.1, decay=0.1)
    np.testing.assert_allclose(weight.detach().numpy(), expected, **FP32)
    assert weight.bfloat16().dtype == torch.bfloat16  # elsewhere nothing changed
