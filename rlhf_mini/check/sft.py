"""Checks of chapter 5, supervised fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator

import torch
from torch import Tensor

from rlhf_mini.check.core import Property, close, exercise, gradient, shaped
from rlhf_mini.data import TokenBatch, collate


def _draw(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _demonstrations() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return logits (3, 8, 6), tokens (3, 8), lengths of prompts (3,) and of responses (3,)."""
    tokens = torch.tensor([[3, 1, 4, 2, 5, 1, 3, 0], [2, 3, 5, 4, 1, 0, 0, 0],
                           [4, 1, 5, 2, 3, 0, 0, 0]])
    return _draw(3, 8, 6), tokens, torch.tensor([3, 4, 2]), torch.tensor([5, 2, 4])


def _token_losses(logits: Tensor, tokens: Tensor, prompts: Tensor, responses: Tensor) -> list:
    """List -log p of the response tokens of each row, one at a time."""
    return [[-logits[b, t - 1].log_softmax(0)[tokens[b, t]].item() for t in range(p, p + r)]
            for b, (p, r) in enumerate(zip(prompts.tolist(), responses.tolist(), strict=True))]


@exercise("ex-sft-loss")
def sft_loss(f: Callable) -> Generator[Property, None, str]:
    """The loss of SFT: f(logits, tokens, prompt_tokens, response_tokens) -> ()."""
    logits, tokens, prompts, responses = _demonstrations()
    yield shaped(f(logits, tokens, prompts, responses), (), "the loss")
    yield ("uniform", close(f(torch.zeros(3, 8, 6), tokens, prompts, responses), math.log(6)),
           "Equal logits give each of the V words the same probability, so each token costs the "
           "same, and a mean over tokens costs as much as one of them.")
    certain = 40 * torch.nn.functional.one_hot(tokens[:1, 1:], 6).float()
    certain = torch.cat([certain, torch.zeros(1, 1, 6)], 1)
    yield ("shift", close(f(certain, tokens[:1], prompts[:1], responses[:1]), 0.0),
           "Here each row of the logits is certain of the word that follows, and right: nothing is "
           "left to learn. About which token does row t speak?")
    grad = gradient(lambda z: f(z, tokens, prompts, responses), logits).abs().sum(-1)
    columns = torch.arange(8)
    first, end = prompts[:, None] - 1, (prompts + responses)[:, None] - 1
    yield ("prompt", close(grad[columns < first], torch.zeros(int((columns < first).sum()))),
           "Rows that predict a prompt token get a gradient. The prompt is given: it is read, not "
           "taught.")
    yield ("first token", bool((grad.gather(1, first) > 1e-6).all()),
           "No gradient reaches the row that predicts the first response token. Which token is the "
           "last that the model has seen by then? (A plain number carries no gradient at all.)")
    yield ("EOS", bool((grad.gather(1, end - 1) > 1e-6).all()),
           "No gradient reaches the row that predicts EOS, the last token of the response. Then "
           "nothing teaches the model to stop.")
    behind = columns >= end
    other = (torch.where(behind[..., None], 50 * _draw(3, 8, 6, seed=6), logits),
             torch.where(columns > end, 5 - tokens, tokens))
    expected = f(logits, tokens, prompts, responses)
    yield ("padding", close(f(*other, prompts, responses), expected),
           "What stands behind EOS changes the loss. EOS itself is followed by nothing that could "
           "be a target, and padding is an arbitrary filler.")
    broken = torch.where(behind[..., None], math.nan, logits)
    yield ("nan at padding", close(f(broken, tokens, prompts, responses), expected),
           "Logits that predict padding are nan, and the loss feels it. A product with a mask "
           "hides only what is finite.")
    losses = _token_losses(logits, tokens, prompts, responses)
    yield ("tokens alike", close(expected, sum(map(sum, losses)) / sum(map(len, losses))),
           "Each row alone may be right, but not their mean: every response token of the batch has "
           "the same say, whichever response it belongs to.")
    large = [x for row in _token_losses(1000 * logits, tokens, prompts, responses) for x in row]
    yield ("large logits", close(f(1000 * logits, tokens, prompts, responses),
                                 sum(large) / len(large)),
           "With logits of some thousands the loss is inf, nan or too small. A probability "
           "underflows to 0 before its logarithm is taken; take the logarithm in one step.")
    return ("You have written sft_loss of rlhf_mini/sft.py, and the shift and the mask that "
            "compute_response_logprobs of rlhf_mini/models.py does for it.")


