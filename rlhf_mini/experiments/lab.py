"""What the studies share: one seed's rankings, reward models, policies and their judgement.

A lab stands on a finished run, of which it uses the town, the base model and the SFT model. All
else is drawn and trained anew for its seed: responses and labels, the reward model, the policy.
What a study makes is kept in the lab's folder under a fingerprint of what it depends on, so that
the next study, or the same one after a stop, finds it there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from filelock import FileLock
from torch import Tensor

from rlhf_mini.config import EvaluationConfig, PPOConfig, RewardConfig, override
from rlhf_mini.data import Prompt, Ranking, read_jsonl, write_jsonl
from rlhf_mini.evaluation import (
    Evaluation,
    evaluate_policy,
    measure_reward_model,
)
from rlhf_mini.files import atomic_directory, fingerprint, read_json, recover_directory, write_json
from rlhf_mini.loading import load_policy, save_model
from rlhf_mini.models import RewardModel, ValueModel
from rlhf_mini.pipeline import finished_stage
from rlhf_mini.ppo import train_ppo
from rlhf_mini.pretrain import encode_documents, pack_rows
from rlhf_mini.ranking import RankFunction, collect_rankings
from rlhf_mini.reward import center_reward_model, train_reward_model
from rlhf_mini.rollout import ScoreFunction, score_with
from rlhf_mini.runtime import make_generator, make_rng
from rlhf_mini.stages import rank_by
from rlhf_mini.town import Labeler
from rlhf_mini.workspace import Run, grade_prompt

MODES = {"sampled": False, "greedy": True}
MEASURES = ("gold", "helpful", "truthful", "harmless", "kl", "response_tokens")


@dataclass
class Lab:
    """One seed's workplace.

    Attributes:
        run: its stages town, base and sft are finished; its config holds all sizes.
        seed: of everything that is made here.
        folder: what is kept.
    """

    run: Run
    seed: int
    folder: Path

    @cached_property
    def policy(self) -> Path:
        """The folder of the SFT model, from which all policies start."""
        return self.run.directory / "sft"

    @cached_property
    def tokenizer(self):
        """The tokenizer of all models."""
        return load_policy(self.policy, self.run.device)[1]

    @cached_property
    def by_text(self) -> dict[str, Prompt]:
        """The town's prompts by their text: a ranking knows only the text."""
        return {p.prompt: p for p in self.run.town.prompts}

    def labelers(self, group: str = "train") -> list[Labeler]:
        """Return the labelers whose labels are trained on, or those of the "test" group."""
        return [x for x in self.run.town.labelers if x.group == group]

    def with_settings(self, *assignments: str) -> Lab:
        """Return a lab with changed settings, such as "ppo.kl_coef=0", and the same folder."""
        config = override(self.run.config, list(assignments))
        return Lab(replace(self.run, config=config), self.seed, self.folder)

    def keep(self, name: str, settings: object, make: Callable[[Path], None]) -> Path:
        """Return the folder of a result, made now unless it was made before.

        Of several processes that ask for it at the same time one makes it and the others wait.

        Args:
            name: begins the folder's name.
            settings: all that the result depends on, besides the seed and the SFT model.
            make: fills the folder it is given.
        """
        state = finished_stage(self.policy)
        mark = fingerprint(name, self.seed, state["fingerprint"], settings)
        path = self.folder / f"{name}-{mark[:16]}"
        with FileLock(self.folder / f".{path.name}.lock"):
            if not recover_directory(path):
                with atomic_directory(path) as partial:
                    make(partial)
        return path

    # ---- rankings ------------------------------------------------------------------------------

    def collect(self, split: str, count: int, policy: Path | None = None,
                prompts: Sequence[Prompt] | None = None) -> list[Ranking]:
        """Rank a policy's responses to `count` prompts, each by one of the town's labelers.

        Args:
            split: "train", "valid" or "test"; the last is ranked by held-out labelers.
            count: prompts; more contain fewer.
            policy: whose responses; None: those of SFT.
            prompts: to draw from; None: all of the split.
        """
        policy = policy or self.policy
        config = self.run.config.ranking
        rank = rank_by(self.labelers("test" if split == "test" else "train"))

        def make(folder: Path) -> None:
            model, tokenizer = load_policy(policy, self.run.device)
            pool = prompts
            if pool is None:
                pool = [p for p in self.run.town.prompts if p.split == split]
            drawn = make_rng(self.seed, "lab prompts", split).sample(pool, len(pool))[:count]
            write_jsonl(folder / "rankings.jsonl", collect_rankings(
                model, tokenizer, drawn, rank, config,
                make_generator(self.seed, "lab rankings", split).initial_seed()))

        sizes = {k: v for k, v in asdict(config).items() if not k.endswith("prompts")}
        where = policy.name if policy != self.policy else "sft"
        given = [] if prompts is None else [[p.id for p in prompts]]
        folder = self.keep("rankings", [split, count, where, sizes, *given], make)
        limits = self.run.config.reward
        return self.run.fit(read_jsonl(folder / "rankings.jsonl", Ranking), self.tokenizer,
                            limits.max_prompt_tokens, limits.max_response_tokens)

    def rank_again(self, rankings: Sequence[Ranking], rank: RankFunction, name: str
                   ) -> list[Ranking]:
        """Have the same responses ranked by others; rankings without an untied pair fall out.

        Args:
            rankings: of the town's prompts.
            rank: as in `collect_rankings`.
            name: of the purpose, for a noise of its own.
        """
        rng = make_rng(self.seed, "rank again", name)
        again = []
        for ranking in rankings:
            ranks, _, labeler = rank(self.by_text[ranking.prompt], list(ranking.responses), rng)
            if max(ranks) > 1:
                again.append(replace(ranking, ranks=ranks, labeler=labeler))
        return again

    # ---- models --------------------------------------------------------------------------------

    def train_reward_model(self, rankings: Sequence[Ranking], config: RewardConfig | None = None,
                           start: Path | None = None, member: int = 0) -> Path:
        """Train a reward model from the SFT model, and centre it; return its folder.

        Args:
            rankings: to learn from.
            config: None: the run's.
            start: a policy to start from instead.
            member: number within an ensemble: another head, another order.
        """
        config, start = config or self.run.config.reward, start or self.policy

        def make(folder: Path) -> None:
            policy, tokenizer = load_policy(start, self.run.device)
            names = ("lab reward", str(member))
            reward_model = RewardModel.from_policy(policy, make_generator(self.seed, *names))
            train_reward_model(reward_model, tokenizer, list(rankings), [], config,
                               make_generator(self.seed, *names).initial_seed())
            demonstrations = self.run.demonstrations("train", tokenizer, config)
            center_reward_model(reward_model, tokenizer, demonstrations, config)
            save_model(reward_model, tokenizer, folder)

        where = start.name if start != self.policy else "sft"
        labels = [(r.prompt, r.responses, r.ranks) for r in rankings]
        return self.keep("reward", [labels, asdict(config), where, member], make)

    def load_reward_model(self, folder: Path) -> RewardModel:
        """Load what `train_reward_model` made."""
        return RewardModel.load(folder, self.run.device)

    def measure_reward_model(self, folder: Path) -> dict[str, float]:
        """Return accuracies on rankings of SFT's responses to test customers.

        Returns:
            `rm_gold` against the true score, `rm_labelers` against held-out labelers.
        """
        rankings = self.collect("test", self.run.config.ranking.test_prompts)
        config = dataclasses.replace(self.run.config.evaluation, bootstrap=1)
        results = measure_reward_model(self.load_reward_model(folder), self.tokenizer, rankings,
                                       self.run.config.reward, config)
        return {"rm_gold": results["accuracy_gold"]["mean"],
                "rm_labelers": results["accuracy_labelers"]["mean"]}

    def read_corpus(self) -> Tensor:
        """Return the training corpus as rows (N, L) of tokens."""
        documents = [d for d in self.run.town.documents if d.split == "train"]
        return pack_rows(encode_documents(self.tokenizer, documents),
                         self.run.config.pretrain.row_tokens,
                         make_generator(self.seed, "lab text"))

    def train_policy(self, reward: Path, config: PPOConfig | None = None,
                     score: ScoreFunction | None = None, name: str = "",
                     prompts: Sequence[Prompt] | None = None) -> Path:
        """Optimise the SFT model by PPO; return the folder of the policy and
        `history.json`, the metrics of each iteration.

        Args:
            reward: folder of a reward model, from which the value model starts.
            config: None: the run's, without pretraining text.
            score: None: the reward model's.
            name: of the score, if another is given.
            prompts: the environment's; None: all training prompts.
        """
        config = config or replace(self.run.config.ppo, ptx_coef=0.0)

        def make(folder: Path) -> None:
            policy, tokenizer = load_policy(self.policy, self.run.device)
            reward_model = self.load_reward_model(reward)
            asked = self.run.prompts("train", tokenizer) if prompts is None else list(prompts)
            history = train_ppo(
                policy, ValueModel.from_reward_model(reward_model),
                score or score_with(reward_model), tokenizer, asked, config,
                make_generator(self.seed, "lab ppo").initial_seed(),
                self.read_corpus() if config.ptx_coef else None,
                grade=lambda prompt, response: grade_prompt(prompt, response)["gold"])
            save_model(policy, tokenizer, folder)
            write_json(folder / "history.json", history)

        given = [] if prompts is None else [[p.id for p in prompts]]
        given += [self.run.config.pretrain.row_tokens] if config.ptx_coef else []
        return self.keep("policy", [reward.name, asdict(config), name, *given], make)

    # ---- judgement -----------------------------------------------------------------------------

    def answer(self, policy: Path, config: EvaluationConfig | None = None
               ) -> dict[str, Evaluation]:
        """Let a policy answer the held-out customers' prompts; return its answers by mode.

        Args:
            policy: folder.
            config: None: the run's.
        """
        config = config or self.run.config.evaluation

        def make(folder: Path) -> None:
            model, tokenizer = load_policy(policy, self.run.device)
            ref_policy, _ = load_policy(self.policy, self.run.device)
            prompts = self.run.prompts(config.split, tokenizer)
            answers = {mode: evaluate_policy(model, ref_policy, tokenizer, prompts, grade_prompt,
                                             None, config, self.seed, greedy)
                       for mode, greedy in MODES.items()}
            write_json(folder / "answers.json", {
                mode: {"responses": e.responses,
                       "measures": {name: x.tolist() for name, x in e.measures.items()}}
                for mode, e in answers.items()})

        where = policy.name if policy != self.policy else "sft"
        kept = read_json(self.keep("answers", [where, asdict(config)], make) / "answers.json")
        return {mode: Evaluation(rows["responses"],
                                 {name: np.array(x) for name, x in rows["measures"].items()})
                for mode, rows in kept.items()}

    def judge(self, policy: Path) -> dict[str, float]:
        """Return what a policy is worth on held-out customers, beside SFT on the same prompts.

        Returns:
            For each mode, "sampled" and "greedy": means over prompts of `MEASURES` as
            `gold_sampled` and so on, and against SFT the paired `gain_sampled` in gold and the
            `win_sampled` rate, ties half.
        """
        ours, theirs = self.answer(policy), self.answer(self.policy)
        row = {}
        for mode in MODES:
            row |= {f"{name}_{mode}": float(ours[mode].measures[name].mean()) for name in MEASURES}
            gain = ours[mode].measures["gold"] - theirs[mode].measures["gold"]
            row[f"gain_{mode}"] = float(gain.mean())
            row[f"win_{mode}"] = float((np.sign(gain) + 1).mean() / 2)
        return row
