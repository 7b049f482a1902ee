# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from kvpress_merging.kernels.nearby import WINDOW, naive_nearest_nearby, nearest_nearby


@pytest.mark.parametrize("n_kept", [1, 50, WINDOW, WINDOW + 1, 400, 700, 899])
def test_the_nearest_is_looked_for_among_the_survivors_around(n_kept):
    generator = torch.Generator().manual_seed(3)
    k_len, head_dim = 900, 6
    keys = torch.randn(k_len, head_dim, generator=generator)
    is_kept = torch.zeros(k_len, dtype=torch.bool)
    is_kept[torch.randperm(k_len, generator=generator)[:n_kept]] = True
    survivors, evicted = is_kept.nonzero()[:, 0], (~is_kept).nonzero()[:, 0]
    place = torch.searchsorted(survivors, evicted)
    root = torch.randn(head_dim, head_dim, generator=generator)
    metric = root @ root.T + 0.1 * torch.eye(head_dim)
    target = nearest_nearby(keys[survivors][None], keys[evicted][None], place[None], metric[None])[0]
    assert target.equal(naive_nearest_nearby(keys[survivors].double(), keys[evicted].double(), place, metric.double()))
    factor = torch.linalg.cholesky(metric)
    distance = torch.cdist(keys[evicted] @ factor, keys[survivors] @ factor)
    if n_kept <= WINDOW:
        assert target.equal(distance.argmin(dim=1))
    # some before and some behind are always among those looked at
    for i in range(len(evicted)):
        around = distance[i, max(0, place[i] - 10) : place[i] + 10]
        assert distance[i, target[i]] <= around.min() + 1e-4
