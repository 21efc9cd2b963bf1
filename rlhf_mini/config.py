"""One frozen dataclass per stage, and the `--set field=value` override.

Every field carries its symbol, unit and source in one comment. Sources: "paper" is InstructGPT
(Ouyang et al. 2022, arXiv 2203.02155), "N+" is Huang et al. 2024 (arXiv 2403.17031), "own" means
measured on the validation customers of the town.
"""

from __future__ import annotations

import ast
import dataclasses
import math
from dataclasses import dataclass, field

from rlhf_mini.presets import PRESETS


def _check(config: object, name: str, ok: bool, wanted: str) -> None:
    if not ok:
        value = getattr(config, name)
        raise ValueError(f"{type(config).__name__}.{name} = {value!r}: expected {wanted}")


def _check_fields(config: object, wanted: str, test, *names: str) -> None:
    for name in names:
        _check(config, name, test(getattr(config, name)), wanted)


def _positive(config: object, *names: str) -> None:
    _check_fields(config, "a number above 0", lambda x: 0 < x < math.inf, *names)


def _non_negative(config: object, *names: str) -> None:
    _check_fields(config, "a number of at least 0", lambda x: 0 <= x < math.inf, *names)


def _fraction(config: object, *names: str) -> None:
    _check_fields(config, "a number from 0 to 1", lambda x: 0 <= x <= 1, *names)


@dataclass(frozen=True)
class TownConfig:
    """The synthetic world and the sizes of its files."""

    seed: int = 0  # seed of the world itself; own
    size: int = 1  # factor of all numbers below but the shares; from 2 on also more words; own
    residents: int = 24  # people with facts; own
    documents: int = 30_000  # pretraining documents; own
    labeler_prompts: int = 1_200  # prompts written by labelers (train); own
    customer_prompts: int = 5_000  # prompts of the training customers; own
    valid_prompts: int = 400  # prompts of the validation customers; own
    test_prompts: int = 400  # prompts of the held-out test customers; own
    demonstrations: int = 300  # written by labelers, training split; own
    valid_demonstrations: int = 100  # on prompts of the validation customers; own
    demonstration_errors: float = 0.15  # share with a wrong or weak response; own
    demonstration_padding: float = 0.6  # of the others, share with needless words or bad form; own
    label_noise: float = 0.14  # mean scale of the labelers' Gumbel noise, overall score; own

    def __post_init__(self) -> None:
        _non_negative(self, "seed", "label_noise")
        _fraction(self, "demonstration_errors", "demonstration_padding")
        _positive(self, *[f.name for f in dataclasses.fields(self) if f.type == "int"
                          and f.name != "seed"])
        _check(self, "size", self.size <= 52, "at most 52, there are no more names")


@dataclass(frozen=True)
class PretrainConfig:
    """A GPT-2 from scratch on the town's corpus."""

    vocab_size: int = 1024  # V, tokens; own
    layers: int = 4  # own
    hidden: int = 128  # D; own
    heads: int = 4  # own
    context: int = 128  # tokens; own
    init_std: float = 0.06  # standard deviation of the initial weights; own (0.02 in GPT-2)
    steps: int = 1_800  # optimiser steps on the corpus; own
    copy_steps: int = 350  # first steps, on repeated random tokens (learns to copy); own
    batch_size: int = 16  # rows per step; own
    row_tokens: int = 64  # tokens per row; own
    lr: float = 3e-3  # AdamW, embeddings and norms; own
    muon_lr: float = 0.02  # Muon, block matrices; own
    weight_decay: float = 0.01  # own
    checkpoint_every: int = 100  # steps between checkpoints; own

    def __post_init__(self) -> None:
        _positive(self, *[f.name for f in dataclasses.fields(self)
                          if f.name not in ("weight_decay", "copy_steps")])
        _non_negative(self, "weight_decay", "copy_steps")
        _check(self, "hidden", self.hidden % self.heads == 0, f"a multiple of heads={self.heads}")
        _check(self, "vocab_size", self.vocab_size >= 258, "at least 258: 256 bytes, EOS and PAD")
        _check(self, "row_tokens", self.row_tokens <= self.context,
               f"at most context={self.context}")
        _check(self, "copy_steps", self.copy_steps <= self.steps, f"at most steps={self.steps}")


@dataclass(frozen=True)
class SFTConfig:
    """Supervised fine-tuning on demonstrations."""

    epochs: int = 4  # passes over the demonstrations; paper: 16
    batch_size: int = 16  # demonstrations per step; paper: 32 (1.3B)
    lr: float = 5e-4  # peak, AdamW, cosine to 10 %; own (paper: 9.65e-6)
    dropout: float = 0.1  # residual dropout; paper: 0.2
    max_prompt_tokens: int = 64  # longer prompts are an error; own
    max_response_tokens: int = 48  # including EOS; own
    min_eos_rate: float = 0.95  # gate on validation prompts; own
    checkpoint_every: int = 50  # steps between checkpoints; own

    def __post_init__(self) -> None:
        _positive(self, "epochs", "batch_size", "lr", "max_prompt_tokens", "max_response_tokens",
                  "checkpoint_every")
        _fraction(self, "dropout", "min_eos_rate")


