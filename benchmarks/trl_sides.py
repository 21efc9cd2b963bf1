"""The two sides of `against_trl.py`: the same training by this package and by TRL's trainers."""

from __future__ import annotations

import copy
import itertools
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from town_models import make_prompts, make_town_model, read_demonstrations

from rlhf_mini.compute import computing
from rlhf_mini.config import ComputeConfig, PPOConfig, RewardConfig, SFTConfig
from rlhf_mini.data import Ranking, encode_pair, encode_prompt, encode_ranking
from rlhf_mini.loading import load_policy, save_model
from rlhf_mini.models import RewardModel, ValueModel
from rlhf_mini.runtime import make_rng

K = 4  # responses per ranking, 6 pairs


@dataclass(frozen=True)
class Setting:
    """What is trained on a kind of device."""

    size: str  # of the model, in `measuring.SIZES`
    dtype: str
    tokens: int  # of each prompt, and at most of each response
    ppo: PPOConfig
    sft: SFTConfig
    reward: RewardConfig
    work: dict[str, tuple[int, int]]  # to warm up, and timed: iterations, or records


def _setting(size: str, dtype: str, tokens: int, episodes: int, minibatches: int, batch: int,
             work: dict) -> Setting:
    ppo = PPOConfig(
        episodes=episodes, minibatches=minibatches, epochs=4, kl_coef=0.05, vf_coef=0.1, lr=3e-6,
        value_lr=3e-6, max_prompt_tokens=tokens, max_response_tokens=tokens, warmup_iterations=0,
        missing_eos_score=0.0)
    return Setting(size, dtype, tokens, ppo, SFTConfig(epochs=2, batch_size=batch, dropout=0.0,
                                                       min_eos_rate=0.0),
                   RewardConfig(epochs=1, batch_size=batch), work)


SETTINGS = {
    "cpu": _setting("small", "float32", 16, 64, 4, 16,
                    {"ppo": (2, 10), "sft": (64, 300), "reward": (64, 320)}),
    "cuda": _setting("gpt2", "bfloat16", 64, 512, 8, 64,
                     {"ppo": (1, 4), "sft": (128, 400), "reward": (128, 640)}),
    "tiny": _setting("tiny", "float32", 16, 8, 2, 4,  # to try the script
                     {"ppo": (1, 1), "sft": (4, 8), "reward": (4, 8)})}


def save_models(setting: Setting, folder: Path) -> None:
    """Write random models as `policy`, `reward` and `classifier`, the reward model as TRL wants it.
    """
    policy, tokenizer = make_town_model(setting.size, max(128, 2 * setting.tokens))
    policy.config.activation_function = "gelu_new"
    reward_model = RewardModel.from_policy(policy, torch.Generator().manual_seed(0))
    save_model(policy, tokenizer, folder / "policy")
    save_model(reward_model, tokenizer, folder / "reward")
    save_model(with_score_head(reward_model, tokenizer.pad_token_id), tokenizer,
               folder / "classifier")


def with_score_head(reward_model: RewardModel, pad_id: int):
    """Return a sequence classifier, which TRL takes, with the weights of our reward model."""
    from transformers import AutoModelForSequenceClassification
    classifier = AutoModelForSequenceClassification.from_config(reward_model.model.config)
    classifier.transformer.load_state_dict(reward_model.model.transformer.state_dict())
    classifier.score.weight.data.copy_(reward_model.model.classifier.weight.data)
    classifier.config.pad_token_id = pad_id
    return classifier


def make_rankings(count: int) -> list[Ranking]:
    """Rank responses of the town in random order: the time does not depend on who is right."""
    rng, pool = make_rng(0, "benchmark"), read_demonstrations()
    return [Ranking(f"r{i}", rng.choice(pool).prompt,
                    tuple(d.response for d in rng.sample(pool, K)),
                    tuple(rng.sample(range(1, K + 1), K))) for i in range(count)]


@dataclass(frozen=True)
class Bench:
    """Where a side finds its models, and what it trains."""

    setting: Setting
    models: Path
    device: torch.device
    tuned: bool  # TRL in our precision, without checkpointing, with our activation


# ---- ours: each returns a function that trains, and the units of work in it ----------------------


def ours_ppo(bench: Bench, work: int):
    """PPO for `work` iterations."""
    from rlhf_mini.ppo import train_ppo
    from rlhf_mini.rollout import score_with
    policy, tokenizer = load_policy(bench.models / "policy", bench.device)
    reward_model = RewardModel.load(bench.models / "reward", bench.device)
    prompts = make_prompts(tokenizer, bench.setting.tokens)
    config = replace(bench.setting.ppo, iterations=work)
    return lambda: train_ppo(policy, ValueModel.from_reward_model(reward_model),
                             score_with(reward_model), tokenizer, prompts, config,
                             seed=0), work * config.episodes


def ours_sft(bench: Bench, work: int):
    """SFT on `work` demonstrations."""
    from rlhf_mini.sft import train_sft
    policy, tokenizer = load_policy(bench.models / "policy", bench.device)
    train, config = read_demonstrations()[:work], bench.setting.sft
    return lambda: train_sft(policy, tokenizer, train, train[:1], config,
                             seed=0), config.epochs * len(train)


