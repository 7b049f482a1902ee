# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from kernel_cases import random_rows

from kvpress_merging.kernels import nearby
from kvpress_merging.kernels.nearby import WINDOW, block_length, naive_nearest_nearby, nearest_nearby


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
    target = nearest_nearby(*(x[None] for x in (*rows, place, metric, value_metric)))[0]
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


def test_it_runs_over_a_few_blocks_at_a_time_and_finds_the_same(monkeypatch):
    n_heads, n_survivors, n_evicted, head_dim = 3, 400, 500, 8
    is_kept = torch.rand(n_heads, n_survivors + n_evicted, generator=torch.Generator().manual_seed(0))
    is_kept = is_kept.argsort(dim=-1).argsort(dim=-1) < n_survivors
    place = is_kept.cumsum(dim=-1)[~is_kept].view(n_heads, n_evicted)
    counts = (n_survivors, n_evicted)
    rows = [random_rows(n_heads, n, head_dim, seed=n + kind) for kind in (0, 1) for n in counts]
    metrics = torch.eye(head_dim).expand(n_heads, -1, -1), torch.ones(n_heads, 1, 1)
    expected = nearest_nearby(*rows, place, *metrics)
    for n_bytes in (1, 3 * 4 * n_heads * WINDOW * (2 * head_dim + 1 + block_length(n_survivors, n_evicted))):
        monkeypatch.setattr(nearby, "block_bytes", lambda device, n_bytes=n_bytes: n_bytes)
        assert torch.equal(nearest_nearby(*rows, place, *metrics), expected)
