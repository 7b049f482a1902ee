# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""A merging press that kvpress takes for its inner press, and python for itself."""

import copy
import dataclasses
import inspect
import pickle

import kvpress
import pytest
from every_press import CASES, newer
from kvpress import (
    AdaKVPress,
    BasePress,
    ComposedPress,
    DecodingPress,
    DMSPress,
    DuoAttentionPress,
    ExpectedAttentionPress,
    FinchPress,
    KeyRerotationPress,
    KnormPress,
    ScorerPress,
    SnapKVPress,
)

from kvpress_merging import MergeOnEvictPress, MergingPress


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith(("RestoreKV", "FastKVzip"))])
def test_copies_compare_equal_and_are_of_the_same_class(name):
    press = MergingPress(CASES[name].make(), similarity_threshold=0.25, max_merge_per_token=3, tile_bytes=1 << 20)
    copies = [copy.copy(press), copy.deepcopy(press), dataclasses.replace(press)]
    if "third party" not in name:
        copies.append(pickle.loads(pickle.dumps(press)))
    for other in copies:
        assert type(other) is MergingPress
        assert other.similarity_threshold == 0.25
        assert other.tile_bytes == 1 << 20
        if dataclasses.is_dataclass(type(press.press)) and "third party" not in name:
            assert other == press


def test_equality_is_that_of_class_and_fields():
    press = MergingPress(KeyRerotationPress(KnormPress(0.5)))
    assert press == MergingPress(KeyRerotationPress(KnormPress(0.5)))
    assert press != MergingPress(KeyRerotationPress(KnormPress(0.4)))
    assert press != MergingPress(KeyRerotationPress(KnormPress(0.5)), merge_fraction=0.5)
    assert press != KeyRerotationPress(KnormPress(0.5))
    assert MergingPress(KnormPress(0.5)) != MergingPress(AdaKVPress(KnormPress(0.5)))


def test_repr_names_the_press_and_its_configuration():
    assert repr(MergingPress(KnormPress(0.5), merge_fraction=0.75)) == (
        "MergingPress(press=KnormPress(compression_ratio=0.5), similarity_threshold=0.0, merge_keys=False, "
        "value_norm_weighting=True, max_merge_per_token=0, merge_fraction=0.75)"
    )
    inner = KeyRerotationPress(KnormPress(0.5))
    assert repr(MergingPress(inner)).startswith(f"MergingPress(press={inner!r}, ")


def test_replace_changes_one_field_and_shares_the_inner_press():
    press = MergingPress(DMSPress(KnormPress(), threshold=-3.0))
    other = dataclasses.replace(press, merge_fraction=0.5)
    assert type(other) is MergingPress
    assert other.merge_fraction == 0.5
    assert press.merge_fraction == 1.0
    assert other.press is press.press


def test_isinstance_answers_as_the_inner_press_unless_that_is_a_scorer():
    for inner in (KeyRerotationPress(KnormPress()), FinchPress(), DMSPress(KnormPress()), AdaKVPress(KnormPress())):
        press = MergingPress(inner)
        assert isinstance(press, (MergingPress, MergeOnEvictPress))
        assert isinstance(press, type(inner))
        assert not isinstance(press, ScorerPress)
    assert not isinstance(MergingPress(KnormPress()), (ScorerPress, KnormPress))
    assert isinstance(MergingPress(KnormPress()), BasePress)
    assert not isinstance(MergingPress(DMSPress(KnormPress())), DuoAttentionPress)


def test_other_attributes_are_read_from_and_written_to_the_inner_press():
    inner = DMSPress(KnormPress())
    press = MergingPress(inner)
    press.threshold = -3.0
    assert inner.threshold == press.threshold == -3.0
    assert "threshold" not in vars(press)
    assert press.decoding is False


def test_what_neither_has_is_neither_read_nor_written():
    press = MergingPress(DMSPress(KnormPress()))
    with pytest.raises(AttributeError, match=r"^MergingPress has no attribute 'no_such_thing', and neither has"):
        _ = press.no_such_thing
    with pytest.raises(AttributeError, match=r"did you mean 'similarity_threshold'\?"):
        press.similarty_threshold = 0.9
    with pytest.raises(AttributeError, match=r"did you mean 'sliding_window_size'\?.* declared as a field"):
        press.sliding_windw_size = 9
    without = MergingPress(CASES["third party, slices and joins"].make())
    with pytest.raises(AttributeError, match="MergingPress has no attribute 'compression_ratio'"):
        without.compression_ratio = 0.5
    assert vars(press.press) == vars(DMSPress(KnormPress()))
    assert vars(without.press) == {}


