# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
import json
from collections import ChainMap
from typing import Any, cast
from unittest.mock import Mock

import datasets
import pandas as pd
import pytest
import torch
import yaml
from kvpress import (
    ComposedPress,
    DecodingPress,
    DMSPress,
    DuoAttentionPress,
    KeyDiffPress,
    KnormPress,
    KVPressTextGenerationPipeline,
    SnapKVPress,
    ThinKPress,
)
from tiny import tiny_model

from evaluation import evaluate
from evaluation import run as run_command
from evaluation.__main__ import main
from evaluation.benchmarks.fidelity.measure import measure_fidelity, measure_reference
from evaluation.config import EvaluationConfig
from evaluation.evaluate import measure, prepare, run
from evaluation.evaluate_registry import DATASET_REGISTRY, PRESS_REGISTRY, SCORER_REGISTRY
from evaluation.presses import configure_press
from evaluation.results import write_results
from evaluation.text import built_in_text, cut_windows
from kvpress_merging import MergingPress

SMALL: dict[str, Any] = {
    "data_dir": "400",
    "n_samples": 2,
    "max_new_tokens": 4,
    "tasks": ["niah_single_1"],
    "quiet": True,
}


@pytest.fixture(scope="module")
def fidelity_settings(tmp_path_factory) -> dict[str, Any]:
    """Three windows of a short text."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(built_in_text()[:4000])
    return {
        "dataset": "fidelity",
        "data_dir": "200",
        "continuation_length": 9,
        "n_samples": 3,
        "text_file": file,
        "quiet": True,
    }


@pytest.fixture
def questions(monkeypatch):
    """A dataset of three questions about two contexts."""
    samples = pd.DataFrame(
        {
            "context": ["The cat is grey. " * 6, "The dog is brown. " * 6, "The cat is grey. " * 6],
            "question": ["Cat?", "Dog?", "Grey what?"],
            "answer_prefix": "It is",
            "answer": [["grey"], ["brown"], ["cat"]],
            "max_new_tokens": 5,
            "task": "pets",
        }
    )
    monkeypatch.setitem(DATASET_REGISTRY, "ruler", lambda tokenizer: samples.copy())
    return samples


def read(folder):
    return pd.read_csv(folder / "predictions.csv")


def without_times(predictions):
    return predictions.drop(columns=[name for name in predictions if "seconds" in name])


# What a run leaves.


def test_a_run_writes_configuration_predictions_and_metrics(model, tokenizer, tmp_path):
    config = EvaluationConfig(
        press_name="merging_knorm", **{**SMALL, "tasks": ["niah_single_1", "niah_multivalue"]}, output_dir=tmp_path
    )
    folder = run(config, model, tokenizer)
    assert folder.parent == tmp_path
    assert sorted(file.name for file in folder.iterdir()) == ["config.yaml", "metrics.json", "predictions.csv"]
    predictions = read(folder)
    assert predictions["task"].tolist() == ["niah_single_1"] * 2 + ["niah_multivalue"] * 2
    assert "context" not in predictions
    assert predictions["sample"].tolist() == [0, 1, 2, 3]
    assert (predictions["compression_ratio"] == 0.5).all()
    assert (predictions["seconds"] > 0).all()
    assert all(len(json.loads(answers)) in (1, 4) for answers in predictions["answer"])
    metrics = json.loads((folder / "metrics.json").read_text())
    assert set(metrics) == {"niah_single_1", "niah_multivalue"}
    for task, rows in predictions.groupby("task"):
        means = {name: rows[name].mean() for name in ("string_match", "answer_nll")}
        assert metrics[task] == pytest.approx(means)
    record = yaml.safe_load((folder / "config.yaml").read_text())
    assert record["press_init_command"] == str(MergingPress(KnormPress(0.5)))
    assert set(record["versions"]) >= {"python", "torch", "transformers", "kvpress", "kvpress-merging", "dtype"}


@pytest.mark.parametrize("press_name", ["merging_snapkv", "random"])
def test_the_same_seed_gives_the_same_predictions_but_for_the_time(model, tokenizer, tmp_path, press_name):
    config = EvaluationConfig(press_name=press_name, **SMALL, output_dir=tmp_path)
    folders = [run(config, model, tokenizer) for _ in range(2)]
    first, second = (without_times(read(folder)).to_csv() for folder in folders)
    assert first == second
    assert (folders[0] / "metrics.json").read_bytes() == (folders[1] / "metrics.json").read_bytes()
    other = EvaluationConfig(press_name=press_name, **SMALL, seed=7, output_dir=tmp_path)
    assert read(run(other, model, tokenizer))["answer"].tolist() != read(folders[0])["answer"].tolist()


def test_results_that_are_there_are_never_overwritten(model, tokenizer, tmp_path):
    config = EvaluationConfig(press_name="no_press", **SMALL, output_dir=tmp_path)
    evaluation = prepare(config, model, tokenizer)
    predictions, _ = measure(evaluation)
    folders = [write_results(config, None, model, predictions, {"run": {"number": i}}) for i in range(3)]
    assert [folder.relative_to(folders[0]).as_posix() for folder in folders] == [".", "1", "2"]
    for number, folder in enumerate(folders):
        assert json.loads((folder / "metrics.json").read_text()) == {"run": {"number": number}}


def test_a_run_that_breaks_off_leaves_nothing_behind(model, tokenizer, tmp_path):
    config = EvaluationConfig(press_name="no_press", **SMALL, output_dir=tmp_path)
    with pytest.raises(TypeError):
        write_results(config, None, model, pd.DataFrame({"a": [1]}), {"task": {"metric": object()}})
    assert list(tmp_path.iterdir()) == []


def test_the_command_loads_a_model_runs_and_says_where_the_results_are(checkpoint, tmp_path, capsys):
    capsys.readouterr()
    main(
        f"run --model {checkpoint} --data_dir 400 --n_samples 1 --tasks vt --max_new_tokens 2 --quiet "
        f"--press_name merging_knorm --compression_ratio 0.25 --output_dir {tmp_path / 'results'} --device cpu".split()
    )
    out, err = capsys.readouterr()
    (folder,) = (tmp_path / "results").iterdir()
    assert out.endswith(f"Written to {folder}\n")
    assert json.loads(out[: out.index("Written")]) == json.loads((folder / "metrics.json").read_text())
    assert err == ""
    assert read(folder)["compression_ratio"].tolist() == [0.25]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--press_name knorm --merge_keys", "--merge_keys is of no use for the press knorm"),
        ("--press_name merging_kvzap_linear", "the press merging_kvzap_linear needs --threshold"),
        ("--press_name merging_knorm --merge_fraction 2", "merge_fraction must be in (0, 1], got 2.0"),
    ],
)
def test_what_cannot_be_run_is_told_in_one_line(flags, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        run_command.main(flags.split())
    assert exit_info.value.code == 2
    assert capsys.readouterr().err == f"python -m evaluation run: {message}\n"


@pytest.mark.parametrize(
    ("flags", "name"),
    [("--model /nowhere/at/all", "'/nowhere/at/all'"), ("--dataset ruler --data_dir 4096", "'ruler'")],
)
def test_what_cannot_be_found_is_told_in_one_line(flags, name, model, tokenizer, monkeypatch, capsys):
    if "--model" not in flags:
        monkeypatch.setattr(evaluate, "load_model", lambda *args, **kwargs: (model, tokenizer))
        monkeypatch.setattr(datasets, "load_dataset", Mock(side_effect=ConnectionError("no network\nat all")))
    with pytest.raises(SystemExit) as exit_info:
        run_command.main(flags.split())
    assert exit_info.value.code == 2
    err = capsys.readouterr().err
    assert name in err
    assert err.count("\n") == 1


def test_half_of_the_samples_are_drawn_with_the_seed(model, tokenizer):
    settings = {**SMALL, "n_samples": 8, "fraction": 0.5}
    first, again, other = (
        prepare(EvaluationConfig(**settings, seed=seed), model, tokenizer).samples["sample"].tolist()
        for seed in (42, 42, 3)
    )
    assert len(first) == len(other) == 4
    assert first == again
    assert first != other


# How presses are set up.


@pytest.mark.parametrize("name", sorted(name for name in PRESS_REGISTRY if name.startswith("merging_")))
def test_the_press_inside_is_configured_as_the_bare_one(name):
    press: Any = PRESS_REGISTRY[name]
    settings: dict = {"press_name": name, "compression_ratio": 0.375, "query_aware": True}
    if isinstance(press, DMSPress):
        settings["threshold"] = -3.5
    elif isinstance(press, DecodingPress):
        settings["target_size"] = 77
    elif isinstance(press, DuoAttentionPress):
        settings["head_compression_ratio"] = 0.25
    elif isinstance(press, ComposedPress):
        settings["key_channel_compression_ratio"] = 0.25
    merging: Any = configure_press(EvaluationConfig(**settings))
    assert type(merging) is MergingPress
    if isinstance(press, DMSPress):
        assert merging.press.threshold == -3.5
    elif isinstance(press, DecodingPress):
        assert merging.press.target_size == 77
    elif isinstance(press, DuoAttentionPress):
        assert merging.press.head_compression_ratio == 0.25
    elif isinstance(press, ComposedPress):
        snapkv, think = merging.press.presses
        assert (snapkv.compression_ratio, think.key_channel_compression_ratio) == (0.375, 0.25)
    else:
        assert merging.press.compression_ratio == 0.375
    bare = name.removeprefix("merging_")
    if bare in PRESS_REGISTRY and type(PRESS_REGISTRY[bare]) is type(press.press):
        assert configure_press(EvaluationConfig(**{**settings, "press_name": bare})) == merging.press


def test_fields_of_the_merging_press_are_set():
    press = configure_press(
        EvaluationConfig(
            press_name="merging_snapkv",
            compression_ratio=0.75,
            similarity_threshold=0.5,
            merge_keys=True,
            value_norm_weighting=False,
            max_merge_per_token=3,
            merge_fraction=0.25,
        )
    )
    assert press == MergingPress(SnapKVPress(0.75), 0.5, True, False, 3, 0.25)


def test_decoding_presses_take_their_own_settings():
    press: Any = configure_press(
        EvaluationConfig(
            press_name="decoding_keydiff", compression_interval=8, target_size=64, hidden_states_buffer_size=0
        )
    )
    assert (press.compression_interval, press.target_size, press.hidden_states_buffer_size) == (8, 64, 0)
    default: Any = configure_press(EvaluationConfig(press_name="decoding_keydiff"))
    assert default.compression_interval == 512
    assert isinstance(press.base_press, KeyDiffPress)


def test_think_prunes_channels():
    press = configure_press(EvaluationConfig(press_name="think", key_channel_compression_ratio=0.25))
    assert press == ThinKPress(0.25)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"press_name": "merging_duo_attention"}, "merging_duo_attention needs --head_compression_ratio"),
        ({"press_name": "think"}, "think needs --key_channel_compression_ratio"),
        ({"press_name": "merging_finch"}, "merging_finch needs --query_aware"),
        ({"press_name": "knorm", "threshold": 0.5}, "--threshold is of no use for the press knorm"),
        ({"press_name": "knorm", "target_size": 5}, "--target_size is of no use for the press knorm"),
        ({"press_name": "no_press", "similarity_threshold": 0.5}, "--similarity_threshold is of no use"),
        (
            {"press_name": "merging_finch", "query_aware": True, "merge_keys": True},
            "merge_keys=True cannot be used with",
        ),
        ({"press_name": "decoding_knorm", "dataset": "fidelity"}, "evicts at prefill without a question"),
        ({"press_name": "merging_knorm", "max_merge_per_token": 0.5}, "max_merge_per_token must be an int"),
    ],
)
def test_settings_that_do_not_go_together_are_told(settings, message):
    with pytest.raises(ValueError, match=message):
        configure_press(EvaluationConfig(**settings))


def test_a_threshold_decides_how_much_the_press_inside_evicts(model, tokenizer, fidelity_settings, monkeypatch):
    press: Any = MergingPress(DMSPress(KnormPress(), sliding_window_size=16))
    monkeypatch.setitem(cast(ChainMap, PRESS_REGISTRY).maps[-1], "merging_dms_knorm", press)
    ratios = []
    for threshold in (-1e9, -3.0, 1e9):
        config = EvaluationConfig(press_name="merging_dms_knorm", threshold=threshold, **fidelity_settings)
        evaluation = prepare(config, model, tokenizer)
        assert press.press.threshold == threshold
        ratios.append(measure(evaluation)[0]["compression_ratio"].mean())
    assert ratios[0] == 0
    assert 0 < ratios[1] < ratios[2]
    assert ratios[2] == pytest.approx(1 - 16 / 200)  # all but the sliding window


# How questions are asked.


def answers_of(config, model, tokenizer):
    return measure(prepare(config, model, tokenizer))[0]["predicted_answer"].tolist()


def test_answers_are_those_of_the_pipeline_asked_one_by_one(model, tokenizer, questions):
    config = EvaluationConfig(dataset="ruler", press_name="merging_knorm", quiet=True)
    generate = KVPressTextGenerationPipeline(model=model, tokenizer=tokenizer)
    expected = [
        generate(
            row.context,
            question=row.question,
            answer_prefix=row.answer_prefix,
            press=MergingPress(KnormPress(0.5)),
            max_new_tokens=5,
        )["answer"]
        for row in questions.itertuples()
    ]
    assert len(set(expected)) > 1
    assert answers_of(config, model, tokenizer) == expected


@pytest.mark.parametrize(("press_name", "n_prefills"), [("knorm", 2), ("decoding_knorm", 3)])
def test_questions_about_a_context_share_its_prefill_but_not_while_decoding(
    model, tokenizer, questions, press_name, n_prefills
):
    prefills = []
    handle = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: prefills.append(1) if kwargs["input_ids"].shape[1] > 60 else None, with_kwargs=True
    )
    try:
        answers = answers_of(EvaluationConfig(dataset="ruler", press_name=press_name, quiet=True), model, tokenizer)
    finally:
        handle.remove()
    assert len(prefills) == n_prefills
    assert all(isinstance(said, str) for said in answers)


def test_a_query_aware_press_sees_the_question(model, tokenizer, questions):
    evaluation = prepare(EvaluationConfig(dataset="ruler", query_aware=True, quiet=True), model, tokenizer)
    generate = KVPressTextGenerationPipeline(model=model, tokenizer=tokenizer)
    row = questions.iloc[1]
    expected = generate(row.context + row.question, answer_prefix="It is", press=KnormPress(0.5), max_new_tokens=5)
    predictions, _ = measure(evaluation)
    assert predictions["predicted_answer"].iloc[1] == expected["answer"]
    assert (predictions["question"] == "").all()


def test_samples_without_an_answer_prefix_are_asked_too(model, tokenizer, questions, monkeypatch):
    monkeypatch.setitem(DATASET_REGISTRY, "ruler", lambda tokenizer: questions.assign(answer_prefix=None))
    assert len(answers_of(EvaluationConfig(dataset="ruler", quiet=True), model, tokenizer)) == 3


def test_metrics_are_means_over_a_tasks_samples(model, tokenizer, questions, monkeypatch):
    scores = {"points": [10.0, 20.0, 33.333], "bonus": [float("nan"), 1.0, float("nan")]}
    monkeypatch.setitem(
        SCORER_REGISTRY, "ruler", lambda predictions: pd.DataFrame(scores).set_index(predictions.sort_index().index)
    )
    monkeypatch.setitem(DATASET_REGISTRY, "ruler", lambda tokenizer: questions.assign(task=["a", "b", "a"]))
    predictions, metrics = measure(prepare(EvaluationConfig(dataset="ruler", quiet=True), model, tokenizer))
    likelihood = {task: metrics[task].pop("answer_nll") for task in metrics}
    assert likelihood == predictions.groupby("task")["answer_nll"].mean().to_dict()
    assert metrics == {"a": {"points": 21.67}, "b": {"points": 20.0, "bonus": 1.0}}
    assert predictions.sort_index()["points"].tolist() == scores["points"]


@pytest.mark.parametrize("press_name", ["observed_attention", "merging_observed_attention"])
def test_observed_attention_gets_its_weights_and_the_model_its_attention_back(
    model, tokenizer, questions, tmp_path, press_name
):
    before = model.config._attn_implementation
    assert before != "eager"
    config = EvaluationConfig(dataset="ruler", press_name=press_name, quiet=True, output_dir=tmp_path)
    folder = run(config, model, tokenizer)
    assert (read(folder)["compression_ratio"] == 0.5).all()
    assert yaml.safe_load((folder / "config.yaml").read_text())["versions"]["attention"] == "eager"
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("tie_word_embeddings", [False, True])
def test_finch_leaves_model_and_tokenizer_as_they_were(tokenizer, questions, tie_word_embeddings):
    model = tiny_model(tie_word_embeddings=tie_word_embeddings)
    n_tokens = len(tokenizer)
    logits = model(torch.arange(9)[None]).logits
    config = EvaluationConfig(dataset="ruler", press_name="merging_finch", query_aware=True, quiet=True)
    first, second = (measure(prepare(config, model, tokenizer))[0]["predicted_answer"].tolist() for _ in range(2))
    assert first == second
    assert len(tokenizer) == model.config.vocab_size == n_tokens
    assert model.get_input_embeddings().num_embeddings == model.lm_head.out_features == n_tokens
    assert (model.get_input_embeddings().weight is model.lm_head.weight) is tie_word_embeddings
    assert torch.equal(model(torch.arange(9)[None]).logits, logits)


def test_a_model_needs_its_tokenizer(model):
    with pytest.raises(ValueError, match="model and tokenizer go together"):
        run(EvaluationConfig(**SMALL), model)


# Fidelity.


def test_fidelity_is_measured_on_each_window(model, tokenizer, fidelity_settings, tmp_path):
    config = EvaluationConfig(
        press_name="merging_snapkv", compression_ratio=0.75, **fidelity_settings, output_dir=tmp_path
    )
    folder = run(config, model, tokenizer)
    predictions = read(folder)
    for row, window in zip(predictions.itertuples(), cut_windows(built_in_text()[:4000], tokenizer, 3, 200, 9)):
        reference = measure_reference(model, window, attention_errors=True)
        expected = measure_fidelity(model, MergingPress(SnapKVPress(0.75)), reference)
        assert (row.start, row.kl, row.nll, row.nll_full) == pytest.approx(
            (window.start, expected.kl, expected.nll, expected.nll_full)
        )
        assert row.top1_agreement == expected.top1_agreement
        assert row.compression_ratio == pytest.approx(0.75)
        errors = [getattr(row, f"attention_error_layer_{i}") for i in range(4)]
        assert errors == pytest.approx(expected.attention_errors)
        assert row.attention_error == pytest.approx(sum(errors) / 4)
        assert row.prefill_seconds > 0
    metrics = json.loads((folder / "metrics.json").read_text())["fidelity"]
    for name in ("kl", "nll", "nll_full", "top1_agreement", "attention_error"):
        assert metrics[name] == pytest.approx(predictions[name].mean())
        low, high = metrics[f"{name}_interval"]
        assert low <= metrics[name] <= high
        assert predictions[name].min() <= low + 1e-9
        assert predictions[name].max() >= high - 1e-9
    assert "seconds" not in str(metrics)


def test_the_full_cache_is_faithful_to_itself(model, tokenizer, fidelity_settings):
    evaluation = prepare(
        EvaluationConfig(press_name="no_press", **{**fidelity_settings, "n_samples": 1}), model, tokenizer
    )
    predictions, metrics = measure(evaluation)
    assert metrics["fidelity"]["kl"] == pytest.approx(0, abs=1e-9)
    assert metrics["fidelity"]["top1_agreement"] == 1
    assert "kl_interval" not in metrics["fidelity"]  # of one window
    assert predictions["compression_ratio"].tolist() == [0]


def test_fidelity_is_measured_on_a_users_text(model, tokenizer, fidelity_settings, tmp_path):
    file = tmp_path / "sea.txt"
    file.write_text("The sea is deep. " * 20)
    settings = {**fidelity_settings, "n_samples": 1, "text_file": str(file)}
    samples = prepare(EvaluationConfig(**settings), model, tokenizer).samples
    assert "The sea is deep" in tokenizer.decode(samples["window"].iloc[0].context_ids[0])
    with pytest.raises(ValueError, match="the text has 340 tokens, but 2 windows"):
        prepare(EvaluationConfig(**{**settings, "n_samples": 2}), model, tokenizer)
