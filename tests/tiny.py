# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Models and tokenizers small enough to make in a test, of every family that kvpress supports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipVisionConfig,
)

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "phi3": (Phi3Config, Phi3ForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "gemma3_text": (Gemma3TextConfig, Gemma3ForCausalLM),
    "gemma3": (Gemma3Config, Gemma3ForConditionalGeneration),
}
FAMILIES = tuple(_FAMILIES)


def tiny_model(family: str = "llama", *, seed: int = 0, **config: Any) -> PreTrainedModel:
    """
    A random model with 4 layers, 4 query heads on 2 KV heads, and head_dim 16, in float32 and eval mode.

    Weights are drawn five times wider than transformers draws them, so that attention is far from uniform.

    Parameters
    ----------
    family : str
        One of ``FAMILIES``. ``"gemma3"`` is the conditional-generation model, with a vision tower.
    seed : int
        Draws the weights; the global generator is left alone.
    **config
        Fields of the (text) configuration that differ.
    """
    config_class, model_class = _FAMILIES[family]
    fields: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "initializer_range": 0.1,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    if family == "mistral":
        fields["sliding_window"] = None
    if family != "phi3":  # its heads always part the hidden size among them
        fields["head_dim"] = 16
    if family.startswith("gemma3"):
        fields |= {
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": 32,
            "query_pre_attn_scalar": 16,
        }
    fields |= config
    if family == "gemma3":
        vision = SiglipVisionConfig(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        )
        model_config = Gemma3Config(
            text_config=Gemma3TextConfig(**fields), vision_config=vision, mm_tokens_per_image=4, image_token_index=3
        )
    else:
        model_config = config_class(**fields)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model_class(model_config).eval()


def tiny_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """A tokenizer with one token a byte and a ChatML template, written to ``folder`` and loaded from there."""
    # ByteLevel writes bytes as printable characters; sorted, since the alphabet comes in no fixed order.
    vocabulary = SPECIAL_TOKENS + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({token: index for index, token in enumerate(vocabulary)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<|endoftext|>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def tiny_checkpoint(
    folder: str | Path, family: str = "llama", **config: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """
    A model and tokenizer that also lie in ``folder``, and whose ``config.name_or_path`` says so.

    For code that loads from disk, and presses that load the tokenizer by themselves (KVzipPress).
    """
    model = tiny_model(family, **config)
    model.save_pretrained(folder)
    model.config.name_or_path = str(folder)
    return model, tiny_tokenizer(folder)
