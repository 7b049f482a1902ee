# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Padding in a batch holds nothing: it is merged into nothing, and nothing is merged into it."""

from __future__ import annotations

import copy

import pytest
import torch
from kvpress import BasePress, DecodingPress, KnormPress, PrefillDecodingPress, StreamingLLMPress
from replay import attention_modules, clear_masks, decode, snapshot
from transformers import DynamicCache

from kvpress_merging import AttentionMatchingPress, MergingPress
from kvpress_merging import attention_matching_press as press_module
from kvpress_merging.following.padding import Padding
from kvpress_merging.reference import reference_positions

N_CONTEXT = 64
LENGTHS = (64, 40, 23)  # tokens of each row, the rest is padding
PRESSES = {"merging": MergingPress, "matching": AttentionMatchingPress}


class ThirdsFromTheEndPress(BasePress):
    """Keeps two of three positions, counted from the end, by shrinking or by mask: whatever they hold."""

    def __init__(self, by_mask: bool = False):
        self.by_mask = by_mask

    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        is_kept = torch.arange(keys.shape[2]).flip(0) % 3 != 2
        if not self.by_mask:
            return keys[:, :, is_kept], values[:, :, is_kept]
        module.masked_key_indices = torch.where((~is_kept).expand(keys.shape[:3]))
        return keys, values


def padded_batch(side: str = "left", fill: int = 7) -> dict[str, torch.Tensor]:
    """Rows of ``LENGTHS`` tokens, filled up on one side, and what a tokenizer and generate give beside them."""
    generator = torch.Generator().manual_seed(3)
    input_ids = torch.full((len(LENGTHS), N_CONTEXT), fill)
    attention_mask = torch.zeros_like(input_ids)
    for row, length in enumerate(LENGTHS):
        where = slice(N_CONTEXT - length, None) if side == "left" else slice(length)
        input_ids[row, where] = torch.randperm(200, generator=generator)[:length] + 20
        attention_mask[row, where] = 1
    position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}


def prefill(model, press, batch, decode_ids=None):
    clear_masks(model)
    cache = DynamicCache()
    with torch.no_grad(), press(model):
        model.model(**batch, past_key_values=cache)
        if decode_ids is not None:
            decode(model, cache, decode_ids, N_CONTEXT)
    return snapshot(model, cache)


def rows_of(layers, row: int, length: int, by_mask: bool):
    """Keys and values of the last slots of one row, which hold its tokens that survived."""
    is_kept = torch.arange(length).flip(0) % 3 != 2
    n_slots = length if by_mask else int(is_kept.sum())
    chosen = is_kept if by_mask else torch.ones(n_slots, dtype=torch.bool)
    return [(layer.keys[row, :, -n_slots:][:, chosen], layer.values[row, :, -n_slots:][:, chosen]) for layer in layers]


