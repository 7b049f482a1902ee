# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""What a run's folder holds is what was measured."""

import pandas as pd
import pytest
from run_folders import VERSIONS, write_run

from evaluation.config import EvaluationConfig
from evaluation.report.runs import read_run
from evaluation.results import read_predictions, write_files
from kvpress_merging import MergingPress

ANSWERS = [
    "3344286",
    "33",
    "007",
    "1e5",
    "-0.50",
    "nan",
    "NaN",
    "None",
    "null",
    "",
    " 5 ",
    "True",
    "a\nb\rc\r\nd",
    '"x", y',
]


def test_texts_are_read_back_as_they_were_written_whatever_they_look_like(tmp_path):
    n = len(ANSWERS)
    predictions = pd.DataFrame(
        {
            "sample": range(n),
            "task": "qa",
            "question": ANSWERS,
            "context": ANSWERS,
            "answer": ANSWERS,
            "predicted_answer": ANSWERS,
            "string_match": [100.0] * (n - 1) + [float("nan")],
        }
    )
    config = EvaluationConfig(dataset="ruler", press_name="knorm", output_dir=tmp_path)
    folder = write_files(config, VERSIONS, predictions, {"qa": {"string_match": 100.0}})
    for table in (read_predictions(folder), read_run(folder).predictions.reset_index()):
        for name in ("question", "context", "answer", "predicted_answer"):
            assert table[name].tolist() == ANSWERS, name
        assert table["sample"].tolist() == list(range(n))
        assert table["string_match"].isna().tolist() == [False] * (n - 1) + [True]


@pytest.mark.parametrize("said", ["33", ""])
def test_a_run_whose_answers_are_all_alike_has_them_as_text(said, tmp_path):
    folder = write_run(tmp_path, "merging_knorm", MergingPress, {"qa": [0.0, 0.0]}, identity="7", said=said)
    assert read_run(folder).predictions["predicted_answer"].tolist() == [said, said]
