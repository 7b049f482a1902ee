# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Evictions during generation: each is merged once, and remembered until the next prefill."""

import pytest
import torch
from every_press import CASES
from kvpress import AdaKVPress, BasePress, DecodingPress, DMSPress, KnormPress, PrefillDecodingPress, SnapKVPress
from replay import Layer, assert_merged, attention_modules, clear_masks, decode, merge_in_float64, run
from transformers import DynamicCache

from kvpress_merging import MergingPress

WHILE_DECODING = [name for name, case in CASES.items() if case.moment == "decoding"]
N_PREFILL, N_DECODED = 64, 13


@pytest.fixture(scope="module")
def token_ids():
    return torch.randperm(180, generator=torch.Generator().manual_seed(3))[None, : N_PREFILL + N_DECODED] + 10


def state_of(cache, module) -> Layer:
    layer = cache.layers[module.layer_idx]
    is_masked = torch.zeros(layer.keys.shape[:3], dtype=torch.bool)
    if getattr(module, "masked_key_indices", None) is not None:
        is_masked[tuple(module.masked_key_indices)] = True
    return Layer(layer.keys.clone(), layer.values.clone(), is_masked)


def run_step_by_step(model, press, token_ids) -> list[tuple[int, int, Layer, Layer]]:
    """Each forward pass of each layer: step, layer, and the layer before and after the press."""
    steps: list[tuple[int, int, Layer, Layer]] = []
    before: dict[int, Layer] = {}
    step = -1

    def note_before(module, args, kwargs, output):
        before[module.layer_idx] = state_of(kwargs["past_key_values"], module)

    def note_after(module, args, kwargs, output):
        after = state_of(kwargs["past_key_values"], module)
        steps.append((step, module.layer_idx, before[module.layer_idx], after))

    clear_masks(model)
    modules = attention_modules(model)
    handles = [module.register_forward_hook(note_before, with_kwargs=True) for module in modules]
    cache = DynamicCache()
    with torch.no_grad(), press(model):
        handles += [module.register_forward_hook(note_after, with_kwargs=True) for module in modules]
        model.model(input_ids=token_ids[:, :N_PREFILL], past_key_values=cache)
        for step in range(N_DECODED):
            decode(model, cache, token_ids[:, N_PREFILL + step :][:, :1], N_PREFILL + step)
    for handle in handles:
        handle.remove()
    return steps


@pytest.mark.parametrize("name", WHILE_DECODING)
def test_up_to_the_first_eviction_the_cache_is_that_of_the_bare_press(name, llama, token_ids):
    bare = run_step_by_step(llama, CASES[name].make(), token_ids)
    merged = run_step_by_step(llama, MergingPress(CASES[name].make()), token_ids)
    assert len(bare) == len(merged)
    evicted = False
    for (step, layer_idx, bare_before, bare_after), (_, _, before, after) in zip(bare, merged):
        if evicted and layer_idx == 0:
            break
        assert torch.equal(bare_before.keys, before.keys)
        assert torch.equal(bare_after.keys, after.keys), (step, layer_idx)
        assert torch.equal(bare_after.is_masked, after.is_masked)
        evicted |= bool(not torch.equal(bare_after.values, after.values))
    assert evicted


@pytest.mark.parametrize("name", WHILE_DECODING)
def test_every_eviction_is_merged_once_from_the_cache_that_it_found(name, llama, token_ids):
    press = MergingPress(CASES[name].make())
    evictions = 0
    ever_masked: dict[int, torch.Tensor] = {}
    n_merged = 0
    for step, layer_idx, before, after in run_step_by_step(llama, press, token_ids):
        if step < 0:
            ever_masked.pop(layer_idx, None)
        k_len = before.keys.shape[2]
        earlier = torch.zeros(before.keys.shape[:3], dtype=torch.bool)
        if layer_idx in ever_masked:
            earlier[..., : ever_masked[layer_idx].shape[-1]] = ever_masked[layer_idx]
        shrunk = after.keys.shape[2] < k_len
        newly_masked = (after.is_masked & ~earlier).any() if not shrunk else False
        if not shrunk and not newly_masked:
            assert torch.equal(before.values, after.values)
            continue
        evictions += 1
        if shrunk:
            # what the bare press leaves of this very cache: the rows whose keys are still there
            slots = [
                [(before.keys[0, h] == key).all(-1).nonzero().item() for key in after.keys[0, h]]
                for h in range(after.keys.shape[1])
            ]
            index = torch.tensor(slots)[None, :, :, None].expand(*after.keys.shape)
            bare = Layer(
                after.keys, before.values.gather(2, index), torch.zeros(after.keys.shape[:3], dtype=torch.bool)
            )
            expected = merge_in_float64(before, bare)
        else:
            expected = merge_masked(before, after, earlier)
            ever_masked[layer_idx] = earlier | after.is_masked
        torch.testing.assert_close(after.values.double(), torch.from_numpy(expected.values), rtol=1e-4, atol=1e-5)
        n_merged += expected.n_merged
    assert evictions > 4
    assert sum(row["merged"] for row in press.report.to_dict().values()) == n_merged


