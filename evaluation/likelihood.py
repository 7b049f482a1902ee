# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""
How likely a model finds reference answers over a compressed cache.

An answer that is generated is right or wrong; how likely the right one was tells presses apart with fewer samples.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from kvpress import BasePress, DecodingPress, DMSPress, KVPressTextGenerationPipeline, PrefillDecodingPress
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from evaluation.benchmarks.fidelity.compressed_cache import read_continuation, synchronize

METRICS = ("answer_nll", "answer_kl")
"""What is measured of a sample with reference answers: see the functions of the same names."""

# Where a dataset has its reference answers: a string, or a list of them.
_REFERENCE_COLUMNS = ("answer", "answers", "needle")


@dataclass(frozen=True)
class Reading:
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


def answer_nll(readings: Sequence[Reading]) -> float:
    """
    How unlikely the reference answers are: nats per token.

    The mean over an answer's tokens of the negative log-likelihood of each, given the context, the question, the answer
    prefix and the tokens before. Where there are several references (the values of a key, the variables of a chain,
    other spellings), the mean over them, each asked alone after the prefix: so of several values that are all to be
    named, each competes with the others for the first place. NaN where there is none.
    """
    means = [-reading.log_probs.gather(1, reading.token_ids[:, None]).double().mean() for reading in readings]
    return float(torch.stack(means).mean()) if means else float("nan")


def answer_kl(full: Sequence[Reading], readings: Sequence[Reading]) -> float:
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
) -> list[Reading]:
    """
    Read each reference answer after a question, in one forward pass over a cache that is left as it was.

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
    list of Reading
        One for each reference, on the model's device.
    """
    readings = []
    for reference in references:
        token_ids = reference.to(question_ids.device)
        text_ids = torch.cat([question_ids[0], token_ids])[None]
        with _left_as_it_was(cache), torch.no_grad():
            logits = read_continuation(model, text_ids, cache, start, logits_to_keep=len(token_ids) + 1)
        # The last place tells what follows the answer.
        log_probs = torch.log_softmax(logits[0, :-1].float(), dim=-1)
        readings.append(Reading(token_ids.to(log_probs.device), log_probs))
    return readings


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


def evicts_while_decoding(press: BasePress | None) -> bool:
    """Whether a press is at work as an answer is generated: reading one in one pass is then something else."""
    return isinstance(press, (DecodingPress, PrefillDecodingPress)) or (isinstance(press, DMSPress) and press.decoding)


class LikelihoodPipeline(KVPressTextGenerationPipeline):
    """kvpress's pipeline, which also reads reference answers over the cache, before it generates one."""

    def ask(
        self,
        context: str,
        answer_prefixes: Sequence[str | None],
        references: Sequence[Sequence[str]],
        *,
        max_new_tokens: int,
        **kwargs: Any,
    ) -> tuple[list[str], list[list[Reading]], float]:
        """
        Ask questions about one context, over one prefill.

        Parameters
        ----------
        context : str
            What is prefilled.
        answer_prefixes, references : sequence
            How the answer to each question begins, and its reference answers.
        max_new_tokens : int
            Longest answer, in tokens; with 0 none is generated.
        **kwargs
            ``questions`` and whatever else the pipeline takes. A ``press`` that evicts while it decodes has no
            readings.

        Returns
        -------
        tuple[list[str], list[list[Reading]], float]
            What the model answered, the readings, both one for each question, and the seconds that these took.
        """
        self._answer_prefixes = answer_prefixes
        is_read = not evicts_while_decoding(kwargs.get("press"))
        self._references = iter(references if is_read else [[]] * len(references))
        self._readings: list[list[Reading]] = []
        self._seconds = 0.0
        answers = self(context, max_new_tokens=max_new_tokens, **kwargs)["answers"]
        return answers, self._readings, self._seconds

    def preprocess(self, context: str, questions: list[str], **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """See the pipeline: tokens of the context, and of each question with its own answer prefix."""
        encoded = [
            super(LikelihoodPipeline, self).preprocess(context, [question], **{**kwargs, "answer_prefix": prefix or ""})
            for question, prefix in zip(questions, self._answer_prefixes, strict=True)
        ]
        return {**encoded[0], "questions_ids": [ids for of_question in encoded for ids in of_question["questions_ids"]]}

    def generate_answer(
        self, question_ids: torch.Tensor, cache: Cache, context_length: int, max_new_tokens: int
    ) -> str:
        """See the pipeline: called for one question after the other, over the compressed cache."""
        synchronize(self.model.device)
        started = time.perf_counter()
        tokenizer: Any = self.tokenizer
        references = encode_references(tokenizer, question_ids, next(self._references))
        self._readings.append(read_answers(self.model, cache, question_ids, references, context_length))
        synchronize(self.model.device)
        self._seconds += time.perf_counter() - started
        if max_new_tokens == 0:
            return ""
        return super().generate_answer(question_ids, cache, context_length, max_new_tokens)


@contextlib.contextmanager
def _left_as_it_was(cache: Cache) -> Iterator[None]:
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
