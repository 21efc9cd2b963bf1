"""Masked arithmetic against NumPy on the selected entries, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerances import EXACT, FP32, FP64
from toys import GARBAGE, random_mask

from rlhf_mini.tensors import (
    compute_entropy,
    gather_logprobs,
    last_index,
    masked_mean,
    masked_var,
    masked_whiten,
    pick_tokens,
)


def draw(seed: int, *shape: int, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@given(st.integers(0, 1000), st.integers(1, 6), st.integers(1, 9))
def test_mean_var_and_whitening_equal_numpy_on_the_selected_entries(seed, rows, width):
    x, mask = 3 * draw(seed, rows, width) + 8, random_mask(rows, width, seed)
    selected = x[mask].numpy()
    np.testing.assert_allclose(masked_mean(x, mask), selected.mean(), **FP64)
    np.testing.assert_allclose(masked_var(x, mask), selected.var(), **FP64)
    if len(selected) > 1:
        expected = (selected - selected.mean()) / np.sqrt(selected.var() + 1e-8)
        whitened = masked_whiten(x, mask)
        np.testing.assert_allclose(whitened[mask], expected, rtol=1e-8, atol=1e-10)
        assert not whitened[~mask].any()


def test_mean_along_a_dimension_equals_numpy_row_by_row():
    x, mask = draw(0, 5, 7), random_mask(5, 7)
    rows = [x[b].numpy()[mask[b].numpy()].mean() for b in range(5)]
    np.testing.assert_allclose(masked_mean(x, mask, dim=1), rows, **FP64)


def test_nothing_selected_is_zero_not_nan():
    x, mask = torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool)
    assert masked_mean(x, mask) == 0
    assert masked_var(x, mask) == 0
    assert masked_mean(x, mask, dim=1).tolist() == [0, 0]


@pytest.mark.parametrize("function", [masked_mean, masked_var, masked_whiten])
@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_off_the_mask_changes_neither_value_nor_gradient(function, garbage):
    mask, results = random_mask(4, 6), []
    for filler in (0.0, garbage):
        x = torch.where(mask, draw(1, 4, 6), filler).requires_grad_()
        y = function(x, mask)
        (y * torch.arange(1.0, y.numel() + 1).view(y.shape)).sum().backward()
        results.append((y.detach(), x.grad))
    torch.testing.assert_close(results[1][0], results[0][0], **EXACT)
    torch.testing.assert_close(results[1][1], results[0][1], **EXACT)
    assert not results[1][1][~mask].any()


def test_whitening_removes_the_mean():
    # The number of a published bug: advantages with mean 8.114 came out with mean 8.114.
    mask = random_mask(16, 12)
    x = draw(2, 16, 12, dtype=torch.float32)
    x = x - masked_mean(x, mask) + 8.114
    whitened = masked_whiten(x, mask)[mask]
    assert abs(whitened.mean()) < 1e-5
    assert whitened.std(correction=0) == pytest.approx(1, abs=1e-5)


def test_whitening_without_shift_keeps_the_mean():
    mask = random_mask(16, 12)
    x = 4 * draw(3, 16, 12) + 8.114
    kept = masked_whiten(x, mask, shift_mean=False)[mask]
    np.testing.assert_allclose(kept.mean(), x[mask].mean(), **FP64)
    assert kept.std(correction=0) == pytest.approx(1, abs=1e-6)


def test_whitening_equal_entries_gives_zeros():
    assert not masked_whiten(torch.full((2, 3), 5.0), random_mask(2, 3)).any()


def test_logprobs_equal_scipy_log_softmax():
    logits = 5 * draw(4, 3, 5, 11)
    tokens = torch.randint(11, (3, 5), generator=torch.Generator().manual_seed(0))
    table = scipy.special.log_softmax(logits.numpy(), axis=-1)
    expected = [[table[b, t, tokens[b, t]] for t in range(5)] for b in range(3)]
    np.testing.assert_allclose(gather_logprobs(logits, tokens), expected, **FP64)


def test_logprobs_of_the_vocabulary_sum_to_one():
    logits = 5 * draw(5, 1, 11, dtype=torch.float32).expand(11, 11)
    assert gather_logprobs(logits, torch.arange(11)).exp().sum() == pytest.approx(1, abs=1e-6)


def test_entropy_of_uniform_and_certain_and_random_distributions():
    assert compute_entropy(torch.zeros(1, 50)).item() == pytest.approx(math.log(50), abs=1e-5)
    certain = torch.tensor([[0.0, 80.0, 0.0]])
    assert compute_entropy(certain).item() == pytest.approx(0, abs=1e-6)
    logits = 3 * draw(6, 4, 9)
    expected = scipy.stats.entropy(scipy.special.softmax(logits.numpy(), axis=-1), axis=-1)
    np.testing.assert_allclose(compute_entropy(logits), expected, **FP32)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.0])
def test_a_token_owns_as_much_of_the_noise_as_its_probability(temperature):
    logits, n = 2 * draw(7, 9, dtype=torch.float32), 20_000
    noise = (torch.arange(n) + 0.5) / n
    counts = np.bincount(pick_tokens(logits.expand(n, -1), temperature, noise), minlength=9)
    expected = n * scipy.special.softmax(logits.double().numpy() / temperature)
    assert np.abs(counts - expected).max() <= 1.5  # both ends of an interval fall between two


def test_tokens_stand_in_the_order_of_the_noise():
    picked = pick_tokens(draw(8, 9).expand(500, -1), 1.0, torch.arange(500) / 500)
    assert picked.tolist() == sorted(picked.tolist())


@pytest.mark.parametrize("seed", range(20))
def test_the_ends_of_the_noise_pick_tokens_that_can_be(seed):
    logits = 3 * draw(seed, 1, 11, dtype=torch.float32)
    logits[0, [0, 1, 9, 10]] = -torch.inf
    largest = 1 - 2.0**-24  # the largest float32 below 1
    assert pick_tokens(logits, 0.9, torch.tensor([0.0])).item() == 2
    assert pick_tokens(logits, 0.9, torch.tensor([largest])).item() == 8


def test_temperature_zero_takes_the_likeliest_token_without_noise():
    logits = draw(9, 50, 11)
    assert pick_tokens(logits, 0, None).tolist() == logits.numpy().argmax(-1).tolist()


@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6).filter(any), min_size=1,
                max_size=5))
def test_last_index_equals_a_loop(rows):
    expected = [max(t for t, bit in enumerate(row) if bit) for row in rows]
    assert last_index(torch.tensor(rows)).tolist() == expected


def test_last_index_names_an_empty_row():
    with pytest.raises(ValueError, match="mask row 1 selects no token"):
        last_index(torch.tensor([[True, False], [False, False]]))
