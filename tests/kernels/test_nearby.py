# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from kvpress_merging.kernels import rows as rows_module
from kvpress_merging.kernels.nearby import WINDOW, block_length, naive_nearest_nearby, nearest_nearby
from kvpress_merging.kernels.rows import flat_rows, gather_rows


def search(keys, values, survivors, evicted, metric, value_metric, length=None):
    """
    The survivor of each evicted position, for heads that lost unequally many.

    ``survivors`` and ``evicted`` are lists of positions, one of each head.
    """
    n_heads, k_len, _ = keys.shape
    rows = torch.cat([torch.cat([keys, values], dim=-1), torch.zeros(n_heads, 1, keys.shape[2] + values.shape[2])], 1)
    lists = [torch.nn.utils.rnn.pad_sequence(side, True, padding_value=k_len) for side in (survivors, evicted)]
    counts = [(len(kept), len(gone)) for kept, gone in zip(survivors, evicted)]
    length = length or block_length(*(sum(column) for column in zip(*counts)))
    of_survivors = gather_rows(rows, flat_rows(lists[0], k_len + 1))
    moved, target = nearest_nearby(rows, of_survivors, *lists, counts, metric, value_metric, length)
    found = dict(zip(moved.tolist(), target.tolist()))
    return [
        torch.tensor([found[h * (k_len + 1) + int(i)] - h * lists[0].shape[1] for i in gone])
        for h, gone in enumerate(evicted)
    ]


@pytest.mark.parametrize("n_kept", [1, 50, WINDOW, WINDOW + 1, 400, 700, 899])
def test_the_nearest_is_looked_for_among_the_survivors_around(n_kept):
    generator = torch.Generator().manual_seed(3)
    k_len, head_dim = 900, 6
    keys = torch.randn(k_len, head_dim, generator=generator)
    values = torch.randn(k_len, 3, generator=generator)
    is_kept = torch.zeros(k_len, dtype=torch.bool)
    is_kept[torch.randperm(k_len, generator=generator)[:n_kept]] = True
    survivors, evicted = is_kept.nonzero()[:, 0], (~is_kept).nonzero()[:, 0]
    place = torch.searchsorted(survivors, evicted)
    root = torch.randn(head_dim, head_dim, generator=generator)
    metric = root @ root.T + 0.1 * torch.eye(head_dim)
    rows = keys[survivors], keys[evicted], values[survivors], values[evicted]
    value_metric = torch.tensor([[2.5]])
    (target,) = search(keys[None], values[None], [survivors], [evicted], metric[None], value_metric[None])
    in_float64 = [x.double() for x in rows]
    assert target.equal(naive_nearest_nearby(*in_float64, place, metric.double(), value_metric.double()))
    points = torch.cat([keys @ torch.linalg.cholesky(metric), values * 2.5**0.5], dim=1)
    distance = torch.cdist(points[evicted], points[survivors])
    if n_kept <= WINDOW:
        assert target.equal(distance.argmin(dim=1))
    # some before and some behind are always among those looked at
    for i in range(len(evicted)):
        around = distance[i, max(0, place[i] - 10) : place[i] + 10]
        assert distance[i, target[i]] <= around.min() + 1e-4


@pytest.mark.parametrize(
    ("n_survivors", "n_evicted", "length"),
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
def test_as_many_evicted_positions_share_a_window_as_lie_within_its_middle_half(n_survivors, n_evicted, length):
    assert block_length(n_survivors, n_evicted) == length


def heads_of_unequal_size(seed=0):
    generator = torch.Generator().manual_seed(seed)
    k_len, head_dim = 700, 8
    keys, values = (torch.randn(5, k_len, head_dim, generator=generator) for _ in "kv")
    order = [torch.randperm(k_len, generator=generator) for _ in range(5)]
    # The last position of some heads is in neither list, and two heads have nothing to look for.
    survivors = [some[:n].sort().values for some, n in zip(order, (40, 300, 0, 620, 700))]
    evicted = [some[n:m].sort().values for some, n, m in zip(order, (40, 300, 0, 620, 700), (690, 700, 300, 650, 700))]
    root = torch.randn(5, head_dim, head_dim, generator=generator)
    return keys, values, survivors, evicted, root @ root.mT + torch.eye(head_dim), torch.rand(5, 1, 1) + 1


@pytest.mark.parametrize("length", [1, 8, 128])
def test_heads_of_unequal_size_find_what_each_finds_alone(length):
    keys, values, survivors, evicted, metric, value_metric = heads_of_unequal_size()
    evicted[2] = evicted[2][:0]
    found = search(keys, values, survivors, evicted, metric, value_metric, length)
    for h, (kept, gone) in enumerate(zip(survivors, evicted)):
        rows = (keys[h, kept], keys[h, gone], values[h, kept], values[h, gone])
        expected = naive_nearest_nearby(*rows, torch.searchsorted(kept, gone), metric[h], value_metric[h], length)
        assert found[h].tolist() == expected.tolist()


def test_a_head_without_survivors_is_passed_over():
    keys, values, survivors, evicted, metric, value_metric = heads_of_unequal_size()
    with pytest.raises(KeyError):
        search(keys, values, survivors, evicted, metric, value_metric)
    others = [0, 1, 3, 4]
    alone = search(
        *(x[others] for x in (keys, values)),
        *([x[h] for h in others] for x in (survivors, evicted)),
        metric[others],
        value_metric[others],
        16,
    )
    evicted[2] = evicted[2][:0]
    together = search(keys, values, survivors, evicted, metric, value_metric, 16)
    for h, expected in zip(others, alone):
        assert together[h].equal(expected)


@pytest.mark.parametrize("n_bytes", [1, 3 * 4 * 256 * 32])
def test_it_runs_over_a_few_blocks_at_a_time_and_finds_the_same(monkeypatch, n_bytes):
    keys, values, survivors, evicted, metric, value_metric = heads_of_unequal_size()
    evicted[2] = evicted[2][:0]
    expected = search(keys, values, survivors, evicted, metric, value_metric, 16)
    monkeypatch.setattr(rows_module, "_CPU_BLOCK_BYTES", n_bytes)
    for ours, theirs in zip(search(keys, values, survivors, evicted, metric, value_metric, 16), expected):
        assert ours.equal(theirs)
