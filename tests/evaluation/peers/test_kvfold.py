# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""kvfold's rule against plain loops, its bias on attention, and that it leaves nothing behind."""

from __future__ import annotations

import numpy as np
import peer_oracle as oracle
import pytest
import torch
from kvpress import AdaKVPress, BlockPress, KeyDiffPress, KnormPress, KVzipPress, ObservedAttentionPress, SnapKVPress
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from evaluation.benchmarks.fidelity.compressed_cache import read_continuation
from evaluation.config import EvaluationConfig
from evaluation.peers.kvfold import KVFoldPress
from evaluation.peers.logit_bias import biased_attention
from evaluation.peers.scored_press import put_rows
from evaluation.prefill import masks_of, prefill
from evaluation.presses import choose_attention
from kvpress_merging.following.model import attention_modules

pytestmark = pytest.mark.usefixtures("one_thread")

CASES = {
    "even": (lambda: SnapKVPress(0.5, window_size=8), "log"),
    "scores below zero": (lambda: KnormPress(0.7), "z"),
    "ragged": (lambda: AdaKVPress(SnapKVPress(0.6, window_size=8)), "log"),
    "when the context exits": (lambda: KVzipPress(0.6), "log"),
}


def folds(press: KVFoldPress, monkeypatch) -> dict[int, tuple]:
    """What ``fold`` is given and gives in each layer."""
    seen, original = {}, KVFoldPress.fold

    def fold(self, module, *args):
        seen[module.layer_idx] = (*args, original(self, module, *args))
        return seen[module.layer_idx][-1]

    monkeypatch.setattr(KVFoldPress, "fold", fold)
    return seen


def scores_as_given(monkeypatch) -> dict[int, np.ndarray]:
    """The scores of each layer, before anybody writes into them."""
    given: dict[int, np.ndarray] = {}
    for cls in (SnapKVPress, KnormPress):

        def score(self, module, *args, original=cls.score):
            scores = original(self, module, *args)
            given[module.layer_idx] = np.array(scores.tolist())
            return scores

        monkeypatch.setattr(cls, "score", score)

    def compress_post(self, model, original=KVzipPress.compress_post):
        original(self, model)
        given.update({layer: np.array(scores.tolist()) for layer, scores in enumerate(self.score_val)})

    monkeypatch.setattr(KVzipPress, "compress_post", compress_post)
    return given


def lists(eviction, head: int) -> tuple[list[int], list[int], list[int]]:
    n_survivors, n_evicted = (None, None) if eviction.counts is None else eviction.counts[head]
    kept = eviction.survivors[0, head, :n_survivors], eviction.slots[0, head, :n_survivors]
    return (*(part.tolist() for part in kept), eviction.evicted[0, head, :n_evicted].tolist())


@pytest.mark.parametrize("case", CASES)
def test_values_and_bias_are_those_of_plain_loops(case, llama, input_ids, monkeypatch):
    make, score_map = CASES[case]
    given, press = scores_as_given(monkeypatch), KVFoldPress(make())
    seen = folds(press, monkeypatch)
    prefilled = prefill(llama, input_ids, press)
    assert sorted(seen) == sorted(press.logit_bias) == [0, 1, 2, 3]
    n_taken = 0
    for layer, (_, keys, values, kept_keys, kept_values, eviction, _, (new_keys, new_values)) in seen.items():
        assert new_keys is kept_keys
        assert prefilled.cache.layers[layer].values.equal(new_values)
        assert (eviction.counts is not None) == (case not in ("even", "scores below zero"))
        for head in range(2):
            survivors, slots, evicted = lists(eviction, head)
            log_mass = oracle.log_masses(given[layer][0, head].tolist(), score_map)
            head_keys, head_values = (np.array(rows[0, head].tolist()) for rows in (keys, values))
            expected, bias = oracle.fold_head(head_keys, head_values, log_mass, survivors, evicted, n_sink=4)
            untouched = torch.ones(kept_values.shape[2], dtype=torch.bool)
            for position, slot in zip(survivors, slots):
                assert new_values[0, head, slot].tolist() == pytest.approx(expected[position], rel=1e-4, abs=1e-6)
                assert press.logit_bias[layer][0, head, slot].item() == pytest.approx(bias[position], rel=1e-4)
                if bias[position] > 0:
                    untouched[slot] = False
                    n_taken += 1
            assert new_values[0, head, untouched].equal(kept_values[0, head, untouched])
            assert (press.logit_bias[layer][0, head, untouched] == 0).all()
    assert n_taken > 40


