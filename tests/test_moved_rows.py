# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Rows of a cache repeated, dropped or swapped, its end cut off, or a copy of it taken, between two forward passes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from kvpress import (
    AdaKVPress,
    BasePress,
    CompressionRatioDecodingPress,
    DecodingPress,
    KnormPress,
    PrefillDecodingPress,
    StreamingLLMPress,
)
from replay import clear_masks
from test_padding import LENGTHS, N_CONTEXT, PRESSES, padded_batch
from transformers import DynamicCache

INTERVAL = 4
MOVES: dict[str, tuple[Callable[[DynamicCache], None], list[int]]] = {
    "repeated": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    "dropped": (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
    "swapped": (lambda cache: cache.reorder_cache(torch.tensor([1, 0, 1])), [1, 0, 1]),
}
INNER: dict[str, Callable[..., BasePress]] = {
    "Decoding": lambda interval=INTERVAL: DecodingPress(StreamingLLMPress(n_sink=4), interval, target_size=40),
    "CompressionRatioDecoding": lambda interval=INTERVAL: CompressionRatioDecodingPress(
        StreamingLLMPress(n_sink=4), compression_interval=interval, target_compression_ratio=0.4
    ),
}


class Decoded:
    """A batch that is prefilled and decoded step by step, with what is fed beside each token."""

    def __init__(self, model, is_padded: bool):
        clear_masks(model)
        self.model, self.cache = model, DynamicCache()
        batch = padded_batch()
        if not is_padded:
            generator = torch.Generator().manual_seed(3)
            batch["input_ids"] = torch.stack(
                [torch.randperm(200, generator=generator)[:N_CONTEXT] + 20 for _ in LENGTHS]
            )
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
            batch["position_ids"] = torch.arange(N_CONTEXT).expand_as(batch["input_ids"])
        self.input_ids, self.mask, self.position = batch.values()
        self.tokens = torch.arange(len(LENGTHS))[:, None] * 10 + 100  # other tokens for each row

    def take(self, rows: list[int]) -> Decoded:
        """The rows that there are now, all but in the cache."""
        for name in ("input_ids", "mask", "position", "tokens"):
            setattr(self, name, getattr(self, name)[rows])
        return self

    def prefill(self) -> Decoded:
        with torch.no_grad():
            self.model.model(
                self.input_ids, attention_mask=self.mask, position_ids=self.position, past_key_values=self.cache
            )
        self.position = self.position[:, -1:]
        return self

    def decode(self, n_steps: int) -> Decoded:
        for _ in range(n_steps):
            self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)
            self.position, self.tokens = self.position + 1, self.tokens + 1
            with torch.no_grad():
                self.model.model(
                    self.tokens, attention_mask=self.mask, position_ids=self.position, past_key_values=self.cache
                )
        return self

    def layers(self) -> list[torch.Tensor]:
        return [tensor.clone() for layer in self.cache.layers for tensor in (layer.keys, layer.values)]


