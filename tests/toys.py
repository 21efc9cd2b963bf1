"""Small batches and models that the algorithm tests share."""

from __future__ import annotations

import random

import torch
from conftest import make_policy
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from rlhf_mini.data import TokenBatch, collate
from rlhf_mini.models import RewardModel
from rlhf_mini.training import TrainingRecord

EOS, PAD, V = 0, 1, 320  # ids and size of the `tokenizer` fixture
GARBAGE = [float("inf"), float("-inf"), float("nan"), 1e30]


class Ids(list):
    """All that `make_policy` needs of a tokenizer: its length and the special ids."""

    eos_token_id, pad_token_id = EOS, PAD


def make_pairs(
    rows: int, seed: int = 0, prompt: tuple[int, int] = (3, 9), response: tuple[int, int] = (2, 8)
) -> list[tuple[list[int], list[int]]]:
    """Random (prompt ids, response ids) of random lengths; every response ends in EOS."""
    rng = random.Random(seed)

    def draw(low: int, high: int) -> list[int]:
        return [rng.randrange(2, V) for _ in range(rng.randint(low, high))]

    return [(draw(*prompt), draw(response[0] - 1, response[1] - 1) + [EOS]) for _ in range(rows)]


def make_batch(rows: int, seed: int = 0, **lengths) -> TokenBatch:
    """`make_pairs` as a padded batch."""
    return collate(make_pairs(rows, seed, **lengths), PAD)


CONFIGS = {  # what GPT-2's configuration may change in the arithmetic
    "plain": {},
    "scaled by layer": dict(scale_attn_by_inverse_layer_idx=True),
    "not scaled": dict(scale_attn_weights=False),
    "relu": dict(activation_function="relu"),
    "gelu in one step": dict(activation_function="gelu_pytorch_tanh"),
    "narrow MLP, coarse norm": dict(n_inner=48, layer_norm_epsilon=0.1),
}


def configured(name: str) -> GPT2LMHeadModel:
    """A random GPT-2 of 3 layers and 4 heads, context 64, with one of `CONFIGS`."""
    torch.manual_seed(1)
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=V, n_positions=64, n_embd=32, n_layer=3, n_head=4, initializer_range=0.2,
        bos_token_id=EOS, eos_token_id=EOS, pad_token_id=PAD, **CONFIGS[name])).eval()


def random_mask(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    """(B, T) bool: the first 1..T entries of each row, one row full."""
    rng = random.Random(seed)
    lengths = [width] + [rng.randint(1, width) for _ in range(rows - 1)]
    return torch.arange(width) < torch.tensor(lengths)[:, None]


def make_reward_model(policy: nn.Module, seed: int = 0) -> RewardModel:
    """A reward model on a policy's backbone."""
    return RewardModel.from_policy(policy, torch.Generator().manual_seed(seed))


def make_talker(tokenizer, seed: int = 0, eos_bias: float = 4.0) -> nn.Module:
    """A random policy that ends its responses: its own output layer has a bias for EOS."""
    policy = make_policy(tokenizer, seed)
    head = nn.Linear(32, len(tokenizer))
    with torch.no_grad():
        head.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(seed))
        head.bias.zero_()
        head.bias[tokenizer.eos_token_id] = eos_bias
    policy.lm_head = head
    policy.config.tie_word_embeddings = False
    return policy.eval()


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    """True if all weights are equal bit for bit."""
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def stop_at(monkeypatch, step: int) -> None:
    """Make the next training loop die, as by Ctrl-C, when it logs this step."""
    log = TrainingRecord.log

    def dying_log(self, at: int, **metrics) -> None:
        if at == step:
            monkeypatch.setattr(TrainingRecord, "log", log)
            raise KeyboardInterrupt
        log(self, at, **metrics)

    monkeypatch.setattr(TrainingRecord, "log", dying_log)
