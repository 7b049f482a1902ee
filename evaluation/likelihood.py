# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""
How likely a model finds reference answers over a compressed cache.

An answer that is generated is right or wrong; how likely the right one was tells presses apart with fewer samples.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from evaluation.benchmarks.fidelity.compressed_cache import read_continuation

METRICS = ("answer_nll", "answer_kl")
"""What is measured of a sample with reference answers: see the functions of the same names."""

# Where a dataset has its reference answers: a string, or a list of them.
_REFERENCE_COLUMNS = ("answer", "answers", "needle")


@dataclass(frozen=True)
class ReadAnswer:
    """
    A reference answer as it was read over a cache.

    Parameters
    ----------
    token_ids : torch.Tensor
        The answer's tokens, int64, shape ``(n_tokens,)``.
    log_probs : torch.Tensor
        Of every token of the vocabulary at each of those places, float32, shape ``(n_tokens, vocab_size)``.
    """

    token_ids: torch.Tensor
    log_probs: torch.Tensor


def answer_nll(readings: Sequence[ReadAnswer]) -> float:
    """
    How unlikely the reference answers are: nats per token.

    The mean over an answer's tokens of the negative log-likelihood of each, given the context, the question, the answer
    prefix and the tokens before. Where there are several references (the values of a key, the variables of a chain,
    other spellings), the mean over them, each asked alone after the prefix: so of several values that are all to be
    named, each competes with the others for the first place. NaN where there is none.
    """
    means = [-reading.log_probs.gather(1, reading.token_ids[:, None]).double().mean() for reading in readings]
    return float(torch.stack(means).mean()) if means else float("nan")


def answer_kl(full: Sequence[ReadAnswer], readings: Sequence[ReadAnswer]) -> float:
    """
    How far what the model expects at the reference answers' tokens is from what it expects with the full cache: nats.

    The mean over an answer's tokens of ``KL(full || compressed) = sum_v p_full(v) (log p_full(v) - log p(v))``, and the
    mean over references as in ``answer_nll``. ``full`` are the same answers to the same question, read over the full
    cache. NaN where there is none.
    """
    means = []
    for reference, reading in zip(full, readings, strict=True):
        difference = reference.log_probs - reading.log_probs
        means.append((reference.log_probs.exp() * difference).sum(dim=1).double().mean())
    return float(torch.stack(means).mean()) if means else float("nan")


def read_answers(
    model: PreTrainedModel, cache: Cache, question_ids: torch.Tensor, references: Sequence[torch.Tensor], start: int
) -> list[ReadAnswer]:
    """
    Read each reference answer after a question, over a cache that is left as it was.

    One answer is read with its question in one forward pass; of several, the question is read once for all.

    What a press masked stays hidden (``module.masked_key_indices``), and the masks and the keys behind them are as
    before too.

    Parameters
    ----------
    model : PreTrainedModel
        The one that filled the cache, outside of the press's context.
    cache : Cache
        The context's, compressed or not.
    question_ids : torch.Tensor
        The question and how the answer begins, int64, shape ``(1, n_tokens)``.
    references : sequence of torch.Tensor
        Token ids of each answer, int64, shape ``(n_tokens,)``; none empty.
    start : int
        Position of the question's first token.

    Returns
    -------
    list of ReadAnswer
        One for each reference, on the model's device.
    """
    if len(references) <= 1:
        return [_read_answer(model, cache, question_ids, reference, start) for reference in references]
    # Its last token is read with each, since it tells what comes first.
    start_of_answer = start + question_ids.shape[1] - 1
    with left_as_it_was(cache), torch.no_grad():
        if question_ids.shape[1] > 1:
            read_continuation(model, question_ids[:, :-1], cache, start, logits_to_keep=1)
        return [
            _read_answer(model, cache, question_ids[:, -1:], reference, start_of_answer) for reference in references
        ]


def _read_answer(
    model: PreTrainedModel, cache: Cache, question_ids: torch.Tensor, reference: torch.Tensor, start: int
) -> ReadAnswer:
    token_ids = reference.to(question_ids.device)
    text_ids = torch.cat([question_ids[0], token_ids])[None]
    with left_as_it_was(cache), torch.no_grad():
        logits = read_continuation(model, text_ids, cache, start, logits_to_keep=len(token_ids) + 1)
    # The last place tells what follows the answer.
    log_probs = torch.log_softmax(logits[0, :-1].float(), dim=-1)
    return ReadAnswer(token_ids.to(log_probs.device), log_probs)


def encode_references(
    tokenizer: PreTrainedTokenizerBase, question_ids: torch.Tensor, references: Sequence[str]
) -> list[torch.Tensor]:
    """
    Tokens of reference answers as they follow a question, empty answers left out.

    A space parts an answer from what it follows unless white space does already; it belongs to the answer, as it would
    if the model gave the answer.
    """
    ends_in_space = str(tokenizer.decode(question_ids[0, -1:]))[-1:].isspace()
    # Some tokenizers put a space of their own before a text: it would be a second one within an answer.
    before, space = ("\n", "") if ends_in_space else ("a", " ")
    n_before = len(tokenizer.encode(before, add_special_tokens=False))
    texts = [before + space + text.strip() for text in references if text.strip()]
    return [torch.tensor(tokenizer.encode(text, add_special_tokens=False)[n_before:]) for text in texts]


def references_of(samples: pd.DataFrame) -> list[list[str]]:
    """The reference answers of each sample, from the column ``answer``, ``answers`` or ``needle``; else none."""
    name = next((name for name in _REFERENCE_COLUMNS if name in samples), None)
    cells = samples[name] if name else [[]] * len(samples)
    return [[cell] if isinstance(cell, str) else list(cell) for cell in cells]


@contextlib.contextmanager
def left_as_it_was(cache: Cache) -> Iterator[None]:
    """
    Take back what is added to a cache.

    A dynamic layer, quantized or not, grows by new tensors in place of its old ones, which are as they were.
    """
    before = [dict(vars(layer)) for layer in cache.layers]
    try:
        yield
    finally:
        for layer, attributes in zip(cache.layers, before):
            vars(layer).clear()
            vars(layer).update(attributes)
