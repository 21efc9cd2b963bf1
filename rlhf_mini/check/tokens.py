"""Checks of chapter 3, tokens: masks, log-probabilities, temperature."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from itertools import product

import torch
from torch import Tensor

from rlhf_mini.check.core import Property, close, exercise, finite, gradient, moved, shaped, worded


def _random(*shape: int, scale: float = 1.0) -> Tensor:
    """Return normal numbers in double precision, the same at every call."""
    generator = torch.Generator().manual_seed(3)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


@exercise("ex-masked-mean")
def masked_mean(f: Callable) -> Generator[Property, None, str]:
    """Mean over real entries: f(x, mask) -> one number."""
    x = torch.arange(12.0).view(3, 4) ** 2
    every = torch.ones(3, 4, dtype=torch.bool)
    yield shaped(f(x, every), (), "one number for the whole batch,")
    yield ("no padding", close(f(x, every), x.mean()),
           "Where everything is real, the masked mean is the plain mean.")
    mask = torch.arange(4) < torch.tensor([[4], [1], [2]])
    real = x[mask].tolist()
    yield ("mask", close(f(x, mask), sum(real) / len(real)),
           "Rows of different length: every real entry counts once and equally, and padding counts "
           "neither above nor below the line. A mean over rows of each row's mean is another "
           "number: in it the tokens of a short row weigh more.")
    for garbage in (1e30, math.inf, math.nan):
        yield (f"{garbage:g} at padding", close(f(torch.where(mask, x, garbage), mask), f(x, mask)),
               f"With {garbage} at the padding the mean changes. Padding may hold anything, and "
               "real entries must not feel it.")
    yield ("nan at a real entry", math.isnan(f(torch.where(x == real[-1], math.nan, x), mask)),
           "A real entry is nan and the mean is a number all the same. Something in the run is "
           "broken, and the mean hides it: choose by the mask, not by what the entries are.")
    hidden, none = torch.full_like(x, math.inf), torch.zeros_like(mask)
    yield ("nothing selected", close(f(x, none), 0.0) and close(f(hidden, none), 0.0),
           "Where the mask selects nothing the mean should be 0, whatever is hidden: a number with "
           "which a training run can go on.")
    yield ("gradient of nothing", close(gradient(lambda x: f(x, none), x), torch.zeros(3, 4)),
           "Where the mask selects nothing the mean is 0, but its gradient is not. Something is "
           "divided by 0 on the way, even if the result is not chosen in the end.")
    slope = gradient(lambda x: f(x, mask), torch.where(mask, x, math.inf))
    yield ("gradient", close(slope, mask / mask.sum()),
           "Every real entry should move the mean equally, by one over their number, and padding "
           "should not move it at all. Does the gradient still reach the real entries?")
    return "You have written masked_mean of rlhf_mini/tensors.py."


def _rows() -> tuple[Tensor, Tensor, Tensor]:
    """Return logits (3, 4 + 5, 7), response ids (3, 5) and their mask, for prompts of 4 tokens."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(1, 7, (3, 5), generator=generator)
    mask = torch.arange(5) < torch.tensor([[5], [3], [1]])
    return _random(3, 9, 7, scale=2), torch.where(mask, ids, 0), mask


