# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Runs presses on tiny models and works out, apart from the code under test, what merging should have given."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from unittest import mock

import numpy as np
import torch
from every_press import Case
from kvpress import BasePress
from transformers import Cache, DynamicCache, PreTrainedModel

from kvpress_merging.kernels import match as match_module

N_CONTEXT = 96


@dataclass
class Layer:
    """One layer after a run: float tensors ``(bsz, num_key_value_heads, n_slots, head_dim)`` and a bool mask of
    slots."""

    keys: torch.Tensor
    values: torch.Tensor
    is_masked: torch.Tensor


def attention_modules(model: PreTrainedModel) -> list:
    base = model.model
    return [layer.self_attn for layer in getattr(base, "language_model", base).layers]


def clear_masks(model: PreTrainedModel) -> None:
    """Forget what earlier presses masked, as in a model that has just been made."""
    for module in attention_modules(model):
        vars(module).pop("masked_key_indices", None)


def model_for(case: Case, model: PreTrainedModel) -> PreTrainedModel:
    """The model that a press of this case runs on: ``model``, or a copy where the press changes it."""
    if "own model" in case.needs:
        model = copy.deepcopy(model)
    model.set_attn_implementation(case.attn_implementation)
    return model


def input_ids_for(case: Case, bsz: int = 1, length: int = N_CONTEXT) -> torch.Tensor:
    """Tokens that all differ within a row, so that no two values are the same."""
    generator = torch.Generator().manual_seed(11)
    input_ids = torch.stack([torch.randperm(240, generator=generator)[:length] + 10 for _ in range(bsz)])
    if case.needs == "delimiter":
        input_ids[:, length - 16] = 5
    return input_ids


def error_of(call: Callable[[], object]) -> tuple[type, str] | None:
    """What a call raises, and with which words; None if it does not."""
    try:
        call()
    except Exception as error:
        return type(error), str(error)
    return None


def max_error_left(share: float) -> AbstractContextManager:
    """Have heads take fits whose squared error, relative to the output's, is less: with 0 none, with infinity any."""
    return mock.patch.object(match_module, "_MAX_ERROR", share)


def run(
    model: PreTrainedModel,
    press: BasePress | None,
    input_ids: torch.Tensor,
    decode_ids: torch.Tensor | None = None,
    cache: Cache | None = None,
) -> list[Layer]:
    """Prefill ``input_ids`` and feed ``decode_ids`` one by one, inside the press's context."""
    cache = DynamicCache() if cache is None else cache
    feed(model, press, input_ids, cache, decode_ids)
    return snapshot(model, cache)


def feed(
    model: PreTrainedModel,
    press: BasePress | None,
    input_ids: torch.Tensor,
    cache: Cache,
    decode_ids: torch.Tensor | None = None,
) -> None:
    """What ``run`` does, for caches of any kind."""
    clear_masks(model)
    torch.manual_seed(5)
    with torch.no_grad(), nullcontext() if press is None else press(model):
        model.model(input_ids=input_ids, past_key_values=cache)
        if decode_ids is not None:
            decode(model, cache, decode_ids, input_ids.shape[1])


def decode(model: PreTrainedModel, cache: Cache, decode_ids: torch.Tensor, position: int) -> None:
    for step in range(decode_ids.shape[1]):
        model.model(
            input_ids=decode_ids[:, step : step + 1],
            past_key_values=cache,
            position_ids=torch.full((decode_ids.shape[0], 1), position + step),
        )


def snapshot(model: PreTrainedModel, cache: Cache) -> list[Layer]:
    layers = []
    for module in attention_modules(model):
        layer = cache.layers[module.layer_idx]
        keys, values = layer.keys.clone(), layer.values.clone()
        assert type(layer.keys) is torch.Tensor
        assert type(layer.values) is torch.Tensor
        is_masked = torch.zeros(keys.shape[:3], dtype=torch.bool)
        if getattr(module, "masked_key_indices", None) is not None:
            is_masked[tuple(module.masked_key_indices)] = True
        layers.append(Layer(keys, values, is_masked))
    return layers


def full_cache(case: Case, model: PreTrainedModel, input_ids: torch.Tensor) -> list[Layer]:
    """The cache without eviction: Finch drops its delimiter from the input, KVCompose prefills in eager attention."""
    keep = input_ids[0] != 5
    attn_implementation = model.config._attn_implementation
    if "eager prefill" in case.needs:
        model.set_attn_implementation("eager")
    full = run(model, None, input_ids[:, keep])
    model.set_attn_implementation(attn_implementation)
    return full


