# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Quantized, static and sliding-window caches."""

import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from every_press import CASES
from kvpress import BasePress, DecodingPress, DMSPress, KnormPress
from replay import Layer, attention_modules, clear_masks, decode, feed, merge_in_float64
from transformers import DynamicCache, QuantizedCache, StaticCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, QuantizedLayer

from kvpress_merging import MergingPress

BACKENDS = {
    "quanto, 4 bit": {"backend": "quanto", "nbits": 4, "axis_key": 0, "axis_value": 0},
    "hqq, 8 bit": {"backend": "hqq", "nbits": 8, "axis_key": 1, "axis_value": 1},
    "hqq, 4 bit": {"backend": "hqq", "nbits": 4, "axis_key": 1, "axis_value": 1},
}
# One press of each kind.
SHRINKING = ["Knorm", "KeyRerotation", "PerLayerCompression", "Composed", "third party, slices and joins"]
MASKING = ["AdaKV", "DMS", "KVzip", "FastKVzip", "third party, masks"]
N_CONTEXT = 96


@functools.cache
def unpack_in_python() -> None:
    """quanto would compile its unpacking with a C++ compiler when it is first asked to, for a minute."""
    from optimum.quanto.library.extensions.cpp import ext

    def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
        return torch.cat([packed >> shift & 2**bits - 1 for shift in range(0, 8, bits)])

    ext._lib = SimpleNamespace(unpack=unpack)


def quantized(model, backend: str, residual_length: int = 128) -> QuantizedCache:
    if backend.startswith("quanto"):
        pytest.importorskip("optimum.quanto", reason="needs optimum-quanto")
        unpack_in_python()
    else:
        pytest.importorskip("hqq", reason="needs hqq")
    return QuantizedCache(config=model.config, q_group_size=16, residual_length=residual_length, **BACKENDS[backend])


def dequantized(cache, module) -> Layer:
    """A layer as it is seen: what is quantized, and behind it the tokens that are not yet."""
    layer = cache.layers[module.layer_idx]
    parts = [layer._dequantize(layer._quantized_keys), layer._dequantize(layer._quantized_values)]
    if layer.keys.dim() == 4:
        parts = [torch.cat(pair, dim=2) for pair in zip(parts, (layer.keys, layer.values))]
    assert layer.cumulative_length == parts[0].shape[2] == parts[1].shape[2]
    is_masked = torch.zeros(parts[0].shape[:3], dtype=torch.bool)
    if getattr(module, "masked_key_indices", None) is not None:
        is_masked[tuple(module.masked_key_indices)] = True
    return Layer(*parts, is_masked)


def prefill(model, press, input_ids, cache):
    feed(model, press, input_ids, cache)
    return [dequantized(cache, module) for module in attention_modules(model)]


