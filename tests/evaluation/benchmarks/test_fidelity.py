# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
import math
from weakref import WeakKeyDictionary

import pandas as pd
import pytest
import torch
from kvpress import (
    AdaKVPress,
    DecodingPress,
    FinchPress,
    KeyRerotationPress,
    KnormPress,
    PyramidKVPress,
    SnapKVPress,
    StreamingLLMPress,
)
from tiny import FAMILIES, VOCAB_SIZE, tiny_model
from transformers import DynamicCache

from evaluation.benchmarks import fidelity as benchmark
from evaluation.benchmarks.fidelity.compressed_cache import count_cache_bytes, read_continuation
from evaluation.benchmarks.fidelity.measure import compare_logits, measure_fidelity, measure_reference
from evaluation.text import Window

CONTEXT_LENGTH, CONTINUATION_LENGTH = 96, 17


def random_window(continuation_length=CONTINUATION_LENGTH):
    token_ids = torch.randint(3, VOCAB_SIZE, (1, CONTEXT_LENGTH + continuation_length), generator=torch.manual_seed(1))
    return Window(token_ids[:, :CONTEXT_LENGTH], token_ids[:, CONTEXT_LENGTH:], 0)


@pytest.fixture(scope="module")
def reference(model):
    return measure_reference(model, random_window(), attention_errors=True)


@torch.no_grad()
def read_token_by_token(model, press, window):
    """Logits at each continuation token, fed one at a time over the pressed cache: no mask, no batch of queries."""
    cache = DynamicCache()
    with press(model):
        model.model(input_ids=window.context_ids, past_key_values=cache)
    logits = []
    for i, token_id in enumerate(window.continuation_ids[0, :-1]):
        position_ids = torch.tensor([[window.context_ids.shape[1] + i]])
        logits.append(model(token_id[None, None], past_key_values=cache, position_ids=position_ids).logits[0, 0])
    return torch.stack(logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_full_cache_continues_as_one_forward_pass_over_everything_does(family):
    model, window = tiny_model(family), random_window()
    reference = measure_reference(model, window)
    with torch.no_grad():
        whole = model(torch.cat([window.context_ids, window.continuation_ids], dim=1)).logits[0]
    torch.testing.assert_close(reference.logits, whole[CONTEXT_LENGTH:-1], atol=1e-5, rtol=1e-5)


def test_a_press_that_evicts_nothing_changes_nothing(model, reference):
    fidelity = measure_fidelity(model, KnormPress(0.0), reference)
    assert fidelity.kl == 0
    assert fidelity.kl_per_token == (0,) * (CONTINUATION_LENGTH - 1)
    assert fidelity.nll == fidelity.nll_full
    assert fidelity.top1_agreement == 1
    assert fidelity.cache_bytes == fidelity.cache_bytes_seen == fidelity.cache_bytes_full
    assert fidelity.attention_errors == (0, 0, 0, 0)


def test_the_harder_a_press_evicts_the_farther_it_strays(model, reference):
    gentle, hard = (measure_fidelity(model, StreamingLLMPress(ratio), reference) for ratio in (0.25, 0.9))
    assert 0 < gentle.kl < hard.kl
    assert gentle.kl == pytest.approx(sum(gentle.kl_per_token) / (CONTINUATION_LENGTH - 1))
    assert all(0 < before < after for before, after in zip(gentle.attention_errors, hard.attention_errors))


@pytest.mark.parametrize(
    "press",
    [
        pytest.param(KnormPress(0.5), id="equal layers"),
        pytest.param(PyramidKVPress(0.5, window_size=8), id="layers of different lengths"),
        pytest.param(AdaKVPress(KnormPress(0.5)), id="masked positions"),
    ],
)
def test_one_pass_over_the_pressed_cache_is_what_feeding_token_by_token_is(model, reference, press):
    token_by_token = read_token_by_token(model, press, reference.window)
    kl, nll, _, agree = compare_logits(reference.logits, token_by_token, reference.window.continuation_ids[0, 1:])
    fidelity = measure_fidelity(model, press, reference)
    assert fidelity.kl_per_token == pytest.approx(kl.tolist(), abs=1e-4)
    assert fidelity.nll == pytest.approx(float(nll.mean()), abs=1e-4)
    assert fidelity.top1_agreement == float(agree.double().mean())
    assert fidelity.kl > 1e-3


def test_masked_positions_are_still_masked_after_the_pass(model, reference):
    measure_fidelity(model, AdaKVPress(KnormPress(0.5)), reference)
    cache_layers = model.model.layers
    assert all(layer.self_attn.masked_key_indices is not None for layer in cache_layers)
    measure_fidelity(model, KnormPress(0.5), reference)
    assert all(layer.self_attn.masked_key_indices is None for layer in cache_layers)


@pytest.mark.parametrize(
    ("press", "start"),
    [
        pytest.param(KnormPress(0.5), CONTEXT_LENGTH, id="positions kept"),
        pytest.param(KeyRerotationPress(KnormPress(0.5)), CONTEXT_LENGTH // 2, id="renumbered"),
        # It takes the delimiter out of the context: 95 tokens, of which it keeps 47.
        pytest.param(FinchPress(0.5), 47, id="renumbered by Finch"),
        pytest.param(FinchPress(0.5, rerotate_keys=False), CONTEXT_LENGTH, id="kept by Finch"),
    ],
)
def test_the_continuation_starts_where_the_pipeline_would_start_it(model, press, start, monkeypatch):
    window = random_window()
    if isinstance(press, FinchPress):
        press.delimiter_token_id = 0
        window.context_ids[0, -9] = press.delimiter_token_id
    starts = []

    def note_start(model, continuation_ids, cache, start):
        starts.append(start)
        return read_continuation(model, continuation_ids, cache, start)

    reference = measure_reference(model, window)
    monkeypatch.setattr("evaluation.benchmarks.fidelity.measure.read_continuation", note_start)
    measure_fidelity(model, press, reference)
    assert starts == [start]


def test_bytes_are_those_of_the_keys_and_values_left(model, reference):
    # 4 layers, keys and values, 2 heads, head_dim 16, float32
    position_bytes = 4 * 2 * 2 * 16 * 4
    assert reference.cache_bytes == CONTEXT_LENGTH * position_bytes
    shrunk = measure_fidelity(model, KnormPress(0.5), reference)
    assert shrunk.cache_bytes == shrunk.cache_bytes_seen == CONTEXT_LENGTH // 2 * position_bytes
    masked = measure_fidelity(model, AdaKVPress(KnormPress(0.5)), reference)
    assert masked.cache_bytes == CONTEXT_LENGTH * position_bytes
    assert masked.cache_bytes_seen == CONTEXT_LENGTH // 2 * position_bytes


def test_a_position_masked_twice_counts_once(model):
    cache = DynamicCache()
    with torch.no_grad():
        model.model(input_ids=random_window().context_ids, past_key_values=cache)
    held, seen = count_cache_bytes(model, cache)
    assert held == seen
    index = torch.tensor([0, 0])
    model.model.layers[2].self_attn.masked_key_indices = (index, index, torch.tensor([5, 5]))
    try:
        assert count_cache_bytes(model, cache) == (held, held - 2 * 16 * 4)
    finally:
        model.model.layers[2].self_attn.masked_key_indices = None


def test_the_error_of_a_layer_owes_nothing_to_the_layers_below_it(model, reference):
    class OnlyLayerOne(StreamingLLMPress):
        def compress(self, module, hidden_states, keys, values, attentions, kwargs):
            if module.layer_idx != 1:
                return keys, values
            return super().compress(module, hidden_states, keys, values, attentions, kwargs)

    errors = measure_fidelity(model, OnlyLayerOne(0.5), reference).attention_errors
    assert errors[1] > 0.01
    assert (errors[0], errors[2], errors[3]) == pytest.approx((0, 0, 0), abs=1e-5)


def test_attention_errors_are_measured_only_when_asked_for(model, reference):
    plain = measure_reference(model, random_window())
    assert plain.attention_inputs == []
    fidelity = measure_fidelity(model, KnormPress(0.5), plain)
    assert fidelity.attention_errors == ()
    assert fidelity.kl_per_token == measure_fidelity(model, KnormPress(0.5), reference).kl_per_token


def test_kl_nll_and_agreement_of_logits_worked_out_by_hand():
    full = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]).log() + 7  # logits are known up to a constant
    other = torch.tensor([[0.25, 0.625, 0.125], [0.1, 0.8, 0.1]]).log()
    kl, nll, nll_full, agree = compare_logits(full, other, torch.tensor([1, 2]))
    assert kl.tolist() == pytest.approx([0.5 * math.log(2) + 0.25 * math.log(0.4) + 0.25 * math.log(2), 0], abs=1e-6)
    assert nll.tolist() == pytest.approx([math.log(1.6), math.log(10)], abs=1e-6)
    assert nll_full.tolist() == pytest.approx([math.log(4), math.log(10)], abs=1e-6)
    assert agree.tolist() == [False, True]