@exercise("ex-response-logprobs")
def response_logprobs(f: Callable) -> Generator[Property, None, str]:
    """Log-probabilities of responses: f(logits, response_ids, response_mask) -> (B, T)."""
    logits, ids, mask = _rows()
    every = torch.ones_like(mask)
    yield shaped(f(logits, ids, mask), (3, 5), "one log-probability per response token,")
    yield ("blind guess", close(f(0 * logits, ids, every), torch.full((3, 5), -math.log(7))),
           "If all 7 logits are equal, each token has the same share of the probability, and we "
           "want its natural logarithm.")
    sure = torch.zeros(3, 9, 7).double()
    sure[:, 3:8] = 40.0 * torch.nn.functional.one_hot(ids, 7)
    yield ("shift", close(f(sure, ids, every), torch.zeros(3, 5)),
           "This model bets everything on the right next token, at every place, so each response "
           "token has probability 1. You read the logits of another place: which one predicts "
           "the first response token?")
    yield ("normaliser", close(f(logits + 5, ids, every), f(logits, ids, every)),
           "Adding the same number to all logits of a place changes no probability, see the "
           "softmax. So it must not change your result.")
    yield ("large logits", finite(f(1000 * logits, ids, every)),
           "With logits of some thousands the result is inf or nan. An exponential overflows, or a "
           "probability underflows to 0 before its logarithm is taken; the chapter takes the "
           "logarithm of the softmax in one step.")
    yield ("zero at padding", close(f(logits, ids, mask)[~mask], torch.zeros(6)),
           "Entries behind the end of a response should be 0: then a sum over the row is the "
           "log-probability of the response.")
    broken = logits.clone()
    broken[:, 3:8][~mask] = math.nan
    yield ("nan at padding", close(f(broken, ids, mask), f(logits, ids, mask)),
           "Logits that speak about padding are nan, and your result feels it. Padding may hold "
           "anything; choose entries as in a mean that survives infinity.")
    slow = torch.zeros(3, 5, dtype=torch.float64)
    for b, t in mask.nonzero().tolist():
        p = logits[b, 4 + t - 1].exp()
        slow[b, t] = torch.log(p[ids[b, t]] / p.sum())
    yield ("brute force", close(f(logits, ids, mask), slow),
           "A loop over rows and tokens, with the softmax written out, finds other numbers.")
    felt = gradient(lambda z: f(z, ids, mask), logits).abs().sum(-1) > 0
    yield ("gradient", bool((felt[:, 3:8] == mask).all()) and int(felt.sum()) == int(mask.sum()),
           "The gradient should reach the logits that predict a real response token, and no "
           "others: neither those inside of the prompt nor those at padding.")
    return ("You have written gather_logprobs of rlhf_mini/tensors.py, with the shift that "
            "compute_response_logprobs of rlhf_mini/models.py makes.")


@exercise("ex-entropy")
def entropy(f: Callable) -> Generator[Property, None, str]:
    """Entropy from logits: f(logits) (..., V) -> (...)."""
    logits = _random(2, 3, 6, scale=2)
    yield shaped(f(logits), (2, 3), "one entropy per place,")
    yield ("all equal", close(f(torch.full((5, 8), -math.log(8))), torch.full((5,), math.log(8))),
           "If all tokens are equally likely the entropy is as large as it can be for so many "
           "tokens. We count in nats, so with the natural logarithm.")
    coin = torch.tensor([[0.25, 0.75]], dtype=torch.float64)
    expected = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    yield ("two tokens", close(f(coin.log()), [expected]),
           "Two tokens with probabilities 1/4 and 3/4: put them into the definition by hand and "
           "compare. Is each logarithm weighted by its probability?")
    yield ("shift", close(f(coin.log() - 7), [expected]),
           "Adding one number to all logits changes no probability, so it must not change the "
           "entropy. Logits are not log-probabilities yet.")
    sure = torch.tensor([[0.0, 5000.0, -5000.0]], dtype=torch.float64)
    yield ("certain", close(f(sure), [0.0]),
           "One token is certain: then nothing is uncertain. If you get nan, an exponential "
           "overflowed, or a probability of 0 met the logarithm of 0, and computers do not know "
           "that 0 log 0 is 0.")
    p = logits.softmax(-1)
    yield ("brute force", close(f(logits), -(p * p.log()).sum(-1)),
           "On random logits the definition, put down term by term, finds other numbers.")
    wanted = -p * (p.log() - (p * p.log()).sum(-1, keepdim=True))
    yield ("gradient", close(gradient(f, logits), wanted),
           "The value is right, the gradient is not: probability and logarithm both depend on the "
           "logits, and nothing may be detached. PPO may one day reward entropy.")
    yield ("gradient where certain", close(gradient(f, sure), torch.zeros(1, 3)),
           "Where one token is certain the entropy is right, and its gradient is not: it should be "
           "0. A nan that is replaced in the value comes back in the gradient; let none arise.")
    return "You have written compute_entropy of rlhf_mini/tensors.py."


