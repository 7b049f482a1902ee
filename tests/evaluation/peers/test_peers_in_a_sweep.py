# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Peers by name, in a sweep from its file to its report."""

from __future__ import annotations

from pathlib import Path

import kvpress
import pytest
import yaml
from kvpress import attention_patch
from tiny import tiny_checkpoint

from evaluation.__main__ import main
from evaluation.evaluate_registry import PRESS_REGISTRY
from evaluation.peers import logit_bias
from evaluation.peers.grkv import GRKVPress
from evaluation.peers.kvfold import KVFoldPress
from evaluation.report.runs import PREFIXES, bare_name, is_twin, read_results
from evaluation.sweep.grid import read_grid
from kvpress_merging import PRESS_REGISTRY as OURS

pytestmark = pytest.mark.usefixtures("one_thread")

SWEEP = Path(__file__).parents[3] / "evaluation" / "sweeps" / "peers-4096.yaml"
PEERS = {"kvfold_": KVFoldPress, "grkv_": GRKVPress, "kvpress_merging_": kvpress.MergingPress}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_checkpoint(folder)
    return folder


def sweep(model: Path, folder: Path, *flags: str, **settings) -> dict[str, str]:
    """What each press's run says, but for times, without an error."""
    folder.mkdir()
    small = {"model": str(model), "data_dir": 300, "n_samples": 1, "tasks": "niah_single_1", "max_new_tokens": 2}
    (folder / "grid.yaml").write_text(yaml.safe_dump({**small, "device": "cpu", **settings}))
    with pytest.raises(SystemExit) as exit_info:
        main(["sweep", f"{folder}/grid.yaml", "--output_dir", f"{folder}/runs", "--threads", "1", "--quiet", *flags])
    assert not exit_info.value.code
    return {
        run.press_name: run.predictions.drop(columns=[name for name in run.predictions if "seconds" in name]).to_csv()
        for run in read_results(folder / "runs").runs
    }


@pytest.mark.parametrize("prefix", PEERS)
def test_a_peers_name_wraps_what_ours_of_that_name_wraps(prefix):
    names = [name for name in PRESS_REGISTRY if name.startswith(prefix)]
    assert len(names) >= 14
    assert f"{prefix}expected_attention" in names
    for name in names:
        press, ours = PRESS_REGISTRY[name], OURS["merging_" + name.removeprefix(prefix)]
        assert type(press) is PEERS[prefix]
        assert press.press == ours.press
        assert PRESS_REGISTRY[bare_name(name)] == press.press


def test_what_a_peer_cannot_wrap_has_no_such_name():
    for name in (
        *("kvfold_decoding_knorm", "grkv_decoding_knorm", "kvpress_merging_decoding_knorm"),  # not at prefill
        *("kvfold_duo_attention", "grkv_kvcompose"),  # without scores of positions
        *("kvfold_observed_attention", "grkv_finch"),  # needs another attention; rotates keys
        *("kvpress_merging_adakv_snapkv", "kvpress_merging_kvzip"),  # no ScorerPress
    ):
        assert name not in PRESS_REGISTRY, name
    assert "kvfold_adakv_snapkv" in PRESS_REGISTRY
    assert "grkv_kvzip" in PRESS_REGISTRY
    assert PRESS_REGISTRY["kvfold_kvzap_mlp"].score_map == "identity"
    assert PRESS_REGISTRY["kvfold_knorm"].score_map == "auto"


def test_peers_share_prefills_have_the_results_that_they_have_alone_and_are_compared(model, tmp_path, monkeypatch):
    # A random model has queries that no key hides from, where kvpress gives up; any key will do here.
    monkeypatch.setattr(attention_patch, "search_hyperplane", lambda queries: -queries.mean(dim=1))
    bare = {"expected_attention": "expected_attention_head", "adakv_snapkv": "adakv_snapkv", "kvzip": "kvzip"}
    presses = [prefix + name for prefix in PEERS for name in bare if prefix + name in PRESS_REGISTRY]
    presses.remove("grkv_kvzip")  # kvfold stands for what comes when a context exits
    settings = {"press_name": ["no_press", *bare.values(), *presses], "compression_ratio": 0.5}
    shared = sweep(model, tmp_path / "shared", **settings)
    assert len(set(shared.values())) == len(settings["press_name"])
    assert shared == sweep(model, tmp_path / "alone", "--share_prefill", "False", **settings)
    runs = read_results(tmp_path / "shared" / "runs").runs
    assert {run.kind for run in runs} == {"full", "bare", "kvfold", "GRKV", "kvpress merged"}
    for run in runs:
        if run.kind in PREFIXES:
            assert [other.press_name for other in runs if is_twin(run, other)] == [run.bare_name]

    # Without the bias kvfold's answers are others, and theirs alone.
    monkeypatch.setattr(logit_bias, "_add_bias", lambda mask, *_: mask)
    settings["press_name"] = ["kvfold_adakv_snapkv", "kvfold_expected_attention", "grkv_expected_attention"]
    no_bias = sweep(model, tmp_path / "no_bias", **settings)
    assert [shared[name] == no_bias[name] for name in settings["press_name"]] == [False, False, True]


def test_the_sweep_of_peers_has_each_press_in_each_wrapper_that_takes_it():
    cells = {(config.press_name, config.compression_ratio) for config in read_grid(SWEEP)}
    for name in ("expected_attention", "keydiff", "snapkv", "tova", "adakv_snapkv"):
        for prefix in ("merging_", "matching_", *PEERS):
            if prefix + name in PRESS_REGISTRY:
                inside = bare_name(prefix + name)
                assert {(each, ratio) for each in (prefix + name, inside) for ratio in (0.5, 0.75)} <= cells
    assert ("no_press", 0.0) in cells
    assert {ratio for _, ratio in cells} == {0.0, 0.5, 0.75}
    settings = {
        "model",
        "dataset",
        "data_dir",
        "seed",
        "max_new_tokens",
        "n_samples",
        "compression_ratio",
        "press_name",
    }
    assert set(yaml.safe_load(SWEEP.read_text())) <= settings