@pytest.fixture
def quantizations(monkeypatch):
    """What was quantized, in order, by layer."""
    seen: dict[int, list[torch.Tensor]] = {}
    alive = []  # or another layer would get the same id
    for subclass in QuantizedLayer.__subclasses__():

        def spy(self, tensor, axis, original=subclass._quantize):
            alive.append(self)
            seen.setdefault(id(self), []).append(tensor.clone())
            return original(self, tensor, axis)

        monkeypatch.setattr(subclass, "_quantize", spy)
    return seen


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SHRINKING + MASKING)
def test_a_quantized_layer_is_merged_and_quantized_once(name, backend, llama, input_ids, quantizations):
    full = prefill(llama, None, input_ids, quantized(llama, backend))
    bare_cache = quantized(llama, backend)
    bare_after = prefill(llama, CASES[name].make(), input_ids, bare_cache)
    bare_written = [quantizations[id(layer)] for layer in bare_cache.layers]
    if name == "KVzip":  # its scoring passes quantize the cache anew before it evicts
        full = bare_after

    cache = quantized(llama, backend)
    press = MergingPress(CASES[name].make())
    merged = prefill(llama, press, input_ids, cache)
    assert sum(row["merged"] for row in press.report.to_dict().values()) > 0
    for layer_full, by_bare, after, layer in zip(full, bare_written, merged, cache.layers):
        by_us = quantizations[id(layer)]
        if name in MASKING:
            bare = Layer(layer_full.keys, layer_full.values, after.is_masked)
            assert torch.equal(after.keys, layer_full.keys)
            # the prefill's two, KVzip's own, and one for the merged values
            assert len(by_us) == (len(by_bare) if name == "KVzip" else 2) + 1
        elif len(by_us) == 2:
            assert torch.equal(after.values, layer_full.values)  # this layer was not compressed
            continue
        else:
            bare_keys, bare_values = by_bare[-2:]
            bare = Layer(bare_keys, bare_values, torch.zeros(bare_keys.shape[:3], dtype=torch.bool))
            assert after.keys.shape == bare_keys.shape
            assert torch.equal(by_us[-2], bare_keys)
            assert len(by_us) == len(by_bare)
        if name == "Composed":  # what it keeps of its first press was rounded on the way
            continue
        expected = merge_in_float64(layer_full, bare)
        np.testing.assert_allclose(by_us[-1].double().numpy(), expected.values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_evicted_leaves_the_quantized_tensors_themselves(backend, llama, input_ids, quantizations):
    cache = quantized(llama, backend)
    prefill(llama, MergingPress(KnormPress(0.0)), input_ids, cache)
    assert all(len(quantizations[id(layer)]) == 2 for layer in cache.layers)


@pytest.mark.parametrize("backend", BACKENDS)
def test_recent_tokens_that_are_not_quantized_yet_are_kept_when_a_press_shrinks(backend, llama, input_ids):
    press = MergingPress(DecodingPress(KnormPress(), compression_interval=4, target_size=40))
    cache = quantized(llama, backend)
    more = torch.randperm(240, generator=torch.Generator().manual_seed(4))[None, :5] + 10
    clear_masks(llama)
    recent: dict[int, list[torch.Tensor]] = {}

    def note(module, args, kwargs, output):
        layer = kwargs["past_key_values"].layers[module.layer_idx]
        if layer.keys.dim() == 4:
            recent[module.layer_idx] = [layer.keys.clone(), layer.values.clone()]

    modules = attention_modules(llama)
    handles = [module.register_forward_hook(note, with_kwargs=True) for module in modules]
    with torch.no_grad(), press(llama):
        llama.model(input_ids=input_ids, past_key_values=cache)
        decode(llama, cache, more[:, :4], N_CONTEXT)
    for handle in handles:
        handle.remove()
    for module in modules:
        layer = cache.layers[module.layer_idx]
        assert layer.get_seq_length() == 40 + 4
        # the first three decoded tokens and the fourth: neither lost nor moved
        keys, values = recent[module.layer_idx]
        assert layer.keys.shape[2] == 4
        assert torch.equal(layer.keys, keys)
        assert layer.values.shape == values.shape
    with torch.no_grad():
        decode(llama, cache, more[:, 4:], N_CONTEXT + 4)
    assert all(layer.get_seq_length() == 45 for layer in cache.layers)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_that_reach_into_the_recent_tokens_merge_them_once(backend, llama, input_ids):
    press = MergingPress(DMSPress(KnormPress(), threshold=-3.2, sliding_window_size=2, decoding=True))
    cache = quantized(llama, backend)
    clear_masks(llama)
    more = torch.randperm(240, generator=torch.Generator().manual_seed(4))[None, :6] + 10
    with torch.no_grad(), press(llama):
        llama.model(input_ids=input_ids, past_key_values=cache)
        evicted = press.report.to_dict()[0]["evicted"]
        decode(llama, cache, more, N_CONTEXT)
    rows = press.report.to_dict()
    for module in attention_modules(llama):
        layer = dequantized(cache, module)
        assert layer.keys.shape[2] == N_CONTEXT + 6
        assert rows[module.layer_idx]["evicted"] == int(layer.is_masked.sum())
    assert rows[0]["evicted"] > evicted
    assert any(bool(dequantized(cache, module).is_masked[..., N_CONTEXT:].any()) for module in attention_modules(llama))


def test_kvcompose_with_a_quantized_cache_is_a_clear_error(llama, input_ids):
    for name in ("KVCompose", "KVCompose unstructured"):
        with pytest.raises(ValueError, match="KVComposePress cannot compress a QuantizedCache"):
            prefill(llama, MergingPress(CASES[name].make()), input_ids, quantized(llama, "quanto, 4 bit"))
        assert llama.config._attn_implementation == "sdpa"


def test_a_static_cache_is_a_clear_error(llama, input_ids):
    clear_masks(llama)
    cache = StaticCache(config=llama.config, max_cache_len=128)
    press = MergingPress(KnormPress(0.5))
    with pytest.raises(ValueError, match="StaticLayer has a fixed length"), torch.no_grad(), press(llama):
        llama.model(input_ids=input_ids, past_key_values=cache)


class OtherLayer(CacheLayerMixin):
    """A cache layer that keeps its keys and values under other names."""

    is_sliding = is_initialized = False

    def lazy_initialization(self, *states):
        self.is_initialized = True

    def update(self, key_states, value_states, cache_kwargs=None):
        self.lazy_initialization(key_states, value_states)
        self.both = key_states, value_states
        return self.both

    def get_mask_sizes(self, cache_position):
        return self.get_seq_length() + cache_position.shape[0], 0

    def get_seq_length(self):
        return self.both[0].shape[2] if self.is_initialized else 0

    def get_max_cache_shape(self):
        return -1


class NoPress(BasePress):
    def forward_hook(self, module, input, kwargs, output):
        return output


def test_layers_that_cannot_be_followed_are_named_in_one_warning(llama, input_ids):
    cache = DynamicCache()
    cache.layers += [OtherLayer(), DynamicLayer(), OtherLayer()]
    clear_masks(llama)
    message = r"NoPress evicts from these cache layers is not merged.*: 0 \(OtherLayer\), 2 \(OtherLayer\)$"
    with pytest.warns(RuntimeWarning, match=message) as warnings, torch.no_grad(), MergingPress(NoPress())(llama):
        llama.model(input_ids=input_ids, past_key_values=cache)
    assert len([w for w in warnings if issubclass(w.category, RuntimeWarning)]) == 1
