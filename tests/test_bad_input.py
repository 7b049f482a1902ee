# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Whatever goes in, the right result comes out, or the error that the bare press gives, or one that says what to do."""

from __future__ import annotations

import copy

import pytest
import torch
from every_press import CASES
from kvpress import AdaKVPress, BasePress, KnormPress, SnapKVPress, StreamingLLMPress
from replay import assert_equal, attention_modules, clear_masks, decode, run, snapshot
from transformers import DynamicCache

from kvpress_merging import AttentionMatchingPress, MergingPress

N_CONTEXT = 64
PRESSES = {"merging": MergingPress, "matching": AttentionMatchingPress}


class MiddlePress(BasePress):
    """Masks what lies between the first 4 and the last 28 positions, which ``StreamingLLMPress`` would drop."""

    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        is_masked = torch.zeros(keys.shape[:3], dtype=torch.bool)
        is_masked[:, :, 4:-28] = True
        module.masked_key_indices = torch.where(is_masked)
        return keys, values


NUMBERS = {
    "NaN": float("nan"),
    "infinite": float("inf"),
    "minus infinite": -float("inf"),
    "zero": 0.0,
    "subnormal": 1e-41,
    "1e38": 1e38,
    "-1e38": -1e38,
}


@pytest.mark.parametrize("by_mask", [False, True], ids=["shrinking", "masking"])
@pytest.mark.parametrize("is_evicted", [True, False], ids=["evicted", "kept"])
@pytest.mark.parametrize("of", ["k_proj", "v_proj"])
@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("name", PRESSES)
def test_a_bad_row_of_a_cache_does_not_spread(name, number, of, is_evicted, by_mask, llama, input_ids):
    """In the first layer, where the row is all that is bad: in the ones after it, attention has spread it already."""
    bad = 20 if is_evicted else 2

    def spoil(module, args, output):
        output = output.clone()
        output[:, bad] = NUMBERS[number]
        return output

    def make():
        return MiddlePress() if by_mask else StreamingLLMPress(0.5, n_sink=4)

    model = copy.deepcopy(llama)
    getattr(attention_modules(model)[0], of).register_forward_hook(spoil)
    bare, merged = run(model, make(), input_ids)[0], run(model, PRESSES[name](make()), input_ids)[0]
    assert merged.values.shape == bare.values.shape
    assert torch.equal(merged.is_masked, bare.is_masked)
    for before, after in ((bare.keys, merged.keys), (bare.values, merged.values)):
        was_finite = before.isfinite()
        assert after[was_finite].isfinite().all()  # and what was not finite has its bits, or is finite by now
        assert after[~was_finite].isnan().sum() <= before[~was_finite].isnan().sum()
    if name == "merging":  # its neighbours are merged all the same
        assert (merged.values.nan_to_num() != bare.values.nan_to_num()).any(-1).sum() > 10


@pytest.mark.parametrize("number", ["zero", "1e38", "subnormal"])
@pytest.mark.parametrize("name", PRESSES)
def test_a_layer_of_nothing_but_extremes_stays_finite(name, number, llama, input_ids):
    model = copy.deepcopy(llama)
    for module in attention_modules(model):
        for projection in (module.k_proj, module.v_proj):
            projection.register_forward_hook(lambda module, args, output: output.sign() * NUMBERS[number])
    for layer in run(model, PRESSES[name](StreamingLLMPress(0.5)), input_ids)[:1]:
        assert layer.keys.isfinite().all()
        assert layer.values.isfinite().all()


@pytest.mark.parametrize("inner", ["Knorm", "StreamingLLM", "KeyDiff", "AdaKV", "TOVA", "SnapKV", "KVzip", "DMS"])
@pytest.mark.parametrize("name", PRESSES)
def test_one_token_gives_what_the_bare_press_gives(name, inner, llama, input_ids):
    assert_as_bare(llama, PRESSES[name], CASES[inner].make, input_ids[:, :1])


@pytest.mark.parametrize("n_tokens", [2, 3, 15, 16, 17])
@pytest.mark.parametrize("wrap", [lambda p: p, AdaKVPress])
@pytest.mark.parametrize("name", PRESSES)
def test_a_window_longer_than_the_context_is_the_bare_presss_own_error(name, wrap, n_tokens, llama, input_ids):
    assert_as_bare(llama, PRESSES[name], lambda: wrap(SnapKVPress(0.5, window_size=16)), input_ids[:, :n_tokens])


@pytest.mark.parametrize("ratio", [0.0, 1e-9, 0.984, 0.985, 0.999999])
@pytest.mark.parametrize("wrap", [lambda p: p, AdaKVPress])
@pytest.mark.parametrize("name", PRESSES)
def test_next_to_no_and_next_to_every_position_evicted(name, wrap, ratio, llama, input_ids):
    layers = assert_as_bare(llama, PRESSES[name], lambda: wrap(KnormPress(ratio)), input_ids)
    if ratio == 0:
        assert_equal(layers, run(llama, None, input_ids))


def assert_as_bare(model, wrap, make, input_ids):
    """Survivors and masks of the bare press and finite values; or its error, and the cache and model as they were."""
    bare_error = None
    try:
        bare = run(model, make(), input_ids)
    except Exception as error:
        bare_error = error
    if bare_error is not None:
        cache = DynamicCache()
        with pytest.raises(type(bare_error)) as raised:
            run(model, wrap(make()), input_ids, cache=cache)
        assert str(raised.value) == str(bare_error)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in attention_modules(model))
        full = run(model, None, input_ids)
        for layer, layer_full in zip(cache.layers, full):
            assert torch.equal(layer.keys, layer_full.keys)
            assert torch.equal(layer.values, layer_full.values)
        return full
    merged = run(model, wrap(make()), input_ids)
    for before, after in zip(bare, merged, strict=True):
        assert after.values.shape == before.values.shape
        assert torch.equal(after.is_masked, before.is_masked)
        assert after.keys.isfinite().all()
        assert after.values.isfinite().all()
    return merged


