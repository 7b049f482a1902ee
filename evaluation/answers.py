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
from evaluation.prefill import Prefilled, acts_while_decoding, masks_of, synchronize


class Questions:
    """
    Samples of questions as a reading: those that share context, answer prefix and length of an answer are one context.

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
        self._encoded: tuple[pd.DataFrame, dict[str, Any]] | None = None
        samples = samples.copy()
        samples["context"] += delimiter
        if config.query_aware:
            samples["context"] += samples["question"]
            samples["question"] = ""
        by = ["sample"] if one_by_one else ["context", "answer_prefix", "max_new_tokens"]
        self.contexts = [group for _, group in samples.groupby(by, sort=False, dropna=False)]
        self.samples = samples.drop(columns="context")

    def input_ids(self, context: pd.DataFrame) -> torch.Tensor:
        """What is prefilled of a context, of shape ``(1, context_length)``."""
        return self._encode(context)["context_ids"]

    @torch.no_grad()
    def measure(self, context: pd.DataFrame, prefilled: Prefilled) -> list[dict[str, Any]]:
        """
        Answer a context's questions in turn, each from the cache as the press left it.

        Returns
        -------
        list of dict
            For each question ``predicted_answer``; ``compression_ratio``, what the press says that it reached; and
            wall-clock times, shared out evenly among the questions: ``prefill_seconds`` and ``press_seconds``, see
            ``Prefilled``, ``answer_seconds``, and ``seconds``, that of prefill and answer.
        """
        pipeline, cache, press = self._pipeline, prefilled.cache, prefilled.press
        model: Any = pipeline.model
        max_new_tokens = self._config.max_new_tokens or int(context["max_new_tokens"].iloc[0])
        lengths = [cache.get_seq_length(layer_idx) for layer_idx in range(len(cache))]
        answers = []
        synchronize(model.device)
        started = time.perf_counter()
        with masks_of(model, prefilled), press(model) if acts_while_decoding(press) else contextlib.nullcontext():  # type: ignore[misc]
            for question_ids in self._encode(context)["questions_ids"]:
                answers.append(pipeline.generate_answer(question_ids, cache, prefilled.start, max_new_tokens))
                pipeline._remove_answer_from_cache(cache, lengths)
        answer_seconds = time.perf_counter() - started
        times = {
            "seconds": prefilled.prefill_seconds + answer_seconds,
            "prefill_seconds": prefilled.prefill_seconds,
            "press_seconds": prefilled.press_seconds,
            "answer_seconds": answer_seconds,
        }
        times = {name: seconds / len(context) for name, seconds in times.items()}
        ratio = 0.0 if press is None else getattr(press, "compression_ratio", float("nan"))
        return [{"predicted_answer": said, "compression_ratio": ratio, **times} for said in answers]

    def _encode(self, context: pd.DataFrame) -> dict[str, Any]:
        if self._encoded is None or self._encoded[0] is not context:  # once for all presses
            first = context.iloc[0]
            settings, _, _ = self._pipeline._sanitize_parameters(
                questions=context["question"].to_list(),
                answer_prefix=first["answer_prefix"],
                max_context_length=self._config.max_context_length,
            )
            self._encoded = context, self._pipeline.preprocess(first["context"], **settings)
        return self._encoded[1]