@exercise("ex-sequence-mean")
def sequence_mean(f: Callable) -> Generator[Property, None, str]:
    """The mean of the responses' means: f(logprobs, mask) -> ()."""
    logprobs = torch.tensor([[-1.0, -1.0, -1.0, -1.0], [-3.0, 0.0, 0.0, 0.0]])
    mask = torch.tensor([[True] * 4, [True, False, False, False]])
    yield shaped(f(logprobs, mask), (), "the loss")
    row = torch.tensor([[-1.0, -2.0, -6.0]])
    yield ("one response", close(f(row, row < 0), 3.0),
           "With a single response this is the ordinary SFT loss: minus the mean of its tokens' "
           "log-probabilities.")
    yield ("responses alike", close(f(logprobs, mask), 2.0),
           "Responses whose own means are 1 and 3 nats should meet in the middle, whatever their "
           "lengths; here one of them has more say.")
    dirty = torch.where(mask, logprobs, -50.0)
    yield ("mask", close(f(dirty, mask), 2.0),
           "Entries at padding change the loss. Only response tokens take part.")
    yield ("inf at padding", close(f(torch.where(mask, logprobs, -math.inf), mask), 2.0),
           "With -inf at padding the loss is inf or nan. A product with a mask hides only what is "
           "finite.")
    more = torch.cat([logprobs, torch.zeros(1, 4)])
    empty = torch.cat([mask, torch.zeros(1, 4, dtype=torch.bool)])
    yield ("empty row", close(f(more, empty), 2.0),
           "A row without any response token changes the loss. It is no response, so it has no "
           "mean and should not be counted as one.")
    share = torch.tensor([[1.0] * 4, [4.0, 0, 0, 0]]) / -8
    yield ("gradient", close(gradient(lambda x: f(x, mask), logprobs), share),
           "The value is right, the gradient is not: two tokens in responses of different lengths "
           "should pull as hard as their shares in the mean say.")
    return "Some libraries use this mean; the package uses the one over tokens."


def _unigram() -> tuple[Tensor, Callable, list[bool]]:
    """Return the logits (7,) of a model that knows no context, its loss, and a log.

    The log tells for each call of the loss whether a gradient was there already.
    """
    weights, log = _draw(7).requires_grad_(), []

    def loss_of(batch: TokenBatch) -> Tensor:
        log.append(weights.grad is not None)
        losses = -weights.log_softmax(0)[batch.response_ids]
        return losses[batch.response_mask].mean()

    return weights, loss_of, log


@exercise("ex-sft-accumulate")
def accumulate(f: Callable) -> Generator[Property, None, str]:
    """Gradients of parts that add up to those of the whole: f(batches, loss_of) -> loss."""
    pairs = [([1, 2], [3, 4, 5, 6, 0]), ([3], [5, 0]), ([4, 4, 2], [1, 0]), ([2], [3, 3, 0])]

    def cut(*sizes: int) -> list[TokenBatch]:
        ends = [sum(sizes[:i + 1]) for i in range(len(sizes))]
        return [collate(pairs[e - s:e], 0) for e, s in zip(ends, sizes, strict=True)]

    def run(batches: list[TokenBatch]) -> tuple[object, Tensor, list[bool]]:
        weights, loss_of, log = _unigram()
        result = f(batches, loss_of)
        return result, torch.zeros(7) if weights.grad is None else weights.grad, log

    weights, loss_of, _ = _unigram()
    whole = loss_of(collate(pairs, 0))
    whole.backward()
    yield shaped(run(cut(4))[0], (), "the loss")
    yield ("one batch", close(run(cut(4))[1], weights.grad),
           "With one batch the gradient should be just that of its loss. Is there a call of "
           "`backward()`, once, and is the loss scaled by its share of the whole?")
    twins, (once, once_loss, _) = cut(1) * 2, _unigram()
    once_loss(twins[0]).backward()
    yield ("equal batches", close(run(twins)[1], once.grad),
           "Two copies of one batch have the mean gradient of one. Gradients of several backward "
           "passes add up; what must happen to each loss before?")
    for sizes in ((1, 3), (2, 2), (1, 1, 2)):
        yield ("unequal batches", close(run(cut(*sizes))[1], weights.grad),
               "However the batch is cut, the gradient should be that of the whole. Here it "
               "depends on the cut, because the batches differ in what the loss counts.")
    yield ("one at a time", all(run(cut(1, 1, 2))[2][1:]),
           "The gradient is right, but a batch is computed while the graph of the one before it is "
           "still held: the memory that accumulation is there to save.")
    yield ("plain number", not getattr(run(cut(1, 3))[0], "requires_grad", False),
           "What you return is not a plain number: it carries a gradient, and with it the graphs "
           "of all parts.")
    yield ("loss", close(run(cut(1, 3))[0], whole),
           "The gradients are right. The number that is returned should be the loss of the whole "
           "batch, too.")
    return ("combine of rlhf_mini/processes.py weighs the losses of several processes in the same "
            "way.")