def test_an_evicted_sink_goes_to_a_position_that_is_none(llama, input_ids, monkeypatch):
    press = KVFoldPress(KeyDiffPress(0.5), n_sink=96 // 2)
    seen = folds(press, monkeypatch)
    prefill(llama, input_ids, press)
    for layer, (_, _, _, _, kept_values, eviction, _, (_, new_values)) in seen.items():
        taken = press.logit_bias[layer].gather(-1, eviction.slots) > 0
        assert taken.any()
        assert (eviction.survivors[taken] >= 96 // 2).all()
        assert (eviction.evicted < 96 // 2).any()
        assert (new_values != kept_values).any()


@pytest.mark.parametrize(
    ("q_len", "mask"),
    [(1, None), (3, None), (3, "bool"), (3, "float")],
    ids=["one token", "causal", "mask of booleans", "mask that is added"],
)
def test_the_bias_is_added_to_the_logits(q_len, mask, llama):
    torch.manual_seed(0)
    k_len, module = 9, attention_modules(llama)[1]
    query, key, value = torch.randn(1, 4, q_len, 16), torch.randn(1, 2, k_len, 16), torch.randn(1, 2, k_len, 16)
    bias = torch.rand(1, 2, 6)  # of the first positions: the others came later
    allowed = np.tril(np.ones((q_len, k_len), dtype=bool), k_len - q_len)
    if mask is not None:
        allowed[:, 2] = False
    given = {None: None, "bool": torch.tensor(allowed)[None, None]}
    given["float"] = torch.zeros(1, 1, q_len, k_len).masked_fill(~torch.tensor(allowed), torch.finfo(torch.float32).min)
    with biased_attention(llama, {1: bias}):
        output, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, given[mask], dropout=0.0, scaling=0.25)
    for head in range(4):
        of_head = np.zeros((q_len, k_len))
        of_head[:, :6] += np.array(bias[0, head // 2].tolist())
        of_head[~allowed] = -1e30
        rows = [np.array(rows.tolist()) for rows in (query[0, head] * 0.25, key[0, head // 2], value[0, head // 2])]
        _, expected = oracle.attend(*rows, of_head)
        assert output[0, :, head].tolist() == [pytest.approx(row, abs=1e-5) for row in expected.tolist()]


def test_the_bias_acts_on_the_cache_that_it_was_made_for_and_on_no_other(llama, input_ids):
    question = torch.arange(30, 36)[None]

    def read(prefilled, bias=True):
        with torch.no_grad(), masks_of(llama, prefilled) if bias else torch.no_grad():
            logits = read_continuation(llama, question, prefilled.cache, prefilled.start)
        prefilled.cache.crop(prefilled.cache.get_seq_length() - question.shape[1])
        return logits

    bare = prefill(llama, input_ids, KnormPress(0.5))
    before = read(bare)
    press = KVFoldPress(KnormPress(0.5))
    folded = prefill(llama, input_ids, press)
    with_bias = read(folded)
    assert not torch.allclose(with_bias, read(folded, bias=False), atol=1e-3)
    # A later context of the same press has biases of its own.
    other = prefill(llama, input_ids.flip(1), press)
    assert read(folded).equal(with_bias)
    assert not read(other).allclose(with_bias)
    assert read(bare).equal(before)


def test_nothing_is_left_behind(llama, input_ids):
    attend, inner = ALL_ATTENTION_FUNCTIONS["sdpa"], SnapKVPress(0.5)
    attributes = {module: set(vars(module)) for module in llama.modules()}
    own = dict(vars(inner))
    press = KVFoldPress(AdaKVPress(inner))
    prefilled = prefill(llama, input_ids, press)
    with masks_of(llama, prefilled):
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not attend
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is attend
    with pytest.raises(ZeroDivisionError), masks_of(llama, prefilled):
        raise ZeroDivisionError
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is attend
    with pytest.raises(ZeroDivisionError), press(llama):
        assert "score" in vars(inner)
        raise ZeroDivisionError
    assert vars(inner) == own
    assert not press._scores
    assert not press.logit_bias
    assert {module: set(vars(module)) - {"masked_key_indices"} for module in llama.modules()} == {
        module: names - {"masked_key_indices"} for module, names in attributes.items()
    }
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in llama.modules())


def test_a_press_that_scores_no_whole_layer_is_a_clear_error(llama, input_ids):
    for press in (BlockPress(KnormPress(0.5), block_size=16),):
        with pytest.raises(ValueError, match="needs a score of each of the 96 positions, which BlockPress did not"):
            prefill(llama, input_ids, KVFoldPress(press))


def test_a_score_map_is_one_of_four_and_logarithms_need_positive_scores(llama, input_ids):
    with pytest.raises(ValueError, match="score_map must be one of 'auto', 'log', 'z', 'identity', got 'lgo'"):
        KVFoldPress(KnormPress(0.5), score_map="lgo")
    with pytest.raises(ValueError, match="'log' needs scores that are not negative, unlike KnormPress"):
        prefill(llama, input_ids, KVFoldPress(KnormPress(0.5), score_map="log"))


def test_attention_is_sdpa_or_the_bias_an_error(llama, input_ids):
    press = KVFoldPress(KnormPress(0.5))
    assert choose_attention(EvaluationConfig(), press, llama) == "sdpa"
    assert choose_attention(EvaluationConfig(), ObservedAttentionPress(0.5), llama) == "eager"
    prefilled = prefill(llama, input_ids, press)
    llama.set_attn_implementation("eager")
    try:
        with (
            pytest.raises(ValueError, match="needs attn_implementation='sdpa', got 'eager'"),
            masks_of(llama, prefilled),
        ):
            pass
    finally:
        llama.set_attn_implementation("sdpa")


def test_rows_are_put_where_they_belong_and_padding_nowhere():
    kept = torch.arange(8.0).view(1, 1, 4, 2)
    index, is_put = torch.tensor([[[2, 0, 2]]]), torch.tensor([[[True, True, False]]])
    new = put_rows(kept, index, is_put, -torch.ones(1, 1, 3, 2))
    assert new.tolist() == [[[[-1, -1], [2, 3], [-1, -1], [6, 7]]]]
    assert kept[0, 0, 0, 0] == 0


def test_a_second_prefill_in_one_context_goes_by_its_own_scores(llama, input_ids):
    press, caches = KVFoldPress(KnormPress(0.5)), []
    with torch.no_grad(), press(llama):
        for ids in (input_ids, input_ids.flip(1)):
            caches.append(DynamicCache())
            llama.model(input_ids=ids, past_key_values=caches[-1])
    alone = prefill(llama, input_ids.flip(1), KVFoldPress(KnormPress(0.5)))
    assert all(a.values.equal(b.values) for a, b in zip(caches[1].layers, alone.cache.layers))
