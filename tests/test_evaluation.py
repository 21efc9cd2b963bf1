"""Intervals, win rates, KL and zero-shot scores by brute force and unbatched forwards."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from conftest import make_policy
from hypothesis import given
from hypothesis import strategies as st
from toys import EOS, make_reward_model, make_talker

from rlhf_mini import evaluation
from rlhf_mini.config import EvaluationConfig, RewardConfig
from rlhf_mini.data import (
    Document,
    Prompt,
    Ranking,
    ZeroShotItem,
    encode_prompt,
    encode_response,
)
from rlhf_mini.evaluation import (
    compute_pair_accuracy,
    compute_win_rate,
    evaluate_policy,
    evaluate_zero_shot,
    mean_interval,
    measure_reward_model,
    ratio_interval,
    summarize,
)
from rlhf_mini.generation import sample_responses
from rlhf_mini.kl import compute_exact_kl

CONFIG = EvaluationConfig(samples=2, max_response_tokens=8, batch_size=4, bootstrap=300)
PROMPTS = [Prompt(f"p{i}", text, split="test") for i, text in enumerate(
    ["Where is Anna?", "Who?", "Tell me about the town.", "Bread", "The river?"])]


# ---------------------------------------------------------------- intervals

def test_samples_of_one_prompt_are_averaged_first():
    values = np.array([[1.0, 3.0], [5.0, 5.0], [0.0, 1.0]])
    assert mean_interval(values, CONFIG) == mean_interval(np.array([2.0, 5.0, 0.5]), CONFIG)
    assert mean_interval(values, CONFIG)["mean"] == pytest.approx(2.5)


def test_copies_of_a_sample_do_not_narrow_the_interval():
    one = np.random.default_rng(0).normal(size=(50, 1))
    assert mean_interval(np.repeat(one, 20, axis=1), CONFIG)["high"] == pytest.approx(
        mean_interval(one, CONFIG)["high"])


def test_constant_and_single_values_have_an_interval_of_no_width():
    for values in (np.ones(4), np.array([3.0])):
        interval = mean_interval(values, CONFIG)
        assert interval["low"] == interval["mean"] == interval["high"] == values[0]


def coverage(interval, draws: int = 400) -> float:
    """The share of simulated data sets whose interval holds the true mean."""
    rng = np.random.default_rng(1)
    return np.mean([interval(rng) for _ in range(draws)])


def test_the_interval_of_a_mean_covers_at_about_its_rate():
    def covers(rng):
        result = mean_interval(rng.exponential(size=80), CONFIG)
        return result["low"] <= 1.0 <= result["high"]

    # 95 %, less a little for the skew of the data; the standard error of 400 draws is 1.1 %
    assert 0.90 <= coverage(covers) <= 0.98


def test_a_lower_confidence_covers_less():
    def covers(rng):
        config = dataclasses.replace(CONFIG, confidence=0.5)
        result = mean_interval(rng.normal(size=60), config)
        return result["low"] <= 0.0 <= result["high"]

    assert 0.42 <= coverage(covers) <= 0.58


def test_the_interval_of_a_ratio_covers_at_about_its_rate():
    def covers(rng):
        totals = rng.integers(1, 20, 80)
        result = ratio_interval(rng.binomial(totals, 0.7), totals, CONFIG)
        return result["low"] <= 0.7 <= result["high"]

    assert 0.90 <= coverage(covers) <= 0.98


def test_a_ratio_counts_pairs_and_not_prompts():
    result = ratio_interval(np.array([1.0, 9.0]), np.array([1, 19]), CONFIG)
    assert result["mean"] == pytest.approx(10 / 20) and result["pairs"] == 20
    assert result["low"] == pytest.approx(9 / 19) and result["high"] == 1


# ---------------------------------------------------------------- win rates and pair accuracy

@given(st.integers(0, 1000))
def test_win_rates_equal_counting(seed):
    rng = np.random.default_rng(seed)
    ours, theirs = rng.integers(0, 3, size=(2, 7, 2))
    pairs = list(zip(ours.flatten(), theirs.flatten(), strict=True))
    wins, ties = sum(a > b for a, b in pairs), sum(a == b for a, b in pairs)
    config = dataclasses.replace(CONFIG, bootstrap=20)
    rate, other = compute_win_rate(ours, theirs, config), compute_win_rate(theirs, ours, config)
    assert rate["mean"] == pytest.approx((wins + ties / 2) / 14)
    assert rate["mean"] + other["mean"] == pytest.approx(1)
    assert rate["ties"] == other["ties"] == pytest.approx(ties / 14)
    if wins + ties < 14 or wins:
        assert rate["without_ties"] == pytest.approx(wins / (14 - ties) if ties < 14 else 0.5)
    assert rate["low"] - 1e-12 <= rate["mean"] <= rate["high"] + 1e-12


def test_only_ties_are_a_half():
    rate = compute_win_rate(np.ones((3, 2)), np.ones((3, 2)), CONFIG)
    assert rate == {"mean": 0.5, "low": 0.5, "high": 0.5, "ties": 1.0, "without_ties": 0.5}


@given(st.integers(0, 1000))
def test_pair_accuracy_equals_a_double_loop(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(2, 6, 4)
    scores = [rng.normal(size=k).round(1) for k in sizes]
    targets = [rng.integers(0, 3, k).astype(float) for k in sizes]
    keep = [rng.random((k, k)) < 0.7 for k in sizes]
    right = [1.0 if s[i] > s[j] else 0.5 if s[i] == s[j] else 0.0
             for s, t, x in zip(scores, targets, keep, strict=True)
             for i in range(len(s)) for j in range(len(s)) if t[i] > t[j] and x[i, j]]
    config = dataclasses.replace(CONFIG, bootstrap=20)
    result = compute_pair_accuracy(scores, targets, keep, config)
    if right:
        assert result["mean"] == pytest.approx(np.mean(right)) and result["pairs"] == len(right)
    else:
        assert result is None


def test_a_reward_model_is_measured_on_own_responses_and_on_decoys_apart(tokenizer):
    reward_model = make_reward_model(make_policy(tokenizer))
    rng, texts = np.random.default_rng(0), ["bread", "a river", "cold", "the mill", "two schools"]
    rankings = [Ranking(f"r{i}", f"Who {i}?", tuple(rng.permutation(texts)[:4]),
                        tuple(int(r) for r in [1, *rng.integers(1, 4, 3)][:3]) + (3,),
                        gold=tuple(rng.random(4).round(1).tolist()),
                        decoys=(False, False, False, True)) for i in range(12)]
    results = measure_reward_model(reward_model, tokenizer, rankings,
                                   RewardConfig(max_prompt_tokens=40), CONFIG)

    def share(target, decoy):
        right = []
        for r in rankings:
            scores = []
            for text in r.responses:
                ids = torch.tensor([encode_prompt(tokenizer, r.prompt)
                                    + encode_response(tokenizer, text)])
                with torch.no_grad():
                    scores.append(reward_model(ids, torch.ones_like(ids).bool()).item())
            goal = target(r)
            right += [float(scores[i] > scores[j]) for i in range(4) for j in range(4)
                      if goal[i] > goal[j] and (i == 3 or j == 3) == decoy]
        return np.mean(right), len(right)

    for name, target, decoy in (("accuracy_labelers", lambda r: [-x for x in r.ranks], False),
                                ("accuracy_gold", lambda r: r.gold, False),
                                ("accuracy_decoys", lambda r: r.gold, True)):
        mean, pairs = share(target, decoy)
        assert results[name]["mean"] == pytest.approx(mean), name
        assert results[name]["pairs"] == pairs
    assert results["accuracy_length_baseline"]["mean"] >= 0.5
    assert results["prompts"] == 12
    assert sum(row["pairs"] for row in results["calibration"]) == results["accuracy_labelers"][
        "pairs"]
    unknown = [dataclasses.replace(r, gold=None) for r in rankings]
    assert "accuracy_gold" not in measure_reward_model(
        reward_model, tokenizer, unknown, RewardConfig(max_prompt_tokens=40), CONFIG)


# ---------------------------------------------------------------- policies

def grade(prompt, response):
    return {"gold": len(response) / 10, "helpful": float("a" in response)}


@pytest.fixture
def talkers(tokenizer):
    return make_talker(tokenizer, 0, eos_bias=3.0), make_talker(tokenizer, 1, eos_bias=3.0)


def test_measures_equal_unbatched_computation(talkers, tokenizer, monkeypatch):
    sampled = []
    monkeypatch.setattr(evaluation, "sample_responses", lambda *args, **kwargs: (
        sampled.extend(sample_responses(*args, **kwargs)), sampled)[1])
    policy, ref_policy = talkers
    reward_model = make_reward_model(policy)
    result = evaluate_policy(policy, ref_policy, tokenizer, PROMPTS, grade, reward_model, CONFIG, 0)
    assert all(values.shape == (5, 2) for values in result.measures.values())
    for i, response in enumerate(sampled):
        n, s = divmod(i, 2)
        assert result.responses[n][s] == response.text
        start, ids = encode_prompt(tokenizer, PROMPTS[n].prompt), list(response.token_ids)
        whole = torch.tensor([start + ids])
        with torch.no_grad():
            p, q = (m(whole).logits[0, len(start) - 1:-1].double().log_softmax(-1)
                    for m in talkers)
            score = reward_model(whole, torch.ones_like(whole).bool()).item()
        expected = {"kl": (p.exp() * (p - q)).sum().item(), "rm_score": score,
                    "response_tokens": len(ids), "eos_rate": float(ids[-1] == EOS),
                    "gold": len(response.text) / 10, "helpful": float("a" in response.text)}
        assert set(result.measures) == set(expected)
        for name, value in expected.items():
            assert result.measures[name][n, s] == pytest.approx(value, rel=1e-4, abs=5e-5), name
    assert len({len(r.token_ids) for r in sampled}) > 2  # padding was in the batches


def test_kl_of_finished_greedy_responses_is_the_sum_over_their_tokens(tokenizer):
    # Greedy and always "EOS first": the response is one known token, its KL one known sum.
    policy, ref_policy = (make_talker(tokenizer, seed, eos_bias=8.0) for seed in (0, 1))
    result = evaluate_policy(policy, ref_policy, tokenizer, PROMPTS, None, None, CONFIG, 0,
                             greedy=True)
    assert result.measures["response_tokens"].tolist() == [[1.0]] * 5
    for n, prompt in enumerate(PROMPTS):
        ids = torch.tensor([encode_prompt(tokenizer, prompt.prompt)])
        with torch.no_grad():
            p, q = (m(ids).logits[0, -1].double().log_softmax(-1) for m in (policy, ref_policy))
        assert result.measures["kl"][n, 0] == pytest.approx((p.exp() * (p - q)).sum().item(),
                                                            rel=1e-3)


def test_kl_of_a_policy_to_itself_is_zero(talkers, tokenizer):
    result = evaluate_policy(talkers[0], talkers[0], tokenizer, PROMPTS, None, None, CONFIG, 0)
    assert np.abs(result.measures["kl"]).max() == 0
    assert set(result.measures) == {"response_tokens", "eos_rate", "kl"}
    other = evaluate_policy(*talkers, tokenizer, PROMPTS, None, None, CONFIG, 0)
    assert other.measures["kl"].min() > 0


def test_greedy_takes_one_sample_per_prompt_and_no_seed(talkers, tokenizer):
    one, two = (evaluate_policy(*talkers, tokenizer, PROMPTS, grade, None, CONFIG, seed,
                                greedy=True) for seed in (0, 1))
    assert one.responses == two.responses
    assert all(len(texts) == 1 for texts in one.responses)
    assert one.measures["gold"].shape == (5, 1)


def test_sampling_follows_the_seed(talkers, tokenizer):
    one, same, other = (evaluate_policy(*talkers, tokenizer, PROMPTS, grade, None, CONFIG, seed)
                        for seed in (0, 0, 1))
    assert one.responses == same.responses != other.responses
    assert all(len(texts) == 2 for texts in one.responses)


def test_the_summary_has_an_interval_for_every_measure(talkers, tokenizer):
    result = evaluate_policy(*talkers, tokenizer, PROMPTS, grade, None, CONFIG, 0)
    summary = summarize(result, CONFIG)
    assert set(summary) == set(result.measures)
    for name, row in summary.items():
        assert row["low"] <= row["mean"] <= row["high"]
        assert row["mean"] == pytest.approx(result.measures[name].mean())


# ---------------------------------------------------------------- zero-shot

DOCUMENTS = [Document("a", "The river is cold."), Document("b", "Bread")]


@pytest.fixture
def writer(tokenizer):
    """A random policy that writes words of the vocabulary, so that its text has the same tokens."""
    policy = make_talker(tokenizer, eos_bias=0.0)
    words = [t[0] == "\u0120" and len(t) > 1 for t in tokenizer.convert_ids_to_tokens(range(320))]
    with torch.no_grad():
        policy.lm_head.bias[~torch.tensor(words)] = -100.0
    return policy


def write(policy, tokenizer, text: str, count: int) -> list[int]:
    """What transformers' own greedy decoding writes after EOS and a text, alone in its batch."""
    ids = torch.tensor([[EOS] + tokenizer.encode(text)])
    return policy.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                           max_new_tokens=count)[0, ids.shape[1]:].tolist()


