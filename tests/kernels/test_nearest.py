# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

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
from kvpress_merging.kernels.nearest import naive_nearest_survivors, nearest_survivors
from kvpress_merging.kernels.tiles import first_max, tile_shape


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
def test_survivors_do_not_depend_on_how_many_cores_share_a_head(kind, monkeypatch):
    layer = random_layer(1, 2, 400, 210, head_dim=40, kind=kind)
    layer.keys[:, :, ::3] = layer.keys[:, :, :1]  # of equals in several groups, the first counts
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    on_one = search(layer)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    on_many = search(layer)
    assert_nearest(layer, *on_many)
    for one, many in zip(on_one, on_many):
        assert torch.equal(one, many)


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


@pytest.mark.parametrize("n_rows", [1, 2, 15, 16, 63, 64, 65, 100, 128, 129, 1000])
def test_reduction_keeps_the_first_of_equal_maxima(n_rows):
    generator = torch.Generator().manual_seed(n_rows)
    tile = torch.randint(0, 4, (3, n_rows, 16), generator=generator).float() - 2
    for rows_per_group in (64, n_rows):
        best, row = first_max(tile, rows_per_group)
        best, group = best.max(dim=1)
        row = row.gather(1, group[:, None])[:, 0]
        assert torch.equal(best, tile.amax(dim=1))
        is_best = tile == tile.amax(dim=1, keepdim=True)
        assert torch.equal(row, is_best.to(torch.uint8).argmax(dim=1))


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
    float32_keys_of_one_head = 2048 * 16 * 4
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
    ("n_survivors", "n_evicted", "tile_bytes", "shape"),
    [
        (49, 95, 10**9, (455, 96, 96)),  # no more than there is, in whole groups of 48; several heads where they fit
        (17, 48, 10**9, (1820, 48, 48)),
        (1, 1, 1, (1, 48, 48)),  # never less than one group
        (10_000, 10_000, 64 * 2**20, (1, 2880, 1440)),  # twice as many survivors as evicted, 16 MiB on a CPU
        (10_000, 10_000, 2**20, (1, 720, 336)),
        (10_000, 20, 2**20, (7, 720, 48)),
    ],
)
def test_a_tile_is_as_large_as_allowed_and_no_larger_than_needed(n_survivors, n_evicted, tile_bytes, shape):
    device = torch.device("cpu")
    assert tile_shape(n_survivors, n_evicted, device, tile_bytes) == shape
    assert shape[0] * shape[1] * shape[2] * 4 <= max(tile_bytes, 48 * 48 * 4)


def test_the_only_survivor_of_a_layer_is_found():
    layer = random_layer(1, 1, 5, 1)
    assert_nearest(layer, *search(layer))
    assert search(layer)[0].isfinite().all()
