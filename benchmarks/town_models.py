"""Random GPT-2 models of any size that speak the town's tokens: for benchmarks that need texts."""

from __future__ import annotations

import json

from measuring import SIZES
from record import ROOT
from tokenizers import Tokenizer
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from rlhf_mini.config import PretrainConfig
from rlhf_mini.data import Demonstration, Prompt, encode_prompt, format_prompt, read_jsonl
from rlhf_mini.pretrain import build_model, train_tokenizer

TOWN = ROOT / "data" / "town"


def read_demonstrations() -> list[Demonstration]:
    """Return the town's demonstrations."""
    return read_jsonl(TOWN / "demonstrations.jsonl", Demonstration)


def fill_vocabulary(tokenizer: PreTrainedTokenizerFast, size: int) -> PreTrainedTokenizerFast:
    """Return the tokenizer with tokens that no text contains, until it has `size` of them.

    The town's texts have too few different words for a vocabulary of GPT-2's size.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    for number in range(len(tokenizer), size):
        vocabulary[f"<unused {number}>"] = number
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), padding_side="left",
        eos_token=tokenizer.eos_token, pad_token=tokenizer.pad_token,
        clean_up_tokenization_spaces=False)


def make_town_model(size: str, context: int = 128, seed: int = 0,
                    ) -> tuple[GPT2LMHeadModel, PreTrainedTokenizerFast]:
    """Return a random policy and a tokenizer trained on the demonstrations.

    Args:
        size: a name in `measuring.SIZES`; its vocabulary is filled up.
        context: longest sequence, in tokens.
        seed: of the weights.
    """
    layers, hidden, heads, vocabulary = SIZES[size]
    texts = [format_prompt(d.prompt) + d.response for d in read_demonstrations()]
    tokenizer = fill_vocabulary(train_tokenizer(texts, vocabulary), vocabulary)
    config = PretrainConfig(vocab_size=vocabulary, layers=layers, hidden=hidden, heads=heads,
                            context=context, row_tokens=min(64, context),
                            init_std=0.02 if hidden >= 768 else 0.06)
    return build_model(config, tokenizer, seed), tokenizer


def make_prompts(tokenizer: PreTrainedTokenizerFast, tokens: int, count: int = 1000,
                 ) -> list[Prompt]:
    """Return prompts of exactly `tokens` tokens: the town's, where needed filled up with a word.

    Args:
        tokenizer: of the town.
        tokens: length of each prompt, chat format included.
        count: look at so many of the town's prompts; longer ones are left out.
    """
    found = []
    for prompt in read_jsonl(TOWN / "prompts.jsonl", Prompt)[:count]:
        missing = tokens - len(encode_prompt(tokenizer, prompt.prompt))
        text = " the" * missing + " " + prompt.prompt if missing > 0 else prompt.prompt
        if len(encode_prompt(tokenizer, text.strip())) == tokens:
            found.append(Prompt(prompt.id, text.strip()))
    return found
