# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Rows of a layer: walked, gathered, scattered, measured, added up."""

from __future__ import annotations

import warnings
from unittest import mock

import pytest
import torch
from kernel_cases import random_layer, random_rows

from kvpress_merging.kernels import rows as rows_module
from kvpress_merging.kernels.rows import (
    DEFAULT_TILE_BYTES,
    add_rows_,
    adds_in_order,
    block_bytes,
    first_rows,
    gather_rows,
    head_blocks,
    row_norms,
    scatter_rows,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
META = torch.device("meta")


def test_a_cpu_works_on_what_its_caches_hold_and_other_devices_on_what_they_are_told():
    assert block_bytes(CUDA) == DEFAULT_TILE_BYTES == 64 * 2**20
    assert block_bytes(CPU) == 16 * 2**20
    assert block_bytes(CPU, 1000) == block_bytes(CUDA, 1000) == 1000


def test_a_cpu_alone_adds_in_the_order_of_the_rows():
    assert adds_in_order(CPU)
    assert not adds_in_order(CUDA)
    assert not adds_in_order(META)


def test_heads_laid_end_to_end_begin_where_the_one_before_ends():
    assert first_rows(3, 7, CPU).tolist() == [[0], [7], [14]]
    assert first_rows(2, 7, META).device == META


@pytest.mark.parametrize(
    ("heads_per_block", "blocks"), [(1, [(0, 1), (1, 2), (2, 3)]), (2, [(0, 2), (2, 3)]), (3, [(0, 3)]), (9, [(0, 3)])]
)
def test_even_evictions_are_walked_in_blocks_of_heads(heads_per_block, blocks):
    eviction = random_layer(2, 3, 10, 4).eviction
    expected = [(b, slice(*heads), 4, 6) for b in range(2) for heads in blocks]
    assert list(head_blocks(eviction, heads_per_block)) == expected


def test_ragged_evictions_are_walked_head_by_head_with_their_own_counts():
    eviction = random_layer(2, 3, 40, 12, kind="ragged").eviction
    walked = list(head_blocks(eviction, 5))
    assert [(b, heads) for b, heads, *_ in walked] == [(b, slice(h, h + 1)) for b in range(2) for h in range(3)]
    assert tuple((n_survivors, n_evicted) for *_, n_survivors, n_evicted in walked) == eviction.counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_gathered_by_position_from_each_head(dtype):
    rows = random_rows(3, 7, 5, seed=0, dtype=dtype)
    positions = torch.tensor([[6, 0, 0, 3], [1, 1, 1, 1], [5, 4, 3, 2]])
    gathered = gather_rows(rows, positions)
    assert gathered.dtype == dtype
    assert torch.equal(gathered, rows.gather(1, positions[..., None].expand(-1, -1, 5)))
    view = random_rows(3, 9, 5, seed=1, dtype=dtype)[:, 1:8]
    assert torch.equal(gather_rows(view, positions), gather_rows(view.clone(), positions))


def test_rows_are_scattered_to_their_positions_and_others_stay():
    rows, new = random_rows(2, 6, 3, seed=0), random_rows(2, 2, 3, seed=1)
    before, positions = rows.clone(), torch.tensor([[4, 0], [1, 5]])
    scatter_rows(rows, positions, new)
    for h in range(2):
        assert torch.equal(rows[h, positions[h]], new[h])
        others = [position for position in range(6) if position not in positions[h]]
        assert torch.equal(rows[h, others], before[h, others])


def test_gathering_and_scattering_stay_on_the_rows_device():
    rows, positions = torch.empty(2, 6, 3, device=META), torch.empty(2, 4, dtype=torch.int64, device=META)
    assert gather_rows(rows, positions).shape == (2, 4, 3)
    scatter_rows(rows, positions, torch.empty(2, 4, 3, device=META))


def test_norms_are_float64_of_float32_rows_and_finite_where_these_are():
    rows = torch.tensor([[[[3.0, 4.0], [1e30, 1e30], [0.0, 0.0], [torch.inf, 1.0], [torch.nan, 1.0]]]])
    norms = row_norms(rows)
    assert norms.dtype == torch.float64
    assert norms.shape == (1, 1, 5)
    assert norms[0, 0, :3].tolist() == [5.0, pytest.approx(2**0.5 * 1e30), 0.0]
    assert norms.isfinite().tolist() == [[[True, True, True, False, False]]]
    # Beyond float32's range, where a float64 row is not finite to the kernels either.
    assert row_norms(torch.tensor([[[[1e200]]]], dtype=torch.float64)).isinf().all()
    assert row_norms(torch.empty(1, 2, 3, 4, dtype=torch.bfloat16, device=META)).device == META


@pytest.mark.parametrize("n_bytes", [1, 8 * 4 * 3, 8 * 4 * 10, 8 * 4 * 21, 10**9])
def test_norms_are_the_same_whatever_is_copied_at_once(n_bytes, monkeypatch):
    rows = random_rows(2, 3, 10, 4, seed=0)
    monkeypatch.setattr(rows_module, "_CPU_COPY_BYTES", n_bytes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # as of results that have to be given another shape
        assert torch.equal(row_norms(rows), rows.double().norm(dim=-1))


@pytest.mark.parametrize(
    ("n_bytes", "most_rows"), [(1, 1), (8 * 4 * 3, 3), (8 * 4 * 10 - 1, 9), (8 * 4 * 10, 10), (8 * 4 * 21, 20)]
)
def test_norms_copy_as_many_rows_at_once_as_they_are_told_and_no_more(n_bytes, most_rows, monkeypatch):
    monkeypatch.setattr(rows_module, "_CPU_COPY_BYTES", n_bytes)
    with mock.patch.object(torch.linalg, "vector_norm", wraps=torch.linalg.vector_norm) as vector_norm:
        row_norms(random_rows(2, 3, 10, 4, seed=0))
    blocks = [call.args[0] for call in vector_norm.call_args_list]
    assert max(block.shape[:-1].numel() for block in blocks) == most_rows
    with mock.patch.object(torch.linalg, "vector_norm") as vector_norm:
        row_norms(torch.empty(2, 3, 2**20, 4, device=META))  # 32 MiB a head, of 64 that another device takes
    assert [call.args[0].shape for call in vector_norm.call_args_list] == [(2, 2**20, 4), (1, 2**20, 4)] * 2


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_are_added_to_what_is_there(in_order, dtype, monkeypatch):
    monkeypatch.setattr(rows_module, "adds_in_order", lambda device: in_order)
    sums = torch.tensor([[1.0], [10.0], [100.0], [torch.nan]], dtype=dtype)
    rows = torch.tensor([[1.0], [4.0], [8.0], [2.0]], dtype=dtype)
    add_rows_(sums, torch.tensor([0, 2, 3, 0]), rows)
    assert sums[:3, 0].tolist() == [4.0, 10.0, 104.0]
    assert rows.flatten().tolist() == [1.0, 4.0, 8.0, 2.0]


def test_where_threads_race_rows_are_added_by_an_embedding_s_gradient_which_sorts_them():
    sums, to_row = torch.empty(4, 1, device=META), torch.empty(3, dtype=torch.int64, device=META)
    with mock.patch.object(torch.Tensor, "index_add_") as index_add_:
        add_rows_(sums, to_row, torch.empty(3, 1, device=META))
    index_add_.assert_not_called()
