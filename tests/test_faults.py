# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""An exception surfaces as it was raised, and leaves model, press and cache as they were."""

import contextlib
import copy
import functools
import gc
import weakref

import pytest
import torch
from every_press import CASES
from faults import tracks_of
from kvpress import AdaKVPress, BasePress, KnormPress, PerLayerCompressionPress, ScorerPress
from replay import assert_merged, attention_modules, clear_masks, run
from transformers import DynamicCache

from kvpress_merging import MergingPress


class Stop(Exception):
    pass


@pytest.mark.parametrize("is_patched", [False, True], ids=["as made", "with forwards of its own"])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.needs.startswith("delim")])
def test_a_press_that_is_done_leaves_no_tracks_on_the_model(name, is_patched, llama, input_ids):
    case = CASES[name]
    model = copy.deepcopy(llama)
    if "own model" in case.needs:
        run(model, case.make(), input_ids)  # adapters are put in for good
    if is_patched:
        for module in (model.model, *attention_modules(model)):
            module.forward = functools.partial(module.forward)
    model.set_attn_implementation(case.attn_implementation)
    before = tracks_of(model)
    run(model, MergingPress(case.make()), input_ids, input_ids[:, :8] if case.moment == "decoding" else None)
    assert tracks_of(model) == before


AT_PREFILL = [name for name, case in CASES.items() if case.moment != "decoding" and not case.needs.startswith("delim")]


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["in the model", "after the prefill"])
@pytest.mark.parametrize("name", AT_PREFILL)
def test_an_exception_inside_the_context_leaves_everything_as_it_was(name, where, error, llama, input_ids):
    case = CASES[name]
    model = copy.deepcopy(llama)
    press = MergingPress(case.make())
    model.set_attn_implementation(case.attn_implementation)
    if "own model" in case.needs:
        run(model, press, input_ids)  # adapters are put in for good
    clear_masks(model)
    before = tracks_of(model)
    full = run(model, None, input_ids)
    cache = DynamicCache()

    def fail(module, args):
        raise error("now")

    handle = model.model.layers[2].mlp.register_forward_pre_hook(fail) if where == "in the model" else None
    with pytest.raises(error, match="now"), torch.no_grad(), press(model):
        model.model(input_ids=input_ids, past_key_values=cache)
        raise error("now")
    if handle:
        handle.remove()
    assert tracks_of(model) == before
    assert all(
        type(layer.keys) is type(layer.values) is torch.Tensor for layer in cache.layers if layer.keys is not None
    )
    if case.moment == "exit" and where == "after the prefill" and not name.startswith("KVCompose"):
        for layer, layer_full in zip(cache.layers, full):
            assert torch.equal(layer.keys, layer_full.keys)
            assert torch.equal(layer.values, layer_full.values)
    # and the next use is as if nothing had been
    if not name.startswith(("KVCompose", "RestoreKV")):
        again = run(model, press, input_ids)
        fresh = run(model, MergingPress(case.make()), input_ids)
        for layer, layer_fresh in zip(again, fresh):
            assert torch.equal(layer.values, layer_fresh.values)


class FailingPress(ScorerPress):
    """Fails in one layer, after it has changed what it was given."""

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        if module.layer_idx == 2:
            values.mul_(3)
            raise Stop("score")
        return keys.norm(dim=-1)


class CallingPress(BasePress):
    """Calls the forward hook of a press inside it."""

    def __init__(self, press):
        self.press = press

    def forward_hook(self, module, input, kwargs, output):
        return self.press.forward_hook(module, input, kwargs, output)


@pytest.mark.parametrize("is_inside", [False, True], ids=["alone", "inside a press that calls its hook"])
@pytest.mark.parametrize("wrap", [lambda press: press, AdaKVPress, lambda p: PerLayerCompressionPress(p, [0.5] * 4)])
def test_a_layer_whose_press_fails_is_put_back(wrap, is_inside, llama, input_ids):
    full = run(llama, None, input_ids)
    cache = DynamicCache()
    scorer = FailingPress(0.25)
    press = MergingPress(wrap(scorer))
    with pytest.raises(Stop, match="score"):
        run(llama, CallingPress(press) if is_inside else press, input_ids, cache=cache)
    assert torch.equal(cache.layers[2].values, full[2].values)
    assert torch.equal(cache.layers[2].keys, full[2].keys)
    assert scorer.compression_ratio == 0.25


