# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
import math
from unittest import mock

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from kernel_cases import (
    TILE_BYTES,
    Layer,
    heads_of,
    layers,
    masked,
    put_special_row,
    random_layer,
    random_rows,
    shrunk,
)
from oracle import blend, cosines, is_finite, merge_weight, nearest, norm, select
from torch.utils._python_dispatch import TorchDispatchMode

from kvpress_merging.eviction import Eviction
from kvpress_merging.kernels import rows as rows_module
from kvpress_merging.kernels.blend import Blend, cosine_blend, naive_cosine_blend, select_merges

# Relative to the largest number in the rows that were mixed.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
INTEGER_VIEW = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}

NAMES = ("similarity_threshold", "merge_fraction", "max_merge_per_token", "value_norm_weighting", "merge_keys")
GRID = [
    dict(zip(NAMES, choice))
    for choice in itertools.product((0.0, 0.35), (1.0, 0.6), (0, 1, 2), (True, False), (False, True))
]


TENSORS = ("keys", "values", "similarity", "weight", "target", "is_merged")


def run(layer: Layer, **options) -> Blend:
    return cosine_blend(layer.keys, layer.values, layer.kept_keys, layer.kept_values, layer.eviction, **options)


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == expected.dtype
    integer = INTEGER_VIEW[actual.dtype]
    assert torch.equal(actual.contiguous().view(integer), expected.contiguous().view(integer))


def assert_rows_close(actual: list[float], expected: list[float], mixed: list[list[float]], tolerance: float) -> None:
    largest = max(abs(number) for row in mixed for number in row)
    for ours, theirs in zip(actual, expected):
        # 1e-44 is a few steps of the subnormal float32.
        assert ours == pytest.approx(theirs, rel=0, abs=tolerance * largest + 1e-44)


def assert_blend(
    layer: Layer,
    result: Blend,
    *,
    similarity_threshold: float = 0.0,
    merge_fraction: float = 1.0,
    max_merge_per_token: int = 0,
    value_norm_weighting: bool = True,
    merge_keys: bool = False,
) -> None:
    """Each stage is what the oracle makes of what the stage before it handed over."""
    eviction, dtype = layer.eviction, layer.kept_values.dtype
    assert result.values.shape == layer.kept_values.shape
    assert result.values.dtype == dtype
    assert result.values.is_contiguous()
    assert result.weight.dtype == torch.float32
    assert result.is_merged.dtype == torch.bool
    assert result.weight.shape == result.is_merged.shape == eviction.evicted.shape
    if not merge_keys:
        assert result.keys is layer.kept_keys
    tolerance = TOLERANCE[dtype]
    float32_threshold = torch.tensor(similarity_threshold).item()

    for b, h, survivors, slots, evicted in heads_of(eviction):
        keys, values = layer.keys[b, h].double().tolist(), layer.values[b, h].double().tolist()
        n_evicted = len(evicted)
        similarity, target = result.similarity[b, h, :n_evicted].tolist(), result.target[b, h, :n_evicted].tolist()
        weight, is_merged = result.weight[b, h, :n_evicted].tolist(), result.is_merged[b, h, :n_evicted].tolist()
        assert (result.weight[b, h, n_evicted:] == 0).all()
        assert not result.is_merged[b, h, n_evicted:].any()

        for of_one, s, j in zip(cosines(keys, values, survivors, evicted), similarity, target):
            best, _ = nearest(of_one)
            assert s == best or s == pytest.approx(best, abs=1e-6)
            assert best == -math.inf or of_one[j] == pytest.approx(best, abs=1e-6)

        selected = select(similarity, target, float32_threshold, merge_fraction, max_merge_per_token)
        groups: dict[int, list[int]] = {}
        for i, (is_selected, s, j) in enumerate(zip(selected, similarity, target)):
            expected = 0.0
            if is_selected:
                expected = merge_weight(s, values[evicted[i]], values[survivors[j]], value_norm_weighting)
            assert weight[i] == pytest.approx(expected, rel=1e-5, abs=1e-37)
            assert is_merged[i] == (is_selected and weight[i] > 0)
            if is_merged[i]:
                groups.setdefault(j, []).append(i)

        for before, kept, after in (
            (values, layer.kept_values, result.values),
            *([(keys, layer.kept_keys, result.keys)] if merge_keys else []),
        ):
            takers = [survivors[j] for j in groups]
            slot_of = dict(zip(survivors, slots))
            untouched = [slot for slot in range(kept.shape[2]) if slot not in {slot_of[p] for p in takers}]
            assert_same_bits(after[b, h, untouched], kept[b, h, untouched])
            for j, members in groups.items():
                merged = [(weight[i], before[evicted[i]]) for i in members]
                mixed = [before[survivors[j]], *(row for _, row in merged)]
                assert all(is_finite(row) for row in mixed)
                actual = after[b, h, slots[j]].double().tolist()
                assert is_finite(actual)
                assert_rows_close(actual, blend(before[survivors[j]], merged), mixed, tolerance)


