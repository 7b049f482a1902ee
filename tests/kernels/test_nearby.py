# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch

from kvpress_merging.kernels import rows as rows_module
from kvpress_merging.kernels.nearby import (
    BLOCK,
    WINDOW,
    block_length,
    clusters,
    naive_clusters,
    nearest_nearby,
    points_of,
)


def place_of(keys, values, survivors, evicted, metric, length=None, **options):
    """
    What :func:`clusters` gives for heads that lost unequally many: places of all positions, and exchanges, of each.

    ``survivors`` and ``evicted`` are lists of positions, one of each head.
    """
    n_heads, k_len, _ = keys.shape
    rows = [torch.nn.functional.pad(part, (0, 0, 0, BLOCK - k_len % BLOCK)) for part in (keys, values)]
    is_nowhere = torch.ones(rows[0].shape[:2], dtype=torch.bool)
    for h in range(n_heads):
        is_nowhere[h, survivors[h]] = is_nowhere[h, evicted[h]] = False
    padded = torch.nn.utils.rnn.pad_sequence(survivors, True, padding_value=k_len)
    counts = np.array([(len(kept), len(gone)) for kept, gone in zip(survivors, evicted)])
    length = length or block_length(*counts.sum(axis=0).tolist())
    place, n_exchanged = clusters(points_of(*rows, *metric), is_nowhere, padded, counts, length, **options)
    return place[:, :k_len] - torch.arange(n_heads)[:, None] * padded.shape[1], n_exchanged.tolist()


