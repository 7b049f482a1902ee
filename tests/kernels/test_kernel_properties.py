# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""What the blend and matching never do, whatever layer they are given: a few hundred cases, or thousands."""

from __future__ import annotations

from dataclasses import replace
from math import inf
from unittest import mock

import torch
from hypothesis import assume, event, given
from hypothesis import strategies as st
from kernel_cases import Layer, evict, heads_of, layers, random_rows

from kvpress_merging.eviction import Eviction
from kvpress_merging.kernels import match
from kvpress_merging.kernels.blend import Blend, cosine_blend
from kvpress_merging.kernels.match import Match

# Relative to the largest number in the rows that were mixed.
ROUNDING = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
INTEGERS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
DTYPES = tuple(ROUNDING)
KINDS = ("shrunk", "masked", "ragged")

gates = st.fixed_dictionaries(
    {
        "similarity_threshold": st.sampled_from([0.0, 0.2, 0.9]),
        "merge_fraction": st.sampled_from([0.3, 0.75, 1.0]),
        "max_merge_per_token": st.sampled_from([0, 1, 3]),
        "value_norm_weighting": st.booleans(),
    }
)
powers_of_two = st.integers(-6, 6).map(lambda exponent: 2.0**exponent)
signs = st.sampled_from([1.0, -1.0])


@st.composite
def plain_layers(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = DTYPES) -> Layer:
    """Layers of every kind whose numbers are those of a normal distribution."""
    bsz, heads, k_len = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(2, 70))
    n_kept = draw(st.integers(1, k_len))
    head_dim, value_dim = draw(st.sampled_from([1, 4, 8, 17])), draw(st.sampled_from([1, 4, 9]))
    dtype, seed = draw(st.sampled_from(dtypes)), draw(st.integers(0, 2**31))
    keys = random_rows(bsz, heads, k_len, head_dim, seed=seed, dtype=dtype)
    # Neighbours are alike, as in a text, so that a fit is worth taking.
    values = random_rows(bsz, heads, k_len, value_dim, seed=seed + 1)
    values = (values + values.roll(1, 2) * draw(st.sampled_from([0.0, 3.0]))).to(dtype)
    return evict(keys, values, n_kept, draw(st.sampled_from(KINDS)), seed)


def blend(layer: Layer, **options) -> Blend:
    return cosine_blend(layer.keys, layer.values, layer.kept_keys, layer.kept_values, layer.eviction, **options)


def fit(layer: Layer, n_queries: int = 7, *, most_error: float | None = None, **options) -> Match:
    """``most_error`` says when a head takes its fit: a number without end is always, where it is finite."""
    bsz, heads, _, head_dim = layer.keys.shape
    queries = random_rows(bsz, heads, n_queries, head_dim, seed=5) * head_dim**-0.5
    options = {"key_ridge": 0.1} | options
    tensors = (layer.keys, layer.values, layer.kept_keys, layer.kept_values, queries, queries)
    with mock.patch.object(match, "_MAX_ERROR", match._MAX_ERROR if most_error is None else most_error):
        return match.attention_match(*tensors, layer.eviction, **options)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(INTEGERS[tensor.dtype])


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(bits(one), bits(other))


