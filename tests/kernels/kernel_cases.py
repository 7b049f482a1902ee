# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Layers and evictions for the tests of the kernels."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import strategies as st
from oracle import cosines, nearest

from kvpress_merging.eviction import Eviction

SPECIAL_ROWS = ("zero", "nan", "inf", "-inf", "huge", "subnormal", "one_nan")
TILE_BYTES = (1, 3000, 40_000, 10**9)


@dataclass
class Layer:
    """A cache layer before and after an eviction."""

    keys: torch.Tensor
    values: torch.Tensor
    kept_keys: torch.Tensor
    kept_values: torch.Tensor
    eviction: Eviction


def heads_of(eviction: Eviction) -> Iterator[tuple[int, int, list[int], list[int], list[int]]]:
    """Batch row, head, survivors, their slots and evicted positions, without padding."""
    bsz, num_key_value_heads, n_survivors = eviction.survivors.shape
    counts = eviction.counts or ((n_survivors, eviction.evicted.shape[-1]),) * (bsz * num_key_value_heads)
    for row, (n_kept, n_gone) in enumerate(counts):
        b, h = divmod(row, num_key_value_heads)
        yield (
            b,
            h,
            eviction.survivors[b, h, :n_kept].tolist(),
            eviction.slots[b, h, :n_kept].tolist(),
            eviction.evicted[b, h, :n_gone].tolist(),
        )


def shrunk(keys: torch.Tensor, values: torch.Tensor, kept: torch.Tensor) -> Layer:
    """What a press leaves that keeps ``kept``, in that order, in every head."""

    def gather(rows: torch.Tensor) -> torch.Tensor:
        return rows.gather(2, kept[..., None].expand(-1, -1, -1, rows.shape[-1]))

    return Layer(keys, values, gather(keys), gather(values), Eviction.from_kept(kept, keys.shape[2]))


def masked(keys: torch.Tensor, values: torch.Tensor, is_survivor: torch.Tensor, is_evicted: torch.Tensor) -> Layer:
    """What a press leaves that only masks: the whole layer."""
    return Layer(keys, values, keys, values, Eviction.from_masks(is_survivor, is_evicted))


