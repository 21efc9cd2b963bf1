"""Sampling, fast: the same tokens as `generation.generate`, for less time.

Keys and values lie in memory that is allocated once, GPT-2's layers are called directly, and
finished rows leave in larger groups. On a GPU the layers run in the precision of autocast, and one
step is recorded as a CUDA graph and replayed, since launching its kernels would take longer than
running them.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_mini.models import compute_logits, compute_position_ids, finish, freeze, project
from rlhf_mini.runtime import NonFiniteLoss
from rlhf_mini.tensors import gather_logprobs, pick_tokens, temper

LEAVE_AT = 0.75  # finished rows leave when at most this share goes on: copying a cache costs time
LOOK_EVERY = {"cpu": 1, "cuda": 8}  # steps between looks at who has finished, which stop a GPU
SLOTS = 32  # on a GPU a cache holds a multiple of so many tokens, so that graphs fit again


@dataclass
class State:
    """All that a decoding step reads and writes; a graph wants each tensor at a fixed address."""

    keys: list[Tensor]  # per layer (B, heads, S, D / heads), S slots
    values: list[Tensor]
    bias: Tensor  # (B, 1, 1, S): 0 = may be attended to, -inf = may not
    slot: Tensor  # (1,) int, where this step's keys and values go
    position: Tensor  # (B, 1) int, of this step's token
    token: Tensor  # (B, 1) int, in: the last token, out: the next one
    noise: Tensor  # (B,) from [0, 1): what the next token is picked with
    logprob: Tensor  # (B,) nats, of the picked token

    @classmethod
    def empty(cls, policy: PreTrainedModel, rows: int, slots: int) -> State:
        """Return a state of `rows` responses with `slots` places for tokens."""
        config, weight = policy.config, policy.transformer.wte.weight
        shape = rows, config.n_head, slots, config.n_embd // config.n_head
        keys, values = ([weight.new_zeros(shape) for _ in range(config.n_layer)] for _ in "kv")
        ids = torch.zeros(rows, 1, dtype=torch.int64, device=weight.device)
        return cls(keys, values, weight.new_zeros(rows, 1, 1, slots), ids[:1, 0].clone(), ids,
                   ids.clone(), ids[:, 0].float(), ids[:, 0].float())

    def take(self, other: State, rows: Tensor) -> None:
        """Copy the given rows (N,) of another state into the first N rows; the others are idle."""
        used = min(other.bias.shape[-1], self.bias.shape[-1])
        for mine, theirs in zip((*self.keys, *self.values), (*other.keys, *other.values),
                                strict=True):
            mine[:len(rows), :, :used] = theirs[rows, :, :used]
        self.bias.fill_(-torch.inf)
        self.bias[:len(rows), ..., :used] = other.bias[rows, ..., :used]
        for mine, theirs in ((self.position, other.position), (self.token, other.token)):
            mine.zero_()
            mine[:len(rows)] = theirs[rows]
        self.slot.copy_(other.slot)


def run_cached(
    policy: PreTrainedModel, state: State, token_ids: Tensor, positions: Tensor, slots: Tensor,
    bias: Tensor,
) -> Tensor:
    """Send tokens through GPT-2's layers; their keys and values are written to the state.

    Args:
        policy: GPT-2 style language model in eval mode.
        state: of the B rows.
        token_ids: (B, L) int.
        positions: (B, L) int.
        slots: (L,) int, where they go.
        bias: (B, 1, L, S') added to the attention scores over the first S' slots.

    Returns:
        (B, D) the last token's hidden states.
    """
    backbone, seen = policy.transformer, bias.shape[-1]
    x = backbone.wte(token_ids) + backbone.wpe(positions)
    for block, keys, values in zip(backbone.h, state.keys, state.values, strict=True):
        query, key, value = project(block, x)
        keys.index_copy_(2, slots, key)
        values.index_copy_(2, slots, value)
        x = finish(block, x, F.scaled_dot_product_attention(
            query, keys[:, :, :seen], values[:, :, :seen], bias, scale=block.attn.scaling))
    return backbone.ln_f(x[:, -1])


def read_prompts(
    policy: PreTrainedModel, prompt_ids: Tensor, prompt_mask: Tensor
) -> tuple[State, Tensor]:
    """Fill a state with prompts (B, P), left-padded, and compute what follows each.

    Returns:
        A state of B rows and P slots, and the logits (B, V) of the first token.
    """
    rows, width = prompt_ids.shape
    state = State.empty(policy, rows, width)
    # Padding sees itself: a row of the attention that sees nothing would be nan.
    seen = prompt_mask[:, None, None, :].expand(-1, -1, width, -1).tril()
    seen = seen | torch.eye(width, dtype=torch.bool, device=seen.device)
    positions = compute_position_ids(prompt_mask)
    slots = torch.arange(width, device=seen.device)
    hidden = run_cached(policy, state, prompt_ids, positions, slots, _bias(seen, state))
    state.bias.copy_(_bias(prompt_mask[:, None, None, :], state))
    state.position.copy_(positions[:, -1:] + 1)
    state.slot.fill_(width)
    return state, compute_logits(policy, hidden)


def _bias(seen: Tensor, state: State) -> Tensor:
    return torch.where(seen, 0.0, -torch.inf).to(state.bias.dtype)


def step(policy: PreTrainedModel, state: State, seen: int, temperature: float) -> None:
    """Append the state's tokens and pick the next ones; changes the state only.

    Args:
        policy: GPT-2 style language model in eval mode.
        state: of the B rows.
        seen: attention covers the first so many slots.
        temperature: divides the logits; 0 is greedy.
    """
    state.bias.index_fill_(3, state.slot, 0)
    hidden = run_cached(policy, state, state.token, state.position, state.slot,
                        state.bias[..., :seen])
    token, logprob = _pick(compute_logits(policy, hidden), temperature, state.noise)
    state.token.copy_(token[:, None])
    state.logprob.copy_(logprob)
    state.position += 1
    state.slot += 1


def _pick(logits: Tensor, temperature: float, noise: Tensor) -> tuple[Tensor, Tensor]:
    token = pick_tokens(logits, temperature, noise)
    return token, gather_logprobs(temper(logits, temperature), token)


@dataclass
class Runner:
    """Runs steps of a policy, on a GPU as recorded graphs.

    Attributes:
        policy: the policy itself, or its copy in the precision of autocast.
        slots: of the states.
        temperature: divides the logits.
        recorded: states and graphs by (rows, slots, temperature); None on a CPU.
    """

    policy: PreTrainedModel
    slots: int
    temperature: float
    recorded: dict[tuple, tuple[State, torch.cuda.CUDAGraph]] | None

    @classmethod
    def of(cls, policy: PreTrainedModel, slots: int, temperature: float) -> Runner:
        """Return the runner of a policy with its present weights."""
        kind = policy.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else policy.dtype
        if kind == "cpu":
            return cls(policy if dtype == policy.dtype else freeze(policy).to(dtype), slots,
                       temperature, None)
        if policy not in _RECORDED or _RECORDED[policy][0].dtype != dtype:
            _RECORDED[policy] = freeze(policy).to(dtype), {}
        twin, recorded = _RECORDED[policy]
        for mine, theirs in zip(twin.parameters(), policy.parameters(), strict=True):
            mine.copy_(theirs)
        return cls(twin, -(-slots // SLOTS) * SLOTS, temperature, recorded)

    def state_for(self, rows: int) -> State:
        """Return a state of at least `rows` rows; on a GPU of a power of two, with its graph."""
        if self.recorded is None:
            return State.empty(self.policy, rows, self.slots)
        key = 1 << (rows - 1).bit_length(), self.slots, self.temperature
        if key not in self.recorded:
            self.recorded[key] = self._record(State.empty(self.policy, *key[:2]))
        return self.recorded[key][0]

    def _record(self, state: State) -> tuple[State, torch.cuda.CUDAGraph]:
        graph, aside = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # a first run, unrecorded, sets up what the kernels need
            step(self.policy, state, self.slots, self.temperature)
        torch.cuda.current_stream().wait_stream(aside)
        with torch.cuda.graph(graph):
            step(self.policy, state, self.slots, self.temperature)
        return state, graph

    def step(self, state: State, seen: int) -> None:
        """Take a step; its tokens see the first `seen` slots, on a GPU all that are filled."""
        if self.recorded is None:
            step(self.policy, state, seen, self.temperature)
        else:
            self.recorded[len(state.token), self.slots, self.temperature][1].replay()


# A graph is worth keeping as long as its policy: rollout after rollout has the same sizes.
_RECORDED: WeakKeyDictionary[PreTrainedModel, tuple[PreTrainedModel, dict]] = WeakKeyDictionary()


@torch.no_grad()
def decode(
    policy: PreTrainedModel, prompt_ids: Tensor, prompt_mask: Tensor, *, max_response_tokens: int,
    eos_id: int, pad_id: int, temperature: float = 1.0, noise: Tensor | None = None,
    copies: list[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample responses (B', T); arguments, results, errors are those of `generation.generate`."""
    width, device = prompt_ids.shape[1], prompt_ids.device
    check_sampling(policy, width, max_response_tokens, temperature, noise)
    copies = torch.tensor(copies or [1] * len(prompt_ids), device=device)
    prompt_of = torch.arange(len(copies), device=device).repeat_interleave(copies)
    rows = torch.arange(len(prompt_of), device=device)  # the response of each row of the state
    noise = torch.zeros(len(rows), max_response_tokens, device=device) if noise is None else noise
    ids = prompt_ids.new_full((len(rows), max_response_tokens), pad_id)
    logprobs, ended = torch.zeros(ids.shape, device=device), torch.zeros_like(rows).bool()
    runner = Runner.of(policy, width + max_response_tokens, temperature)
    with torch.autocast(device.type, enabled=False):  # the runner's policy has its precision
        prompts, logits = read_prompts(runner.policy, prompt_ids, prompt_mask)
        check_logits(logits)
        token, logprob = _pick(logits[prompt_of], temperature, noise[:, 0])
        state = runner.state_for(len(rows))
        state.take(prompts, prompt_of)
        for t in range(max_response_tokens):
            ids[rows, t], logprobs[rows, t] = token, logprob
            ended[rows] |= token == eos_id
            if t + 1 == max_response_tokens:
                break
            if t % LOOK_EVERY[device.type] == 0:
                going = (~ended[rows]).nonzero()[:, 0]
                if len(going) == 0:
                    break
                if len(going) <= LEAVE_AT * len(rows):
                    smaller = runner.state_for(len(going))
                    if smaller is not state:
                        smaller.take(state, going)
                        state, rows, token = smaller, rows[going], token[going]
            state.token[:len(rows), 0], state.noise[:len(rows)] = token, noise[rows, t + 1]
            runner.step(state, width + t + 1)
            token, logprob = state.token[:len(rows), 0], state.logprob[:len(rows)]
    ended = ids == eos_id
    mask = ended.cumsum(1) - ended.long() == 0  # nothing after the first EOS
    longest = int(mask.any(0).sum())
    ids, logprobs = ids.where(mask, pad_id), logprobs.where(mask, 0)
    return ids[:, :longest], mask[:, :longest], logprobs[:, :longest]


def check_sampling(
    policy: PreTrainedModel, prompt_tokens: int, response_tokens: int, temperature: float,
    noise: Tensor | None,
) -> None:
    """Raise ValueError if a response does not fit into the context, or noise (B', T) is missing."""
    context = policy.config.n_positions
    if prompt_tokens + response_tokens > context:
        raise ValueError(
            f"a prompt of {prompt_tokens} tokens and a response of up to {response_tokens} do not "
            f"fit into the model's context of {context} tokens; shorten the prompt or lower "
            "max_response_tokens")
    if noise is None and temperature > 0:
        raise ValueError(f"sampling at temperature {temperature} needs noise, one number from "
                         "[0, 1) per response and token; only temperature 0 does without")


def check_logits(logits: Tensor) -> None:
    """Raise NonFiniteLoss for logits (B, V) that are not finite."""
    if not logits.isfinite().all():
        raise NonFiniteLoss("the policy's logits are not finite: training spoiled its weights, or "
                            "they were bad before. Try a lower learning rate")
