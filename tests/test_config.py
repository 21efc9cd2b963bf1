"""Presets, checks and overrides; every field is documented and read."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from pathlib import Path

import pytest

from rlhf_mini import config as config_module
from rlhf_mini.config import (
    PRESETS,
    STAGES,
    ComputeConfig,
    EvaluationConfig,
    PPOConfig,
    PretrainConfig,
    RankingConfig,
    RewardConfig,
    RunConfig,
    SFTConfig,
    TownConfig,
    load_preset,
    override,
)

PACKAGE = Path(config_module.__file__).parent
STAGE_CONFIGS = [TownConfig, PretrainConfig, SFTConfig, RankingConfig, RewardConfig, PPOConfig,
                 EvaluationConfig, ComputeConfig]
FIELDS = [(cls, f.name) for cls in STAGE_CONFIGS for f in dataclasses.fields(cls)]


def test_presets_load_and_differ():
    assert set(PRESETS) == {"smoke", "cpu", "gpu", "real-cpu", "real"}
    presets = [load_preset(name) for name in PRESETS]
    assert all(isinstance(preset, RunConfig) for preset in presets)
    assert len(set(presets)) == 5
    for name, preset in zip(PRESETS, presets, strict=True):
        for stage, values in PRESETS[name].items():
            for field, value in values.items():
                assert getattr(getattr(preset, stage), field) == value


@pytest.mark.parametrize("name", ["gpu", "real"])
def test_gpu_presets_are_gpt2_124m(name):
    pretrain = load_preset(name).pretrain
    v, t, d, n = pretrain.vocab_size, pretrain.context, pretrain.hidden, pretrain.layers
    assert v * d + t * d + n * (12 * d * d + 13 * d) + 2 * d == 124_439_808  # GPT-2 small


def test_gpu_preset_keeps_to_the_papers_where_they_say():
    c = load_preset("gpu")
    prompts = c.town.size * (c.town.labeler_prompts + c.town.customer_prompts)
    assert abs(prompts / 31_144 - 1) < 0.05  # Ouyang et al. 2022, table 6
    assert abs(c.town.size * c.town.demonstrations / 12_725 - 1) < 0.05
    assert 2.55e-6 <= c.ppo.lr <= 2.55e-5  # appendix C.4: the range that was tried
    assert (c.ppo.episodes, c.ppo.minibatches, c.ppo.epochs) == (512, 8, 1)
    assert (c.reward.batch_size, c.reward.epochs) == (64, 1)  # appendix C.2
    # no stage asks for more than the town has
    assert c.ranking.prompts <= prompts
    assert c.ranking.valid_prompts <= c.town.size * c.town.valid_prompts
    assert c.ranking.test_prompts <= c.town.size * c.town.test_prompts
    assert c.town.valid_demonstrations <= c.town.valid_prompts


def test_unknown_preset():
    with pytest.raises(ValueError, match="preset 'tiny': expected one of smoke, cpu, gpu, real-"):
        load_preset("tiny")


def test_configs_are_frozen():
    for cls in [RunConfig, *STAGE_CONFIGS]:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(cls(), dataclasses.fields(cls)[0].name, 1)


@pytest.mark.parametrize(("cls", "name", "value", "wanted"), [
    (TownConfig, "seed", -1, "a number of at least 0"),
    (TownConfig, "documents", 0, "a number above 0"),
    (TownConfig, "size", 0, "a number above 0"),
    (TownConfig, "size", 53, "at most 52, there are no more names"),
    (PretrainConfig, "hidden", 130, "a multiple of heads=4"),
    (PretrainConfig, "row_tokens", 129, "at most context=128"),
    (PretrainConfig, "copy_steps", 1801, "at most steps=1800"),
    (PretrainConfig, "lr", 0.0, "a number above 0"),
    (SFTConfig, "dropout", 1.5, "a number from 0 to 1"),
    (SFTConfig, "min_eos_rate", -0.1, "a number from 0 to 1"),
    (RankingConfig, "k_low", 1, "at least 2"),
    (RankingConfig, "k_high", 3, "at least k_low=4"),
    (RankingConfig, "decoys", 3, "from 0 to k_low - 2"),
    (RewardConfig, "weight_decay", -1.0, "a number of at least 0"),
    (PPOConfig, "clip_range", 0.0, "a number above 0"),
    (PPOConfig, "kl_coef", -0.1, "a number of at least 0"),
    (PPOConfig, "gae_lambda", 1.1, "a number from 0 to 1"),
    (PPOConfig, "episodes", 127, "a multiple of minibatches=2"),
    (PPOConfig, "lr", float("nan"), "a number above 0"),
    (PPOConfig, "lr", float("inf"), "a number above 0"),
    (PPOConfig, "kl_coef", float("inf"), "a number of at least 0"),
    (PretrainConfig, "vocab_size", 257, "at least 258: 256 bytes, EOS and PAD"),
    (EvaluationConfig, "split", "train", "'valid' or 'test'"),
    (EvaluationConfig, "confidence", 1.0, "a number between 0 and 1"),
])
def test_bad_values_are_named(cls, name, value, wanted):
    pattern = rf"{cls.__name__}\.{name} = {re.escape(repr(value))}: expected {re.escape(wanted)}"
    with pytest.raises(ValueError, match=pattern):
        cls(**{name: value})


def test_an_adaptive_coefficient_cannot_start_at_zero():
    with pytest.raises(ValueError, match=r"PPOConfig\.kl_target = 6\.0: expected 0 when kl_coef"):
        PPOConfig(kl_coef=0.0, kl_target=6.0)


def test_override_sets_by_full_and_by_short_name():
    before = RunConfig()
    after = override(before, ["ppo.kl_coef=0", "ptx_coef=1", "sft.lr=1e-4", "steps = 1_000"])
    assert (after.ppo.kl_coef, after.ppo.ptx_coef, after.sft.lr) == (0.0, 1.0, 1e-4)
    assert after.pretrain.steps == 1000 and type(after.ppo.ptx_coef) is float
    assert after.town == before.town and before == RunConfig()


def test_override_of_two_fields_that_only_fit_together():
    after = override(RunConfig(), ["ppo.episodes=96", "ppo.minibatches=3"])
    assert (after.ppo.episodes, after.ppo.minibatches) == (96, 3)


@pytest.mark.parametrize(("text", "value"), [("true", True), ("False", False), ("FALSE", False)])
def test_override_reads_booleans(text, value):
    assert override(RunConfig(), [f"whiten_advantages={text}"]).ppo.whiten_advantages is value


def test_override_reads_text():
    assert override(RunConfig(), ["split=valid"]).evaluation.split == "valid"


@pytest.mark.parametrize(("assignment", "message"), [
    ("kl_coef", "--set kl_coef: expected stage.field=value"),
    ("kl_coff=1", "--set kl_coff: no such field; stages are town, pretrain, sft"),
    ("ppo.kl_coff=1", "--set ppo.kl_coff: ppo has the fields iterations, episodes"),
    ("pppo.kl_coef=1", "--set pppo.kl_coef: no such field"),
    ("lr=1", "--set lr: ambiguous, write one of pretrain.lr, sft.lr, reward.lr, ppo.lr"),
    ("kl_coef=big", "--set kl_coef=big: expected a value of type float, such as 0.3"),
    ("iterations=1.5", "--set iterations=1.5: expected a value of type int"),
    ("iterations=True", "--set iterations=True: expected a value of type int"),
    ("whiten_advantages=1", "--set whiten_advantages=1: expected a value of type bool"),
    ("kl_coef=", "--set kl_coef=: expected a value of type float"),
    ("kl_coef=-1", "PPOConfig.kl_coef = -1.0: expected a number of at least 0"),
])
def test_bad_overrides_are_named(assignment, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        override(RunConfig(), [assignment])


def test_stages_are_the_fields_of_a_run():
    assert [type(getattr(RunConfig(), stage)) for stage in STAGES] == STAGE_CONFIGS


def test_every_field_has_a_comment():
    lines = inspect.getsource(config_module).splitlines()
    for cls, name in FIELDS:
        start = lines.index(f"class {cls.__name__}:")
        line = next(line for line in lines[start:] if line.startswith(f"    {name}: "))
        assert "#" in line, f"{cls.__name__}.{name} says neither meaning nor source"


def _attributes_read() -> set[str]:
    names = set()
    for path in PACKAGE.rglob("*.py"):
        if path.name == "config.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                names.add((_owner(node), node.attr))
    return names


def _owner(node: ast.Attribute) -> str:
    """The last word before the field: "config" in config.lr, "ppo" in run_config.ppo.lr."""
    value = node.value
    return value.attr if isinstance(value, ast.Attribute) else getattr(value, "id", "")


def test_every_field_is_read():
    """A setting that nothing reads is a lie; reads through an object called *config* or a stage."""
    read = {attr for owner, attr in _attributes_read()
            if "config" in owner.lower() or owner in STAGES}
    unread = sorted(f"{cls.__name__}.{name}" for cls, name in FIELDS if name not in read)
    assert not unread, f"no module reads {', '.join(unread)}"
