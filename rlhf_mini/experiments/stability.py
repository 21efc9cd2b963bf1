"""Stability: does a reward model keep its order when a prompt is said in other words?

Two kinds of probe. The prompt changes and its meaning does not: then no pair of responses should
change its order. The response gets a little worse, by the true score: then it should lose.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from rlhf_mini.data import DataError, Prompt, Ranking
from rlhf_mini.experiments.figures import draw_rows, new_panels
from rlhf_mini.experiments.lab import Lab
from rlhf_mini.experiments.study import Study, find_rows
from rlhf_mini.reward import compute_accuracy, encode_rankings, score_rankings
from rlhf_mini.runtime import make_rng
from rlhf_mini.town import grade, reword
from rlhf_mini.town.words import words_in

FLIPS = ("other words", "other prefix", "typo", "lower case")  # probes of the prompt
WORSE = ("wrong value", "needless sentence", "no final mark", "other prompt")  # of the response
PromptChange = Callable[[Prompt, random.Random], str]
Edit = Callable[[Prompt, str, random.Random], list[str]]
Case = tuple[Prompt, tuple[str, ...]]  # with its own different responses, the truly best first


def change_prefix(prompt: Prompt, habits: Mapping[int, str], rng: random.Random) -> str:
    """Begin the prompt as another customer would; small talk, which has no prefix, stays.

    Args:
        prompt: of the town.
        habits: id of a customer -> prefix, which may be empty.
        rng: source of randomness.
    """
    if prompt.family == "chat":
        return prompt.prompt
    own = habits[prompt.customer]
    text = prompt.prompt.removeprefix(own)
    text = text[0].upper() + text[1:]  # "Dear helper, what ..."
    others = sorted({p for p in habits.values() if p and p != own and not p.endswith(", ")})
    return rng.choice(others) + text


def swap_letters(text: str, rng: random.Random) -> str:
    """Swap two neighbouring letters inside a word of at least 4; no such word: nothing changes.

    >>> swap_letters("Who is Olga?", random.Random(0))
    'Who is Ogla?'
    """
    places = [i for word in re.finditer(r"[A-Za-z]{4,}", text)
              for i in range(word.start() + 1, word.end() - 2) if text[i] != text[i + 1]]
    if not places:
        return text
    i = rng.choice(places)
    return text[:i] + text[i + 1] + text[i] + text[i + 2:]


def prompt_changes(habits: Mapping[int, str]) -> dict[str, PromptChange]:
    """Return the changes of the prompt by name; those that find nothing to change return it."""
    changes = (lambda prompt, rng: reword(prompt, rng).prompt,
               lambda prompt, rng: change_prefix(prompt, habits, rng),
               lambda prompt, rng: swap_letters(prompt.prompt, rng),
               lambda prompt, rng: prompt.prompt.lower())
    return dict(zip(FLIPS, changes, strict=True))


def measure_flips(before: Sequence[np.ndarray], after: Sequence[np.ndarray]) -> dict[str, float]:
    """Compare the scores of the same responses before and after the prompt was changed.

    Args:
        before: per prompt (K,) scores; equal ones make no pair.
        after: per prompt (K,) scores.

    Returns:
        `rate`, the share of pairs whose order flips, a tie half; `pairs`; `change`, the mean
        absolute change of the margin, and `margin`, the mean absolute margin before.
    """
    margins = np.array([(b[i] - b[j], a[i] - a[j]) for b, a in zip(before, after, strict=True)
                        for i, j in combinations(range(len(b)), 2) if b[i] != b[j]])
    old, new = margins.T
    return {"rate": 1 - compute_accuracy(old * new), "pairs": len(margins),
            "change": float(np.abs(new - old).mean()), "margin": float(np.abs(old).mean())}


def change_values(prompt: Prompt, response: str, rng: random.Random) -> list[str]:
    """Put another name, thing, colour, job and so on in the place of one, in all ways, shuffled."""
    words, edited = words_in(prompt.truth), []
    pools = (words.names, words.objects, words.colours, words.places, ("good", "bad"),
             *words.attributes.values(), *words.categories.values())
    for pool in pools:
        for value in pool:
            pattern = re.compile(rf"\b{re.escape(value)}\b", re.IGNORECASE)
            if pattern.search(response):
                new = rng.choice([v for v in pool if v != value])
                edited.append(pattern.sub(
                    lambda m, new=new: new[0].upper() + new[1:] if m[0][0].isupper() else new,
                    response))
    rng.shuffle(edited)
    return edited


def response_edits(cases: Sequence[Case]) -> dict[str, Edit]:
    """Return the edits of a response by name; each proposes texts that may be worse."""
    def add_sentence(prompt: Prompt, response: str, rng: random.Random) -> list[str]:
        closings = words_in(prompt.truth).closings
        return [f"{response} {closing}" for closing in rng.sample(closings, len(closings))]

    edits = (change_values, add_sentence,
             lambda prompt, response, rng: [response.rstrip(".!?")],
             lambda prompt, response, rng: [best for _, (best, *_) in rng.choices(cases, k=10)])
    return dict(zip(WORSE, edits, strict=True))


def find_worse(prompt: Prompt, response: str, edited: Sequence[str]) -> str | None:
    """Return the first text that is truly worse than the response, None if there is none."""
    gold = grade(prompt, response).overall
    return next((x for x in edited if x and grade(prompt, x).overall < gold), None)


def measure_preferences(scores: Sequence[np.ndarray]) -> dict[str, float]:
    """Count how often the worse response of a pair is preferred.

    Args:
        scores: per prompt (2,): of the original and of the worse response.

    Returns:
        `rate`, a tie half; `pairs`; `change`, the mean absolute difference of the two scores.
    """
    margins = np.array([original - worse for original, worse in scores])
    return {"rate": 1 - compute_accuracy(margins), "pairs": len(margins),
            "change": float(np.abs(margins).mean())}


def reword_half(lab: Lab, rankings: Sequence[Ranking]) -> list[Ranking]:
    """Return a copy of the rankings per pass, each with a random half of the prompts reworded.

    A rewording that is too long for the reward model is not used.
    """
    rng, repeated = make_rng(lab.seed, "stability", "augmented"), []
    for ranking in [r for _ in range(lab.run.config.reward.epochs) for r in rankings]:
        text = reword(lab.by_text[ranking.prompt], rng).prompt
        use = rng.random() < 0.5 and fits(lab, text, ranking.responses)
        repeated.append(replace(ranking, prompt=text) if use else ranking)
    return repeated


def probe(lab: Lab, reward: Path) -> list[dict]:
    """Put a reward model to all probes, on SFT's responses to held-out customers."""
    limits, model = lab.run.config.reward, lab.load_reward_model(reward)

    def score(asked: Sequence[tuple[str, tuple[str, ...]]]) -> list[np.ndarray]:
        rankings = [Ranking("", prompt, x, (1,) * len(x)) for prompt, x in asked]
        return [s.double().numpy() for s in score_rankings(
            model, encode_rankings(lab.tokenizer, rankings, limits), lab.tokenizer.pad_token_id)]

    habits = {c["id"]: c["prefix"] for c in lab.run.town.world["customers"]}
    rows, cases = [], find_cases(lab)
    before = score([(prompt.prompt, responses) for prompt, responses in cases])
    for name, change in prompt_changes(habits).items():
        rng = make_rng(lab.seed, "stability", name)
        changed = [(change(prompt, rng), responses) for prompt, responses in cases]
        kept = [i for i, (text, responses) in enumerate(changed)
                if text != cases[i][0].prompt and fits(lab, text, responses)]
        if kept:
            rows.append({"probe": name} | measure_flips([before[i] for i in kept],
                                                        score([changed[i] for i in kept])))
    for name, edit in response_edits(cases).items():
        rng, pairs = make_rng(lab.seed, "stability", name), []
        for prompt, (best, *_) in cases:
            edited = [x for x in edit(prompt, best, rng) if fits(lab, prompt.prompt, (x,))]
            if worse := find_worse(prompt, best, edited):
                pairs.append((prompt.prompt, (best, worse)))
        if pairs:
            rows.append({"probe": name} | measure_preferences(score(pairs)))
    return rows


