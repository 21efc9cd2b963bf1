"""What two processes compute together against what one computes alone; run by torchrun.

Both make the same toy models, take their shares of each batch, and compare the gradients that DDP
leaves with those of the whole batch; then steps of split models (FSDP) with those of whole ones.
Exits non-zero where they differ.
"""

from __future__ import annotations

import copy
import os
from unittest.mock import patch

import torch
from conftest import make_policy
from toys import make_pairs, make_reward_model, make_talker

from rlhf_mini import ppo, processes
from rlhf_mini.config import PPOConfig
from rlhf_mini.data import Prompt, collate, pack_rankings
from rlhf_mini.models import ValueModel, compute_response_logprobs
from rlhf_mini.pretrain import lm_loss
from rlhf_mini.reward import reward_loss
from rlhf_mini.rollout import Targets, collect_rollout, compute_targets
from rlhf_mini.runtime import pack_state
from rlhf_mini.sft import sft_loss

CLOSE = dict(rtol=1e-4, atol=1e-6)  # float32 sums in another order
CONFIG = PPOConfig(episodes=6, minibatches=1, max_response_tokens=9, lr=1e-3, value_lr=1e-3)
PROMPTS = [Prompt(str(i), "x" * n) for i, n in enumerate((3, 9, 1, 6, 2, 5))]


class Letters:
    """A tokenizer of 320 ids that reads a letter as a token."""

    eos_token_id, pad_token_id = 0, 1

    def __len__(self) -> int:
        return 320

    def encode(self, text: str, **_) -> list[int]:
        return [2 + ord(letter) % 60 for letter in text]

    def decode(self, ids, **_) -> str:
        return " ".join(map(str, ids))


def alone(function):
    """Call a function as one process would."""
    with patch("torch.distributed.is_initialized", lambda: False):
        return function()


def check_gradients(name: str, model, loss_of, items) -> None:
    """Compare the gradients of a loss over shares with those of the loss over all items."""
    whole, _ = alone(lambda: loss_of(items))
    wanted = torch.autograd.grad(whole, list(model.parameters()))
    together = processes.Together([model], [])
    loss, stats = together(lambda: loss_of(processes.take_share(items)))
    loss.backward()
    for parameter, gradient in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, **CLOSE)
    assert abs(stats["loss"] - whole.item()) < 1e-5, (name, stats["loss"], whole.item())
    model.zero_grad(set_to_none=True)


def check_ppo(policy, reward_model, value_model) -> None:
    """A dealt rollout is that of one process, and so is the step on a minibatch of it."""
    reference = make_policy(Letters(), seed=5)

    def roll():
        return collect_rollout(
            policy, reference, value_model, lambda prompts, texts, batch: reward_model(
                batch.input_ids, batch.attention_mask), Letters(), PROMPTS, CONFIG,
            torch.Generator().manual_seed(3))

    (dealt, dealt_texts), (whole, texts) = roll(), alone(roll)
    mask = whole.batch.response_mask
    assert dealt_texts == texts and mask.sum() > len(mask) and not mask.all()
    assert torch.equal(dealt.batch.response_mask, mask)
    assert torch.equal(dealt.batch.response_ids[mask], whole.batch.response_ids[mask])
    for name in ("old_logprobs", "ref_logprobs", "values", "entropy", "scores"):
        torch.testing.assert_close(getattr(dealt, name), getattr(whole, name), **CLOSE)
    targets = compute_targets(whole, 0.1, CONFIG)
    twins = copy.deepcopy(policy), copy.deepcopy(value_model)
    rows = processes.take_share(torch.arange(len(mask)))
    text = torch.randint(2, 320, (4, 12), generator=torch.Generator().manual_seed(1))
    stats = ppo.update_minibatch(
        policy, value_model, ppo.build_optimizer(policy, value_model, CONFIG), dealt.rows(rows),
        Targets(targets.advantages[rows], targets.returns[rows]), CONFIG,
        processes.take_share(text), 0)
    expected = alone(lambda: ppo.update_minibatch(
        *twins, ppo.build_optimizer(*twins, CONFIG), whole, targets, CONFIG, text, 0))
    assert stats.keys() == expected.keys()
    for name, value in expected.items():
        assert abs(stats[name] - value) < 1e-4 * max(1, abs(value)), (name, stats[name], value)
    for model, twin in zip((policy, value_model), twins, strict=True):
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)  # Adam divides by |gradient|