def same_bits_or_nan(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit by bit, but that one NaN is as good as another: gathering 16 bits on a CPU may turn it into another."""
    return same_bits(one.masked_fill(one.isnan(), torch.nan), other.masked_fill(other.isnan(), torch.nan))


def rest_of(kept: torch.Tensor, slots: list[int]) -> list[int]:
    return sorted(set(range(kept.shape[2])) - set(slots))


def scaled(layer: Layer, factor: float) -> Layer:
    return replace(layer, values=layer.values * factor, kept_values=layer.kept_values * factor)


def with_other_heads(layer: Layer, b: int, h: int, fill: str, seed: int) -> Layer:
    """The same layer, but for what all heads other than one hold."""

    def overwrite(rows: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        new[b, h] = rows[b, h]
        return new

    tensors = []
    for i, rows in enumerate((layer.keys, layer.values, layer.kept_keys, layer.kept_values)):
        # A masked layer is left as it was, so both are drawn from the same seed.
        drawn = random_rows(*rows.shape, seed=seed + i % 2, dtype=rows.dtype)
        new = drawn if fill == "random" else torch.full_like(rows, {"nan": torch.nan, "zero": 0.0}[fill])
        tensors.append(overwrite(rows, new))
    return Layer(*tensors, layer.eviction)


# Both


@given(layer=layers(), gates=gates, merge_keys=st.booleans())
def test_the_blend_keeps_order_shape_dtype_device_and_what_it_was_given(layer, gates, merge_keys):
    given_tensors = (layer.keys, layer.values, layer.kept_keys, layer.kept_values)
    before = [tensor.clone() for tensor in given_tensors]
    result = blend(layer, **gates, merge_keys=merge_keys)
    for tensor, copy in zip(given_tensors, before):
        assert same_bits(tensor, copy)
    for new, kept in ((result.keys, layer.kept_keys), (result.values, layer.kept_values)):
        assert (new.shape, new.dtype, new.device, new.stride()) == (kept.shape, kept.dtype, kept.device, kept.stride())
        for b, h, _, slots, evicted in heads_of(layer.eviction):
            takers = result.target[b, h, : len(evicted)][result.is_merged[b, h, : len(evicted)]]
            untouched = rest_of(kept, [slots[j] for j in takers])
            assert same_bits(new[b, h, untouched], kept[b, h, untouched])
    if not merge_keys:
        assert result.keys is layer.kept_keys


@given(layer=layers(), n_queries=st.integers(1, 12), most_error=st.sampled_from([None, inf]))
def test_the_re_fit_keeps_order_shape_dtype_device_and_what_it_was_given(layer, n_queries, most_error):
    given_tensors = (layer.keys, layer.values, layer.kept_keys, layer.kept_values)
    before = [tensor.clone() for tensor in given_tensors]
    result = fit(layer, n_queries, most_error=most_error)
    for tensor, copy in zip(given_tensors, before):
        assert same_bits(tensor, copy)
    for new, kept in ((result.keys, layer.kept_keys), (result.values, layer.kept_values)):
        assert (new.shape, new.dtype, new.device, new.stride()) == (kept.shape, kept.dtype, kept.device, kept.stride())
        for b, h, _, slots, _ in heads_of(layer.eviction):
            untouched = rest_of(kept, slots if result.is_fitted[b, h] else [])
            assert same_bits_or_nan(new[b, h, untouched], kept[b, h, untouched])


@given(layer=plain_layers(dtypes=(torch.float32,)), n_queries=st.integers(1, 12))
def test_keys_that_are_held_at_the_mean_of_what_they_stand_for_lie_among_the_keys_of_their_head(layer, n_queries):
    result = fit(layer, n_queries, most_error=inf, key_ridge=1e12)
    slack = 1e-5 * (1 + layer.keys.abs().amax())
    for b, h, _, slots, evicted in heads_of(layer.eviction):
        matched, keys = result.keys[b, h, slots], layer.keys[b, h]
        assert (matched >= keys.amin(dim=0) - slack).all()
        assert (matched <= keys.amax(dim=0) + slack).all()
        if len(evicted) == 0:
            assert torch.equal(matched, layer.kept_keys[b, h, slots])


@given(layer=plain_layers(), n_queries=st.integers(1, 12))
def test_fitted_values_lie_among_the_values_of_their_head(layer, n_queries):
    result = fit(layer, n_queries, most_error=inf)
    slack = 4 * torch.finfo(layer.values.dtype).eps * layer.values.float().abs().amax()
    for b, h, _, slots, _ in heads_of(layer.eviction):
        fitted, values = result.values[b, h, slots].float(), layer.values[b, h].float()
        assert (fitted >= values.amin(dim=0) - slack).all()
        assert (fitted <= values.amax(dim=0) + slack).all()


@given(layer=layers(), gates=gates, tile_bytes=st.sampled_from([1, 3000, 10**9]))
def test_two_blends_give_the_same_bits(layer, gates, tile_bytes):
    first, second = (blend(layer, **gates, tile_bytes=tile_bytes, merge_keys=True) for _ in range(2))
    assert same_bits(first.keys, second.keys)
    assert same_bits(first.values, second.values)


@given(layer=layers(), n_queries=st.integers(1, 12))
def test_two_re_fits_give_the_same_bits(layer, n_queries):
    first, second = (fit(layer, n_queries, most_error=inf) for _ in range(2))
    assert same_bits(first.keys, second.keys)
    assert same_bits(first.values, second.values)


@given(layer=plain_layers(), gates=gates, merge_keys=st.booleans(), data=st.data())
def test_a_blended_head_does_not_depend_on_other_heads_and_rows(layer, gates, merge_keys, data):
    bsz, heads = layer.keys.shape[:2]
    b, h = data.draw(st.integers(0, bsz - 1)), data.draw(st.integers(0, heads - 1))
    others = with_other_heads(layer, b, h, data.draw(st.sampled_from(["random", "nan", "zero"])), seed=17)
    expected, result = (blend(one, **gates, merge_keys=merge_keys) for one in (layer, others))
    assert same_bits(result.values[b, h], expected.values[b, h])
    assert same_bits(result.keys[b, h], expected.keys[b, h])


@given(layer=plain_layers(), most_error=st.sampled_from([None, inf]), data=st.data())
def test_a_fitted_head_does_not_depend_on_other_heads_and_rows(layer, most_error, data):
    bsz, heads = layer.keys.shape[:2]
    b, h = data.draw(st.integers(0, bsz - 1)), data.draw(st.integers(0, heads - 1))
    others = with_other_heads(layer, b, h, data.draw(st.sampled_from(["random", "nan", "zero"])), seed=17)
    expected, result = (fit(one, most_error=most_error) for one in (layer, others))
    event(f"fitted: {bool(expected.is_fitted[b, h])}")
    assert result.is_fitted[b, h] == expected.is_fitted[b, h]
    assert same_bits(result.values[b, h], expected.values[b, h])
    assert same_bits(result.keys[b, h], expected.keys[b, h])


@given(layer=plain_layers(dtypes=(torch.float32, torch.bfloat16)), factor=powers_of_two, sign=signs, gates=gates)
def test_values_scaled_by_a_power_of_two_give_the_scaled_blend_bit_by_bit(layer, factor, sign, gates):
    expected, result = blend(layer, **gates), blend(scaled(layer, sign * factor), **gates)
    assert torch.equal(result.is_merged, expected.is_merged)
    assert torch.equal(result.values, expected.values * (sign * factor))


@given(layer=plain_layers(), factor=st.floats(0.01, 100), sign=signs, gates=gates)
def test_values_scaled_by_any_number_give_the_scaled_blend(layer, factor, sign, gates):
    expected, result = blend(layer, **gates), blend(scaled(layer, sign * factor), **gates)
    assert torch.equal(result.is_merged, expected.is_merged)
    largest = float(layer.values.abs().max()) * factor
    # Rounded once more: where the values are scaled.
    atol = 3 * ROUNDING[layer.values.dtype] * largest
    torch.testing.assert_close(result.values.double(), expected.values.double() * (sign * factor), rtol=0, atol=atol)


@given(layer=plain_layers(dtypes=(torch.float32, torch.bfloat16)), factor=powers_of_two, sign=signs)
def test_values_scaled_by_a_power_of_two_give_the_scaled_re_fit_bit_by_bit(layer, factor, sign):
    expected, result = (fit(one, most_error=inf) for one in (layer, scaled(layer, sign * factor)))
    event(f"some head fitted: {bool(expected.is_fitted.any())}")
    assert torch.equal(result.is_fitted, expected.is_fitted)
    assert same_bits(result.keys, expected.keys)
    assert torch.equal(result.values, expected.values * (sign * factor))


# The blend


def with_evicted_positions_permuted(layer: Layer, seed: int) -> tuple[Layer, torch.Tensor]:
    """The same layer with what its evicted positions hold in another order, and where each went in ``evicted``."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = layer.keys.clone(), layer.values.clone()
    order = torch.arange(layer.eviction.evicted.shape[-1]).expand_as(layer.eviction.evicted).clone()
    for b, h, _, _, evicted in heads_of(layer.eviction):
        drawn = torch.randperm(len(evicted), generator=generator)
        order[b, h, : len(evicted)] = drawn
        moved = torch.tensor(evicted, dtype=torch.int64)[drawn]
        keys[b, h, evicted], values[b, h, evicted] = layer.keys[b, h, moved], layer.values[b, h, moved]
    # What a press leaves that masks is the layer itself, and what it masked there is nobody's concern.
    is_masking = layer.kept_keys is layer.keys
    kept = (keys, values) if is_masking else (layer.kept_keys, layer.kept_values)
    return Layer(keys, values, *kept, layer.eviction), order


@given(layer=layers(), gates=gates, merge_keys=st.booleans(), seed=st.integers(0, 10_000))
def test_the_order_of_evicted_positions_does_not_matter_where_no_cosines_tie(layer, gates, merge_keys, seed):
    result = blend(layer, **gates, merge_keys=merge_keys)
    for b, h, _, _, evicted in heads_of(layer.eviction):
        found = result.similarity[b, h, : len(evicted)]
        found = found[found.isfinite()]
        assume(len(found.unique()) == len(found))
    permuted, order = with_evicted_positions_permuted(layer, seed)
    other = blend(permuted, **gates, merge_keys=merge_keys)
    for name in ("similarity", "weight", "is_merged"):
        assert torch.equal(getattr(other, name), getattr(result, name).gather(-1, order)), name
    pairs = [(result.values, other.values, layer.values)]
    pairs += [(result.keys, other.keys, layer.keys)] if merge_keys else []
    for b, h, survivors, slots, evicted in heads_of(layer.eviction):
        takers = result.target[b, h, : len(evicted)]
        for ours, theirs, before in pairs:
            for j, slot in enumerate(slots):
                members = [evicted[i] for i in (result.is_merged[b, h, : len(evicted)] & (takers == j)).nonzero()]
                if not members:
                    assert same_bits(ours[b, h, slot], theirs[b, h, slot])
                    continue
                largest = float(before[b, h, [survivors[j], *members]].double().abs().max())
                slack = ROUNDING[before.dtype] * largest + 1e-44
                difference = ours[b, h, slot].double() - theirs[b, h, slot].double()
                assert float(difference.abs().max()) <= slack


@given(layer=layers(), gates=gates, seed=st.integers(0, 10_000))
def test_keys_keep_their_bits_and_values_lie_in_the_convex_hull_of_what_was_merged(layer, gates, seed):
    result = blend(layer, **gates)
    assert same_bits(result.keys, layer.kept_keys)
    for b, h, survivors, slots, evicted in heads_of(layer.eviction):
        is_merged, target = result.is_merged[b, h, : len(evicted)], result.target[b, h, : len(evicted)]
        for j in target[is_merged].unique().tolist():
            members = [survivors[j], *(evicted[i] for i in (is_merged & (target == j)).nonzero())]
            rows, mean = layer.values[b, h, members].double(), result.values[b, h, slots[j]].double()
            largest = float(rows.abs().max())
            if largest == 0:
                assert not mean.any()
                continue
            rows, mean = rows / largest, mean / largest
            # A point lies in the hull if no direction tells it from all of them: tried along the axes, along random
            # ones, and along those in which it lies from each of the rows and from their middle.
            directions = torch.cat(
                [
                    torch.eye(len(mean), dtype=torch.float64),
                    random_rows(24, len(mean), seed=seed, dtype=torch.float64),
                    mean - rows,
                    (mean - rows.mean(dim=0))[None],
                ]
            )
            directions = directions / directions.norm(dim=-1, keepdim=True).clamp(min=1e-12)
            of_rows, of_mean = directions @ rows.T, directions @ mean
            slack = ROUNDING[layer.values.dtype] * len(mean) ** 0.5 + 1e-44 / largest
            assert (of_mean <= of_rows.amax(dim=1) + slack).all()
            assert (of_mean >= of_rows.amin(dim=1) - slack).all()


@given(layer=plain_layers(), gates=gates, data=st.data())
def test_a_blended_head_is_the_same_alone(layer, gates, data):
    bsz, heads = layer.keys.shape[:2]
    b, h = data.draw(st.integers(0, bsz - 1)), data.draw(st.integers(0, heads - 1))
    one = (slice(b, b + 1), slice(h, h + 1))
    eviction = layer.eviction
    counts = None if eviction.counts is None else (eviction.counts[b * heads + h],)
    of_one = Eviction(eviction.survivors[one], eviction.slots[one], eviction.evicted[one], eviction.k_len, counts)
    alone = Layer(layer.keys[one], layer.values[one], layer.kept_keys[one], layer.kept_values[one], of_one)
    assert same_bits(blend(alone, **gates).values[0, 0], blend(layer, **gates).values[b, h])
