# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    SPECIAL_ROWS,
    TILE_BYTES,
    Layer,
    assert_nearest,
    layers,
    masked,
    put_special_row,
    random_layer,
    random_rows,
    shrunk,
)
from torch.utils._python_dispatch import TorchDispatchMode

from kvpress_merging.eviction import Eviction
from kvpress_merging.kernels import nearest as nearest_module
from kvpress_merging.kernels import rows as rows_module
from kvpress_merging.kernels.nearest import naive_nearest_survivors, nearest_survivors, tile_columns


def search(layer: Layer, **options) -> tuple[torch.Tensor, torch.Tensor]:
    has_finite_value = layer.values.float().isfinite().all(dim=-1)
    return nearest_survivors(layer.keys, has_finite_value, layer.eviction, **options)


@settings(max_examples=100, deadline=None)
@given(layer=layers(), tile_bytes=st.sampled_from(TILE_BYTES))
def test_search_finds_what_the_oracle_finds(layer, tile_bytes):
    assert_nearest(layer, *search(layer, tile_bytes=tile_bytes))


@settings(max_examples=50, deadline=None)
@given(layer=layers())
def test_naive_search_finds_what_the_oracle_finds(layer):
    has_finite_value = layer.values.float().isfinite().all(dim=-1)
    assert_nearest(layer, *naive_nearest_survivors(layer.keys, has_finite_value, layer.eviction))


