# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from gguf_writer import tiny_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

from evaluation.gguf_files import convert_gguf, read_gguf_tokenizer


@pytest.fixture(params=[("llama", "smollm"), ("qwen2", "qwen2")], ids=["smollm", "qwen2"])
def converted(request, tmp_path):
    """A random model, and the folder that it became by way of GGUF."""
    model = tiny_gguf(tmp_path / "tiny.gguf", *request.param)
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "model", torch.float32)
    return model, tmp_path / "model"


def test_a_converted_model_gives_the_logits_of_the_one_that_went_into_the_gguf(converted):
    model, folder = converted
    back = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True)
    token_ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(back(token_ids).logits, model(token_ids).logits)


def test_a_converted_tokenizer_has_the_special_tokens_template_and_digits_of_the_gguf(converted):
    tokenizer = AutoTokenizer.from_pretrained(converted[1])
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
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


def test_weights_are_written_in_the_dtype_that_is_asked_for(tmp_path):
    model = tiny_gguf(tmp_path / "tiny.gguf")
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "model", torch.bfloat16)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    assert torch.equal(back.lm_head.weight, model.lm_head.weight.bfloat16())


def test_a_gguf_with_another_kind_of_tokenizer_is_refused(tmp_path):
    tiny_gguf(tmp_path / "other.gguf", pre="gemma4")
    with pytest.raises(ValueError, match=r"tokenizer of the kind \('gpt2', 'gemma4'\)"):
        read_gguf_tokenizer(tmp_path / "other.gguf")