def ours_reward(bench: Bench, work: int):
    """A reward model on `work` rankings."""
    from rlhf_mini.reward import train_reward_model
    _, tokenizer = load_policy(bench.models / "policy")
    reward_model = RewardModel.load(bench.models / "reward", bench.device)
    return lambda: train_reward_model(reward_model, tokenizer, make_rankings(work), [],
                                      bench.setting.reward, seed=0), work


# ---- TRL, likewise -------------------------------------------------------------------------------


def common_arguments(bench: Bench) -> dict:
    """Return what all of TRL's trainers are told: which device, nothing saved or reported."""
    told = {"gradient_checkpointing": False, "bf16": bench.setting.dtype == "bfloat16"}
    return dict(output_dir=tempfile.mkdtemp(), report_to="none", save_strategy="no",
                logging_strategy="no", disable_tqdm=True, use_cpu=bench.device.type == "cpu",
                **told if bench.tuned else {})


def load_for_trl(bench: Bench, kind: str, name: str):
    """Load a saved model in float32 with transformers' class of that kind."""
    import transformers
    changed = {"activation_function": "gelu_pytorch_tanh"} if bench.tuned else {}
    return getattr(transformers, kind).from_pretrained(bench.models / name, dtype=torch.float32,
                                                       **changed)


def trl_ppo(bench: Bench, work: int):
    """As `ours_ppo`."""
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig as Arguments
    from trl.experimental.ppo import PPOTrainer
    _, tokenizer = load_policy(bench.models / "policy")
    policy, ppo = load_for_trl(bench, "AutoModelForCausalLM", "policy"), bench.setting.ppo
    rows = [{"input_ids": encode_prompt(tokenizer, p.prompt)}
            for p in make_prompts(tokenizer, bench.setting.tokens)]
    arguments = Arguments(
        **common_arguments(bench), per_device_train_batch_size=ppo.episodes, temperature=1.0,
        num_mini_batches=ppo.minibatches, num_ppo_epochs=ppo.epochs, kl_coef=ppo.kl_coef,
        total_episodes=work * ppo.episodes, response_length=ppo.max_response_tokens,
        stop_token="eos", local_rollout_forward_batch_size=ppo.episodes,
        num_sample_generations=0, learning_rate=ppo.lr)
    heads = [load_for_trl(bench, "AutoModelForSequenceClassification", "classifier")
             for _ in range(2)]
    trainer = PPOTrainer(
        args=arguments, processing_class=tokenizer, model=policy, ref_model=copy.deepcopy(policy),
        reward_model=heads[0], value_model=heads[1], train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:1]))
    return trainer.train, work * ppo.episodes


def trl_sft(bench: Bench, work: int):
    """As `ours_sft`."""
    from datasets import Dataset
    from trl import SFTConfig as Arguments
    from trl import SFTTrainer
    _, tokenizer = load_policy(bench.models / "policy")
    sft = bench.setting.sft
    pairs = [encode_pair(tokenizer, d.prompt, d.response, sft.max_prompt_tokens,
                         sft.max_response_tokens, where=d.id)
             for d in read_demonstrations()[:work]]
    rows = [{"input_ids": p + r, "completion_mask": [0] * len(p) + [1] * len(r)} for p, r in pairs]
    arguments = Arguments(**common_arguments(bench), num_train_epochs=sft.epochs, max_length=None,
                          per_device_train_batch_size=sft.batch_size, learning_rate=sft.lr,
                          completion_only_loss=True)
    trainer = SFTTrainer(model=load_for_trl(bench, "AutoModelForCausalLM", "policy"),
                         args=arguments, processing_class=tokenizer,
                         train_dataset=Dataset.from_list(rows))
    return trainer.train, sft.epochs * len(rows)


def trl_reward(bench: Bench, work: int):
    """As `ours_reward`: all pairs of each ranking."""
    from datasets import Dataset
    from trl import RewardConfig as Arguments
    from trl import RewardTrainer
    _, tokenizer = load_policy(bench.models / "policy")
    rows, reward = [], bench.setting.reward
    for ranking in make_rankings(work):
        prompt, responses, ranks = encode_ranking(tokenizer, ranking, reward.max_prompt_tokens,
                                                  reward.max_response_tokens)
        rows += [{"chosen_ids": prompt + responses[a], "rejected_ids": prompt + responses[b]}
                 for a, b in itertools.permutations(range(K), 2) if ranks[a] < ranks[b]]
    arguments = Arguments(
        **common_arguments(bench), num_train_epochs=1, max_length=None, learning_rate=reward.lr,
        per_device_train_batch_size=reward.batch_size * K * (K - 1) // 2)
    classifier = load_for_trl(bench, "AutoModelForSequenceClassification", "classifier")
    trainer = RewardTrainer(model=classifier, args=arguments, processing_class=tokenizer,
                            train_dataset=Dataset.from_list(rows))
    return trainer.train, work


# ---- either side ---------------------------------------------------------------------------------


def make_training(side: str, stage: str, bench: Bench, work: int):
    """Return a side's function that trains, and the units of work in it."""
    if side != "ours":
        return {"ppo": trl_ppo, "sft": trl_sft, "reward": trl_reward}[stage](bench, work)
    train, units = {"ppo": ours_ppo, "sft": ours_sft, "reward": ours_reward}[stage](bench, work)

    def computed() -> list[dict]:
        with computing(ComputeConfig(dtype=bench.setting.dtype), bench.device):
            return train()

    return computed, units
