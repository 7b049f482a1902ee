# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Statistics of paired samples: two measurements of the same samples, in one task or several."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import bootstrap, permutation_test

N_RESAMPLES = 9999
"""Bootstrap samples of a difference's interval, and sign flips of a test where all of them would be more."""

CONFIDENCE_LEVEL = 0.95
"""Of the intervals."""


@dataclass(frozen=True)
class PairedDifference:
    """
    How much one side differs from the other.

    Parameters
    ----------
    mean : float
        Mean over tasks of the mean difference over a task's samples.
    low, high : float
        Percentile bootstrap interval of that mean, samples resampled within their tasks; NaN where a task has one.
    p_value : float
        Two-sided, of a sign-flip test: were the two sides exchangeable, each difference could as well have the other
        sign. Exact up to 13 samples that differ.
    """

    mean: float
    low: float
    high: float
    p_value: float


def paired_difference(tasks: Sequence[Any], seed: int = 0) -> PairedDifference:
    """
    Mean difference of pairs, with its interval and its p-value.

    The order of a task's samples has no influence, and the opposite differences have the opposite mean and interval
    and the same p-value.

    Parameters
    ----------
    tasks : sequence of array-like
        For each task, one difference a sample: finite (or else a ValueError), shape ``(n_samples,)``, one at least.

    Examples
    --------
    >>> paired_difference([[1.0, 1.0, 1.0, 1.0, 1.0]])
    PairedDifference(mean=1.0, low=1.0, high=1.0, p_value=0.0625)
    """
    samples = [np.sort(np.asarray(task, dtype=np.float64)) for task in tasks]
    if not samples or any(task.ndim != 1 or task.size == 0 or not np.isfinite(task).all() for task in samples):
        raise ValueError("each task needs at least one sample, and differences must be finite numbers")
    # Of the two directions always the same one is computed, so that the other has exactly the opposite result.
    opposite = [-task[::-1] for task in samples]
    if _flat(opposite) > _flat(samples):
        result = _difference(opposite, seed)
        return PairedDifference(-result.mean, -result.high, -result.low, result.p_value)
    return _difference(samples, seed)


def means_with_intervals(scores: pd.DataFrame, seed: int) -> dict[str, Any]:
    """
    Mean of each column over the samples, with a 95 % bootstrap interval (percentiles) of that mean.

    ``{metric: mean, f"{metric}_interval": [low, high]}``; no interval if there is one sample only.
    """
    metrics: dict[str, Any] = {}
    for name, column in scores.items():
        values = column.to_numpy()
        metrics[str(name)] = float(values.mean())
        if len(values) > 1:
            metrics[f"{name}_interval"] = list(interval([values], seed=seed))
    return metrics


def mean_of_tasks(tasks: Sequence[Any], seed: int = 0) -> tuple[float, float, float]:
    """
    Mean of the means of tasks, and the ends of its 95 % bootstrap interval, samples resampled within their tasks.

    ``tasks`` are the scores of the samples of each, finite, shape ``(n_samples,)``. The ends are NaN where a task has
    one sample; all is NaN where there is no task.
    """
    samples = [np.asarray(task, dtype=np.float64) for task in tasks]
    low = high = math.nan
    if samples and all(task.size > 1 for task in samples):
        low, high = interval(samples, seed=seed)
    return float(_mean_of_means(*samples)) if samples else math.nan, low, high


def ratio_of_sums(top: Any, bottom: Any, seed: int = 0) -> tuple[float, float, float]:
    """
    ``sum(top) / sum(bottom)``, and the ends of its 95 % bootstrap interval: pairs of numbers are resampled.

    The bottoms are positive. The ends are NaN for one pair only; all is NaN where there is none.
    """
    tops, bottoms = (np.asarray(side, dtype=np.float64) for side in (top, bottom))
    if not tops.size:
        return math.nan, math.nan, math.nan
    low = high = math.nan
    if tops.size > 1:
        low, high = interval([tops, bottoms], _ratio_of_sums, seed, paired=True)
    return float(_ratio_of_sums(tops, bottoms)), low, high


def interval(
    samples: Sequence[np.ndarray],
    statistic: Callable[..., np.ndarray] | None = None,
    seed: int = 0,
    n_resamples: int = 2000,
    *,
    paired: bool = False,
) -> tuple[float, float]:
    """
    Percentile bootstrap interval, 95 %, of a statistic: by default the mean of the tasks' means.

    Parameters
    ----------
    samples : sequence of np.ndarray
        Of each task, two or more, shape ``(n_samples,)``. Each task is resampled by itself, or where they are
        ``paired`` all by the same draws.
    statistic : callable, optional
        ``statistic(*samples, axis)``; it is given many resamples at a time, shape ``(n_resamples, n_samples)``.
    """
    ends = bootstrap(
        samples,
        statistic or _mean_of_means,
        n_resamples=n_resamples,
        vectorized=True,
        paired=paired,
        confidence_level=CONFIDENCE_LEVEL,
        method="percentile",
        # No more than some 10^7 numbers at a time.
        batch=max(1, 10**7 // max(task.size for task in samples)),
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(ends.low), float(ends.high)


def holm(p_values: Sequence[float]) -> list[float]:
    """
    Holm's step-down correction for several tests.

    The k-th smallest of m p-values is multiplied by m - k + 1, is at least as large as the one before it, and at most 1
    (Holm, A Simple Sequentially Rejective Multiple Test Procedure, Scandinavian Journal of Statistics 6, 1979).
    """
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def _difference(samples: list[np.ndarray], seed: int) -> PairedDifference:
    mean = math.fsum(math.fsum(task) / task.size for task in samples) / len(samples)
    low = high = math.nan
    if all(task.size > 1 for task in samples):
        low, high = interval(samples, seed=seed, n_resamples=N_RESAMPLES)
    return PairedDifference(mean + 0.0, low + 0.0, high + 0.0, _sign_flip_p_value(samples, seed))


def _sign_flip_p_value(samples: list[np.ndarray], seed: int) -> float:
    # What each sample adds to the mean of means. A difference of zero has no sign to flip.
    shares = np.concatenate([task / (task.size * len(samples)) for task in samples])
    shares = shares[shares != 0]
    if shares.size < 2:
        return 1.0
    # In units of the largest, so that the tolerance for ties of the test is relative to the numbers.
    test = permutation_test(
        (shares / np.abs(shares).max(),),
        np.sum,
        permutation_type="samples",
        vectorized=True,
        n_resamples=N_RESAMPLES,
        batch=max(1, 10**6 // shares.size),
        rng=np.random.default_rng(seed),
    )
    return min(1.0, float(test.pvalue))


def _mean_of_means(*samples: np.ndarray, axis: int = -1) -> np.ndarray:
    return np.mean([np.mean(task, axis=axis) for task in samples], axis=0)


def _ratio_of_sums(top: np.ndarray, bottom: np.ndarray, axis: int = -1) -> np.ndarray:
    return np.sum(top, axis=axis) / np.sum(bottom, axis=axis)


def _flat(samples: list[np.ndarray]) -> list[float]:
    return [float(number) for task in samples for number in task]
