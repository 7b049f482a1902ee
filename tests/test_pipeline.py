# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""kvpress's own text-generation pipeline, unmodified: a merging press goes through it as its inner press would."""

import copy

import pytest
import torch
from every_press import CASES, ReadyFinchPress
from kvpress import (
    CompressionRatioDecodingPress,
    DecodingPress,
    DMSPress,
    KeyRerotationPress,
    KnormPress,
    PrefillDecodingPress,
    SnapKVPress,
)
from tiny import tiny_model, tiny_tokenizer
from transformers import DynamicCache, pipeline

from kvpress_merging import MergingPress

CONTEXT = "the quick brown fox jumps over the lazy dog while many other animals look on in wonder " * 2
QUESTIONS = ["a", "b", "c"]  # short: kvpress must find a key that no query of a question attends to

PRESSES = {
    "Knorm": lambda: KnormPress(0.5),
    "KeyRerotation": lambda: KeyRerotationPress(KnormPress(0.5)),
    "Finch rerotating": lambda: ReadyFinchPress(0.5),
    "RestoreKV": CASES["RestoreKV"].make,
    "KVzip": CASES["KVzip"].make,
    "AdaKV": lambda: CASES["AdaKV"].make(),
    "DMS while decoding": lambda: DMSPress(KnormPress(), threshold=-6.4, sliding_window_size=64, decoding=True),
    "Decoding": lambda: DecodingPress(KnormPress(), compression_interval=4, target_size=40),
    "CompressionRatioDecoding": lambda: CompressionRatioDecodingPress(
        KnormPress(), compression_interval=4, target_compression_ratio=0.4
    ),
    "PrefillDecoding": lambda: PrefillDecodingPress(
        SnapKVPress(0.3, window_size=16), DecodingPress(KnormPress(), compression_interval=4, target_size=40)
    ),
}
ONE_QUESTION_ONLY = {"Decoding", "CompressionRatioDecoding", "PrefillDecoding"}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = tiny_tokenizer(folder)
    # heads wide enough for that
    model = tiny_model("llama", num_attention_heads=4, num_key_value_heads=2, head_dim=64, pad_token_id=0)
    model.config._name_or_path = str(folder)
    return model, tokenizer


def trace_of(press, parts, questions: list[str], context: str = CONTEXT) -> tuple[list, list]:
    """What the pipeline asked of the model, call by call: positions and cache lengths; and the last cache's lengths."""
    model, tokenizer = copy.deepcopy(parts[0]), parts[1]
    pipe = pipeline("kv-press-text-generation", model=model, tokenizer=tokenizer, device="cpu")
    model.generation_config.eos_token_id = -1  # the two may answer differently, and must not stop early
    calls: list = []

    def note(module, args, kwargs):
        positions = kwargs.get("position_ids")
        cache = kwargs["past_key_values"]
        calls.append(
            (None if positions is None else positions.tolist(), [layer.get_seq_length() for layer in cache.layers])
        )

    handle = model.model.register_forward_pre_hook(note, with_kwargs=True)
    cache = DynamicCache()
    torch.manual_seed(0)
    try:
        if len(questions) == 1:
            pipe(context, question=questions[0], press=press, cache=cache, max_new_tokens=12)
        else:
            pipe(context, questions=questions, press=press, cache=cache, max_new_tokens=6)
    finally:
        handle.remove()
    return calls, [layer.get_seq_length() for layer in cache.layers]


@pytest.mark.parametrize("questions", [QUESTIONS[:1], QUESTIONS], ids=["one question", "three questions"])
@pytest.mark.parametrize("name", PRESSES)
def test_positions_and_phases_are_those_of_the_bare_press(name, questions, parts):
    context = CONTEXT
    if "Finch" in name:
        context = CONTEXT + parts[1].convert_ids_to_tokens(5) + "what is this about"
    if len(questions) > 1 and name in ONE_QUESTION_ONLY:
        for press in (PRESSES[name](), MergingPress(PRESSES[name]())):
            with pytest.raises(ValueError, match="not compatible with multiple questions"):
                trace_of(press, parts, questions, context)
        return
    bare = trace_of(PRESSES[name](), parts, questions, context)
    press = MergingPress(PRESSES[name]())
    merged = trace_of(press, parts, questions, context)
    assert merged == bare
    assert sum(row["merged"] for row in press.report.to_dict().values()) > 0


def test_a_cache_cut_back_under_masks_of_decoding_is_a_clear_error(parts):
    def press():
        return DMSPress(KnormPress(), threshold=10.0, sliding_window_size=2, decoding=True)

    with pytest.raises(IndexError):
        trace_of(press(), parts, QUESTIONS)
    message = r"^DMSPress masked positions up to \d+, and the cache was cut back since, .* one question per prefill$"
    with pytest.raises(ValueError, match=message):
        trace_of(MergingPress(press()), parts, QUESTIONS)
