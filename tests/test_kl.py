"""KL against sums in float64 and against enumeration of a small vocabulary."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerances import FP32, FP64

from rlhf_mini.kl import KLController, compute_exact_kl, estimate_kl

P = torch.tensor([0.50, 0.25, 0.15, 0.08, 0.02], dtype=torch.float64)
Q = torch.tensor([0.10, 0.20, 0.30, 0.15, 0.25], dtype=torch.float64)
KL = sum(p * math.log(p / q) for p, q in zip(P.tolist(), Q.tolist(), strict=True))


def expectation(kind: str) -> float:
    """E over actions sampled from P of the estimate of KL(P || Q)."""
    return (P * estimate_kl(P.log(), Q.log(), kind)).sum().item()


@given(st.integers(0, 1000))
def test_exact_kl_equals_scipy(seed):
    rng = np.random.default_rng(seed)
    logits, ref_logits = 3 * rng.normal(size=(2, 4, 7))
    p, q = scipy.special.softmax(logits, -1), scipy.special.softmax(ref_logits, -1)
    kl = compute_exact_kl(torch.tensor(logits), torch.tensor(ref_logits))
    np.testing.assert_allclose(kl, scipy.stats.entropy(p, q, axis=-1), **FP64)
    kl32 = compute_exact_kl(torch.tensor(logits).float(), torch.tensor(ref_logits).float())
    np.testing.assert_allclose(kl32, kl, rtol=1e-4, atol=1e-5)  # cancellation in float32


def test_exact_kl_of_equal_distributions_is_zero_and_ignores_a_shift():
    logits = torch.randn(3, 8)
    assert compute_exact_kl(logits, logits).abs().max() == 0
    np.testing.assert_allclose(compute_exact_kl(logits, logits + 7), 0, atol=1e-6)


def test_exact_kl_has_the_right_direction():
    assert compute_exact_kl(P.log(), Q.log()).item() == pytest.approx(KL, rel=1e-12)
    reverse = compute_exact_kl(Q.log(), P.log()).item()
    assert abs(reverse - KL) > 0.05  # the control: these two distributions tell the two apart


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(kind):
    assert expectation(kind) == pytest.approx(KL, rel=1e-12)


def test_k2_is_biased():
    expected = sum(p * math.log(p / q) ** 2 / 2 for p, q in zip(P.tolist(), Q.tolist(),
                                                                strict=True))
    assert expectation("k2") == pytest.approx(expected, rel=1e-12)
    assert abs(expectation("k2") - KL) > 0.05


def test_wrong_sign_and_reversed_k3_are_caught_by_this_enumeration():
    # Published bugs: k1 with the wrong sign; k3 reversed (a true KL of 0.411 came out as 0.701).
    d = P.log() - Q.log()
    assert (P * -d).sum().item() == pytest.approx(-KL)
    assert abs((P * (torch.expm1(d) - d)).sum().item() - KL) > 0.1


def test_k2_and_k3_are_never_negative_and_k1_may_be():
    assert estimate_kl(P.log(), Q.log(), "k1").min() < 0
    assert estimate_kl(P.log(), Q.log(), "k2").min() >= 0
    assert estimate_kl(P.log(), Q.log(), "k3").min() >= 0
    # and near 0, where exp(-d) - 1 + d cancels, k3 is d**2 / 2
    tiny = estimate_kl(torch.tensor([1e-3]), torch.zeros(1), "k3").item()
    assert tiny == pytest.approx(5e-7, rel=0.1)


def test_k1_is_the_default_and_other_kinds_are_errors():
    torch.testing.assert_close(estimate_kl(P.log(), Q.log()), P.log() - Q.log(), **FP32)
    with pytest.raises(ValueError, match="kind 'k4': expected 'k1', 'k2' or 'k3'"):
        estimate_kl(P.log(), Q.log(), "k4")


@pytest.mark.parametrize("kl, error", [
    (6.0, 0.0), (6.6, 0.1), (5.4, -0.1), (7.2, 0.2), (60.0, 0.2), (0.0, -0.2), (-1.0, -0.2)])
def test_adaptive_coefficient_follows_ziegler(kl, error):
    controller = KLController(0.2, target=6.0, horizon=10_000)
    controller.update(kl, episodes=512)
    assert controller.kl_coef == pytest.approx(0.2 * (1 + error * 512 / 10_000), rel=1e-12)


def test_coefficient_is_fixed_without_a_target():
    controller = KLController(0.2)
    controller.update(100.0, episodes=512)
    assert controller.kl_coef == 0.2


def test_adaptive_coefficient_settles_at_the_target():
    # A world in which the KL is 3 / beta: the fixed point for a target of 6 nats is beta = 0.5.
    controller = KLController(0.1, target=6.0, horizon=1000)
    for _ in range(500):
        controller.update(3 / controller.kl_coef, episodes=100)
    assert controller.kl_coef == pytest.approx(0.5, rel=1e-3)