@pytest.mark.parametrize("kind", ["shrunk", "masked", "ragged"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_survivors_do_not_depend_on_the_tile(kind, dtype):
    layer = random_layer(1, 2, 170, 75, head_dim=40, kind=kind, dtype=dtype)
    similarity, target = search(layer)
    for tile_bytes in (1, 4_000, 10_000, 10**6):
        other_similarity, other_target = search(layer, tile_bytes=tile_bytes)
        assert torch.equal(target, other_target)
        torch.testing.assert_close(similarity, other_similarity, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["shrunk", "masked", "ragged"])
@pytest.mark.parametrize("n_bytes", [1, 100_000, 10**9])
def test_survivors_do_not_depend_on_what_a_cpu_works_on_at_once(kind, n_bytes, monkeypatch):
    layer = random_layer(2, 3, 170, 75, head_dim=40, kind=kind)
    layer.keys[:, :, ::3] = layer.keys[:, :, :1]
    expected = search(layer)
    monkeypatch.setattr(rows_module, "_CPU_BLOCK_BYTES", n_bytes)
    monkeypatch.setattr(nearest_module, "_CPU_TILE_BYTES", n_bytes)
    for ours, theirs in zip(search(layer), expected):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("n_survivors", [1, 2, 3, 7, 9, 15, 16, 17, 33, 63, 65, 129, 200])
@pytest.mark.parametrize("head_dim", [5, 17, 40, 64, 80, 128])
def test_equal_keys_tie_to_the_lowest_survivor_at_every_tile_size(n_survivors, head_dim):
    n_evicted = 37
    keys = random_rows(1, 1, n_survivors + n_evicted, head_dim, seed=n_survivors)
    keys[:, :, n_evicted:] = keys[:, :, n_evicted : n_evicted + 1]
    is_survivor = torch.arange(n_survivors + n_evicted).expand(1, 1, -1) >= n_evicted
    layer = masked(keys, keys, is_survivor, ~is_survivor)
    for tile_bytes in (1, 2_000, 9_000, 33_000, 10**6):
        _, target = search(layer, tile_bytes=tile_bytes)
        assert (target == 0).all()


def test_equal_keys_tie_however_many_stand_beside_them():
    for n_survivors in (*range(1, 150, 6), 160, 200, 250, 400):
        for n_evicted in (1, 17, 30, 47, 64, 100):
            k_len, generator = n_survivors + n_evicted, torch.Generator().manual_seed(n_survivors)
            which = torch.randint(0, 3, (2, k_len), generator=generator)
            keys = torch.randn(3, 64, generator=generator)[which][None]
            is_survivor = (torch.randperm(k_len, generator=generator) < n_survivors).expand(1, 2, -1)
            layer = masked(keys, keys, is_survivor, ~is_survivor)
            _, target = search(layer)
            for h, (found, survivors, evicted) in enumerate(
                zip(target[0], layer.eviction.survivors[0], layer.eviction.evicted[0])
            ):
                is_same = which[h, evicted][:, None] == which[h, survivors]
                has_same = is_same.any(dim=1)
                assert torch.equal(found[has_same], is_same.int().argmax(dim=1)[has_same]), (n_survivors, n_evicted)


def test_equal_keys_tie_where_a_cpu_has_no_avx512():
    """There MKL's products are worked on in blocks of other sizes."""
    avx2 = {"MKL_ENABLE_INSTRUCTIONS": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "however_many"]
    finished = subprocess.run(command, env=os.environ | avx2, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout


@pytest.mark.parametrize("tile_bytes", [1, 3_000, 40_000, 10**9])
def test_copies_of_a_key_anywhere_among_the_survivors_tie_to_the_lowest(tile_bytes):
    n_survivors, n_evicted = 301, 100
    keys = random_rows(1, 1, n_survivors + n_evicted, 64, seed=1)
    copies = torch.randperm(n_survivors, generator=torch.Generator().manual_seed(0))[: 3 * n_evicted].view(3, -1)
    keys[0, 0, copies] = keys[0, 0, n_survivors:].clone()
    is_survivor = torch.arange(n_survivors + n_evicted).expand(1, 1, -1) < n_survivors
    _, target = search(masked(keys, keys, is_survivor, ~is_survivor), tile_bytes=tile_bytes)
    assert torch.equal(target[0, 0], copies.amin(dim=0))


@pytest.mark.parametrize("tile_bytes", [1, 3_000, 40_000, 10**9])
@pytest.mark.parametrize("n_evicted", [1, 5, 17, 31, 130])
def test_equal_evicted_keys_have_bit_equal_similarity(tile_bytes, n_evicted):
    keys = random_rows(1, 1, 50 + n_evicted, 96, seed=n_evicted)
    keys[:, :, 50:] = keys[:, :, 50:51]
    is_survivor = torch.arange(50 + n_evicted).expand(1, 1, -1) < 50
    similarity, target = search(masked(keys, keys, is_survivor, ~is_survivor), tile_bytes=tile_bytes)
    assert (similarity == similarity[..., :1]).all()
    assert (target == target[..., :1]).all()


def test_survivor_at_the_lowest_position_wins_though_it_stands_in_a_later_slot():
    keys = torch.ones(1, 1, 4, 8)
    layer = shrunk(keys, keys, torch.tensor([[[3, 1, 2]]]))
    _, target = search(layer)
    assert layer.eviction.survivors[0, 0, int(target)] == 1
    assert layer.eviction.slots[0, 0, int(target)] == 1


def test_zero_key_has_cosine_0_with_everything():
    keys = -torch.ones(1, 1, 4, 8)
    keys[0, 0, 1] = 0  # among the survivors: beats a cosine of -1
    keys[0, 0, 2] = 1
    keys[0, 0, 3] = 0
    is_survivor = torch.tensor([[[True, True, False, False]]])
    similarity, target = search(masked(keys, keys, is_survivor, ~is_survivor))
    assert similarity.tolist() == [[[0.0, 0.0]]]
    assert target.tolist() == [[[1, 0]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("factor", ["huge", "subnormal"])
def test_cosine_does_not_depend_on_the_length_of_a_key(dtype, factor):
    signs = random_rows(1, 1, 60, 32, seed=3, dtype=dtype).sign()
    limits = torch.finfo(dtype)
    length = limits.max if factor == "huge" else limits.smallest_normal / 4
    is_survivor = torch.arange(60).expand(1, 1, -1) % 2 == 0
    plain = search(masked(signs, signs, is_survivor, ~is_survivor))
    scaled = search(masked(signs * length, signs, is_survivor, ~is_survivor))
    torch.testing.assert_close(plain[0], scaled[0], rtol=0, atol=4 * torch.finfo(torch.float32).eps)
    # Other survivors may have that very cosine, but the one found has to have it.
    survivors, evicted = signs[0, 0, ::2].double(), signs[0, 0, 1::2].double()
    cosine_with_found = (evicted * survivors[scaled[1][0, 0]]).sum(dim=-1) / 32
    torch.testing.assert_close(cosine_with_found.float(), plain[0][0, 0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("where", ["keys", "values"])
@pytest.mark.parametrize("name", ["nan", "inf", "-inf", "one_nan"])
@pytest.mark.parametrize("tile_bytes", [1, 10**9])
def test_a_row_that_is_not_finite_is_passed_over_and_disturbs_nobody(where, name, tile_bytes):
    layer = random_layer(1, 1, 60, 29, kind="masked")
    survivors, evicted = layer.eviction.survivors[0, 0], layer.eviction.evicted[0, 0]
    clean_similarity, clean_target = search(layer, tile_bytes=tile_bytes)
    bad_survivors, bad_evicted = [0, 1, 13, 28], [0, 20]
    for position in [*survivors[bad_survivors].tolist(), *evicted[bad_evicted].tolist()]:
        put_special_row(getattr(layer, where), 0, 0, position, name)

    similarity, target = search(layer, tile_bytes=tile_bytes)
    assert (similarity[0, 0, bad_evicted] == -torch.inf).all()
    is_good = torch.ones(len(evicted), dtype=torch.bool)
    is_good[bad_evicted] = False
    assert similarity[0, 0, is_good].isfinite().all()
    assert not set(target[0, 0, is_good].tolist()) & set(bad_survivors)
    unmoved = is_good & ~torch.isin(clean_target[0, 0], torch.tensor(bad_survivors))
    assert unmoved.sum() > 10
    assert torch.equal(similarity[0, 0, unmoved], clean_similarity[0, 0, unmoved])
    assert torch.equal(target[0, 0, unmoved], clean_target[0, 0, unmoved])


@pytest.mark.parametrize("name", ["nan", "inf"])
def test_no_survivor_to_choose_gives_minus_infinity(name):
    layer = random_layer(1, 1, 20, 3, kind="masked")
    for position in layer.eviction.survivors[0, 0].tolist():
        put_special_row(layer.keys, 0, 0, position, name)
    similarity, target = search(layer)
    assert (similarity == -torch.inf).all()
    assert (target == 0).all()


@pytest.mark.parametrize(("n_kept", "k_len"), [(0, 5), (5, 5), (1, 2), (1, 40), (39, 40), (0, 0)])
def test_edges_of_the_eviction(n_kept, k_len):
    layer = random_layer(2, 2, k_len, n_kept)
    assert_nearest(layer, *search(layer))


def test_float64_keys_are_judged_in_float32():
    layer = random_layer(1, 2, 50, 20, dtype=torch.float64)
    layer.keys[0, 0, layer.eviction.evicted[0, 0, 0]] = 1e300
    similarity, _ = search(layer)
    assert similarity[0, 0, 0] == -torch.inf
    assert similarity[0, 0, 1:].isfinite().all()


def test_a_head_is_searched_alone():
    layer = random_layer(2, 4, 90, 41, head_dim=16)
    similarity, target = search(layer)
    for b in range(2):
        for h in range(4):
            one = slice(h, h + 1)
            survivors, slots, evicted = (
                positions[b : b + 1, one]
                for positions in (layer.eviction.survivors, layer.eviction.slots, layer.eviction.evicted)
            )
            eviction = Eviction(survivors, slots, evicted, 90)
            keys, values = layer.keys[b : b + 1, one], layer.values[b : b + 1, one]
            alone = search(Layer(keys, values, keys, values, eviction))
            assert torch.equal(alone[0][0, 0], similarity[b, h])
            assert torch.equal(alone[1][0, 0], target[b, h])


def test_ragged_and_even_evictions_of_the_same_positions_agree():
    layer = random_layer(1, 3, 80, 33, kind="masked")
    even = layer.eviction
    n_survivors, n_evicted = even.survivors.shape[-1], even.evicted.shape[-1]
    padded = Eviction(
        torch.cat([even.survivors, even.survivors[..., -4:]], dim=-1),
        torch.cat([even.slots, even.slots[..., -4:]], dim=-1),
        torch.cat([even.evicted, even.survivors[..., :2]], dim=-1),
        even.k_len,
        counts=((n_survivors, n_evicted),) * 3,
    )
    similarity, target = search(layer)
    padded_similarity, padded_target = search(Layer(layer.keys, layer.values, layer.keys, layer.values, padded))
    assert torch.equal(padded_similarity[..., :n_evicted], similarity)
    assert torch.equal(padded_target[..., :n_evicted], target)
    assert (padded_similarity[..., n_evicted:] == -torch.inf).all()


def test_views_along_k_len_give_what_their_copies_give():
    cache = random_rows(2, 3, 100, 16, seed=5)
    layer = shrunk(cache[:, :, 10:90], cache[:, :, 10:90], random_layer(2, 3, 80, 30).eviction.survivors)
    copy = Layer(layer.keys.clone(), layer.values.clone(), layer.kept_keys, layer.kept_values, layer.eviction)
    for ours, theirs in zip(search(layer), search(copy)):
        assert torch.equal(ours, theirs)


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation made."""

    n_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and not func.is_view:
                self.n_bytes = max(self.n_bytes, tensor.numel() * tensor.element_size())
        return out


@pytest.mark.parametrize("kind", ["masked", "ragged"])
def test_nothing_larger_than_a_tile_or_the_keys_of_one_head_is_held(kind):
    layer = random_layer(1, 1, 2048, 1024, head_dim=16, kind="masked")
    if kind == "ragged":
        counts = ((layer.eviction.survivors.shape[-1] - 1, layer.eviction.evicted.shape[-1] - 1),)
        layer.eviction = replace(layer.eviction, counts=counts)
    # Both sides in whole groups of 48, and what stands behind each key.
    float32_keys_of_one_head = 2 * (1024 + 32) * 24 * 4
    with LargestTensor() as largest:
        nearest_survivors(layer.keys, torch.ones(1, 1, 2048, dtype=torch.bool), layer.eviction, tile_bytes=100_000)
    assert largest.n_bytes <= float32_keys_of_one_head < 900 * 900 * 4


@pytest.mark.parametrize("is_ragged", [False, True])
def test_search_runs_on_meta_tensors_of_131072_tokens(is_ragged):
    k_len, heads = 131_072, 2
    survivors = torch.empty(1, heads, k_len // 2, dtype=torch.int64, device="meta")
    counts = ((k_len // 2, 1000), (17, k_len // 2)) if is_ragged else None
    eviction = Eviction(survivors, survivors, torch.empty_like(survivors), k_len, counts)
    keys = torch.empty(1, heads, k_len, 128, dtype=torch.bfloat16, device="meta")
    has_finite_value = torch.empty(1, heads, k_len, dtype=torch.bool, device="meta")
    with LargestTensor() as largest:
        similarity, target = nearest_survivors(keys, has_finite_value, eviction)
    assert similarity.device.type == target.device.type == "meta"
    assert similarity.shape == target.shape == (1, heads, k_len // 2)
    assert largest.n_bytes <= 4 * k_len * 128


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile_bytes": 0}, "tile_bytes must be at least 1, got 0"),
        ({"kernel": "cuda"}, "kernel must be one of 'auto', 'torch', 'triton', got 'cuda'"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        search(random_layer(1, 1, 4, 2), **options)


@pytest.mark.parametrize("kernel", ["auto", "torch"])
def test_kernels_for_a_cpu_run(kernel):
    layer = random_layer(1, 2, 30, 10)
    assert_nearest(layer, *search(layer, kernel=kernel))


def test_similarities_are_float32_whatever_torch_makes_by_default():
    layer = random_layer(1, 2, 30, 10)
    expected = search(layer)
    torch.set_default_dtype(torch.float64)
    try:
        similarity, target = search(layer)
    finally:
        torch.set_default_dtype(torch.float32)
    assert similarity.dtype == torch.float32
    assert torch.equal(similarity, expected[0])
    assert torch.equal(target, expected[1])


def test_keys_that_require_grad_are_searched_without_a_graph():
    layer = random_layer(1, 2, 30, 10)
    layer.keys.requires_grad_()
    similarity, _ = search(layer)
    assert not similarity.requires_grad


def test_names_of_special_rows_cover_what_float_arithmetic_stumbles_over():
    rows = random_rows(1, 1, len(SPECIAL_ROWS), 4, seed=0)
    for position, name in enumerate(SPECIAL_ROWS):
        put_special_row(rows, 0, 0, position, name)
    assert rows.isnan().any()
    assert rows.isinf().any()
    assert (rows.abs() > 1e38).any()
    assert ((rows != 0) & (rows.abs() < torch.finfo(torch.float32).smallest_normal)).any()


@pytest.mark.parametrize(
    ("n_survivors", "tile_bytes", "device", "n_columns"),
    [
        (1, 1, "cpu", 48),  # never less than one group
        (49, 4 * 96 * 144, "cpu", 144),  # beside whole groups of survivors
        (49, 4 * 96 * 144 - 1, "cpu", 96),
        (2**13, 64 * 2**20, "cpu", 96),  # 4 MiB of a head on a CPU
        (2**14, 2**20, "cpu", 48),
        (2**14, 64 * 2**20, "cuda", 1008),
    ],
)
def test_a_tile_has_as_many_columns_as_are_allowed(n_survivors, tile_bytes, device, n_columns):
    assert tile_columns(n_survivors, torch.device(device), tile_bytes) == n_columns


def test_the_only_survivor_of_a_layer_is_found():
    layer = random_layer(1, 1, 5, 1)
    assert_nearest(layer, *search(layer))
    assert search(layer)[0].isfinite().all()