class MistakenPress(KnormPress):
    """Makes a mistake in layer 2, unless the prompt is short."""

    def compress(self, module, hidden_states, *args):
        if module.layer_idx == 2 and hidden_states.shape[1] > 40:
            raise TypeError("a mistake")
        return super().compress(module, hidden_states, *args)


def test_a_type_error_ends_the_pass_also_where_transformers_tries_another_over_the_same_cache(llama, input_ids):
    clear_masks(llama)
    cache, fresh, n_context = DynamicCache(), DynamicCache(), input_ids.shape[1]
    press = MergingPress(MistakenPress(0.5))
    with torch.no_grad(), press(llama):
        with pytest.raises(TypeError, match="a mistake"):
            llama.model(input_ids=input_ids, past_key_values=cache)
        try:
            raise TypeError("something else")
        except TypeError:
            llama.model(input_ids=input_ids[:, :40], past_key_values=fresh)
    lengths = [layer.keys.shape[2] for layer in cache.layers[:3]]
    assert lengths == [n_context // 2, n_context // 2, n_context]
    assert [layer.keys.shape[2] for layer in fresh.layers] == [20] * 4


def test_tensors_that_a_failing_compress_wrote_into_are_put_back(llama):
    keys, values = torch.randn(2, 1, 2, 20, 16)
    before = keys.clone(), values.clone()
    module = attention_modules(llama)[2]
    with pytest.raises(Stop, match="score"):
        MergingPress(FailingPress(0.25)).compress(module, torch.randn(1, 20, 64), keys, values, None, {})
    assert torch.equal(keys, before[0])
    assert torch.equal(values, before[1])


class UnmaskingPress(BasePress):
    """Masks the first five positions, unmasks them when ``step`` comes, and fails."""

    def __init__(self, step: str):
        self.step = step

    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        if self.step == "compress":
            self.fail([module])
        module.masked_key_indices = torch.where(torch.arange(keys.shape[2]).expand(keys.shape[:3]) < 5)
        return keys, values

    @contextlib.contextmanager
    def __call__(self, model):
        with super().__call__(model):
            yield
        self.fail(attention_modules(model))

    def fail(self, modules):
        for module in modules:
            module.masked_key_indices = None
        raise Stop(self.step)


def test_masks_that_a_failing_compress_took_away_are_put_back(llama):
    module = attention_modules(llama)[0]
    module.masked_key_indices = masked = torch.tensor([0]), torch.tensor([1]), torch.tensor([3])
    keys, values = torch.randn(2, 1, 2, 20, 16)
    with pytest.raises(Stop, match="compress"):
        MergingPress(UnmaskingPress("compress")).compress(module, torch.randn(1, 20, 64), keys, values, None, {})
    assert module.masked_key_indices is masked
    clear_masks(llama)


def test_masks_that_a_press_took_away_before_it_failed_on_leaving_are_put_back(llama, input_ids):
    full, cache = run(llama, None, input_ids), DynamicCache()
    with pytest.raises(Stop, match="exit"):
        run(llama, MergingPress(UnmaskingPress("exit")), input_ids, cache=cache)
    for module, layer, layer_full in zip(attention_modules(llama), cache.layers, full, strict=True):
        assert [index.tolist() for index in module.masked_key_indices] == [[0] * 10, [0] * 5 + [1] * 5, [*range(5)] * 2]
        assert not torch.equal(layer.values, layer_full.values)  # as after its eviction
        assert torch.equal(layer.keys, layer_full.keys)


class MaskingOnLeavingPress(BasePress):
    """Masks the first five positions of all layers when its context is left, in whatever way."""

    @contextlib.contextmanager
    def __call__(self, model):
        try:
            yield
        finally:
            for module in attention_modules(model):
                module.masked_key_indices = torch.where(torch.arange(96).expand(1, 2, -1) < 5)


def test_masks_that_a_press_sets_on_its_way_out_of_a_failure_are_taken_back(llama, input_ids):
    cache = DynamicCache()
    clear_masks(llama)
    full = run(llama, None, input_ids)
    with pytest.raises(Stop), torch.no_grad(), MergingPress(MaskingOnLeavingPress())(llama):
        llama.model(input_ids=input_ids, past_key_values=cache)
        raise Stop
    for module, layer, layer_full in zip(attention_modules(llama), cache.layers, full, strict=True):
        assert getattr(module, "masked_key_indices", None) is None
        assert torch.equal(layer.values, layer_full.values)
    merged = run(llama, MergingPress(MaskingOnLeavingPress()), input_ids)  # and with no failure they stay
    assert all(layer.is_masked.sum() == 10 for layer in merged)
    clear_masks(llama)


class ForgivingPress(KnormPress):
    """Lets no Stop out of its context."""

    @contextlib.contextmanager
    def __call__(self, model):
        with contextlib.suppress(Stop), super().__call__(model):
            yield


def test_an_exception_that_the_press_itself_swallows_leaves_no_tracks_either(llama, input_ids):
    before = tracks_of(llama)
    with MergingPress(ForgivingPress(0.5))(llama):
        raise Stop
    assert tracks_of(llama) == before
    with pytest.raises(KeyboardInterrupt), MergingPress(ForgivingPress(0.5))(llama):
        raise KeyboardInterrupt
    assert tracks_of(llama) == before


class ReplayingPress(BasePress):
    """When its context exits, runs the model once more and then cuts the cache."""

    def __init__(self, cache, n_left: int):
        self.cache, self.n_left = cache, n_left

    @contextlib.contextmanager
    def __call__(self, model):
        yield
        model.model(input_ids=torch.tensor([[7]]), past_key_values=self.cache)
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys[:, :, : self.n_left], layer.values[:, :, : self.n_left]


def test_a_cache_cut_after_a_pass_of_the_presss_own_is_left_as_it_was_and_the_press_named(llama, input_ids):
    full, cache = run(llama, None, input_ids), DynamicCache()
    with pytest.raises(ValueError, match=r"^ReplayingPress shortened the cache in a way that does not show"):
        run(llama, MergingPress(ReplayingPress(cache, n_left=50)), input_ids, cache=cache)
    for layer, layer_full in zip(cache.layers, full, strict=True):
        assert torch.equal(layer.keys, layer_full.keys)
        assert torch.equal(layer.values, layer_full.values)
    # Cut back to the context alone, it has lost nothing.
    cache = DynamicCache()
    run(llama, MergingPress(ReplayingPress(cache, n_left=96)), input_ids, cache=cache)
    for layer, layer_full in zip(cache.layers, full, strict=True):
        assert torch.equal(layer.values, layer_full.values)


def test_a_fold_that_fails_puts_the_layer_back(llama, input_ids, monkeypatch):
    def fail(self, module, *args):
        if module.layer_idx == 1:
            raise Stop("fold")
        return original(self, module, *args)

    original = MergingPress.fold
    monkeypatch.setattr(MergingPress, "fold", fail)
    full = run(llama, None, input_ids)
    for name in ("Knorm", "AdaKV", "KVCompose", "KVzip"):
        cache = DynamicCache()
        clear_masks(llama)
        before = tracks_of(llama)
        with pytest.raises(Stop, match="fold"):
            run(llama, MergingPress(CASES[name].make()), input_ids, cache=cache)
        assert tracks_of(llama) == before
        if name == "KVCompose":
            continue  # it prefills in eager attention, and leaves its replay in the cache
        assert torch.equal(cache.layers[1].values, full[1].values)
        assert getattr(llama.model.layers[1].self_attn, "masked_key_indices", None) is None


LATE_STEPS = {
    "KVzip": "compress_post",
    "KVgrad": "_update_scores",
    "FastKVzip": "compress_post",
    "RestoreKV": "append_restore_tokens",
    "KVCompose unstructured": "compress_cache",
}


@pytest.mark.parametrize("name", LATE_STEPS)
def test_a_press_that_fails_when_its_context_exits_is_undone(name, llama, input_ids, monkeypatch):
    case = CASES[name]
    model = copy.deepcopy(llama)
    if "own model" in case.needs:
        run(model, case.make(), input_ids)  # adapters are put in for good
    clear_masks(model)
    before = tracks_of(model)
    full = run(model, None, input_ids)
    press = MergingPress(case.make())
    step = getattr(type(press.press), LATE_STEPS[name])

    def fail(self, *args):
        step(self, *args)
        raise Stop("late")

    monkeypatch.setattr(type(press.press), LATE_STEPS[name], fail)
    cache = DynamicCache()
    with pytest.raises(Stop, match="late"):
        run(model, press, input_ids, cache=cache)
    assert tracks_of(model) == before
    for layer, layer_full, module in zip(cache.layers, full, attention_modules(model)):
        assert getattr(module, "masked_key_indices", None) is None
        assert type(layer.keys) is type(layer.values) is torch.Tensor
        if not name.startswith("KVCompose"):  # prefills in eager attention, and leaves its replay
            assert torch.equal(layer.keys, layer_full.keys)
            assert torch.equal(layer.values, layer_full.values)


@pytest.mark.parametrize("name", ["Knorm", "third party, masks"])
def test_masks_of_an_earlier_prefill_play_no_part_in_eager_attention_either(name, llama, input_ids):
    """kvpress's attention functions forget masks at prefill, but the model's own eager one does not."""
    model = copy.deepcopy(llama)
    model.set_attn_implementation("eager")
    of_fresh = MergingPress(CASES[name].make())
    fresh = run(model, of_fresh, input_ids)
    for module in attention_modules(model):
        module.masked_key_indices = (torch.zeros(60, dtype=torch.int64),) * 2 + (torch.arange(60),)
    press, cache = MergingPress(CASES[name].make()), DynamicCache()
    with torch.no_grad(), press(model):
        model.model(input_ids=input_ids, past_key_values=cache)
    for layer, layer_fresh in zip(cache.layers, fresh):
        assert torch.equal(layer.values, layer_fresh.values)
    assert press.report.to_dict() == of_fresh.report.to_dict()
    assert press.report.to_dict()[0]["evicted"] > 60


def test_a_press_writing_into_its_input_does_not_change_what_is_merged(llama, input_ids):
    class Doubling(ScorerPress):
        def compress(self, module, hidden_states, keys, values, attentions, kwargs):
            keys, values = super().compress(module, hidden_states, keys, values.mul_(1.0), attentions, kwargs)
            return keys, values

        def score(self, module, hidden_states, keys, values, attentions, kwargs):
            keys.add_(1.0).sub_(1.0)
            return -keys.norm(dim=-1)

    full, bare = run(llama, None, input_ids), run(llama, Doubling(0.5), input_ids)
    merged = run(llama, MergingPress(Doubling(0.5)), input_ids)
    assert assert_merged(full, bare, merged) > 0


def test_two_presses_nested_evict_and_merge_one_after_the_other(llama, input_ids):
    full = run(llama, None, input_ids)
    first = run(llama, MergingPress(KnormPress(0.5)), input_ids)
    clear_masks(llama)
    cache = DynamicCache()
    with torch.no_grad(), MergingPress(KnormPress(0.5))(llama), MergingPress(KnormPress(0.25))(llama):
        llama.model(input_ids=input_ids, past_key_values=cache)
    for layer, layer_first, layer_full in zip(cache.layers, first, full):
        assert layer.keys.shape[2] == int(layer_first.keys.shape[2] * 0.75)
        norms = layer_first.keys.norm(dim=-1)
        expected = norms.neg().topk(layer.keys.shape[2], dim=-1).indices
        index = expected[..., None].expand_as(layer.keys)
        assert torch.equal(layer.keys, layer_first.keys.gather(2, index))
        assert not torch.equal(layer.values, layer_first.values.gather(2, index))
        assert layer_full.keys.shape[2] == 96


def test_several_prefills_in_one_context_are_merged_each(llama, input_ids):
    press = MergingPress(KnormPress(0.5))
    caches = [DynamicCache(), DynamicCache()]
    with torch.no_grad(), press(llama):
        for cache in caches:
            llama.model(input_ids=input_ids, past_key_values=cache)
    for one, two in zip(*(cache.layers for cache in caches)):
        assert torch.equal(one.values, two.values)
        assert one.keys.shape[2] == 48


def test_neither_caches_nor_models_are_held(llama, input_ids):
    model = copy.deepcopy(llama)
    press = MergingPress(CASES["KVzip"].make())
    cache = DynamicCache()
    run(model, press, input_ids, cache=cache)
    held = [weakref.ref(cache), weakref.ref(model)]
    del cache, model
    gc.collect()
    assert [reference() for reference in held] == [None, None]
    assert len(press._memory.states) == 0


def test_attention_without_a_cache_is_left_to_the_model(llama, input_ids):
    with torch.no_grad():
        expected = llama.model(input_ids=input_ids, use_cache=False).last_hidden_state
        with pytest.raises((TypeError, AttributeError, KeyError)), KnormPress(0.5)(llama):
            llama.model(input_ids=input_ids, use_cache=False)
        with pytest.raises((TypeError, AttributeError, KeyError)), MergingPress(KnormPress(0.5))(llama):
            llama.model(input_ids=input_ids, use_cache=False)
    assert torch.isfinite(expected).all()
    assert all(not module._forward_hooks for module in attention_modules(llama))
