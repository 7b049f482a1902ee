# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from tiny import tiny_tokenizer
from tokenizers.processors import TemplateProcessing

from evaluation.text import built_in_text, cut_windows, read_text


def test_the_built_in_text_is_long_repeats_no_topic_and_is_the_same_each_time():
    text = built_in_text()
    assert len(text) > 300_000
    topics = text.split("\n\n\n")
    assert len(set(topics)) >= 0.99 * len(topics)
    assert built_in_text() == text
    assert read_text(None) == text


def test_a_text_file_is_read_as_utf_8(tmp_path):
    (tmp_path / "text.txt").write_bytes("Grüße, 世界".encode())
    assert read_text(tmp_path / "text.txt") == "Grüße, 世界"


def test_a_file_that_is_no_text_is_a_value_error_that_names_it(tmp_path):
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(ValueError, match=r"picture\.png is not UTF-8 text"):
        read_text(tmp_path / "picture.png")


def test_windows_are_consecutive_tokens_of_the_text_from_its_start_to_its_end(tokenizer):
    text = "".join(chr(33 + i % 90) for i in range(1000))
    token_ids = tokenizer(text).input_ids
    windows = cut_windows(text, tokenizer, 3, 50, 7)
    assert [window.start for window in windows] == [0, (1000 - 57) // 2, 1000 - 57]
    for window in windows:
        assert window.context_ids.tolist() == [token_ids[window.start : window.start + 50]]
        assert window.continuation_ids.tolist() == [token_ids[window.start + 50 : window.start + 57]]
        assert window.context_ids.dtype == torch.int64


def test_one_window_lies_in_the_middle(tokenizer):
    assert cut_windows("x" * 100, tokenizer, 1, 15, 5)[0].start == 40


def test_windows_that_just_fit_do_not_overlap(tokenizer):
    windows = cut_windows("x" * 100, tokenizer, 5, 15, 5)
    assert [window.start for window in windows] == [0, 20, 40, 60, 80]


def test_a_tokenizer_that_begins_each_text_with_a_token_begins_each_window_with_it(tokenizer, tmp_path):
    with_bos = tiny_tokenizer(tmp_path)
    with_bos.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", with_bos.bos_token_id)]
    )
    plain, begun = (cut_windows("abcdefgh" * 20, each, 2, 10, 3) for each in (tokenizer, with_bos))
    for before, after in zip(plain, begun):
        assert after.context_ids.shape == (1, 10)
        assert after.continuation_ids.shape == (1, 3)
        assert after.context_ids[0, 0] == with_bos.bos_token_id
        assert after.context_ids[0, 1] == tokenizer("abcdefgh" * 20).input_ids[after.start]
        assert before.context_ids[0, 0] != with_bos.bos_token_id


def test_a_text_that_is_too_short_is_a_value_error_that_says_by_how_much(tokenizer):
    with pytest.raises(ValueError, match=r"has 100 tokens, but 3 windows of 30 \+ 4 tokens need 102"):
        cut_windows("x" * 100, tokenizer, 3, 30, 4)


@pytest.mark.parametrize("lengths", [(0, 5, 5), (1, 0, 5), (1, 5, 0)])
def test_lengths_below_one_are_value_errors(tokenizer, lengths):
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        cut_windows("x" * 100, tokenizer, *lengths)
