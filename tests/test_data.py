"""Records, JSONL files, chat format, batches: every message read, every layout rebuilt."""

from __future__ import annotations

import gzip
import json
import lzma
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rlhf_mini import data
from rlhf_mini.data import (
    DataError,
    Demonstration,
    Document,
    Prompt,
    Ranking,
    ZeroShotItem,
    check_record,
    collate,
    encode_pair,
    encode_ranking,
    encode_response,
    left_pad,
    pack_rankings,
    read_jsonl,
    write_jsonl,
)

RANKING = {"id": "r1", "prompt": "Who?", "responses": ["a", "b", "c"], "ranks": [1, 2, 2]}
PAD = 99


def make_tokenizer():
    """Return a byte-level BPE tokenizer with PAD and EOS, trained on one sentence."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=["<pad>", "<eos>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(["User: the cat sat on the mat\nAssistant: the mat"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


TOKENIZER = make_tokenizer()


def write_lines(path, *rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows),
                    encoding="utf-8")
    return path


def message(path, record_type=Ranking):
    with pytest.raises(DataError) as error:
        read_jsonl(path, record_type)
    return str(error.value)


# ---- the messages ------------------------------------------------------------------------------

BAD_RANKINGS = [
    (dict(ranks=[1, 2]), "field 'ranks': has 2 entries, 'responses' has 3; give one rank per "),
    (dict(gold=[0.5]), "field 'gold': has 1 entries, 'responses' has 3; give one score per "),
    (dict(decoys=[True]), "field 'decoys': has 1 entries, 'responses' has 3; give one flag"),
    (dict(ranks=[1, 1, 1]), "field 'ranks': all responses are tied; a ranking needs at least one"),
    (dict(ranks=[2, 3, 3]), "field 'ranks': the best is 2; ranks start at 1 = best"),
    (dict(ranks=[0, 1, 1]), "field 'ranks': the best is 0; ranks start at 1 = best"),
    (dict(ranks=[1, 2.5, 3]), "field 'ranks[1]': got 2.5, expected a whole number"),
    (dict(ranks=[1, True, 2]), "field 'ranks[1]': got true, expected a whole number"),
    (dict(ranks="1,2,3"), "field 'ranks': got \"1,2,3\", expected a list"),
    (dict(responses=["a"], ranks=[1]), "field 'responses': has 1 entries; give at least 2"),
    (dict(responses=["a", " \n", "c"]), "field 'responses[1]': is empty; write a text or remove"),
    (dict(responses=["a", "b", "a"]),
     "field 'ranks': responses 0 and 2 are the same text with ranks 1 and 2; give them one rank"),
    (dict(prompt=""), "field 'prompt': is empty; write a text or remove the record"),
    (dict(prompt=None), "field 'prompt': got null, expected text"),
    (dict(prompt="\ud83d"), "field 'prompt': half of a surrogate pair at character 0"),
    (dict(split="dev"), "field 'split': got 'dev', expected one of train, valid, test"),
    (dict(labeler="7"), "field 'labeler': got \"7\", expected a whole number"),
    (dict(gold=[1, 2, "x"]), "field 'gold[2]': got \"x\", expected a number"),
    (dict(respones=["a"]), "field 'respones': unknown; the fields of a Ranking are id, prompt"),
    (dict(id=3), "field 'id': got 3, expected text"),
    (dict(ranks=[1, 10**18, 2]), "field 'ranks[1]': got 1000000000000000000, expected a number of "
                                 "at most 18 digits"),
    (dict(gold=[1, 10**400, 2]), "field 'gold[1]': got 1000"),
]


@pytest.mark.parametrize(("change", "expected"), BAD_RANKINGS)
def test_bad_ranking_names_file_line_field_and_remedy(tmp_path, change, expected):
    path = write_lines(tmp_path / "rankings.jsonl", RANKING, "", RANKING | {"id": "r2"} | change)
    assert message(path).startswith("rankings.jsonl:3: " + expected)


@pytest.mark.parametrize(("record_type", "row", "expected"), [
    (Prompt, {"text": "x"}, "field 'text': unknown; the fields of a Prompt are id, prompt, source"),
    (Prompt, {}, "field 'prompt': missing; Prompt needs it"),
    (Prompt, {"prompt": "x", "source": "web"}, "field 'source': got 'web', expected one of lab"),
    (Prompt, {"prompt": "x", "truth": [1]}, "field 'truth': got [1], expected an object"),
    (Demonstration, {"prompt": "x"}, "field 'response': missing; Demonstration needs it"),
    (Demonstration, {"prompt": "x", "response": " "}, "field 'response': is empty"),
    (Document, {"text": ""}, "field 'text': is empty"),
    (ZeroShotItem, {"task": "t", "text": "x"}, "field 'target': missing; ZeroShotItem needs it"),
    (ZeroShotItem, {"task": "t", "text": "x", "target": " "},
     "field 'target': is empty; write a text or remove the record"),
    (ZeroShotItem, {"task": "t", "text": "x", "target": "y"},
     "field 'target': got \"y\", expected a space before the first word"),
    (ZeroShotItem, {"task": "t", "text": "", "target": " y"},
     "field 'text': is empty; write a text or remove the record"),
])
def test_bad_records_of_other_types(tmp_path, record_type, row, expected):
    path = write_lines(tmp_path / "f.jsonl", row)
    assert message(path, record_type).startswith("f.jsonl:1: " + expected)


@pytest.mark.parametrize(("line", "expected"), [
    ('{"prompt": "x"', "f.jsonl:2: not valid JSON: Expecting ',' delimiter at column 15; "
                       "the line has no end, the file looks truncated"),
    ('{"prompt": x}\n', "f.jsonl:2: not valid JSON: Expecting value at column 12"),
    ("[1, 2]\n", "f.jsonl:2: got [1, 2], expected one JSON object {...} per line"),
    ('{"prompt": NaN}\n', "f.jsonl:2: not valid JSON: NaN; write a finite number"),
    ('{"prompt": "x', "f.jsonl:2: not valid JSON: Unterminated string starting at column 12; "
                      "the line has no end, the file looks truncated"),
])
def test_malformed_line_names_file_and_line(tmp_path, line, expected):
    path = tmp_path / "f.jsonl"
    path.write_text('{"prompt": "ok"}\n' + line)
    assert message(path, Prompt) == expected


@pytest.mark.parametrize("line", ["[" * 100_000, '{"prompt": ' + "9" * 5000 + "}"])
def test_json_beyond_what_python_reads_names_file_and_line(tmp_path, line):
    path = tmp_path / "f.jsonl"
    path.write_text('{"prompt": "ok"}\n' + line + "\n")
    assert message(path, Prompt).startswith(
        "f.jsonl:2: a number is too long or the brackets are too deep")


def test_text_that_is_not_utf8(tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_bytes('{"prompt": "é"}\n'.encode("latin-1"))
    assert message(path, Prompt) == (
        "f.jsonl:1: not UTF-8 text (byte 13 of the line); save the file as UTF-8")


@pytest.mark.parametrize("suffix, pack", [("gz", gzip.compress), ("xz", lzma.compress)])
def test_packed_files_and_truncated_and_wrong_ones(tmp_path, suffix, pack):
    path = tmp_path / f"f.jsonl.{suffix}"
    whole = pack(b"".join(b'{"prompt": "%d"}\n' % i for i in range(500)))
    path.write_bytes(whole)
    assert [(r.id, r.prompt) for r in read_jsonl(path, Prompt)][-1] == ("f:500", "499")
    path.write_bytes(whole[:-20])
    assert "packed data is damaged or cut off" in message(path, Prompt)
    path.write_bytes(b'{"prompt": "x"}\n')
    assert message(path, Prompt).startswith(f"{path.name}:1: the packed data is damaged or cut off")


def test_id_that_occurs_twice_names_both_lines(tmp_path):
    path = write_lines(tmp_path / "f.jsonl", RANKING, "", RANKING)
    assert message(path) == ("f.jsonl:3: field 'id': 'r1' is already the id of line 1; "
                             "every id occurs once")


def test_writer_refuses_what_the_reader_would_and_leaves_the_old_file(tmp_path):
    path = tmp_path / "f.jsonl"
    good = Ranking(**RANKING | {"responses": ("a", "b", "c"), "ranks": (1, 2, 2)})
    write_jsonl(path, [good])
    before = path.read_bytes()
    with pytest.raises(DataError, match=r"Ranking 'r2': field 'ranks': all responses are tied"):
        write_jsonl(path, [good, replace(good, id="r2", ranks=(1, 1, 1))])
    with pytest.raises(DataError, match=r"Ranking 'r1': field 'id': occurs twice"):
        write_jsonl(path, [good, good])
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["f.jsonl"]


# ---- files -------------------------------------------------------------------------------------


def test_users_need_only_the_content(tmp_path):
    path = write_lines(tmp_path / "mine.jsonl", {k: v for k, v in RANKING.items() if k != "id"})
    assert read_jsonl(path, Ranking) == [
        Ranking("mine:1", "Who?", ("a", "b", "c"), (1, 2, 2), split="train", labeler=None)]


@pytest.mark.parametrize("raw", [
    b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n{"prompt": "b"}\r\n',
    b'{"prompt": "a"}\n\n{"prompt": "b"}'])
def test_bom_crlf_blank_lines_and_missing_last_newline(tmp_path, raw):
    (tmp_path / "f.jsonl").write_bytes(raw)
    records = read_jsonl(tmp_path / "f.jsonl", Prompt)
    assert [(r.id, r.prompt) for r in records] == [("f:1", "a"), ("f:3", "b")]


def test_file_has_fields_in_order_no_none_and_plain_utf8(tmp_path):
    write_jsonl(tmp_path / "f.jsonl", [Prompt("p", "é\u2028ü", customer=3)])
    assert (tmp_path / "f.jsonl").read_bytes() == (
        '{"id": "p", "prompt": "é\u2028ü", "source": "user", "customer": 3, "split": "train"}\n'
    ).encode()
    write_jsonl(tmp_path / "a.jsonl.gz", [Prompt("p", "x")])
    write_jsonl(tmp_path / "b.jsonl.gz", [Prompt("p", "x")])
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()


text = st.text(min_size=1, max_size=20).filter(str.strip)


@st.composite
def rankings(draw):
    texts = draw(st.lists(text, min_size=2, max_size=5, unique=True))
    ranks = draw(st.lists(st.integers(1, 4), min_size=len(texts), max_size=len(texts)))
    ranks = [1, 2, *ranks[2:]]
    gold = draw(st.none() | st.just(tuple(0.1 * r for r in ranks)))
    return Ranking(draw(text), draw(text), tuple(texts), tuple(ranks), gold=gold)


@settings(max_examples=60, deadline=None)
@given(records=st.lists(rankings(), max_size=4, unique_by=lambda r: r.id), zipped=st.booleans())
def test_write_then_read_is_the_identity(tmp_path_factory, records, zipped):
    path = tmp_path_factory.mktemp("d") / ("f.jsonl.gz" if zipped else "f.jsonl")
    write_jsonl(path, records)
    assert read_jsonl(path, Ranking) == records


@given(text, st.none() | st.integers(0, 9), st.none() | st.dictionaries(text, text, max_size=2))
@settings(max_examples=40, deadline=None)
def test_prompts_round_trip(tmp_path_factory, prompt, customer, truth):
    path = tmp_path_factory.mktemp("d") / "f.jsonl"
    records = [Prompt("p", prompt, "customer", customer, "valid", "facts", truth)]
    write_jsonl(path, records)
    assert read_jsonl(path, Prompt) == records


def test_check_record_catches_python_types_too():
    with pytest.raises(DataError, match=r"Prompt 'p': field 'customer': got 1.5, expected a whole"):
        check_record(Prompt("p", "x", customer=1.5))
    with pytest.raises(DataError, match="field 'gold.1.': got inf, expected a finite number"):
        check_record(Ranking("r", "x", ("a", "b"), (1, 2), gold=(0.0, float("inf"))))


# ---- chat format -------------------------------------------------------------------------------


def test_chat_format_tokens():
    prompt, response = encode_pair(TOKENIZER, "the cat", "the mat", 50, 50, "p")
    assert TOKENIZER.decode(prompt) == "User: the cat\nAssistant:"
    assert TOKENIZER.decode(response) == " the mat<eos>"
    assert response[-1] == TOKENIZER.eos_token_id and TOKENIZER.eos_token_id not in response[:-1]


@given(st.text(max_size=30) | st.sampled_from(["<eos> and <pad>", "<pad>", "a <eos>"]))
@settings(max_examples=80, deadline=None)
def test_decode_inverts_encode_for_any_text(response):
    ids = encode_response(TOKENIZER, response)
    assert ids.index(TOKENIZER.eos_token_id) == len(ids) - 1  # a typed "<eos>" ends nothing
    assert TOKENIZER.pad_token_id not in ids
    padded = [*ids, *[TOKENIZER.pad_token_id] * 2, *ids]
    assert data.decode_response(TOKENIZER, torch.tensor(padded)) == response.strip()


def test_decode_drops_pad_without_eos():
    ids = encode_response(TOKENIZER, "the mat")[:-1]
    assert data.decode_response(TOKENIZER, [*ids, TOKENIZER.pad_token_id]) == "the mat"


def test_too_long_prompt_or_response_is_an_error_with_numbers():
    tokens = len(data.encode_prompt(TOKENIZER, "x" * 90))
    with pytest.raises(DataError) as error:
        encode_pair(TOKENIZER, "x" * 90, "a", 80, 40, "p7")
    assert str(error.value) == (f"p7: prompt has {tokens} tokens, at most 80 fit; "
                                "raise max_prompt_tokens or shorten it")
    ranking = Ranking("r7", "x", ("a", "b" * 50), (1, 2))
    with pytest.raises(DataError, match=r"r7: responses\[1\] has 52 tokens, at most 40 fit; raise "
                                        "max_response_tokens"):
        encode_ranking(TOKENIZER, ranking, 80, 40)
    exact = encode_ranking(TOKENIZER, ranking, 80, 52)
    assert [len(ids) for ids in exact[1]] == [3, 52] and exact[2] == (1, 2)


# ---- token batches -----------------------------------------------------------------------------

ids = st.lists(st.integers(0, PAD), min_size=1, max_size=7)  # PAD itself is a legal token here


@given(st.lists(st.tuples(ids, ids), min_size=1, max_size=5))
@settings(max_examples=80, deadline=None)
def test_masks_are_true_on_real_tokens_only(pairs):
    batch = collate(pairs, PAD)
    assert batch.prompt_mask.dtype == batch.attention_mask.dtype == torch.bool
    assert batch.input_ids.dtype == torch.int64
    assert batch.input_ids.shape == batch.attention_mask.shape
    for b, (prompt, response) in enumerate(pairs):
        assert batch.prompt_ids[b][batch.prompt_mask[b]].tolist() == prompt
        assert batch.response_ids[b][batch.response_mask[b]].tolist() == response
        assert batch.input_ids[b][batch.attention_mask[b]].tolist() == prompt + response
        assert batch.prompt_mask[b, -1] and batch.response_mask[b, 0]  # left pad, right pad
    assert (batch.input_ids[~batch.attention_mask] == PAD).all()


def test_left_pad_by_hand_and_collate_agrees():
    padded, mask = left_pad([[5, 6, 7], [8]], PAD)
    assert padded.tolist() == [[5, 6, 7], [PAD, PAD, 8]]
    assert mask.tolist() == [[True, True, True], [False, False, True]]
    batch = collate([([5, 6, 7], [1]), ([8], [2, 3])], PAD).to("cpu")
    assert batch.input_ids.tolist() == [[5, 6, 7, 1, PAD], [PAD, PAD, 8, 2, 3]]
    assert torch.equal(batch.prompt_ids, padded) and torch.equal(batch.prompt_mask, mask)


def test_packed_row_by_hand():
    packed = pack_rankings([([10, 11], [[1, 2], [3]], (2, 1)),
                            ([12], [[4], [5], [6, 7]], (1, 3, 2))], PAD)
    assert packed.input_ids.tolist() == [[10, 11, 1, 2, 3], [12, 4, 5, 6, 7]]
    assert packed.segments.tolist() == [[0, 0, 1, 1, 2], [0, 1, 2, 3, 3]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 2], [0, 1, 1, 1, 2]]
    assert packed.end_index.tolist() == [[3, 4, 0], [1, 2, 4]]
    assert packed.ranks.tolist() == [[2, 1, 0], [1, 3, 2]]
    assert packed.mask.tolist() == [[True, True, False], [True, True, True]]


def test_equal_responses_share_their_tokens():
    packed = pack_rankings([([10], [[1, 2], [3], [1, 2]], (1, 2, 1))], PAD)
    assert packed.input_ids.tolist() == [[10, 1, 2, 3]]
    assert packed.segments.tolist() == [[0, 1, 1, 2]]
    assert packed.end_index.tolist() == [[2, 3, 2]] and packed.ranks.tolist() == [[1, 2, 1]]


@given(st.lists(st.tuples(ids, st.lists(ids, min_size=2, max_size=5)), min_size=1, max_size=4))
@settings(max_examples=80, deadline=None)
def test_every_response_is_recovered_from_a_packed_row(rows):
    packed = pack_rankings([(p, r, tuple(range(1, len(r) + 1))) for p, r in rows], PAD).to("cpu")
    for b, (prompt, responses) in enumerate(rows):
        different = [list(r) for r in dict.fromkeys(map(tuple, responses))]
        for segment, tokens in enumerate([prompt, *different]):
            here = packed.segments[b] == segment
            start = 0 if segment == 0 else len(prompt)
            assert packed.input_ids[b][here].tolist() == tokens
            assert packed.position_ids[b][here].tolist() == list(range(start, start + len(tokens)))
            for k, response in enumerate(responses):
                if segment and response == tokens:
                    assert packed.end_index[b, k] == here.nonzero().max()
        assert packed.mask[b].sum() == len(responses)
        assert packed.ranks[b][packed.mask[b]].tolist() == list(range(1, len(responses) + 1))
        assert (packed.segments[b] == -1).sum() == packed.segments.shape[1] - (
            len(prompt) + sum(map(len, different)))
    assert (packed.ranks[~packed.mask] == 0).all()
    assert (packed.input_ids[packed.segments == -1] == PAD).all()


def test_packing_refuses_ranks_of_another_length():
    with pytest.raises(ValueError, match="2 responses but 3 ranks"):
        pack_rankings([([1], [[2], [3]], (1, 2, 3))], PAD)
