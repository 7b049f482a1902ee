# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""What a report tells of each merge, in tables and in pictures."""

import sys

import numpy as np
import pytest
import torch
from every_press import CASES
from extras import needs_extra
from kernels import oracle
from kvpress import DecodingPress, KnormPress
from replay import positions_by_value, run
from tiny import tiny_tokenizer

from kvpress_merging import AttentionMatchingPress, MergeReport, MergingPress
from kvpress_merging.eviction import Eviction

INPUT_IDS = torch.stack([torch.randperm(180, generator=torch.Generator().manual_seed(seed))[:64] for seed in (1, 2)])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def merged(llama):
    press = MergingPress(KnormPress(0.5), similarity_threshold=0.3, merge_fraction=0.7, record_pairs=True)
    run(llama, press, INPUT_IDS)
    return press.report


def arcs(figure):
    return next(collection for collection in figure.axes[0].collections if collection.get_gid() == "arcs")


@pytest.mark.parametrize("name", ["Knorm", "AdaKV", "KeyRerotation"])
def test_the_pairs_are_those_of_the_definition_in_float64(name, llama):
    full, bare = run(llama, None, INPUT_IDS), run(llama, CASES[name].make(), INPUT_IDS)
    press = MergingPress(CASES[name].make(), similarity_threshold=0.2, merge_fraction=0.8, record_pairs=True)
    run(llama, press, INPUT_IDS)
    for layer_idx, (layer, left) in enumerate(zip(full, bare)):
        merges = press.report.merges(layer_idx)
        assert (merges["eviction"] == 0).all()
        rows = merges.set_index(["batch", "head"])
        positions = positions_by_value(layer, left)
        n_rows = 0
        for b, h in np.ndindex(positions.shape[:2]):
            kept = sorted(positions[b, h][~left.is_masked[b, h].numpy()].tolist())
            evicted = [i for i in range(layer.keys.shape[2]) if i not in kept]
            keys, values = layer.keys[b, h].tolist(), layer.values[b, h].tolist()
            nearest = [oracle.nearest(row) for row in oracle.cosines(keys, values, kept, evicted)]
            similarity, target = zip(*nearest) if nearest else ((), ())
            chosen = oracle.select(similarity, target, 0.2, 0.8, 0)
            weight = [
                oracle.merge_weight(s, values[i], values[kept[j]], True) if is_chosen else 0.0
                for i, s, j, is_chosen in zip(evicted, similarity, target, chosen)
            ]
            n_rows += len(evicted)
            if not evicted:
                continue
            found = rows.loc[[(b, h)]]
            assert found["evicted"].tolist() == evicted
            assert found["survivor"].tolist() == [kept[j] for j in target]
            np.testing.assert_allclose(found["similarity"], similarity, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(found["weight"], weight, rtol=1e-5, atol=1e-6)
        assert len(merges) == n_rows == press.report.to_dict()[layer_idx]["evicted"]


def test_every_eviction_while_decoding_has_its_number(llama):
    press = MergingPress(DecodingPress(KnormPress(), compression_interval=4, target_size=48), record_pairs=True)
    run(llama, press, INPUT_IDS[:1], decode_ids=torch.arange(12)[None] + 5)
    merges = press.report.merges(2)
    assert merges["eviction"].unique().tolist() == [0, 1, 2]
    assert len(merges) == press.report.to_dict()[2]["evicted"]
    assert (merges["weight"] > 0).sum() == press.report.to_dict()[2]["merged"]


def test_a_head_without_survivors_has_no_one_to_merge_into():
    report = MergeReport()
    none = torch.zeros(1, 1, 0, dtype=torch.int64)
    eviction = Eviction(none, none, torch.arange(3).view(1, 1, 3), 3)
    similarity = torch.full((1, 1, 3), -torch.inf)
    report.record(0, eviction)
    report.record_merges(
        0, eviction, similarity, torch.zeros_like(similarity), torch.zeros(1, 1, 3).long(), keep_pairs=True
    )
    assert report.merges(0)["survivor"].tolist() == [-1, -1, -1]


def test_pairs_are_kept_only_where_they_are_asked_for_and_the_error_says_how(llama):
    press = MergingPress(KnormPress(0.5))
    run(llama, press, INPUT_IDS)
    with pytest.raises(ValueError, match="record_pairs=True"):
        press.report.merges(0)
    with pytest.raises(ValueError, match=r"layer_idx must be a layer that the press has seen \(0, 1, 2, 3\), got 7"):
        press.report.merges(7)


@needs_extra("plot")
def test_a_prefill_that_evicts_nothing_has_no_pairs(llama):
    press = MergingPress(KnormPress(0.0), record_pairs=True)
    run(llama, press, INPUT_IDS)
    assert press.report.merges(0).empty
    with pytest.raises(ValueError, match="nothing was evicted"):
        press.report.plot_layers()


@needs_extra("plot")
def test_a_picture_has_an_arc_of_its_colour_and_width_for_each_merge_over_the_tokens(merged, tokenizer, tmp_path):
    from matplotlib.image import imread

    figure = merged.plot(tokenizer, INPUT_IDS, 2, 1, batch=1)
    merges = merged.merges(2).query("batch == 1 and head == 1 and weight > 0").sort_values("similarity")
    drawn = arcs(figure)
    np.testing.assert_allclose(drawn.get_array(), merges["similarity"])
    np.testing.assert_allclose(np.diff(drawn.get_linewidths()), 3 * np.diff(merges["weight"]), atol=1e-5)
    for segment, (evicted, survivor) in zip(drawn.get_segments(), merges[["evicted", "survivor"]].to_numpy()):
        assert segment[[0, -1], 0].tolist() == pytest.approx([evicted, survivor])
    taken = merges.groupby("survivor")["weight"].sum()
    assert [bar.get_height() for bar in figure.axes[1].patches] == pytest.approx(taken.tolist())

    labels = figure.axes[1].get_xticklabels()
    words = [tokenizer.decode([token]).strip() for token in INPUT_IDS[1].tolist()]
    assert [label.get_text() for label, word in zip(labels, words) if word] == [word for word in words if word]
    bold = {place for place, label in enumerate(labels) if label.get_fontweight() == "bold"}
    assert bold == set(range(64)) - set(merged.merges(2).query("batch == 1 and head == 1")["evicted"])

    figure.savefig(tmp_path / "merges.png", dpi=60)
    assert imread(tmp_path / "merges.png").std() > 0.05


@needs_extra("plot")
def test_a_stretch_of_the_tokens_shows_the_arcs_that_reach_into_it(merged, tokenizer):
    figure = merged.plot(tokenizer, INPUT_IDS[0], 0, start=10, stop=30)
    merges = merged.merges(0).query("batch == 0 and head == 0 and weight > 0")
    within = merges[["evicted", "survivor"]].isin(range(10, 30)).any(axis=1)
    assert 0 < within.sum() < len(merges)
    assert len(arcs(figure).get_segments()) == within.sum()
    assert len(figure.axes[1].get_xticklabels()) == 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"head": 5}, r"batch row 0 and head 5 of layer 0 lost nothing.*\(0, 0\), \(0, 1\)"),
        ({"input_ids": INPUT_IDS[:, :20]}, "input_ids must be all that was prefilled, at least .* tokens, got 20"),
        ({"input_ids": INPUT_IDS[:1], "batch": 1}, r"row for batch row 1, got shape \(1, 64\)"),
        ({"start": 30, "stop": 20}, "start and stop must be within 0 and 64, start first, got 30 and 20"),
    ],
)
@needs_extra("plot")
def test_what_cannot_be_drawn_is_an_error_that_says_what_can(arguments, message, merged, tokenizer):
    with pytest.raises(ValueError, match=message):
        merged.plot(**{"tokenizer": tokenizer, "input_ids": INPUT_IDS, "layer_idx": 0, **arguments})