options = st.fixed_dictionaries(
    {
        "similarity_threshold": st.sampled_from([0.0, 0.3, 0.9, 1.0]),
        "merge_fraction": st.sampled_from([0.1, 0.5, 0.75, 1.0]),
        "max_merge_per_token": st.sampled_from([0, 1, 3]),
        "value_norm_weighting": st.booleans(),
        "merge_keys": st.booleans(),
    }
)


@settings(max_examples=150, deadline=None)
@given(layer=layers(), options=options, tile_bytes=st.sampled_from(TILE_BYTES))
def test_blend_is_what_the_oracle_makes_of_it(layer, options, tile_bytes):
    before = [t.clone() for t in (layer.keys, layer.values, layer.kept_keys, layer.kept_values)]
    assert_blend(layer, run(layer, **options, tile_bytes=tile_bytes), **options)
    for tensor, copy in zip((layer.keys, layer.values, layer.kept_keys, layer.kept_values), before):
        assert_same_bits(tensor, copy)


@settings(max_examples=50, deadline=None)
@given(layer=layers(), options=options)
def test_naive_blend_is_what_the_oracle_makes_of_it(layer, options):
    result = naive_cosine_blend(layer.keys, layer.values, layer.kept_keys, layer.kept_values, layer.eviction, **options)
    assert_blend(layer, result, **options)


