# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""
How far a model strays from itself when its KV cache is compressed.

A context is prefilled twice, with the full cache and with a press; the tokens that truly follow are then fed over each
cache in one forward pass, and what the model says at each of them is compared.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from kvpress import BasePress, DecodingPress, FinchPress, KeyRerotationPress, RestoreKVPress
from kvpress.utils import extract_keys_and_values
from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache, PreTrainedModel

from evaluation.text import Window

# Positions whose logits are compared at a time: bounds the float64 copies for a vocabulary of 150,000.
_ROWS = 64


@dataclass(frozen=True)
class Fidelity:
    """
    What one press did to one window. One row of a table.

    The *scored* tokens are the continuation's, less its first, which the prefill predicts before any press acts.

    Parameters
    ----------
    kl : float
        Kullback-Leibler divergence of the next-token distribution with the compressed cache from that with the full
        cache, KL(full || compressed), in nats, mean over the scored tokens.
    kl_per_token : tuple[float, ...]
        The same for each scored token.
    nll, nll_full : float
        Negative log-likelihood of the true continuation with the compressed and with the full cache, in nats, mean over
        the scored tokens.
    top1_agreement : float
        Share of the scored tokens at which both caches make the same token the most likely one.
    cache_bytes : int
        Bytes of keys and values that the cache holds after the prefill.
    cache_bytes_seen : int
        The same without positions that attention no longer sees: less than ``cache_bytes`` for presses that mask
        positions and leave them in memory.
    cache_bytes_full : int
        Bytes of keys and values in the full cache.
    prefill_seconds, prefill_seconds_full : float
        Wall-clock time of the prefill with the press (all that it does until its context exits) and without.
    attention_errors : tuple[float, ...]
        For each layer, the relative error of its attention output; see ``measure_fidelity``. Empty if not measured.
    """

    kl: float
    kl_per_token: tuple[float, ...]
    nll: float
    nll_full: float
    top1_agreement: float
    cache_bytes: int
    cache_bytes_seen: int
    cache_bytes_full: int
    prefill_seconds: float
    prefill_seconds_full: float
    attention_errors: tuple[float, ...] = ()


@dataclass(frozen=True)
class Reference:
    """
    The full cache's side of the comparison: measured once for a window, and used for each press.

    Parameters
    ----------
    window : Window
        What was read.
    logits : torch.Tensor
        At each scored token's predecessor, shape ``(continuation_length - 1, vocab_size)``.
    cache_bytes : int
        Bytes of keys and values of the context.
    prefill_seconds : float
        Wall-clock time of the prefill.
    attention_inputs, attention_outputs : list[torch.Tensor]
        Per layer, what went into attention and what it gave before the output projection, over the continuation, shapes
        ``(1, continuation_length - 1, hidden_size)`` and ``(1, continuation_length - 1, num_heads * head_dim)``.
        Empty if attention errors are not asked for.
    """

    window: Window
    logits: torch.Tensor
    cache_bytes: int
    prefill_seconds: float
    attention_inputs: list[torch.Tensor]
    attention_outputs: list[torch.Tensor]

    def to(self, device: torch.device | str) -> Reference:
        """The same with its tensors on ``device``; the window stays where it is."""
        return dataclasses.replace(
            self,
            logits=self.logits.to(device),
            attention_inputs=[tensor.to(device) for tensor in self.attention_inputs],
            attention_outputs=[tensor.to(device) for tensor in self.attention_outputs],
        )


# no_grad, not inference_mode, here and below: some presses take gradients, as they can in kvpress's pipeline.
@torch.no_grad()
def measure_reference(model: PreTrainedModel, window: Window, *, attention_errors: bool = False) -> Reference:
    """
    Read a window with the full cache.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model.
    window : Window
        Its continuation needs two tokens at least: one to read and one to score.
    attention_errors : bool, default=False
        Whether to keep what ``measure_fidelity`` needs for the attention error of each layer.

    Raises
    ------
    ValueError
        If the continuation has fewer than two tokens.
    """
    if window.continuation_ids.shape[1] < 2:
        raise ValueError(f"a continuation needs at least 2 tokens, got {window.continuation_ids.shape[1]}")
    cache, start, seconds = _prefill(model, window, None)
    cache_bytes, _ = count_cache_bytes(model, cache)
    inputs: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []
    with _watched_attention(model, inputs, outputs) if attention_errors else contextlib.nullcontext():
        logits = read_continuation(model, window.continuation_ids[:, :-1], cache, start)
    return Reference(window, logits[0], cache_bytes, seconds, inputs, outputs)


