# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
import json
from typing import Any
from unittest.mock import Mock

import datasets
import pandas as pd
import pytest
from kvpress import KVPressTextGenerationPipeline

from evaluation.benchmarks import longbench, needle_in_haystack
from evaluation.benchmarks.hub import REPOSITORIES, DatasetUnavailableError, load_hub_dataset
from evaluation.config import EvaluationConfig
from evaluation.evaluate import prepare, run
from evaluation.evaluate_registry import DATASET_REGISTRY, SCORER_REGISTRY

RULER_ROWS = [
    {
        "context": "The code of the red door is 1234. The code of the blue door is 5678.",
        "question": "What are the codes?",
        "answer_prefix": "They are",
        "answer": ["1234", "5678"],
        "max_new_tokens": 3,
        "task": "niah_multivalue",
    },
    {
        "context": "Rome is a city. Rome is old.",
        "question": "What is old?",
        "answer_prefix": "Answer:",
        "answer": ["Rome", "the city"],
        "max_new_tokens": 3,
        "task": "qa_1",
    },
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Writes rows to a folder as the hub keeps them."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def write(rows):
        (tmp_path / "data").mkdir()
        pd.DataFrame(rows).to_parquet(tmp_path / "data" / "test-00000-of-00001.parquet")
        return str(tmp_path / "data")

    return write


@pytest.fixture
def said(monkeypatch):
    """Puts words into the model's mouth, in the order of the samples."""

    def say(*answers):
        waiting = list(answers)
        monkeypatch.setattr(KVPressTextGenerationPipeline, "generate_answer", lambda *args: waiting.pop(0))
        monkeypatch.setattr("evaluation.answers.read_answers", lambda *args: [])

    return say


def run_there(config, model, tokenizer):
    folder = run(config, model, tokenizer)
    return pd.read_csv(folder / "predictions.csv"), json.loads((folder / "metrics.json").read_text())


def test_ruler_is_read_asked_and_scored(folder, said, model, tokenizer, tmp_path):
    said(" 5678 and 91011", "It is Rome.\x01")
    config = EvaluationConfig(dataset="ruler", data_dir=folder(RULER_ROWS), output_dir=tmp_path / "out", quiet=True)
    predictions, metrics = run_there(config, model, tokenizer)
    assert metrics == {"niah_multivalue": {"string_match": 50.0}, "qa_1": {"string_match": 100.0}}
    assert predictions["string_match"].tolist() == [50.0, 100.0]
    assert [json.loads(answers) for answers in predictions["answer"]] == [row["answer"] for row in RULER_ROWS]


def test_the_model_answers_rulers_questions(folder, model, tokenizer, tmp_path):
    config = EvaluationConfig(
        dataset="ruler",
        data_dir=folder(RULER_ROWS),
        press_name="merging_knorm",
        output_dir=tmp_path / "out",
        quiet=True,
    )
    predictions, _ = run_there(config, model, tokenizer)
    assert predictions["predicted_answer"].str.len().between(1, 3).all()  # of at most three bytes


def test_rulers_tasks_can_be_chosen(folder, model, tokenizer):
    source = folder(RULER_ROWS)
    config = EvaluationConfig(dataset="ruler", data_dir=source, tasks=["qa_1"], quiet=True)
    assert prepare(config, model, tokenizer).samples["task"].tolist() == ["qa_1"]
    config = EvaluationConfig(dataset="ruler", data_dir=source, tasks=["qa_2"], quiet=True)
    with pytest.raises(ValueError, match="--tasks: the dataset has no qa_2, only niah_multivalue, qa_1"):
        prepare(config, model, tokenizer)


@pytest.mark.parametrize(
    ("task", "said_text", "answers", "classes", "metric", "expected"),
    [
        # Without case, articles and punctuation: 2 of 3 words are right, of 2.
        ("hotpotqa", "The Red, big house", ["a red house", "blue"], None, "f1", 80.0),
        ("narrativeqa", "no idea", ["a red house"], None, "f1", 0.0),
        ("qasper", "the", ["the"], None, "f1", 0.0),  # nothing is left of either
        # What follows the first line is another made-up question.
        ("triviaqa", "\nParis\nQuestion: Rome", ["Rome", "Paris"], None, "f1", 100.0),
        # Longest common sequence "the cat sat": precision 3/4, recall 3/3.
        ("gov_report", "the cat quietly sat", ["the cat sat"], None, "rouge_l", 100 * 2 * 0.75 / 1.75),
        ("multi_news", "...", ["the cat sat"], None, "rouge_l", 0.0),
        ("samsum", "\nthe cat sat\nthe dog ran", ["the cat sat"], None, "rouge_l", 100.0),
        # Two classes are named, one is right; "Other" is a part of the right one's name and does not count.
        ("trec", "Other location or City", ["Other location"], ["Other", "Other location", "City"], "accuracy", 50.0),
        ("trec", "City\nOther location", ["Other location"], ["Other", "Other location", "City"], "accuracy", 0.0),
        ("passage_count", "There are 7, or 7, or 9 or 10", ["7"], None, "accuracy", 50.0),
        ("passage_count", "many", ["7"], None, "accuracy", 0.0),
        ("passage_retrieval_en", "Paragraph 12", ["Paragraph 12"], None, "accuracy", 100.0),
        ("passage_retrieval_en", "Paragraph 1", ["Paragraph 12"], None, "accuracy", 0.0),
        # The first line of code; 2 * 4 matching characters of 4 + 5.
        ("lcc", "```python\n# comment\nabcd\nefgh", ["abcde"], None, "edit_similarity", 89.0),
        ("repobench-p", "// comment", ["abcde"], None, "edit_similarity", 0.0),
    ],
)
def test_longbench_scores_by_hand(task, said_text, answers, classes, metric, expected):
    predictions = pd.DataFrame(
        [{"task": task, "predicted_answer": said_text, "answers": answers, "all_classes": classes}], index=[3]
    )
    scores = longbench.score(predictions)
    assert scores.columns.tolist() == [metric]
    assert scores.loc[3, metric] == pytest.approx(expected, abs=1e-4)


def test_longbench_has_a_metric_for_each_english_and_code_task():
    assert {*longbench.METRICS, "trec"} == {
        *("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique", "gov_report", "qmsum"),
        *("multi_news", "trec", "triviaqa", "samsum", "passage_count", "passage_retrieval_en", "lcc", "repobench-p"),
    }


def test_a_task_without_a_metric_is_told():
    predictions = pd.DataFrame([{"task": "lsht", "predicted_answer": "", "answers": [""], "all_classes": None}])
    with pytest.raises(ValueError, match="no metric for LongBench's task 'lsht'; known are trec, narrativeqa"):
        longbench.score(predictions)


def test_longbench_is_read_asked_and_scored(folder, said, model, tokenizer, tmp_path):
    rows = [
        {
            "context": f"Passage {i}",
            "question": "Who?",
            "answer_prefix": "Answer:",
            "answers": answers,
            "all_classes": None,
            "max_new_tokens": 32,
            "task": "hotpotqa",
            "length": 5,
        }
        for i, answers in enumerate((["Ann"], ["Bob", "Robert"], ["Cid"]))
    ]
    said("Ann", "robert.", "Dan")
    config = EvaluationConfig(dataset="longbench", data_dir=folder(rows), output_dir=tmp_path / "out", quiet=True)
    predictions, metrics = run_there(config, model, tokenizer)
    assert metrics == {"hotpotqa": {"f1": 66.67}}
    assert predictions["f1"].tolist() == [100.0, 100.0, 0.0]


ESSAYS: dict[str, Any] = {
    "context": "Essays are long. " * 60,
    "needle": "The best thing is to swim.",
    "question": "What is the best thing?",
    "answer_prefix": "The best thing is",
    "max_new_tokens": 5,
}


@pytest.mark.parametrize(("depth", "place"), [(0, 0.0), (30, 0.3), (100, 1.0)])
def test_a_needle_is_put_at_its_depth_into_essays_of_the_length(tokenizer, depth, place):
    needle = ESSAYS["needle"]
    samples = needle_in_haystack.write_contexts(pd.DataFrame([ESSAYS]), tokenizer, 600, [depth])
    (context,) = samples["context"]
    assert context.count(needle) == 1
    before, after = context.split(needle)
    before, after = before.split("\n\n", 1)[1], after.rsplit("\n\n", 1)[0]
    essays = before + after
    assert essays == ESSAYS["context"][: len(essays)]
    assert len(before) == int(place * len(essays))
    assert len(essays) == 600 - len(needle) - 150
    assert len(context) <= 600
    assert samples["needle_depth"].tolist() == [depth]


def test_a_needle_is_asked_for_at_each_depth_and_scored(folder, said, model, tokenizer, tmp_path):
    said("The best thing is to swim.", "The best way is to run.", "")
    config = EvaluationConfig(
        dataset="needle_in_haystack",
        data_dir=folder([ESSAYS]),
        max_context_length=700,
        needle_depth=[0, 50, 100],
        output_dir=tmp_path / "out",
        quiet=True,
    )
    predictions, metrics = run_there(config, model, tokenizer)
    assert predictions["needle_depth"].tolist() == [0, 50, 100]
    assert set(metrics) == {"needle_depth_0", "needle_depth_50", "needle_depth_100"}
    assert metrics["needle_depth_0"] == {"rouge-1": 100.0, "rouge-2": 100.0, "rouge-l": 100.0}
    # Of 6 words, "The best is to" are shared; of 5 pairs, "The best" and "is to".
    assert metrics["needle_depth_50"] == {"rouge-1": 66.67, "rouge-2": 40.0, "rouge-l": 66.67}
    assert metrics["needle_depth_100"] == {"rouge-1": 0.0, "rouge-2": 0.0, "rouge-l": 0.0}


def test_a_length_without_room_for_essays_is_told(tokenizer):
    with pytest.raises(ValueError, match="--max_context_length must be greater than 176"):
        needle_in_haystack.write_contexts(pd.DataFrame([ESSAYS]), tokenizer, 176, [0])


def test_the_hub_is_asked_for_kvpress_repositories(monkeypatch):
    load_dataset = Mock(return_value=datasets.Dataset.from_list(RULER_ROWS))
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = load_hub_dataset("ruler", "4096", ("context",))
    load_dataset.assert_called_once_with("simonjegou/ruler", data_dir="4096", split="test")
    assert rows.to_dict("records") == RULER_ROWS
    assert REPOSITORIES["longbench"] == "Xnhyacinth/LongBench"
    assert REPOSITORIES["needle_in_haystack"] == "alessiodevoto/paul_graham_essays"


def test_a_hub_out_of_reach_is_told_with_what_can_be_done(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", Mock(side_effect=ConnectionError("Couldn't reach the Hub.\nTrace")))
    with pytest.raises(DatasetUnavailableError) as error_info:
        load_hub_dataset("longbench", "trec", ("context",))
    assert str(error_info.value) == (
        "could not load the dataset 'longbench' (Xnhyacinth/LongBench, trec): Couldn't reach the Hub. Check "
        "--data_dir and the network, or give a local folder with its parquet files as --data_dir; 'ruler-synthetic' "
        "and 'fidelity' need no download."
    )


def test_a_dataset_of_other_columns_is_told(folder):
    with pytest.raises(DatasetUnavailableError, match=r"lacks the columns question, task; it has context"):
        load_hub_dataset("ruler", folder([{"context": "a"}]), ("context", "question", "task"))


def test_every_dataset_has_a_scorer():
    assert set(DATASET_REGISTRY) == set(SCORER_REGISTRY)