@dataclass(frozen=True)
class RankingConfig:
    """K-way rankings of the current policy's responses."""

    prompts: int = 6_000  # ranked training prompts, one labeler each; own
    valid_prompts: int = 200  # ranked prompts of the validation customers; own
    test_prompts: int = 400  # ranked prompts of the test customers, by held-out labelers; own
    k_low: int = 4  # K, responses per prompt, from; paper: 4
    k_high: int = 9  # K, to; paper: 9
    decoys: int = 1  # of the K, responses written to other prompts; own
    temperature: float = 1.0  # T of the sampler; paper
    max_response_tokens: int = 48  # including EOS; own
    batch_size: int = 256  # responses sampled at a time; own

    def __post_init__(self) -> None:
        _positive(self, "prompts", "valid_prompts", "test_prompts", "temperature",
                  "max_response_tokens", "batch_size")
        _check(self, "k_low", self.k_low >= 2, "at least 2")
        _check(self, "k_high", self.k_high >= self.k_low, f"at least k_low={self.k_low}")
        _check(self, "decoys", 0 <= self.decoys <= self.k_low - 2, "from 0 to k_low - 2")


@dataclass(frozen=True)
class RewardConfig:
    """The reward model."""

    epochs: int = 2  # passes over the rankings; paper: 1
    batch_size: int = 16  # prompts per step, all pairs of a prompt together; paper: 64
    lr: float = 5e-4  # peak, AdamW, cosine to 10 %; own (paper: 9e-6)
    weight_decay: float = 0.01  # own
    max_prompt_tokens: int = 64  # longer prompts are an error; own
    max_response_tokens: int = 64  # including EOS, and those of cut-off responses; own
    checkpoint_every: int = 100  # steps between checkpoints; own

    def __post_init__(self) -> None:
        _positive(self, "epochs", "batch_size", "lr", "max_prompt_tokens", "max_response_tokens",
                  "checkpoint_every")
        _non_negative(self, "weight_decay")


@dataclass(frozen=True)
class PPOConfig:
    """Proximal policy optimisation against the reward model."""

    iterations: int = 20  # rollouts; own
    episodes: int = 128  # B, prompts per rollout; paper: 512
    minibatches: int = 2  # optimiser steps per epoch; paper: 8
    epochs: int = 2  # inner epochs over a rollout; paper: 1
    lr: float = 2e-4  # policy; own
    value_lr: float = 1e-3  # value model; own
    warmup_iterations: int = 3  # linear from a tenth of lr, then constant; paper: 10
    adam_eps: float = 1e-5  # N+
    max_grad_norm: float = 1.0  # gradient clipping; N+
    clip_range: float = 0.2  # epsilon of the ratio; paper
    value_clip_range: float = 0.2  # N+
    vf_coef: float = 0.1  # weight of the value loss; N+ (its gradient is scaled, not shared)
    gamma: float = 1.0  # discount; paper
    gae_lambda: float = 0.95  # lambda; N+
    whiten_advantages: bool = True  # mean 0, variance 1 over the rollout's tokens; N+
    kl_coef: float = 0.3  # beta, per-token KL penalty; own (paper: 0.02)
    kl_target: float = 0.0  # nats per sequence; above 0 beta adapts; Ziegler et al. 2019: 6, 10
    kl_horizon: int = 10_000  # episodes, time scale of the adaptive beta; their released code
    kl_stop: float = 0.0  # nats per sequence to the reference that end training; 0 = never; own
    update_kl_stop: float = 0.0  # nats per token that end an update; 0 = never; Spinning Up
    missing_eos_score: float = -1.0  # score of a response without EOS (references are at 0); N+
    temperature: float = 1.0  # T, divides the logits of policy, old and reference alike; paper
    max_prompt_tokens: int = 64  # longer prompts are an error; own
    max_response_tokens: int = 48  # including EOS; own
    ptx_coef: float = 0.0  # gamma_ptx, weight of the pretraining loss of PPO-ptx; own (paper: 27.8)
    ptx_rows: int = 16  # rows of corpus text per minibatch; own
    ema_decay: float = 0.0  # of the averaged policy, per iteration; 0 = off; paper: 0.992
    checkpoint_every: int = 5  # iterations between checkpoints; own

    def __post_init__(self) -> None:
        _positive(self, "iterations", "episodes", "minibatches", "epochs", "lr", "value_lr",
                  "adam_eps", "max_grad_norm", "clip_range", "value_clip_range", "temperature",
                  "max_prompt_tokens", "max_response_tokens", "ptx_rows", "kl_horizon",
                  "checkpoint_every")
        _non_negative(self, "warmup_iterations", "vf_coef", "kl_coef", "kl_target", "kl_stop",
                      "update_kl_stop", "ptx_coef")
        _fraction(self, "gamma", "gae_lambda", "ema_decay")
        _check(self, "episodes", self.episodes % self.minibatches == 0,
               f"a multiple of minibatches={self.minibatches}")
        _check(self, "kl_target", self.kl_target == 0 or self.kl_coef > 0,
               "0 when kl_coef is 0 (an adaptive coefficient cannot leave 0)")


@dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation on the test customers."""

    split: str = "test"  # which customers: "valid" while choosing settings, "test" to report
    samples: int = 2  # responses per prompt at T = 1; own
    max_response_tokens: int = 48  # including EOS; own
    batch_size: int = 256  # responses at a time; own
    bootstrap: int = 2_000  # resamples per interval; own
    confidence: float = 0.95  # of every interval; paper

    def __post_init__(self) -> None:
        _check(self, "split", self.split in ("valid", "test"), "'valid' or 'test'")
        _positive(self, "samples", "max_response_tokens", "batch_size", "bootstrap")
        _check(self, "confidence", 0 < self.confidence < 1, "a number between 0 and 1")


@dataclass(frozen=True)
class ComputeConfig:
    """How the arithmetic of all stages is carried out."""

    dtype: str = "float32"  # of matrix products, or "bfloat16"; weights stay float32; own
    compile: bool = False  # fuse the layers' operations with torch.compile; own

    def __post_init__(self) -> None:
        _check(self, "dtype", self.dtype in ("float32", "bfloat16"), "'float32' or 'bfloat16'")


@dataclass(frozen=True)
class RunConfig:
    """Everything a run needs; one field per stage, and how to compute."""

    town: TownConfig = field(default_factory=TownConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    ranking: RankingConfig = field(default_factory=RankingConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)


STAGES = tuple(f.name for f in dataclasses.fields(RunConfig))


def load_preset(name: str) -> RunConfig:
    """Return the configuration of a preset.

    Args:
        name: of `presets.PRESETS`.

    Raises:
        ValueError: if there is no such preset.
    """
    if name not in PRESETS:
        raise ValueError(f"preset {name!r}: expected one of {', '.join(PRESETS)}")
    config = RunConfig()
    return dataclasses.replace(config, **{
        stage: dataclasses.replace(getattr(config, stage), **values)
        for stage, values in PRESETS[name].items()
    })


def override(config: RunConfig, assignments: list[str]) -> RunConfig:
    """Apply `stage.field=value` or, where only one stage has the field, `field=value`.

    Args:
        config: the configuration to start from; it is not changed.
        assignments: e.g. ["ppo.kl_coef=0", "ptx_coef=1"].

    Returns:
        A new configuration, checked again.

    Raises:
        ValueError: for an unknown or ambiguous field, or a value of the wrong type or range.

    >>> override(RunConfig(), ["kl_coef=0"]).ppo.kl_coef
    0.0
    """
    changes: dict[str, dict[str, object]] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(f"--set {assignment}: expected stage.field=value")
        stage, field_name = _find_field(config, name.strip())
        value = _parse(text.strip(), getattr(getattr(config, stage), field_name), name)
        changes.setdefault(stage, {})[field_name] = value
    return dataclasses.replace(config, **{
        stage: dataclasses.replace(getattr(config, stage), **values)
        for stage, values in changes.items()
    })


def _find_field(config: RunConfig, name: str) -> tuple[str, str]:
    stage, dot, field_name = name.rpartition(".")
    fields = {s: [f.name for f in dataclasses.fields(getattr(config, s))] for s in STAGES}
    owners = [s for s in STAGES if field_name in fields[s] and (not dot or s == stage)]
    if len(owners) == 1:
        return owners[0], field_name
    if owners:
        choices = ", ".join(f"{s}.{field_name}" for s in owners)
        raise ValueError(f"--set {name}: ambiguous, write one of {choices}")
    if dot and stage in fields:
        raise ValueError(f"--set {name}: {stage} has the fields {', '.join(fields[stage])}")
    raise ValueError(f"--set {name}: no such field; stages are {', '.join(STAGES)}, "
                     "fields are listed in rlhf_mini/config.py")


def _parse(text: str, current: object, name: str) -> object:
    kind = type(current)
    if kind is str:
        return text
    try:
        value = ast.literal_eval(text.capitalize() if kind is bool else text)
    except (ValueError, SyntaxError):
        value = None
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise ValueError(f"--set {name}={text}: expected a value of type {kind.__name__}, "
                         f"such as {current!r}")
    return value