@pytest.mark.parametrize("is_first", [True, False], ids=["first asked for inside", "asked for before"])
@pytest.mark.parametrize("name", PRESSES)
def test_attentions_are_those_of_the_full_prefill(name, is_first, llama, input_ids):
    """transformers hooks the layers when attentions are first asked for: these hooks are not the press's, and stay."""
    model = copy.deepcopy(llama)
    model.set_attn_implementation("eager")
    other = copy.deepcopy(model)
    with torch.no_grad():
        expected = other(input_ids, output_attentions=True).attentions
        if not is_first:
            model(input_ids, output_attentions=True)
        cache = DynamicCache()
        with PRESSES[name](KnormPress(0.5))(model):
            attentions = model(input_ids, past_key_values=cache, output_attentions=True).attentions
        again = model(input_ids, output_attentions=True).attentions
    assert cache.get_seq_length() == N_CONTEXT // 2
    for found in (attentions, again):
        assert len(found) == len(expected) == 4
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("inner", ["Knorm", "AdaKV"])
@pytest.mark.parametrize("name", PRESSES)
def test_a_second_forward_pass_adds_to_what_was_merged(name, inner, llama, input_ids):
    press, cache = PRESSES[name](CASES[inner].make()), DynamicCache()
    merged = run(llama, press, input_ids, cache=cache)
    assert (attention_modules(llama)[0].masked_key_indices is not None) == (inner == "AdaKV")
    with torch.no_grad(), press(llama):
        more = input_ids[:, :9]
        llama.model(input_ids=more, past_key_values=cache, position_ids=torch.arange(N_CONTEXT, N_CONTEXT + 9)[None])
    for before, after in zip(merged, snapshot(llama, cache)):
        n_slots = before.values.shape[2]
        assert after.values.shape[2] == n_slots + 9
        assert torch.equal(after.values[:, :, :n_slots], before.values)
        assert torch.equal(after.keys[:, :, :n_slots][~before.is_masked], before.keys[~before.is_masked])
        assert torch.equal(after.is_masked[:, :, :n_slots], before.is_masked)
        assert not after.is_masked[:, :, n_slots:].any()


@pytest.mark.parametrize("inner", ["Knorm", "AdaKV"])
@pytest.mark.parametrize("name", PRESSES)
def test_a_cache_that_holds_a_prefix_is_left_as_the_bare_press_leaves_it(name, inner, llama, input_ids):
    caches = []
    for press in (CASES[inner].make(), PRESSES[name](CASES[inner].make())):
        clear_masks(llama)
        cache = DynamicCache()
        with torch.no_grad():
            llama.model(input_ids=input_ids[:, :40], past_key_values=cache)
            with press(llama):
                llama.model(input_ids=input_ids[:, 40:], past_key_values=cache)
        caches.append(snapshot(llama, cache))
    assert_equal(*caches)


@pytest.mark.parametrize("name", PRESSES)
def test_a_prefix_is_fitted_and_merged_when_it_is_evicted_while_decoding(name, llama, input_ids):
    """The press has not seen the prefix come: it works with what it sees from then on."""
    caches = []
    for wrap in (lambda press: press, PRESSES[name]):
        clear_masks(llama)
        cache = DynamicCache()
        with torch.no_grad():
            llama.model(input_ids=input_ids, past_key_values=cache)
            with wrap(CASES["Decoding"].make())(llama):
                decode(llama, cache, input_ids[:, :4], N_CONTEXT)
        caches.append(snapshot(llama, cache))
    for bare, merged in zip(*caches):
        assert merged.values.shape == bare.values.shape
        assert merged.values.shape[2] == 60
    assert not torch.equal(caches[0][0].values, caches[1][0].values)


@pytest.mark.parametrize("outer", PRESSES)
@pytest.mark.parametrize("name", PRESSES)
def test_two_presses_nested_work_one_after_the_other(name, outer, llama, input_ids):
    """The press entered last has the last word: its hook runs on what the first one left."""
    clear_masks(llama)
    cache = DynamicCache()
    first, second = PRESSES[outer](KnormPress(0.5)), PRESSES[name](KnormPress(0.25))
    with torch.no_grad(), first(llama), second(llama):
        llama.model(input_ids=input_ids, past_key_values=cache)
    assert [layer.keys.shape[2] for layer in cache.layers] == [24] * 4
    assert all(layer.values.isfinite().all() for layer in cache.layers)
    for press, n_evicted in ((first, 32), (second, 8)):
        assert [row["evicted"] for row in press.report.to_dict().values()] == [2 * n_evicted] * 4
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in attention_modules(llama))
    assert_equal(run(llama, first, input_ids), run(llama, PRESSES[outer](KnormPress(0.5)), input_ids))


@pytest.mark.parametrize("name", PRESSES)
def test_one_press_works_on_two_models(name, llama, input_ids):
    other = copy.deepcopy(llama)
    with torch.no_grad():
        other.model.layers[0].self_attn.v_proj.weight.mul_(2)
    press = PRESSES[name](CASES["AdaKV"].make())
    alone = [run(model, PRESSES[name](CASES["AdaKV"].make()), input_ids) for model in (llama, other)]
    caches = [DynamicCache(), DynamicCache()]
    clear_masks(llama)
    clear_masks(other)
    with torch.no_grad(), press(llama), press(other):
        for model, cache in zip((llama, other), caches):
            model.model(input_ids=input_ids, past_key_values=cache)
    for model, cache, expected in zip((llama, other), caches, alone):
        assert_equal(snapshot(model, cache), expected)