def test_a_rule_keeps_its_own_state_in_a_field():
    @dataclasses.dataclass
    class CountingPress(MergeOnEvictPress):
        calls: list = dataclasses.field(init=False, repr=False, compare=False, default_factory=list)

    @dataclasses.dataclass
    class CarelessPress(MergeOnEvictPress):
        def __post_init__(self):
            self.calls = []

    press = CountingPress(KnormPress(0.5))
    press.calls.append(1)
    assert press == CountingPress(KnormPress(0.5))
    with pytest.raises(AttributeError, match=r"^CarelessPress has no attribute 'calls'.*field\(init=False"):
        CarelessPress(KnormPress(0.5))


def test_kvpress_own_merging_press_is_named_apart():
    with pytest.raises(
        TypeError, match=r"^kvpress\.MergingPress already merges .* or use kvpress\.MergingPress alone$"
    ):
        MergingPress(kvpress.MergingPress(KnormPress(0.5)))


def test_compression_ratio_reads_and_writes_through_with_the_errors_of_the_inner_press():
    press = MergingPress(AdaKVPress(KnormPress(0.5)))
    press.compression_ratio = 0.25
    assert press.compression_ratio == press.press.press.compression_ratio == 0.25
    read_only = MergingPress(DMSPress(KnormPress(), threshold=0.0))
    with pytest.raises(AttributeError, match="compression ratio cannot be set for DMSPress"):
        read_only.compression_ratio = 0.5
    with pytest.raises(AssertionError, match="Forward pass must be run"):
        _ = read_only.compression_ratio
    assert not hasattr(MergingPress(CASES["third party, slices and joins"].make()), "compression_ratio")


# All presses of kvpress that take another press: those that must have a scorer, and the rest.
NEED_A_SCORER = {
    "AdaKVPress",
    "BlockPress",
    "CAMPress",
    "ChunkKVPress",
    "ChunkPress",
    "CompressionRatioDecodingPress",
    "CriticalAdaKVPress",
    "CriticalKVPress",
    "DecodingPress",
    "EntropyGatedChunkKVPress",
    "KeyRerotationPress",
    "LUKVPress",
    "MergingPress",
    "PerLayerCompressionPress",
}
TAKE_ANY = {"ComposedPress", "DMSPress", "PrefillDecodingPress"}


def test_every_press_of_kvpress_that_takes_another_is_known():
    named = {"press", "presses", "base_press", "prefilling_press"}
    exported = {name: getattr(kvpress, name) for name in kvpress.__all__ if name.endswith("Press")}
    wrappers = {name for name, press in exported.items() if named & set(inspect.signature(press).parameters)}
    assert wrappers == (NEED_A_SCORER | TAKE_ANY) & set(exported)  # an older kvpress has fewer


@pytest.mark.parametrize("name", sorted(NEED_A_SCORER))
def test_presses_that_need_a_scorer_refuse_a_merging_press(name):
    wrap = newer(name)
    more = {"compression_ratios": [0.5] * 4} if name == "PerLayerCompressionPress" else {}
    taken = "base_press" if "base_press" in inspect.signature(wrap).parameters else "press"
    wrap(**{taken: KnormPress()}, **more)
    with pytest.raises(AssertionError):  # of kvpress
        wrap(**{taken: MergingPress(KnormPress())}, **more)


def test_composed_presses_refuse_a_merging_press_around_what_they_refuse_bare():
    for inner in (AdaKVPress(KnormPress(0.5)), CASES["KVzip"].make()):
        with pytest.raises(AssertionError):
            ComposedPress([MergingPress(inner)])


def test_a_merging_press_gives_no_scores():
    with pytest.raises(ValueError, match=r"MergingPress\(OuterPress\(KnormPress"):
        MergingPress(KnormPress(0.5)).score(None, None, None, None, None, {})


@pytest.mark.parametrize(
    "nested",
    [
        lambda press: press,
        lambda press: DMSPress(press, threshold=0.0),
        lambda press: ComposedPress([SnapKVPress(0.5), press]),
        lambda press: DecodingPress(MergingPress(AdaKVPress(KnormPress()))),
    ],
)
def test_a_merging_press_anywhere_inside_is_refused(nested):
    with pytest.raises(TypeError, match="already merges"):
        MergingPress(nested(MergingPress(ExpectedAttentionPress(0.5))))


@pytest.mark.parametrize("press", [None, 0.5, "knorm", object()])
def test_what_is_not_a_press_is_refused(press):
    with pytest.raises(TypeError, match=rf"^press must be a kvpress BasePress, got {press!r}$"):
        MergingPress(press)


def test_the_inner_press_can_be_set_and_is_checked_then():
    press = MergingPress(KnormPress(0.5))
    press.press = SnapKVPress(0.3)
    assert press.compression_ratio == 0.3
    with pytest.raises(TypeError, match="already merges"):
        press.press = MergingPress(KnormPress())
