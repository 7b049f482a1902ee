# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""What a merge rule is handed, and which layers and hooks it is handed for."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from every_press import CASES, ELSEWHERE, MaskingPress
from kvpress import BasePress, KnormPress
from replay import attention_modules, clear_masks, input_ids_for, run
from transformers import DynamicCache

from kvpress_merging import MergeOnEvictPress, MergingPress


@dataclass
class NotingPress(MergeOnEvictPress):
    """Leaves what the press left, and notes what it is given."""

    calls: list = field(init=False, repr=False, compare=False, default_factory=list)

    def fold(self, module, hidden_states, keys, values, kept_keys, kept_values, eviction, kwargs):
        call = {name: value for name, value in locals().items() if name != "self"}
        self.calls.append(SimpleNamespace(**call))
        return kept_keys, kept_values


def test_at_prefill_a_rule_gets_the_layer_its_input_and_the_arguments_of_its_pass(llama):
    input_ids = input_ids_for(CASES["Knorm"])
    press, cache = NotingPress(KnormPress(0.5)), DynamicCache()
    bare = run(llama, KnormPress(0.5), input_ids)
    merged = run(llama, press, input_ids, cache=cache)
    full = run(llama, None, input_ids)
    assert [call.module for call in press.calls] == attention_modules(llama)
    for i, call in enumerate(press.calls):
        assert call.hidden_states.shape == (1, input_ids.shape[1], llama.config.hidden_size)
        assert call.kwargs["hidden_states"] is call.hidden_states
        assert call.kwargs["past_key_values"] is cache
        assert len(call.kwargs["position_embeddings"]) == 2
        assert torch.equal(call.keys, full[i].keys)
        assert torch.equal(call.values, full[i].values)
        assert torch.equal(call.kept_keys, bare[i].keys)
        assert torch.equal(call.kept_values, bare[i].values)
        assert call.eviction.k_len == input_ids.shape[1]
        assert call.eviction.n_evicted == call.eviction.n_survivors == 2 * input_ids.shape[1] // 2
        assert torch.equal(merged[i].keys, bare[i].keys)


def test_after_the_layers_pass_a_rule_gets_neither_its_input_nor_its_arguments(llama):
    press = NotingPress(CASES["FastKVzip"].make())
    run(llama, press, input_ids_for(CASES["FastKVzip"]))
    assert {call.module for call in press.calls} == set(attention_modules(llama))
    assert all(call.hidden_states is None and call.kwargs == {} for call in press.calls)


@pytest.mark.parametrize("name", ELSEWHERE)
def test_evictions_in_another_modules_hook_are_one_clear_error(name, llama):
    press = NotingPress(ELSEWHERE[name]())
    message = f"^{type(press.press).__name__} evicted from layer 0 in a hook of another module"
    with pytest.raises(ValueError, match=message):
        run(llama, press, input_ids_for(CASES["Knorm"]))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in llama.modules())


class MaskingAndRebuildingPress(MaskingPress):
    """Masks, and gives tensors back that it has worked out anew."""

    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        keys, values = super().compress(module, hidden_states, keys, values, attentions, kwargs)
        return keys * 1.0, values * 1.0


def test_a_press_that_masks_may_rebuild_the_layer_as_long_as_every_position_keeps_its_slot(llama):
    input_ids = torch.arange(10, 40)[None]
    expected = run(llama, MergingPress(MaskingPress()), input_ids)
    merged = run(llama, MergingPress(MaskingAndRebuildingPress()), input_ids)
    for layer, layer_expected in zip(merged, expected, strict=True):
        assert torch.equal(layer.values, layer_expected.values)
        assert torch.equal(layer.is_masked, layer_expected.is_masked)


