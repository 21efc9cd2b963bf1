"""What the stages of a run share: settings, folders, the town, and the user's own records."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch

from rlhf_mini import readers
from rlhf_mini.config import RunConfig
from rlhf_mini.data import Demonstration, Document, Prompt, Ranking, encode_ranking, read_jsonl
from rlhf_mini.evaluation import evaluate_policy
from rlhf_mini.loading import load_policy
from rlhf_mini.records import DataError
from rlhf_mini.runtime import atomic_write, make_generator
from rlhf_mini.selection import assign_splits, fit_to_context
from rlhf_mini.town import Town, grade, load_town

SAMPLES = 12  # prompts in samples.jsonl
RANKINGS = {"train": "rankings.jsonl", "valid": "rankings_valid.jsonl",
            "test": "rankings_test.jsonl"}


@dataclass
class Run:
    """What all stages of a run share.

    Attributes:
        directory: holds one folder per stage.
        config: all settings.
        seed: of everything but the town.
        device: where the models are.
        rounds: how often rankings, reward model and PPO are made.
        sources: the user's own "model", "corpus", "demonstrations", "rankings", "prompts": file or
            name.
        label: "[3/8] sft", what the running stage is called in its lines.
    """

    directory: Path
    config: RunConfig
    seed: int = 0
    device: torch.device = torch.device("cpu")
    rounds: int = 1
    sources: dict[str, str] = field(default_factory=dict)
    label: str = ""
    _read: dict[str, list] = field(default_factory=dict, repr=False)

    def say(self, text: str) -> None:
        """Print a line of the running stage."""
        print(f"{self.label}: {text}", flush=True)

    def seed_of(self, *names: str) -> int:
        """Return a seed of its own for one purpose."""
        return make_generator(self.seed, *names).initial_seed()

    def policy(self, stage: str):
        """Load the policy and tokenizer that a stage made."""
        policy, tokenizer = load_policy(self.directory / stage, self.device)
        check_limits(self.config, policy.config.n_positions)
        return policy, tokenizer

    @cached_property
    def town(self) -> Town:
        """The town of this run, read from its folder."""
        return load_town(self.directory / "town")

    def user_records(self, kind: str) -> list:
        """Return the user's own "corpus", "demonstrations", "rankings" or "prompts", with splits.

        Raises:
            DataError: naming file, line and field.
        """
        if kind not in self._read:
            draw = (self.seed, self.config.ranking.k_low, self.config.ranking.k_high)
            read = {"demonstrations": readers.read_demonstrations, "prompts": readers.read_prompts,
                    "rankings": lambda source: readers.read_rankings(source, *draw),
                    "corpus": readers.read_documents}[kind]
            source, shares = self.sources[kind], {"valid": 0.01} if kind == "corpus" else {}
            try:
                self._read[kind] = assign_splits(read(source), self.seed, **shares)
            except DataError as error:
                text = str(error).removeprefix(f"{source}: ")
                raise DataError(f"--{kind} {source}: {text}") from error
        return self._read[kind]

    def documents(self, split: str) -> list[Document]:
        """Return the texts of a split, to pretrain on or to measure the loss on."""
        records = self.user_records("corpus") if "corpus" in self.sources else self.town.documents
        return [d for d in records if d.split == split]

    def prompts(self, split: str, tokenizer) -> list[Prompt]:
        """Return the prompts of a split that PPO and the evaluation may use."""
        if (kept := self._read.get(f"fitting {split} prompts")) is None:
            prompts = (self.user_records("prompts") if "prompts" in self.sources
                       else self.town.prompts)
            kept = self.fit([p for p in prompts if p.split == split], tokenizer,
                            self.config.ppo.max_prompt_tokens, 2)
            self._read[f"fitting {split} prompts"] = kept
        return kept

    def demonstrations(self, split: str, tokenizer, limits) -> list[Demonstration]:
        """Return the demonstrations of a split, within the limits of a stage."""
        records = (self.user_records("demonstrations") if "demonstrations" in self.sources
                   else self.town.demonstrations)
        return self.fit([d for d in records if d.split == split], tokenizer,
                        limits.max_prompt_tokens, limits.max_response_tokens)

    def rankings(self, stage: str, split: str, tokenizer) -> list[Ranking]:
        """Return the rankings of a split, within the limits of the reward model."""
        limits = self.config.reward
        records = read_jsonl(self.directory / stage / RANKINGS[split], Ranking)
        return self.fit(records, tokenizer, limits.max_prompt_tokens, limits.max_response_tokens)

    def fit(self, records: list, tokenizer, prompt_tokens: int, response_tokens: int) -> list:
        """Shorten or drop the records that are too long, and say how many; keep all others.

        Raises:
            DataError: if there were records and none is left.
        """
        kept, misfits, causes = [], 0, Counter()
        for record in records:
            texts = getattr(record, "responses", None) or [getattr(record, "response", None)]
            texts = texts if texts[0] is not None else ()
            try:
                encode_ranking(tokenizer, Ranking("", record.prompt, tuple(texts), ()),
                               prompt_tokens, response_tokens)
                kept.append(record)
            except DataError:
                misfits += 1
                fitted, report = fit_to_context([record], tokenizer, prompt_tokens, response_tokens)
                kept += fitted
                causes.update(asdict(report))
        if misfits:
            dropped = len(records) - len(kept)
            kind = type(records[0]).__name__.lower()
            limits = f"{prompt_tokens} prompt tokens" + (
                "" if kind == "prompt" else f" or {response_tokens} response tokens")
            equal = f", {n} of them equal once cut" if (n := causes["dropped_all_equal"]) else ""
            said = (f"{misfits} of {len(records)} {kind}s have more than {limits}: "
                    f"{misfits - dropped} shortened, {dropped} left out{equal}")
            if not kept:
                raise DataError(f"{self.label}: {said}, none is left. Raise max_prompt_tokens or "
                                "max_response_tokens of this stage with --set, or shorten them")
            self.say(said)
        return kept


def check_limits(config: RunConfig, context: int) -> None:
    """Refuse limits that the model's context cannot hold, before hours were spent.

    Raises:
        ValueError: naming the fields.
    """
    rows = config.pretrain.row_tokens
    if config.ppo.ptx_coef > 0 and rows > context:
        raise ValueError(f"pretrain.row_tokens = {rows}: PPO-ptx reads rows of so many tokens, but "
                         f"the model's context is {context} tokens; --set "
                         f"pretrain.row_tokens={context}, or ptx_coef=0")
    prompt = config.ppo.max_prompt_tokens
    for stage in ("sft", "ranking", "reward", "ppo", "evaluation"):
        limits = getattr(config, stage)
        tokens = getattr(limits, "max_prompt_tokens", prompt) + limits.max_response_tokens
        if tokens > context:
            raise ValueError(
                f"{stage}: max_prompt_tokens and max_response_tokens add up to {tokens}, but the "
                f"model's context is {context} tokens; lower them, e.g. --set "
                f"{stage}.max_response_tokens={max(2, context // 3)}")


def in_round(name: str, number: int) -> str:
    """Return the folder of a stage in a round.

    >>> in_round("ppo", 1), in_round("ppo", 2)
    ('ppo', 'ppo_2')
    """
    return name if number == 1 else f"{name}_{number}"


def grade_prompt(prompt: Prompt, response: str) -> dict[str, float]:
    """Return the town's true scores of a response: gold, helpful, truthful, harmless."""
    scores = grade(prompt, response)
    return {"gold": scores.overall, "helpful": scores.helpful, "truthful": scores.truthful,
            "harmless": scores.harmless}


def grader_of(run: Run) -> Callable[[Prompt, str], dict[str, float]] | None:
    """Return the gold grader, or None where the truth about the user's prompts is unknown."""
    return None if "prompts" in run.sources else grade_prompt


def write_lines(path: Path, rows: list[dict]) -> None:
    """Write rows as JSON, one per line."""
    atomic_write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_samples(run: Run, policy, tokenizer, work: Path) -> None:
    """Answer a dozen prompts of validation customers, sampled and greedy."""
    prompts = run.prompts("valid", tokenizer)[:SAMPLES]
    config = replace(run.config.evaluation, samples=1)
    results = {greedy: evaluate_policy(policy, policy, tokenizer, prompts, grader_of(run), None,
                                       config, run.seed, greedy) for greedy in (False, True)}
    write_lines(work / "samples.jsonl", [
        {"id": p.id, "prompt": p.prompt}
        | {name: results[greedy].responses[i][0]
           for name, greedy in (("response", False), ("greedy", True))}
        | {f"gold_{name}": results[greedy].measures["gold"][i, 0]
           for name, greedy in (("response", False), ("greedy", True))
           if "gold" in results[greedy].measures}
        for i, p in enumerate(prompts)])
