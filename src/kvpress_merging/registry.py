# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Named, configured presses, for kvpress's evaluation and ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from kvpress import (
    AdaKVPress,
    BasePress,
    BlockPress,
    ChunkKVPress,
    CompactorPress,
    ComposedPress,
    CriticalAdaKVPress,
    CriticalKVPress,
    CURPress,
    DecodingPress,
    DMSPress,
    DuoAttentionPress,
    EntropyGatedChunkKVPress,
    ExpectedAttentionPress,
    FastKVzipPress,
    FinchPress,
    KeyDiffPress,
    KnormPress,
    KVComposePress,
    KVgradPress,
    KVzapPress,
    KVzipPress,
    LagKVPress,
    LUKVPress,
    ObservedAttentionPress,
    PyramidKVPress,
    QFilterPress,
    RandomPress,
    RestoreKVPress,
    SnapKVPress,
    StreamingLLMPress,
    ThinKPress,
    TOVAPress,
)

from kvpress_merging.attention_matching_press import AttentionMatchingPress
from kvpress_merging.merging_press import MergingPress


class PressRegistry(Mapping[str, BasePress]):
    """
    Presses by name, made anew at each look-up, so that configuring one leaves the others alone.

    Parameters
    ----------
    factories : mapping of str to callable
        What makes the press of each name.

    Raises
    ------
    KeyError
        For a name that is not in it.

    Examples
    --------
    >>> from kvpress_merging import PRESS_REGISTRY
    >>> PRESS_REGISTRY["merging_knorm"].press
    KnormPress(compression_ratio=0.0)
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
    "RestoreKV": RestoreKVPress,
    "RestoreKV_plus": lambda: RestoreKVPress(kvzip_plus_normalization=True),
    "adakv_compactor": lambda: AdaKVPress(CompactorPress()),
    "adakv_snapkv": lambda: AdaKVPress(SnapKVPress()),
    "block_keydiff": lambda: BlockPress(press=KeyDiffPress(), block_size=128),
    "chunkkv": lambda: ChunkKVPress(press=SnapKVPress(), chunk_length=20),
    "compactor": CompactorPress,
    "critical_adakv_expected_attention": lambda: CriticalAdaKVPress(ExpectedAttentionPress(use_vnorm=False)),
    "critical_adakv_snapkv": lambda: CriticalAdaKVPress(SnapKVPress()),
    "critical_expected_attention": lambda: CriticalKVPress(ExpectedAttentionPress(use_vnorm=False)),
    "critical_snapkv": lambda: CriticalKVPress(SnapKVPress()),
    "cur": CURPress,
    "duo_attention": DuoAttentionPress,
    "duo_attention_on_the_fly": lambda: DuoAttentionPress(on_the_fly_scoring=True),
    "entropy_gated_chunkkv": lambda: EntropyGatedChunkKVPress(press=SnapKVPress()),
    "expected_attention": lambda: AdaKVPress(ExpectedAttentionPress(epsilon=1e-2)),
    "fastkvzip": FastKVzipPress,
    "finch": FinchPress,
    "keydiff": KeyDiffPress,
    "knorm": KnormPress,
    "kvcompose": KVComposePress,
    "kvcompose_unstructured": lambda: KVComposePress(structured=False),
    "kvgrad": KVgradPress,
    "kvzap_linear": lambda: DMSPress(press=KVzapPress(model_type="linear")),
    "kvzap_mlp": lambda: DMSPress(press=KVzapPress(model_type="mlp")),
    "kvzap_mlp_head": lambda: KVzapPress(model_type="mlp"),
    "kvzap_mlp_layer": lambda: AdaKVPress(KVzapPress(model_type="mlp")),
    "kvzip": KVzipPress,
    "kvzip_plus": lambda: KVzipPress(kvzip_plus_normalization=True),
    "lagkv": LagKVPress,
    "lukv": lambda: LUKVPress(ExpectedAttentionPress(epsilon=2e-2), sink=4, window=1),
    "observed_attention": ObservedAttentionPress,
    "pyramidkv": PyramidKVPress,
    "qfilter": QFilterPress,
    "random": RandomPress,
    "snap_think": lambda: ComposedPress([SnapKVPress(), ThinKPress()]),
    "snapkv": SnapKVPress,
    "streaming_llm": StreamingLLMPress,
    "tova": TOVAPress,
}

# The same of those that evict while decoding.
DECODING_PRESSES: dict[str, Callable[[], BasePress]] = {
    f"decoding_{name}": lambda make=make: DecodingPress(make())  # type: ignore[misc]
    for name, make in (
        ("adakv_expected_attention_e2", PREFILL_PRESSES["expected_attention"]),
        ("adakv_snapkv", PREFILL_PRESSES["adakv_snapkv"]),
        ("keydiff", KeyDiffPress),
        ("knorm", KnormPress),
        ("qfilter", QFilterPress),
        ("streaming_llm", StreamingLLMPress),
        ("tova", TOVAPress),
    )
}

# Merged presses whose names do not come from the table above. kvpress has two of them already, around bare scorers: a
# table of results must not mean two things by one name, so theirs is kept, and what the bare name means there goes by
# another.
_NAMED_APART: dict[str, Callable[[], BasePress]] = {
    "expected_attention": lambda: ExpectedAttentionPress(epsilon=1e-2),
    "adakv_expected_attention": PREFILL_PRESSES["expected_attention"],
    "kvzap_mlp": PREFILL_PRESSES["kvzap_mlp_head"],
    "dms_kvzap_mlp": PREFILL_PRESSES["kvzap_mlp"],
}


def _wrapped(wrapper: Callable[[BasePress], BasePress], make: Callable[[], BasePress]) -> Callable[[], BasePress]:
    return lambda: wrapper(make())


PRESS_REGISTRY = PressRegistry(
    {
        f"{prefix}_{name}": _wrapped(wrapper, make)
        for prefix, wrapper in (("matching", AttentionMatchingPress), ("merging", MergingPress))
        for name, make in sorted((PREFILL_PRESSES | DECODING_PRESSES | _NAMED_APART).items())
    }
)
"""
A :class:`PressRegistry` of the presses of kvpress's evaluation that evict positions: ``merging_<name>`` wraps
the press that goes by ``<name>`` there in a MergingPress, ``matching_<name>`` in an AttentionMatchingPress.

Each look-up makes a new press, with the settings that it has there. A KeyError for a name that is not in it.
``merging_expected_attention`` and ``merging_kvzap_mlp``, names that kvpress has already, wrap the bare scorers, as
there.

Examples
--------
>>> from kvpress_merging import PRESS_REGISTRY
>>> press = PRESS_REGISTRY["merging_adakv_snapkv"]
>>> press.compression_ratio = 0.5
>>> type(press).__name__, type(press.press).__name__
('MergingPress', 'AdaKVPress')
"""
