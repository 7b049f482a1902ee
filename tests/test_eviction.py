# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0

import torch
from hypothesis import given
from hypothesis import strategies as st

from kvpress_merging import Eviction
from kvpress_merging.eviction import masked_positions


@given(st.data())
def test_kept_positions_in_any_order_give_ascending_survivors_and_evicted(data):
    k_len = data.draw(st.integers(1, 12))
    n_kept = data.draw(st.integers(0, k_len))
    heads = [data.draw(st.permutations(range(k_len)))[:n_kept] for _ in range(4)]
    eviction = Eviction.from_kept(torch.tensor(heads, dtype=torch.long).view(2, 2, n_kept), k_len)
    assert not eviction.is_ragged
    assert eviction.n_survivors == 4 * n_kept
    assert eviction.n_evicted == 4 * (k_len - n_kept)
    for row, kept in enumerate(heads):
        b, h = divmod(row, 2)
        survivors, slots = eviction.survivors[b, h].tolist(), eviction.slots[b, h].tolist()
        assert survivors == sorted(kept)
        assert [kept[slot] for slot in slots] == survivors
        assert eviction.evicted[b, h].tolist() == sorted(set(range(k_len)) - set(kept))


@given(st.data())
def test_masks_give_each_head_its_own_counts(data):
    k_len = data.draw(st.integers(1, 10))
    # 0: neither, 1: survivor, 2: evicted
    kinds = torch.tensor(
        data.draw(st.lists(st.lists(st.integers(0, 2), min_size=k_len, max_size=k_len), min_size=6, max_size=6))
    )
    kinds = kinds.view(2, 3, k_len)
    eviction = Eviction.from_masks(kinds == 1, kinds == 2)
    counts = eviction.counts or ((eviction.survivors.shape[-1], eviction.evicted.shape[-1]),) * 6
    for row, (n_survivors, n_evicted) in enumerate(counts):
        b, h = divmod(row, 3)
        expected = (kinds[b, h] == 1).nonzero().flatten().tolist()
        assert eviction.survivors[b, h, :n_survivors].tolist() == expected
        assert eviction.slots[b, h, :n_survivors].tolist() == expected
        assert eviction.evicted[b, h, :n_evicted].tolist() == (kinds[b, h] == 2).nonzero().flatten().tolist()
    assert eviction.n_survivors == int((kinds == 1).sum())
    assert eviction.n_evicted == int((kinds == 2).sum())
    assert eviction.is_ragged == (len(set(counts)) > 1)


def test_slots_may_differ_from_positions():
    is_survivor = torch.tensor([[[True, False, True, False]]])
    slot_of = torch.tensor([[[1, 0, 0, 0]]])
    eviction = Eviction.from_masks(is_survivor, ~is_survivor, slot_of)
    assert eviction.slots.tolist() == [[[1, 0]]]
    assert eviction.evicted.tolist() == [[[1, 3]]]


def test_kept_positions_are_worked_out_on_the_device_alone():
    eviction = Eviction.from_kept(torch.empty(1, 8, 65_536, dtype=torch.int64, device="meta"), 131_072)
    assert eviction.evicted.shape == (1, 8, 65_536)
    assert eviction.survivors.device.type == "meta"


def test_masked_positions_pass_over_those_beyond_the_cache():
    indices = [torch.tensor([0, 1, 0]), torch.tensor([1, 0, 0]), torch.tensor([2, 3, 7])]
    masked = masked_positions(indices, (2, 2, 4), torch.device("cpu"))
    assert masked.nonzero().tolist() == [[0, 1, 2], [1, 0, 3]]
    assert not masked_positions(None, (2, 2, 4), torch.device("cpu")).any()
