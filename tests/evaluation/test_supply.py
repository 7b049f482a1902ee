# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Nothing that is read can run code, and nothing that is there is written over."""

from __future__ import annotations

import ast
import json
import os
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_checkpoint, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from evaluation import models, speed
from evaluation import run as run_command
from evaluation.config import EvaluationConfig
from evaluation.evaluate import load
from evaluation.files import write_folder
from evaluation.models import ModelUnavailableError, load_model
from evaluation.report.runs import read_run
from evaluation.results import find_results
from evaluation.sweep import _write_copy
from evaluation.sweep.grid import read_grid

ROOT = Path(__file__).parents[2]
SOURCES = sorted(file for folder in ("src", "evaluation") for file in (ROOT / folder).rglob("*.py"))
# What would run code that comes with data. `compile` of a string is among them; `re.compile` and a module's are not.
RUNS_DATA = {"eval", "exec", "compile", "__import__", "execfile"}
READS_PICKLES = {
    ("torch", "load"),
    ("torch", "jit"),
    ("yaml", "load"),
    ("yaml", "unsafe_load"),
    ("yaml", "full_load"),
    ("pd", "read_pickle"),
}
PICKLE_MODULES = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}


class Trap:
    """Leaves a file behind if anybody unpickles it."""

    def __init__(self, file: Path):
        self.file = str(file)

    def __reduce__(self):
        return os.mkdir, (self.file,)


@pytest.fixture
def trap(tmp_path):
    return tmp_path / "sprung"


def test_the_trap_springs_where_a_pickle_is_read(trap, tmp_path):
    torch.save({"weight": Trap(trap)}, tmp_path / "model.bin")
    torch.load(tmp_path / "model.bin", weights_only=False)
    assert trap.exists()


# Models


def save_pickled(folder: Path, model, name: str, trap: Path) -> None:
    torch.save({**model.state_dict(), "trap": Trap(trap)}, folder / name)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00001.bin", "model.pt", "model.ckpt"])
