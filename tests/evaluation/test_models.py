# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
import json
import re
import shlex

import psutil
import pytest
import torch
from gguf_writer import tiny_gguf
from tiny import tiny_checkpoint, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from evaluation import models
from evaluation import run as run_command
from evaluation.model_files import BuiltInModel
from evaluation.models import BUILT_IN_MODELS, ModelUnavailableError, load_model


def raise_(error):
    raise error


def test_a_model_in_a_folder_is_loaded_for_inference_with_its_tokenizer(tmp_path):
    saved, _ = tiny_checkpoint(tmp_path)
    model, tokenizer = load_model(str(tmp_path), device="cpu")
    assert not model.training
    assert model.dtype == torch.float32
    assert model.config.name_or_path == str(tmp_path)
    assert AutoTokenizer.from_pretrained(model.config.name_or_path).get_vocab() == tokenizer.get_vocab()
    assert torch.equal(model.lm_head.weight, saved.lm_head.weight)


def test_dtype_and_model_kwargs_reach_the_model(tmp_path):
    tiny_checkpoint(tmp_path)
    model, _ = load_model(
        str(tmp_path), device="cpu", dtype=torch.bfloat16, model_kwargs={"attn_implementation": "eager"}
    )
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"


def test_a_pickled_checkpoint_is_refused(tmp_path):
    model = tiny_model()
    model.config.save_pretrained(tmp_path)
    tiny_tokenizer(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelUnavailableError, match="weights as safetensors"):
        load_model(str(tmp_path))


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ModelUnavailableError, match=r"There is no folder.*nowhere"):
        load_model(str(tmp_path / "nowhere"))


def test_a_gguf_file_is_told_how_to_load_it_and_so_it_loads(tmp_path):
    saved = tiny_gguf(tmp_path / "tiny.gguf")
    with pytest.raises(ModelUnavailableError, match="is a file, not a folder") as error:
        load_model(str(tmp_path / "tiny.gguf"))
    flags = shlex.split(str(error.value).partition(": ")[2])
    assert flags[::2] == ["--model", "--model_kwargs"]
    (tmp_path / "tokenizer" / "tiny.gguf").write_bytes((tmp_path / "tiny.gguf").read_bytes())
    assert flags[1] == str(tmp_path)
    model, _ = load_model(str(tmp_path / "tokenizer"), device="cpu", model_kwargs=json.loads(flags[3]))
    assert torch.equal(model.lm_head.weight, saved.lm_head.weight)


def test_when_the_hub_is_out_of_reach_the_error_is_two_sentences_and_not_a_page(monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("We couldn't connect to 'https://huggingface.co'.\nCheckout your internet connection ...")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", unreachable)
    with pytest.raises(ModelUnavailableError) as error:
        load_model("someone/some-model")
    message = str(error.value)
    assert "'someone/some-model'" in message
    assert "We couldn't connect" in message
    assert "Checkout your" not in message
    assert message.endswith("the built-in models are smollm2, qwen2.5-coder-0.5b, qwen2.5-coder-1.5b.")


@pytest.mark.parametrize(
    ("name", "meant"),
    [("qwen2.5-coder-0.5", "qwen2.5-coder-0.5b"), ("SmolLM", "smollm2"), ("Qwen2.5-Coder-1.5B", "qwen2.5-coder-1.5b")],
)
def test_an_unknown_name_gives_the_closest_built_in_ones(name, meant, monkeypatch, capsys):
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *args, **kwargs: raise_(OSError("not on the hub.")))
    with pytest.raises(SystemExit) as exit_info:
        run_command.main(["--model", name])
    assert exit_info.value.code == 2
    assert re.search(
        rf"Could not load the model '{name}': not on the hub\..*; did you mean {meant}", capsys.readouterr().err
    )


# The dtype


