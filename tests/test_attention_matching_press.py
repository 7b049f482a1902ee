# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""AttentionMatchingPress: its fields, around every press, and what it promises of each."""

import copy
import dataclasses
import pickle

import pytest
import torch
from every_press import CASES, REFUSED
from kvpress import (
    ComposedPress,
    DecodingPress,
    DMSPress,
    FinchPress,
    KeyRerotationPress,
    KnormPress,
    PrefillDecodingPress,
    ThinKPress,
)
from replay import (
    Layer,
    attention_modules,
    clear_masks,
    full_cache,
    input_ids_for,
    max_error_left,
    model_for,
    positions_by_value,
    run,
    snapshot,
)
from test_caches import BACKENDS, dequantized, prefill, quantized
from tiny import FAMILIES, tiny_model
from transformers import DynamicCache

from kvpress_merging import AttentionMatchingPress, MergingPress
from kvpress_merging import attention_matching_press as press_module
from kvpress_merging.eviction import Eviction
from kvpress_merging.kernels.match import Match, naive_attention_match

AT_PREFILL = [name for name, case in CASES.items() if case.moment != "decoding"]


def set_up(name: str, llama):
    case = CASES[name]
    return case, model_for(case, llama), input_ids_for(case)


def heads_of(report) -> tuple[int, int]:
    rows = [row for row in report.to_dict().values() if "heads" in row]
    return sum(row["heads"] for row in rows), sum(row["heads_fitted"] for row in rows)


def test_a_press_around_it_that_calls_compress_gets_what_a_forward_pass_gives(llama):
    input_ids = input_ids_for(CASES["Knorm"])
    given = []

    def note(module, args, kwargs, output):
        given.append((module, kwargs))

    handles = [module.register_forward_hook(note, with_kwargs=True) for module in attention_modules(llama)]
    full = run(llama, None, input_ids)
    for handle in handles:
        handle.remove()
    expected = run(llama, AttentionMatchingPress(KnormPress(0.5)), input_ids)
    clear_masks(llama)
    press = AttentionMatchingPress(KnormPress(0.5))
    for (module, kwargs), layer, layer_expected in zip(given, full, expected, strict=True):
        keys, values = press.compress(module, kwargs["hidden_states"], layer.keys, layer.values, None, kwargs)
        assert torch.equal(keys, layer_expected.keys)
        assert torch.equal(values, layer_expected.values)
    assert sum(row["heads_fitted"] for row in press.report.to_dict().values()) > 0


# Fields.


def test_defaults_and_their_order():
    press = AttentionMatchingPress(KnormPress(0.5), 64, 0.5)
    assert (press.n_queries, press.key_ridge) == (64, 0.5)
    default = AttentionMatchingPress(KnormPress(0.5))
    assert (default.n_queries, default.key_ridge) == (96, 0.1)
    assert repr(default) == (
        "AttentionMatchingPress(press=KnormPress(compression_ratio=0.5), n_queries=96, key_ridge=0.1)"
    )


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("n_queries", 0, ValueError),
        ("n_queries", 1.5, TypeError),
        ("n_queries", True, TypeError),
        ("key_ridge", 0, ValueError),
        ("key_ridge", float("inf"), ValueError),
        ("key_ridge", "0.1", TypeError),
        ("key_ridge", -1.0, ValueError),
        ("key_ridge", float("nan"), ValueError),
        ("key_ridge", None, TypeError),
    ],
)
def test_a_wrong_field_is_an_error_that_names_it_at_construction_and_when_set(field, value, error):
    with pytest.raises(error, match=field):
        AttentionMatchingPress(KnormPress(0.5), **{field: value})
    press = AttentionMatchingPress(KnormPress(0.5))
    with pytest.raises(error, match=field):
        setattr(press, field, value)
    assert press == AttentionMatchingPress(KnormPress(0.5))


@pytest.mark.parametrize("name", REFUSED)
def test_a_press_with_nothing_to_match_is_refused_at_construction(name):
    with pytest.raises(TypeError, match="merge"):
        AttentionMatchingPress(REFUSED[name]())


