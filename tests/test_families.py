# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Every model family that kvpress supports, with grouped, single and separate KV heads."""

import pytest
import torch
from every_press import CASES
from kvpress import ExpectedAttentionPress, KnormPress
from replay import assert_merged, attention_modules, error_of, run
from tiny import tiny_model

from kvpress_merging import MergingPress

FAMILIES = ["llama", "mistral", "phi3", "qwen2", "qwen3", "gemma3_text", "gemma3"]
PRESSES = ["Knorm", "SnapKV", "ExpectedAttention", "TOVA", "KeyRerotation", "AdaKV", "DMS", "Composed", "Cap"]
# What the bare presses may not do: with transformers 5, Gemma3's rotary embedding wants to know the kind of layer.
FAILS_ON_GEMMA3 = {"ExpectedAttention", "KeyRerotation", "Cap"}
FAILS_IN_EAGER = {"AdaKV", "DMS"}


def input_ids_for(bsz: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.stack([torch.randperm(240, generator=generator)[:96] + 10 for _ in range(bsz)])


@pytest.mark.parametrize("bsz", [1, 3])
@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", PRESSES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_merged_wherever_the_bare_press_runs(family, name, attn_implementation, bsz):
    model = tiny_model(family)
    model.set_attn_implementation(attn_implementation)
    input_ids = input_ids_for(bsz)
    may_fail = name in FAILS_ON_GEMMA3 and family.startswith("gemma3")
    fails = name in FAILS_IN_EAGER and attn_implementation == "eager"
    if (fails or may_fail) and (bare_error := error_of(lambda: run(model, CASES[name].make(), input_ids))):
        assert error_of(lambda: run(model, MergingPress(CASES[name].make()), input_ids)) == bare_error
        return
    assert not fails
    full = run(model, None, input_ids)
    bare = run(model, CASES[name].make(), input_ids)
    press = MergingPress(CASES[name].make())
    merged = run(model, press, input_ids)
    assert assert_merged(full, bare, merged) > 0
    is_left_alone = [family == "gemma3" and getattr(m, "is_sliding", False) for m in attention_modules(model)]
    assert list(press.report.to_dict()) == [i for i, is_left in enumerate(is_left_alone) if not is_left]


@pytest.mark.parametrize("num_key_value_heads", [1, 2, 4])
@pytest.mark.parametrize("bsz", [1, 3])
def test_grouped_single_and_separate_kv_heads(num_key_value_heads, bsz):
    model = tiny_model("llama", num_attention_heads=4, num_key_value_heads=num_key_value_heads)
    input_ids = input_ids_for(bsz)
    full = run(model, None, input_ids)
    for make in (lambda: KnormPress(0.5), lambda: ExpectedAttentionPress(0.3), CASES["AdaKV"].make):
        bare, merged = run(model, make(), input_ids), run(model, MergingPress(make()), input_ids)
        assert assert_merged(full, bare, merged) > 0
