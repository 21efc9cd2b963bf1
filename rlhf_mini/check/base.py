"""Checks of chapter 4, the base model: attention, packing, the loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_mini.check.core import Property, close, exercise, finite, gradient, shaped


def _random(*shape: int, scale: float = 1.0) -> Tensor:
    """Return normal numbers in double precision, the same at every call."""
    generator = torch.Generator().manual_seed(4)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


@exercise("ex-window-mask")
def window_mask(f: Callable) -> Generator[Property, None, str]:
    """A causal mask with a short memory: f(L, w) -> (L, L) bool."""
    m = f(6, 3)
    yield shaped(m, (6, 6), "a mask")
    yield "bool", m.dtype == torch.bool, "A mask says True or False, so its type is bool."
    yield ("future", not bool(m.triu(1).any()),
           "A token sees one that comes after it. Rows are the tokens that look, columns those "
           "that are looked at.")
    yield ("itself", bool(m.diagonal().all()),
           "A token does not see itself: the first one would have nothing at all to look at.")
    yield ("window", m.sum(1).tolist() == [1, 2, 3, 3, 3, 3],
           f"With w = 3 the six tokens see {m.sum(1).tolist()} tokens. Near the start there are "
           "fewer to see; later each sees w of them, itself included.")
    yield ("nearest", all(bool(m[t, max(t - 2, 0):t + 1].all()) for t in range(6)),
           "The number of seen tokens is right, but they are not the nearest ones.")
    yield ("w = 1", torch.equal(f(4, 1), torch.eye(4, dtype=torch.bool)),
           "With w = 1 a token sees itself and nothing else.")
    yield ("long window", torch.equal(f(5, 9), torch.ones(5, 5).tril().bool()),
           "A window longer than the text hides nothing that the causal mask shows.")
    return "Nothing else in a model changes: the mask alone decides how far it looks."


@exercise("ex-attention")
def attention(f: Callable) -> Generator[Property, None, str]:
    """Masked attention: f(q, k, v, m), (H, L, d) three times and (L, L) -> (H, L, d)."""
    q, k, v = _random(3, 2, 5, 4)
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    yield shaped(f(q, k, v, causal), (2, 5, 4), "one carried vector per head and token,")
    one = [x[:, :1] for x in (q, k, v)]
    yield ("one token", close(f(*one, causal[:1, :1]), v[:, :1]),
           "A token that stands alone can only look at itself, so it carries over its own value.")
    yield ("equal scores", close(f(0 * q, k, v, torch.ones_like(causal)),
                                 v.mean(1, keepdim=True).expand_as(v)),
           "If all queries are 0 and nothing is hidden, all scores are equal: each token should "
           "carry over the plain mean of the values. Do the weights of one token add up to 1, and "
           "do you use the mask that you are given?")
    means = v.cumsum(1) / torch.arange(1, 6)[:, None]
    yield ("mask", close(f(0 * q, k, v, causal), means),
           "If all scores are equal and the future is hidden, token t should carry over the mean "
           "of the first t values. A hidden token has weight 0, and the weights of the others "
           "still add up to 1. What score makes the softmax give 0?")
    others = torch.cat([-q[:, :2], q[:, 2:]], dim=1)
    yield ("who looks", close(f(others, k, v, causal)[:, 2:], f(q, k, v, causal)[:, 2:]),
           "What a token carries over depends on its own query, and on keys and values that it "
           "sees. Yours changes with the queries of other tokens: did rows and columns of the "
           "scores change places?")
    key = torch.zeros(1, 2, 9).double()
    key[0, 0, 0] = 3.0
    value = torch.eye(2, 9)[None].double()
    query = torch.zeros(1, 2, 9).double()
    query[0, :, 0] = math.log(3)
    yield ("scale", close(f(query, key, value, torch.ones(2, 2, dtype=torch.bool))[0, :, :2],
                          [[0.75, 0.25], [0.75, 0.25]]),
           "Heads of width d = 9, a score of 3 ln 3 before scaling for one token and 0 for the "
           "other: the first should weigh three times as much as the second. By what is a score "
           "divided, and why?")
    yield ("large scores", finite(f(1e4 * q, k, v, causal)),
           "With large scores the result is inf or nan. Perhaps an exponential overflows; the "
           "softmax of torch takes care of that. Or all visible weights became 0 before you "
           "divided by their sum: hide before the softmax.")
    low, ones = -2e5 * torch.eye(4)[0].double().expand_as(q), torch.ones_like(k)
    yield ("very negative scores", close(f(low, ones, v, causal), means),
           "All scores are equal and very negative, -100,000, and hidden tokens take over. A large "
           "negative number hides only what is compared with larger ones.")
    other = torch.eye(5, dtype=torch.bool) | (_random(5, 5) > 0)
    yield ("any mask", close(f(q, k, v, other), F.scaled_dot_product_attention(q, k, v, other)),
           "With another mask than the causal one, torch's own scaled_dot_product_attention finds "
           "other numbers.")
    return "You have written the heart of run_layers in rlhf_mini/models.py."


@exercise("ex-lm-loss")
def lm_loss(f: Callable) -> Generator[Property, None, str]:
    """The loss of a language model: f(logits, input_ids), (B, L, V) and (B, L) -> one number."""
    logits = _random(3, 6, 7, scale=2)
    ids = torch.randint(7, (3, 6), generator=torch.Generator().manual_seed(4))
    yield shaped(f(logits, ids), (), "one number for the whole batch,")
    yield ("blind guess", close(f(0 * logits, ids), math.log(7)),
           "A model that finds all 7 tokens equally likely has a loss that does not depend on the "
           "text; the chapter says which. Is it a mean, in nats, over the predicted tokens only?")
    sure = 40.0 * F.one_hot(ids.roll(-1, 1), 7).double()
    yield ("shift", close(f(sure, ids), 0.0),
           "This model is certain of the next token and always right, so nothing surprises it. "
           "You compare its logits with another token than the next one.")
    wild = torch.cat([logits[:, :-1], -3 * logits[:, -1:]], dim=1)
    yield ("last logits", close(f(wild, ids), f(logits, ids)),
           "What the model says after the last token of a row is compared with nothing.")
    first = torch.cat([(ids[:, :1] + 1) % 7, ids[:, 1:]], dim=1)
    yield ("first token", close(f(logits, first), f(logits, ids)),
           "Nobody predicts the first token of a row, so as a target it does not count.")
    yield ("large logits", finite(f(1000 * logits, ids)),
           "With logits of some thousands the loss is inf or nan: a probability became 0 before "
           "its logarithm was taken.")
    p = logits.softmax(-1)
    costs = [-math.log(p[b, t - 1, ids[b, t]]) for b in range(3) for t in range(1, 6)]
    yield ("brute force", close(f(logits, ids), sum(costs) / len(costs)),
           "A loop over rows and tokens, with the softmax written out, finds another mean.")
    wanted = torch.zeros_like(logits)
    wanted[:, :-1] = (p[:, :-1] - F.one_hot(ids[:, 1:], 7)) / len(costs)
    yield ("gradient", close(gradient(lambda z: f(z, ids), logits), wanted),
           "The value is right, its gradient is not. Is something detached?")
    return "You have written lm_loss of rlhf_mini/pretrain.py, given the logits."


@exercise("ex-pack-rows")
def pack_rows(f: Callable) -> Generator[Property, None, str]:
    """Packing: f(documents, row_tokens, eos) -> (N, L) ids."""
    got = f([[1, 2, 3, 4, 5]], 5, 0)
    yield shaped(got, (1, 5), "rows")
    yield ("ids", not got.is_floating_point() and got.tolist() == [[1, 2, 3, 4, 5]],
           "One document that fills one row should be that row, as integers.")
    yield ("EOS", close(f([[1, 2, 3]], 4, 0), [[1, 2, 3, 0]]),
           "Each document is closed by EOS, also the last one, also one that stands alone. "
           "Without it the model never learns where texts end. Or is it there, and the last full "
           "row is missing?")
    yield ("full rows", close(f([[5, 6], [7, 8]], 3, 0), [[5, 6, 0], [7, 8, 0]]),
           "Two documents that each fill a row with their EOS should give these two rows, one "
           "under the other. No full row is left out.")
    documents = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15]]
    yield ("across rows", close(f(documents, 7, 0), [[5, 6, 7, 0, 8, 0, 9],
                                                     [10, 11, 12, 13, 14, 15, 0]]),
           "A row ends where it is full. The document goes on in the next row; nothing of it is "
           "lost, nothing is written twice, and no padding is needed.")
    yield ("rest", close(f(documents, 6, 0), [[5, 6, 7, 0, 8, 0], [9, 10, 11, 12, 13, 14]]),
           "What does not fill a row at the end of the stream is left out: rows have no padding.")
    lengths = torch.randint(1, 30, (40,), generator=torch.Generator().manual_seed(4)).tolist()
    many = [list(range(100 * i, 100 * i + n)) for i, n in enumerate(lengths, 1)]
    stream = [token for document in many for token in [*document, 99]]
    rows = [stream[i:i + 16] for i in range(0, len(stream) - 15, 16)]
    yield ("many documents", close(f(many, 16, 99), rows),
           "Forty documents, rows of 16 tokens, and EOS is token 99: the rows, read one after the "
           "other, are not the stream of the documents.")
    return "You have written encode_documents and pack_rows of rlhf_mini/pretrain.py, unshuffled."


def _copy_floor(period: int, row_tokens: int, vocabulary: int) -> float:
    """Mean cost in a row that repeats, counted: what was not there a period ago costs ln V."""
    costs = [math.log(vocabulary) if t < period else 0.0 for t in range(1, row_tokens)]
    return sum(costs) / len(costs)


@exercise("ex-copy-floor")
def copy_floor(f: Callable) -> Generator[Property, None, str]:
    """Mean floor of copying: f(shortest, longest, row_tokens, vocabulary) -> one number."""
    yield shaped(f(5, 19, 64, 258), ())
    yield ("period 1", close(f(1, 1, 20, 50), 0.0),
           "With period 1 the row is one token again and again. Nobody has to predict the first, "
           "and all others are known.")
    yield ("no repeat", close(f(12, 12, 12, 50), math.log(50)),
           "With a period as long as the row nothing ever repeats: every predicted token is noise, "
           "and costs what the chapter's equation counts for it. In nats?")
    for period, length in ((4, 10), (7, 64)):
        yield ("one period", close(f(period, period, length, 50), _copy_floor(period, length, 50)),
               f"Write down a row of {length} tokens with period {period}. How many tokens are "
               "predicted, and how many of these have no copy before them?")
    for shortest, longest in ((3, 4), (5, 19), (2, 9)):
        floors = [_copy_floor(p, 30, 70) for p in range(shortest, longest + 1)]
        yield ("mean", close(f(shortest, longest, 30, 70), sum(floors) / len(floors)),
               "A single period is right, the mean over equally likely ones is not. Both ends, the "
               "shortest and the longest, take part.")
    return "The floor is linear in the period, so its mean needs the mean period only."


@exercise("ex-loss-gradient")
def loss_gradient(f: Callable) -> Generator[Property, None, str]:
    """Gradient of the mean loss at logits: f(z, targets), (N, V) and (N,) -> (N, V)."""
    z, targets = _random(5, 6), torch.tensor([0, 5, 2, 3, 3])
    yield shaped(f(z, targets), (5, 6), "one slope per logit,")
    yield ("shift", close(f(z, targets).sum(1), torch.zeros(5)),
           "Raising all logits of a place by the same amount changes no probability, so not the "
           "loss: the slopes of one place must add up to 0.")
    sure = torch.tensor([[0.0, 60.0, 0.0]]).double()
    yield ("right and certain", close(f(sure, torch.tensor([1])), torch.zeros(1, 3)),
           "Where the target already has probability 1 nothing is left to learn.")
    yield ("sign", bool(((f(z, targets) < 0) == F.one_hot(targets, 6).bool()).all()),
           "The loss falls when the target's logit rises, and rises with any other logit. The "
           "optimiser steps against the gradient.")
    equal = torch.zeros(1, 4).double()
    yield ("blind guess", close(f(equal, torch.tensor([2])), [[0.25, 0.25, -0.75, 0.25]]),
           "One place, four equal logits: no token is preferred yet. The three others feel the "
           "same push, the target the opposite of all three; how strong it is follows from the "
           "softmax.")
    crowd = torch.tensor([0.5, 0.25, 0.25]).double().log().expand(4, -1).contiguous()
    yield ("like the text", close(f(crowd, torch.tensor([0, 0, 1, 2])).sum(0), torch.zeros(3)),
           "In the same context the text goes on with token 0 twice, with 1 and 2 once each, and "
           "the model gives them just these shares. It is as good as it can be, so the slopes of "
           "the four places cancel.")
    steps = 1e-5 * torch.eye(30).double().view(30, 5, 6)
    slow = [float(F.cross_entropy(z + step, targets) - F.cross_entropy(z - step, targets)) / 2e-5
            for step in steps]
    yield ("difference quotient", close(f(z, targets), torch.tensor(slow).view(5, 6), 1e-6),
           "Five places: difference quotients of the mean loss find other slopes. The loss is a "
           "mean over places.")
    return "The gradient is 0 on average where the model is like the text, as Step 3 says."


def _floors() -> dict[str, float]:
    """Entropy, in nats per predicted token, of five kinds of rows of 64 tokens from 8 symbols."""
    uneven = [0.9] + 7 * [0.1 / 7]  # ring and sum: chance within the first 8 and 2 tokens only
    return {"noise": math.log(8), "uneven": -sum(p * math.log(p) for p in uneven),
            "walk": math.log(2), "ring": _copy_floor(8, 64, 8), "sum": _copy_floor(2, 64, 8)}


@exercise("ex-floors")
def floors(names: object) -> Generator[Property, None, str]:
    """Five names of texts, from the lowest floor of the loss to the highest."""
    truth = _floors()
    fits = isinstance(names, tuple | list) and all(isinstance(name, str) for name in names)
    yield ("form", fits and sorted(names) == sorted(truth),
           f"Expected a tuple of the five names {', '.join(sorted(truth))}, each once.")

    def below(a: str, b: str) -> bool:
        return (names.index(a) < names.index(b)) == (truth[a] < truth[b])

    yield ("noise", all(below("noise", name) for name in truth if name != "noise"),
           "How much can be known of the next token of noise, even by one who has read all before?")
    yield ("rules", below("sum", "ring"),
           "In both, ring and sum, a rule fixes every token after a beginning. How many predicted "
           "tokens belong to the beginning?")
    yield ("chance", below("uneven", "walk"),
           "Both, uneven and walk, go on by chance for ever. Calculate the entropy of one step: "
           "seven rare tokens share one tenth, or two tokens share everything.")
    yield ("rule or chance", all(below(a, b) for a in ("ring", "sum") for b in ("walk", "uneven")),
           "A long row with a short unpredictable beginning against a little chance at every "
           "step: calculate nats per predicted token for both.")
    return "A floor counts what cannot be known, not how complicated the rule is."


def _right_loss(model: Callable, input_ids: Tensor) -> Tensor:
    logits = model(input_ids).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), input_ids[:, 1:].flatten())


def _loop_loss(model: Callable, input_ids: Tensor) -> Tensor:
    logprobs = model(input_ids).logits.log_softmax(-1)
    return -torch.stack([logprobs[b, t - 1, row[t]] for b, row in enumerate(input_ids)
                         for t in range(1, len(row))]).mean()


def _cut_loss(model: Callable, input_ids: Tensor) -> Tensor:
    """The right loss, of a model that reads all tokens but the last."""
    logits = model(input_ids[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1), input_ids[:, 1:].flatten())


def _accepts(test: Callable, loss: Callable) -> bool:
    """Whether a test accepts a loss; no if logits and text do not fit each other."""
    try:
        return bool(test(loss))
    except (IndexError, RuntimeError, ValueError):
        return False


def _shifted_loss(times: int) -> Callable:
    """The loss that compares the logits at t with token t + times."""
    def loss(model: Callable, input_ids: Tensor) -> Tensor:
        logits = model(input_ids).logits[:, :input_ids.shape[1] - times]
        return F.cross_entropy(logits.flatten(0, 1), input_ids[:, times:].flatten())
    return loss


@exercise("ex-base-shift")
def base_shift(f: Callable) -> Generator[Property, None, str]:
    """A test of losses: f(loss) -> bool; loss(model, input_ids) -> one number."""
    said = f(_right_loss)
    fits = isinstance(said, bool) or getattr(said, "shape", None) == ()
    yield "form", fits, "Your test should say True or False of the loss that it is given."
    yield ("right loss", bool(said) and bool(f(_loop_loss)),
           "Your test refuses a right loss. Work out by hand what your model must cost on your "
           "text, and leave room for rounding.")
    yield ("inputs cut", _accepts(f, _cut_loss),
           "Your test refuses another right loss, or stops in it: one that does not let the model "
           "read the last token, as nothing is known of what follows it. Do your models answer "
           "whatever ids they are given?")
    yield ("colleague", not bool(f(_shifted_loss(2))),
           "The colleague's loss passes your test. Does your model know the next token better than "
           "the one after it?")
    yield ("no shift", not bool(f(_shifted_loss(0))),
           "A loss that compares the logits with the token just read passes your test. On your "
           "text the next token must differ from the present one.")
    yield ("nothing", not bool(f(lambda model, input_ids: torch.tensor(0.0))),
           "A loss that is always 0 passes your test. Add a case in which the right loss is some "
           "other known number.")
    return "A test is worth what it refuses."