def merge_masked(before: Layer, after: Layer, earlier: torch.Tensor):
    """As ``merge_in_float64``, with what was masked earlier neither evicted nor surviving."""
    values = before.values.double().clone()
    n_merged = 0
    for h in range(values.shape[1]):
        usable = ~earlier[0, h]
        survivors = (usable & ~after.is_masked[0, h]).nonzero().flatten()
        evicted = (usable & after.is_masked[0, h]).nonzero().flatten()
        units = torch.nn.functional.normalize(before.keys[0, h].double(), dim=-1)
        weights = torch.ones(values.shape[2], dtype=torch.float64)
        sums = before.values[0, h].double().clone()
        for i in evicted:
            cosines = units[survivors] @ units[i]
            j = survivors[cosines.argmax()]
            if cosines.max() < 0:
                continue
            norm_i, norm_j = before.values[0, h, i].double().norm(), before.values[0, h, j].double().norm()
            weight = cosines.max() * norm_i / (norm_i + norm_j)
            sums[j] += weight * before.values[0, h, i].double()
            weights[j] += weight
            n_merged += 1
        taken = weights > 1
        values[0, h, taken] = (sums / weights[:, None])[taken]

    class Expected:
        pass

    expected = Expected()
    expected.values, expected.n_merged = values.numpy(), n_merged
    return expected


@pytest.mark.parametrize("interval", [3, 4])
def test_the_bare_press_would_keep_the_same_positions_of_the_same_cache(interval, llama, token_ids):
    press = MergingPress(DecodingPress(KnormPress(), compression_interval=interval, target_size=40))
    shrunk = 0
    for _, _, before, after in run_step_by_step(llama, press, token_ids):
        if after.keys.shape[2] < before.keys.shape[2]:
            kept = before.keys.norm(dim=-1).neg().topk(40, dim=-1).indices
            expected = before.keys.gather(2, kept[..., None].expand(-1, -1, -1, before.keys.shape[-1]))
            assert torch.equal(after.keys, expected)
            shrunk += 1
    assert shrunk == 4 * (N_DECODED // interval)


def test_state_lives_over_contexts_until_the_next_prefill(llama, token_ids):
    """kvpress's pipeline enters the press once for the prefill and once more to decode."""
    press = MergingPress(DMSPress(KnormPress(), threshold=-3.2, sliding_window_size=8, decoding=True))
    one = run_step_by_step(llama, press, token_ids)[-4:]

    press = MergingPress(DMSPress(KnormPress(), threshold=-3.2, sliding_window_size=8, decoding=True))
    clear_masks(llama)
    cache = DynamicCache()
    with torch.no_grad():
        with press(llama):
            llama.model(input_ids=token_ids[:, :N_PREFILL], past_key_values=cache)
        with press(llama):
            decode(llama, cache, token_ids[:, N_PREFILL:], N_PREFILL)
    for (_, layer_idx, _, after), module in zip(one, attention_modules(llama)):
        assert module.layer_idx == layer_idx
        assert torch.equal(cache.layers[layer_idx].values, after.values)
    assert press.report.to_dict()[0]["evicted"] > 0
    run(llama, press, token_ids[:, :4])
    assert press.report.to_dict()[0]["evicted"] == 0


class ListWritingPress(BasePress):
    """Masks the two oldest positions left at each step, and writes them into the list that is there."""

    def forward_hook(self, module, input, kwargs, output):
        n_masked = 0 if module.masked_key_indices is None else len(module.masked_key_indices[0]) // 2
        new = [torch.zeros(4, dtype=torch.int64), torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1]) + n_masked]
        if module.masked_key_indices is None:
            module.masked_key_indices = new
        else:
            for part, more in enumerate(new):
                module.masked_key_indices[part] = torch.cat([module.masked_key_indices[part], more])
        return output