def test_a_merging_press_is_refused_inside_and_around():
    for wrap in (
        lambda: AttentionMatchingPress(MergingPress(KnormPress(0.5))),
        lambda: MergingPress(AttentionMatchingPress(KnormPress(0.5))),
    ):
        with pytest.raises(TypeError, match="already merges"):
            wrap()


def test_copies_of_a_press_are_equal_to_it(llama):
    press = AttentionMatchingPress(FinchPress(0.5), n_queries=32)
    for other in (copy.deepcopy(press), pickle.loads(pickle.dumps(press)), dataclasses.replace(press)):
        assert other == press
        assert type(other) is AttentionMatchingPress
        assert isinstance(other, FinchPress)
    assert dataclasses.replace(press, n_queries=8).n_queries == 8
    run(llama, used := AttentionMatchingPress(KnormPress(0.5)), input_ids_for(CASES["Knorm"]))
    assert copy.deepcopy(used) == used


# Around every press.


@dataclasses.dataclass
class Given:
    """What one layer's matching was given, and what it made of it."""

    keys: torch.Tensor
    values: torch.Tensor
    kept_keys: torch.Tensor
    kept_values: torch.Tensor
    queries: torch.Tensor
    kept_queries: torch.Tensor
    eviction: Eviction
    key_ridge: float
    match: Match

    def naive(self) -> Match:
        *arguments, key_ridge, _ = (getattr(self, field.name) for field in dataclasses.fields(self))
        return naive_attention_match(*arguments, key_ridge=key_ridge)


@pytest.fixture
def given(monkeypatch):
    """What the matching of each layer was given, by layer."""
    by_layer: dict[int, Given] = {}
    fold, match, layers = AttentionMatchingPress.fold, press_module.attention_match, []

    def watched_fold(self, module, *args, **kwargs):
        layers.append(module.layer_idx)
        return fold(self, module, *args, **kwargs)

    def watched_match(*args, key_ridge, softcap, sinks):
        assert (softcap, sinks) == (None, None)  # of these models
        copies = [arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args]
        made = match(*args, key_ridge=key_ridge)
        assert layers[-1] not in by_layer
        by_layer[layers[-1]] = Given(*copies, key_ridge, made)
        return made

    monkeypatch.setattr(AttentionMatchingPress, "fold", watched_fold)
    monkeypatch.setattr(press_module, "attention_match", watched_match)
    return by_layer


