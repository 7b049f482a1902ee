# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Every family of models that transformers has, as tiny random models."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from kvpress import BasePress, KnormPress
from tiny import VOCAB_SIZE
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

# Fields by the names that they have in one config or another: a config takes those that it knows.
_FIELDS: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0,
    "laurel_rank": 8,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "sliding_window": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "image_token_id": 250,
    "image_token_index": 250,
    "video_token_id": 251,
    "video_token_index": 251,
    "vision_start_token_id": 252,
    "vision_end_token_id": 253,
    "audio_token_id": 254,
    # Experts.
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    # Latent attention.
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 16,
    # Towers that see.
    "depth": 2,
    "embed_dim": 32,
    "num_heads": 2,
    "out_hidden_size": 64,
    "in_channels": 3,
    "image_size": 28,
    "patch_size": 14,
    "projection_dim": 32,
    "deepstack_visual_indexes": [0],
    "num_position_embeddings": 64,
}
_MAX_PARAMETERS = 12e6


def _tiny_config(config_class: type[PretrainedConfig]) -> PretrainedConfig:
    default, known = config_class(), inspect.signature(config_class.__init__).parameters
    fields = {name: value for name, value in _FIELDS.items() if name in known and hasattr(default, name)}
    for name in config_class.sub_configs:
        if (part := getattr(default, name, None)) is not None:
            fields[name] = _tiny_config(type(part)).to_dict()
    config = config_class(**fields)
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None)
    if isinstance(rope, dict) and type(text).__module__.split(".")[-2] in _SECTIONS:
        # A third each for time, height and width; the default is that of another head_dim.
        text.rope_parameters = rope | {"mrope_section": _SECTIONS[type(text).__module__.split(".")[-2]]}
    if set(getattr(text, "layer_types", None) or ()) == {"sliding_attention"}:
        text.layer_types = [*text.layer_types[:-1], "full_attention"]  # kvpress leaves Gemma3's sliding layers alone
    return config


# Rotated pairs of channels that stand for time, height and width.
_SECTIONS = {
    **{name: [2, 3, 3] for name in ("qwen2_vl", "qwen2_5_vl", "paddleocr_vl", "glm4v", "glm46v", "glm_ocr")},
    "glm4v_moe": [1, 1, 2],
}


def prefilled(model: PreTrainedModel, press: BasePress | None, input_ids: torch.Tensor) -> DynamicCache:
    """The cache after a prefill."""
    cache = DynamicCache()
    with torch.no_grad():
        if press is None:
            model.model(input_ids=input_ids, past_key_values=cache, use_cache=True)
        else:
            with press(model):
                model.model(input_ids=input_ids, past_key_values=cache, use_cache=True)
    return cache


def tiny_models(mapping: Mapping[Any, Any], input_ids: torch.Tensor) -> Iterator[tuple[str, PreTrainedModel]]:
    """
    Of each family of an auto-mapping, its name and a model that kvpress's KnormPress evicts from, keeping keys whole.

    Random, in eval mode. Left out are those without the layers that kvpress looks for, and those that no config of few
    parameters can be made of.
    """
    for config_class, model_class in mapping.items():
        model_class = model_class[0] if isinstance(model_class, tuple) else model_class
        try:
            config = _tiny_config(config_class)
            with torch.device("meta"):
                if model_class._from_config(config).num_parameters() > _MAX_PARAMETERS:
                    continue
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = model_class._from_config(config).eval()
            full, bare = prefilled(model, None, input_ids), prefilled(model, KnormPress(0.5), input_ids)
        except Exception:  # whatever it is that a family lacks
            continue
        pairs = [(layer.keys, after.keys) for layer, after in zip(full.layers, bare.layers)]
        is_shorter = any(kept.shape[2] < keys.shape[2] for keys, kept in pairs)
        if is_shorter and all(keys.shape[-1] == kept.shape[-1] for keys, kept in pairs):
            yield config_class.model_type, model