@pytest.mark.parametrize("options", GRID, ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize("kind", ["shrunk", "masked", "ragged"])
def test_every_parameter_alone_and_combined(kind, options):
    # Keys in a narrow cone, so that thresholds cut, and few survivors, so that they compete.
    layer = random_layer(2, 2, 50, 12, head_dim=6, value_dim=5, kind=kind, seed=3)
    assert_blend(layer, run(layer, **options), **options)


@pytest.mark.parametrize("options", GRID[:12] + GRID[-12:], ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_blended_in_float32_and_stays_finite(dtype, options):
    layer = random_layer(1, 2, 40, 10, head_dim=6, dtype=dtype, seed=4)
    layer.values.mul_(torch.finfo(dtype).max / 8)
    layer = shrunk(layer.keys, layer.values, layer.eviction.survivors)
    result = run(layer, **options)
    assert result.values.isfinite().all()
    assert result.is_merged.any()
    assert_blend(layer, result, **options)


@pytest.mark.parametrize("kind", ["shrunk", "masked", "ragged"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blend_does_not_depend_on_the_tile(kind, dtype):
    layer = random_layer(1, 2, 150, 60, head_dim=24, kind=kind, dtype=dtype)
    reference = run(layer, merge_keys=True)
    for tile_bytes in (1, 20_000, 100_000):
        other = run(layer, merge_keys=True, tile_bytes=tile_bytes)
        assert torch.equal(other.target, reference.target)
        assert torch.equal(other.is_merged, reference.is_merged)
        for name in ("similarity", "weight", "keys", "values"):
            ours, theirs = getattr(other, name), getattr(reference, name)
            torch.testing.assert_close(ours, theirs, rtol=0 if name == "similarity" else 1e-6, atol=TOLERANCE[dtype])


def one_merge(similarity: float, evicted_value: torch.Tensor, target_value: torch.Tensor) -> Layer:
    """One survivor and one evicted position whose keys have this cosine."""
    keys = torch.tensor([[1.0, 0.0], [similarity, math.sqrt(1 - similarity**2)]]).view(1, 1, 2, 2)
    values = torch.stack([target_value, evicted_value]).view(1, 1, 2, -1)
    is_survivor = torch.tensor([[[True, False]]])
    return masked(keys, values, is_survivor, ~is_survivor)


@settings(max_examples=100, deadline=None)
@given(
    similarity=st.floats(0, 1),
    seed=st.integers(0, 1000),
    value_norm_weighting=st.booleans(),
    length=st.sampled_from([1e-30, 1.0, 1e30]),
)
def test_a_single_merge_moves_the_survivor_to_within_the_perturbation_bound(
    similarity, seed, value_norm_weighting, length
):
    evicted_value, target_value = random_rows(2, 16, seed=seed) * length
    result = run(one_merge(similarity, evicted_value, target_value), value_norm_weighting=value_norm_weighting)
    distance_before = norm((evicted_value.double() - target_value.double()).tolist())
    distance_after = norm((evicted_value.double() - result.values[0, 0, 0].double()).tolist())
    weight = result.weight.item()
    if value_norm_weighting:
        share = norm(evicted_value.tolist()) / (norm(evicted_value.tolist()) + norm(target_value.tolist()))
        assert weight == pytest.approx(similarity * share, abs=1e-6)
    else:
        assert weight == pytest.approx(similarity, abs=1e-6)
    assert distance_after == pytest.approx(distance_before / (1 + weight), rel=1e-5)


@pytest.mark.parametrize(("similarity", "percent"), [(0.7, 59), (1.0, 50), (0.0, 100)])
def test_a_merge_leaves_59_percent_of_the_distance_at_weight_0_7_and_half_at_weight_1(similarity, percent):
    evicted_value, target_value = random_rows(2, 16, seed=1)
    result = run(one_merge(similarity, evicted_value, target_value), value_norm_weighting=False)
    left = (evicted_value - result.values[0, 0, 0]).norm() / (evicted_value - target_value).norm()
    assert round(100 * left.item()) == percent


@pytest.mark.parametrize("percent_rejected", [0, 25, 50, 75, 100])
@pytest.mark.parametrize("n_evicted", [4, 8, 12, 40])
def test_merge_fraction_counts_the_eligible_alone(percent_rejected, n_evicted):
    n_rejected = n_evicted * percent_rejected // 100
    angles = torch.linspace(0.05, 1.5, n_evicted).flip(0)  # cosines rise with the position
    keys = torch.stack([angles.cos(), angles.sin()], dim=-1)
    keys = torch.cat([torch.tensor([[1.0, 0.0]]), keys]).view(1, 1, -1, 2)
    cosines_in_order = angles.cos().tolist()
    threshold = {0: 0.0, 100: 1.0}.get(
        percent_rejected, (cosines_in_order[n_rejected - 1] + cosines_in_order[min(n_rejected, n_evicted - 1)]) / 2
    )
    is_survivor = torch.arange(n_evicted + 1).view(1, 1, -1) == 0
    layer = masked(keys, keys, is_survivor, ~is_survivor)

    result = run(layer, similarity_threshold=threshold, merge_fraction=0.75)
    n_eligible = n_evicted - n_rejected
    assert int((result.similarity >= threshold).sum()) == n_eligible
    assert int(result.is_merged.sum()) == round(0.75 * n_eligible)
    if percent_rejected == 100:
        assert not result.is_merged.any()
        assert_same_bits(result.values, layer.kept_values)
    # The most similar ones, which are the last ones here.
    assert result.is_merged[0, 0, n_evicted - round(0.75 * n_eligible) :].all()


@pytest.mark.parametrize(
    ("merge_fraction", "n_eligible", "n_merged"), [(0.5, 5, 2), (0.5, 7, 4), (0.1, 5, 0), (0.3, 5, 2)]
)
def test_half_a_merge_is_rounded_to_even(merge_fraction, n_eligible, n_merged):
    similarity = torch.linspace(0.1, 0.9, n_eligible).view(1, 1, -1)
    selected = select_merges(
        similarity,
        torch.zeros(1, 1, n_eligible, dtype=torch.int64),
        1,
        similarity_threshold=0.0,
        merge_fraction=merge_fraction,
        max_merge_per_token=0,
    )
    assert round(merge_fraction * n_eligible) == n_merged == selected.sum()


@settings(max_examples=200, deadline=None)
@given(
    # Few distinct similarities, so that ties abound; both zeros, which must count as equal.
    similarity=st.lists(st.sampled_from([-math.inf, -0.5, -0.0, 0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=40),
    n_survivors=st.integers(1, 5),
    data=st.data(),
)
def test_gates_take_the_most_similar_and_the_lowest_position_on_a_tie(similarity, n_survivors, data):
    target = data.draw(st.lists(st.integers(0, n_survivors - 1), min_size=len(similarity), max_size=len(similarity)))
    threshold = data.draw(st.sampled_from([0.0, 0.25, 1.0]))
    fraction = data.draw(st.sampled_from([0.1, 0.25, 0.5, 0.75, 1.0]))
    limit = data.draw(st.integers(0, 4))
    # A second head, so that heads cannot lean on each other.
    selected = select_merges(
        torch.tensor([[similarity, similarity[::-1]]], dtype=torch.float32),
        torch.tensor([[target, target[::-1]]]),
        n_survivors,
        similarity_threshold=threshold,
        merge_fraction=fraction,
        max_merge_per_token=limit,
    )
    assert selected[0, 0].tolist() == select(similarity, target, threshold, fraction, limit)
    assert selected[0, 1].tolist() == select(similarity[::-1], target[::-1], threshold, fraction, limit)


def test_survivors_that_take_nothing_keep_their_bits():
    layer = random_layer(1, 1, 40, 20, kind="masked")
    survivors = layer.eviction.survivors[0, 0]
    clean_target = run(layer).target
    odd = [j for j in range(len(survivors)) if not (clean_target == j).any()][:4]
    assert len(odd) == 4
    bits = layer.values.view(torch.int32)
    bits[0, 0, survivors[odd[0]]] = 0x7FC12345  # NaN with a payload
    bits[0, 0, survivors[odd[1]]] = -0x80000000  # -0.0
    bits[0, 0, survivors[odd[2]]] = 0x7F800000  # Inf
    bits[0, 0, survivors[odd[3]]] = 1  # the smallest subnormal
    result = run(layer)
    assert result.is_merged.any()
    assert_same_bits(result.values[0, 0, survivors[odd]], layer.values[0, 0, survivors[odd]])


def test_slots_that_are_no_survivors_keep_their_bits():
    """A press may append tokens of its own to what it leaves, and rotate keys or values there as it likes."""
    base = random_layer(1, 2, 30, 12)
    n_extra = 3
    kept_values = torch.cat([random_rows(1, 2, n_extra, 8, seed=9), base.kept_values], dim=2)
    kept_keys = torch.cat([random_rows(1, 2, n_extra, 8, seed=8), base.kept_keys], dim=2)
    eviction = Eviction(base.eviction.survivors, base.eviction.slots + n_extra, base.eviction.evicted, 30)
    layer = Layer(base.keys, base.values, kept_keys, kept_values, eviction)
    result, expected = run(layer, merge_keys=True), run(base, merge_keys=True)
    assert_same_bits(result.values[:, :, :n_extra], kept_values[:, :, :n_extra])
    assert_same_bits(result.values[:, :, n_extra:], expected.values)
    assert_same_bits(result.keys[:, :, :n_extra], kept_keys[:, :, :n_extra])
    assert_same_bits(result.keys[:, :, n_extra:], expected.keys)


def test_cosines_and_means_use_the_layer_before_the_eviction():
    """A press may rotate the keys it keeps; that must not change what merges where."""
    layer = random_layer(1, 2, 30, 12)
    rotated = Layer(layer.keys, layer.values, -layer.kept_keys, layer.kept_values, layer.eviction)
    assert_same_bits(run(rotated).values, run(layer).values)
    assert run(rotated).keys is rotated.kept_keys


@pytest.mark.parametrize("where", ["keys", "values"])
@pytest.mark.parametrize("name", ["nan", "inf", "-inf", "one_nan"])
@pytest.mark.parametrize("merge_keys", [False, True])
def test_an_evicted_row_that_is_not_finite_does_not_spread(where, name, merge_keys):
    layer = random_layer(1, 2, 40, 15, kind="masked", seed=7)
    clean = run(layer, merge_keys=merge_keys)
    column = int(clean.is_merged[0, 0].nonzero()[0])
    put_special_row(getattr(layer, where), 0, 0, int(layer.eviction.evicted[0, 0, column]), name)
    result = run(layer, merge_keys=merge_keys)
    assert not result.is_merged[0, 0, column]
    assert result.weight[0, 0, column] == 0
    others = torch.arange(result.weight.shape[-1]) != column
    assert torch.equal(result.is_merged[..., others], clean.is_merged[..., others])
    slot = layer.eviction.slots[0, 0, clean.target[0, 0, column]]
    changed = (result.values != clean.values).any(dim=-1)
    changed[0, 0, slot] = changed[0, 0, layer.eviction.evicted[0, 0, column]] = False
    assert not changed.any()
    assert result.values[0, 0, slot].isfinite().all()
    assert_blend(layer, result, merge_keys=merge_keys)


@pytest.mark.parametrize("length", [1e38, 3.4e38, torch.finfo(torch.float32).max, 1e-38, 1e-44])
@pytest.mark.parametrize("merge_keys", [False, True])
def test_the_largest_and_smallest_float32_neither_overflow_nor_vanish(length, merge_keys):
    signs = random_rows(1, 1, 30, 8, seed=2).sign()
    is_survivor = torch.arange(30).view(1, 1, -1) < 3
    layer = masked(signs * length, signs.flip(-1) * length, is_survivor, ~is_survivor)
    result = run(layer, merge_keys=merge_keys)
    assert result.is_merged.sum() > 10
    assert (result.weight[result.is_merged] <= 0.5 + 1e-6).all()
    assert result.values.isfinite().all()
    assert_blend(layer, result, merge_keys=merge_keys)


@pytest.mark.parametrize("sign", [1, -1])
def test_equal_values_of_the_largest_float32_stay_what_they_are(sign):
    largest = sign * torch.finfo(torch.float32).max
    keys = torch.ones(1, 1, 50, 4)
    is_survivor = torch.arange(50).view(1, 1, -1) == 0
    for n_evicted in range(1, 50):
        is_evicted = ~is_survivor & (torch.arange(50) <= n_evicted)
        result = run(masked(keys, keys * largest, is_survivor, is_evicted))
        assert result.is_merged.all()
        assert result.values.isfinite().all()
        torch.testing.assert_close(result.values, keys * largest, rtol=1e-6, atol=0)


def test_a_tiny_value_next_to_a_huge_one_has_no_weight_and_the_other_way_round_full_weight():
    tiny, huge = torch.full((4,), 1e-38), torch.full((4,), 1e38)
    assert run(one_merge(1.0, evicted_value=tiny, target_value=huge)).weight.item() < 1e-37
    assert run(one_merge(1.0, evicted_value=huge, target_value=tiny)).weight.item() == pytest.approx(1.0)


def test_two_zero_values_have_no_weight():
    layer = one_merge(1.0, torch.zeros(4), torch.zeros(4))
    result = run(layer)
    assert result.weight.item() == 0
    assert not result.is_merged.any()
    assert_same_bits(result.values, layer.kept_values)


def test_opposite_keys_merge_not_at_all():
    keys = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]).view(1, 1, 2, 2)
    is_survivor = torch.tensor([[[True, False]]])
    result = run(masked(keys, keys, is_survivor, ~is_survivor))
    assert result.similarity.item() == -1
    assert not result.is_merged.any()


@pytest.mark.parametrize(("n_kept", "k_len"), [(0, 5), (5, 5), (0, 0)])
def test_nothing_evicted_or_nothing_left_returns_what_the_press_left(n_kept, k_len):
    layer = random_layer(2, 2, k_len, n_kept)
    result = run(layer, merge_keys=True)
    assert result.values is layer.kept_values
    assert result.keys is layer.kept_keys
    assert not result.is_merged.any()
    assert result.similarity.shape == layer.eviction.evicted.shape


@pytest.mark.parametrize(("n_kept", "k_len"), [(1, 2), (1, 30), (29, 30)])
@pytest.mark.parametrize("options", GRID[::7])
def test_one_survivor_and_one_evicted(n_kept, k_len, options):
    layer = random_layer(2, 2, k_len, n_kept)
    assert_blend(layer, run(layer, **options), **options)


def test_ragged_heads_with_nothing_evicted_or_nothing_left_are_left_alone():
    is_survivor = torch.zeros(1, 4, 20, dtype=torch.bool)
    is_survivor[0, 0] = True
    is_survivor[0, 2, :7] = True
    is_survivor[0, 3, 1] = True
    keys, values = random_rows(1, 4, 20, 8, seed=0), random_rows(1, 4, 20, 8, seed=1)
    layer = masked(keys, values, is_survivor, ~is_survivor)
    assert layer.eviction.is_ragged
    result = run(layer)
    assert_same_bits(result.values[:, :2], values[:, :2])
    assert result.is_merged[0, 2:].any(dim=-1).all()
    assert_blend(layer, result)


def test_positions_that_are_neither_survivors_nor_evicted_play_no_part():
    keys = torch.ones(1, 1, 3, 4)
    values = torch.tensor([1.0, 100.0, 3.0]).view(1, 1, 3, 1).expand(-1, -1, -1, 4).contiguous()
    is_survivor, is_evicted = torch.tensor([[[False, False, True]]]), torch.tensor([[[True, False, False]]])
    result = run(masked(keys, values, is_survivor, is_evicted), value_norm_weighting=False)
    assert result.values[0, 0, :, 0].tolist() == [1.0, 100.0, 2.0]


def test_a_head_is_blended_alone():
    layer = random_layer(2, 3, 60, 25, seed=6)
    together = run(layer, merge_keys=True, merge_fraction=0.6, max_merge_per_token=2)
    for b, h in itertools.product(range(2), range(3)):
        one = (slice(b, b + 1), slice(h, h + 1))
        eviction = Eviction(layer.eviction.survivors[one], layer.eviction.slots[one], layer.eviction.evicted[one], 60)
        alone = run(
            Layer(layer.keys[one], layer.values[one], layer.kept_keys[one], layer.kept_values[one], eviction),
            merge_keys=True,
            merge_fraction=0.6,
            max_merge_per_token=2,
        )
        for name in TENSORS:
            assert torch.equal(getattr(alone, name), getattr(together, name)[one])


def test_the_same_input_gives_the_same_bits():
    layer = random_layer(1, 2, 600, 50, head_dim=64, dtype=torch.bfloat16)
    first = run(layer, merge_keys=True)
    for _ in range(5):
        again = run(layer, merge_keys=True)
        assert torch.equal(again.values, first.values)
        assert torch.equal(again.keys, first.keys)


def test_views_along_k_len_give_what_their_copies_give():
    cache = random_rows(2, 3, 100, 16, seed=5)
    view = cache[:, :, 10:90]
    kept = random_layer(2, 3, 80, 30).eviction.survivors
    from_view, from_copy = run(shrunk(view, view, kept)), run(shrunk(view.clone(), view.clone(), kept))
    assert torch.equal(from_view.values, from_copy.values)
    whole = torch.arange(80).expand(2, 3, -1) < 30
    in_place = masked(view, view, whole, ~whole)
    assert run(in_place).values.is_contiguous()
    assert_blend(in_place, run(in_place, merge_keys=True), merge_keys=True)


def test_tensors_that_require_grad_are_blended_without_a_graph():
    layer = random_layer(1, 2, 30, 10)
    layer.keys.requires_grad_()
    layer.values.requires_grad_()
    result = run(layer, merge_keys=True)
    assert not result.values.requires_grad
    assert not result.keys.requires_grad


@pytest.mark.parametrize("is_ragged", [False, True])
def test_blend_runs_on_meta_tensors_of_131072_tokens(is_ragged):
    k_len, heads, n_kept = 131_072, 2, 65_536
    meta = torch.device("meta")
    survivors = torch.empty(1, heads, n_kept, dtype=torch.int64, device=meta)
    counts = ((n_kept, 1000), (17, n_kept)) if is_ragged else None
    n_slots = k_len if is_ragged else n_kept
    before, after = (torch.empty(1, heads, n, 128, dtype=torch.bfloat16, device=meta) for n in (k_len, n_slots))
    layer = Layer(
        before,
        before,
        after,
        after,
        Eviction(survivors, survivors, torch.empty_like(survivors), k_len, counts),
    )
    result = run(layer, merge_fraction=0.75, max_merge_per_token=3, merge_keys=True)
    assert result.values.shape == result.keys.shape == (1, heads, n_slots, 128)
    assert result.values.dtype == torch.bfloat16
    assert all(getattr(result, name).device == meta for name in TENSORS)


@settings(max_examples=40, deadline=None)
@given(layer=layers(), options=options)
def test_merged_values_stay_within_the_hull_of_what_was_mixed(layer, options):
    assume(layer.values.isfinite().all())
    result = run(layer, **options)
    for b, h, *_ in heads_of(layer.eviction):
        before, after = layer.values[b, h].double(), result.values[b, h].double()
        if after.numel():
            slack = TOLERANCE[layer.values.dtype] * before.abs().amax(dim=0)
            assert (after.amax(dim=0) <= before.amax(dim=0) + slack).all()
            assert (after.amin(dim=0) >= before.amin(dim=0) - slack).all()
            assert after.isfinite().all()


def test_arithmetic_stays_in_float32_under_autocast_and_another_default_dtype():
    layer = random_layer(1, 2, 60, 25, head_dim=32)
    expected = run(layer, merge_keys=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = run(layer, merge_keys=True)
    torch.set_default_dtype(torch.bfloat16)
    try:
        under_default = run(layer, merge_keys=True)
    finally:
        torch.set_default_dtype(torch.float32)
    for result in (under_autocast, under_default):
        for name in TENSORS:
            assert torch.equal(getattr(result, name), getattr(expected, name))


def test_what_comes_out_may_be_written_to_with_gradients():
    result = run(random_layer(1, 2, 30, 10), merge_keys=True)
    factor = torch.ones(8, requires_grad=True)
    for tensor in (result.keys, result.values):
        tensor.mul_(factor)
        assert tensor.requires_grad


@pytest.mark.parametrize("seed", range(3))
def test_sums_over_segments_are_those_of_plain_addition(monkeypatch, seed):
    generator = torch.Generator().manual_seed(seed)
    to_row = torch.randint(13, (500,), generator=generator).sort().values
    to_row = to_row[to_row != 4]  # takes nothing
    rows = random_rows(len(to_row), 7, seed=seed)
    start = random_rows(13, 7, seed=seed + 100)
    expected = start.double().index_add_(0, to_row, rows.double())
    monkeypatch.setattr(rows_module, "adds_in_order", lambda device: False)
    sums = start.clone()
    rows_module.add_rows_(sums, to_row, rows)
    torch.testing.assert_close(sums[:-1].double(), expected[:-1], rtol=0, atol=2e-5)
    assert torch.equal(sums[4], start[4])


@settings(max_examples=60, deadline=None)
@given(layer=layers(), options=options)
def test_blend_as_a_gpu_adds_it_up_is_that_of_the_oracle(layer, options):
    with mock.patch.object(rows_module, "adds_in_order", return_value=False):
        assert_blend(layer, run(layer, **options), **options)


class Operations(TorchDispatchMode):
    """Remembers which operations ran."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_on_a_gpu_nothing_is_added_in_the_order_of_threads():
    """Seen on ``meta`` tensors, which take the same path."""
    meta = torch.device("meta")
    rows, kept = torch.empty(1, 2, 100, 16, device=meta), torch.empty(1, 2, 50, 16, device=meta)
    survivors = torch.empty(1, 2, 50, dtype=torch.int64, device=meta)
    layer = Layer(rows, rows, kept, kept, Eviction(survivors, survivors, survivors.clone(), 100))
    with Operations() as operations:
        run(layer, merge_keys=True, merge_fraction=0.5, max_merge_per_token=2)
    assert "embedding_dense_backward" in operations.names
    assert not operations.names & {
        "index_add_",
        "index_add",
        "scatter_add_",
        "scatter_add",
        "index_put_",
        "bincount",
        "segment_reduce",
    }


@pytest.mark.parametrize("kind", ["shrunk", "masked", "ragged"])
def test_tensors_that_lie_token_by_token_in_memory_give_what_their_copies_give(kind):
    layer = random_layer(2, 3, 40, 20, kind=kind)
    parts = (layer.keys, layer.values, layer.kept_keys, layer.kept_values)
    by_token = (part.transpose(1, 2).contiguous().transpose(1, 2) for part in parts)
    expected, result = (run(one, merge_keys=True) for one in (layer, Layer(*by_token, layer.eviction)))
    assert torch.equal(result.keys, expected.keys)
    assert torch.equal(result.values, expected.values)
    assert result.keys.is_contiguous()
    assert result.values.is_contiguous()


def test_a_tile_without_bytes_is_an_error():
    with pytest.raises(ValueError, match="tile_bytes must be at least 1, got 0"):
        run(random_layer(1, 1, 4, 2), tile_bytes=0)
