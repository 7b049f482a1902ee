# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Layers with a sliding window are merged wherever the bare press evicts from them."""

import pytest
import torch
from every_press import CASES
from replay import assert_merged, clear_masks, run
from tiny import tiny_checkpoint
from transformers import DynamicCache

from kvpress_merging import AttentionMatchingPress, MergingPress

WINDOW = 32
# One of each kind that bare kvpress 0.5.5 can use on Gemma3: by shrinking, by mask in compress and in the forward hook,
# and when its context exits.
PRESSES = ["Knorm", "SnapKV", "Composed", "AdaKV", "DMS", "FastKVzip"]


@pytest.fixture(scope="module", params=["gemma3_text", "gemma3"])
def model(request, tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp(request.param), request.param, sliding_window=WINDOW)[0]


def new_cache(model, of_model: bool) -> DynamicCache:
    """As kvpress's pipeline makes it, or with the model's layers: then sliding ones keep their window alone."""
    return DynamicCache(config=model.config) if of_model else DynamicCache()


def input_ids(k_len: int, bsz: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.stack([torch.randperm(240, generator=generator)[:k_len] + 10 for _ in range(bsz)])


def outcome(model, press, ids, cache, more=None):
    """The layers after a run, or the error that it ended in: bare presses cannot be used on all of Gemma3."""
    try:
        return run(model, press, ids, more, cache=cache), None
    except Exception as error:
        return None, (type(error), str(error))


@pytest.mark.parametrize("k_len", [20, WINDOW - 1, WINDOW, 64])
@pytest.mark.parametrize("of_model", [False, True], ids=["plain cache", "cache of the model"])
@pytest.mark.parametrize("name", PRESSES)
def test_what_the_bare_press_evicts_is_merged(name, of_model, k_len, model):
    case, ids = CASES[name], input_ids(k_len)
    bare, bare_error = outcome(model, case.make(), ids, new_cache(model, of_model))
    if bare_error is not None:
        assert outcome(model, MergingPress(case.make()), ids, new_cache(model, of_model)) == (None, bare_error)
        return
    full = run(model, None, ids, cache=new_cache(model, of_model))
    has_survivors = [layer.is_masked.any(-1) & ~layer.is_masked.all(-1) for layer in bare]
    if not any(map(torch.any, has_survivors)) and all(a.keys.shape == b.keys.shape for a, b in zip(bare, full)):
        pytest.skip(f"bare {name} evicts all of a head or nothing here")
    press = MergingPress(case.make())
    merged = run(model, press, ids, cache=new_cache(model, of_model))
    assert assert_merged(full, bare, merged) == sum(row["merged"] for row in press.report.to_dict().values()) > 0
    evicted_from = [
        i
        for i, (layer_full, layer) in enumerate(zip(full, bare))
        if layer.is_masked.any() or layer.keys.shape != layer_full.keys.shape
    ]
    assert [i for i, row in press.report.to_dict().items() if row["evicted"]] == evicted_from


@pytest.mark.parametrize("of_model", [False, True], ids=["plain cache", "cache of the model"])
@pytest.mark.parametrize("name", ["Knorm", "AdaKV", "FastKVzip"])
def test_matching_reaches_sliding_layers_too(name, of_model, model):
    if name == "FastKVzip" and (of_model or hasattr(model.config, "text_config")):
        pytest.skip("bare FastKVzipPress cannot be used on these")
    ids = input_ids(64)
    bare = run(model, CASES[name].make(), ids, cache=new_cache(model, of_model))
    press = AttentionMatchingPress(CASES[name].make(), n_queries=16)
    matched = run(model, press, ids, cache=new_cache(model, of_model))
    for i, row in press.report.to_dict().items():
        assert torch.equal(matched[i].is_masked, bare[i].is_masked)
        assert torch.equal(matched[i].values, bare[i].values) == (row["heads_fitted"] == 0)
    sliding = [i for i, kind in enumerate(model.config.get_text_config().layer_types) if kind == "sliding_attention"]
    is_conditional = hasattr(model.config, "text_config")
    for i in () if is_conditional else sliding:
        assert press.report.to_dict()[i]["heads"] == 2
        assert press.report.to_dict()[i]["error_before"] > 0


@pytest.mark.parametrize("of_model", [False, True], ids=["plain cache", "cache of the model"])
@pytest.mark.parametrize("name", ["Decoding", "DMS while decoding"])
def test_while_decoding_the_window_moves_on_and_what_was_masked_with_it(name, of_model, model):
    ids, more = input_ids(24), input_ids(40)[:, 24:]
    press = MergingPress(CASES[name].make())
    bare_cache, cache = new_cache(model, of_model), new_cache(model, of_model)
    bare, bare_error = outcome(model, CASES[name].make(), ids, bare_cache, more)
    merged, error = outcome(model, press, ids, cache, more)
    assert error == bare_error
    for layer_bare, layer in zip(bare or [], merged or [], strict=True):
        assert layer.keys.shape == layer_bare.keys.shape


def test_positions_that_left_the_window_are_no_padding(model):
    """In a padded batch some tokens are masked for all, others only for those that come later."""
    ids, n_padding = input_ids(64, bsz=2), 9
    ids[0, :n_padding] = 2
    mask = torch.ones_like(ids)
    mask[0, :n_padding] = 0
    press, cache = MergingPress(CASES["Knorm"].make()), DynamicCache()
    clear_masks(model)
    with torch.no_grad(), press(model):
        model.model(input_ids=ids, attention_mask=mask, past_key_values=cache)
    alone = MergingPress(CASES["Knorm"].make())
    clear_masks(model)
    with torch.no_grad(), alone(model):
        model.model(input_ids=ids[1:], past_key_values=DynamicCache())
    for i, row in alone.report.to_dict().items():
        # The padded row keeps as many slots; some of them may hold padding, which is neither kept nor evicted.
        assert 2 * row["evicted"] - 2 * n_padding <= press.report.to_dict()[i]["evicted"] <= 2 * row["evicted"]
