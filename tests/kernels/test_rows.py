# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Rows of a layer: walked, gathered, scattered, measured, added up."""

from __future__ import annotations

from dataclasses import replace
from math import inf
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import random_layer, random_rows

from kvpress_merging.kernels import rows as rows_module
from kvpress_merging.kernels.rows import (
    DEFAULT_TILE_BYTES,
    add_rows_,
    adds_in_order,
    alike_heads,
    block_bytes,
    first_max,
    flat_rows,
    gather_rows,
    head_slices,
    padded_lists,
    row_norms,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
META = torch.device("meta")


def test_a_cpu_works_on_what_its_caches_hold_and_other_devices_on_what_they_are_told():
    assert block_bytes(CUDA) == DEFAULT_TILE_BYTES == 64 * 2**20
    assert block_bytes(CPU) == 24 * 2**20
    assert block_bytes(CPU, 1000) == block_bytes(CUDA, 1000) == 1000


def test_a_cpu_alone_adds_in_the_order_of_the_rows():
    assert adds_in_order(CPU)
    assert not adds_in_order(CUDA)
    assert not adds_in_order(META)


def test_heads_are_cut_into_runs_that_fit_a_block():
    a_third = 8 * 2**20
    assert [(s.start, s.stop) for s in head_slices(7, a_third, CPU)] == [(0, 3), (3, 6), (6, 7)]
    assert [(s.start, s.stop) for s in head_slices(2, 10**9, CPU)] == [(0, 1), (1, 2)]
    assert [(s.start, s.stop) for s in head_slices(7, 0, CPU)] == [(0, 7)]
    assert list(head_slices(0, 0, CPU)) == []


counts_of_heads = st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)), max_size=40)


@pytest.mark.parametrize("device", [CPU, META])
@given(counts=counts_of_heads, most=st.sampled_from([1, 10**4, 10**5, 10**9]))
def test_each_head_with_something_to_do_is_in_one_run_that_holds_it(device, counts, most):
    bytes_of = lambda n, m: 4 * n * m  # noqa: E731
    seen = []
    for heads, n_survivors, n_evicted in alike_heads(counts, bytes_of, device, most):
        busy = [(n, m) for n, m in counts[heads] if n and m]
        assert (n_survivors, n_evicted) == tuple(map(max, zip(*busy)))
        n_heads, padded = heads.stop - heads.start, (heads.stop - heads.start) * bytes_of(n_survivors, n_evicted)
        if n_heads > 1:
            assert padded <= most
            assert padded <= (1.25 if device == CPU else inf) * sum(bytes_of(*sizes) for sizes in busy)
        seen += range(heads.start, heads.stop)
    assert len(set(seen)) == len(seen)
    assert {head for head, (n, m) in enumerate(counts) if n and m} <= set(seen)


def test_heads_that_are_alike_and_fit_a_block_are_one_run():
    assert len(list(alike_heads([(100, 900)] * 5, lambda n, m: n * m, CPU))) == 1
    assert len(list(alike_heads([(100, 900)] * 5 + [(900, 100)] * 5, lambda n, m: n * m, CPU))) == 2
    assert len(list(alike_heads([(100, 900)] * 5 + [(900, 100)] * 5, lambda n, m: n * m, CUDA))) == 1


def test_even_and_ragged_evictions_are_walked_head_by_head_without_padding():
    for kind in ("shrunk", "ragged"):
        eviction = random_layer(2, 3, 40, 12, kind=kind).eviction
        walked = list(eviction.heads())
        assert [(b, h) for b, h, *_ in walked] == [(b, h) for b in range(2) for h in range(3)]
        for head, (b, h, survivors, slots, evicted) in enumerate(walked):
            n_survivors, n_evicted = (12, 28) if kind == "shrunk" else eviction.counts[head]
            assert len(survivors) == len(slots) == n_survivors
            assert len(evicted) == n_evicted
            assert survivors.equal(eviction.survivors[b, h, :n_survivors])
            assert slots.equal(eviction.slots[b, h, :n_survivors])
            assert evicted.equal(eviction.evicted[b, h, :n_evicted])