def test_a_token_that_both_rule_out_leaves_the_divergence_finite():
    logits = torch.tensor([[0.0, 0.0, -math.inf]])
    kl, *_ = compare_logits(logits, logits, torch.tensor([0]))
    assert kl.tolist() == [0]


def test_logits_are_compared_alike_in_any_number_of_rows():
    generator = torch.manual_seed(0)
    full, other = torch.randn(2, 150, 11, generator=generator)
    target_ids = torch.randint(11, (150,), generator=generator)
    together = compare_logits(full, other, target_ids)
    one_by_one = [compare_logits(full[[i]], other[[i]], target_ids[[i]]) for i in range(150)]
    for column, parts in zip(together, zip(*one_by_one)):
        torch.testing.assert_close(column, torch.cat(parts))


def test_a_press_that_only_decodes_is_refused(model, reference):
    with pytest.raises(TypeError, match="compresses at prefill, got DecodingPress"):
        measure_fidelity(model, DecodingPress(SnapKVPress(0.5)), reference)


def test_a_continuation_of_one_token_scores_nothing_and_is_refused(model):
    with pytest.raises(ValueError, match="at least 2 tokens, got 1"):
        measure_reference(model, random_window(continuation_length=1))


def test_the_full_cache_is_measured_once_for_all_presses(model, monkeypatch):
    measured = []

    def count(model, window, **options):
        measured.append(window)
        return measure_reference(model, window, **options)

    monkeypatch.setattr(benchmark, "measure_reference", count)
    monkeypatch.setattr(benchmark, "_REFERENCES", WeakKeyDictionary())
    windows = pd.DataFrame({"window": [random_window(9), random_window(12)]})
    tables = [benchmark.measure_windows(model, press, windows, quiet=True) for press in (KnormPress(0.5), None)]
    benchmark.measure_windows(model, KnormPress(0.5), pd.DataFrame({"window": [random_window(9)]}), quiet=True)
    assert len(measured) == 2
    assert (tables[0]["kl"] > 1e-3).all()
    assert (tables[1]["kl"] < 1e-9).all()
    assert tables[0]["nll_full"].tolist() == tables[1]["nll_full"].tolist()
