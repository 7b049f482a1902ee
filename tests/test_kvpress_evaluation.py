# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""kvpress's own evaluate.py takes our registry."""

import json
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import pytest
import yaml
from filelock import FileLock
from tiny import tiny_checkpoint

pytest.importorskip("gguf", reason="needs gguf, of the extra 'eval'")
from evaluation.models import cache_folder
from kvpress_merging.registry import PREFILL_PRESSES

CONFIGURATIONS = [
    {"press_name": "merging_knorm", "compression_ratio": 0.5},
    {"press_name": "merging_adakv_snapkv", "compression_ratio": 0.5},
    {"press_name": "merging_dms_knorm", "threshold": -6.4},
    {"press_name": "merging_duo_attention", "head_compression_ratio": 0.5},
    {"press_name": "merging_kvzip", "compression_ratio": 0.5},
    {"press_name": "merging_kvcompose_unstructured", "compression_ratio": 0.5},
    {"press_name": "merging_snap_think", "compression_ratio": 0.5, "key_channel_compression_ratio": 0.25},
    {"press_name": "merging_finch", "compression_ratio": 0.5, "query_aware": True},
    {
        "press_name": "merging_observed_attention",
        "compression_ratio": 0.5,
        "model_kwargs": {"attn_implementation": "eager"},
    },
]
# Presses of its registry that have no merged twin: they do not evict positions at prefill, or merge already.
WITHOUT_TWIN = ("no_press", "think", "cam_", "decoding_", "merging_")


@pytest.fixture(scope="module")
def kvpress_source() -> Path:
    """kvpress's source distribution, which holds its evaluation; the wheel does not."""
    folder = cache_folder() / f"kvpress-{version('kvpress')}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "evaluation" / "evaluate.py").exists():
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "kvpress"]
            fetched = subprocess.run(
                [*command, "-d", str(folder.parent), f"kvpress=={version('kvpress')}"], capture_output=True, text=True
            )
            if fetched.returncode:
                pytest.skip(f"kvpress's source distribution is out of reach: {fetched.stderr[-300:]}")
            shutil.unpack_archive(f"{folder}.tar.gz", folder.parent)
    return folder


@pytest.fixture(scope="module")
def printed(kvpress_source, tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("evaluation")
    tiny_checkpoint(folder / "model", head_dim=64, pad_token_id=0)
    script = Path(__file__).with_name("kvpress_evaluation.py")
    folders = [kvpress_source / "evaluation", folder / "model", folder / "results"]
    done = subprocess.run(
        [sys.executable, str(script), *map(str, folders), json.dumps(CONFIGURATIONS)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_every_prefill_press_of_its_registry_has_a_merged_twin_with_the_same_settings(printed):
    theirs, ours = printed[0]["theirs"], printed[0]["ours"]
    with_twin = {name for name in theirs if not name.startswith(WITHOUT_TWIN)}
    assert with_twin == set(PREFILL_PRESSES)
    renamed = {"expected_attention": "adakv_expected_attention", "kvzap_mlp": "dms_kvzap_mlp"}
    for name in with_twin:
        assert ours[f"merging_{renamed.get(name, name)}"] == theirs[name]
    for name in ("merging_knorm", "merging_snapkv", "merging_expected_attention", "merging_kvzap_mlp"):
        assert ours[name] == theirs[name]["press"]


def test_its_evaluation_runs_with_our_registry(printed):
    lines = printed[1:]
    assert [line["press"] for line in lines] == ["MergingPress"] * len(CONFIGURATIONS)
    assert [line["inner"] for line in lines][:3] == ["KnormPress", "AdaKVPress", "DMSPress"]
    assert lines[2]["threshold"] == -6.4
    assert lines[3]["head_compression_ratio"] == 0.5
    assert all(line["merged"] > 0 for line in lines)
    for configuration, line in zip(CONFIGURATIONS, lines):
        folder = Path(line["folder"])
        config = yaml.safe_load((folder / "config.yaml").read_text())
        assert config["press_init_command"].startswith("MergingPress(press=")
        predictions = pd.read_csv(folder / "predictions.csv")
        assert len(predictions) == 2
        if "compression_ratio" in configuration:
            assert predictions["compression_ratio"].between(0.4, 0.6).all()
        else:
            assert (predictions["compression_ratio"] > 0).all()
