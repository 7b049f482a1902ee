# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""One evaluation: what a model answers about a dataset's samples with a press, and how right that is."""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from kvpress import BasePress, DecodingPress, FinchPress
from tqdm import tqdm
from transformers import FineGrainedFP8Config, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from evaluation.benchmarks import fidelity
from evaluation.config import EvaluationConfig
from evaluation.evaluate_registry import DATASET_REGISTRY, SCORER_REGISTRY
from evaluation.likelihood import METRICS, LikelihoodPipeline, Reading, answer_kl, answer_nll, references_of
from evaluation.models import load_model
from evaluation.presses import choose_attention, configure_press, given_model_kwargs
from evaluation.report.statistics import means_with_intervals
from evaluation.results import write_results

logger = logging.getLogger(__name__)


@dataclass
class Evaluation:
    """All that a run needs, made by ``prepare`` and spent by ``measure``. Without a press, the full cache is meant."""

    config: EvaluationConfig
    press: BasePress | None
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    samples: pd.DataFrame


def run(
    config: EvaluationConfig, model: PreTrainedModel | None = None, tokenizer: PreTrainedTokenizerBase | None = None
) -> Path:
    """
    Measure what a configuration says, with a model that is loaded already or not, and write the results.

    Out comes the folder with ``config.yaml``, ``predictions.csv`` and ``metrics.json``. For errors see ``prepare``.
    """
    evaluation = prepare(config, model, tokenizer)
    predictions, metrics = measure(evaluation)
    return write_results(config, evaluation.press, evaluation.model, predictions, metrics)


def prepare(
    config: EvaluationConfig, model: PreTrainedModel | None = None, tokenizer: PreTrainedTokenizerBase | None = None
) -> Evaluation:
    """
    Make the press, load the model unless it is given, and load the samples.

    Raises
    ------
    ValueError
        If settings do not go together, a text is too short for them, or there is no GPU to quantize the model on.
    ModelUnavailableError
        If the model cannot be loaded.
    DatasetUnavailableError
        If the dataset cannot be loaded.
    OSError
        If a file cannot be read.
    """
    press = configure_press(config)
    if (model is None) != (tokenizer is None):
        raise ValueError("model and tokenizer go together: give both or none")
    if model is None or tokenizer is None:
        model, tokenizer = load(config)
    set_seed(config.seed)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    samples = load_samples(config, tokenizer)
    logger.info("%d samples of %s, with %s", len(samples), config.dataset, press or "the full cache")
    return Evaluation(config, press, model, tokenizer, samples)


def load_samples(config: EvaluationConfig, tokenizer: PreTrainedTokenizerBase) -> pd.DataFrame:
    """The samples that a configuration asks for, numbered in the column ``sample``; see ``prepare`` for errors."""
    loader = DATASET_REGISTRY[config.dataset]
    names = list(inspect.signature(loader).parameters)[1:]
    samples = loader(tokenizer, **{name: getattr(config, name) for name in names})
    samples.insert(0, "sample", range(len(samples)))
    if config.fraction < 1.0:
        samples = samples.sample(frac=config.fraction, random_state=config.seed)
    if samples.empty:
        raise ValueError(f"there are no samples: --fraction {config.fraction} of too few, or an empty dataset")
    if config.max_new_tokens == 0 and not any(references_of(samples)):
        raise ValueError(f"--max_new_tokens 0: the dataset {config.dataset} has no reference answers to measure")
    return samples