def random_rows(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_kept(bsz: int, heads: int, k_len: int, n_kept: int, seed: int) -> torch.Tensor:
    scores = torch.rand(bsz, heads, k_len, generator=torch.Generator().manual_seed(seed))
    return scores.argsort(dim=-1)[..., :n_kept]


def random_masks(
    bsz: int, heads: int, k_len: int, n_kept: int, seed: int, is_even: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Survivors and evicted positions, with some positions that are neither."""
    scores = torch.rand(bsz, heads, k_len, generator=torch.Generator().manual_seed(seed))
    if is_even:
        rank = scores.argsort(dim=-1).argsort(dim=-1)
        return rank < n_kept, rank >= min(n_kept + 1, k_len)
    is_survivor = scores < n_kept / k_len
    return is_survivor, ~is_survivor & (scores > (n_kept + 1) / k_len)


def random_layer(
    bsz: int,
    heads: int,
    k_len: int,
    n_kept: int,
    *,
    head_dim: int = 8,
    value_dim: int | None = None,
    kind: str = "shrunk",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Layer:
    """``kind`` is ``"shrunk"``, ``"masked"`` (even) or ``"ragged"``."""
    keys = random_rows(bsz, heads, k_len, head_dim, seed=seed, dtype=dtype)
    values = random_rows(bsz, heads, k_len, head_dim if value_dim is None else value_dim, seed=seed + 1, dtype=dtype)
    return evict(keys, values, n_kept, kind, seed)


def evict(keys: torch.Tensor, values: torch.Tensor, n_kept: int, kind: str, seed: int) -> Layer:
    bsz, heads, k_len, _ = keys.shape
    if kind == "shrunk":
        return shrunk(keys, values, random_kept(bsz, heads, k_len, n_kept, seed))
    return masked(keys, values, *random_masks(bsz, heads, k_len, n_kept, seed, is_even=kind == "masked"))


def put_special_row(rows: torch.Tensor, b: int, h: int, position: int, name: str) -> None:
    """Overwrite one row in place. Huge and subnormal ones are so in the dtype of ``rows``."""
    row = rows[b, h, position]
    limits = torch.finfo(rows.dtype)
    if name == "zero":
        row.zero_()
    elif name == "one_nan":
        row[-1] = torch.nan
    elif name == "huge":
        row.copy_(row.sign() * (limits.max * 0.9))
    elif name == "subnormal":
        row.copy_(row.sign() * (limits.smallest_normal / 4))
    else:
        row.fill_(float(name))


def exact_keys(n_keys: int, head_dim: int, generator: torch.Generator) -> torch.Tensor:
    """
    Keys of 16 numbers (of one, if ``head_dim`` is less than 16) that are not 0, each a power of 4 or its negative.

    Their norms are powers of 4 and their cosines multiples of 1/16, in all dtypes and in whatever order they are added
    up. Returns float32, shape ``(n_keys, head_dim)``.
    """
    n_numbers = 16 if head_dim >= 16 else 1
    place = torch.rand(n_keys, head_dim, generator=generator).topk(n_numbers, dim=-1).indices
    signs = torch.randint(2, (n_keys, n_numbers), generator=generator) * 2.0 - 1
    lengths = 4.0 ** torch.randint(-3, 4, (n_keys, 1), generator=generator)
    return torch.zeros(n_keys, head_dim).scatter_(1, place, signs * lengths)


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    """Small layers of every kind, with repeated keys and with rows that float arithmetic stumbles over."""
    bsz, heads = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    k_len = draw(st.integers(1, 45))
    n_kept = draw(st.integers(0, k_len))
    head_dim, value_dim = draw(st.sampled_from([1, 3, 8, 17])), draw(st.sampled_from([1, 4, 9]))
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    kind = draw(st.sampled_from(["shrunk", "masked", "ragged"]))
    seed = draw(st.integers(0, 10_000))

    keys = random_rows(bsz, heads, k_len, head_dim, seed=seed, dtype=dtype)
    values = random_rows(bsz, heads, k_len, value_dim, seed=seed + 1, dtype=dtype)
    somewhere = st.tuples(st.integers(0, bsz - 1), st.integers(0, heads - 1), st.integers(0, k_len - 1))
    for b, h, position in draw(st.lists(somewhere, max_size=6)):
        keys[b, h, position] = keys[b, h, draw(st.integers(0, k_len - 1))]
    for rows in (keys, values):
        for b, h, position in draw(st.lists(somewhere, max_size=5)):
            put_special_row(rows, b, h, position, draw(st.sampled_from(SPECIAL_ROWS)))
    return evict(keys, values, n_kept, kind, seed)


def assert_nearest(layer: Layer, similarity: torch.Tensor, target: torch.Tensor) -> None:
    """The oracle's survivor, or one whose cosine float32 cannot tell from it; never the later of two equal keys."""
    assert similarity.dtype == torch.float32
    assert target.dtype == torch.int64
    assert similarity.shape == target.shape == layer.eviction.evicted.shape
    for b, h, survivors, _, evicted in heads_of(layer.eviction):
        keys, values = layer.keys[b, h].double().tolist(), layer.values[b, h].double().tolist()
        assert (similarity[b, h, len(evicted) :] == -torch.inf).all()
        for column, of_one in enumerate(cosines(keys, values, survivors, evicted)):
            best, _ = nearest(of_one)
            s, j = float(similarity[b, h, column]), int(target[b, h, column])
            if best == -math.inf:
                assert s == -math.inf
                assert 0 <= j < max(1, len(survivors))
                continue
            assert s == pytest.approx(best, abs=1e-6)
            assert of_one[j] == pytest.approx(best, abs=1e-6)
            equal_keys = [k for k, p in enumerate(survivors) if keys[p] == keys[survivors[j]] and of_one[k] > -math.inf]
            assert j == equal_keys[0]