@pytest.mark.parametrize(  # kvpress's masks need one of the attention functions that it patches, which eager is not
    ("by_mask", "attn_implementation"), [(False, "sdpa"), (False, "eager"), (True, "sdpa")]
)
@pytest.mark.parametrize("name", PRESSES)
def test_a_row_with_padding_is_merged_as_it_is_alone(name, by_mask, attn_implementation, llama):
    model = copy.deepcopy(llama)
    model.set_attn_implementation(attn_implementation)
    batch = padded_batch()
    bare = prefill(model, ThirdsFromTheEndPress(by_mask), batch)
    press = PRESSES[name](ThirdsFromTheEndPress(by_mask))
    together = prefill(model, press, batch)
    evicted = press.report.to_dict()[0]["evicted"]
    n_alone = 0
    for row, length in enumerate(LENGTHS):
        alone_press = PRESSES[name](ThirdsFromTheEndPress(by_mask))
        alone = prefill(model, alone_press, {"input_ids": batch["input_ids"][row : row + 1, -length:]})
        n_alone += alone_press.report.to_dict()[0]["evicted"]
        for in_batch, by_itself, without in zip(
            rows_of(together, row, length, by_mask),
            rows_of(alone, 0, length, by_mask),
            rows_of(bare, row, length, by_mask),
        ):
            torch.testing.assert_close(in_batch[0], by_itself[0], rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(in_batch[1], by_itself[1], rtol=1e-3, atol=1e-4)
            assert not torch.equal(in_batch[1], without[1])
    assert evicted == n_alone


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("inner", ["StreamingLLM", "shrinking", "masking", "while decoding"])
@pytest.mark.parametrize("name", PRESSES)
def test_what_stands_in_the_padding_changes_nothing_and_is_not_changed(name, inner, side, llama):
    def make() -> BasePress:
        if inner == "StreamingLLM":
            return StreamingLLMPress(0.4, n_sink=4)
        if inner == "while decoding":
            return PrefillDecodingPress(
                StreamingLLMPress(0.4, n_sink=4), DecodingPress(StreamingLLMPress(n_sink=4), 4, target_size=30)
            )
        return ThirdsFromTheEndPress(by_mask=inner == "masking")

    decode_ids = torch.arange(30, 36).repeat(3, 1) if inner == "while decoding" else None
    results = []
    for fill in (7, 8):
        batch = padded_batch(side, fill)
        bare = prefill(llama, make(), batch, decode_ids)
        results.append((bare, prefill(llama, PRESSES[name](make()), batch, decode_ids)))
    (bare, merged), (other_bare, other_merged) = results
    n_merged = 0
    for before, after, other_before, other_after in zip(bare, merged, other_bare, other_merged):
        holds_padding = (before.keys != other_before.keys).any(-1)  # the same in all layers: what padding holds differs
        assert holds_padding.any()
        if decode_ids is None:
            assert torch.equal(after.keys[holds_padding], before.keys[holds_padding])
            assert torch.equal(after.values[holds_padding], before.values[holds_padding])
            assert torch.equal(after.keys[~holds_padding], other_after.keys[~holds_padding])
            assert torch.equal(after.values[~holds_padding], other_after.values[~holds_padding])
        n_merged += int((after.values != before.values).any(-1)[~holds_padding].sum())
    assert n_merged > 0


@pytest.mark.parametrize("name", PRESSES)
def test_padding_of_a_prefill_before_the_press_changes_nothing_when_it_evicts_while_decoding(name, llama):
    def decoded(press, fill: int):
        clear_masks(llama)
        batch, cache = padded_batch(fill=fill), DynamicCache()
        with torch.no_grad():
            llama.model(**batch, past_key_values=cache)
            attention_mask, last = batch["attention_mask"], batch["position_ids"][:, -1:]
            with press(llama):
                for step in range(1, 5):
                    attention_mask = torch.cat([attention_mask, torch.ones(3, 1, dtype=torch.long)], dim=1)
                    token = torch.full((3, 1), 30 + step)
                    llama.model(token, attention_mask=attention_mask, position_ids=last + step, past_key_values=cache)
        return snapshot(llama, cache)

    def inner() -> DecodingPress:
        return DecodingPress(StreamingLLMPress(n_sink=4), compression_interval=4, target_size=40)

    bare, other_bare = decoded(inner(), 7), decoded(inner(), 8)
    merged, other_merged = decoded(PRESSES[name](inner()), 7), decoded(PRESSES[name](inner()), 8)
    for before, other_before, after, other_after in zip(bare, other_bare, merged, other_merged):
        holds_padding = (before.keys != other_before.keys).any(-1)
        assert holds_padding.any()
        assert torch.equal(after.values[holds_padding], before.values[holds_padding])
        assert torch.equal(after.values[~holds_padding], other_after.values[~holds_padding])
        assert not torch.equal(after.values[~holds_padding], before.values[~holds_padding])


@pytest.mark.parametrize("name", PRESSES)
def test_a_mask_without_padding_changes_nothing(name, llama):
    batch = padded_batch()
    input_ids = batch["input_ids"][:1].repeat(2, 1)
    plain = prefill(llama, PRESSES[name](KnormPress(0.5)), {"input_ids": input_ids})
    masked = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    for before, after in zip(plain, prefill(llama, PRESSES[name](KnormPress(0.5)), masked)):
        assert torch.equal(before.keys, after.keys)
        assert torch.equal(before.values, after.values)


@pytest.mark.parametrize("name", PRESSES)
def test_padding_is_known_inside_a_press_that_calls_ours_too(name, llama):
    batch = padded_batch()
    outside = prefill(llama, PRESSES[name](ThirdsFromTheEndPress()), batch)
    inside = prefill(llama, PrefillDecodingPress(PRESSES[name](ThirdsFromTheEndPress()), None), batch)
    for one, other in zip(outside, inside):
        assert torch.equal(one.values, other.values)
        assert torch.equal(one.keys, other.keys)


@pytest.mark.parametrize("name", PRESSES)
def test_a_row_of_padding_alone_is_left_alone(name, llama):
    batch = padded_batch()
    batch["attention_mask"][1] = 0
    bare = prefill(llama, ThirdsFromTheEndPress(), batch)
    for before, after in zip(bare, prefill(llama, PRESSES[name](ThirdsFromTheEndPress()), batch)):
        assert torch.equal(before.keys[1], after.keys[1])
        assert torch.equal(before.values[1], after.values[1])
        assert not torch.equal(before.values[0], after.values[0])


MASKS = {
    "of the tokenizer": lambda seen: seen.long(),
    "of the tokenizer, bool": lambda seen: seen,
    "causal, bool": lambda seen: seen[:, None, None] & torch.ones(6, 6, dtype=torch.bool).tril(),
    "causal, added": lambda seen: torch.zeros(2, 1, 6, 6).masked_fill(
        ~(seen[:, None, None] & torch.ones(6, 6, dtype=torch.bool).tril()), torch.finfo(torch.float32).min
    ),
    "causal, added, infinite": lambda seen: torch.zeros(2, 4, 6, 6, dtype=torch.bfloat16).masked_fill(
        ~seen[:, None, None], -torch.inf
    ),
}


@pytest.mark.parametrize("kind", MASKS)
def test_padding_is_read_off_every_kind_of_mask(kind):
    seen = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]], dtype=torch.bool)
    assert torch.equal(Padding().find(MASKS[kind](seen), 2, 6), ~seen)
    assert Padding().find(MASKS[kind](torch.ones_like(seen)), 2, 6) is None


