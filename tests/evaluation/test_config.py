# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
import dataclasses
import inspect

import pytest
import yaml

from evaluation.config import DATASETS, FIELDS, PRESS_FIELDS, SETTINGS, EvaluationConfig, default_of, measured_settings
from evaluation.evaluate_registry import DATASET_REGISTRY, PRESS_REGISTRY
from evaluation.report.runs import PREFIXES
from evaluation.run import parse
from kvpress_merging import AttentionMatchingPress, MergingPress

# The fields of kvpress 0.5.5's EvaluationConfig.
KVPRESS_FLAGS = [
    "dataset",
    "data_dir",
    "model",
    "device",
    "press_name",
    "compression_ratio",
    "key_channel_compression_ratio",
    "head_compression_ratio",
    "threshold",
    "fraction",
    "max_new_tokens",
    "max_context_length",
    "query_aware",
    "needle_depth",
    "compression_interval",
    "target_size",
    "hidden_states_buffer_size",
    "output_dir",
    "log_level",
    "model_kwargs",
    "trust_remote_code",
    "press_init_command",
    "seed",
    "fp8",
]

# The names in kvpress 0.5.5's PRESS_REGISTRY, less those of its own merging presses.
KVPRESS_PRESSES = """
adakv_snapkv block_keydiff chunkkv critical_adakv_expected_attention critical_adakv_snapkv
critical_expected_attention critical_snapkv cur duo_attention duo_attention_on_the_fly entropy_gated_chunkkv
expected_attention fastkvzip finch keydiff kvcompose kvcompose_unstructured kvgrad kvzip kvzip_plus kvzap_linear
kvzap_mlp kvzap_mlp_head kvzap_mlp_layer lagkv lukv knorm observed_attention pyramidkv qfilter random RestoreKV
RestoreKV_plus snap_think snapkv streaming_llm think tova compactor adakv_compactor no_press cam_streaming_llm
cam_knorm cam_adakv_snapkv cam_tova decoding_knorm decoding_streaming_llm decoding_tova decoding_qfilter
decoding_adakv_expected_attention_e2 decoding_adakv_snapkv decoding_keydiff
"""


def test_kvpress_flags_come_first_and_in_its_order():
    names = [field.name for field in dataclasses.fields(EvaluationConfig)]
    assert [name for name in names if name in KVPRESS_FLAGS] == [
        name for name in KVPRESS_FLAGS if name != "press_init_command"
    ] + ["press_init_command"]
    assert names[: len(KVPRESS_FLAGS) - 1] == [name for name in KVPRESS_FLAGS if name != "press_init_command"]


def test_every_press_of_kvpress_has_its_name_here():
    assert set(KVPRESS_PRESSES.split()) <= set(PRESS_REGISTRY)
    bare = {name for name in PRESS_REGISTRY if not name.startswith(tuple(PREFIXES.values()))}
    assert bare == {*KVPRESS_PRESSES.split(), "expected_attention_head"}
    assert PRESS_REGISTRY["no_press"] is None


def test_there_is_a_flag_for_each_field_of_our_presses():
    fields = [field for press in (MergingPress, AttentionMatchingPress) for field in dataclasses.fields(press)]
    # But for those that change nothing of what is measured.
    assert set(PRESS_FIELDS) == {field.name for field in fields if field.init} - {
        "press",
        "tile_bytes",
        "kernel",
        "record_pairs",
    }


def test_every_setting_says_all_that_is_known_of_it():
    assert set(SETTINGS) == {field.name for field in dataclasses.fields(EvaluationConfig)}
    places = [about.folder[0] for about in SETTINGS.values() if about.folder is not None]
    assert len(places) == len(set(places))
    for name in PRESS_FIELDS:
        assert default_of(name) == getattr(SETTINGS[name].press, name)
        assert FIELDS[name].default is None


def test_a_dataset_is_loaded_with_settings_that_are_for_it():
    assert set(DATASET_REGISTRY) == set(DATASETS)
    for dataset, load in DATASET_REGISTRY.items():
        for name in list(inspect.signature(load).parameters)[1:]:
            assert dataset in (SETTINGS[name].datasets or DATASETS), f"{dataset}, {name}"


def test_what_is_measured_is_told_without_defaults_and_without_how_it_is_run():
    config = EvaluationConfig(
        press_name="merging_knorm", merge_keys=False, merge_fraction=0.5, seed=7, quiet=True, device="cpu"
    )
    record = {**config.record(), "versions": {"torch": "2"}, "of_tomorrow": 1}
    assert measured_settings(record) == {
        "data_dir": "1024",
        "press_name": "merging_knorm",
        "merge_fraction": 0.5,
        "seed": 7,
        "of_tomorrow": 1,
    }