def assert_told_what_the_press_did(given: Given, full: Layer, bare: Layer) -> None:
    """The layer before and after, and which positions stand where, as the bare cache says."""
    torch.testing.assert_close(given.kept_keys, bare.keys, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(given.kept_values, bare.values, rtol=1e-4, atol=1e-4)
    k_len = full.keys.shape[2]  # KVCompose and RestoreKV leave more behind the context
    torch.testing.assert_close(given.keys[:, :, :k_len], full.keys, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(given.values[:, :, :k_len], full.values, rtol=1e-4, atol=1e-4)
    positions, eviction = positions_by_value(full, bare), given.eviction
    for b, h, *lists in eviction.heads():
        survivors, slots, evicted = (entries.tolist() for entries in lists)
        assert survivors == positions[b, h, slots].tolist() == sorted(survivors)
        assert not bare.is_masked[b, h, slots].any()
        kept = {int(p) for p, is_masked in zip(positions[b, h], bare.is_masked[b, h]) if p >= 0 and not is_masked}
        assert set(survivors) == kept
        assert evicted == sorted(set(range(k_len)) - kept)


@pytest.mark.parametrize("name", AT_PREFILL)
def test_the_cache_holds_what_the_naive_form_makes_of_what_the_press_did(name, llama, given):
    case, model, input_ids = set_up(name, llama)
    full, bare = full_cache(case, model, input_ids), run(model, case.make(), input_ids)
    press = AttentionMatchingPress(case.make(), n_queries=48, key_ridge=0.2)
    matched = run(model, press, input_ids)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in attention_modules(model))
    heads, heads_fitted = heads_of(press.report)
    assert heads >= heads_fitted > heads // 2
    for layer_idx, (layer_full, layer_bare, layer) in enumerate(zip(full, bare, matched, strict=True)):
        assert torch.equal(layer.is_masked, layer_bare.is_masked)
        assert (layer.keys.shape, layer.keys.dtype) == (layer_bare.keys.shape, layer_bare.keys.dtype)
        if layer_idx not in given:  # nothing was evicted here
            assert torch.equal(layer.keys, layer_bare.keys)
            assert torch.equal(layer.values, layer_bare.values)
            continue
        assert_told_what_the_press_did(given[layer_idx], layer_full, layer_bare)
        n_seen_since = 64 if name.startswith("KVCompose") else 0  # of the replay that it makes of the context
        assert (given[layer_idx].queries.shape[2], given[layer_idx].key_ridge) == (48 + n_seen_since, 0.2)
        expected, is_fitted = given[layer_idx].naive(), given[layer_idx].match.is_fitted
        assert torch.equal(is_fitted, expected.is_fitted)
        torch.testing.assert_close(layer.keys, expected.keys, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(layer.values, expected.values, rtol=1e-3, atol=1e-3)
        for ours, theirs in ((layer.keys, layer_bare.keys), (layer.values, layer_bare.values)):
            assert torch.equal(ours[layer.is_masked], theirs[layer.is_masked])


@pytest.mark.parametrize("name", ["Knorm", "AdaKV", "KeyRerotation", "Composed", "DMS"])
def test_rows_of_a_batch_are_fitted_each_by_itself(name, llama):
    case, model, _ = set_up(name, llama)
    input_ids = input_ids_for(case, bsz=3)
    together = run(model, AttentionMatchingPress(case.make()), input_ids)
    for row in range(3):
        alone = run(model, AttentionMatchingPress(case.make()), input_ids[row : row + 1])
        for layer, layer_alone in zip(together, alone):
            torch.testing.assert_close(layer.values[row], layer_alone.values[0], rtol=1e-2, atol=1e-2)
            torch.testing.assert_close(layer.keys[row], layer_alone.keys[0], rtol=1e-2, atol=1e-2)


def test_a_press_that_evicts_nothing_leaves_the_cache_as_it_is(llama):
    input_ids = input_ids_for(CASES["Knorm"])
    press = AttentionMatchingPress(KnormPress(0.0))
    for layer, full in zip(run(llama, press, input_ids), run(llama, None, input_ids)):
        assert torch.equal(layer.keys, full.keys)
        assert torch.equal(layer.values, full.values)
    assert str(press.report) == "4 layers, nothing evicted"


def test_restore_tokens_are_left_as_they_are(llama):
    case, model, input_ids = set_up("RestoreKV", llama)
    full, bare = run(model, None, input_ids), run(model, case.make(), input_ids)
    fitted = run(model, AttentionMatchingPress(case.make()), input_ids)
    for layer_full, layer_bare, layer in zip(full, bare, fitted):
        is_foreign = torch.from_numpy(positions_by_value(layer_full, layer_bare) < 0)
        assert is_foreign.any()
        assert torch.equal(layer.values[is_foreign], layer_bare.values[is_foreign])
        assert torch.equal(layer.keys[is_foreign], layer_bare.keys[is_foreign])


def test_pruned_channels_stay_pruned(llama):
    def make():
        return ComposedPress([KnormPress(0.5), ThinKPress(0.5)])

    bare = run(llama, make(), input_ids_for(CASES["Knorm"]))
    fitted = run(llama, AttentionMatchingPress(make()), input_ids_for(CASES["Knorm"]))
    for layer_bare, layer in zip(bare, fitted):
        is_pruned = (layer_bare.keys == 0).all(dim=2)
        assert is_pruned.sum(dim=-1).eq(layer_bare.keys.shape[-1] // 2).all()
        assert torch.equal((layer.keys == 0).all(dim=2), is_pruned)
        assert not torch.equal(layer.keys, layer_bare.keys)
        assert not torch.equal(layer.values, layer_bare.values)


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_fitted(family, attn_implementation):
    model = tiny_model(family)
    model.set_attn_implementation(attn_implementation)
    press = AttentionMatchingPress(KnormPress(0.5))
    input_ids = input_ids_for(CASES["Knorm"], bsz=2)
    bare = run(model, KnormPress(0.5), input_ids)
    fitted = run(model, press, input_ids)
    assert press.report.to_dict()
    for module, layer_bare, layer in zip(attention_modules(model), bare, fitted):
        is_left_alone = family == "gemma3" and getattr(module, "is_sliding", False)
        assert torch.equal(layer.values, layer_bare.values) == is_left_alone
        assert (module.layer_idx in press.report.to_dict()) == (not is_left_alone)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_finite_and_in_its_dtype(dtype):
    model = tiny_model("llama").to(dtype)
    for layer in run(model, AttentionMatchingPress(KnormPress(0.7)), input_ids_for(CASES["Knorm"], bsz=2)):
        assert layer.values.dtype == layer.keys.dtype == dtype
        assert torch.isfinite(layer.values).all()
        assert torch.isfinite(layer.keys).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["Knorm", "AdaKV", "KVzip"])
def test_a_quantized_cache_is_fitted(name, backend, llama):
    case, model, input_ids = set_up(name, llama)
    cache, unfitted_cache = quantized(model, backend), quantized(model, backend)
    press = AttentionMatchingPress(case.make())
    fitted = prefill(model, press, input_ids, cache)
    with max_error_left(0):
        unfitted = prefill(model, AttentionMatchingPress(case.make()), input_ids, unfitted_cache)
    bare_cache = quantized(model, backend)
    bare = prefill(model, case.make(), input_ids, bare_cache)
    assert heads_of(press.report)[1] > 0
    for layer_bare, layer_unfitted, layer in zip(bare, unfitted, fitted):
        assert layer.keys.shape == layer_bare.keys.shape
        assert torch.equal(layer.is_masked, layer_bare.is_masked)
        assert layer.values.isfinite().all()
        # within a step of the quantizer
        step = 0.3 * layer_bare.keys.abs().max()
        assert (layer_unfitted.keys - layer_bare.keys).abs().max() < step
    assert isinstance(dequantized(cache, attention_modules(model)[0]), Layer)


# While decoding, and inside other presses.


def decode_all(model, press, input_ids, n_steps: int):
    cache = DynamicCache()
    clear_masks(model)
    with torch.no_grad(), press(model):
        model.model(input_ids=input_ids, past_key_values=cache)
        for step in range(n_steps):
            position = input_ids.shape[1] + step
            model.model(
                input_ids=torch.tensor([[20 + step]]),
                past_key_values=cache,
                position_ids=torch.tensor([[position]]),
            )
    return snapshot(model, cache)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.moment == "decoding"])
