"""Drawing K responses, filling splits, fitting to the context: counts done by hand."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlhf_mini.data import (
    DataError,
    Demonstration,
    Document,
    Prompt,
    Ranking,
    check_record,
    encode_ranking,
    encode_response,
)
from rlhf_mini.selection import assign_splits, fit_to_context, sample_k


@given(st.lists(st.integers(1, 5), min_size=2, max_size=30), st.integers(2, 9), st.integers(0, 9),
       st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_sample_k_keeps_the_order_and_never_ties_all(ranks, k_low, more, seed):
    ranks = [1, 2, *ranks]
    texts = tuple(f"t{j}" for j in range(len(ranks)))
    record = Ranking("r", "p", texts, tuple(ranks), gold=tuple(float(-r) for r in ranks),
                     decoys=tuple(j == 0 for j in range(len(ranks))))
    [drawn] = sample_k([record], k_low, k_low + more, seed)
    check_record(drawn)
    assert min(k_low, len(ranks)) <= len(drawn.responses) <= k_low + more
    assert len(set(drawn.responses)) == len(drawn.responses)
    old = [ranks[texts.index(t)] for t in drawn.responses]
    assert drawn.gold == tuple(float(-r) for r in old)
    assert drawn.decoys == tuple(t == "t0" for t in drawn.responses)
    for i, a in enumerate(old):
        for j, b in enumerate(old):
            assert (a < b) == (drawn.ranks[i] < drawn.ranks[j])
    assert set(drawn.ranks) == set(range(1, max(drawn.ranks) + 1))


def test_sample_k_refuses_bad_limits():
    with pytest.raises(ValueError, match="k_low=1, k_high=9: expected 2 <= k_low <= k_high"):
        sample_k([], 1, 9, 0)


# ---- splits ------------------------------------------------------------------------------------


def prompts(n, split="train", copies=1):
    return [Prompt(f"{split}{i}-{c}", f"{split} {i}", split=split)
            for i in range(n) for c in range(copies)]


def test_assign_splits_sizes_determinism_and_equal_prompts():
    records = prompts(50, copies=3)
    done = assign_splits(records, seed=1)
    assert Counter(r.split for r in done) == {"train": 120, "valid": 15, "test": 15}
    assert [r.id for r in done] == [r.id for r in records]
    assert all(len({r.split for r in done if r.prompt == f"train {i}"}) == 1 for i in range(50))
    by_prompt = {r.prompt: r.split for r in done}
    assert {r.prompt: r.split for r in assign_splits(records[::-1], seed=1)} == by_prompt
    assert assign_splits(records, seed=2) != done
    assert Counter(r.split for r in assign_splits(prompts(3), 0)) == dict.fromkeys(
        ("train", "valid", "test"), 1)


def test_assign_splits_fills_only_what_is_missing():
    done = assign_splits(prompts(20) + prompts(7, "test"), seed=0)
    assert Counter(r.split for r in done) == {"train": 18, "valid": 2, "test": 7}
    assert all(r.split == "test" for r in done[20:])
    assert assign_splits(done, seed=5) == done
    only_test = assign_splits(prompts(10, "test"), seed=0)  # nothing to train on: split anew
    assert Counter(r.split for r in only_test) == {"train": 8, "valid": 1, "test": 1}


def test_too_few_prompts_to_split():
    with pytest.raises(DataError, match="2 different prompts cannot be split into train, valid"):
        assign_splits(prompts(2, copies=5), seed=0)


# ---- fitting to the context --------------------------------------------------------------------


def make_tokenizer():
    """Return a tokenizer with one token per byte, PAD and EOS: token counts can be done by hand."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<pad>": 0, "<eos>": 1} | {c: i for i, c in enumerate(alphabet, start=2)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


TOKENIZER = make_tokenizer()
FRAME = len("User: \nAssistant:")


def test_fit_truncates_merges_to_the_better_rank_and_counts():
    records = [Ranking("long", "p" * 11, ("a", "b"), (1, 2)),
               Ranking("merge", "p", ("abcdX", "zz", "abcdY", "w"), (3, 2, 1, 4),
                       gold=(1., 2., 3., 4.)),
               Ranking("equal", "p", ("abcdX", "abcdY"), (1, 2)),
               Ranking("same", "p", ("a", "b"), (1, 2))]
    kept, report = fit_to_context(records, TOKENIZER, FRAME + 10, 6, context=FRAME + 16)
    assert kept == [Ranking("merge", "p", ("zz", "abcd", "w"), (2, 1, 3), gold=(2., 3., 4.)),
                    records[3]]
    assert (report.kept, report.dropped_prompt_too_long, report.dropped_all_equal) == (2, 1, 1)
    assert (report.truncated, report.merged, report.dropped_empty) == (1, 1, 0)
    assert str(report) == ("2 kept, 1 dropped prompt too long, 1 dropped all equal, "
                           "1 responses truncated, 1 responses merged")


def test_fit_merges_to_a_ranking_without_a_difference():
    ranking = Ranking("r", "p", ("abcdX", "abcdY", "tie"), (1, 2, 1))
    kept, report = fit_to_context([ranking], TOKENIZER, 50, 6)
    assert not kept and report.dropped_all_equal == 1 and report.merged == 0


def test_fit_prompts_and_demonstrations():
    records = [Prompt("a", "p" * 11), Prompt("b", "p" * 10)]
    assert fit_to_context(records, TOKENIZER, FRAME + 10, 6)[0] == records[1:]
    records = [Demonstration("c", "p", "abc de"), Demonstration("d", "p", "🎉")]
    kept, report = fit_to_context(records, TOKENIZER, FRAME + 10, 5)
    assert kept == [Demonstration("c", "p", "abc")]  # " 🎉" and EOS are 6 bytes: nothing is left
    assert (report.kept, report.dropped_empty, report.truncated) == (1, 1, 1)


@pytest.mark.parametrize(("record", "expected"), [
    (Prompt("p1", "p" * 11), f"p1: prompt has {FRAME + 11} tokens, at most {FRAME + 10} fit; "
                             "raise max_prompt_tokens or shorten it"),
    (Ranking("r1", "p", ("a", "abcdX"), (1, 2)), "r1: response 1 has 7 tokens, at most 6 fit; "
                                                 "raise max_response_tokens or shorten it"),
    (Demonstration("d1", "p", "abcdX"), "d1: response 0 has 7 tokens, at most 6 fit; raise"),
])
def test_strict_fit_names_the_record(record, expected):
    good = Ranking("ok", "p", ("abcd", "b"), (1, 2))
    assert fit_to_context([good], TOKENIZER, FRAME + 10, 6, strict=True)[0] == [good]
    with pytest.raises(DataError) as error:
        fit_to_context([good, record], TOKENIZER, FRAME + 10, 6, strict=True)
    assert str(error.value).startswith(expected)


def test_fit_refuses_limits_that_cannot_hold():
    with pytest.raises(ValueError, match="max_prompt_tokens=80 and max_response_tokens=60: to"
                                         "gether at most context=128 fit"):
        fit_to_context([], TOKENIZER, 80, 60, context=128)
    with pytest.raises(ValueError, match="max_response_tokens=1: expected at least 2"):
        fit_to_context([], TOKENIZER, 80, 1)


@given(st.lists(st.text("ab é🎉\n", min_size=1, max_size=9).filter(str.strip), min_size=2,
                max_size=5, unique=True), st.integers(2, 12))
@settings(max_examples=150, deadline=None)
def test_what_is_kept_fits_differs_and_is_a_beginning(texts, limit):
    ranking = Ranking("r", "p", tuple(texts), tuple(range(1, len(texts) + 1)))
    kept, report = fit_to_context([ranking], TOKENIZER, 80, limit)
    assert report.kept + report.dropped_all_equal == 1
    for record in kept:
        check_record(record)
        encoded = encode_ranking(TOKENIZER, record, 80, limit)[1]
        assert len({tuple(ids) for ids in encoded}) == len(encoded)
        assert record.ranks[0] == 1 or record.responses[0] != texts[0]
        for text in record.responses:
            assert any(t.strip().startswith(text.strip()) for t in texts)
            assert len(encode_response(TOKENIZER, text)) <= limit


def test_documents_that_begin_alike_stay_together_and_none_is_for_the_test():
    documents = [Document(f"{i}-{j}", f"prompt {i}\n\nresponse {j}")
                 for i in range(40) for j in range(3)]
    split = assign_splits(documents, 0, valid=0.1)
    held_out = {d.id.split("-")[0] for d in split if d.split == "valid"}
    assert len(held_out) == 4 and {d.split for d in split} == {"train", "valid"}
    assert [d.split for d in split] == [
        "valid" if d.id.split("-")[0] in held_out else "train" for d in documents]
