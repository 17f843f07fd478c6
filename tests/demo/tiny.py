"""A model and a tokenizer of a few thousand weights, in a folder as a user would have them."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from tests.support.models import tiny_model

SPECIAL = ("<pad>", "<bos>", "<eos>")
CHAT_TEMPLATE = "{% for m in messages %}<bos>{{ m['content'] }}{% endfor %}"
SIZES = {"vocab_size": 320, "max_position_embeddings": 1024}


def byte_tokenizer(*, chat: bool = True) -> PreTrainedTokenizerFast:
    """One token per byte; ids 0, 1, 2 are padding, beginning and end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        chat_template=CHAT_TEMPLATE if chat else None,
    )


def talkative_model(*, tied: bool = False) -> nn.Module:
    """A tiny Llama whose greedy answers hold no special tokens: their logits are always 0."""
    model = tiny_model("Llama", tied=tied, **SIZES)
    with torch.no_grad():
        model.get_output_embeddings().weight[: len(SPECIAL)] = 0
        model.get_output_embeddings().weight[len(SPECIAL) + 256 :] = 0
    return model


def save_model(folder: Path, *, tied: bool = False, tokenizer: bool = True) -> Path:
    """Write model and tokenizer as transformers does."""
    talkative_model(tied=tied).save_pretrained(folder)
    if tokenizer:
        byte_tokenizer().save_pretrained(folder)
    return folder