@exercise("ex-sft-lr")
def learning_rate(f: Callable) -> Generator[Property, None, str]:
    """Warm-up and cosine: f(step, steps, warmup, floor) -> factor on the peak rate."""
    yield shaped(f(0, 100, 0, 0.1), (), "the factor")
    yield ("start", close(f(0, 100, 0, 0.1), 1.0),
           "Without warm-up the first step takes the peak rate: a factor of one.")
    yield ("floor", close([f(100, 100, 0, x) for x in (0.1, 0.0, 0.5)], [0.1, 0.0, 0.5]),
           "When all steps are done the factor should have arrived at the floor, not at 0 and not "
           "back at the top: exactly at `steps`, not one step before.")
    yield ("halfway", close(f(50, 100, 0, 0.2), 0.6),
           "After half of the steps the cosine has covered half of the way down: the factor should "
           "be the mean of both ends.")
    quarter = 0.2 + 0.8 * (2 + math.sqrt(2)) / 4
    yield ("curve", close(f(25, 100, 0, 0.2), quarter),
           "The ends and the middle are right, the curve between is not: a cosine is flat at its "
           "ends and steepest in the middle.")
    yield ("warm-up", close([f(i, 100, 4, 0.1) for i in range(4)], [0.25, 0.5, 0.75, 1.0]),
           "During warm-up the factor should climb in equal steps to one. It starts above zero, "
           "since a step with rate 0 would be wasted.")
    yield ("after warm-up", close([f(i, 104, 4, 0.2) for i in (4, 29, 54, 104)],
                                  [1.0, quarter, 0.6, 0.2]),
           "The cosine begins where the warm-up ends. How many steps are left for it, and how many "
           "of these are done?")
    return "You have written cosine_lr of rlhf_mini/training.py."


@exercise("ex-sft-certainty")
def certainty(f: Callable) -> Generator[Property, None, str]:
    """Rise of the validation loss of a policy that is too certain: f(p, c) -> nats."""
    yield shaped(f(0.8, 0.9), (), "the rise")
    yield ("c = p", close([f(p, p) for p in (0.2, 0.5, 0.8)], [0.0] * 3),
           "A policy that says A as often as the labelers do has the lowest loss there is. The "
           "rise is counted from there.")
    pairs = [(0.8, 0.9), (0.8, 0.99), (0.6, 0.3), (0.5, 0.9), (0.25, 0.5)]
    yield ("never negative", all(f(p, c) > 0 for p, c in pairs),
           "No policy has a lower loss than the labelers' own distribution. Are both kinds of "
           "responses in your sum, those where it gains and those where it pays?")
    yield ("labelers agree", close([f(1.0, 0.5), f(1.0, 0.9)], [math.log(2), -math.log(0.9)]),
           "If all labelers write A, nobody writes B. What is left to pay is the surprise at A, in "
           "nats.")
    yield ("flat at the minimum", abs(f(0.7, 0.7 + 1e-4)) < 1e-6,
           "Close to its minimum a smooth loss is flat: a little too much certainty costs next to "
           "nothing. Yours rises at once.")
    for p, c in pairs:
        written = [c] * round(100 * p) + [1 - c] * round(100 * (1 - p))
        best = [p] * round(100 * p) + [1 - p] * round(100 * (1 - p))
        counted = sum(math.log(b / w) for b, w in zip(best, written, strict=True)) / 100
        yield ("counted", close(f(p, c), counted),
               "It is not what one counts on a hundred validation responses. Over whose responses "
               "is the mean taken, and which of the two policies pays for them?")
    return "It is KL(p || pi) once more: what the validation loss has above its lowest value."


@exercise("ex-sft-kl")
def which_way(answer: object) -> Generator[Property, None, str]:
    """Which policy each direction of the KL divergence prefers: a pair of names."""
    p = torch.tensor([0.4995, 0.4995, 0.001])
    policies = {"covers both": torch.tensor([0.3, 0.3, 0.4]),
                "chooses one": torch.tensor([0.98, 0.01, 0.01])}
    names = list(answer) if isinstance(answer, tuple | list) else []
    yield ("form", len(names) == 2 and all(name in policies for name in names),
           "Expected two names of policies, the choice of SFT first: each \"covers both\" or "
           "\"chooses one\".")
    forward = min(policies, key=lambda name: (p * (p / policies[name]).log()).sum())
    backward = min(policies, key=lambda name: (policies[name] * (policies[name] / p).log()).sum())
    yield ("KL(p || pi)", names[0] == forward,
           "The mean is over what labelers write. What does each policy pay when a labeler writes "
           "B, and what does it pay for C?")
    yield ("KL(pi || p)", names[1] == backward,
           "The mean is over what the policy writes. What does each policy pay for the times when "
           "it writes C?")
    return "The solution has all four numbers."