def assert_equal(layers: list[Layer], others: list[Layer]) -> None:
    for layer, other in zip(layers, others, strict=True):
        assert torch.equal(layer.keys, other.keys)
        assert torch.equal(layer.values, other.values)
        assert torch.equal(layer.is_masked, other.is_masked)


def positions_by_value(full: Layer, bare: Layer) -> np.ndarray:
    """
    Which position of the full cache each slot of the bare press holds, by its value's bits: -1 for a slot that holds
    none.

    Shape ``(bsz, num_key_value_heads, n_slots)``. Input tokens must differ, so that values do.
    """
    full_values, values = full.values.numpy(), bare.values.numpy()
    bsz, n_heads, n_slots, _ = values.shape
    positions = np.full((bsz, n_heads, n_slots), -1)
    for b in range(bsz):
        for h in range(n_heads):
            same = (values[b, h][:, None] == full_values[b, h][None]).all(-1)
            found = same.any(1)
            positions[b, h, found] = same[found].argmax(1)
    if n_slots >= full.values.shape[2]:  # slots of a masked cache are its positions; what comes after was appended
        positions[..., : full.values.shape[2]] = np.arange(full.values.shape[2])
        positions[..., full.values.shape[2] :] = -1
    return positions


@dataclass
class Expected:
    """Values that a merge should give, which slots take something in, and the figures of each merge."""

    values: np.ndarray
    takes_in: np.ndarray
    similarities: list[float]
    weights: list[float]
    n_survivors: int
    most_merges: int

    @property
    def n_merged(self) -> int:
        return len(self.similarities)


def merge_in_float64(full: Layer, bare: Layer) -> Expected:
    """The cosine blend with default parameters, head by head, from the full cache and what the bare press left."""
    positions = positions_by_value(full, bare)
    values = bare.values.double().numpy().copy()
    takes_in = np.zeros(values.shape[:3], dtype=bool)
    similarities, all_weights, n_survivors, most_merges = [], [], 0, 0
    for b in range(values.shape[0]):
        for h in range(values.shape[1]):
            keys = full.keys[b, h].double().numpy()
            all_values = full.values[b, h].double().numpy()
            slot_of = {
                position: slot
                for slot, position in enumerate(positions[b, h])
                if position >= 0 and not bare.is_masked[b, h, slot]
            }
            survivors = sorted(slot_of)
            evicted = [i for i in range(len(keys)) if i not in slot_of]
            n_survivors += len(survivors)
            if not survivors:
                continue
            units = keys / np.linalg.norm(keys, axis=1, keepdims=True)
            norms = np.linalg.norm(all_values, axis=1)
            cosines = units[evicted] @ units[survivors].T
            added: dict[int, np.ndarray] = {}
            weights: dict[int, float] = {}
            merges: dict[int, int] = {}
            for i, row in zip(evicted, cosines):
                j = survivors[int(row.argmax())]
                if row.max() < 0:
                    continue
                weight = row.max() * norms[i] / (norms[i] + norms[j])
                added[j] = added.get(j, 0) + weight * all_values[i]
                weights[j] = weights.get(j, 0) + weight
                merges[j] = merges.get(j, 0) + 1
                similarities.append(row.max())
                all_weights.append(weight)
            most_merges = max(most_merges, *merges.values(), 0)
            for j in added:
                values[b, h, slot_of[j]] = (all_values[j] + added[j]) / (1 + weights[j])
                takes_in[b, h, slot_of[j]] = True
    return Expected(values, takes_in, similarities, all_weights, n_survivors, most_merges)


def assert_merged(full: list[Layer], bare: list[Layer], merged: list[Layer]) -> int:
    """
    Same lengths, masks and keys as the bare press; values as they should be; nothing else touched.

    Returns how many positions were merged.
    """
    n_merged = 0
    for layer_full, layer_bare, layer_merged in zip(full, bare, merged, strict=True):
        assert layer_merged.keys.shape == layer_bare.keys.shape
        assert torch.equal(layer_merged.is_masked, layer_bare.is_masked)
        assert torch.equal(layer_merged.keys, layer_bare.keys)
        assert layer_merged.values.dtype == layer_bare.values.dtype
        expected = merge_in_float64(layer_full, layer_bare)
        np.testing.assert_allclose(layer_merged.values.double().numpy(), expected.values, rtol=1e-4, atol=1e-5)
        takes_in = torch.from_numpy(expected.takes_in)
        assert torch.equal(layer_merged.values[~takes_in], layer_bare.values[~takes_in])
        assert (layer_merged.values[takes_in] != layer_bare.values[takes_in]).any(dim=-1).all()
        n_merged += expected.n_merged
    return n_merged
