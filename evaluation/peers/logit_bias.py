# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Attention that adds a bias to the logits of what a cache holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvpress_merging.following.model import attention_modules, layer_index


@contextmanager
def biased_attention(model: PreTrainedModel, logit_bias: Mapping[int, torch.Tensor]) -> Iterator[None]:
    """
    Have a model's attention add a bias to the logits of cached positions, for a while; for a batch as it was prefilled.

    transformers' table of attention functions has another one for ``"sdpa"`` in this context, and the old one after it.

    Parameters
    ----------
    model : PreTrainedModel
        The model, which goes on from the cache that the bias belongs to.
    logit_bias : mapping of int to torch.Tensor
        By layer, for its first slots, float32, shape ``(bsz, num_key_value_heads, n_slots)``. Empty: nothing is done.

    Raises
    ------
    ValueError
        If attention is not computed by ``"sdpa"``, which takes a bias with its mask.
    """
    if not logit_bias:
        yield
        return
    if (implementation := model.config._attn_implementation) != "sdpa":
        raise ValueError(f"a bias of logits needs attn_implementation='sdpa', got {implementation!r}")
    biases = {module: logit_bias.get(layer_index(module)) for module in attention_modules(model)}
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attend_with_bias(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: Any, mask: Any, **kwargs: Any
    ) -> Any:
        bias = biases.get(module)
        if bias is not None and query.shape[2] < key.shape[2]:
            mask = _add_bias(mask, bias, query, key)
        return attend(module, query, key, value, mask, **kwargs)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = attend_with_bias
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = attend


def _add_bias(mask: torch.Tensor | None, bias: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """A mask that is added to the logits, shape ``(bsz, num_heads, q_len, k_len)``, in the query's dtype."""
    (_, num_heads, q_len, _), k_len = query.shape, key.shape[2]
    bias = nn.functional.pad(bias.to(query.device), (0, k_len - bias.shape[-1]))
    bias = bias.repeat_interleave(num_heads // bias.shape[1], dim=1)[:, :, None]
    if mask is None:
        mask = torch.ones(q_len, k_len, dtype=torch.bool, device=query.device).tril(k_len - q_len)
    if mask.dtype == torch.bool:
        return bias.to(query.dtype).expand(-1, -1, q_len, -1).masked_fill(~mask, torch.finfo(query.dtype).min)
    return (mask.float() + bias).clamp(min=torch.finfo(query.dtype).min).to(query.dtype)