def test_a_folder_with_nothing_but_a_pickle_is_refused_and_told_why(name, trap, tmp_path):
    model, _ = tiny_checkpoint(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    save_pickled(tmp_path / "model", model, name, trap)
    if "-of-" in name:
        index = {"metadata": {}, "weight_map": dict.fromkeys(model.state_dict(), name)}
        (tmp_path / "model" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelUnavailableError, match=r"Could not load the model.*must hold.*weights as safetensors"):
        load_model(str(tmp_path / "model"), device="cpu")
    assert not trap.exists()


def test_a_pickle_beside_safetensors_is_left_unread(trap, tmp_path):
    saved, _ = tiny_checkpoint(tmp_path / "model")
    save_pickled(tmp_path / "model", tiny_model(seed=1), "pytorch_model.bin", trap)
    model, _ = load_model(str(tmp_path / "model"), device="cpu")
    assert torch.equal(model.lm_head.weight, saved.lm_head.weight)
    assert not trap.exists()


@pytest.mark.parametrize("is_pickled", [False, True])
def test_an_adapter_is_read_from_safetensors_only(is_pickled, trap, tmp_path):
    base, tokenizer = tiny_checkpoint(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    if not is_pickled:
        model, _ = load_model(str(tmp_path / "adapter"), device="cpu")
        token_ids = torch.arange(3, 20)[None]
        with torch.no_grad():
            torch.testing.assert_close(model(token_ids).logits, adapted(token_ids).logits)
        return
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    torch.save({"trap": Trap(trap)}, tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(ModelUnavailableError, match=r"no adapter_model\.safetensors, and pickled weights are not read"):
        load_model(str(tmp_path / "adapter"), device="cpu")
    assert not trap.exists()


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [("use_safetensors", False, "a pickle can run code"), ("trust_remote_code", True, "it has a flag of its own")],
)
def test_model_kwargs_cannot_undo_it(name, value, reason, tmp_path, capsys):
    tiny_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=rf"^model_kwargs cannot set {name}: .*{reason}"):
        load_model(str(tmp_path), device="cpu", model_kwargs={name: value})
    with pytest.raises(SystemExit) as exit_info:
        run_command.main(["--model", str(tmp_path), "--model_kwargs", json.dumps({name: value})])
    assert exit_info.value.code == 2
    assert f"--model_kwargs cannot set {name}" in capsys.readouterr().err


@pytest.mark.parametrize("is_asked_for", [False, True])
def test_remote_code_is_trusted_only_if_asked_for(is_asked_for, tmp_path, monkeypatch):
    tiny_checkpoint(tmp_path)
    trusted = []
    for loader in (AutoTokenizer, AutoModelForCausalLM):

        def watched(*args, original=loader.from_pretrained, **kwargs):
            trusted.append(kwargs["trust_remote_code"])
            return original(*args, **kwargs)

        monkeypatch.setattr(loader, "from_pretrained", watched)
    asked = {"trust_remote_code": True} if is_asked_for else {}
    load(EvaluationConfig(model=str(tmp_path), device="cpu", **asked))
    load_model(str(tmp_path), device="cpu", **asked)
    assert trusted == [is_asked_for] * 4


def test_code_that_comes_with_a_model_is_not_run(trap, tmp_path):
    tiny_checkpoint(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config |= {"model_type": "of_its_own", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.M"}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model" / "code.py").write_text(f"import os\nos.mkdir({str(trap)!r})\n")
    with pytest.raises((ModelUnavailableError, ValueError)):
        load_model(str(tmp_path / "model"), device="cpu")
    assert not trap.exists()


# Data


def calls(tree: ast.AST) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_no_source_evaluates_or_unpickles_data_or_trusts_remote_code(file):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for call in calls(tree):
        if isinstance(call.func, ast.Name):
            assert call.func.id not in RUNS_DATA, f"line {call.lineno}"
        elif isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name):
            assert (call.func.value.id, call.func.attr) not in READS_PICKLES, f"line {call.lineno}"
        for keyword in call.keywords:
            if keyword.arg == "trust_remote_code":  # never a constant: always what the user said
                assert not isinstance(keyword.value, ast.Constant), f"line {call.lineno}"
            assert keyword.arg != "shell", f"line {call.lineno}"
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not PICKLE_MODULES.intersection(name.split(".")[0] for name in names)


def hostile_yaml(trap: Path) -> str:
    return f"press_name: !!python/object/apply:os.mkdir [{str(trap)!r}]\n"


def test_yaml_that_would_run_code_is_refused(trap, tmp_path):
    file = tmp_path / "hostile.yaml"
    file.write_text(hostile_yaml(trap))
    with pytest.raises(SystemExit):
        run_command.main(["--config_file", str(file)])
    with pytest.raises(ValueError, match="hostile"):
        read_grid(file, None)
    assert not trap.exists()


def test_results_that_would_run_code_are_read_as_text(trap, tmp_path):
    config = EvaluationConfig(press_name="knorm", compression_ratio=0.5, output_dir=str(tmp_path / "results"))
    config.press_init_command = f"MergingPress(press=__import__('os').mkdir({str(trap)!r}))"
    folder = tmp_path / "results" / config.folder_name()
    folder.mkdir(parents=True)
    config.save(folder / "config.yaml", {})
    (folder / "predictions.csv").write_text("sample,task,answer,score\n0,a,__import__('os'),1.0\n")
    (folder / "metrics.json").write_text('{"a": {"score": 1.0}}')
    run = read_run(folder)
    assert "__import__" in run.config["press_init_command"]
    assert "__import__" in run.predictions["answer"].iloc[0]
    (folder / "config.yaml").write_text(hostile_yaml(trap))
    assert find_results(config) is None
    with pytest.raises(ValueError):
        read_run(folder)
    assert not trap.exists()


# Output folders


def test_a_new_folder_appears_whole_and_beside_what_is_there(tmp_path):
    def write(place: Path) -> None:
        (place / "figure").write_text("new")

    (tmp_path / "deeper" / "out" / "2").mkdir(parents=True)
    (tmp_path / "deeper" / "out" / "2" / "mine").touch()
    assert write_folder(tmp_path / "deeper" / "out", write) == tmp_path / "deeper" / "out" / "1"
    (tmp_path / "empty").mkdir()
    assert write_folder(tmp_path / "empty", write) == tmp_path / "empty"
    folders = [write_folder(tmp_path / "new" / "out", write) for _ in range(3)]
    assert [folder.relative_to(tmp_path / "new").as_posix() for folder in folders] == ["out", "out/1", "out/2"]
    assert all((folder / "figure").read_text() == "new" for folder in folders)


def test_a_folder_that_cannot_be_written_leaves_nothing_behind(tmp_path):
    def write(place: Path) -> None:
        (place / "half").write_text("half")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        write_folder(tmp_path / "out", write)
    assert list(tmp_path.iterdir()) == []


def filled(folder: Path, *names: str) -> dict[str, bytes]:
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_text("mine")
    return dict.fromkeys(names, b"mine")


def assert_kept(folder: Path, before: dict[str, bytes]) -> None:
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert {place.name for place in folder.iterdir() if place.is_file()} == set(before)


def test_the_benchmark_writes_beside_what_is_there(tmp_path, monkeypatch, capsys):
    before = filled(tmp_path / "out", "speed.json", "speed.png")
    monkeypatch.setattr(speed, "measure_extra_bytes", lambda *args: 1)
    grid = ["--k_len", "64", "--num_key_value_heads", "1", "--dtype", "float32", "--head_dim", "16", "--repeats", "1"]
    speed.main([*grid, "--output_dir", str(tmp_path / "out")])
    assert_kept(tmp_path / "out", before)
    assert {file.name for file in (tmp_path / "out" / "1").iterdir()} == {"speed.json", "speed.png"}
    assert str(tmp_path / "out" / "1") in capsys.readouterr().out


def test_a_sweep_keeps_the_files_of_earlier_ones(tmp_path):
    for text in ("one", "one", "two", "three", "three"):
        _write_copy(tmp_path / "sweep.yaml", text)
    kept = {file.name: file.read_text() for file in tmp_path.iterdir()}
    assert kept == {"sweep.yaml": "three", "sweep-1.yaml": "one", "sweep-2.yaml": "two"}


def test_where_models_are_kept_is_the_users_to_say(tmp_path, monkeypatch):
    monkeypatch.setenv("KVPRESS_MERGING_CACHE", str(tmp_path))
    assert models.cache_folder() == tmp_path