@exercise("ex-sampler")
def sampler(f: Callable) -> Generator[Property, None, str]:
    """Sampling at a temperature: f(logits, temperature, noise) -> (B,) ids."""
    logits = _random(3, 5)
    noise = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    got = f(logits, 1.0, noise)
    yield shaped(got, (3,), "one token per row,")
    yield ("ids", not got.is_floating_point() and got.dtype != torch.bool,
           "A token is a number in the vocabulary, so the result should be integers.")
    yield ("greedy", close(f(logits, 0.0, noise), logits.argmax(-1)),
           "Temperature 0 means the likeliest token, whatever the noise is. Nothing can be divided "
           "by 0, so this is a case of its own.")
    four = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).double().log()

    def picks(logits: Tensor, temperature: float, noise: list[float]) -> Tensor:
        u = torch.tensor(noise, dtype=torch.float64)
        return f(logits.expand(len(u), -1).contiguous(), temperature, u)

    yield ("intervals", close(picks(four, 1.0, [0.05, 0.2, 0.5, 0.9]), [0, 1, 2, 3]),
           "Tokens with probabilities 0.1, 0.2, 0.3, 0.4 own the intervals [0, 0.1), [0.1, 0.3), "
           "[0.3, 0.6), [0.6, 1). The noise 0.05, 0.2, 0.5, 0.9 lies in one after the other.")
    holes = torch.tensor([[0.0, 0.5, 0.0, 0.5]]).double().log()
    yield ("impossible tokens", close(picks(holes, 1.0, [0.0, 0.25, 0.5, 0.75]), [1, 1, 3, 3]),
           "A token of probability 0 has an empty interval and must never come, not even when the "
           "noise is exactly 0 or exactly on a border: the left end belongs to an interval, the "
           "right end does not.")
    grid = ((torch.arange(20_000) + 0.5) / 20_000).tolist()
    for tau in (0.5, 2.0):
        shares = picks(four, tau, grid).bincount(minlength=4) / len(grid)
        yield ("temperature", close(shares, (four / tau).softmax(-1)[0], 1e-3),
               f"Evenly spread noise does not give the shares of the policy at temperature {tau}: "
               "cold sharpens, hot flattens. What is divided by the temperature, and before which "
               "step?")
    mixed = torch.stack([four[0], four[0].flip(0)])
    yield ("rows", close(f(mixed, 1.0, torch.tensor([0.2, 0.2]).double()), [1, 0]),
           "Each row of the batch has its own distribution and its own noise.")
    logits = _random(64, 1000).float()
    edge = f(logits, 1.0, torch.full((64,), 1 - 2**-24))
    yield ("rounding", close(edge, torch.full((64,), 999)),
           "With noise just below 1 you return a token that is not in the vocabulary, or the first "
           "one, or another. Summed in single precision, probabilities may end a little below 1; "
           "the last token takes the rest.")
    return "You have written pick_tokens of rlhf_mini/tensors.py."


@exercise("ex-heated-token")
def heated_token(f: Callable) -> Generator[Property, None, str]:
    """Slope of log pi_tau(y) over tau: f(z, y, tau) -> (N,)."""
    z = _random(4, 6, scale=2)
    y = torch.tensor([0, 5, 2, 3])
    yield shaped(f(z, y, 0.8), (4,), "one slope per row,")
    yield ("equal logits", close(f(torch.zeros(4, 6).double(), y, 0.7), torch.zeros(4)),
           "If all logits are equal, every temperature gives the same policy.")
    yield ("likeliest token", bool((f(z, z.argmax(-1), 0.8) < 0).all()),
           "Heat takes probability from the likeliest token: its log-probability has to fall.")
    yield ("least likely token", bool((f(z, z.argmin(-1), 0.8) > 0).all()),
           "Heat gives probability to the least likely token: its log-probability has to rise.")
    yield ("shift", close(f(z + 3, y, 0.8), f(z, y, 0.8)),
           "Adding one number to all logits of a row changes no probability, so no slope.")
    each = torch.stack([f(z, torch.full((4,), v), 0.8) for v in range(6)], dim=1)
    yield ("mean zero", close(((z / 0.8).softmax(-1) * each).sum(-1), torch.zeros(4)),
           "Probabilities add up to one at every temperature. Differentiate that: the slopes of "
           "the log-probabilities, averaged under the policy at this temperature, cancel.")
    for tau in (1.0, 0.5, 2.0):
        above, below = ((z / (tau + h)).log_softmax(-1)[range(4), y] for h in (1e-5, -1e-5))
        yield (f"tau = {tau:g}", close(f(z, y, tau), (above - below) / 2e-5, 1e-6),
               f"A difference quotient at tau = {tau:g} finds another slope. The signs are right, "
               "the size is not: follow the temperature through the chain rule.")
    return "It is how far the token's logit lies from the mean logit that decides."


