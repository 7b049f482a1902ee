# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""One evaluation: what a model answers about a dataset's samples with a press, and how right that is."""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
import torch
from kvpress import BasePress, DecodingPress, FinchPress, PrefillDecodingPress
from tqdm import tqdm
from transformers import FineGrainedFP8Config, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from evaluation.answers import Questions
from evaluation.benchmarks import fidelity
from evaluation.config import EvaluationConfig
from evaluation.evaluate_registry import DATASET_REGISTRY, SCORER_REGISTRY
from evaluation.likelihood import METRICS, references_of
from evaluation.models import load_model
from evaluation.prefill import Prefilled, prefill
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
    config: EvaluationConfig,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    samples: pd.DataFrame | None = None,
) -> Evaluation:
    """
    Make the press, and load model, tokenizer and samples unless they are given.

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
    if samples is None:
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
    Run the model over the samples and score what comes out; see ``score``.

    Raises
    ------
    Exception
        Whatever model or press raise.
    """
    config = evaluation.config
    with reading(evaluation) as read:
        rows: dict[int, dict[str, Any]] = {}
        for context in contexts_of(read, config):
            rows |= measure_alone(evaluation, read, context)
        return score(config, read, rows)


class Reading(Protocol):
    """Samples by the contexts that they are about, and what is measured over the cache of one."""

    samples: pd.DataFrame
    contexts: list[pd.DataFrame]

    def input_ids(self, context: pd.DataFrame) -> torch.Tensor:
        """What is prefilled of one of ``contexts``: token ids, int64, shape ``(1, context_length)``."""

    def read_full_cache(self, context: pd.DataFrame, prefilled: Prefilled) -> Any:
        """What ``measure`` needs of the full cache of one of ``contexts``, if ``answer_kl`` is asked for."""

    def measure(self, context: pd.DataFrame, prefilled: Prefilled, full: Any = None) -> list[dict[str, Any]]:
        """For each sample of one of ``contexts`` a row of what can be written as JSON."""


def reading_of(evaluation: Evaluation, **settings: Any) -> Reading:
    """The evaluation's samples; ``settings`` are those of ``Questions``."""
    config, model, samples = evaluation.config, evaluation.model, evaluation.samples
    if config.dataset == "fidelity":
        return fidelity.Windows(model, samples)
    return Questions(model, settings.pop("tokenizer", evaluation.tokenizer), samples, config, **settings)


@contextlib.contextmanager
def reading(evaluation: Evaluation) -> Iterator[Reading]:
    """The evaluation's samples, while attention, tokenizer and embeddings are those that its press needs."""
    press, model = evaluation.press, evaluation.model
    implementation = choose_attention(evaluation.config, press, model)
    with attention(implementation, model), _delimiter_for(press, model, evaluation.tokenizer) as (tokenizer, delimiter):
        one_by_one = isinstance(press, (DecodingPress, PrefillDecodingPress))
        yield reading_of(evaluation, tokenizer=tokenizer, delimiter=delimiter, one_by_one=one_by_one)


def contexts_of(read: Reading, config: EvaluationConfig) -> Iterator[pd.DataFrame]:
    """The contexts of a reading, with a progress bar."""
    n_samples = len(read.samples)
    with tqdm(total=n_samples, desc=config.dataset, unit="sample", disable=config.quiet, leave=None) as progress:
        for context in read.contexts:
            yield context
            progress.update(len(context))


def measure_alone(evaluation: Evaluation, read: Reading, context: pd.DataFrame) -> dict[int, dict[str, Any]]:
    """
    Measure the evaluation's press on one context, over a prefill of its own: a row for each number of a sample.

    With ``answer_kl`` the full cache is prefilled too, before.
    """
    config, press, input_ids = evaluation.config, evaluation.press, read.input_ids(context)
    full = None
    if config.answer_kl and press is not None:
        full = read.read_full_cache(context, prefill(evaluation.model, input_ids, None))
    seed_draws(config.seed, context)
    rows = read.measure(context, prefill(evaluation.model, input_ids, press), full)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return dict(zip(context["sample"].tolist(), rows, strict=True))


def seed_draws(seed: int, context: pd.DataFrame) -> None:
    """Set what presses draw for a context, whatever was drawn before: a sweep that broke off may go on from there."""
    set_seed(int(np.random.SeedSequence([seed, *context["sample"]]).generate_state(1)[0]))


def score(
    config: EvaluationConfig, read: Reading, rows: Mapping[int, Mapping[str, Any]]
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """
    Score what was measured of all samples.

    Returns
    -------
    tuple[pd.DataFrame, dict]
        One row for each sample, with the columns of the samples, what was measured, ``compression_ratio`` (what the
        press reached), seconds and a column for each metric; and the metrics, ``{task: {name: value}}``.
    """
    measured = pd.DataFrame([rows[sample] for sample in read.samples["sample"]], index=read.samples.index)
    predictions = read.samples.join(measured)
    if config.dataset == "fidelity":
        return predictions, {fidelity.TASK: means_with_intervals(fidelity.score(predictions), config.seed)}
    scores = predictions[[]] if config.max_new_tokens == 0 else SCORER_REGISTRY[config.dataset](predictions)
    likelihood = predictions[[name for name in METRICS if name in predictions]]
    # Percentages are rounded as kvpress rounds them.
    means = scores.groupby(predictions["task"]).mean().round(2)
    means = means.join(likelihood.groupby(predictions["task"]).mean())
    metrics = {str(task): row.dropna().to_dict() for task, row in means.iterrows()}
    return predictions.join(scores), metrics


@contextlib.contextmanager
def attention(implementation: str, model: PreTrainedModel) -> Iterator[None]:
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
