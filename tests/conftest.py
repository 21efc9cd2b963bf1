"""Shared fixtures. One thread, no network, no randomness that is not seeded."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast  # noqa: E402

torch.set_num_threads(1)  # more threads add in another order: other bits
settings.register_profile("rlhf-mini", deadline=None, derandomize=True, database=None,
                          max_examples=50)
settings.load_profile("rlhf-mini")

SENTENCES = [
    "User: Where does Anna live?\nAssistant: Anna lives on Mill Street.",
    "User: Who bakes the bread?\nAssistant: The baker bakes the bread every morning.",
    "User: Tell me about the town.\nAssistant: The town has a mill, a river and two schools.",
    "The river is cold in winter and the bread is warm in the morning.",
]


@pytest.fixture(autouse=True)
def _seeded():
    """Give every test the same global generator, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer (V = 320) with distinct EOS and PAD; any text can be encoded."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(SENTENCES, trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<|endoftext|>", "<|pad|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>",
                                   pad_token="<|pad|>", padding_side="left")


def make_policy(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> GPT2LMHeadModel:
    """A fresh GPT-2 of 2 layers x 32, context 64, dropout 0, in eval mode."""
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=2, n_head=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.2,
        bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id)).eval()


@pytest.fixture
def policy(tokenizer) -> GPT2LMHeadModel:
    """`make_policy` with seed 0; a new one for every test."""
    return make_policy(tokenizer)


# The studies' labs; imported only where they are used, for the import takes a second.

@pytest.fixture(scope="session")
def smoke_base(tmp_path_factory) -> Path:
    """The folder of a smoke run that is finished up to SFT."""
    from rlhf_mini.config import load_preset
    from rlhf_mini.pipeline import run_stages
    from rlhf_mini.workspace import Run
    folder = tmp_path_factory.mktemp("smoke-base")
    run_stages(Run(folder, load_preset("smoke")), ["sft"], "test")
    return folder


@pytest.fixture(scope="module")
def lab(smoke_base, tmp_path_factory):
    """A lab of seed 0 on `smoke_base`; what one test made, the next of its file finds."""
    from rlhf_mini.config import load_preset
    from rlhf_mini.experiments import Lab
    from rlhf_mini.workspace import Run
    return Lab(Run(smoke_base, load_preset("smoke")), 0, tmp_path_factory.mktemp("lab"))
