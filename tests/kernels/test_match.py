# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Matching: against its naive form, an oracle in plain loops, and what it promises."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import Layer, evict, heads_of, layers, masked, put_special_row, random_layer, random_rows, shrunk

from kvpress_merging.eviction import Eviction
from kvpress_merging.kernels import match as match_module
from kvpress_merging.kernels import match_heads, nearby
from kvpress_merging.kernels import rows as rows_module
from kvpress_merging.kernels.match import Match, attention_match, naive_attention_match
from kvpress_merging.kernels.match_heads import query_weights

RIDGES = {"key_ridge": 0.1}
TOLERANCE = {torch.float32: 1e-3, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.fixture
def whatever_its_error(monkeypatch):
    """Have heads take any fit that is finite."""
    monkeypatch.setattr(match_module, "_MAX_ERROR", math.inf)


def queries_for(layer: Layer, n_queries: int, seed: int = 5) -> torch.Tensor:
    bsz, heads, _, head_dim = layer.keys.shape
    return random_rows(bsz, heads, n_queries, head_dim, seed=seed) * head_dim**-0.5


def redundant_layer(bsz: int = 1, heads: int = 2, k_len: int = 40, n_kept: int = 20, **options) -> Layer:
    """Neighbours hold nearly the same, as in a text: what is evicted has a survivor that it resembles."""
    dtype, kind, seed = options.get("dtype", torch.float32), options.get("kind", "shrunk"), options.get("seed", 0)
    keys, values = (
        random_rows(bsz, heads, k_len // 4 + 1, 8, seed=seed + i).repeat_interleave(4, 2)[:, :, :k_len]
        + 0.2 * random_rows(bsz, heads, k_len, 8, seed=seed + 10 + i)
        for i in (0, 1)
    )
    return evict(keys.to(dtype), values.to(dtype), n_kept, kind, seed)


def run(layer: Layer, queries: torch.Tensor, kernel=attention_match, kept_queries=None, **options) -> Match:
    return kernel(
        layer.keys,
        layer.values,
        layer.kept_keys,
        layer.kept_values,
        queries,
        queries if kept_queries is None else kept_queries,
        layer.eviction,
        **RIDGES | options,
    )


def assert_same(actual: Match, expected: Match, dtype: torch.dtype) -> None:
    torch.testing.assert_close(actual.error_before, expected.error_before, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(actual.error_after, expected.error_after, rtol=5e-3, atol=1e-4)
    assert actual.is_fitted.dtype == torch.bool
    # A head that is about as good either way may go either way.
    differs = actual.is_fitted != expected.is_fitted
    assert (match_module._MAX_ERROR - expected.error_after).abs()[differs].lt(1e-2).all()
    for ours, theirs in ((actual.keys, expected.keys), (actual.values, expected.values)):
        assert ours.dtype == dtype
        assert ours.shape == theirs.shape
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(
            ours[~differs].float(), theirs[~differs].float(), rtol=tolerance, atol=tolerance, equal_nan=True
        )


@pytest.fixture
def small_windows(monkeypatch):
    """So small that in a short context some survivors are out of sight."""
    monkeypatch.setattr(nearby, "WINDOW", 8)
    for module in (nearby, match_heads):
        monkeypatch.setattr(module, "BLOCK", 4)


# Against the naive form.


@pytest.mark.usefixtures("whatever_its_error")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", ["shrunk", "masked", "ragged"])
@pytest.mark.parametrize(("k_len", "n_kept"), [(2, 1), (40, 20), (41, 33), (150, 70), (200, 140)])
def test_it_gives_what_its_naive_form_gives(kind, dtype, k_len, n_kept):
    layer = redundant_layer(2, 3, k_len, n_kept, kind=kind, dtype=dtype)
    queries = queries_for(layer, 13)
    assert_same(run(layer, queries), run(layer, queries, naive_attention_match), dtype)


@pytest.mark.usefixtures("whatever_its_error")
@pytest.mark.parametrize("n_queries", [1, 2, 7, 40])
@pytest.mark.parametrize("options", [{}, {"key_ridge": 2.0}])
def test_parameters_and_numbers_of_queries(n_queries, options):
    layer = redundant_layer(1, 2, 60, 21)
    queries = queries_for(layer, n_queries)
    assert_same(run(layer, queries, **options), run(layer, queries, naive_attention_match, **options), torch.float32)


@pytest.mark.parametrize("kind", ["shrunk", "masked", "ragged"])
def test_heads_take_the_fits_that_the_naive_form_takes_and_no_others(kind, monkeypatch):
    alike = redundant_layer(1, 3, 60, 30)
    keys = torch.cat([alike.keys, random_rows(1, 3, 60, 8, seed=20)], dim=1)
    values = torch.cat([alike.values, random_rows(1, 3, 60, 8, seed=21)], dim=1)
    layer = evict(keys, values, 30, kind, seed=0)
    queries = queries_for(layer, 13)
    errors = run(layer, queries, naive_attention_match).error_after.flatten().sort().values
    monkeypatch.setattr(match_module, "_MAX_ERROR", float(errors[2:4].mean()))
    match, expected = run(layer, queries), run(layer, queries, naive_attention_match)
    assert match.is_fitted.tolist() == expected.is_fitted.tolist()
    assert match.is_fitted.sum() == 3
    assert_same(match, expected, torch.float32)


@pytest.mark.usefixtures("whatever_its_error")
@pytest.mark.parametrize("k_len", [40, 3 * nearby.WINDOW])  # windows end before what the first head kept does
def test_heads_that_lost_nothing_or_everything_keep_no_other_from_its_fit(k_len):
    whole = redundant_layer(1, 4, k_len, k_len)
    is_survivor = torch.arange(k_len).expand(1, 4, k_len) % 2 == 0
    is_survivor = is_survivor | (torch.arange(4) == 0)[:, None]  # the first head keeps all, the third nothing
    is_survivor = is_survivor & (torch.arange(4) != 2)[:, None]
    layer = masked(whole.keys, whole.values, is_survivor, ~is_survivor)
    queries = queries_for(layer, 13)
    match = run(layer, queries)
    assert match.is_fitted.tolist() == [[False, True, False, True]]
    assert_same(match, run(layer, queries, naive_attention_match), torch.float32)


@pytest.mark.usefixtures("whatever_its_error", "small_windows")
@pytest.mark.parametrize("seed", range(8))
def test_each_head_may_lose_any_share_of_its_positions(seed):
    whole = redundant_layer(1, 6, 60, 60, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    shares = torch.tensor([0.0, 0.1, 0.5, 0.5, 0.9, 1.0])[torch.randperm(6, generator=generator)]
    is_survivor = torch.rand(1, 6, 60, generator=generator) < shares[:, None]
    layer = masked(whole.keys, whole.values, is_survivor, ~is_survivor)
    queries = queries_for(layer, 13)
    assert_same(run(layer, queries), run(layer, queries, naive_attention_match), torch.float32)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(layer=layers(), n_queries=st.integers(1, 9))
def test_any_layer_leaves_finite_heads_finite_and_unfitted_heads_as_they_were(layer, n_queries):
    match = run(layer, queries_for(layer, n_queries))
    assert match.keys.shape == layer.kept_keys.shape
    assert match.values.shape == layer.kept_values.shape
    assert match.keys.dtype == layer.keys.dtype
    for b, h, _, slots, evicted in heads_of(layer.eviction):
        if not match.is_fitted[b, h] or not evicted:
            assert match.keys[b, h].equal(layer.kept_keys[b, h]) or not layer.kept_keys[b, h].isfinite().all()
            torch.testing.assert_close(match.keys[b, h], layer.kept_keys[b, h], rtol=0, atol=0, equal_nan=True)
            torch.testing.assert_close(match.values[b, h], layer.kept_values[b, h], rtol=0, atol=0, equal_nan=True)
        else:
            assert match.keys[b, h, slots].isfinite().all()
            assert match.values[b, h, slots].isfinite().all()
            assert match.error_after[b, h] < 2.001
        left_alone = sorted(set(range(layer.kept_keys.shape[2])) - set(slots))
        torch.testing.assert_close(
            match.keys[b, h, left_alone], layer.kept_keys[b, h, left_alone], rtol=0, atol=0, equal_nan=True
        )


# An oracle in plain loops.


def oracle(
    layer: Layer,
    queries: list,
    b: int,
    h: int,
    survivors: list[int],
    evicted: list[int],
    softcap: float | None = None,
    sinks: list[float] | None = None,
) -> tuple[list[list[float]], list[list[float]]]:
    """Mean keys and values of one head, if all evicted positions are near all survivors, in loops of Python floats."""
    keys, values = layer.keys[b, h].double().tolist(), layer.values[b, h].double().tolist()
    head_dim, n_queries, channels = len(keys[0]), len(queries), range(len(values[0]))
    share = dict.fromkeys(survivors + evicted, 0.0)
    errors = []
    for r, query in enumerate(queries):
        logits = {j: math.fsum(x * y for x, y in zip(query, keys[j])) for j in share}
        if softcap is not None:
            logits = {j: softcap * math.tanh(logit / softcap) for j, logit in logits.items()}
        weight = {j: math.exp(logit) for j, logit in logits.items()}
        total = math.fsum(weight.values()) + (0 if sinks is None else math.exp(sinks[r]))
        for j in share:
            share[j] += weight[j] / total / n_queries
        lost = [math.fsum(weight[i] / total * values[i][d] for i in evicted) for d in channels]
        errors.append(math.fsum(x * x for x in lost))
    weights = [(1 + error * n_queries / math.fsum(errors)) / 2 for error in errors]
    moment = [
        [math.fsum(w * q[c] * q[d] for w, q in zip(weights, queries)) for d in range(head_dim)] for c in range(head_dim)
    ]
    unit = math.fsum(moment[d][d] for d in range(head_dim)) / head_dim
    mean_square = math.fsum(x * x for j in share for x in values[j]) / len(share)

    def distance(i: int, j: int) -> float:
        difference = [x - y for x, y in zip(keys[i], keys[j])]
        products = (moment[c][d] * difference[c] * difference[d] for c in range(head_dim) for d in range(head_dim))
        of_logits = (math.fsum(products) + unit * math.fsum(x * x for x in difference)) / n_queries
        return of_logits + 4 * math.fsum((x - y) ** 2 for x, y in zip(values[i], values[j])) / mean_square

    place_of = {j: j for j in survivors}
    nearest = {i: min((j for j in survivors if j != i), key=lambda j: distance(i, j)) for i in share}
    apart, away = ({i: distance(i, nearest[i]) for i in side} for side in (survivors, evicted))
    spare = sorted((j for j in survivors if nearest[j] < j), key=apart.get)
    for j, i in zip(spare, sorted(evicted, key=away.get, reverse=True)):
        if away[i] > 4 * apart[j]:
            place_of[i] = place_of.pop(j)
    counted_to = {i: place_of[min(place_of, key=lambda j: distance(i, j))] for i in share if i not in place_of}
    counted_to |= place_of
    mean_keys, mean_values = [], []
    for j in survivors:
        weight = {i: share[i] + 1e-3 for i in share if counted_to[i] == j}
        total = math.fsum(weight.values())
        for means, rows in ((mean_keys, keys), (mean_values, values)):
            means.append([math.fsum(w * rows[i][d] for i, w in weight.items()) / total for d in range(len(rows[0]))])
    return mean_keys, mean_values


@pytest.mark.usefixtures("whatever_its_error")
@pytest.mark.parametrize("kind", ["shrunk", "ragged"])
def test_values_are_the_means_that_loops_in_float64_give(kind):
    layer = redundant_layer(1, 2, 24, 9, kind=kind)
    queries = queries_for(layer, 5)
    match = run(layer, queries)
    assert match.is_fitted.all()
    for b, h, survivors, slots, evicted in heads_of(layer.eviction):
        _, expected = oracle(layer, queries[b, h].tolist(), b, h, survivors, evicted)
        torch.testing.assert_close(match.values[b, h, slots], torch.tensor(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("whatever_its_error")
@pytest.mark.parametrize("kind", ["shrunk", "ragged"])
def test_where_no_query_reaches_keys_are_the_means_that_loops_in_float64_give(kind):
    layer = redundant_layer(1, 2, 24, 9, kind=kind)
    queries = queries_for(layer, 5)
    match = run(layer, queries)
    unreached = torch.linalg.qr(queries.transpose(2, 3), mode="complete").Q[..., 5:]
    for b, h, survivors, slots, evicted in heads_of(layer.eviction):
        expected, _ = oracle(layer, queries[b, h].tolist(), b, h, survivors, evicted)
        torch.testing.assert_close(
            match.keys[b, h, slots] @ unreached[b, h], torch.tensor(expected) @ unreached[b, h], rtol=1e-4, atol=1e-4
        )


# What it promises.


def attention(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return (queries @ keys.transpose(-1, -2)).softmax(dim=-1) @ values


@pytest.mark.usefixtures("whatever_its_error")
def test_of_survivors_with_equal_keys_the_one_with_the_likest_value_takes_it():
    keys, values = (random_rows(1, 1, 20, 8, seed=i) for i in (0, 1))
    keys[0, 0, [2, 9, 14]] = keys[0, 0, 5].clone()
    values[0, 0, 9] = values[0, 0, 5] + 0.1
    layer = shrunk(keys, values, torch.tensor([[[j for j in range(20) if j != 5]]]))
    changed = (run(layer, queries_for(layer, 9)).values - layer.kept_values)[0, 0].abs().amax(dim=-1) > 1e-6
    assert changed.nonzero().flatten().tolist() == [8]  # where position 9 stands


def test_a_query_that_lost_nothing_weighs_half_of_the_mean_and_the_rest_by_what_they_lost():
    residual = torch.tensor([[[0.0, 0.0], [3.0, 4.0], [0.0, 5.0], [1.0, 1.0]]])
    torch.testing.assert_close(query_weights(residual.norm(dim=2)), 0.5 + torch.tensor([[0.0, 25.0, 25.0, 2.0]]) / 26)
    assert query_weights(torch.zeros(2, 3)).eq(0.5).all()


@pytest.mark.parametrize("n_kept", [8, 20, 32])
def test_queries_that_it_has_not_seen_get_nearer_to_the_full_output(n_kept):
    layer = redundant_layer(2, 4, 40, n_kept)
    # queries of a text lie about a few directions
    directions = random_rows(2, 4, 1, 8, seed=8)
    seen, unseen = (directions + 0.3 * random_rows(2, 4, 64, 8, seed=seed) for seed in (20, 21))
    match = run(layer, seen)
    full = attention(unseen, layer.keys, layer.values)
    evicted = (attention(unseen, layer.kept_keys, layer.kept_values) - full).norm(dim=(-1, -2))
    fitted = (attention(unseen, match.keys, match.values) - full).norm(dim=(-1, -2))
    assert fitted.mean() < 0.5 * evicted.mean()


def test_a_head_takes_a_fit_though_eviction_cost_the_reference_queries_less():
    keys, values = (random_rows(1, 2, 30, 8, seed=i) for i in (0, 1))
    keys[..., 0] = 0.0
    keys[:, :, 1::2, 0] = -40.0  # all that goes is looked at by none of them
    layer = shrunk(keys, values, torch.arange(0, 30, 2).expand(1, 2, -1))
    queries = 0.1 * random_rows(1, 2, 12, 8, seed=2)
    queries[..., 0] = 1.0
    match = run(layer, queries)
    assert (match.error_before < match.error_after).all()
    assert match.is_fitted.all()
    assert not match.values.equal(layer.kept_values)


def test_where_eviction_costs_nothing_there_is_nothing_to_fit():
    layer = redundant_layer(1, 2)
    layer = evict(layer.keys, torch.zeros_like(layer.values), 20, "shrunk", seed=0)
    match = run(layer, queries_for(layer, 9))
    assert not match.is_fitted.any()
    assert match.keys.equal(layer.kept_keys)


def test_a_head_whose_fit_leaves_too_much_error_keeps_evictions_bits(monkeypatch):
    layer = redundant_layer(4, 8, 40, 25)
    queries = queries_for(layer, 20)
    left = run(layer, queries).error_after
    most_error = float(left.median()) + 1e-6
    monkeypatch.setattr(match_module, "_MAX_ERROR", most_error)
    match = run(layer, queries)
    assert match.is_fitted.equal(left < most_error)
    assert match.is_fitted.sum() == 16
    assert match.keys[~match.is_fitted].equal(layer.kept_keys[~match.is_fitted])
    assert match.values[~match.is_fitted].equal(layer.kept_values[~match.is_fitted])


@pytest.mark.usefixtures("whatever_its_error")
def test_a_large_ridge_makes_keys_means_as_values_are():
    layer = redundant_layer(1, 3)
    layer = evict(layer.keys, layer.keys, 20, "shrunk", seed=0)
    match = run(layer, queries_for(layer, 9), key_ridge=1e8)
    torch.testing.assert_close(match.keys, match.values, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("whatever_its_error")
def test_a_large_ridge_holds_keys_that_the_press_rewrote():
    layer = redundant_layer(1, 3)
    eviction = Eviction(**vars(layer.eviction) | {"keys_rewritten": True})
    layer = Layer(layer.keys, layer.values, layer.kept_keys, layer.kept_values, eviction)
    match = run(layer, queries_for(layer, 9), key_ridge=1e8)
    torch.testing.assert_close(match.keys, layer.kept_keys, rtol=1e-5, atol=1e-5)


def test_what_no_query_looks_at_counts_alike_in_the_mean():
    keys, values = (random_rows(1, 1, 30, 8, seed=i) for i in (0, 1))
    keys[..., 0] = 0.0
    keys[0, 0, 4:6, 0] = -40.0  # one that stays, and the one that is counted to it
    layer = shrunk(keys, values, torch.arange(0, 30, 2).expand(1, 1, -1))
    queries = 0.1 * random_rows(1, 1, 12, 8, seed=2)
    queries[..., 0] = 1.0
    match = run(layer, queries)
    assert match.is_fitted.all()
    torch.testing.assert_close(match.values[0, 0, 2], values[0, 0, 4:6].mean(dim=0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["shrunk", "masked", "ragged"])
def test_nothing_evicted_and_nothing_kept_change_nothing(kind):
    for n_kept in (0, 12):
        layer = random_layer(2, 2, 12, n_kept, kind=kind, seed=1)
        match = run(layer, queries_for(layer, 4))
        assert match.keys.equal(layer.kept_keys)
        assert match.values.equal(layer.kept_values)
        assert not match.is_fitted.any()
        assert not match.error_before.any()


@pytest.mark.usefixtures("whatever_its_error")
def test_scaling_the_values_scales_the_result():
    layer = redundant_layer(1, 3)
    queries = queries_for(layer, 9)
    match = run(layer, queries)
    scaled = run(Layer(layer.keys, 4 * layer.values, layer.kept_keys, 4 * layer.kept_values, layer.eviction), queries)
    assert scaled.is_fitted.equal(match.is_fitted)
    torch.testing.assert_close(scaled.values, 4 * match.values)
    torch.testing.assert_close(scaled.keys, match.keys)


@pytest.mark.usefixtures("whatever_its_error")
@pytest.mark.parametrize("kind", ["shrunk", "ragged"])
def test_a_head_does_not_depend_on_others(kind):
    layer = redundant_layer(2, 3, kind=kind)
    queries = queries_for(layer, 9)
    together = run(layer, queries)
    broken = Layer(*(tensor.clone() for tensor in vars(layer).values() if torch.is_tensor(tensor)), layer.eviction)
    for tensor in (broken.keys, broken.kept_keys):
        tensor[0, 1] = torch.nan
    match = run(broken, queries)
    assert not match.is_fitted[0, 1]
    others = torch.ones(2, 3, dtype=torch.bool)
    others[0, 1] = False
    assert match.is_fitted[others].equal(together.is_fitted[others])
    torch.testing.assert_close(match.keys[others], together.keys[others])
    torch.testing.assert_close(match.values[others], together.values[others])
    assert match.values[0, 1].equal(broken.kept_values[0, 1])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("row", ["zero", "nan", "inf", "huge", "subnormal"])
@pytest.mark.parametrize("of", ["survivor", "evicted"])
def test_rows_that_arithmetic_stumbles_over_leave_no_nan(row, of, dtype):
    keys, values = (random_rows(1, 2, 30, 8, seed=i, dtype=dtype) for i in (0, 1))
    kept = torch.arange(0, 30, 2).expand(1, 2, -1)
    for rows in (keys, values):
        put_special_row(rows, 0, 0, 4 if of == "survivor" else 5, row)
    layer = shrunk(keys, values, kept)
    match = run(layer, queries_for(layer, 6))
    for ours, before in ((match.keys, layer.kept_keys), (match.values, layer.kept_values)):
        assert ours.isfinite()[before.isfinite().all(dim=-1)].all()
    if row in ("nan", "inf"):
        assert not match.is_fitted[0, 0]


def test_repeated_tokens_and_equal_queries_are_no_singular_system():
    keys, values = (random_rows(1, 2, 1, 8, seed=i).expand(1, 2, 30, 8).contiguous() for i in (0, 1))
    layer = shrunk(keys, values, torch.arange(0, 30, 3).expand(1, 2, -1))
    queries = random_rows(1, 2, 1, 8, seed=3).expand(1, 2, 12, 8).contiguous()
    match = run(layer, queries, key_ridge=1e-3)
    assert match.is_fitted.all()
    # ten stand for thirty: together they attract what the thirty did
    attracted, before = (
        (queries[:, :, :1] @ rows.transpose(-1, -2)).exp().sum(-1) for rows in (match.keys, layer.keys)
    )
    torch.testing.assert_close(attracted, before, rtol=0.02, atol=0)
    torch.testing.assert_close(match.values, layer.kept_values, rtol=0.01, atol=0.01)


@pytest.mark.usefixtures("whatever_its_error")
@pytest.mark.parametrize("kind", ["shrunk", "ragged"])
def test_keys_that_the_press_rotated_anew_are_fitted_with_queries_rotated_as_far(kind):
    layer = redundant_layer(1, 2, kind=kind)
    queries = queries_for(layer, 64)
    rotation = torch.linalg.qr(random_rows(8, 8, seed=9)).Q
    rotated = Layer(
        layer.keys,
        layer.values,
        layer.kept_keys @ rotation,
        layer.kept_values,
        Eviction(**vars(layer.eviction) | {"keys_rewritten": True}),
    )
    as_it_was = Layer(*(getattr(layer, name) for name in vars(layer) if name != "eviction"), rotated.eviction)
    match, expected = run(rotated, queries, kept_queries=queries @ rotation), run(as_it_was, queries)
    assert expected.is_fitted.all()
    torch.testing.assert_close(match.values, expected.values, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(match.keys, expected.keys @ rotation, rtol=1e-4, atol=1e-4)
    assert_same(match, run(rotated, queries, naive_attention_match, kept_queries=queries @ rotation), torch.float32)


@pytest.mark.usefixtures("whatever_its_error")
@pytest.mark.parametrize("kind", ["shrunk", "ragged"])
def test_channels_that_the_press_pruned_stay_pruned_and_what_they_did_is_made_good_for_in_the_others(kind):
    layer = redundant_layer(1, 2, kind=kind)
    queries = queries_for(layer, 40)
    is_left = torch.tensor([1, 1, 0, 1, 1, 0, 1, 1])
    eviction = Eviction(**vars(layer.eviction) | {"keys_rewritten": True})
    pruned = Layer(layer.keys, layer.values, layer.kept_keys * is_left, layer.kept_values, eviction)
    match = run(pruned, queries, kept_queries=queries * is_left)
    assert match.is_fitted.all()
    assert not match.keys[..., is_left == 0].any()
    assert (match.keys != pruned.kept_keys)[..., is_left == 1].any(dim=2).all()
    assert_same(match, run(pruned, queries, naive_attention_match, kept_queries=queries * is_left), torch.float32)


@pytest.mark.usefixtures("whatever_its_error")
def test_two_runs_give_the_same_bits():
    layer = redundant_layer(2, 3, 400, 150, kind="ragged")
    queries = queries_for(layer, 40)
    first, second = run(layer, queries), run(layer, queries)
    assert first.keys.equal(second.keys)
    assert first.values.equal(second.values)


@pytest.mark.usefixtures("whatever_its_error")
@pytest.mark.parametrize("heads_per_block", [1, 2, 5])
def test_blocks_of_heads_do_not_change_the_result(heads_per_block, monkeypatch):
    layer = redundant_layer(1, 5, 60, 20)
    queries = queries_for(layer, 9)
    expected = run(layer, queries)
    monkeypatch.setattr(rows_module, "_CPU_BLOCK_BYTES", 4 * 16 * (60 + 2 * 20) * heads_per_block)
    match = run(layer, queries)
    torch.testing.assert_close(match.keys, expected.keys)
    torch.testing.assert_close(match.values, expected.values)


def test_it_runs_on_meta_tensors_of_a_long_context():
    k_len, n_kept = 131_072, 65_536
    keys, values = (torch.empty(1, 8, k_len, 128, dtype=torch.bfloat16, device="meta") for _ in "kv")
    kept = torch.empty(1, 8, n_kept, dtype=torch.int64, device="meta")
    layer = Layer(keys, values, keys[:, :, :n_kept], values[:, :, :n_kept], Eviction.from_kept(kept, k_len))
    match = run(layer, torch.empty(1, 8, 128, 128, device="meta"))
    assert match.keys.shape == match.values.shape == (1, 8, n_kept, 128)
    assert match.keys.dtype == torch.bfloat16
    assert match.is_fitted.device.type == match.error_after.device.type == "meta"


@pytest.mark.usefixtures("whatever_its_error")
@pytest.mark.parametrize("kind", ["shrunk", "ragged"])
def test_sums_over_segments_are_those_of_plain_addition(kind, monkeypatch):
    layer = redundant_layer(2, 3, 60, 20, kind=kind)
    queries = queries_for(layer, 9)
    expected = run(layer, queries)
    # as where additions have no fixed order of their own
    monkeypatch.setattr(rows_module, "adds_in_order", lambda device: False)
    match = run(layer, queries)
    torch.testing.assert_close(match.keys, expected.keys)
    torch.testing.assert_close(match.values, expected.values)


@pytest.mark.usefixtures("whatever_its_error")
def test_arithmetic_stays_in_float32_under_another_default_dtype():
    layer = redundant_layer(2, 3)
    queries = queries_for(layer, 64)
    expected = run(layer, queries)
    torch.set_default_dtype(torch.bfloat16)
    try:
        match = run(layer, queries)
    finally:
        torch.set_default_dtype(torch.float32)
    assert match.is_fitted.any()
    for name in ("keys", "values", "is_fitted", "error_before", "error_after"):
        assert getattr(match, name).equal(getattr(expected, name))


@pytest.mark.usefixtures("whatever_its_error")
def test_a_fit_is_taken_though_the_sum_of_its_numbers_is_more_than_float16_holds():
    layer = redundant_layer(1, 2, dtype=torch.float16)
    layer = shrunk(layer.keys, 600 * layer.values.abs(), layer.eviction.survivors)
    match = run(layer, queries_for(layer, 64))
    assert match.is_fitted.all()
    assert match.values.sum(dim=(2, 3)).isinf().all()
    assert match.values.isfinite().all()


@pytest.mark.usefixtures("whatever_its_error")
def test_arithmetic_stays_in_float32_under_autocast():
    layer = redundant_layer(1, 2, 60, 30)
    queries = queries_for(layer, 13)
    expected = run(layer, queries)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = run(layer, queries)
    assert torch.equal(result.keys, expected.keys)
    assert torch.equal(result.values, expected.values)


# Caps on logits, and sinks.

CAPS_AND_SINKS = [(None, True), (3.0, False), (0.7, False), (1.5, True)]


def cap_and_sinks(softcap: float | None, has_sinks: bool, queries: torch.Tensor) -> dict:
    return {"softcap": softcap, "sinks": 2 + random_rows(*queries.shape[:3], seed=30) if has_sinks else None}


@pytest.mark.usefixtures("whatever_its_error")
@pytest.mark.parametrize("kind", ["shrunk", "masked", "ragged"])
@pytest.mark.parametrize(("softcap", "has_sinks"), CAPS_AND_SINKS)
@pytest.mark.parametrize("keys_rewritten", [False, True])
def test_with_a_cap_and_sinks_it_gives_what_its_naive_form_gives(kind, softcap, has_sinks, keys_rewritten):
    layer = redundant_layer(2, 3, 90, 40, kind=kind)
    layer.eviction = Eviction(**vars(layer.eviction) | {"keys_rewritten": keys_rewritten})
    queries = 3 * queries_for(layer, 13)
    options = cap_and_sinks(softcap, has_sinks, queries)
    match, expected = (run(layer, queries, kernel, **options) for kernel in (attention_match, naive_attention_match))
    assert match.is_fitted.all()
    assert_same(match, expected, torch.float32)
    assert not torch.allclose(match.keys, run(layer, queries).keys, atol=1e-3)


@pytest.mark.usefixtures("whatever_its_error")
@pytest.mark.parametrize("kind", ["shrunk", "ragged"])
@pytest.mark.parametrize(("softcap", "has_sinks"), CAPS_AND_SINKS)
def test_with_a_cap_and_sinks_means_are_those_that_loops_in_float64_give(kind, softcap, has_sinks):
    layer = redundant_layer(1, 2, 24, 9, kind=kind)
    queries = queries_for(layer, 5)
    options = cap_and_sinks(softcap, has_sinks, queries)
    match = run(layer, queries, **options)
    unreached = torch.linalg.qr(queries.transpose(2, 3), mode="complete").Q[..., 5:]
    for b, h, survivors, slots, evicted in heads_of(layer.eviction):
        sinks = options["sinks"][b, h].tolist() if has_sinks else None
        means = oracle(layer, queries[b, h].tolist(), b, h, survivors, evicted, softcap, sinks)
        mean_keys, mean_values = map(torch.tensor, means)
        torch.testing.assert_close(match.values[b, h, slots], mean_values, rtol=1e-4, atol=1e-5)
        unshifted = match.keys[b, h, slots] @ unreached[b, h]
        torch.testing.assert_close(unshifted, mean_keys @ unreached[b, h], rtol=1e-4, atol=1e-4)


def attention_of_layer(queries, keys, values, softcap, sinks) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and attention mass, as Gemma 2 caps its logits and as gpt-oss has sinks, in float64."""
    logits = (queries @ keys.mT).double()
    logits = logits if softcap is None else softcap * (logits / softcap).tanh()
    sinks = torch.full_like(logits[..., :1], -math.inf) if sinks is None else sinks[..., None].double()
    mass = torch.cat([logits, sinks], dim=-1).softmax(dim=-1)[..., :-1]
    return mass @ values.double(), mass.sum(dim=-1)


@pytest.mark.parametrize(("softcap", "has_sinks"), [(6.0, False), (None, True), (6.0, True)])
def test_with_a_cap_and_sinks_attention_is_matched_as_the_layer_attends(softcap, has_sinks):
    layer = redundant_layer(2, 4, 60, 30)
    queries = random_rows(2, 4, 1, 8, seed=8) + 0.3 * random_rows(2, 4, 64, 8, seed=20)
    options = cap_and_sinks(softcap, has_sinks, queries)
    fitted, unaware = run(layer, queries, **options), run(layer, queries)
    full = attention_of_layer(queries, layer.keys, layer.values, **options)

    def errors(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        output, mass = attention_of_layer(queries, keys, values, **options)
        of_output = (output - full[0]).square().sum(dim=(-1, -2)) / full[0].square().sum(dim=(-1, -2))
        return (of_output + (mass - full[1]).square().mean(dim=-1)).mean()

    assert errors(fitted.keys, fitted.values) < 0.1 * errors(layer.kept_keys, layer.kept_values)
    if softcap is not None:
        assert errors(fitted.keys, fitted.values) < 0.6 * errors(unaware.keys, unaware.values)


def test_losing_what_only_the_sink_looks_past_costs_what_it_is_worth():
    """The mass that a sink takes is neither lost nor to be made good for."""
    layer = redundant_layer(1, 2, 40, 20)
    queries = queries_for(layer, 9)
    sinks = torch.full((1, 2, 9), 30.0)  # all but everything
    match = run(layer, queries, sinks=sinks)
    assert (match.output_norm < 1e-8).all()
    assert (match.error_before < 2).all()
    none = run(layer, queries, sinks=torch.full((1, 2, 9), -math.inf))
    assert_same(none, run(layer, queries), torch.float32)


@pytest.mark.usefixtures("whatever_its_error")
def test_a_cap_far_above_all_logits_changes_nothing():
    layer = redundant_layer(1, 2)
    queries = queries_for(layer, 9)
    assert_same(run(layer, queries, softcap=1e4), run(layer, queries), torch.float32)


@pytest.mark.usefixtures("whatever_its_error")
def test_logits_at_their_cap_ask_no_key_for_more_than_it_can_give():
    layer = redundant_layer(1, 2)
    queries = 40 * queries_for(layer, 9)
    match = run(layer, queries, softcap=0.5)
    assert match.keys.isfinite().all()
    assert (match.keys.abs() < 10 * layer.keys.abs().amax()).all()


def test_with_a_cap_and_sinks_it_runs_on_meta_tensors():
    keys = torch.empty(1, 2, 300, 16, device="meta")
    kept = torch.empty(1, 2, 150, dtype=torch.int64, device="meta")
    layer = Layer(keys, keys, keys[:, :, :150], keys[:, :, :150], Eviction.from_kept(kept, 300))
    match = run(layer, torch.empty(1, 2, 9, 16, device="meta"), softcap=5.0, sinks=torch.empty(1, 2, 9, device="meta"))
    assert match.keys.device.type == "meta"
