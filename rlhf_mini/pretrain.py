"""A base model from scratch: byte-level BPE tokenizer and a small GPT-2.

Departures from GPT-2's recipe, for a model that must learn to copy within minutes on a CPU: initial
weights that let attention find equal tokens and near positions, a first phase on repeated random
tokens, and Muon on the block matrices.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from rlhf_mini.compute import Muon
from rlhf_mini.config import PretrainConfig
from rlhf_mini.data import Document
from rlhf_mini.loading import EOS_TOKEN, PAD_TOKEN
from rlhf_mini.models import compute_token_logprobs, run_layers
from rlhf_mini.processes import Together, check_shares, combine, take_share
from rlhf_mini.runtime import check_finite, make_generator, progress
from rlhf_mini.training import TrainingRecord, cosine_lr


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer: any text can be encoded, EOS and PAD are distinct.

    Args:
        texts: the corpus.
        vocab_size: V, including 256 bytes and two special tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOS_TOKEN, PAD_TOKEN], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS_TOKEN, pad_token=PAD_TOKEN, padding_side="left",
        clean_up_tokenization_spaces=False)


def build_model(
    config: PretrainConfig, tokenizer: PreTrainedTokenizerBase, seed: int
) -> GPT2LMHeadModel:
    """Create a GPT-2 with random weights that depend on the seed alone.

    Args:
        config: sizes and `init_std`.
        tokenizer: gives the vocabulary size and the ids of EOS and PAD.
        seed: of the initial weights.
    """
    model_config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=config.context, n_embd=config.hidden,
        n_layer=config.layers, n_head=config.heads, initializer_range=config.init_std,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        activation_function="gelu_pytorch_tanh",  # the same function as gelu_new, faster
        bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(model_config)
        init_attention(model)
    return model.eval()


@torch.no_grad()
def init_attention(model: GPT2LMHeadModel) -> None:
    r"""Start attention where trained models end up, so that copying is learned early.

    Queries and keys share one random rotation, $W_Q = W_K = 0.7\,R$: a token attends to tokens like
    itself. Values and output undo each other with a minus sign, $W_V W_O = -I$. Positions start as
    sinusoids, so that "like itself" includes "near". All of it is trained as usual.

    Args:
        model: changed in place; draws from torch's global generator.

    Source: Trockman and Kolter 2023, "Mimetic initialization of self-attention layers"; Vaswani et
    al. 2017, section 3.5, for the sinusoids.
    """
    wpe = model.transformer.wpe.weight
    context, hidden = wpe.shape
    angles = torch.arange(context)[:, None] * 1000.0 ** (-torch.arange(0, hidden, 2) / hidden)
    wpe.copy_(0.2 * torch.cat([angles.sin(), angles.cos()], dim=1))
    for block in model.transformer.h:
        rotation, other = (torch.linalg.qr(torch.randn(hidden, hidden))[0] for _ in range(2))
        noise = 0.02 * torch.randn(hidden, 2 * hidden)
        queries_and_keys = torch.cat([0.7 * rotation, 0.7 * rotation], dim=1) + noise
        block.attn.c_attn.weight.copy_(torch.cat([queries_and_keys, other], dim=1))
        block.attn.c_proj.weight.copy_(-other.T)


def encode_documents(
    tokenizer: PreTrainedTokenizerBase, documents: list[Document]
) -> list[list[int]]:
    """Tokenize documents; each ends in EOS, whatever its text spells."""
    tokenize = tokenizer.backend_tokenizer  # without transformers' records of each text: faster
    tokenize.encode_special_tokens = True  # "<|endoftext|>" in a text is plain text
    tokenize.no_truncation()  # whatever its file says
    tokenize.no_padding()
    encoded = []
    for start in range(0, len(documents), 1_000):  # the records of all texts would be GB
        texts = [d.text for d in documents[start:start + 1_000]]
        encoded += [[*record.ids, tokenizer.eos_token_id]
                    for record in tokenize.encode_batch_fast(texts, add_special_tokens=False)]
    return encoded


def pack_rows(documents: list[list[int]], row_tokens: int, generator: torch.Generator) -> Tensor:
    """Shuffle documents, join them and cut the stream into rows.

    Args:
        documents: token ids, each ending in EOS.
        row_tokens: tokens per row, L.
        generator: of the shuffle.

    Returns:
        (N, L) int; the last incomplete row is left out.

    Raises:
        ValueError: if all documents together do not fill one row.
    """
    order = torch.randperm(len(documents), generator=generator).tolist()
    tokens = chain.from_iterable(documents[i] for i in order)
    stream = torch.from_numpy(np.fromiter(tokens, dtype=np.int64))
    rows = len(stream) // row_tokens
    if rows == 0:
        raise ValueError(f"the corpus has {len(stream)} tokens; one row needs {row_tokens}")
    return stream[: rows * row_tokens].view(rows, row_tokens)


def copy_rows(rows: int, row_tokens: int, vocab_size: int, generator: torch.Generator) -> Tensor:
    """Draw rows of random tokens that repeat with a period of 5 to 19 tokens.

    Predicting the second and later repeats needs attention to the earlier one: the model learns to
    copy from its context before it sees any text.

    Returns:
        (rows, row_tokens) int.
    """
    tokens = torch.randint(2, vocab_size, (rows, row_tokens), generator=generator)
    periods = torch.randint(5, 20, (rows, 1), generator=generator)
    return tokens.gather(1, torch.arange(row_tokens) % periods)


def lm_loss(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    r"""Compute the language-modelling loss $-\frac1{N}\sum_t \log\pi(x_t \mid x_{<t})$.

    Args:
        model: causal language model.
        input_ids: (B, L) rows without padding.

    Returns:
        Scalar, nats per token.
    """
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    hidden = run_layers(model, input_ids, positions)[:, :-1]
    logprobs, _ = compute_token_logprobs(model, hidden.flatten(0, 1), input_ids[:, 1:].flatten())
    return -logprobs.mean()


def build_optimizers(model: nn.Module, config: PretrainConfig) -> list[torch.optim.Optimizer]:
    """Give the block matrices to Muon and everything else to AdamW."""
    blocks = [p for n, p in model.named_parameters() if ".h." in n and p.ndim == 2]
    rest = [p for n, p in model.named_parameters() if not (".h." in n and p.ndim == 2)]
    return [
        Muon(blocks, lr=config.muon_lr, weight_decay=config.weight_decay),
        torch.optim.AdamW(rest, lr=config.lr, weight_decay=config.weight_decay, betas=(0.9, 0.95),
                          fused=True),
    ]


def train_base_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: list[Document],
    config: PretrainConfig, seed: int, directory: Path | None = None,
) -> list[dict]:
    """Train the model in place on the corpus.

    Args:
        model: from `build_model`.
        tokenizer: its tokenizer.
        documents: the training corpus.
        config: steps, batch, learning rates.
        seed: of the order of the data.
        directory: where checkpoints and metrics go; None keeps nothing on disk.

    Returns:
        The metrics of each step.
    """
    check_shares(pretrain__batch_size=config.batch_size)
    encoded = encode_documents(tokenizer, documents)
    optimizers = build_optimizers(model, config)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    record = TrainingRecord(directory, {"model": model},
                            dict(zip(("muon", "adamw"), optimizers, strict=True)),
                            config.checkpoint_every)
    first, _ = record.restore()
    bar, together = progress(config.steps, "pretrain", first), Together([model], optimizers)
    epoch, rows = -1, torch.empty(0)
    per_epoch = sum(map(len, encoded)) // config.row_tokens // config.batch_size
    model.train()
    for step in range(first, config.steps):
        if step < config.copy_steps:
            generator = make_generator(seed, "copy", str(step))
            batch = copy_rows(config.batch_size, config.row_tokens, len(tokenizer), generator)
        else:
            wanted, index = divmod(step - config.copy_steps, max(per_epoch, 1))
            if wanted != epoch:
                epoch = wanted
                rows = pack_rows(encoded, config.row_tokens,
                                 make_generator(seed, "corpus", str(epoch)))
            batch = rows[index * config.batch_size:(index + 1) * config.batch_size]
        factor = cosine_lr(step, config.steps, warmup=min(20, config.steps // 10))
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * factor
            optimizer.zero_grad()
        batch = take_share(batch).to(model.device)
        loss, stats = together(lambda batch=batch: _mean_loss(model, batch))
        check_finite(loss, step, "pretraining batch")
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        record.log(step, **stats, lr=peaks[1] * factor)
        bar.update(1, **stats)
        record.save(step + 1)
    bar.close()
    together.end()
    model.eval()
    return record.history


def _mean_loss(model: PreTrainedModel, batch: Tensor) -> tuple[Tensor, dict[str, float]]:
    loss = lm_loss(model, batch)
    return combine(loss, {"loss": loss.item()}, len(batch))