def check_split(policy, loss_of, items) -> None:
    """A split model goes on where a whole one stopped, as if it were whole."""
    twin = copy.deepcopy(policy)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3, fused=True) for m in (policy, twin)]

    def step(model, optimizer, compute) -> None:
        optimizer.zero_grad()
        compute()[0].backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1).item())
        optimizer.step()

    norms: list[float] = []
    for model, optimizer in zip((policy, twin), optimizers, strict=True):
        step(model, optimizer, lambda model=model: alone(lambda: loss_of(model, items)))
    whole = list(policy.parameters())
    with patch.dict(os.environ, ACCELERATE_USE_FSDP="true"):
        together = processes.Together([policy], optimizers[:1])
    held = [part.to_local() for part in policy.parameters()]
    held += [optimizers[0].state[part]["exp_avg_sq"].to_local() for part in policy.parameters()]
    assert sum(h.numel() for h in held) <= 1.02 * sum(w.numel() for w in whole)  # half of twice
    for _ in range(2):
        step(policy, optimizers[0],
             lambda: together(lambda: loss_of(policy, processes.take_share(items))))
        step(twin, optimizers[1], lambda: alone(lambda: loss_of(twin, items)))
        assert norms[-2] > 0.1 and abs(norms[-2] - norms[-1]) < 1e-4 * norms[-1]  # it was clipped
    assert policy.lm_head.weight is policy.transformer.wte.weight
    states = [pack_state({"policy": model}, {"adam": optimizer})
              for model, optimizer in zip((policy, twin), optimizers, strict=True)]
    assert states[0][1] == states[1][1]  # names, ties, settings
    torch.testing.assert_close(states[0][0], states[1][0], rtol=1e-3, atol=1e-5)
    with together.whole():
        inside = [weight.detach().clone() for weight in policy.parameters()]
    together.end()
    assert policy.lm_head.weight is policy.transformer.wte.weight
    for found, read, wanted in zip(policy.parameters(), inside, twin.parameters(), strict=True):
        assert type(found) is torch.nn.Parameter and found.requires_grad
        assert torch.equal(found, read)
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)
    alone(lambda: loss_of(policy, items))[0].backward()  # a model like any other again
    assert all(weight.grad is not None for weight in policy.parameters())


def main() -> None:
    processes.join_processes(torch.device("cpu"))
    assert processes.process_count() == 2
    policy = make_talker(Letters(), eos_bias=3.0)
    reward_model = make_reward_model(policy)
    pairs = make_pairs(6, seed=1)

    def sft(pairs, policy=policy):
        batch = collate(pairs, 1)
        logprobs, _ = compute_response_logprobs(policy, batch)
        return processes.combine(*sft_loss(logprobs, batch.response_mask),
                                 batch.response_mask.sum())

    def pretraining(rows):
        loss = lm_loss(policy, rows)
        return processes.combine(loss, {"loss": loss.item()}, len(rows))

    def reward(rankings):
        batch = pack_rankings(rankings, 1)
        return processes.combine(*reward_loss(
            reward_model.packed_scores(batch), batch.ranks, batch.mask), len(rankings))

    rankings = [(prompt, [response, response[1:] + [0], [5, 6, 0]], (2, 1, 3))
                for prompt, response in pairs[:5]]  # one process has three, the other two
    check_gradients("sft", policy, sft, pairs)
    check_gradients("pretraining", policy, pretraining, torch.tensor([p[0][:3] for p in pairs]))
    check_gradients("reward", reward_model, reward, rankings)
    check_ppo(policy, reward_model, ValueModel.from_reward_model(reward_model))
    check_split(make_policy(Letters(), seed=4), lambda model, pairs: sft(pairs, model), pairs)
    if processes.is_first():
        print("one and two processes agree")


if __name__ == "__main__":
    main()
