# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""What is remembered of a layer belongs to one cache: what one sequence leaves behind plays no part in the next."""

import pytest
import torch
from every_press import CASES
from kvpress import AdaKVPress, CompressionRatioDecodingPress, DecodingPress, DMSPress, KnormPress, PrefillDecodingPress
from kvpress import KVPressTextGenerationPipeline as Pipeline
from replay import attention_modules
from tiny import tiny_checkpoint
from transformers import DynamicCache

from kvpress_merging import AttentionMatchingPress, MergingPress

DECODING = [name for name, case in CASES.items() if case.moment == "decoding"]
PRESSES = {"merging": MergingPress, "matching": lambda press: AttentionMatchingPress(press, n_queries=16)}
INNER = {
    "Decoding": lambda: DecodingPress(KnormPress(), compression_interval=2, target_size=20),
    "Decoding(AdaKV)": lambda: DecodingPress(AdaKVPress(KnormPress()), compression_interval=2, target_size=20),
    "CompressionRatioDecoding": lambda: CompressionRatioDecodingPress(
        KnormPress(), compression_interval=2, target_compression_ratio=0.5
    ),
    "CompressionRatioDecoding(AdaKV)": lambda: CompressionRatioDecodingPress(
        AdaKVPress(KnormPress()), compression_interval=2, target_compression_ratio=0.5
    ),
    "PrefillDecoding": lambda: PrefillDecodingPress(
        decoding_press=DecodingPress(AdaKVPress(KnormPress()), compression_interval=2, target_size=20)
    ),
    "DMS while decoding": lambda: DMSPress(KnormPress(), threshold=-3.2, sliding_window_size=4, decoding=True),
}
A, B = torch.arange(10, 50)[None], torch.arange(60, 100)[None]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    model, tokenizer = tiny_checkpoint(tmp_path_factory.mktemp("llama"))
    # Of the padding token it is 0, and for queries of 0 kvpress finds no keys that they do not see.
    model.get_input_embeddings().weight.data[2].normal_(generator=torch.Generator().manual_seed(0))
    return model, tokenizer


@torch.no_grad()
def decode(model, press, input_ids, *, is_prefilled_inside):
    cache = DynamicCache()
    if not is_prefilled_inside:
        model(input_ids, past_key_values=cache)
    with press(model):
        if is_prefilled_inside:
            model(input_ids, past_key_values=cache)
        for i in range(6):
            model(input_ids[:, i : i + 1], past_key_values=cache)
    return [(layer.keys, layer.values) for layer in cache.layers]


def assert_same(layers, others):
    for layer, other in zip(layers, others, strict=True):
        assert all(map(torch.equal, layer, other))


@pytest.mark.parametrize("name", INNER)
@pytest.mark.parametrize("kind", PRESSES)
def test_another_cache_starts_anew(kind, name, checkpoint):
    model, _ = checkpoint
    is_prefilled_inside = name == "DMS while decoding"  # it has to see the prefill's scores

    def make():
        return PRESSES[kind](INNER[name]())

    alone = make()
    expected = decode(model, alone, B, is_prefilled_inside=is_prefilled_inside)
    press = make()
    decode(model, press, A, is_prefilled_inside=is_prefilled_inside)
    assert_same(decode(model, press, B, is_prefilled_inside=is_prefilled_inside), expected)
    assert press.report.to_dict() == alone.report.to_dict()
    assert press.report.to_dict()[0]["evicted"] > 0
    # Nor does it matter how many rows the batch before had.
    press = make()
    decode(model, press, torch.cat([A, B]), is_prefilled_inside=is_prefilled_inside)
    assert_same(decode(model, press, B, is_prefilled_inside=is_prefilled_inside), expected)


@pytest.mark.parametrize("kind", PRESSES)
def test_another_cache_starts_anew_inside_a_press_that_decodes(kind, checkpoint):
    model, _ = checkpoint

    def make():
        inner = PRESSES[kind](AdaKVPress(KnormPress()))
        return DecodingPress(inner, compression_interval=2, target_size=20), inner

    alone, inner_alone = make()
    expected = decode(model, alone, B, is_prefilled_inside=False)
    press, inner = make()
    decode(model, press, torch.cat([A, B]), is_prefilled_inside=False)
    assert_same(decode(model, press, B, is_prefilled_inside=False), expected)
    assert inner.report.to_dict() == inner_alone.report.to_dict()
    assert inner.report.to_dict()[0]["evicted"] > 0


@pytest.mark.parametrize("name", DECODING)
@pytest.mark.parametrize("kind", PRESSES)
def test_three_contexts_through_the_pipeline_are_answered_as_each_alone(kind, name, checkpoint):
    model, tokenizer = checkpoint
    pipeline = Pipeline(model=model, tokenizer=tokenizer)
    press, contexts = (
        PRESSES[kind](CASES[name].make()),
        ["the first context " * 6, "a second " * 9, "number three " * 8],
    )

    def values_after(press, context):
        cache = DynamicCache()
        for module in attention_modules(model):
            vars(module).pop("masked_key_indices", None)
        answer = pipeline(context, question="why?", press=press, cache=cache, max_new_tokens=12)["answer"]
        return answer, [(layer.keys, layer.values) for layer in cache.layers], press.report.to_dict()

    for context in contexts:
        answer, layers, report = values_after(press, context)
        answer_alone, layers_alone, report_alone = values_after(PRESSES[kind](CASES[name].make()), context)
        assert answer == answer_alone
        assert_same(layers, layers_alone)
        assert report == report_alone


def test_the_memory_of_a_cache_that_is_gone_is_not_that_of_no_cache(checkpoint):
    """A press that hands keys and values on without their cache is another sequence, too."""
    model, _ = checkpoint
    module = attention_modules(model)[0]
    press = MergingPress(KnormPress(0.5))
    decode(model, press, A, is_prefilled_inside=True)
    rows = torch.randn(2, 1, 2, 30, 16)
    press.compress(module, torch.randn(1, 7, 64), *rows, None, {})
    assert press.report.to_dict()[0]["evicted"] == 2 * 15
