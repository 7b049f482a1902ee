# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Forward passes over a compressed cache: read on from it, and watch what attention makes of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from kvpress.utils import extract_keys_and_values
from torch.utils.hooks import RemovableHandle
from transformers import Cache, DynamicCache, PreTrainedModel

from kvpress_merging.following.model import attention_modules


def read_continuation(
    model: PreTrainedModel, continuation_ids: torch.Tensor, cache: Cache, start: int, logits_to_keep: int = 0
) -> torch.Tensor:
    """
    Feed tokens over a cache in one forward pass, which makes it longer.

    Token ids, int64, are of shape ``(1, n_tokens)``, the logits that come out ``(1, n_tokens, vocab_size)``. Layers of
    the cache may differ in length. It is shorter than the text it stands for, so it cannot tell the ``start``, the
    position of the first token. Logits are made of the last ``logits_to_keep`` tokens only, or with 0 of all.
    """
    n_tokens = continuation_ids.shape[1]
    position_ids = torch.arange(start, start + n_tokens, device=model.device)[None]
    with _masks_of_each_layer(model, cache):
        return model(
            input_ids=continuation_ids.to(model.device),
            past_key_values=cache,
            position_ids=position_ids,
            logits_to_keep=logits_to_keep,
        ).logits


def count_cache_bytes(model: PreTrainedModel, cache: DynamicCache) -> tuple[int, int]:
    """
    Bytes of keys and values that a cache holds, and bytes of those that attention still sees.

    They differ for presses that mask positions (``module.masked_key_indices``) and leave them in memory.
    """
    held = masked = 0
    for layer_idx, attention in enumerate(attention_modules(model)):
        keys, values = extract_keys_and_values(cache, layer_idx)
        held += keys.nbytes + values.nbytes
        if (masked_key_indices := getattr(attention, "masked_key_indices", None)) is not None:
            # A press may name a position twice.
            is_masked = torch.zeros(keys.shape[:3], dtype=torch.bool)
            is_masked[tuple(indices.cpu() for indices in masked_key_indices)] = True
            masked += int(is_masked.sum()) * (keys.nbytes + values.nbytes) // is_masked.numel()
    return held, held - masked


@contextlib.contextmanager
def _masks_of_each_layer(model: PreTrainedModel, cache: Cache) -> Iterator[None]:
    """
    Give each layer an attention mask of its own: causal over its cache, without the positions that a press masked.

    transformers makes one mask for all layers from the first layer's length, which is wrong where a press keeps a
    different number of positions in each layer. And kvpress hides masked positions behind keys that no query of the
    forward pass attends to; for a pass of many tokens there may be none, and it raises an error. Where attention takes
    no mask (one token, or kernels that know their own), nothing is changed.
    """
    masked_key_indices: dict[int, Any] = {}

    def replace_mask(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        mask = kwargs.get("attention_mask")
        n_tokens = kwargs["hidden_states"].shape[1]
        n_past = cache.get_seq_length(module.layer_idx)
        masked = getattr(module, "masked_key_indices", None)
        if not isinstance(mask, torch.Tensor) or (mask.shape[-1] == n_past + n_tokens and masked is None):
            return None
        if mask.shape[-1] == n_past + n_tokens:
            visible = mask if mask.dtype == torch.bool else mask == 0
        else:
            positions = torch.arange(n_past + n_tokens, device=mask.device)
            visible = (positions <= positions[n_past:, None])[None, None]
        if masked is not None:
            keys, _ = extract_keys_and_values(cache, module.layer_idx)
            unmasked = torch.ones(*keys.shape[:2], 1, n_past + n_tokens, dtype=torch.bool, device=mask.device)
            batch_indices, head_indices, seq_indices = (indices.to(mask.device) for indices in masked)
            unmasked[batch_indices, head_indices, 0, seq_indices] = False
            visible = visible & unmasked.repeat_interleave(module.num_key_value_groups, dim=1)
            masked_key_indices[module.layer_idx] = masked
            module.masked_key_indices = None
        if mask.dtype != torch.bool:
            visible = torch.zeros_like(visible, dtype=mask.dtype).masked_fill(~visible, torch.finfo(mask.dtype).min)
        return args, {**kwargs, "attention_mask": visible}

    modules = attention_modules(model)
    try:
        with _hooks(module.register_forward_pre_hook(replace_mask, with_kwargs=True) for module in modules):
            yield
    finally:
        for layer_idx, masked in masked_key_indices.items():
            modules[layer_idx].masked_key_indices = masked


@contextlib.contextmanager
def watched_attention(
    model: PreTrainedModel,
    inputs: list[torch.Tensor],
    outputs: list[torch.Tensor],
    given: list[torch.Tensor] | None = None,
) -> Iterator[None]:
    """Append what enters and leaves each layer's attention in a forward pass; ``given`` enters in its stead."""

    def watch_input(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if given is not None:
            kwargs = {**kwargs, "hidden_states": given[module.layer_idx]}
        inputs.append(kwargs["hidden_states"])
        return args, kwargs

    def watch_output(module: Any, args: tuple) -> None:
        outputs.append(args[0])

    modules: list[Any] = attention_modules(model)
    with _hooks(
        [module.register_forward_pre_hook(watch_input, with_kwargs=True) for module in modules]
        + [module.o_proj.register_forward_pre_hook(watch_output) for module in modules]
    ):
        yield


@contextlib.contextmanager
def _hooks(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