def make_items(policy, tokenizer) -> list[ZeroShotItem]:
    """Greedy continuations of 1 to 6 tokens as they are, and with one word exchanged."""
    items = []
    for n, prompt in enumerate(PROMPTS + PROMPTS[::-1]):
        right = tokenizer.decode(write(policy, tokenizer, prompt.prompt, 1 + n % 6)).split()
        first = " bread" if right[0] != "bread" else " mill"
        rest = write(policy, tokenizer, prompt.prompt + first, max(1, n % 6))  # greedy again
        last = "the" if right[-1] != "the" else "bread"
        for kind, target in (("right", " " + " ".join(right)),
                             ("first", first + tokenizer.decode(rest)),
                             ("last", " " + " ".join([*right[:-1], last])),
                             ("mixed", " ".join(["", *right[:-1], (right[-1], last)[n % 5 == 0]]))):
            items.append(ZeroShotItem(f"{kind}-{n}", kind, prompt.prompt, target))
    return items


def test_an_item_is_solved_if_transformers_writes_its_target(writer, tokenizer):
    items = make_items(writer, tokenizer)
    expected: dict[str, list[bool]] = {}
    for item in items:
        ids = tokenizer.encode(item.target)
        expected.setdefault(item.task, []).append(
            write(writer, tokenizer, item.text, len(ids)) == ids)
    shares = {task: np.mean(solved) for task, solved in expected.items()}
    assert shares == {"right": 1, "first": 0, "last": 0, "mixed": 0.8}
    for batch_size in (1, 3, 64):
        config = dataclasses.replace(CONFIG, batch_size=batch_size)
        results = evaluate_zero_shot(writer, tokenizer, items, [], config)
        assert {task: row["mean"] for task, row in results.items()} == shares