@pytest.fixture
def built_in(monkeypatch, tmp_path):
    """Makes built-in models: a tiny one in a dtype, and whether this CPU's products in bfloat16 are the faster ones."""

    def make(stored, is_bfloat16_faster):
        tiny_checkpoint(tmp_path)
        AutoModelForCausalLM.from_pretrained(tmp_path, dtype=stored).save_pretrained(tmp_path)
        model = BuiltInModel("Tiny", (), (), 0, "", "", stored)
        monkeypatch.setitem(BUILT_IN_MODELS, "tiny", model)
        monkeypatch.setattr(models, "built_in_model_folder", lambda name: tmp_path)
        monkeypatch.setattr(models, "_is_bfloat16_faster", lambda: is_bfloat16_faster)

    return make


@pytest.mark.parametrize(
    ("stored", "is_bfloat16_faster", "expected"),
    [
        (torch.bfloat16, True, torch.bfloat16),
        (torch.bfloat16, False, torch.float32),
        (torch.float32, True, torch.float32),
        (torch.float32, False, torch.float32),
    ],
)
def test_a_built_in_model_takes_the_faster_dtype_unless_it_is_stored_in_float32(
    stored, is_bfloat16_faster, expected, built_in
):
    built_in(stored, is_bfloat16_faster)
    assert load_model("tiny", device="cpu")[0].dtype == expected


def test_on_a_gpu_a_model_in_bfloat16_stays_so(monkeypatch):
    monkeypatch.setattr(models, "_is_bfloat16_faster", lambda: False)
    assert models._fastest_dtype(torch.bfloat16, torch.device("cuda")) == torch.bfloat16


@pytest.mark.parametrize("given", ["float32", "bfloat16"])
def test_the_dtype_in_model_kwargs_wins_over_the_trial(given, built_in):
    built_in(torch.bfloat16, given == "float32")
    model, _ = load_model("tiny", device="cpu", model_kwargs={"dtype": given})
    assert model.dtype == getattr(torch, given)


def test_a_folders_dtype_is_its_own_however_fast_it_is(built_in, tmp_path):
    built_in(torch.bfloat16, False)
    assert load_model(str(tmp_path), device="cpu")[0].dtype == torch.bfloat16


def test_the_trial_takes_the_dtype_whose_products_took_less_time(monkeypatch):
    for slow in (torch.float32, torch.bfloat16):
        clock = [0.0]
        monkeypatch.setattr(models.time, "perf_counter", lambda clock=clock: clock[0])

        def multiply(left, right, slow=slow, clock=clock):
            clock[0] += 2.0 if left.dtype == slow else 1.0

        monkeypatch.setattr(torch.Tensor, "__matmul__", multiply)
        assert models._is_bfloat16_faster.__wrapped__() == (slow == torch.float32)


# Memory


@pytest.mark.parametrize(("dtype", "itemsize"), [("auto", 4), (torch.float32, 4), ("bfloat16", 2)])
@pytest.mark.parametrize("max_shard_size", ["1GB", "50KB"])
def test_a_model_that_does_not_fit_is_told_before_it_is_loaded(dtype, itemsize, max_shard_size, tmp_path, monkeypatch):
    model, _ = tiny_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    needed = sum(weight.numel() for weight in model.parameters()) * itemsize
    header = 10_000

    class Memory:
        available = needed - 1

    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory)
    with monkeypatch.context() as patch:
        patch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: pytest.fail("it was loaded"))
        with pytest.raises(
            ModelUnavailableError, match=rf"do not fit the memory of cpu: .* and {needed - 1:,} are free"
        ):
            load_model(str(tmp_path), device="cpu", dtype=dtype)
    Memory.available = needed + header
    load_model(str(tmp_path), device="cpu", dtype=dtype)


def test_a_model_that_does_not_fit_ends_with_status_2(tmp_path, monkeypatch, capsys):
    tiny_checkpoint(tmp_path)
    monkeypatch.setattr(models, "_free_bytes", lambda device: 5)
    with pytest.raises(SystemExit) as exit_info:
        run_command.main(["--model", str(tmp_path), "--device", "cpu"])
    assert exit_info.value.code == 2
    assert "and 5 are free" in capsys.readouterr().err