def test_evictions_while_decoding_are_fitted(name, llama):
    case, model, input_ids = set_up(name, llama)
    press = AttentionMatchingPress(case.make())
    fitted, bare = (decode_all(model, p, input_ids, 40) for p in (press, case.make()))
    heads, heads_fitted = heads_of(press.report)
    assert heads >= heads_fitted > 0
    for layer_bare, layer in zip(bare, fitted):
        assert layer.keys.shape == layer_bare.keys.shape
        assert layer.values.isfinite().all()
    # Those of the prefill, and of each of the tokens since.
    assert all(row["n_queries"] in range(96, 96 + 40 + 1) for row in press.report.to_dict().values() if "heads" in row)
    assert any(row["n_queries"] > 96 for row in press.report.to_dict().values())


def test_a_new_prefill_forgets_the_queries_of_the_last(llama):
    press = AttentionMatchingPress(DecodingPress(KnormPress(), compression_interval=8, target_size=64))
    input_ids = input_ids_for(CASES["Knorm"])
    decode_all(llama, press, input_ids, 12)
    again = decode_all(llama, press, input_ids, 12)
    fresh = decode_all(llama, copy.deepcopy(press), input_ids, 12)
    for layer, layer_fresh in zip(again, fresh):
        assert torch.equal(layer.values, layer_fresh.values)