@needs_extra("plot")
def test_the_summary_of_a_blend_draws_the_figures_of_each_layer(merged):
    figure, frame = merged.plot_layers(), merged.to_frame()
    counts, similarity, bound = figure.axes
    heights = [bar.get_height() for bar in counts.patches]
    assert heights == [*frame["merged"], *(frame["evicted"] - frame["merged"])]
    assert similarity.lines[0].get_ydata().tolist() == frame["similarity_q50"].tolist()
    assert bound.lines[0].get_ydata().tolist() == (100 * frame["bound_mean"]).tolist()


@needs_extra("plot")
def test_matching_has_a_summary_and_says_that_it_knows_no_pairs(llama, tokenizer):
    press = AttentionMatchingPress(KnormPress(0.5))
    run(llama, press, INPUT_IDS)
    figure, frame = press.report.plot_layers(), press.report.to_frame()
    heads, error = figure.axes
    assert [bar.get_height() for bar in heads.patches] == [*frame["heads"], *frame["heads_fitted"]]
    assert [line.get_ydata().tolist() for line in error.lines] == [
        frame["error_before"].tolist(),
        frame["error_after"].tolist(),
    ]
    with pytest.raises(ValueError, match="matching moves all survivors"):
        press.report.plot(tokenizer, INPUT_IDS, 0)


def test_without_matplotlib_the_error_names_the_extra(merged, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "kvpress_merging.plots", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'kvpress-merging\[plot\]'"):
        merged.plot_layers()


@pytest.mark.parametrize("wrap", [MergingPress, AttentionMatchingPress])
def test_figures_of_many_evictions_are_those_of_each(wrap, llama, monkeypatch):
    def report() -> dict:
        press = wrap(DecodingPress(KnormPress(), compression_interval=1, target_size=40))
        run(llama, press, INPUT_IDS[:, :48], INPUT_IDS[:, 48:])
        return press.report.to_dict()

    expected = report()
    assert expected[0]["evicted"] == 2 * 2 * (64 - 40)  # heads, rows, and what was left of 64
    monkeypatch.setattr("kvpress_merging.report.MAX_PARTS", 3)
    for row, row_expected in zip(report().values(), expected.values(), strict=True):
        assert row.keys() == row_expected.keys()
        for name, figure in row_expected.items():
            assert row[name] == (figure if figure is None else pytest.approx(figure, rel=1e-6)), name


@pytest.mark.parametrize("max_parts", [2, 64])
def test_most_merges_are_into_one_survivor_of_one_head_at_one_eviction(max_parts, monkeypatch):
    monkeypatch.setattr("kvpress_merging.report.MAX_PARTS", max_parts)
    report = MergeReport()
    eviction = Eviction.from_kept(torch.tensor([[[4, 5], [4, 5]]]), 6)  # 4 positions evicted from each of two heads
    target = torch.tensor([[[0, 0, 0, 1], [0, 0, 1, 1]]])
    weight = torch.tensor([[[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0]]])
    for _ in range(5):
        report.record(0, eviction)
        report.record_merges(0, eviction, weight, weight, target)
    row = report.to_dict()[0]
    assert (row["evicted"], row["merged"], row["most_merges"]) == (40, 35, 3)
