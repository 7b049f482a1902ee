# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
from collections import Counter
from pathlib import Path

import pytest
import yaml

from evaluation.presses import configure_press
from evaluation.report.runs import LEVELS, read_references
from evaluation.sweep.grid import read_grid

SWEEPS = Path("evaluation/sweeps")


def read(tmp_path, text):
    file = tmp_path / "grid.yaml"
    file.write_text(text)
    return read_grid(file)


def about(cells, *names):
    return [tuple(getattr(config, name) for name in names) for config in cells]


# What a file says.


def test_lists_are_axes_and_everything_else_is_for_all_cells(tmp_path):
    cells = read(tmp_path, "press_name: [knorm, snapkv]\ncompression_ratio: [0.25, 0.5]\nseed: 7\nn_samples: 3")
    assert about(cells, "press_name", "compression_ratio", "seed", "n_samples") == [
        ("knorm", 0.25, 7, 3),
        ("knorm", 0.5, 7, 3),
        ("snapkv", 0.25, 7, 3),
        ("snapkv", 0.5, 7, 3),
    ]


def test_any_setting_is_an_axis_and_part_of_the_folders_name(tmp_path):
    axes = {
        "data_dir": [500, 1000],
        "seed": [1, 2],
        "merge_fraction": [0.5, 1.0],
        "merge_keys": [False, True],
        "query_aware": [False, True],
        "fraction": [0.5, 1.0],
        "max_new_tokens": [4, None],
        "model_kwargs": [{}, {"dtype": "bfloat16"}],
        "tasks": [["vt"], ["vt", "cwe"]],
    }
    cells = read(tmp_path, yaml.safe_dump({"press_name": "merging_knorm", **axes}))
    assert len(cells) == len({config.folder_name() for config in cells}) == 2 ** len(axes)


def test_tasks_are_one_value_and_lists_of_them_an_axis(tmp_path):
    assert about(read(tmp_path, "tasks: [vt, cwe]"), "tasks") == [(["vt", "cwe"],)]
    assert about(read(tmp_path, "tasks: vt"), "tasks") == [(["vt"],)]
    assert about(read(tmp_path, "tasks: [[vt], [cwe, fwe]]"), "tasks") == [(["vt"],), (["cwe", "fwe"],)]


def test_blocks_add_to_what_is_for_all_cells_and_win_over_it(tmp_path):
    text = "seed: 7\ndata_dir: 300\ncells: [{press_name: knorm}, {press_name: snapkv, seed: [1, 2]}]"
    assert about(read(tmp_path, text), "press_name", "seed", "data_dir") == [
        ("knorm", 7, "300"),
        ("snapkv", 1, "300"),
        ("snapkv", 2, "300"),
    ]


def test_a_cell_that_is_asked_for_twice_is_there_once(tmp_path):
    text = "press_name: [no_press, knorm]\ncompression_ratio: [0.25, 0.5, 0.5]\nmerge_fraction: null"
    assert about(read(tmp_path, text), "press_name", "compression_ratio") == [
        ("no_press", 0.0),
        ("knorm", 0.25),
        ("knorm", 0.5),
    ]
    text = "press_name: merging_knorm\ncells: [{merge_keys: [false, true]}, {merge_fraction: [1, 0.5]}]"
    assert len(read(tmp_path, text)) == 3  # the default ones are alike


def test_settings_are_left_out_where_a_press_or_a_dataset_has_no_use_for_them(tmp_path):
    text = (
        "press_name: [no_press, knorm, merging_kvzap_mlp, merging_dms_kvzap_mlp]\ncompression_ratio: [0.25, 0.75]\n"
        "threshold: [-3, -4]\nmerge_fraction: 0.5\ndataset: [ruler-synthetic, fidelity]\nmax_new_tokens: 9"
    )
    cells = read(tmp_path, text)
    assert Counter(config.dataset for config in cells) == {"ruler-synthetic": 7, "fidelity": 7}
    assert about(cells, "press_name", "compression_ratio", "threshold", "merge_fraction")[:13:2] == [
        ("no_press", 0.0, None, None),
        ("knorm", 0.25, None, None),
        ("knorm", 0.75, None, None),
        ("merging_kvzap_mlp", 0.25, None, 0.5),
        ("merging_kvzap_mlp", 0.75, None, 0.5),
        ("merging_dms_kvzap_mlp", 0.5, -3.0, 0.5),
        ("merging_dms_kvzap_mlp", 0.5, -4.0, 0.5),
    ]
    # Runs are matched by the text of their presses.
    assert "threshold=-3.0" in str(configure_press(cells[10]))


def test_cells_that_share_a_model_follow_each_other(tmp_path):
    cells = read(tmp_path, "seed: [1, 2]\nmodel: [a, b]")
    assert about(cells, "model", "seed") == [("a", 1), ("a", 2), ("b", 1), ("b", 2)]