def test_it_fits_inside_presses_that_call_it(llama):
    input_ids = input_ids_for(CASES["Knorm"])
    alone = run(llama, AttentionMatchingPress(KnormPress(0.5)), input_ids)
    for outer in (
        PrefillDecodingPress(prefilling_press=AttentionMatchingPress(KnormPress(0.5))),
        ComposedPress([AttentionMatchingPress(KnormPress(0.5)), ThinKPress(0.3)]),
    ):
        for layer, layer_alone in zip(run(llama, outer, input_ids), alone):
            torch.testing.assert_close(layer.values, layer_alone.values)
    with pytest.raises(ValueError, match="no scores"):
        run(llama, DMSPress(AttentionMatchingPress(KnormPress())), input_ids)


class OwnAttention(torch.nn.Module):
    """Attention that knows of none of transformers' attention functions."""

    def __init__(self, module):
        super().__init__()
        vars(self).update(vars(module))

    def forward(self, hidden_states, past_key_values=None, **kwargs):
        shape = (*hidden_states.shape[:2], -1, self.head_dim)
        query, key, value = (
            projection(hidden_states).view(shape).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx, {})
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return self.o_proj(output.transpose(1, 2).flatten(2)), None


def test_a_layer_that_does_not_tell_its_queries_is_an_error_that_names_it_and_merging_works():
    model = tiny_model("llama")
    model.model.layers[2].self_attn = OwnAttention(model.model.layers[2].self_attn)
    input_ids = input_ids_for(CASES["Knorm"])
    message = (
        r"AttentionMatchingPress cannot ask layer 2 of llama \(OwnAttention\) for its queries: its attention is none "
        "of transformers' attention functions; MergingPress works there"
    )
    with pytest.raises(ValueError, match=message):
        run(model, AttentionMatchingPress(KnormPress(0.5)), input_ids)
    press = MergingPress(KnormPress(0.5))
    run(model, press, input_ids)
    assert press.report.to_dict()[2]["merged"] > 0


def test_the_last_key_is_read_once_for_each_layer_and_always_after_the_pass(monkeypatch, llama):
    n_read = []
    is_far = press_module._is_far
    monkeypatch.setattr(press_module, "_is_far", lambda *args: n_read.append(args) or is_far(*args))
    model = copy.deepcopy(llama)
    for name, n_expected in (("Knorm", 4), ("AdaKV", 4), ("KVzip", 8), ("KVzip", 12), ("Knorm", 12)):
        run(model, AttentionMatchingPress(CASES[name].make()), input_ids_for(CASES[name]))
        assert len(n_read) == n_expected


