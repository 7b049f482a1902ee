# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""The kernels on each kind of device: they stay there, read nothing back, and say what they say on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from kernel_cases import Layer, random_layer, random_rows

from kvpress_merging.eviction import Eviction
from kvpress_merging.kernels.blend import cosine_blend
from kvpress_merging.kernels.match import attention_match

KINDS = ("shrunk", "masked", "ragged")


@contextmanager
def nothing_read_back(device: torch.device) -> Iterator[None]:
    """Within it, waiting for a GPU is an error. Tensors on ``meta`` have nothing to read."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def on(layer: Layer, device: torch.device) -> Layer:
    lists = {name: getattr(layer.eviction, name).to(device) for name in ("survivors", "slots", "evicted")}
    eviction: Eviction = replace(layer.eviction, **lists)
    tensors = (layer.keys, layer.values, layer.kept_keys, layer.kept_values)
    return Layer(*(tensor.to(device) for tensor in tensors), eviction)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_blending_stays_on_its_device_and_waits_for_nothing(device, kind, dtype):
    layer = random_layer(2, 4, 300, 140, head_dim=64, kind=kind, dtype=dtype)
    there = on(layer, device)

    def blend(layer: Layer):
        return cosine_blend(layer.keys, layer.values, layer.kept_keys, layer.kept_values, layer.eviction)

    blend(there)  # what is made once
    with nothing_read_back(device):
        result = blend(there)
    for tensor in (result.values, result.weight, result.similarity, result.target, result.is_merged):
        assert tensor.device.type == device.type
    assert result.values.shape == layer.kept_values.shape
    if device.type != "meta":
        expected = blend(layer)
        torch.testing.assert_close(result.values.cpu(), expected.values)
        assert torch.equal(blend(there).values, result.values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_matching_stays_on_its_device_and_waits_for_nothing(device, kind, dtype):
    layer = random_layer(2, 4, 300, 140, head_dim=64, kind=kind, dtype=dtype)
    queries = random_rows(2, 4, 20, 64, seed=5) / 8
    there, queries_there = on(layer, device), queries.to(device)

    def match(layer: Layer, queries: torch.Tensor):
        tensors = (layer.keys, layer.values, layer.kept_keys, layer.kept_values)
        return attention_match(*tensors, queries, queries, layer.eviction, key_ridge=0.1)

    match(there, queries_there)
    with nothing_read_back(device):
        result = match(there, queries_there)
    for tensor in (result.keys, result.values, result.is_fitted, result.error_before, result.error_after):
        assert tensor.device.type == device.type
    assert result.values.shape == layer.kept_values.shape
    if device.type != "meta":
        expected = match(layer, queries)
        torch.testing.assert_close(result.error_after.cpu(), expected.error_after, rtol=1e-2, atol=1e-4)
        assert torch.equal(match(there, queries_there).values, result.values)