@torch.no_grad()
def measure_fidelity(model: PreTrainedModel, press: BasePress, reference: Reference) -> Fidelity:
    """
    Read the reference's window with a press, and compare.

    If the reference kept its attention inputs and outputs, the relative error of each layer's attention output is
    measured too: ``|o_press - o_full| / |o_full|``, Euclidean norms over all tokens, heads and channels before the
    output projection. That takes a second pass over the continuation, in which each layer is given the hidden states
    that it had in the full-cache run. So queries are the same in both runs, and an error stems from this layer's cache
    alone, not from the layers below it. It is 0 where a layer was not compressed.

    Parameters
    ----------
    model : PreTrainedModel
        The one that the reference was measured with.
    press : BasePress
        Compresses the cache at the end of the prefill.
    reference : Reference
        What ``measure_reference`` gave.

    Raises
    ------
    TypeError
        For a press that acts while decoding only, which leaves the prefill's cache as it was.
    """
    if isinstance(press, DecodingPress):
        raise TypeError(f"fidelity needs a press that compresses at prefill, got {type(press).__name__}")
    window = reference.window
    continuation_ids = window.continuation_ids[:, :-1]
    cache, start, seconds = _prefill(model, window, press)
    cache_bytes, cache_bytes_seen = count_cache_bytes(model, cache)
    lengths = [layer.get_seq_length() for layer in cache.layers]
    logits = read_continuation(model, continuation_ids, cache, start)[0]
    kl, nll, nll_full, agree = compare_logits(reference.logits, logits, window.continuation_ids[0, 1:])
    errors: tuple[float, ...] = ()
    if reference.attention_inputs:
        for layer_idx, length in enumerate(lengths):
            keys, values = extract_keys_and_values(cache, layer_idx)
            cache.layers[layer_idx].keys, cache.layers[layer_idx].values = keys[:, :, :length], values[:, :, :length]
        outputs: list[torch.Tensor] = []
        with _watched_attention(model, [], outputs, given=reference.attention_inputs):
            read_continuation(model, continuation_ids, cache, start)
        errors = tuple(
            float((output - full).double().norm() / full.double().norm())
            for output, full in zip(outputs, reference.attention_outputs)
        )
    return Fidelity(
        kl=float(kl.mean()),
        kl_per_token=tuple(kl.tolist()),
        nll=float(nll.mean()),
        nll_full=float(nll_full.mean()),
        top1_agreement=float(agree.double().mean()),
        cache_bytes=cache_bytes,
        cache_bytes_seen=cache_bytes_seen,
        cache_bytes_full=reference.cache_bytes,
        prefill_seconds=seconds,
        prefill_seconds_full=reference.prefill_seconds,
        attention_errors=errors,
    )