def test_from_then_on_nothing_is_read_from_the_device_where_all_heads_lose_alike(monkeypatch, llama):
    fold = AttentionMatchingPress.fold
    run(llama, AttentionMatchingPress(KnormPress(0.5)), input_ids_for(CASES["Knorm"]))

    def watched_fold(self, *args):
        with monkeypatch.context() as patch:
            for name in ("item", "tolist", "nonzero", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__"):
                patch.setattr(torch.Tensor, name, lambda *args, name=name: pytest.fail(f"{name} reads the device"))
            return fold(self, *args)

    monkeypatch.setattr(AttentionMatchingPress, "fold", watched_fold)
    press = AttentionMatchingPress(KnormPress(0.5))
    run(llama, press, input_ids_for(CASES["Knorm"]))
    assert heads_of(press.report)[1] > 0


def test_soft_caps_and_sinks_reach_the_kernel(monkeypatch, llama):
    given, heads = [], torch.arange(4.0)
    ask, match = press_module.ask, press_module.attention_match

    def with_both(*args):
        return ask(*args)._replace(softcap=30.0, sinks=heads)

    def watched(*args, key_ridge, softcap, sinks):
        given.append((softcap, sinks))
        return match(*args, key_ridge=key_ridge, softcap=softcap, sinks=sinks)

    monkeypatch.setattr(press_module, "ask", with_both)
    monkeypatch.setattr(press_module, "attention_match", watched)
    run(llama, AttentionMatchingPress(KnormPress(0.5), n_queries=5), input_ids_for(CASES["Knorm"], bsz=2))
    for softcap, sinks in given:
        assert softcap == 30.0
        assert sinks.dtype == torch.float32
        assert sinks.tolist() == [[[0, 1, 0, 1, 0], [2, 3, 2, 3, 2]]] * 2
    assert len(given) == 4


# What it promises.


def attention_outputs(model, layers: list[Layer], hidden: list[dict]) -> list[torch.Tensor]:
    """Output of each layer for its own next queries, over a cache as a run left it."""
    outputs = []
    for module, layer, kwargs in zip(attention_modules(model), layers, hidden):
        cache = DynamicCache()
        for index in range(module.layer_idx + 1):
            cache.update(layer.keys.clone(), layer.values.clone(), index)
        seen = torch.zeros(1, 1, 1, layer.keys.shape[2] + 1)
        outputs.append(module(**kwargs | {"past_key_values": cache, "attention_mask": seen})[0])
    return outputs


@pytest.mark.parametrize("name", ["Knorm", "KeyRerotation"])
def test_the_attention_output_of_the_next_token_comes_nearer_to_the_full_caches(name, llama):
    case, model, _ = set_up(name, llama)
    # a text that repeats itself, so that the next token asks what those before it asked
    input_ids = input_ids_for(case, length=24).repeat(1, 6)
    next_ids = input_ids[:, :1]
    positions = {"full": 144, "bare": 144, "fitted": 144}
    layers = {
        "full": run(model, None, input_ids),
        "bare": run(model, case.make(), input_ids),
        "fitted": run(model, AttentionMatchingPress(case.make()), input_ids),
    }
    if isinstance(case.make(), KeyRerotationPress):
        positions["bare"] = positions["fitted"] = layers["bare"][0].keys.shape[2]
    errors: dict[str, float] = {}
    outputs = {}
    with torch.no_grad():
        hidden: list[dict] = []
        handles = [
            module.register_forward_pre_hook(lambda module, args, kwargs: hidden.append(kwargs), with_kwargs=True)
            for module in attention_modules(model)
        ]
        cache = DynamicCache()
        model.model(input_ids=input_ids, past_key_values=cache)
        hidden.clear()
        model.model(input_ids=next_ids, past_key_values=cache)
        for handle in handles:
            handle.remove()
        for kind, position in positions.items():
            embeddings = model.model.rotary_emb(hidden[0]["hidden_states"], torch.tensor([[position]]))
            asked = [kwargs | {"position_embeddings": embeddings} for kwargs in hidden]
            outputs[kind] = attention_outputs(model, layers[kind], asked)
    for kind in ("bare", "fitted"):
        errors[kind] = sum(float((a - b).norm() / b.norm()) for a, b in zip(outputs[kind], outputs["full"]))
    assert errors["fitted"] < 0.75 * errors["bare"]


def test_the_report_tells_what_was_fitted(llama):
    press = AttentionMatchingPress(KnormPress(0.5), n_queries=40)
    run(llama, press, input_ids_for(CASES["Knorm"]))
    for row in press.report.to_dict().values():
        assert row["heads"] == 2
        assert 0 <= row["heads_fitted"] <= 2
        assert 0 <= row["error_after"] <= row["error_before"]
        assert (row["kept"], row["evicted"]) == (96, 96)
        assert row["n_queries"] == 40
    assert "heads matched, 0 places exchanged; squared error of the attention output" in str(press.report)
    assert {"heads", "heads_fitted", "exchanged", "error_before", "error_after"} <= set(press.report.to_frame().columns)
