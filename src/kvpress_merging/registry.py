# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Named, configured presses, for kvpress's evaluation and ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import kvpress
from kvpress import BasePress

from kvpress_merging.attention_matching_press import AttentionMatchingPress
from kvpress_merging.merging_press import MergingPress


class PressRegistry(Mapping[str, BasePress]):
    """
    Presses by name, made anew at each look-up, so that configuring one leaves the others alone.

    Parameters
    ----------
    factories : mapping of str to callable
        What makes the press of each name. A name that is not in it is a KeyError.
    """

    def __init__(self, factories: Mapping[str, Callable[[], BasePress]]):
        self._factories = dict(factories)

    def __getitem__(self, name: str) -> BasePress:
        return self._factories[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._factories)

    def __len__(self) -> int:
        return len(self._factories)

    def __contains__(self, name: object) -> bool:
        return name in self._factories


# The prefill presses of kvpress's evaluation registry that evict positions, by their names and with their settings
# there.
PREFILL_PRESSES: dict[str, Callable[[], BasePress]] = {
    "adakv_compactor": lambda: kvpress.AdaKVPress(kvpress.CompactorPress()),
    "adakv_snapkv": lambda: kvpress.AdaKVPress(kvpress.SnapKVPress()),
    "block_keydiff": lambda: kvpress.BlockPress(press=kvpress.KeyDiffPress(), block_size=128),
    "chunkkv": lambda: kvpress.ChunkKVPress(press=kvpress.SnapKVPress(), chunk_length=20),
    "compactor": kvpress.CompactorPress,
    "critical_adakv_expected_attention": lambda: kvpress.CriticalAdaKVPress(
        kvpress.ExpectedAttentionPress(use_vnorm=False)
    ),
    "critical_adakv_snapkv": lambda: kvpress.CriticalAdaKVPress(kvpress.SnapKVPress()),
    "critical_expected_attention": lambda: kvpress.CriticalKVPress(kvpress.ExpectedAttentionPress(use_vnorm=False)),
    "critical_snapkv": lambda: kvpress.CriticalKVPress(kvpress.SnapKVPress()),
    "cur": kvpress.CURPress,
    "duo_attention": kvpress.DuoAttentionPress,
    "duo_attention_on_the_fly": lambda: kvpress.DuoAttentionPress(on_the_fly_scoring=True),
    "expected_attention": lambda: kvpress.AdaKVPress(kvpress.ExpectedAttentionPress(epsilon=1e-2)),
    "fastkvzip": kvpress.FastKVzipPress,
    "finch": kvpress.FinchPress,
    "keydiff": kvpress.KeyDiffPress,
    "knorm": kvpress.KnormPress,
    "kvcompose": kvpress.KVComposePress,
    "kvcompose_unstructured": lambda: kvpress.KVComposePress(structured=False),
    "kvzap_linear": lambda: kvpress.DMSPress(press=kvpress.KVzapPress(model_type="linear")),
    "kvzap_mlp": lambda: kvpress.DMSPress(press=kvpress.KVzapPress(model_type="mlp")),
    "kvzap_mlp_head": lambda: kvpress.KVzapPress(model_type="mlp"),
    "kvzap_mlp_layer": lambda: kvpress.AdaKVPress(kvpress.KVzapPress(model_type="mlp")),
    "kvzip": kvpress.KVzipPress,
    "kvzip_plus": lambda: kvpress.KVzipPress(kvzip_plus_normalization=True),
    "lagkv": kvpress.LagKVPress,
    "lukv": lambda: kvpress.LUKVPress(kvpress.ExpectedAttentionPress(epsilon=2e-2), sink=4, window=1),
    "observed_attention": kvpress.ObservedAttentionPress,
    "pyramidkv": kvpress.PyramidKVPress,
    "qfilter": kvpress.QFilterPress,
    "random": kvpress.RandomPress,
    "snap_think": lambda: kvpress.ComposedPress([kvpress.SnapKVPress(), kvpress.ThinKPress()]),
    "snapkv": kvpress.SnapKVPress,
    "streaming_llm": kvpress.StreamingLLMPress,
    "tova": kvpress.TOVAPress,
}
# Presses that an older kvpress lacks.
if hasattr(kvpress, "EntropyGatedChunkKVPress"):
    PREFILL_PRESSES["entropy_gated_chunkkv"] = lambda: kvpress.EntropyGatedChunkKVPress(press=kvpress.SnapKVPress())
if hasattr(kvpress, "KVgradPress"):
    PREFILL_PRESSES["kvgrad"] = kvpress.KVgradPress
if hasattr(kvpress, "RestoreKVPress"):
    PREFILL_PRESSES["RestoreKV"] = kvpress.RestoreKVPress
    PREFILL_PRESSES["RestoreKV_plus"] = lambda: kvpress.RestoreKVPress(kvzip_plus_normalization=True)

# The same of those that evict while decoding.
DECODING_PRESSES: dict[str, Callable[[], BasePress]] = {
    f"decoding_{name}": lambda make=make: kvpress.DecodingPress(make())  # type: ignore[misc]
    for name, make in (
        ("adakv_expected_attention_e2", PREFILL_PRESSES["expected_attention"]),
        ("adakv_snapkv", PREFILL_PRESSES["adakv_snapkv"]),
        ("keydiff", kvpress.KeyDiffPress),
        ("knorm", kvpress.KnormPress),
        ("qfilter", kvpress.QFilterPress),
        ("streaming_llm", kvpress.StreamingLLMPress),
        ("tova", kvpress.TOVAPress),
    )
}

# Merged presses by names that are not in the tables above. kvpress itself has merging_expected_attention and
# merging_kvzap_mlp, around bare scorers: theirs are kept, and what the bare names mean there goes by others.
_NAMED_APART: dict[str, Callable[[], BasePress]] = {
    "expected_attention": lambda: kvpress.ExpectedAttentionPress(epsilon=1e-2),
    "adakv_expected_attention": PREFILL_PRESSES["expected_attention"],
    "kvzap_mlp": PREFILL_PRESSES["kvzap_mlp_head"],
    "dms_kvzap_mlp": PREFILL_PRESSES["kvzap_mlp"],
}


PRESS_REGISTRY = PressRegistry(
    {
        f"{prefix}_{name}": lambda wrapper=wrapper, make=make: wrapper(make())  # type: ignore[misc]
        for prefix, wrapper in (("matching", AttentionMatchingPress), ("merging", MergingPress))
        for name, make in sorted((PREFILL_PRESSES | DECODING_PRESSES | _NAMED_APART).items())
    }
)
"""
A :class:`PressRegistry` of the presses of kvpress's evaluation that evict positions: ``merging_<name>`` wraps
the press that goes by ``<name>`` there in a MergingPress, ``matching_<name>`` in an AttentionMatchingPress.

Each has the settings that it has there; ``merging_expected_attention`` and ``merging_kvzap_mlp``, names that kvpress
has already, wrap the bare scorers.

Examples
--------
>>> from kvpress_merging import PRESS_REGISTRY
>>> press = PRESS_REGISTRY["merging_adakv_snapkv"]
>>> press.compression_ratio = 0.5
>>> type(press).__name__, type(press.press).__name__
('MergingPress', 'AdaKVPress')
"""
