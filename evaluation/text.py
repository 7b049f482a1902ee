# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Long real text to measure on: one that every Python carries, or the user's own, cut into windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from transformers import PreTrainedTokenizerBase

Piece = TypeVar("Piece")


@dataclass(frozen=True)
class Window:
    """
    A stretch of a text: a context to prefill, and the tokens that truly follow it.

    Token ids, int64, shapes ``(1, context_length)`` and ``(1, continuation_length)``. A context begins with the
    tokenizer's begin-of-sequence token if it puts one before each text; ``start`` is where in the text, in tokens.
    """

    context_ids: torch.Tensor
    continuation_ids: torch.Tensor
    start: int


def built_in_text() -> str:
    """
    The Python reference manual's topics, as ``help()`` shows them: about 465,000 characters of technical prose.

    It comes with Python's standard library, so it needs no download. Its words differ a little between Python versions.
    """
    # A late import: half a megabyte of strings that a user's own text does without.
    from pydoc_data.topics import topics

    # Some topics are filed under several names.
    return "\n\n\n".join(dict.fromkeys(topics[name].strip() for name in sorted(topics)))


def read_text(text_file: str | Path | None = None) -> str:
    """The user's text, or the built-in one if no file is given; a ValueError if that is no UTF-8 text."""
    if text_file is None:
        return built_in_text()
    try:
        return Path(text_file).expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{text_file} is not UTF-8 text: {error}") from error


def insert(pieces: Sequence[Piece], needles: Sequence[Sequence[Piece]], places: Sequence[int]) -> list[Piece]:
    """Hide needles in a haystack: the pieces (words or token ids), with each needle before the one at its place."""
    parts = list(pieces)
    # From the back, so that what comes before stays where it is; needles at one place keep their order.
    for i in sorted(range(len(needles)), key=lambda i: places[i])[::-1]:
        parts[places[i] : places[i]] = needles[i]
    return parts


def cut_windows(
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    n_windows: int,
    context_length: int,
    continuation_length: int,
) -> list[Window]:
    """
    Cut windows out of a text, spread evenly from its first token to its last, none overlapping another.

    The same text, tokenizer and lengths (in tokens) give the same windows, in the order of the text.

    A ValueError says if a length is not positive, or the text is too short.
    """
    lengths = {"context_length": context_length, "continuation_length": continuation_length}
    for name, value in {"n_windows": n_windows, **lengths}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    # verbose=False: the whole text is longer than the model's context, its windows are not.
    token_ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    prefix = [index for index in tokenizer("").input_ids if index == tokenizer.bos_token_id]
    n_read = context_length - len(prefix) + continuation_length
    if n_windows * n_read > len(token_ids):
        raise ValueError(
            f"the text has {len(token_ids)} tokens, but {n_windows} windows of "
            f"{context_length} + {continuation_length} tokens need {n_windows * n_read}"
        )
    last_start = len(token_ids) - n_read
    starts = [last_start // 2] if n_windows == 1 else [last_start * i // (n_windows - 1) for i in range(n_windows)]
    windows = []
    for start in starts:
        token_window = torch.tensor([prefix + token_ids[start : start + n_read]])
        windows.append(Window(token_window[:, :context_length], token_window[:, context_length:], start))
    return windows
