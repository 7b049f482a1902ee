# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""How heads of unequal size are cut into buckets and blocks, and laid out in them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvpress_merging.kernels.buckets import (
    find_buckets,
    head_slices,
    is_padding,
    on_device,
    pack,
    unpack,
    whole_groups,
)

counts_of_heads = st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)), min_size=1, max_size=70)


@given(counts_of_heads)
def test_each_head_that_has_to_be_searched_is_in_one_bucket_that_holds_it(counts):
    buckets = find_buckets(counts)
    heads = [int(head) for bucket in buckets for head in bucket.heads]
    assert sorted(heads) == [head for head, (n, m) in enumerate(counts) if n and m]
    for bucket in buckets:
        assert bucket.n_survivors == max(whole_groups(counts[head][0]) for head in bucket.heads)
        assert bucket.n_evicted == max(whole_groups(counts[head][1]) for head in bucket.heads)


@given(st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 3000)), min_size=1, max_size=60))
def test_padding_adds_at_most_a_quarter_to_the_products(counts):
    needed = sum(whole_groups(n) * whole_groups(m) for n, m in counts)
    buckets = find_buckets(counts)
    assert sum(len(bucket.heads) * bucket.n_survivors * bucket.n_evicted for bucket in buckets) <= 1.25 * needed


def test_no_fewer_buckets_would_do():
    assert len(find_buckets([(100, 900)] * 5)) == 1
    assert len(find_buckets([(96, 896)] * 5 + [(896, 96)] * 5)) == 2
    # Of 48 heads that share 1,024 positions with their survivors in any proportion.
    heads = [(int(n), 1024 - int(n)) for n in np.linspace(102, 922, 48)]
    assert len(find_buckets(heads)) <= 8


def test_heads_without_survivors_or_without_losses_need_no_bucket():
    assert find_buckets([(0, 5), (7, 0)]) == []
    assert [bucket.heads.tolist() for bucket in find_buckets([(0, 5), (7, 3), (7, 0)])] == [[1]]


@given(counts_of_heads)
def test_what_is_packed_is_each_heads_own_and_comes_back_to_its_place(counts):
    buckets = find_buckets(counts)
    if not buckets:
        return
    max_survivors, max_evicted = (max(column) for column in zip(*counts))
    width = max_survivors + max_evicted
    packed, answers, first = pack(counts, buckets, width, max_survivors), [], 0
    for bucket in buckets:
        for side, n_padded, first_column in ((0, bucket.n_survivors, 0), (1, bucket.n_evicted, max_survivors)):
            for head in bucket.heads:
                entries, n_real = packed[first : first + n_padded] - head * width - first_column, counts[head][side]
                assert entries[:n_real].tolist() == list(range(n_real))
                assert (entries[n_real:] == 0).all()
                if side:
                    answers += [(int(head), i) for i in range(n_padded)]
                first += n_padded
    assert first == len(packed)
    places = unpack(buckets, len(counts), max_evicted)
    for head, (n_survivors, n_evicted) in enumerate(counts):
        if n_survivors:
            assert [answers[place] for place in places[head, :n_evicted]] == [(head, i) for i in range(n_evicted)]


def test_padding_of_a_table_is_what_lies_behind_each_heads_own():
    expected = [[False, True, True, False, False], [False, False, False, False, True]]
    assert is_padding([(1, 2), (3, 1)], 3, 2).tolist() == expected


@pytest.mark.parametrize(
    ("max_bytes", "block_bytes", "slices"),
    [
        (10, 4, [(0, 4)]),
        (9, 4, [(0, 2), (2, 3), (3, 4)]),
        (9, 1, [(0, 1), (1, 2), (2, 3), (3, 4)]),
        (9, 6, [(0, 2), (2, 4)]),
    ],
)
def test_heads_are_worked_on_in_one_go_or_in_blocks_that_fit(max_bytes, block_bytes, slices):
    found = head_slices([1, 3, 4, 2], max_bytes, block_bytes)
    assert [(part.start, part.stop) for part in found] == slices


def test_what_the_host_worked_out_arrives_as_it_is():
    array = np.arange(6).reshape(2, 3)
    assert torch.equal(on_device(array, torch.device("cpu")), torch.arange(6).view(2, 3))
    assert on_device(array, torch.device("meta")).shape == (2, 3)