def test_flags_take_the_values_that_kvpress_takes():
    flags = (
        "--dataset ruler --data_dir 4096 --model Qwen/Qwen3-8B --press_name merging_kvzap_linear --threshold -3 "
        "--fraction 0.1 --query_aware --device cuda:0 --output_dir out --seed 7"
    )
    config = parse(flags.split())
    assert (config.dataset, config.data_dir, config.threshold, config.query_aware) == ("ruler", "4096", -3.0, True)
    assert (config.fraction, config.seed, config.device, config.output_dir) == (0.1, 7, "cuda:0", "out")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--merge_keys"], True),
        (["--merge_keys", "true"], True),
        (["--merge_keys", "false"], False),
        ([], None),
    ],
)
def test_a_press_field_that_is_true_or_false_can_be_either_or_left_alone(argv, expected):
    assert parse(["--press_name", "merging_knorm", *argv]).merge_keys is expected


@pytest.mark.parametrize(
    "text", ['{"dtype": "bfloat16", "rope_scaling": {"factor": 2}}', "{dtype: bfloat16, rope_scaling: {factor: 2}}"]
)
def test_model_kwargs_are_json_or_yaml(text):
    assert parse(["--model_kwargs", text]).model_kwargs == {"dtype": "bfloat16", "rope_scaling": {"factor": 2}}


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(
        "compression_ratio: 0.75\npress_name: merging_snapkv\nmerge_keys: true\ndata_dir: 4096\nquery_aware: false\n"
        "threshold: null\nmodel_kwargs: {attn_implementation: null, dtype: auto}\ntasks: [vt, cwe]\n"
    )
    config = parse(["--config_file", str(file), "--compression_ratio", "0.25", "--merge_keys=false"])
    assert (config.compression_ratio, config.merge_keys) == (0.25, False)  # flags
    assert (config.press_name, config.data_dir, config.tasks) == ("merging_snapkv", "4096", ["vt", "cwe"])  # file
    assert config.model_kwargs == {"attn_implementation": None, "dtype": "auto"}
    assert (config.seed, config.threshold, config.query_aware) == (42, None, False)  # defaults


@pytest.mark.parametrize(
    "config",
    [
        EvaluationConfig(press_name="merging_knorm", compression_ratio=0.75, merge_fraction=0.5, merge_keys=False),
        EvaluationConfig(
            press_name="kvzap_linear", threshold=-4.0, query_aware=True, model_kwargs={"dtype": "float16"}
        ),
        EvaluationConfig(dataset="needle_in_haystack", needle_depth=[50], max_context_length=1000, max_new_tokens=9),
        EvaluationConfig(dataset="needle_in_haystack", needle_depth=[0, 50], max_context_length=1000),
        EvaluationConfig(dataset="fidelity", data_dir="300", n_samples=4, press_name="no_press"),
        EvaluationConfig(tasks=["vt", "niah_single_1"], seed=3, fraction=0.5),
    ],
    ids=lambda config: config.folder_name(),
)
def test_a_saved_configuration_can_be_run_again(config, tmp_path):
    config.press_init_command = "KnormPress(...)"
    config.save(tmp_path / "config.yaml", {"python": "3.10"})
    again = parse(["--config_file", str(tmp_path / "config.yaml")])
    ours = {field.name for field in dataclasses.fields(EvaluationConfig)} - {"press_init_command"}
    assert {name: getattr(again, name) for name in ours} == {name: getattr(config, name) for name in ours}


def test_a_saved_configuration_says_what_kvpress_says(tmp_path):
    config = EvaluationConfig(press_name="kvzap_linear", threshold=-4.0)
    config.press_init_command = "DMSPress(...)"
    config.save(tmp_path / "config.yaml", {"kvpress": "0.5.5"})
    record = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert record["press_init_command"] == "DMSPress(...)"
    assert record["threshold"] == -4.0
    assert not {"compression_ratio", "head_compression_ratio"} & set(record)  # a threshold takes their place
    assert record["versions"] == {"kvpress": "0.5.5"}
    assert {*KVPRESS_FLAGS} - {"compression_ratio", "head_compression_ratio"} <= set(record)


QWEN = {"dataset": "ruler", "data_dir": "4096", "model": "Qwen/Qwen3-8B"}


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({**QWEN, "compression_ratio": 0.25}, "ruler__4096__Qwen--Qwen3-8B__knorm__0.25"),
        ({**QWEN, "press_name": "no_press", "compression_ratio": 0.25}, "ruler__4096__Qwen--Qwen3-8B__no_press__0.00"),
        ({**QWEN, "press_name": "kvzap_mlp", "threshold": -3}, "ruler__4096__Qwen--Qwen3-8B__kvzap_mlp__-3.00"),
        (
            {**QWEN, "press_name": "duo_attention", "head_compression_ratio": 0.75},
            "ruler__4096__Qwen--Qwen3-8B__duo_attention__0.75",
        ),
        (
            {
                **QWEN,
                "press_name": "snap_think",
                "key_channel_compression_ratio": 0.5,
                "query_aware": True,
                "max_context_length": 1000,
                "fraction": 0.1,
            },
            "ruler__4096__Qwen--Qwen3-8B__snap_think__0.50__fraction0.100__max_context1000__query_aware__key_channel_cr0.50",
        ),
        (
            {
                "dataset": "needle_in_haystack",
                "model": "a/b",
                "max_context_length": 1000,
                "needle_depth": 50,
            },
            "needle_in_haystack__a--b__knorm__0.50__max_context1000__needle_depth50",
        ),
    ],
)
def test_folders_have_the_names_that_kvpress_gives(settings, name):
    assert EvaluationConfig(**settings).folder_name() == name


