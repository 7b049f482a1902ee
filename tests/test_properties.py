# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""What merging and matching never change, around presses drawn at random, in whole forward passes of a model."""

from __future__ import annotations

import functools

import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from kvpress import BasePress
from replay import max_error_left, run
from tiny import tiny_model
from transformers import DynamicCache, PreTrainedModel

from kvpress_merging import AttentionMatchingPress, MergingPress

# A case takes ten times as long as one of the kernels' alone.
whole_passes = settings(max_examples=settings().max_examples // 5)
INTEGERS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


class DrawnPress(BasePress):
    """
    Keeps what a seed says, differently in every head.

    ``how`` is ``"in order"``, ``"in any order"`` or ``"as a view"`` (one slice for all heads), which shorten the cache,
    or ``"by mask"``, which does not.
    """

    def __init__(self, share: float, how: str, seed: int):
        self.share, self.how, self.seed = share, how, seed

    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        k_len = keys.shape[2]
        n_kept = max(1, round(k_len * self.share))
        scores = torch.rand(keys.shape[:3], generator=torch.Generator().manual_seed(self.seed + module.layer_idx))
        if self.how == "as a view":
            return keys[:, :, -n_kept:], values[:, :, -n_kept:]
        if self.how == "by mask":
            module.masked_key_indices = torch.where(scores > self.share)
            return keys, values
        kept = scores.argsort(dim=-1)[..., :n_kept]
        if self.how == "in order":
            kept = kept.sort(dim=-1).values
        return tuple(rows.gather(2, kept[..., None].expand(-1, -1, -1, rows.shape[-1])) for rows in (keys, values))


presses = st.builds(
    functools.partial,
    st.just(DrawnPress),
    share=st.sampled_from([0.1, 0.3, 0.5, 0.75, 0.95]),
    how=st.sampled_from(["in order", "in any order", "as a view", "by mask"]),
    seed=st.integers(0, 10_000),
)
mergings = st.builds(
    functools.partial,
    st.just(MergingPress),
    similarity_threshold=st.sampled_from([0.0, 0.3]),
    merge_fraction=st.sampled_from([0.5, 1.0]),
    max_merge_per_token=st.sampled_from([0, 2]),
    value_norm_weighting=st.booleans(),
)
wrappers = st.one_of(
    mergings, st.builds(functools.partial, st.just(AttentionMatchingPress), n_queries=st.integers(1, 16))
)
dtypes = st.sampled_from(list(INTEGERS))


@st.composite
def contexts(draw: st.DrawFn) -> torch.Tensor:
    """Tokens that all differ within a row."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    length = draw(st.integers(2, 64))
    return torch.stack([torch.randperm(240, generator=generator)[:length] + 10 for _ in range(draw(st.integers(1, 3)))])


@functools.cache
def model_of(dtype: torch.dtype) -> PreTrainedModel:
    return tiny_model("llama", num_hidden_layers=2).to(dtype)


def cache_after(model: PreTrainedModel, press: BasePress, input_ids: torch.Tensor) -> tuple[DynamicCache, list]:
    cache = DynamicCache()
    return cache, run(model, press, input_ids, cache=cache)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    integers = INTEGERS[one.dtype]
    return one.dtype == other.dtype and torch.equal(one.contiguous().view(integers), other.contiguous().view(integers))


@whole_passes
@given(make=presses, wrap=wrappers, input_ids=contexts(), dtype=dtypes)
def test_what_survives_its_order_dtype_device_and_contiguity_are_the_bare_presss(make, wrap, input_ids, dtype):
    model = model_of(dtype)
    bare_cache, bare = cache_after(model, make(), input_ids)
    press = wrap(make())
    cache, result = cache_after(model, press, input_ids)
    event(type(press).__name__)
    for layer, bare_layer, mine, theirs in zip(cache.layers, bare_cache.layers, result, bare):
        assert torch.equal(mine.is_masked, theirs.is_masked)
        for name in ("keys", "values"):
            ours, kept = getattr(layer, name), getattr(bare_layer, name)
            assert (ours.shape, ours.dtype, ours.device) == (kept.shape, kept.dtype, kept.device)
            assert ours.is_contiguous() or not kept.is_contiguous()
            # Attention does not see what is masked: it stays what it was.
            assert same_bits(ours[mine.is_masked], kept[mine.is_masked])
    # The first layer sees the same input both times: its keys say what stands in which slot.
    if isinstance(press, MergingPress):
        assert same_bits(result[0].keys, bare[0].keys)
    else:
        taken = press.report.to_dict()[0].get("heads_fitted", 0)  # not there if nothing was evicted
        event("some head fitted" if taken else "no head fitted")
        if not taken:
            assert same_bits(result[0].keys, bare[0].keys)
            assert same_bits(result[0].values, bare[0].values)


@whole_passes
@given(make=presses, input_ids=contexts())
def test_a_re_fit_that_no_head_takes_leaves_the_bits_of_the_bare_press(make, input_ids):
    model = model_of(torch.float32)
    bare = run(model, make(), input_ids)
    with max_error_left(0):
        result = run(model, AttentionMatchingPress(make()), input_ids)
    for mine, theirs in zip(result, bare):
        assert same_bits(mine.keys, theirs.keys)
        assert same_bits(mine.values, theirs.values)


@whole_passes
@given(make=presses, wrap=wrappers, input_ids=contexts(), dtype=dtypes)
def test_two_runs_give_the_same_bits(make, wrap, input_ids, dtype):
    first, second = (run(model_of(dtype), wrap(make()), input_ids) for _ in range(2))
    for one, other in zip(first, second):
        assert same_bits(one.keys, other.keys)
        assert same_bits(one.values, other.values)


@whole_passes
@given(make=presses, wrap=wrappers, input_ids=contexts(), data=st.data())
def test_a_row_does_not_depend_on_the_other_rows_of_its_batch(make, wrap, input_ids, data):
    row = data.draw(st.integers(0, len(input_ids) - 1))
    others = input_ids.flip(1)
    others[row] = input_ids[row]
    model = model_of(torch.float32)
    expected, result = (run(model, wrap(make()), tokens) for tokens in (input_ids, others))
    for mine, theirs in zip(result, expected):
        torch.testing.assert_close(mine.keys[row], theirs.keys[row], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mine.values[row], theirs.values[row], rtol=1e-4, atol=1e-5)
