"""The fast loop against the plain one, full forwards and transformers one row at a time."""

from __future__ import annotations

import copy
import functools
import random

import numpy as np
import pytest
import torch
from conftest import make_policy
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import EXACT, FORWARD
from toys import (
    CONFIGS,
    EOS,
    PAD,
    Ids,
    V,
    configured,
    make_pairs,
    make_talker,
    same_weights,
)

from rlhf_mini import decoding
from rlhf_mini.data import TokenBatch, left_pad
from rlhf_mini.decoding import Runner, State, decode
from rlhf_mini.generation import generate
from rlhf_mini.models import compute_response_logprobs

PROMPTS = [prompt for prompt, _ in make_pairs(40, seed=4, prompt=(1, 14))]


def draw(function, policy, prompts=PROMPTS, seed=0, tokens=24, copies=None, **kwargs):
    """Response ids, mask and log-probs by `generate` or `decode`, with noise from a seed."""
    ids, mask = left_pad(prompts, PAD)
    noise = torch.rand(sum(copies or [1] * len(prompts)), tokens,
                       generator=torch.Generator().manual_seed(seed), device=policy.device)
    return function(policy, ids.to(policy.device), mask.to(policy.device), eos_id=EOS, pad_id=PAD,
                    max_response_tokens=tokens, noise=noise, copies=copies, **kwargs)


def assert_same(ours, theirs):
    """The same tokens and masks, and log-probs up to the order of float32 sums."""
    for one, other in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(one, other, **EXACT)
    torch.testing.assert_close(ours[2], theirs[2], **FORWARD)


@functools.cache
def shared_talker():
    """A policy for hypothesis, which does not take fixtures of one test."""
    return make_talker(Ids(range(V)))


@pytest.fixture
def talker(tokenizer):
    return make_talker(tokenizer)


@pytest.fixture
def states(monkeypatch):
    """The number of rows of every state that takes rows of another."""
    rows, take = [], State.take

    def spy(self, other, index):
        rows.append(len(index))
        take(self, other, index)

    monkeypatch.setattr(State, "take", spy)
    return rows


# ---------------------------------------------------------------- the same tokens as `generate`

@pytest.mark.parametrize("temperature", [0, 0.7, 1])
def test_rows_that_leave_early_change_nothing(states, tokenizer, temperature):
    talker = make_talker(tokenizer, seed=2, eos_bias=0.8 if temperature == 0 else 3.0)
    ours = draw(decode, talker, temperature=temperature)
    theirs = draw(generate, talker, temperature=temperature)
    assert_same(ours, theirs)
    lengths = ours[1].sum(1)
    assert len(set(lengths.tolist())) > 2 and (lengths == 24).any()  # short, long and cut off
    # all rows begin, a quarter or more leaves at a time
    assert states[0] == len(PROMPTS) and len(states) > 2
    assert all(few <= 0.75 * many for many, few in zip(states, states[1:], strict=False))


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.sampled_from([0, 0.7, 1, 1.5]), st.integers(1, 9),
       st.integers(1, 20), st.booleans())
def test_any_batch_gets_the_tokens_of_the_plain_loop(seed, temperature, prompts, tokens, repeat):
    rng = random.Random(seed)
    chosen = rng.sample(PROMPTS, prompts)
    copies = [rng.randint(1, 5) for _ in chosen] if repeat else None
    arguments = dict(prompts=chosen, seed=seed, tokens=tokens, copies=copies,
                     temperature=temperature)
    assert_same(*(draw(function, shared_talker(), **arguments) for function in (decode, generate)))


@pytest.mark.parametrize("leave_at", [0, 0.5, 1])
@pytest.mark.parametrize("look_every", [1, 3, 8])
def test_it_does_not_matter_when_finished_rows_leave(talker, states, monkeypatch, leave_at,
                                                     look_every):
    expected = draw(generate, talker)
    monkeypatch.setattr(decoding, "LEAVE_AT", leave_at)
    monkeypatch.setattr(decoding, "LOOK_EVERY", {"cpu": look_every})
    assert_same(draw(decode, talker), expected)
    assert (len(states) > 1) == (leave_at > 0)


@pytest.mark.parametrize("prompt, tokens", [(1, 63), (60, 4), (1, 1), (63, 1)])
def test_the_context_may_be_filled(policy, prompt, tokens):
    rng = random.Random(0)
    prompts = [[rng.randrange(2, V) for _ in range(length)] for length in (prompt, 1)]
    with torch.no_grad():
        policy.lm_head.weight[EOS].zero_()  # a random policy without a liking for EOS
    ours, theirs = (draw(f, policy, prompts, tokens=tokens, seed=3) for f in (decode, generate))
    assert_same(ours, theirs)
    assert ours[0].shape == (2, tokens)


# ---------------------------------------------------------------- the right log-probabilities

@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_logprobs_equal_those_of_a_full_forward(talker, temperature):
    copies = [1, 3] * 20
    ids, mask = left_pad([p for p, n in zip(PROMPTS, copies, strict=True) for _ in range(n)], PAD)
    response_ids, response_mask, logprobs = draw(decode, talker, copies=copies,
                                                 temperature=temperature)
    with torch.no_grad():
        full, _ = compute_response_logprobs(
            talker, TokenBatch(ids, mask, response_ids, response_mask), temperature)
    torch.testing.assert_close(logprobs, full, **FORWARD)
    assert not logprobs[~response_mask].any() and (~response_mask).any()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("temperature", [0, 0.7])