def assert_alike(layers: list[torch.Tensor], others: list[torch.Tensor]) -> None:
    for one, other in zip(layers, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("n_before", [0, INTERVAL, 2 * INTERVAL])
@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("is_padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("name", PRESSES)
def test_rows_that_were_moved_are_evicted_from_as_in_a_cache_of_those_rows(
    name, inner, is_padded, move, n_before, llama
):
    change, rows = MOVES[move]
    results = []
    for press in (INNER[inner](), PRESSES[name](INNER[inner]())):
        with press(llama):
            run = Decoded(llama, is_padded).prefill().decode(n_before)
            change(run.cache)
            results.append(run.take(rows).decode(INTERVAL).layers())
    bare, moved = results
    with PRESSES[name](INNER[inner]())(llama):
        fresh = Decoded(llama, is_padded).take(rows).prefill().decode(n_before + INTERVAL).layers()
    assert_alike(moved, fresh)
    assert not torch.equal(moved[-1], bare[-1])


@pytest.mark.parametrize("name", PRESSES)
def test_one_row_that_was_repeated_is_evicted_from_as_in_a_cache_of_those_rows(name, llama):
    def inner():
        return DecodingPress(KnormPress(), INTERVAL, target_size=40)

    with PRESSES[name](inner())(llama):
        run = Decoded(llama, False).take([1]).prefill()
        run.cache.batch_repeat_interleave(3)
        repeated = run.take([0, 0, 0]).decode(INTERVAL).layers()
    with PRESSES[name](inner())(llama):
        fresh = Decoded(llama, False).take([1, 1, 1]).prefill().decode(INTERVAL).layers()
    assert_alike(repeated, fresh)


@pytest.mark.parametrize("name", PRESSES)
def test_rows_moved_inside_a_press_that_calls_ours_keep_their_padding(name, llama):
    def press():
        return PrefillDecodingPress(None, PRESSES[name](INNER["Decoding"]()))

    change, rows = MOVES["swapped"]
    with press()(llama):
        run = Decoded(llama, True).prefill().decode(INTERVAL)
        change(run.cache)
        moved = run.take(rows).decode(INTERVAL).layers()
    with press()(llama):
        fresh = Decoded(llama, True).take(rows).prefill().decode(2 * INTERVAL).layers()
    if name == "merging":
        assert_alike(moved, fresh)
    else:
        # Matching has seen other tokens, but padding stays out of it.
        assert all(torch.isfinite(tensor).all() for tensor in moved)


@pytest.mark.parametrize("is_padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("name", PRESSES)
def test_rows_moved_under_masks_are_an_error_that_names_the_press(name, is_padded, llama):
    press = PRESSES[name](DecodingPress(AdaKVPress(KnormPress()), INTERVAL, target_size=40))
    message = "DecodingPress masked positions of a batch whose rows were then"
    with pytest.raises(ValueError, match=message), press(llama):
        run = Decoded(llama, is_padded).prefill().decode(INTERVAL)
        run.cache.reorder_cache(torch.tensor([1, 0, 2]))
        run.take([1, 0, 2]).decode(1)
    clear_masks(llama)


@pytest.mark.parametrize("name", PRESSES)
def test_another_batch_in_the_same_cache_is_no_batch_that_is_known(name, llama):
    def fill_anew(run: Decoded) -> Decoded:
        for layer in run.cache.layers:
            layer.keys, layer.values = layer.keys + 1, layer.values + 1
        return run

    with PRESSES[name](INNER["Decoding"]())(llama):
        run = fill_anew(Decoded(llama, False).prefill().decode(1)).decode(INTERVAL - 1)  # it starts anew
        assert run.cache.get_seq_length() == 40
    message = r"rows of layer 0 .* none of those .* DecodingPress saw it last"
    with pytest.raises(ValueError, match=message), PRESSES[name](INNER["Decoding"]())(llama):
        fill_anew(Decoded(llama, True).prefill().decode(1)).decode(1)


@pytest.mark.parametrize("is_padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("name", PRESSES)
def test_what_was_cut_off_the_end_of_a_cache_is_forgotten(name, inner, is_padded, llama):
    with PRESSES[name](INNER[inner]())(llama):
        run = Decoded(llama, is_padded).prefill()
        mask, position, tokens = run.mask, run.position, run.tokens
        run.tokens = tokens + 5
        run.decode(1)
        run.cache.crop(N_CONTEXT)
        run.mask, run.position, run.tokens = mask, position, tokens
        cut = run.decode(INTERVAL - 1).layers()
    # The press counts steps, and knows nothing of the one that was taken back.
    with PRESSES[name](INNER[inner](INTERVAL - 1))(llama):
        fresh = Decoded(llama, is_padded).prefill().decode(INTERVAL - 1).layers()
    assert cut[0].shape[2] < N_CONTEXT
    assert_alike(cut, fresh)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("is_padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("name", PRESSES)
def test_a_copy_of_a_cache_is_evicted_from_like_one_that_was_filled_before_the_press(name, is_padded, copied, llama):
    with PRESSES[name](INNER["Decoding"]())(llama):
        run = Decoded(llama, is_padded).prefill()
        run.cache = copied(run.cache)
        of_copy = run.decode(INTERVAL).layers()
    run = Decoded(llama, is_padded).prefill()
    with PRESSES[name](INNER["Decoding"]())(llama):
        assert_alike(of_copy, run.decode(INTERVAL).layers())
        # The mask lines up no more with what has been evicted from.
        run.cache = copied(run.cache)
        if is_padded:
            with pytest.raises(ValueError, match=r"layer 0 of this cache.* lost positions of a batch with padding"):
                run.decode(1)
        else:
            run.decode(INTERVAL)
            assert run.cache.get_seq_length() == 40
