# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
import json
from dataclasses import replace

import pytest
from matplotlib.image import imread
from tiny import tiny_checkpoint, tiny_tokenizer

from evaluation import demo
from evaluation.demo import Comparison, DemoConfig, hide_needle
from evaluation.demo_report import verdict
from evaluation.fidelity import Fidelity

FIDELITY = Fidelity(0.5, (0.5,), 2.0, 1.5, 1.0, 10, 10, 20, 0.1, 0.1)


def comparison(press, evicted, merged, matched=None):
    sides = zip(demo.METHODS, (evicted, merged, matched or merged))
    return Comparison(press, 0.5, {method: [replace(FIDELITY, kl=kl) for kl in side] for method, side in sides})


def run_demo(model_folder, output_folder):
    flags = ["--n_contexts=2", "--context_length=160", "--continuation_length=9", "--device=cpu", "--quiet"]
    demo.main([f"--model={model_folder}", f"--output_dir={output_folder}", *flags])
    return json.loads((output_folder / "demo.json").read_text())


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_checkpoint(folder)
    return folder


def test_the_demo_ends_with_a_table_answers_json_and_a_plot_and_measures_the_same_again(model_folder, tmp_path, capsys):
    record = run_demo(model_folder, tmp_path / "out")

    out = capsys.readouterr().out
    for press in ("Knorm", "ExpectedAttention", "SnapKV"):
        for ratio in ("0.5", "0.75"):
            assert f"{press} {ratio}" in out
    assert "Merging lowered KL in" in out
    assert "Re-fitting lowered KL in" in out
    assert "SnapKV 0.5, merged" in out

    assert record["config"]["context_length"] == 160
    assert record["versions"]["torch"]
    assert record["machine"]["cpus"]
    cells = record["comparisons"]
    assert [(cell["press"], cell["compression_ratio"]) for cell in cells] == [
        (press, ratio) for press in ("Knorm", "ExpectedAttention", "SnapKV") for ratio in (0.5, 0.75)
    ]
    for cell in cells:
        assert list(cell["methods"]) == ["evicted", "merged", "matched"]
        for method in cell["methods"].values():
            assert len(method["windows"]) == 2
            for result in method["windows"]:
                assert result["cache_bytes"] == (1 - cell["compression_ratio"]) * result["cache_bytes_full"]
                assert len(result["kl_per_token"]) == 8
            assert method["kl"] == pytest.approx(sum(result["kl"] for result in method["windows"]) / 2)
        assert cell["methods"]["merged"]["kl"] != cell["methods"]["evicted"]["kl"]
    assert len(record["needle"]["answers"]) == 10

    image = imread(tmp_path / "out" / "demo.png")
    assert image.shape[0] > 300
    assert image.std() > 0.05

    again = run_demo(model_folder, tmp_path / "again")
    for cell, cell_again in zip(cells, again["comparisons"]):
        for method, result in cell["methods"].items():
            result_again = cell_again["methods"][method]
            assert result["kl_change_percent_per_window"] == result_again["kl_change_percent_per_window"]
    assert record["needle"] == again["needle"]


def test_the_change_is_that_of_the_mean_and_windows_are_kept_apart():
    cell = comparison("Knorm", [0.1, 0.3], [0.2, 0.1], [0.05, 0.15])
    assert cell.kl_change("merged") == pytest.approx(-25)
    assert cell.kl_change("matched") == pytest.approx(-50)
    assert cell.kl_change_per_window("merged") == pytest.approx([100, -100 * 2 / 3])


def test_a_press_that_evicted_nothing_is_not_divided_by():
    assert comparison("Knorm", [0.0], [0.0]).kl_change("merged") == 0


def test_the_verdict_names_where_merging_did_worse_too():
    better, worse = comparison("Knorm", [0.2], [0.1]), comparison("SnapKV", [0.1], [0.2])
    for presses, line in (
        ([better, worse], "Merging lowered KL in 1 of 2 comparisons (Knorm 0.5), and did not for SnapKV 0.5."),
        ([better], "Merging lowered KL in 1 of 1 comparisons (Knorm 0.5)."),
        ([worse], "Merging lowered KL in 0 of 1 comparisons, and did not for SnapKV 0.5."),
    ):
        assert verdict(presses, "merged", "Merging") == line


@pytest.mark.parametrize("separator", ["\n\n", " "])
def test_the_needle_stands_once_inside_the_text_where_the_seed_puts_it(tmp_path, separator):
    tokenizer = tiny_tokenizer(tmp_path)
    text = separator.join(f"Paragraph {i} of a text." for i in range(100))
    contexts = []
    for seed in (0, 0, 1):
        context, number = hide_needle(text, tokenizer, seed)
        sentence = f"\n\nThe number that opens the blue locker at the harbour is {number}."
        assert context.count(sentence) == 1
        place = context.index(sentence)
        assert context.replace(sentence, "") == text[: demo.NEEDLE_CONTEXT_LENGTH]
        assert 0.2 <= place / demo.NEEDLE_CONTEXT_LENGTH <= 0.85
        if separator == "\n\n":
            assert context[place - 1] == "."
        contexts.append(context)
    assert contexts[0] == contexts[1] != contexts[2]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_contexts": 0}, "--n_contexts must be at least 1, got 0"),
        ({"context_length": 64}, "--context_length must be at least 128, got 64"),
        ({"continuation_length": 1}, "--continuation_length must be at least 2, got 1"),
        ({"text_file": "nowhere.txt"}, "there is no file 'nowhere.txt'"),
    ],
)
def test_values_that_make_no_sense_are_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        DemoConfig(**fields)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model=./nowhere"], "There is no folder './nowhere'"),
        (["--text_file={short}"], "the text has 5 tokens"),
    ],
)
def test_what_cannot_be_read_is_told_in_one_line(flags, message, model_folder, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("short")
    flags = [flag.format(short=tmp_path / "short.txt") for flag in flags]
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        demo.main([f"--model={model_folder}", "--quiet", *flags])
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