def test_tokens_and_logprobs_equal_transformers_one_row_at_a_time(name, temperature):
    policy = configured(name)
    prompts, t_or_1 = PROMPTS[:8], temperature or 1
    noise = torch.rand(8, 12, generator=torch.Generator().manual_seed(0))
    ids, mask, logprobs = draw(decode, policy, prompts, tokens=12, temperature=temperature)
    for b, prompt in enumerate(prompts):
        response = ids[b][mask[b]].tolist()
        with torch.no_grad():
            logits = policy(torch.tensor([prompt + response])).logits[0, len(prompt) - 1:-1]
        table = (logits.double() / t_or_1).log_softmax(-1)
        picked = (table.exp().cumsum(-1) <= noise[b, :len(response), None]).sum(-1)
        assert response == (picked if temperature else table.argmax(-1)).tolist()
        np.testing.assert_allclose(logprobs[b][mask[b]],
                                   table[range(len(response)), response], **FORWARD)


def test_the_configurations_differ():
    # all but the two ways to compute gelu, which are the same function
    made = {str(draw(decode, configured(name), PROMPTS[:8], tokens=12)[0].tolist())
            for name in CONFIGS}
    assert len(made) == len(CONFIGS) - 1


# ---------------------------------------------------------------- in the precision of autocast

def test_under_autocast_a_copy_decodes_in_bfloat16(talker, monkeypatch):
    before, seen, run = copy.deepcopy(talker), [], decoding.run_cached

    def spy(policy, state, *args):
        seen.append((policy is talker, policy.dtype, state.keys[0].dtype, state.bias.dtype))
        return run(policy, state, *args)

    monkeypatch.setattr(decoding, "run_cached", spy)
    with torch.autocast("cpu", torch.bfloat16):
        ids, mask, logprobs = draw(decode, talker, tokens=12)
        assert torch.is_autocast_enabled("cpu")
    assert set(seen) == {(False, *[torch.bfloat16] * 3)}
    assert logprobs.dtype == torch.float32
    assert same_weights(before, talker) and talker.dtype == torch.float32
    assert all(p.requires_grad for p in talker.parameters())

    prompts, prompt_mask = left_pad(PROMPTS, PAD)
    with torch.no_grad():
        exact, _ = compute_response_logprobs(
            talker, TokenBatch(prompts, prompt_mask, ids, mask))
    # bfloat16 keeps 8 bits, so each rounding is off by up to 2**-9 of the number: of a logit, which
    # is up to 5 here, by 0.01. A few more of them stand on the way through two layers.
    error = (logprobs - exact).abs().max().item()
    assert 1e-3 < error < 0.05  # what float32 would be off by is 1e-6


def test_without_autocast_the_policy_itself_decodes(talker, monkeypatch):
    seen, run = set(), decoding.run_cached
    monkeypatch.setattr(decoding, "run_cached",
                        lambda policy, *args: seen.add(policy) or run(policy, *args))
    draw(decode, talker, tokens=3)
    assert seen == {talker}


def test_a_policy_that_learned_decodes_with_its_new_weights(talker):
    draw(decode, talker)
    with torch.no_grad():
        for p in talker.parameters():
            p.mul_(1.05)
    assert_same(draw(decode, talker), draw(generate, talker))


# ---------------------------------------------------------------- states as a GPU has them

class Recorder(Runner):
    """Hands out states as the runner of a GPU does, but runs their steps without a graph."""

    def state_for(self, rows):
        """A state of a power of two of rows, the same one whenever the size is the same."""
        size = 1 << (rows - 1).bit_length()
        return self.recorded.setdefault(size, State.empty(self.policy, size, self.slots))

    def step(self, state, seen):
        """Attend to all slots, filled or not."""
        decoding.step(self.policy, state, self.slots, self.temperature)


def test_states_with_idle_rows_and_leftovers_of_other_prompts_change_nothing(talker, states,
                                                                            monkeypatch):
    kept = {}
    monkeypatch.setattr(Runner, "of", classmethod(
        lambda cls, policy, slots, temperature: Recorder(policy, 64, temperature, kept)))
    monkeypatch.setattr(decoding, "LOOK_EVERY", {"cpu": 4})
    for seed, prompts in enumerate((PROMPTS, PROMPTS[5:9], PROMPTS[::-1], PROMPTS[:33])):
        arguments = dict(prompts=prompts, seed=seed)
        assert_same(draw(decode, talker, **arguments), draw(generate, talker, **arguments))
    assert set(kept) >= {4, 8, 16, 64} and len(states) > 2 * 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_replays_what_the_plain_loop_does():
    talker = make_talker(Ids(range(V))).cuda()
    for seed, prompts in enumerate((PROMPTS, PROMPTS[5:9], PROMPTS[::-1])):
        arguments = dict(prompts=prompts, seed=seed)
        assert_same(draw(decode, talker, **arguments), draw(generate, talker, **arguments))
        with torch.no_grad():  # the recorded steps must see new weights
            for p in talker.parameters():
                p.mul_(1.02)


def test_the_tensors_of_a_state_share_no_memory():
    policy = make_policy(Ids(range(V)))
    state = State.empty(policy, 3, 7)
    assert [x.shape for x in (*state.keys, *state.values)] == [(3, 2, 7, 16)] * 4
    assert state.bias.shape == (3, 1, 1, 7) and state.token.shape == state.position.shape == (3, 1)
    # each is written in place
    assert len({x.data_ptr() for x in vars(state).values() if isinstance(x, torch.Tensor)}) == 6
