# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""GGUF files of tiny models."""

from __future__ import annotations

from pathlib import Path

import gguf
from tiny import CHAT_TEMPLATE, SPECIAL_TOKENS, tiny_model, tiny_tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

_ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2}


def tiny_gguf(file: Path, family: str = "llama", pre: str = "smollm") -> PreTrainedModel:
    """Write a GGUF file with a random model, and a tokenizer that has two merges. Returns the model."""
    # Two more tokens than bytes and special tokens: what the two merges make.
    tokenizer = tiny_tokenizer(file.parent / "tokenizer")
    tokenizer.add_tokens(["er", "12"])
    model = tiny_model(family, vocab_size=len(tokenizer))
    write_gguf(file, model, tokenizer, pre)
    return model


def write_gguf(file: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pre: str = "smollm") -> None:
    """Write a Llama or a Qwen2 and a byte-level BPE vocabulary as llama.cpp's converter does, in float32."""
    config = model.config
    writer = gguf.GGUFWriter(file, config.model_type)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token in SPECIAL_TOKENS else 1 for token in vocabulary])
    writer.add_token_merges(["e r", "1 2"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)
    names = gguf.get_tensor_name_map(_ARCHITECTURES[config.model_type], config.num_hidden_layers)
    n_heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        projection = name.split(".")[-2]
        if config.model_type == "llama" and projection in n_heads:  # llama.cpp rotates neighbours, transformers halves
            halves = weight.view(n_heads[projection], 2, -1, weight.shape[1])
            weight = halves.transpose(1, 2).reshape(weight.shape)
        writer.add_tensor(str(names.get_name(name, try_suffixes=(".weight", ".bias"))), weight.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
