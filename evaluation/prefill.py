# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""A context is read with a press: what that leaves, to go on from."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import kvpress
import torch
from kvpress import BasePress, DecodingPress, DMSPress, PrefillDecodingPress
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from evaluation.peers.kvfold import KVFoldPress
from evaluation.peers.logit_bias import biased_attention
from kvpress_merging.checks import rotates_keys
from kvpress_merging.following.model import attention_modules

# What appends to the context; an older kvpress has no such press.
_APPENDING = getattr(kvpress, "RestoreKVPress", ())


@dataclass
class Prefilled:
    """
    What a prefill left of one press: all that an answer needs.

    Parameters
    ----------
    press : BasePress or None
        The press; None for the full cache.
    cache : DynamicCache
        Its cache, compressed.
    masked_key_indices : list
        What it masked in each attention layer, from the first to the last; ``masks_of`` puts that on a model.
    start : int
        Position at which the text goes on.
    prefill_seconds : float
        Wall-clock time of the prefill with all that the press does until its context exits.
    press_seconds : float
        How much of that was the press's own work. NaN if it cannot be told, as in a prefill of the press alone.
    logit_bias : mapping of int to torch.Tensor
        What attention adds to the logits of the cache's slots, by layer: ``KVFoldPress.logit_bias``, or nothing.
    """

    press: BasePress | None
    cache: DynamicCache
    masked_key_indices: list[Any]
    start: int
    prefill_seconds: float
    press_seconds: float = float("nan")
    logit_bias: Mapping[int, torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.logit_bias = self.press.logit_bias if isinstance(self.press, KVFoldPress) else {}


@torch.no_grad()
def prefill(model: PreTrainedModel, input_ids: torch.Tensor, press: BasePress | None) -> Prefilled:
    """
    Read a context with one press, as kvpress's pipeline does.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model.
    input_ids : torch.Tensor
        Token ids, int64, shape ``(bsz, q_len)``.
    press : BasePress or None
        The press; None for the full cache. One that acts while decoding only does nothing yet.
    """
    modules = attention_modules(model)
    # kvpress forgets the masks of the last prefill in its patched attention, but not in a model's own eager one.
    put_masks(modules, [None] * len(modules))
    cache = DynamicCache()
    input_ids = input_ids.to(model.device)
    is_idle = press is None or isinstance(press, DecodingPress)
    synchronize(model.device)
    started = time.perf_counter()
    # Without the language model's head, and by keyword: some presses intercept this very call.
    with contextlib.nullcontext() if is_idle else press(model):  # type: ignore[misc]
        model.model(input_ids=input_ids, past_key_values=cache)
    synchronize(model.device)
    seconds = time.perf_counter() - started
    masks = [getattr(module, "masked_key_indices", None) for module in modules]
    put_masks(modules, [None] * len(modules))
    return Prefilled(press, cache, masks, start_after(press, cache, input_ids.shape[1]), seconds)


def start_after(press: BasePress | None, cache: DynamicCache, context_length: int) -> int:
    """Where kvpress's pipeline goes on: some presses renumber what they keep of the context, or append to it."""
    if press is not None and (rotates_keys(press) or isinstance(press, _APPENDING)):
        return cache.get_seq_length()
    return context_length


def acts_while_decoding(press: BasePress | None) -> bool:
    """Whether kvpress's pipeline enters a press's context, for the first time or again, when it answers."""
    if isinstance(press, DMSPress):
        return press.decoding
    return isinstance(press, (DecodingPress, PrefillDecodingPress))


@contextlib.contextmanager
def masks_of(model: PreTrainedModel, prefilled: Prefilled) -> Iterator[None]:
    """Have a model's attention overlook what a press masked and add its bias, for a while: to go on from its cache."""
    modules = attention_modules(model)
    before = [getattr(module, "masked_key_indices", None) for module in modules]
    put_masks(modules, prefilled.masked_key_indices)
    try:
        with biased_attention(model, prefilled.logit_bias):
            yield
    finally:
        put_masks(modules, before)


def put_masks(modules: Sequence[nn.Module], masks: Sequence[Any]) -> None:
    """Set what attention layers overlook: for each None, or batch rows, heads and positions."""
    for module, masked_key_indices in zip(modules, masks, strict=True):
        module.masked_key_indices = masked_key_indices


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given, so that a clock tells its time."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