def test_padding_of_lists_is_nowhere():
    eviction = random_layer(2, 3, 40, 12, kind="ragged").eviction
    eviction = replace(eviction, slots=eviction.slots.clone())
    survivors, evicted, slots = padded_lists(eviction, n_slots=55)
    for head, (_, _, of_survivors, of_slots, of_evicted) in enumerate(eviction.heads()):
        for entries, real, nowhere in ((survivors, of_survivors, 40), (evicted, of_evicted, 40), (slots, of_slots, 55)):
            assert entries[head, : len(real)].equal(real)
            assert (entries[head, len(real) :] == nowhere).all()
    even = random_layer(2, 3, 40, 12).eviction
    assert [entries.shape for entries in padded_lists(even)] == [(6, 12), (6, 28)]
    assert padded_lists(even)[0].equal(even.survivors.flatten(0, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_gathered_by_position_from_each_head(dtype):
    rows = random_rows(3, 7, 5, seed=0, dtype=dtype)
    positions = torch.tensor([[6, 0, 0, 3], [1, 1, 1, 1], [5, 4, 3, 2]])
    flat = flat_rows(positions, 7)
    assert flat.tolist() == [[6, 0, 0, 3], [8, 8, 8, 8], [19, 18, 17, 16]]
    gathered = gather_rows(rows, flat)
    assert gathered.dtype == dtype
    assert torch.equal(gathered, rows.gather(1, positions[..., None].expand(-1, -1, 5)))
    assert torch.equal(gather_rows(rows[..., 0], flat), rows[..., 0].gather(1, positions))
    view = random_rows(3, 9, 5, seed=1, dtype=dtype)[:, 1:8]
    assert torch.equal(gather_rows(view, flat), gather_rows(view.clone(), flat))
    assert gather_rows(rows.to(META), flat.to(META)).shape == (3, 4, 5)


def test_norms_are_float64_of_float32_rows_and_finite_where_these_are():
    rows = torch.tensor([[[3.0, 4.0], [1e30, 1e30], [0.0, 0.0], [torch.inf, 1.0], [torch.nan, 1.0]]])
    norms = row_norms(rows)
    assert norms.dtype == torch.float64
    assert norms.shape == (1, 5)
    assert norms[0, :3].tolist() == [5.0, pytest.approx(2**0.5 * 1e30), 0.0]
    assert norms.isfinite().tolist() == [[True, True, True, False, False]]
    # Beyond float32's range, where a float64 row is not finite to the kernels either.
    assert row_norms(torch.tensor([[[1e200]]], dtype=torch.float64)).isinf().all()
    assert row_norms(torch.empty(2, 3, 4, dtype=torch.bfloat16, device=META)).device == META


@pytest.mark.parametrize(("n_bytes", "most"), [(1, 6), (2 * 8 * 6 * 4 * 3, 18), (2 * 8 * 6 * 4 * 10, 60), (10**9, 60)])
def test_norms_copy_no_more_at_once_than_half_a_block_and_are_the_same_whatever_that_is(n_bytes, most, monkeypatch):
    rows = random_rows(6, 10, 4, seed=0)
    monkeypatch.setattr(rows_module, "_CPU_BLOCK_BYTES", n_bytes)
    with mock.patch.object(torch.linalg, "vector_norm", wraps=torch.linalg.vector_norm) as vector_norm:
        norms = row_norms(rows)
    assert torch.equal(norms, rows.double().norm(dim=-1))
    assert max(call.args[0].shape[:2].numel() for call in vector_norm.call_args_list) == most


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_are_added_to_what_is_there(in_order, dtype, monkeypatch):
    monkeypatch.setattr(rows_module, "adds_in_order", lambda device: in_order)
    sums = torch.tensor([[1.0], [10.0], [100.0], [torch.nan]], dtype=dtype)
    rows = torch.tensor([[1.0], [4.0], [8.0], [2.0]], dtype=dtype)
    assert add_rows_(sums, torch.tensor([0, 2, 3, 0]), rows) is sums
    assert sums[:3, 0].tolist() == [4.0, 10.0, 104.0]
    assert rows.flatten().tolist() == [1.0, 4.0, 8.0, 2.0]


def test_where_threads_race_rows_are_added_by_an_embedding_s_gradient_which_sorts_them():
    sums, to_row = torch.empty(4, 1, device=META), torch.empty(3, dtype=torch.int64, device=META)
    with mock.patch.object(torch.Tensor, "index_add_") as index_add_:
        add_rows_(sums, to_row, torch.empty(3, 1, device=META))
    index_add_.assert_not_called()


@pytest.mark.parametrize("n_rows", [1, 2, 15, 16, 63, 64, 65, 100, 128, 129, 1000])
def test_reduction_keeps_the_first_of_equal_maxima(n_rows):
    generator = torch.Generator().manual_seed(n_rows)
    tile = torch.randint(0, 4, (3, n_rows, 16), generator=generator).float() - 2
    tile[1, :, 3] = -torch.inf
    best, row = first_max(tile)
    assert torch.equal(best, tile.amax(dim=1))
    is_best = tile == tile.amax(dim=1, keepdim=True)
    assert torch.equal(row, is_best.to(torch.uint8).argmax(dim=1))