def test_results_go_where_the_command_says_or_the_file_or_its_name(tmp_path):
    file = tmp_path / "grid.yaml"
    file.write_text("seed: 1")
    assert read_grid(file)[0].output_dir == "results/grid"
    file.write_text("output_dir: there")
    assert read_grid(file)[0].output_dir == "there"
    assert read_grid(file, "here")[0].output_dir == "here"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("press_nme: knorm", "unknown setting 'press_nme'; did you mean press_name?"),
        ("cels: []", "unknown setting 'cels'; did you mean cells"),
        ("cells: [{sed: 1}]", "block 1 of cells: unknown setting 'sed'; did you mean seed"),
        ("press_name: [knorm, snapkw]", "there is no 'snapkw'; did you mean snapkv"),
        ("cells: [{press_name: knorm}, {dataset: fidelty}]", "block 2 of cells, fidelty: --dataset: there is no"),
        ("compression_ratio: [0.5, 1.5]", "--compression_ratio must be in [0, 1), got 1.5"),
        ("compression_ratio: [0.5, '0.75']", "--compression_ratio must be in [0, 1), got '0.75'"),
        ("press_name: merging_knorm\nmerge_fraction: [0.5, 2]", "merge_fraction must be in (0, 1], got 2.0"),
        ("tasks: [niah_sinlge_1]", "there is no task 'niah_sinlge_1'"),
        ("press_name: knorm\nmerge_keys: [false, true]", "merge_keys is of no use for any press or dataset there"),
        ("cells: [{press_name: merging_knorm}, {press_name: knorm, merge_keys: true}]", "block 2 of cells: merge_keys"),
        ("dataset: fidelity\nmax_new_tokens: 3", "max_new_tokens is of no use"),
        ("press_name: [knorm, kvzap_mlp]", "the press kvzap_mlp needs --threshold"),
        ("seed: []", "seed has no values"),
        ("query_aware: [1]", "--query_aware must be true or false"),
        ("press_name: {a: b}", "unhashable"),
        ("cells: {seed: 1}", "cells must be a list of mappings"),
        ("cells: []", "cells must be a list of mappings"),
        ("output_dir: [a, b]", "output_dir must be one value for the whole sweep"),
        ("cells: [{output_dir: a}]", "output_dir is the same for all cells"),
        ("compression_ratio: [0.875, 0.88]", "two cells would share the folder"),
        ("reference: [{score: 1}]", "cannot read its references"),
        ("- knorm", "must hold a mapping"),
        ("a: b: c", "is not YAML"),
    ],
)
def test_a_mistake_is_told_before_anything_is_run(text, message, tmp_path):
    with pytest.raises(ValueError) as info:
        read(tmp_path, text)
    assert message in str(info.value)
    assert str(tmp_path / "grid.yaml") in str(info.value)


def test_a_file_that_is_not_there_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read .*nowhere.yaml.*No such file"):
        read_grid(tmp_path / "nowhere.yaml")


# The files that come with it.


def test_the_grid_of_qwen3_has_every_press_bare_merging_and_matching():
    file = SWEEPS / "ruler-4096-qwen3-8b.yaml"
    cells = read_grid(file)
    assert {about([config], "dataset", "data_dir", "model", "seed", "tasks")[0] for config in cells} == {
        ("ruler", "4096", "Qwen/Qwen3-8B", 42, None)
    }
    assert Counter(config.fraction for config in cells) == {0.1: 67, 1.0: 67}
    levels = Counter(
        (config.threshold is None, config.threshold or config.compression_ratio)
        for config in cells
        if config.press_name != "no_press"
    )
    assert levels == {(True, 0.25): 30, (True, 0.5): 30, (True, 0.75): 30, (True, 0.875): 30} | {
        (False, -3.0): 6,
        (False, -4.0): 6,
    }
    assert_every_merged_press_has_its_twin(cells)
    rows = [(row["press_name"], row["compression_ratio"], row["score"]) for row in read_references(file)]
    ratios = (0.25, 0.5, 0.75, 0.88)
    assert rows == [
        *zip(["knorm"] * 4, ratios, (87.2, 68.3, 32.6, 8.9)),
        *zip(["merging_knorm"] * 4, ratios, (88.3, 72.2, 38.6, 13.6)),
    ]
    for row in read_references(file):
        assert (row["dataset"], str(row["data_dir"]), row["model"]) == ("ruler", "4096", "Qwen/Qwen3-8B")
        assert row["source"] == "https://github.com/NVIDIA/kvpress/pull/219"


def test_the_ablations_have_each_field_on_and_off():
    cells = read_grid(SWEEPS / "seed-ablations.yaml")
    assert len(cells) == 24
    merged = [configure_press(c) for c in cells if c.press_name == "merging_kvzap_mlp" and c.fraction == 1.0]
    fields = ("similarity_threshold", "merge_keys", "value_norm_weighting", "max_merge_per_token", "merge_fraction")
    default = (0.0, False, True, 0, 1.0)
    assert Counter(about(merged, *fields)) == {
        default: 2,
        (0.5, False, True, 0, 0.75): 2,
        (0.0, True, True, 0, 1.0): 2,
        (0.0, False, False, 0, 1.0): 2,
        (0.0, False, True, 4, 1.0): 2,
    }
    assert {config.compression_ratio for config in cells} == {0.75, 0.875}


@pytest.mark.parametrize(
    ("file", "n_cells"),
    [
        ("text-1024.yaml", 186),
        ("ruler-4096-qwen2.5.yaml", 102),
        ("ruler-4096-answers-qwen2.5.yaml", 13),
    ],
)
def test_every_press_of_a_published_grid_is_there_bare_too(file, n_cells, tmp_path):
    cells = read(tmp_path, (SWEEPS / file).read_text())
    assert len(cells) == n_cells
    for model in {config.model for config in cells}:
        assert_every_merged_press_has_its_twin([config for config in cells if config.model == model])


def assert_every_merged_press_has_its_twin(cells):
    def key(config, press):
        return config.dataset, config.fraction, *(getattr(config, name) for name in LEVELS), str(press)

    presses = [(config, configure_press(config)) for config in cells if config.press_name != "no_press"]
    bare = {key(config, press) for config, press in presses if not hasattr(press, "fold")}
    ours = [(config, press) for config, press in presses if hasattr(press, "fold")]
    assert bare
    assert {key(config, press.press) for config, press in ours} == bare


def test_presses_that_are_only_checked_do_not_warn(tmp_path, caplog):
    with caplog.at_level("WARNING"):
        assert len(read(tmp_path, "press_name: [kvzip, merging_kvzip]")) == 2
    assert not caplog.records