def test_corpus_loss_equals_unbatched_transformers(policy, tokenizer):
    losses = []
    for document in DOCUMENTS:
        ids = torch.tensor([[EOS] + tokenizer.encode(document.text) + [EOS]])
        with torch.no_grad():
            losses.append(policy(ids, labels=ids).loss.item())
    for batch_size in (1, 64):
        config = dataclasses.replace(CONFIG, batch_size=batch_size)
        results = evaluate_zero_shot(policy, tokenizer, [], DOCUMENTS, config)
        assert set(results) == {"corpus_loss"}
        assert results["corpus_loss"]["mean"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_texts_beyond_the_context(writer, policy, tokenizer):
    # One of them must not end the evaluation of a run that has taken hours.
    long = "the bread " * 64  # of a context of 64
    items = make_items(writer, tokenizer)[:4]
    more = [*items, ZeroShotItem("long", items[0].task, long, " bread")]
    alone = evaluate_zero_shot(writer, tokenizer, items, DOCUMENTS, CONFIG)
    with pytest.warns(UserWarning) as caught:
        assert evaluate_zero_shot(writer, tokenizer, more, DOCUMENTS, CONFIG) == alone
    assert [str(w.message) for w in caught] == [
        "1 of 5 zero-shot texts do not fit into the context of 64 tokens and are left out"]
    with pytest.warns(UserWarning):
        assert evaluate_zero_shot(policy, tokenizer, more[4:], [], CONFIG) == {}
    read = evaluate_zero_shot(policy, tokenizer, [], [Document("long", long)], CONFIG)
    ids = torch.tensor([[EOS] + tokenizer.encode(long)])[:, :64]  # a document: its beginning
    with torch.no_grad():
        assert read["corpus_loss"]["mean"] == pytest.approx(policy(ids, labels=ids).loss.item())


def test_corpus_loss_of_a_uniform_model_is_ln_v(policy, tokenizer):
    with torch.no_grad():
        policy.lm_head.weight.zero_()
    results = evaluate_zero_shot(policy, tokenizer, [], DOCUMENTS, CONFIG)
    assert set(results) == {"corpus_loss"}
    assert results["corpus_loss"]["mean"] == pytest.approx(math.log(320), rel=1e-6)


# ---------------------------------------------------------------- a bound that KL must obey

@pytest.mark.parametrize("n", [1, 2, 4, 16])
def test_kl_of_best_of_n_is_below_its_bound(n):
    # Best of n by enumeration: P(best = i) = F(i)^n - F(i-1)^n with actions ordered by score.
    p = torch.randn(50, dtype=torch.float64).softmax(-1)
    cumulative = p.cumsum(0).clamp(max=1)
    best = cumulative**n - torch.cat([torch.zeros(1, dtype=torch.float64), cumulative[:-1]]) ** n
    kl = compute_exact_kl(best.log(), p.log()).item()
    bound = math.log(n) - (n - 1) / n
    assert -1e-12 <= kl <= bound + 1e-12
    if n > 1:
        assert kl > 0.8 * bound  # fifty actions are nearly a continuum, where it is an equality
