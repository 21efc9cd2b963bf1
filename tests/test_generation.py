"""Sampling against transformers' greedy search, uncached forwards and the softmax itself.

Every property is asked of both: the plain `generate` and the fast `decode`.
"""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch
from tolerances import EXACT, FORWARD
from toys import EOS, PAD, V, make_pairs, make_talker

from rlhf_mini.data import encode_prompt, left_pad
from rlhf_mini.decoding import decode
from rlhf_mini.generation import Response, generate, sample_responses
from rlhf_mini.runtime import NonFiniteLoss

PROMPTS = [prompt for prompt, _ in make_pairs(6, seed=3, prompt=(2, 11))]


@pytest.fixture(params=[generate, decode], ids=["generate", "decode"])
def sample(request):
    """Either function, with noise from a seed."""
    def draw(policy, prompts=PROMPTS, seed=0, tokens=12, copies=None, **kwargs):
        ids, mask = left_pad(prompts, PAD)
        noise = torch.rand(sum(copies or [1] * len(prompts)), tokens,
                           generator=torch.Generator().manual_seed(seed))
        return request.param(policy, ids, mask, max_response_tokens=tokens, eos_id=EOS, pad_id=PAD,
                             noise=noise, copies=copies, **kwargs)
    return draw


@pytest.fixture
def talker(tokenizer):
    return make_talker(tokenizer)


def test_greedy_equals_transformers_generate(sample, tokenizer):
    policy = make_talker(tokenizer, seed=2, eos_bias=0.8)
    ids, mask = left_pad(PROMPTS, PAD)
    theirs = policy.generate(ids, attention_mask=mask.long(), do_sample=False, max_new_tokens=12,
                             pad_token_id=PAD, eos_token_id=EOS)[:, ids.shape[1]:]
    ours, _, _ = sample(policy, temperature=0)
    assert ours.tolist() == theirs.tolist()
    assert 0 < (ours == EOS).any(1).sum() < len(PROMPTS)  # some end, some are cut off


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_policy_with_spoiled_weights_is_not_sampled_from(sample, policy, value):
    with torch.no_grad():
        policy.transformer.h[1].mlp.c_fc.weight[0, 0] = value
    for temperature in (0, 1):
        with pytest.raises(NonFiniteLoss, match="logits are not finite: .* Try a lower learning"):
            sample(policy, temperature=temperature)


def test_greedy_takes_the_likeliest_token_of_an_uncached_forward(sample, policy):
    responses, _, _ = sample(policy, temperature=0)
    for prompt, response in zip(PROMPTS, responses.tolist(), strict=True):
        ids = list(prompt)
        for token in response:
            with torch.no_grad():
                assert token == policy(torch.tensor([ids])).logits[0, -1].argmax().item()
            ids.append(token)


def test_sampling_with_cache_equals_sampling_from_uncached_forwards(sample, policy):
    # The same random numbers through softmax(logits / T) of the whole sequence, one row at a time.
    responses, _, logprobs = sample(policy, seed=5, temperature=0.8, tokens=8)
    noise = torch.rand(len(PROMPTS), 8, generator=torch.Generator().manual_seed(5))
    rows = [list(p) for p in PROMPTS]
    for t in range(8):
        with torch.no_grad():
            logits = torch.stack([policy(torch.tensor([row])).logits[0, -1] for row in rows])
        p = (logits.double() / 0.8).softmax(-1)
        tokens = (p.cumsum(-1) <= noise[:, t, None]).sum(-1).tolist()  # an interval as long as p
        assert tokens == responses[:, t].tolist()
        expected = p[range(len(rows)), tokens].log()
        np.testing.assert_allclose(logprobs[:, t], expected, **FORWARD)
        for row, token in zip(rows, tokens, strict=True):
            row.append(token)


def test_copies_equal_prompts_that_are_repeated(sample, policy):
    copies = [2, 1, 3, 4, 1, 2]
    repeated = [p for p, n in zip(PROMPTS, copies, strict=True) for _ in range(n)]
    shared = sample(policy, seed=3, tokens=8, copies=copies)
    for one, other in zip(shared, sample(policy, repeated, seed=3, tokens=8), strict=True):
        assert torch.equal(one, other)
    assert len(set(map(tuple, shared[0].tolist()))) > len(PROMPTS)  # copies differ


def first_token_p_value(sample, policy, drawn_at: float, tested_at: float) -> float:
    """Chi-square test of 6000 first tokens against softmax(logits / T); rare tokens are pooled."""
    prompt = PROMPTS[0]
    tokens, _, _ = sample(policy, [prompt] * 6000, seed=1, tokens=1, temperature=drawn_at)
    counts = np.bincount(tokens[:, 0], minlength=V)
    with torch.no_grad():
        logits = policy(torch.tensor([prompt])).logits[0, -1].double() / tested_at
    expected = logits.softmax(-1).numpy() * 6000
    rare = expected < 5
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    return scipy.stats.chisquare(counts, expected).pvalue


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_first_tokens_follow_the_softmax(sample, policy, temperature):
    assert first_token_p_value(sample, policy, temperature, temperature) > 0.01