def load(config: EvaluationConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model that a configuration names, and its tokenizer; see ``prepare`` for errors."""
    kwargs = given_model_kwargs(config)
    if config.fp8:
        if not torch.cuda.is_available():
            raise ValueError("--fp8 needs a GPU, and there is none")
        kwargs["quantization_config"] = FineGrainedFP8Config()
    device = config.device
    if device is None and torch.cuda.device_count() > 1:
        device = "auto"
    return load_model(config.model, device=device, trust_remote_code=config.trust_remote_code, model_kwargs=kwargs)


def measure(evaluation: Evaluation) -> tuple[pd.DataFrame, dict[str, Any]]:
    """
    Run the model over the samples and score what comes out.

    Returns
    -------
    tuple[pd.DataFrame, dict]
        One row for each sample, with the columns of the samples, what was measured, ``compression_ratio`` (what the
        press reached), seconds and a column for each metric; and the metrics, ``{task: {name: value}}``.
    """
    config, press = evaluation.config, evaluation.press
    with _attention(choose_attention(config, press, evaluation.model), evaluation.model):
        if config.dataset == "fidelity":
            predictions = fidelity.measure_windows(evaluation.model, press, evaluation.samples, quiet=config.quiet)
            return predictions, {fidelity.TASK: means_with_intervals(fidelity.score(predictions), config.seed)}
        predictions = answer(evaluation)
    scores = predictions[[]] if config.max_new_tokens == 0 else SCORER_REGISTRY[config.dataset](predictions)
    likelihood = predictions[[name for name in METRICS if name in predictions]]
    # Percentages are rounded as kvpress rounds them.
    means = scores.groupby(predictions["task"]).mean().round(2)
    means = means.join(likelihood.groupby(predictions["task"]).mean())
    metrics = {str(task): row.dropna().to_dict() for task, row in means.iterrows()}
    return predictions.join(scores), metrics


def answer(evaluation: Evaluation) -> pd.DataFrame:
    """
    Have the model answer the samples' questions, through kvpress's pipeline.

    Questions about one context are asked over one prefill, except with a press that evicts while decoding. Out come the
    samples without their contexts, with what ``answer_about`` gives.
    """
    config, press, samples = evaluation.config, evaluation.press, evaluation.samples.copy()
    with _delimiter_for(press, evaluation.model, evaluation.tokenizer) as (tokenizer, delimiter):
        samples["context"] += delimiter
        if config.query_aware:
            samples["context"] += samples["question"]
            samples["question"] = ""
        # A model on several devices has been put there already.
        device = None if hasattr(evaluation.model, "hf_device_map") else evaluation.model.device
        kwargs: dict[str, Any] = {"model": evaluation.model, "tokenizer": tokenizer, "device": device}
        pipeline = LikelihoodPipeline(**kwargs)
        by = ["sample"] if isinstance(press, DecodingPress) else ["context", "max_new_tokens"]
        answers = []
        with tqdm(total=len(samples), desc=config.dataset, unit="sample", disable=config.quiet, leave=None) as progress:
            for _, group in samples.groupby(by, sort=False, dropna=False):
                answers.append(answer_about(group, press, pipeline, config))
                progress.update(len(group))
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
    return samples.drop(columns="context").join(pd.concat(answers))


def answer_about(
    questions: pd.DataFrame, press: BasePress | None, pipeline: LikelihoodPipeline, config: EvaluationConfig
) -> pd.DataFrame:
    """
    Have the model answer questions about one context, over one prefill with one press.

    The questions share the length of an answer too; ``pipeline`` holds the model and its tokenizer. Out come for each
    question ``predicted_answer`` (missing with 0 new tokens), ``compression_ratio``, ``seconds``, the wall-clock time
    of the prefill and all answers, shared out evenly, and where there are reference answers ``answer_nll``, and
    ``answer_kl`` if that is asked for: the context is then prefilled once more, without the press. Reading reference
    answers is not in the seconds.
    """
    first = questions.iloc[0]
    references = references_of(questions)
    asked = (first["context"], questions["answer_prefix"].to_list(), references)
    settings: dict[str, Any] = {
        "questions": questions["question"].to_list(),
        "max_context_length": config.max_context_length,
    }
    max_new_tokens = int(first["max_new_tokens"]) if config.max_new_tokens is None else config.max_new_tokens
    full: list[list[Reading]] | None = None
    if config.answer_kl and press is not None:
        _, full, _ = pipeline.ask(*asked, max_new_tokens=0, **settings)
    started = time.perf_counter()
    answers, readings, seconds_of_reading = pipeline.ask(*asked, press=press, max_new_tokens=max_new_tokens, **settings)
    seconds = (time.perf_counter() - started - seconds_of_reading) / len(questions)
    ratio = 0.0 if press is None else getattr(press, "compression_ratio", float("nan"))
    row: dict[str, Any] = {"predicted_answer": answers, "compression_ratio": ratio, "seconds": seconds}
    if max_new_tokens == 0:
        del row["predicted_answer"]
    if any(references):
        row["answer_nll"] = [answer_nll(of_question) for of_question in readings]
        if config.answer_kl:
            row["answer_kl"] = [answer_kl(*pair) for pair in zip(full or readings, readings)]
    return pd.DataFrame(row, index=questions.index)


@contextlib.contextmanager
def _attention(implementation: str, model: PreTrainedModel) -> Iterator[None]:
    """Have a model compute attention in another way, for a while."""
    before = model.config._attn_implementation
    if implementation == before:
        yield
        return
    logger.info("Attention is computed by %s", implementation)
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextlib.contextmanager
def _delimiter_for(
    press: BasePress | None, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[PreTrainedTokenizerBase, str]]:
    """The tokenizer to use and what to put between context and question: FinchPress needs a token of its own there."""
    if not isinstance(press, FinchPress):
        yield tokenizer, ""
        return
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    text_config = model.config.get_text_config()
    weights = (embeddings.weight.data, embeddings.num_embeddings, embeddings.padding_idx)
    n_outputs, vocab_size = head.out_features, text_config.vocab_size
    tokenizer = copy.deepcopy(tokenizer)
    press.update_model_and_tokenizer(model, tokenizer)
    try:
        yield tokenizer, press.delimiter_token
    finally:
        # The embeddings were given more rows in place, and the head was replaced or tied to them.
        embeddings.weight.data, embeddings.num_embeddings, embeddings.padding_idx = weights
        head.out_features, text_config.vocab_size = n_outputs, vocab_size
        model.set_output_embeddings(head)
