# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""How many operations the kernels take, whatever the number of heads: on a GPU each is a kernel to launch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_cases import Layer, masked, random_kept, random_rows, shrunk

pytest.importorskip("matplotlib", reason="needs matplotlib, of the extra 'eval'")
from evaluation.speed.operations import OperationCounter
from kvpress_merging.eviction import Eviction
from kvpress_merging.kernels.blend import cosine_blend
from kvpress_merging.kernels.match import attention_match

HEADS_AND_ROWS = [(2, 1), (16, 1), (4, 3), (16, 3)]
K_LEN = 1024
META = torch.device("meta")


def even_layer(heads: int, bsz: int, ratio: float = 0.5, dtype: torch.dtype = torch.float32) -> Layer:
    keys, values = (random_rows(bsz, heads, K_LEN, 16, seed=seed, dtype=dtype) for seed in (0, 1))
    return shrunk(keys, values, random_kept(bsz, heads, K_LEN, int(K_LEN * (1 - ratio)), seed=2))


def ragged_layer(heads: int, bsz: int) -> Layer:
    """
    Heads keep from a tenth to nine tenths of their positions, on a device that stands for a GPU.

    On a CPU heads that differ so much are worked on one by one: there padding costs the time that it takes.
    """
    keys, values = (random_rows(bsz, heads, K_LEN, 16, seed=seed) for seed in (0, 1))
    rank = random_rows(bsz, heads, K_LEN, seed=2).argsort(dim=-1).argsort(dim=-1)
    n_kept = torch.linspace(K_LEN / 10, 9 * K_LEN / 10, heads * bsz).long().view(bsz, heads, 1)
    layer = masked(keys, values, rank < n_kept, rank >= n_kept)
    return Layer(*(tensor.to(META) for tensor in (keys, values, keys, values)), on_meta(layer.eviction))


def on_meta(eviction: Eviction) -> Eviction:
    return replace(eviction, **{name: getattr(eviction, name).to(META) for name in ("survivors", "slots", "evicted")})


def count(layer: Layer, kernel, *arguments, **options) -> int:
    """Operations of a call, without those that are made once."""
    for _ in range(2):
        with OperationCounter() as counter:
            kernel(layer.keys, layer.values, layer.kept_keys, layer.kept_values, *arguments, layer.eviction, **options)
    return counter.n_operations


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "bsz"), HEADS_AND_ROWS)
def test_merging_an_even_eviction_takes_few_operations(heads, bsz, dtype):
    assert count(even_layer(heads, bsz, dtype=dtype), cosine_blend) <= 66


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.77])
def test_merging_takes_two_more_where_survivors_do_not_come_in_whole_groups(ratio):
    assert count(even_layer(4, 1, ratio=ratio), cosine_blend) <= 63


@pytest.mark.parametrize(("heads", "bsz"), HEADS_AND_ROWS)
def test_merging_a_ragged_eviction_takes_few_operations(heads, bsz):
    assert count(ragged_layer(heads, bsz), cosine_blend) <= 80


@pytest.mark.parametrize(("heads", "bsz"), HEADS_AND_ROWS)
def test_matching_an_even_eviction_takes_few_operations(heads, bsz):
    queries = random_rows(bsz, heads, 96, 16, seed=5)
    assert count(even_layer(heads, bsz), attention_match, queries, queries, key_ridge=0.1) <= 199


@pytest.mark.parametrize(("heads", "bsz"), HEADS_AND_ROWS)
def test_matching_a_ragged_eviction_takes_few_operations(heads, bsz):
    queries = random_rows(bsz, heads, 96, 16, seed=5).to(META)
    assert count(ragged_layer(heads, bsz), attention_match, queries, queries, key_ridge=0.1) <= 214


def test_making_an_even_eviction_takes_four_operations_and_a_ragged_one_three():
    kept = random_kept(2, 4, K_LEN, 300, seed=0)
    is_survivor = random_rows(2, 4, K_LEN, seed=1) > 0
    for make in (lambda: Eviction.from_kept(kept, K_LEN), lambda: Eviction.from_masks(is_survivor, ~is_survivor)):
        make()
        with OperationCounter() as counter:
            make()
        assert counter.n_operations <= 4


def test_what_is_no_view_is_counted_at_the_line_that_asked_for_it():
    rows = torch.ones(3, 4)
    with OperationCounter(folder="test_kernel_operations") as counter:
        rows.view(4, 3)[:2].transpose(0, 1) + 1
        rows.mul_(2)
    assert counter.n_operations == 2
    assert {name for _, name in counter.by_line} == {"add", "mul_"}
    assert all(line.startswith("test_kernel_operations.py:") for line, _ in counter.by_line)