def test_masks_written_into_the_same_list_are_seen(llama, token_ids):
    press = MergingPress(ListWritingPress())
    for step, _, before, after in run_step_by_step(llama, press, token_ids):
        assert int(after.is_masked.sum()) == 4 * (step + 2)
        expected = merge_masked(before, after, before.is_masked)
        assert expected.n_merged > 0
        torch.testing.assert_close(after.values.double(), torch.from_numpy(expected.values), rtol=1e-4, atol=1e-5)
    assert press.report.to_dict()[0]["evicted"] == 4 * (N_DECODED + 1)


class ChangingItsMindPress(BasePress):
    """Masks positions 0-19 at prefill, then 30-49 instead, drops 0-4, and masks 10-59 at last."""

    def forward_hook(self, module, input, kwargs, output):
        layer = kwargs["past_key_values"].layers[module.layer_idx]
        position = int(kwargs["position_ids"].max())

        def mask(start, stop):
            positions = torch.arange(start, stop).repeat(2)
            heads = torch.arange(2).repeat_interleave(stop - start)
            module.masked_key_indices = (torch.zeros_like(heads), heads, positions)

        if position < N_PREFILL:
            mask(0, 20)
        elif position == N_PREFILL + 2:
            mask(30, 50)
        elif position == N_PREFILL + 4:
            layer.keys, layer.values = layer.keys[:, :, 5:], layer.values[:, :, 5:]
            mask(25, 45)  # the same ones, five places further down
        elif position == N_PREFILL + 6:
            mask(5, 55)
        return output


def test_what_was_masked_once_is_neither_evicted_again_nor_merged_into(llama, token_ids):
    press = MergingPress(ChangingItsMindPress())
    ever = {layer_idx: torch.zeros(0, dtype=torch.bool) for layer_idx in range(4)}
    n_merged: dict[int, list[int]] = {layer_idx: [] for layer_idx in range(4)}
    for _, layer_idx, before, after in run_step_by_step(llama, press, token_ids):
        k_len = before.keys.shape[2]
        earlier = torch.zeros(1, 2, k_len, dtype=torch.bool)
        earlier[..., : len(ever[layer_idx])] = ever[layer_idx][:k_len]
        if after.keys.shape[2] < k_len:  # what is dropped was masked before: there is nothing to merge
            assert torch.equal(after.values, before.values[:, :, 5:])
            ever[layer_idx] = ever[layer_idx][5:]
            continue
        expected = merge_masked(before, after, earlier)
        torch.testing.assert_close(after.values.double(), torch.from_numpy(expected.values), rtol=1e-4, atol=1e-5)
        ever[layer_idx] = (earlier | after.is_masked)[0, 0]
        n_merged[layer_idx] += [expected.n_merged] if expected.n_merged else []
    # in each of two heads 20, 20 others, and 20 of 10-59 that were in neither
    evicted = [row["evicted"] for row in press.report.to_dict().values()]
    assert evicted == [2 * (20 + 20 + 20)] * 4
    assert all(len(counts) == 3 for counts in n_merged.values())


def test_a_merging_press_in_the_prefill_of_another_press_merges(llama, token_ids):
    def both(wrap):
        return PrefillDecodingPress(
            wrap(SnapKVPress(0.5, window_size=16)), DecodingPress(KnormPress(), compression_interval=99)
        )

    full = run(llama, None, token_ids[:, :N_PREFILL])
    bare = run(llama, both(lambda press: press), token_ids[:, :N_PREFILL])
    assert assert_merged(full, bare, run(llama, both(MergingPress), token_ids[:, :N_PREFILL])) > 0


def test_a_merging_press_inside_a_decoding_press_merges(llama, token_ids):
    inner = MergingPress(AdaKVPress(KnormPress()))
    press = DecodingPress(inner, compression_interval=4, target_size=40)
    changed = 0
    for _, _, before, after in run_step_by_step(llama, press, token_ids):
        changed += not torch.equal(before.values, after.values)
    assert changed >= 4
    assert sum(row["merged"] for row in inner.report.to_dict().values()) > 0


def test_a_scorer_in_a_decoding_press_has_to_be_merged_from_outside():
    with pytest.raises(AssertionError, match="DecodingPress requires a ScorerPress"):
        DecodingPress(MergingPress(KnormPress()))
    MergingPress(DecodingPress(KnormPress()))


def test_dms_around_a_merging_press_raises_instead_of_dropping_the_merge(llama, token_ids):
    with pytest.raises(ValueError, match="without merging"):
        run(llama, DMSPress(MergingPress(KnormPress()), threshold=0.0), token_ids[:, :N_PREFILL])
