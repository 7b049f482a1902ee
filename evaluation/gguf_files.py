# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""From a GGUF file to a folder that transformers loads: safetensors, and the tokenizer that goes with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

# llama.cpp's token type for control tokens such as <|im_start|>.
_CONTROL_TOKEN = 3


def convert_gguf(gguf_file: Path, folder: Path, dtype: torch.dtype) -> None:
    """
    Write a GGUF model with a GPT-2 style vocabulary as safetensors, with its tokenizer, into a folder.

    Parameters
    ----------
    gguf_file : Path
        The model, of an architecture that transformers can read from GGUF.
    folder : Path
        Where ``from_pretrained`` will find it.
    dtype : torch.dtype
        Of the weights that are written; quantized ones become what they stand for first.

    Raises
    ------
    ValueError
        If transformers knows no such architecture, or ``read_gguf_tokenizer`` no such tokenizer.
    """
    tokenizer = read_gguf_tokenizer(gguf_file)
    model = AutoModelForCausalLM.from_pretrained(str(gguf_file.parent), gguf_file=gguf_file.name, dtype=dtype)
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    # transformers 5 has a name of its own for this class that 4 does not know; both know the older one.
    config = folder / "tokenizer_config.json"
    config.write_text(config.read_text(encoding="utf-8").replace("TokenizersBackend", "PreTrainedTokenizerFast"))


def read_gguf_tokenizer(gguf_file: Path) -> PreTrainedTokenizerBase:
    """
    Build the tokenizer that a GGUF file describes, for the byte-level BPE vocabularies of SmolLM and Qwen2.

    transformers 5.2 reads SmolLM's as a CodeLlama tokenizer: it puts a ``<|im_start|>`` before every text, takes
    ``<|im_start|>`` for the end of a text, adds five tokens that the model has no embedding for, and does not part
    digits. So it is put together here from the file's own vocabulary, merges, special tokens and chat template. Of
    Qwen2's, transformers leaves out only where a turn ends and how long a text may be.

    Raises
    ------
    ValueError
        If the file's tokenizer is of another kind.
    """
    fields = gguf.GGUFReader(gguf_file).fields

    def read(name: str, default: Any = None) -> Any:
        field = fields.get(name)
        return default if field is None else field.contents()

    kind = (read("tokenizer.ggml.model"), read("tokenizer.ggml.pre"))
    tokens = read("tokenizer.ggml.tokens")
    eos_token = tokens[read("tokenizer.ggml.eos_token_id")]
    pad_token = tokens[read("tokenizer.ggml.padding_token_id")]
    model_max_length = read(f"{read('general.architecture')}.context_length")
    if kind == ("gpt2", "qwen2"):
        qwen2 = AutoTokenizer.from_pretrained(str(gguf_file.parent), gguf_file=gguf_file.name)
        qwen2.eos_token, qwen2.pad_token, qwen2.model_max_length = eos_token, pad_token, model_max_length
        return qwen2
    if kind != ("gpt2", "smollm"):
        raise ValueError(f"{gguf_file.name} has a tokenizer of the kind {kind}, not gpt2's with smollm or qwen2")
    merges = [tuple(merge.split(" ")) for merge in read("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(BPE({token: index for index, token in enumerate(tokens)}, merges))
    # llama.cpp's pre-tokenizer "smollm": each digit by itself, then GPT-2's expression.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, normalized=False, special=True)
            for token, token_type in zip(tokens, read("tokenizer.ggml.token_type"))
            if token_type == _CONTROL_TOKEN
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[read("tokenizer.ggml.bos_token_id")],
        eos_token=eos_token,
        unk_token=tokens[read("tokenizer.ggml.unknown_token_id")],
        pad_token=pad_token,
        chat_template=read("tokenizer.chat_template"),
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
    )