def _mean_length(p: Tensor, tau: float) -> float:
    """Mean tokens of a response where EOS, token 0, has the same chance at each step."""
    return float(1 / (p.log() / tau).softmax(-1)[0])


@exercise("ex-heated-length")
def heated_length(words: object) -> Generator[Property, None, str]:
    """Three words: what the mean length does for three changes of the decoding."""
    yield "form", worded(words, 3), 'Expected three words, each "rises", "falls" or "stays".'
    toy = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)
    yield ("three tokens", words[0] == moved(_mean_length(toy, 1), _mean_length(toy, 2)),
           "Where does great heat lead? Compare the chance of EOS now with its chance when all "
           "three tokens are equally likely.")
    town = torch.tensor([0.3] + 700 * [0.001], dtype=torch.float64)
    yield ("many words", words[1] == moved(_mean_length(town, 1), _mean_length(town, 2)),
           "EOS is as likely as before, but it now has 700 rivals, each of them small. Write down "
           "the chance of EOS at temperature 2: a root over a sum of roots.")
    sampled = sum(0.7**t for t in range(6))
    greedy = 6.0 if int(toy.argmax()) != 0 else 1.0
    yield ("greedy", words[2] == moved(sampled, greedy),
           "Greedy decoding does not take EOS three times in ten. Which token does it take, at the "
           "first step and at all others?")
    return "A temperature acts on the chance of EOS like on that of any other token."


@exercise("ex-tokens-hunt")
def response_mask(f: Callable) -> Generator[Property, None, str]:
    """The real tokens of responses: f(ids) (B, T) -> (B, T) bool, EOS is 0."""
    ids = torch.tensor([[4, 7, 0, 0], [5, 6, 7, 8], [0, 0, 0, 0]])
    got = f(ids)
    yield shaped(got, (3, 4), "a mask")
    yield "bool", got.dtype == torch.bool, "A mask says True or False, so its type is bool."
    yield ("words", bool(got[0, :2].all()), "Words before the end are real tokens, all of them.")
    yield ("no end", bool(got[1].all()),
           "A response without EOS was cut off at the limit. All of its tokens were sampled, so "
           "all of them are real.")
    yield ("EOS", bool(got[0, 2]) and bool(got[2, 0]),
           "The decision to stop is a token that the model chose, with a probability of its own. "
           "Without it a response weighs as much as everything that begins like it.")
    yield ("behind the end", not bool(got[0, 3]) and not bool(got[2, 1:].any()),
           "What stands behind the first EOS was never sampled as part of this response, even if "
           "padding has the same number as EOS.")
    late = f(torch.tensor([[4, 0, 9, 9, 0, 3], [0, 9, 0, 9, 9, 9]]))
    yield ("garbage", late.tolist() == [[True, True] + 4 * [False], [True] + 5 * [False]],
           "Anything may stand behind the first EOS, words or another EOS. None of it is real.")
    toy, total = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64).log(), 0.0
    for n in range(6):
        for body in product((1, 2), repeat=n):
            row = torch.tensor([body + (0,) * (6 - n)])
            total += float(torch.where(f(row), toy[row], 0).sum().exp())
    yield ("total", close(total, 1 - 0.7**6),
           "The probabilities of all finished responses, and that of not having finished, do not "
           "add up to one.")
    return "This is the response_mask that generate of rlhf_mini/generation.py fills in as it goes."