def find_cases(lab: Lab) -> list[Case]:
    """Return the held-out rankings of at least 2 different own responses, without decoys."""
    cases = []
    for r in lab.collect("test", lab.run.config.ranking.test_prompts):
        prompt = lab.by_text[r.prompt]
        own = {x for x, decoy in zip(r.responses, r.decoys, strict=True) if not decoy}
        if len(own) > 1:
            cases.append((prompt, tuple(sorted(
                own, key=lambda x, p=prompt: (-grade(p, x).overall, x)))))
    return cases


def fits(lab: Lab, prompt: str, responses: Sequence[str]) -> bool:
    """Say whether the reward model can read a prompt and its responses."""
    try:
        encode_rankings(lab.tokenizer, [Ranking("", prompt, tuple(responses), ())],
                        lab.run.config.reward)
    except DataError:
        return False
    return True


def measure(lab: Lab, condition: dict) -> list[dict]:
    """Train a reward model, with or without rewording; probe it, and judge it and its policy.

    With rewording there is one pass over a copy per pass without, so both take as many steps.

    Returns:
        One row per probe, and one of `probe` "policy" with the accuracies and the judgement.
    """
    rankings = lab.collect("train", lab.run.config.ranking.prompts)
    config = lab.run.config.reward
    if condition["augmented"]:
        rankings, config = reword_half(lab, rankings), replace(config, epochs=1)
    reward = lab.train_reward_model(rankings, config)
    policy = lab.train_policy(reward)
    return [*probe(lab, reward),
            {"probe": "policy"} | lab.measure_reward_model(reward) | lab.judge(policy)]


def draw(rows: list[dict]) -> Figure:
    """Draw the shares of flipped pairs and of worse responses preferred, by probe."""
    table: dict[tuple, dict] = {}  # per probe and seed the rates of both conditions
    for row in rows:
        if row["probe"] in FLIPS + WORSE:
            both = table.setdefault((row["probe"], row["seed"]), {"probe": row["probe"]})
            both[row["augmented"]] = row["rate"]
    figure, panels = new_panels(2, 1, 4.4)
    for axes, names in zip(panels, (FLIPS, WORSE), strict=True):
        found = [both for both in table.values() if len(both) == 3]
        shown = {name: {"probe": name} for name in names if find_rows(found, {"probe": name})}
        draw_rows(axes, found, shown, {"prompts as they are": False, "half of them reworded": True})
        axes.set_xlim(left=0)
    panels[0].set(title="Share of pairs whose order flips")
    panels[1].set(title="Share in which the worse response is preferred")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2,
                  fontsize=8, frameon=False)
    return figure


STUDY = Study(
    "stability", "Does the reward model keep its order when a prompt is said in other words?",
    ({"augmented": False}, {"augmented": True}), measure, draw,
    ("ranking.prompts=1600", "ppo.iterations=12"))