def test_the_chi_square_test_notices_another_temperature(sample, policy):
    assert first_token_p_value(sample, policy, 1.0, 0.7) < 1e-6


def test_eos_is_real_and_padding_follows(sample, talker):
    ids, mask, logprobs = sample(talker, PROMPTS * 5, tokens=12)
    assert torch.equal(logprobs < 0, mask)
    ended = 0
    for row, bits in zip(ids.tolist(), mask.tolist(), strict=True):
        length = sum(bits)
        assert bits == [True] * length + [False] * (len(bits) - length)
        assert EOS not in row[:length - 1]
        assert row[length:] == [PAD] * (len(row) - length)
        ended += row[length - 1] == EOS
        assert row[length - 1] == EOS or length == 12
    assert 5 < ended < 30  # both kinds of rows were seen


def test_generation_stops_when_all_have_ended(sample, tokenizer):
    ids, mask, logprobs = sample(make_talker(tokenizer, eos_bias=50.0), tokens=12)
    assert ids.tolist() == [[EOS]] * len(PROMPTS)
    assert mask.all() and mask.shape == logprobs.shape == (len(PROMPTS), 1)


def test_same_noise_same_tokens_other_noise_other_tokens(sample, policy):
    first, again, other = (sample(policy, seed=seed)[0] for seed in (0, 0, 1))
    torch.testing.assert_close(first, again, **EXACT)
    assert not torch.equal(first, other)


def test_the_global_generator_is_left_alone(sample, policy):
    before = torch.get_rng_state()
    sample(policy)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("function", [generate, decode])
def test_what_cannot_work_is_an_error_before_anything_runs(function, policy):
    ids, mask = left_pad([[5] * 50], PAD)
    arguments = dict(eos_id=EOS, pad_id=PAD, noise=torch.rand(1, 15))
    assert function(policy, ids, mask, max_response_tokens=14, **arguments)  # 64 just fit

    policy.transformer.wte.register_forward_pre_hook(lambda *args: pytest.fail("the policy runs"))
    with pytest.raises(ValueError, match="prompt of 50 tokens and a response of up to 15 do not "
                                         "fit into the model's context of 64 tokens; shorten"):
        function(policy, ids, mask, max_response_tokens=15, **arguments)
    with pytest.raises(ValueError, match=r"sampling at temperature 0.7 needs noise, one number "
                                         r"from \[0, 1\) per response and token; only "
                                         r"temperature 0 does without"):
        function(policy, ids, mask, max_response_tokens=5, eos_id=EOS, pad_id=PAD, temperature=0.7)


# ---------------------------------------------------------------- texts

TEXTS = ["Where does Anna live?", "Who?", "Tell me about the town and the river.", "Bread"]


def test_responses_come_in_the_order_of_the_prompts(policy, tokenizer):
    together = sample_responses(policy, tokenizer, TEXTS, max_response_tokens=8, batch_size=3,
                                temperature=0)
    for text, response in zip(TEXTS, together, strict=True):
        alone = sample_responses(policy, tokenizer, [text], max_response_tokens=8, batch_size=1,
                                 temperature=0)
        assert [response] == alone
    assert len(set(together)) == len(TEXTS)  # the prompts are told apart


def test_a_response_holds_text_tokens_and_whether_it_ended(talker, tokenizer):
    responses = sample_responses(talker, tokenizer, TEXTS * 10, max_response_tokens=8,
                                 batch_size=16, generator=torch.Generator().manual_seed(0))
    assert {r.finished for r in responses} == {True, False}
    for r in responses:
        ids = list(r.token_ids)
        assert r.finished == (ids[-1] == EOS)
        assert r.finished or len(ids) == 8
        words = [i for i in ids if i not in (EOS, PAD)]
        assert r.text == tokenizer.decode(words).strip()


def test_greedy_samples_do_not_depend_on_the_generator(talker, tokenizer):
    first, second = (sample_responses(
        talker, tokenizer, TEXTS, max_response_tokens=8, batch_size=4, temperature=0,
        generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    assert first == second


def test_progress_counts_every_response(talker, tokenizer):
    counts = []
    sample_responses(talker, tokenizer, TEXTS, max_response_tokens=2, batch_size=3,
                     on_batch=counts.append)
    assert counts == [3, 1]


def test_no_prompts_no_responses(policy, tokenizer):
    assert sample_responses(policy, tokenizer, [], max_response_tokens=4, batch_size=2) == []


def test_prompts_are_formatted_as_in_training(sample, tokenizer, policy):
    prompt = encode_prompt(tokenizer, TEXTS[0])
    ids, _, _ = sample(policy, [prompt], temperature=0, tokens=5)
    [response] = sample_responses(policy, tokenizer, TEXTS[:1], max_response_tokens=5,
                                  batch_size=1, temperature=0)
    assert isinstance(response, Response) and list(response.token_ids) == ids[0].tolist()