@pytest.mark.parametrize(
    ("settings", "ending"),
    [
        ({}, ""),
        ({"merge_fraction": 1.0, "merge_keys": False, "max_merge_per_token": 0, "value_norm_weighting": True}, ""),
        ({"merge_fraction": 0.75, "similarity_threshold": 0.5}, "__similarity_threshold0.5__merge_fraction0.75"),
        ({"merge_keys": True, "value_norm_weighting": False}, "__merge_keys__no_value_norm_weighting"),
        ({"max_merge_per_token": 4, "max_new_tokens": 9, "seed": 7}, "__max_merge_per_token4__max_new_tokens9__seed7"),
        ({"tasks": ["vt", "cwe"], "n_samples": 5}, "__vt-cwe__n_samples5"),
        ({"model_kwargs": {"dtype": "auto", "attn_implementation": None}}, ""),
        ({"model_kwargs": {"dtype": "bfloat16"}, "fp8": True}, "__dtypebfloat16__fp8"),
    ],
)
def test_what_kvpress_does_not_know_follows_where_it_differs_from_the_default(settings, ending):
    config = EvaluationConfig(press_name="merging_knorm", **settings)
    assert config.folder_name() == f"ruler-synthetic__1024__smollm2__merging_knorm__0.50{ending}"


def test_long_names_are_cut_and_stay_apart():
    first, second = (EvaluationConfig(model="/very/long" * 30 + end).folder_name() for end in "ab")
    assert first != second
    assert len(first) < 220
    assert first.startswith("ruler-synthetic__1024__--very--long--very")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--dataset rulr", "--dataset: there is no 'rulr'; did you mean ruler?"),
        ("--press_name merging_snapk", "--press_name: there is no 'merging_snapk'; did you mean merging_snapkv"),
        ("--compression_rate 0.5", "unknown argument '--compression_rate'; did you mean --compression_ratio"),
        ("--compression_ratio half", "argument --compression_ratio/--compression-ratio: invalid float value: 'half'"),
        ("--compression_ratio 1", "--compression_ratio must be in [0, 1), got 1.0"),
        ("--fraction 0", "--fraction must be in (0, 1], got 0.0"),
        ("--n_samples 0", "--n_samples must be a positive integer, got 0"),
        ("--log_level LOUD", "--log_level: there is no 'LOUD'; valid are DEBUG, INFO, WARNING, ERROR"),
        ("--tasks niah_sinlge_1", "there is no task 'niah_sinlge_1'; did you mean niah_single_1"),
        ("--tasks qa_1", "the task qa_1 needs --squad_file"),
        ("--text_file nowhere.txt", "--text_file: there is no file 'nowhere.txt'"),
        ("--data_dir long", "--data_dir of the dataset ruler-synthetic must be a number of tokens, got 'long'"),
        (
            "--needle_depth 50",
            "--needle_depth is of no use for the dataset ruler-synthetic, only for needle_in_haystack",
        ),
        ("--dataset fidelity --query_aware", "--query_aware is of no use for the dataset fidelity, only for"),
        ("--dataset needle_in_haystack", "the dataset needle_in_haystack needs --needle_depth"),
        ("--model_kwargs [1]", "--model_kwargs must be a mapping of names to values, got [1]"),
        ("--model_kwargs {", "--model_kwargs is neither JSON nor YAML"),
        ("--config_file nowhere.yaml", "--config_file: cannot read 'nowhere.yaml': No such file"),
        ("--config_file", "argument --config_file/--config-file: expected one argument"),
    ],
)
def test_a_mistake_is_one_line_on_stderr_and_exit_status_2(argv, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse(argv.split())
    assert exit_info.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"python -m evaluation run: {message}")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("press_nme: knorm", "has an unknown setting 'press_nme'; did you mean press_name?"),
        ("compression_ratio: [0.5, 0.75]", "must be one value, got [0.5, 0.75]"),
        ("- knorm", "must hold a mapping of settings to values"),
        ("a: b: c", "is not YAML"),
        ("compression_ratio: half", "invalid float value: 'half'"),
    ],
)
def test_a_mistake_in_the_file_is_told_alike(text, message, tmp_path, capsys):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(SystemExit) as exit_info:
        parse(["--config_file", str(file)])
    assert exit_info.value.code == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("value", ["half", True, [0.5], float("nan")])
def test_a_ratio_that_is_no_number_is_told_without_a_parser_too(value):
    with pytest.raises(ValueError, match="--compression_ratio must be in"):
        EvaluationConfig(compression_ratio=value)
