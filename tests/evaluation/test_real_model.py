# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""What holds on the real model that `make demo` runs on, and on its text."""

import pytest
import torch
from kvpress import AdaKVPress, KnormPress, SnapKVPress

from evaluation.benchmarks.fidelity.measure import measure_fidelity, measure_reference
from evaluation.models import load_model
from evaluation.text import built_in_text, cut_windows
from kvpress_merging import AttentionMatchingPress, MergingPress

pytestmark = pytest.mark.real_model


@pytest.fixture(scope="module")
def smollm2():
    return load_model("smollm2", device="cpu")


def test_the_built_in_model_answers_a_question_and_stops(smollm2):
    model, tokenizer = smollm2
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    answer = model.generate(**chat, max_new_tokens=20, do_sample=False)[0, chat["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(answer[-1:]) == "<|im_end|>"


def test_every_token_of_the_built_in_tokenizer_has_an_embedding(smollm2):
    model, tokenizer = smollm2
    assert len(tokenizer) == model.config.vocab_size == model.get_input_embeddings().num_embeddings
    text = "Digits 2026 stand apart;\n\n  so do  spaces. ünï漢"
    token_ids = tokenizer(text).input_ids
    assert tokenizer.decode(token_ids) == text
    assert {"2", "0", "6"} <= set(tokenizer.convert_ids_to_tokens(token_ids))


def test_the_full_cache_predicts_the_built_in_text_well(smollm2):
    model, tokenizer = smollm2
    window = cut_windows(built_in_text(), tokenizer, 1, 512, 65)[0]
    reference = measure_reference(model, window)
    nll = torch.nn.functional.cross_entropy(reference.logits, window.continuation_ids[0, 1:])
    assert nll < 3.5


def test_merging_brings_knorm_nearer_to_the_full_cache(smollm2):
    model, tokenizer = smollm2
    evicted = merged = 0.0
    for window in cut_windows(built_in_text(), tokenizer, 2, 512, 129):
        reference = measure_reference(model, window)
        evicted += measure_fidelity(model, KnormPress(0.5), reference).kl
        merged += measure_fidelity(model, MergingPress(KnormPress(0.5)), reference).kl
    assert 0 < merged < evicted


@pytest.mark.parametrize(
    "make", [lambda: KnormPress(0.5), lambda: SnapKVPress(0.75), lambda: AdaKVPress(SnapKVPress(0.75))]
)
def test_re_fitting_brings_a_press_nearer_to_the_full_cache(make, smollm2):
    model, tokenizer = smollm2
    evicted = matched = 0.0
    for window in cut_windows(built_in_text(), tokenizer, 2, 512, 129):
        reference = measure_reference(model, window)
        evicted += measure_fidelity(model, make(), reference).kl
        matched += measure_fidelity(model, AttentionMatchingPress(make()), reference).kl
    assert 0 < matched < evicted