def compare_logits(
    full_logits: torch.Tensor, logits: torch.Tensor, target_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Compare two sets of next-token logits, in float64.

    Parameters
    ----------
    full_logits, logits : torch.Tensor
        With the full and with the compressed cache, shape ``(n_tokens, vocab_size)``.
    target_ids : torch.Tensor
        The tokens that truly follow, int64, shape ``(n_tokens,)``.

    Returns
    -------
    tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
        Per token, each of shape ``(n_tokens,)`` on the CPU: KL(full || compressed) in nats, negative log-likelihood of
        the target in nats with the compressed and with the full cache, and whether both have the same likeliest token.
    """
    parts = []
    for rows in torch.arange(len(target_ids)).split(_ROWS):
        full = full_logits[rows].double().log_softmax(-1)
        other = logits[rows].double().log_softmax(-1)
        targets = target_ids[rows].to(full.device)[:, None]
        probability = full.exp()
        # A token of probability 0 counts 0, whatever its logarithm is; torch's kl_div gives NaN there.
        kl = (probability * (full - other)).where(probability > 0, 0.0).sum(-1)
        agree = full.argmax(-1) == other.argmax(-1)
        parts.append((kl, -other.gather(1, targets)[:, 0], -full.gather(1, targets)[:, 0], agree))
    kl, nll, nll_full, agree = (torch.cat(column).cpu() for column in zip(*parts))
    return kl, nll, nll_full, agree


def read_continuation(
    model: PreTrainedModel, continuation_ids: torch.Tensor, cache: DynamicCache, start: int
) -> torch.Tensor:
    """
    Feed tokens over a cache in one forward pass.

    Parameters
    ----------
    model : PreTrainedModel
        The one that filled the cache.
    continuation_ids : torch.Tensor
        Token ids, int64, shape ``(1, n_tokens)``.
    cache : DynamicCache
        Grows by the tokens. Its layers may differ in length.
    start : int
        Position of the first token. A compressed cache is shorter than the text it stands for, so it cannot tell.

    Returns
    -------
    torch.Tensor
        Logits, shape ``(1, n_tokens, vocab_size)``.
    """
    n_tokens = continuation_ids.shape[1]
    position_ids = torch.arange(start, start + n_tokens, device=model.device)[None]
    with _masks_of_each_layer(model, cache):
        return model(
            input_ids=continuation_ids.to(model.device), past_key_values=cache, position_ids=position_ids
        ).logits


def count_cache_bytes(model: PreTrainedModel, cache: DynamicCache) -> tuple[int, int]:
    """
    Bytes of keys and values that a cache holds, and bytes of those that attention still sees.

    Returns
    -------
    tuple[int, int]
        They differ for presses that mask positions (``module.masked_key_indices``) and leave them in memory.
    """
    held = masked = 0
    for layer_idx, attention in enumerate(_attention_modules(model)):
        keys, values = extract_keys_and_values(cache, layer_idx)
        held += keys.nbytes + values.nbytes
        if (masked_key_indices := getattr(attention, "masked_key_indices", None)) is not None:
            # A press may name a position twice.
            is_masked = torch.zeros(keys.shape[:3], dtype=torch.bool)
            is_masked[tuple(indices.cpu() for indices in masked_key_indices)] = True
            masked += int(is_masked.sum()) * (keys.nbytes + values.nbytes) // is_masked.numel()
    return held, held - masked


def _prefill(model: PreTrainedModel, window: Window, press: BasePress | None) -> tuple[DynamicCache, int, float]:
    """The cache of a window's context, the position at which its continuation starts, and the seconds it took."""
    # kvpress forgets the masks of the last prefill in its patched attention, but not in a model's own eager one, in
    # which KVComposePress prefills.
    for attention in _attention_modules(model):
        attention.masked_key_indices = None
    cache = DynamicCache()
    context_ids = window.context_ids.to(model.device)
    _synchronize(model.device)
    started = time.perf_counter()
    # Without the language model's head, and by keyword: some presses intercept this very call.
    with press(model) if press is not None else contextlib.nullcontext():
        model.model(input_ids=context_ids, past_key_values=cache)
    _synchronize(model.device)
    seconds = time.perf_counter() - started
    start = context_ids.shape[1]
    # Where kvpress's pipeline goes on: these presses renumber what they keep, or append to it.
    if isinstance(press, (KeyRerotationPress, RestoreKVPress)) or (
        isinstance(press, FinchPress) and press.rerotate_keys
    ):
        start = cache.get_seq_length()
    return cache, start, seconds


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _attention_modules(model: PreTrainedModel) -> list[Any]:
    language_model = getattr(model.model, "language_model", model.model)
    return [layer.self_attn for layer in language_model.layers]


@contextlib.contextmanager
def _masks_of_each_layer(model: PreTrainedModel, cache: DynamicCache) -> Iterator[None]:
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

    modules = _attention_modules(model)
    try:
        with _hooks(module.register_forward_pre_hook(replace_mask, with_kwargs=True) for module in modules):
            yield
    finally:
        for layer_idx, masked in masked_key_indices.items():
            modules[layer_idx].masked_key_indices = masked


@contextlib.contextmanager
def _watched_attention(
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

    modules = _attention_modules(model)
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
