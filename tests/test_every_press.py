# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""MergingPress around every press that kvpress has, and around some that it has not."""

from __future__ import annotations

import kvpress
import pytest
import torch
from every_press import CASES, REFUSED, AveragingPress, covered_classes
from kvpress import ComposedPress, KnormPress, KVPressTextGenerationPipeline, ThinKPress
from replay import N_CONTEXT, assert_merged, attention_modules, clear_masks, full_cache, input_ids_for, model_for, run
from transformers import DynamicCache

from kvpress_merging import MergingPress

# Not presses, or without anything of their own to run.
NOT_PRESSES = {kvpress.BasePress, kvpress.ScorerPress, KVPressTextGenerationPipeline}

AT_PREFILL = [name for name, case in CASES.items() if case.moment != "decoding"]

# What the bare presses of kvpress 0.5.5 cannot do; merging must fail with the same error there.
FAILS_WITH_BATCH = {
    "CriticalAdaKV",
    "KVzip",
    "KVzip layerwise",
    "KVzip plus",
    "KVzip by chunks",
    "KVgrad",
    "FastKVzip",
    "FastKVzip layerwise",
    "RestoreKV",
    "Finch",
    "Finch rerotating",
    "Finch by chunks",
}
REFUSED_WITH_BATCH = {"KVCompose", "KVCompose unstructured"}
FAILS_IN_EAGER = {
    "AdaKV",
    "CriticalAdaKV",
    "LUKV",
    "DuoAttention",
    "DMS",
    "DMS(KVzap)",
    "KVzip",
    "KVzip layerwise",
    "KVzip plus",
    "KVzip by chunks",
    "KVgrad",
    "FastKVzip",
    "FastKVzip layerwise",
    "RestoreKV",
    "Chunk",
    "ChunkKV",
    "EntropyGatedChunkKV",
    "Block",
}


def assert_fails_as_bare(model, case, input_ids):
    with pytest.raises(Exception) as bare_error:
        run(model, case.make(), input_ids)
    with pytest.raises(type(bare_error.value)) as error:
        run(model, MergingPress(case.make()), input_ids)
    assert str(error.value) == str(bare_error.value)


def test_every_press_that_kvpress_exports_is_covered():
    exported = {getattr(kvpress, name) for name in kvpress.__all__} - NOT_PRESSES
    missing = sorted(press.__name__ for press in exported - covered_classes())
    assert not missing, f"kvpress exports presses that the matrix does not know: {missing}"


@pytest.mark.parametrize("name", AT_PREFILL)
def test_survivors_are_those_of_the_bare_press_and_take_in_what_it_evicts(name, llama):
    case = CASES[name]
    model = model_for(case, llama)
    input_ids = input_ids_for(case)
    full = full_cache(case, model, input_ids)
    bare = run(model, case.make(), input_ids)
    press = MergingPress(case.make())
    merged = run(model, press, input_ids)
    n_merged = assert_merged(full, bare, merged)
    assert n_merged > 0
    assert sum(row["merged"] for row in press.report.to_dict().values()) == n_merged
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in attention_modules(model))


@pytest.mark.parametrize("name", AT_PREFILL)
def test_a_batch_of_three_is_merged_wherever_the_bare_press_takes_one(name, llama):
    case = CASES[name]
    model = model_for(case, llama)
    input_ids = input_ids_for(case, bsz=3)
    if name in REFUSED_WITH_BATCH:
        with pytest.raises(ValueError, match="batch of 3"):
            run(model, MergingPress(case.make()), input_ids)
        return
    if name in FAILS_WITH_BATCH:
        assert_fails_as_bare(model, case, input_ids)
        return
    full = run(model, None, input_ids)
    bare = run(model, case.make(), input_ids)
    assert assert_merged(full, bare, run(model, MergingPress(case.make()), input_ids)) > 0


@pytest.mark.parametrize("name", AT_PREFILL)
def test_eager_attention_works_wherever_it_does_for_the_bare_press(name, llama):
    case = CASES[name]
    model = model_for(case, llama)
    model.set_attn_implementation("eager")
    input_ids = input_ids_for(case)
    if name in FAILS_IN_EAGER:
        assert_fails_as_bare(model, case, input_ids)
        return
    full = full_cache(case, model, input_ids)
    bare = run(model, case.make(), input_ids)
    assert assert_merged(full, bare, run(model, MergingPress(case.make()), input_ids)) > 0


@pytest.mark.parametrize("name", REFUSED)
def test_a_press_with_nothing_to_merge_is_refused_at_construction(name):
    with pytest.raises(TypeError, match="merge"):
        MergingPress(REFUSED[name]())


def test_a_merging_press_composed_with_others_merges_in_its_turn(llama):
    model = model_for(CASES["Knorm"], llama)
    input_ids = input_ids_for(CASES["Knorm"])
    bare = run(model, ComposedPress([KnormPress(0.5), ThinKPress(0.3)]), input_ids)
    alone = run(model, MergingPress(KnormPress(0.5)), input_ids)
    composed = ComposedPress([MergingPress(KnormPress(0.5)), ThinKPress(0.3)])
    merged = run(model, composed, input_ids)
    for layer_bare, layer_alone, layer in zip(bare, alone, merged):
        assert torch.equal(layer.keys, layer_bare.keys)
        assert torch.equal(layer.values, layer_alone.values)
    assert composed.compression_ratio == 1 - 0.5 * (1 - 0.15)


def test_generate_goes_on_from_a_merged_cache(llama):
    model = model_for(CASES["Knorm"], llama)
    clear_masks(model)
    input_ids = input_ids_for(CASES["Knorm"])
    cache = DynamicCache()
    press = MergingPress(KnormPress(0.5))
    with press(model):
        out = model.generate(input_ids, past_key_values=cache, max_new_tokens=4, do_sample=False, eos_token_id=-1)
    assert out.shape[1] == N_CONTEXT + 4
    assert cache.get_seq_length() == N_CONTEXT // 2 + 3
    assert press.report.to_dict()[3]["merged"] > 0


def test_a_press_that_cannot_be_followed_is_told_what_can_be_and_its_cache_left_untouched(llama):
    model = model_for(CASES["Knorm"], llama)
    input_ids = input_ids_for(CASES["Knorm"])
    cache, untouched = DynamicCache(), DynamicCache()
    with pytest.raises(
        ValueError,
        match=r"^AveragingPress shortened the cache in a way that does not show which positions it kept, so what it "
        r"evicted cannot be merged: let it pick survivors by indexing, slicing, gathering or concatenating the keys "
        r"and values that it is given, or use it without merging\. The cache was left as it was\.$",
    ):
        run(model, MergingPress(AveragingPress()), input_ids, cache=cache)
    run(model, None, input_ids, cache=untouched)
    assert torch.equal(cache.layers[0].keys, untouched.layers[0].keys)
    assert torch.equal(cache.layers[0].values, untouched.layers[0].values)