def test_a_mask_is_read_once_for_all_layers_and_none_is_not_read_at_all(llama, monkeypatch):
    reads: list = []
    monkeypatch.setattr("kvpress_merging.following.padding._find_unseen", lambda *args: reads.append(args) or None)
    batch = padded_batch()
    prefill(llama, MergingPress(KnormPress(0.5)), {"input_ids": batch["input_ids"]})
    assert not reads
    prefill(llama, MergingPress(KnormPress(0.5)), batch)
    assert len(reads) == 1 < len(attention_modules(llama))


def test_reference_queries_of_every_row_come_from_its_tokens_alone_without_reading_them(llama, monkeypatch):
    sampled = []
    sample = press_module.sample

    def watched(hidden_states, is_padding, n_queries):
        with monkeypatch.context() as patch:
            for name in ("nonzero", "item", "tolist", "cpu", "__bool__", "__int__"):
                patch.setattr(torch.Tensor, name, lambda *args, name=name: pytest.fail(f"{name} reads the device"))
            # Each position's input says which it is.
            which = torch.arange(hidden_states.shape[1])[:, None].expand_as(hidden_states)
            sampled.append(sample(which, is_padding, n_queries)[..., 0])
        return sample(hidden_states, is_padding, n_queries)

    monkeypatch.setattr(press_module, "sample", watched)
    for side in ("left", "right"):
        sampled.clear()
        prefill(llama, AttentionMatchingPress(KnormPress(0.5), n_queries=30), batch := padded_batch(side))
        assert len(sampled) == len(attention_modules(llama))
        for positions in sampled:
            assert positions.shape == (len(LENGTHS), 30 + 1)  # and the last one, to see whether its key comes out
            for row, length in enumerate(LENGTHS):
                tokens = batch["attention_mask"][row].nonzero().squeeze(1)
                expected = tokens[reference_positions(torch.tensor([length]), 30)]
                assert positions[row, :-1].tolist() == expected.tolist()


def test_a_mask_that_does_not_tell_is_a_clear_error_for_a_batch():
    class BlockMask:
        pass

    with pytest.raises(ValueError, match=r"BlockMask does not tell which positions .* are padding"):
        Padding().find(BlockMask(), 2, 6)
    assert Padding().find(BlockMask(), 1, 6) is None