class HooksOfItsOwn(BasePress):
    """Hooks model and layers, with and without keyword arguments, and notes what each hook is given."""

    def __init__(self):
        self.given = []

    @contextmanager
    def __call__(self, model):
        def with_kwargs(module, args, kwargs, output):
            self.given.append((module, args, kwargs["past_key_values"], output is not None))

        def without(module, args, output):
            self.given.append((module, args, None, output is not None))

        handles = [model.model.register_forward_hook(with_kwargs, with_kwargs=True)]
        handles += [model.model.register_forward_hook(without)]
        for module in attention_modules(model):
            handles += [module.register_forward_hook(with_kwargs, with_kwargs=True)]
            handles += [module.register_forward_hook(without)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def test_hooks_of_a_press_get_their_own_module_and_what_they_asked_for(llama):
    inner, cache = HooksOfItsOwn(), DynamicCache()
    earlier = []

    def note(module, args, kwargs, output):
        earlier.append((module, {type(layer.keys) for layer in kwargs["past_key_values"].layers}))

    handle = llama.model.register_forward_hook(note, with_kwargs=True)
    try:
        run(llama, NotingPress(inner), torch.arange(10, 40)[None], cache=cache)
    finally:
        handle.remove()
    modules = [*attention_modules(llama), llama.model]
    assert inner.given == [(module, (), given, True) for module in modules for given in (cache, None)]
    # Once, though it was there before the press, and with no part in what the press does.
    assert earlier == [(llama.model, {torch.Tensor})]


@pytest.mark.parametrize("of", ["shape", "dtype"])
@pytest.mark.parametrize("which", [0, 1])
def test_a_rule_that_returns_another_kind_of_tensor_is_named_and_told_what_was_expected(of, which, llama):
    @dataclass
    class WrongPress(MergeOnEvictPress):
        def fold(self, module, hidden_states, keys, values, kept_keys, kept_values, eviction, kwargs):
            folded = [kept_keys, kept_values]
            folded[which] = folded[which][:, :, 1:] if of == "shape" else folded[which].double()
            return tuple(folded)

    cache = DynamicCache()
    with pytest.raises(ValueError, match=rf"^WrongPress\.fold must return tensors of the survivors' {of}, .*, got "):
        run(llama, WrongPress(KnormPress(0.5)), torch.arange(10, 40)[None], cache=cache)
    assert cache.layers[0].keys.shape[2] == 30


def test_a_rule_that_is_not_written_says_so(llama):
    @dataclass
    class NoRulePress(MergeOnEvictPress):
        pass

    with pytest.raises(NotImplementedError, match=r"^NoRulePress must implement fold$"):
        run(llama, NoRulePress(KnormPress(0.5)), torch.arange(10, 40)[None])


def test_a_class_in_place_of_a_press_is_told_how_to_make_one():
    with pytest.raises(
        TypeError, match=r"^press must be a kvpress BasePress, got <class .*>; pass an instance, KnormPress"
    ):
        MergingPress(KnormPress)


def test_a_press_around_it_that_calls_compress_starts_anew_with_each_prefill(llama):
    press = NotingPress(KnormPress(0.5))
    module = attention_modules(llama)[0]
    clear_masks(llama)  # as kvpress's attention does when it prefills
    for k_len in (30, 50):
        keys, values = torch.randn(2, 1, 2, k_len, 16)
        hidden_states = torch.randn(1, k_len, 64)
        new_keys, new_values = press.compress(module, hidden_states, keys, values, None, {})
        assert new_keys.shape == new_values.shape == (1, 2, k_len // 2, 16)
        assert press.calls[-1].hidden_states is hidden_states
        state = press._memory.states[module]
        assert (state.context_length, state.k_len) == (k_len, k_len)
        assert press.report.to_dict()[0]["evicted"] == 2 * k_len // 2


def test_a_press_that_evicts_nothing_is_handed_nothing(llama):
    press, input_ids = NotingPress(KnormPress(0.0)), torch.arange(10, 40)[None]
    merged, full = run(llama, press, input_ids), run(llama, None, input_ids)
    assert press.calls == []
    for layer, layer_full in zip(merged, full, strict=True):
        assert torch.equal(layer.keys, layer_full.keys)
        assert torch.equal(layer.values, layer_full.values)


class NotingInnerPress(BasePress):
    """Keeps the later half, and notes what it is given."""

    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        self.given = (module, hidden_states, attentions, kwargs)
        return keys[:, :, keys.shape[2] // 2 :], values[:, :, values.shape[2] // 2 :]


def test_a_press_around_it_hands_the_inner_press_what_it_is_given(llama):
    inner, module = NotingInnerPress(), attention_modules(llama)[0]
    clear_masks(llama)
    keys, values = torch.randn(2, 1, 2, 20, 16)
    hidden_states, attentions, kwargs = torch.randn(1, 20, 64), torch.randn(1, 4, 20, 20), {"of": "the pass"}
    NotingPress(inner).compress(module, hidden_states, keys, values, attentions, kwargs)
    assert inner.given[0] is module
    assert inner.given[1] is hidden_states
    assert inner.given[2] is attentions
    assert inner.given[3] is kwargs
