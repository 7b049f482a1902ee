# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Questions about contexts, answered from compressed caches as kvpress's pipeline answers them."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import pandas as pd
import torch
from kvpress import KVPressTextGenerationPipeline
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evaluation.config import EvaluationConfig
from evaluation.likelihood import (
    ReadAnswer,
    answer_kl,
    answer_nll,
    encode_references,
    left_as_it_was,
    read_answers,
    references_of,
)
from evaluation.prefill import Prefilled, acts_while_decoding, masks_of, synchronize


class Questions:
    """
    Samples of questions as a reading: those that share context and length of an answer are one context.

    Parameters
    ----------
    model : PreTrainedModel
        The model.
    tokenizer : PreTrainedTokenizerBase
        The model's, or a press's own.
    samples : pd.DataFrame
        Columns ``context``, ``question``, ``answer_prefix`` and ``max_new_tokens``, and others.
    config : EvaluationConfig
        ``query_aware`` puts questions into the contexts; lengths of contexts and answers may be set.
    delimiter : str
        What a press needs between context and question.
    one_by_one : bool
        Whether each question is asked over a context of its own: presses that evict while decoding spoil it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        samples: pd.DataFrame,
        config: EvaluationConfig,
        *,
        delimiter: str = "",
        one_by_one: bool = False,
    ):
        # A model on several devices has been put there already.
        device = None if hasattr(model, "hf_device_map") else model.device
        # Its arguments are not typed.
        kwargs: dict[str, Any] = {"model": model, "tokenizer": tokenizer, "device": device}
        self._pipeline = KVPressTextGenerationPipeline(**kwargs)
        self._config = config
        self._encoded: tuple[pd.DataFrame, torch.Tensor, list[torch.Tensor]] | None = None
        samples = samples.copy()
        samples["context"] += delimiter
        if config.query_aware:
            samples["context"] += samples["question"]
            samples["question"] = ""
        by = ["sample"] if one_by_one else ["context", "max_new_tokens"]
        self.contexts = [group for _, group in samples.groupby(by, sort=False, dropna=False)]
        self.samples = samples.drop(columns="context")

    def input_ids(self, context: pd.DataFrame) -> torch.Tensor:
        """What is prefilled of a context, of shape ``(1, context_length)``."""
        return self._encode(context)[0]

    def read_full_cache(self, context: pd.DataFrame, prefilled: Prefilled) -> list[list[ReadAnswer]]:
        """Read the reference answers of each of a context's questions over the full cache, for ``answer_kl``."""
        return self._read(context, prefilled)

    @torch.no_grad()
    def measure(
        self, context: pd.DataFrame, prefilled: Prefilled, full: list[list[ReadAnswer]] | None = None
    ) -> list[dict[str, Any]]:
        """
        Answer a context's questions in turn, each from the cache as the press left it.

        Returns
        -------
        list of dict
            For each question ``predicted_answer``, but with 0 new tokens; ``compression_ratio``, what the press says
            that it reached; and wall-clock times, shared out evenly among the questions: ``prefill_seconds`` and
            ``press_seconds``, see ``Prefilled``, ``answer_seconds``, and ``seconds``, that of prefill and answer. Where
            there are reference answers, ``answer_nll`` and, if that is asked for, ``answer_kl``, for which ``full`` is
            what ``read_full_cache`` gave; without it, this is the full cache. Reading them is in none of the times.
        """
        press, n_questions = prefilled.press, len(context)
        max_new_tokens = self._config.max_new_tokens
        if max_new_tokens is None:
            max_new_tokens = int(context["max_new_tokens"].iloc[0])
        readings = self._read(context, prefilled)
        model: Any = self._pipeline.model
        synchronize(model.device)
        started = time.perf_counter()
        answers = self._answer(context, prefilled, max_new_tokens) if max_new_tokens else None
        answer_seconds = time.perf_counter() - started
        row = {
            "compression_ratio": 0.0 if press is None else getattr(press, "compression_ratio", float("nan")),
            "seconds": (prefilled.prefill_seconds + answer_seconds) / n_questions,
            "prefill_seconds": prefilled.prefill_seconds / n_questions,
            "press_seconds": prefilled.press_seconds / n_questions,
            "answer_seconds": answer_seconds / n_questions,
        }
        rows = [dict(row) for _ in readings] if answers is None else [{"predicted_answer": a, **row} for a in answers]
        if any(references_of(context)):
            for row, of_question, of_full in zip(rows, readings, full or readings, strict=True):
                row["answer_nll"] = answer_nll(of_question)
                if self._config.answer_kl:
                    row["answer_kl"] = answer_kl(of_full, of_question)
        return rows

    def _answer(self, context: pd.DataFrame, prefilled: Prefilled, max_new_tokens: int) -> list[str]:
        pipeline, cache, press = self._pipeline, prefilled.cache, prefilled.press
        model: Any = pipeline.model
        answers = []
        with masks_of(model, prefilled), press(model) if acts_while_decoding(press) else contextlib.nullcontext():  # type: ignore[misc]
            for question_ids in self._encode(context)[1]:
                with left_as_it_was(cache):
                    answers.append(pipeline.generate_answer(question_ids, cache, prefilled.start, max_new_tokens))
        return answers

    def _read(self, context: pd.DataFrame, prefilled: Prefilled) -> list[list[ReadAnswer]]:
        """The reference answers of each question; none if the press evicts while it answers."""
        if acts_while_decoding(prefilled.press):
            return [[] for _ in range(len(context))]
        model: Any = self._pipeline.model
        tokenizer: Any = self._pipeline.tokenizer
        readings = []
        with masks_of(model, prefilled):
            for question_ids, references in zip(self._encode(context)[1], references_of(context), strict=True):
                tokens = encode_references(tokenizer, question_ids, references)
                readings.append(read_answers(model, prefilled.cache, question_ids, tokens, prefilled.start))
        return readings

    def _encode(self, context: pd.DataFrame) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Tokens of the context and of each question, with its own answer prefix: once for all presses."""
        if self._encoded is None or self._encoded[0] is not context:
            encoded = []
            for text, question, prefix in context[["context", "question", "answer_prefix"]].itertuples(index=False):
                settings, _, _ = self._pipeline._sanitize_parameters(
                    question=question, answer_prefix=prefix, max_context_length=self._config.max_context_length
                )
                encoded.append(self._pipeline.preprocess(text, **settings))
            self._encoded = context, encoded[0]["context_ids"], [each["questions_ids"][0] for each in encoded]
        return self._encoded[1:]
