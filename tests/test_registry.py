# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0

import itertools

import pytest
from kvpress import AdaKVPress, DecodingPress, DMSPress, ExpectedAttentionPress, KVzapPress, SnapKVPress

from kvpress_merging import PRESS_REGISTRY, AttentionMatchingPress, MergingPress
from kvpress_merging.registry import DECODING_PRESSES, PREFILL_PRESSES


def test_every_name_makes_the_press_that_it_says():
    classes = {"merging": MergingPress, "matching": AttentionMatchingPress}
    for name, press in PRESS_REGISTRY.items():
        assert type(press) is classes[name.partition("_")[0]]
    for prefix, inner in itertools.product(classes, PREFILL_PRESSES | DECODING_PRESSES):
        assert f"{prefix}_{inner}" in PRESS_REGISTRY


def test_each_look_up_makes_a_fresh_press():
    first, second = PRESS_REGISTRY["merging_knorm"], PRESS_REGISTRY["merging_knorm"]
    first.compression_ratio = 0.5
    assert second.compression_ratio == 0.0
    assert first.press is not second.press


@pytest.mark.parametrize(
    ("name", "inner"),
    [
        ("merging_snapkv", SnapKVPress()),
        ("merging_adakv_snapkv", AdaKVPress(SnapKVPress())),
        ("merging_dms_kvzap_mlp", DMSPress(KVzapPress(model_type="mlp"))),
        ("merging_decoding_adakv_snapkv", DecodingPress(AdaKVPress(SnapKVPress()))),
        # kvpress has these names, for the bare scorers
        ("merging_expected_attention", ExpectedAttentionPress(epsilon=1e-2)),
        ("merging_kvzap_mlp", KVzapPress(model_type="mlp")),
        # what they would have been called
        ("merging_adakv_expected_attention", AdaKVPress(ExpectedAttentionPress(epsilon=1e-2))),
    ],
)
def test_settings_are_those_of_kvpress(name, inner):
    assert PRESS_REGISTRY[name] == MergingPress(inner)
    assert PRESS_REGISTRY[name.replace("merging", "matching")] == AttentionMatchingPress(inner)


def test_a_dict_takes_the_registry_in_one_line():
    registry: dict = {"knorm": None}
    registry |= PRESS_REGISTRY
    assert len(registry) == len(PRESS_REGISTRY) + 1
    assert type(registry["merging_dms_kvzap_mlp"]) is MergingPress


def test_an_unknown_name_is_a_key_error():
    assert "merging_nothing" not in PRESS_REGISTRY
    with pytest.raises(KeyError, match="merging_nothing"):
        PRESS_REGISTRY["merging_nothing"]
