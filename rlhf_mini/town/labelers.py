"""Labelers: people with their own weights, small biases and noise."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_mini.data import Prompt
from rlhf_mini.town.grader import beyond_ideal, grade
from rlhf_mini.town.words import words_of

POLITE = frozenset({"please", "thank", "thanks", "sorry", "welcome", "glad", "happy", "nice"})
TIE = 0.005  # utilities closer than this tie


@dataclass(frozen=True)
class Labeler:
    """One labeler.

    Attributes:
        id: number, also of `Ranking.labeler` and `Demonstration.labeler`.
        group: "train", or "test" for a labeler whose labels are never trained on.
        weights: of helpful, truthful, harmless; they sum to 1.
        verbosity: utility of a very long response over one of the ideal length.
        politeness: utility of a polite word.
        noise: scale of the Gumbel noise.
    """

    id: int
    group: str
    weights: tuple[float, float, float]
    verbosity: float
    politeness: float
    noise: float

    def utility(self, prompt: Prompt, response: str) -> float:
        """What the labeler feels about a response, without noise."""
        scores = grade(prompt, response)[:3]
        value = sum(w * s for w, s in zip(self.weights, scores, strict=True))
        value += self.verbosity * math.tanh(beyond_ideal(prompt, response) / 12)
        return value + self.politeness * bool(POLITE & set(words_of(response)))

    def rank(self, prompt: Prompt, responses: Sequence[str], rng: random.Random
             ) -> tuple[int, ...]:
        """Rank responses by utility plus Gumbel noise; the same text gets the same noise.

        Args:
            prompt: a prompt of the town.
            responses: K texts.
            rng: source of the noise, one draw per different text.

        Returns:
            K ranks, 1 = best; equal texts and utilities within TIE of the best of a group tie.
        """
        felt: dict[str, float] = {}
        for response in responses:
            if response not in felt:
                noise = -math.log(-math.log(rng.random() or 0.5))
                felt[response] = self.utility(prompt, response) + self.noise * noise
        ranks: dict[str, int] = {}
        best, rank = math.inf, 0
        for response, value in sorted(felt.items(), key=lambda item: -item[1]):
            if best - value > TIE:
                best, rank = value, rank + 1
            ranks[response] = rank
        return tuple(ranks[response] for response in responses)


def build_labelers(train: int, test: int, noise: float, rng: random.Random) -> list[Labeler]:
    """Draw labelers whose weights scatter around 0.5, 0.3, 0.2.

    Args:
        train: number of labelers who write and rank the training data.
        test: number of held-out labelers.
        noise: mean scale of their Gumbel noise.
        rng: source of all randomness.
    """
    labelers = []
    for i in range(train + test):
        raw = [w * rng.uniform(0.6, 1.4) for w in (0.5, 0.3, 0.2)]
        labelers.append(Labeler(
            id=i, group="train" if i < train else "test",
            weights=tuple(round(w / sum(raw), 4) for w in raw),
            verbosity=round(rng.uniform(0.03, 0.09), 4),
            politeness=round(rng.uniform(0.02, 0.08), 4),
            noise=round(noise * rng.uniform(0.85, 1.15), 4)))
    return labelers