def a_metric(n_heads: int, head_dim: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Of keys, and how much values count."""
    root = torch.randn(n_heads, head_dim, head_dim, generator=generator)
    return root @ root.mT + torch.eye(head_dim), torch.rand(n_heads, 1, 1, generator=generator) + 1


def naive_place_of(keys, values, survivors, evicted, metric, h, length, **options):
    rows, of_head = (keys[h].double(), values[h].double()), (metric[0][h].double(), metric[1][h].double()[0])
    return naive_clusters(*rows, survivors[h], evicted[h], *of_head, length, **options)


def one_head(n_kept: int, k_len: int = 900):
    generator = torch.Generator().manual_seed(3)
    keys = torch.randn(1, k_len, 6, generator=generator)
    values = torch.randn(1, k_len, 3, generator=generator)
    kept = torch.randperm(k_len, generator=generator)[:n_kept].sort().values
    return keys, values, kept, torch.tensor(sorted(set(range(k_len)) - set(kept.tolist()))), a_metric(1, 6, generator)


@pytest.mark.parametrize("n_kept", [1, 50, WINDOW, WINDOW + 1, 400, 700, 899])
def test_the_nearest_is_looked_for_among_the_centres_around(n_kept):
    keys, values, kept, gone, metric = one_head(n_kept)
    place, n_exchanged = place_of(keys, values, [kept], [gone], metric, exchange=False)
    assert n_exchanged == [0]
    assert place[0, kept].tolist() == list(range(n_kept))
    expected = naive_place_of(
        keys, values, [kept], [gone], metric, 0, block_length(n_kept, 900 - n_kept), exchange=False
    )
    assert place[0].equal(expected[1])
    points = torch.cat([keys[0] @ torch.linalg.cholesky(metric[0][0]), values[0] * metric[1][0]], dim=1)
    distance = torch.cdist(points[gone], points[kept])
    if n_kept <= WINDOW:
        assert place[0, gone].equal(distance.argmin(dim=1))
    # some before and some behind are always among those looked at
    before = torch.searchsorted(kept, gone)
    for i, position in enumerate(gone):
        around = distance[i, max(0, before[i] - 10) : before[i] + 10]
        assert distance[i, place[0, position]] <= around.min() + 1e-4


@pytest.mark.parametrize(
    ("n_centres", "n_positions", "length"),
    [
        (128, 128, 128),
        (1, 1, 128),
        (2, 1, 64),
        (100, 7, 8),
        (100, 5, 4),
        (100, 3, 2),
        (100, 1, 1),
        (1000, 10, 1),
        (0, 1, 128),
        (0, 0, 1),
    ],
)
def test_as_many_positions_share_a_window_as_lie_within_its_middle_half(n_centres, n_positions, length):
    assert block_length(n_centres, n_positions) == length


def heads_of_unequal_size(seed=0):
    generator = torch.Generator().manual_seed(seed)
    k_len, head_dim = 700, 8
    keys, values = (torch.randn(5, k_len, head_dim, generator=generator) for _ in "kv")
    order = [torch.randperm(k_len, generator=generator) for _ in range(5)]
    # The last position of some heads is in neither list, one head has no survivor and one lost nothing.
    survivors = [some[:n].sort().values for some, n in zip(order, (40, 300, 0, 620, 700))]
    evicted = [some[n:m].sort().values for some, n, m in zip(order, (40, 300, 0, 620, 700), (690, 700, 300, 650, 700))]
    for h, twins in ((0, 20), (1, 90), (3, 300)):  # some survivors have a twin, some of these in another window
        which = torch.randperm(len(survivors[h]), generator=generator)[: 2 * twins].view(2, -1)
        for table in (keys, values):
            table[h, survivors[h][which[0]]] = table[h, survivors[h][which[1]]] + 0.1 * torch.randn(twins, head_dim)
    return keys, values, survivors, evicted, a_metric(5, head_dim, generator)


@pytest.mark.parametrize("length", [1, 8, 128])
@pytest.mark.parametrize("exchange", [True, False])
def test_heads_of_unequal_size_find_what_each_finds_alone(length, exchange):
    layer = heads_of_unequal_size()
    found, n_exchanged = place_of(*layer, length, exchange=exchange)
    for h, (kept, gone) in enumerate(zip(*layer[2:4])):
        if len(kept):
            has_place, expected = naive_place_of(*layer, h, length, exchange=exchange)
            listed = torch.cat([kept, gone])
            assert found[h, listed].equal(expected[listed])
            assert n_exchanged[h] == len(set(has_place.tolist()) - set(kept.tolist()))
    assert n_exchanged[2] == n_exchanged[4] == 0
    assert exchange == (min(n_exchanged[h] for h in (0, 1, 3)) >= 10)


@pytest.mark.parametrize("n_bytes", [1, 3 * 4 * 256 * 32])
def test_it_runs_over_a_few_blocks_at_a_time_and_finds_the_same(monkeypatch, n_bytes):
    layer = heads_of_unequal_size()
    expected = place_of(*layer, 16)
    monkeypatch.setattr(rows_module, "_CPU_BLOCK_BYTES", n_bytes)
    found = place_of(*layer, 16)
    assert found[0].equal(expected[0])
    assert found[1] == expected[1]


# Which places are given away.


def on_a_line(numbers: list[float], kept: list[int]) -> tuple[list[int], int]:
    """Places of positions that are numbers, and how many were exchanged."""
    keys = torch.tensor(numbers)[None, :, None]
    gone = [i for i in range(len(numbers)) if i not in kept]
    metric = torch.ones(1, 1, 1), torch.zeros(1, 1, 1)
    place, n_exchanged = place_of(keys, torch.zeros_like(keys), [torch.tensor(kept)], [torch.tensor(gone)], metric)
    return place[0].tolist(), n_exchanged[0]


def test_the_later_of_two_alike_gives_its_place_to_what_is_twice_as_far_from_all():
    # Position 1 is near position 0, which stays; the last is far from both.
    assert on_a_line([0.0, 1.0, 9.0, 3.1], [0, 1, 2]) == ([0, 0, 2, 1], 1)
    # As far from position 1 as that is from position 0, or a little less than twice.
    assert on_a_line([0.0, 1.0, 9.0, 2.0], [0, 1, 2]) == ([0, 1, 2, 1], 0)
    assert on_a_line([0.0, 1.0, 9.0, 2.9], [0, 1, 2]) == ([0, 1, 2, 1], 0)


def test_nearest_pairs_and_farthest_positions_go_first():
    numbers = [0.0, 1.0, 50.0, 50.5, 100.0, 20.0, 75.0, 102.0]
    # 75 is 24.5 from all, 20 is 19: both get a place, the farther one that of 50.5; 102 is not twice as far as 1.
    assert on_a_line(numbers, [0, 1, 2, 3, 4]) == ([0, 0, 2, 2, 4, 1, 3, 4], 2)


def test_of_many_that_are_alike_one_stays():
    # The position at 10 is as far from the one at 0 as from the one at 20.
    place, n_exchanged = on_a_line([0.0, 0.1, 0.2, 0.3, 10.0, 20.0, 30.0, 40.0], [0, 1, 2, 3])
    assert n_exchanged == 3
    assert place[:5] == [0, 0, 0, 0, 0]
    assert sorted(place[5:]) == [1, 2, 3]


def test_equal_positions_are_not_exchanged_for_one_another():
    assert on_a_line([1.0] * 300, list(range(0, 300, 2)))[1] == 0


def test_a_single_survivor_keeps_its_place():
    assert on_a_line([0.0, 5.0, 9.0], [1]) == ([0, 0, 0], 0)


def test_a_position_that_is_a_centre_looks_for_another():
    points = torch.tensor([0.0, 1.0, 3.0, 0.0])[None, :, None]
    square = torch.tensor([[0.0, 1.0, 9.0, torch.inf]])
    row, n = torch.arange(4)[None], np.array([3])
    nearest = nearest_nearby(points, square, torch.tensor([[0, 1, 2]]), n, row, np.array([4]), 4, others=True)
    assert nearest[0, :3].tolist() == [1, 0, 1]
