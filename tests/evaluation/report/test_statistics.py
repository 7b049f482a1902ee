# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
import itertools
import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.report.statistics import holm, mean_of_tasks, paired_difference

# Scores as they are: percentages with ties, and numbers of any size.
numbers = st.one_of(st.sampled_from([0.0, 25.0, -25.0, 100.0, -100.0]), st.floats(-1e3, 1e3, allow_subnormal=False))
samples = st.lists(numbers, min_size=1, max_size=9)


def close(left, right):
    return left == pytest.approx(right, rel=1e-9, abs=1e-9, nan_ok=True)


def test_mean_of_three_differences_is_that_of_paper_and_pencil():
    result = paired_difference([[1.0, 2.0, 6.0]])
    assert result.mean == 3.0
    # Of the eight signs, +++ and --- alone are as far from zero.
    assert result.p_value == 2 / 8
    assert 1.0 <= result.low < 3.0 < result.high <= 6.0


def test_the_p_value_counts_all_signs():
    differences = [3.0, -1.0, 4.0, 1.0, -5.0, 9.0, 2.0]
    means = [sum(s * d for s, d in zip(signs, differences)) for signs in itertools.product((1, -1), repeat=7)]
    expected = sum(abs(mean) >= sum(differences) for mean in means) / len(means)
    assert paired_difference([differences]).p_value == pytest.approx(expected)


def test_ties_change_no_p_value():
    differences = [100.0, 100.0, 100.0, -100.0, 100.0]
    assert paired_difference([differences + [0.0] * 20]).p_value == paired_difference([differences]).p_value == 0.375


def test_many_samples_are_tested_by_drawn_signs():
    generator = np.random.default_rng(0)
    noise = generator.normal(size=40)
    assert paired_difference([noise + 2]).p_value == pytest.approx(1 / 5000, abs=1e-4)
    assert paired_difference([noise - noise.mean()]).p_value > 0.9


def test_identical_pairs_have_a_p_value_of_one_and_an_interval_without_width():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = paired_difference([[0.0] * 5])
    assert (result.mean, result.low, result.high, result.p_value) == (0, 0, 0, 1)


def test_one_sample_has_no_interval():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = paired_difference([[7.0]])
        of_two_tasks = paired_difference([[7.0], [1.0, 2.0]])
    assert (result.mean, result.p_value) == (7, 1)
    assert math.isnan(result.low)
    assert math.isnan(result.high)
    assert math.isnan(of_two_tasks.low)
    assert of_two_tasks.mean == (7 + 1.5) / 2


def test_tasks_weigh_the_same_however_many_samples_they_have():
    assert paired_difference([[10.0] * 2, [0.0] * 18]).mean == 5


def test_the_interval_resamples_within_tasks():
    """Between tasks there is much variation, within them none: samples of the union would vary."""
    result = paired_difference([[10.0] * 4, [-4.0] * 4])
    assert (result.low, result.high) == (3, 3)


def test_the_interval_is_about_that_of_the_normal_distribution():
    differences = np.random.default_rng(3).normal(5, 2, size=400)
    result = paired_difference([differences])
    half = 1.96 * differences.std() / math.sqrt(400)
    assert (result.low, result.high) == pytest.approx((result.mean - half, result.mean + half), abs=0.02)


@pytest.mark.parametrize("tasks", [[], [[]], [[1.0], []], [[math.nan]], [[1.0, math.inf]]])
def test_what_has_no_mean_is_refused(tasks):
    with pytest.raises(ValueError, match="at least one sample"):
        paired_difference(tasks)


@settings(max_examples=25, deadline=None)
@given(st.lists(samples, min_size=1, max_size=3))
def test_swapping_the_sides_negates(tasks):
    one = paired_difference(tasks)
    other = paired_difference([[-difference for difference in task] for task in tasks])
    assert close((other.mean, other.low, other.high), (-one.mean, -one.high, -one.low))
    assert other.p_value == one.p_value


@settings(max_examples=25, deadline=None)
@given(samples, st.randoms(use_true_random=False))
def test_the_order_of_samples_does_not_matter(task, random):
    shuffled = random.sample(task, len(task))
    assert repr(paired_difference([shuffled])) == repr(paired_difference([task]))


@settings(max_examples=25, deadline=None)
@given(st.lists(samples, min_size=1, max_size=3))
def test_the_mean_lies_in_its_interval_and_p_is_a_probability(tasks):
    result = paired_difference(tasks)
    assert 0 < result.p_value <= 1
    if not math.isnan(result.low):
        every = [difference for task in tasks for difference in task]
        assert min(every) - 1e-9 <= result.low <= result.high <= max(every) + 1e-9


def test_holm_multiplies_the_smallest_by_the_number_of_tests():
    # 4 x 0.01; 3 x 0.02; 2 x 0.03 is as large as that; 0.5.
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])


def test_holm_never_falls_and_stays_below_one():
    # 3 x 0.02 = 0.06, then 2 x 0.025 = 0.05 is raised to it; 0.9.
    assert holm([0.02, 0.025, 0.9]) == pytest.approx([0.06, 0.06, 0.9])
    assert holm([0.6, 0.7]) == [1, 1]
    assert holm([0.04]) == [0.04]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_keeps_the_order_and_lies_between_no_correction_and_bonferronis(p_values):
    corrected = holm(p_values)
    for p, q in zip(p_values, corrected):
        assert p <= q <= min(1.0, p * len(p_values)) or q == pytest.approx(p)
    for i, j in itertools.combinations(range(len(p_values)), 2):
        if p_values[i] < p_values[j]:
            assert corrected[i] <= corrected[j]


def test_the_mean_of_tasks_weighs_them_alike_and_its_interval_is_of_samples_within_them():
    many, few = np.arange(50.0), np.array([0.0, 10.0])
    mean, low, high = mean_of_tasks([many, few])
    assert mean == (24.5 + 5) / 2
    generator = np.random.default_rng(1)
    draws = [
        (generator.choice(many, many.size).mean() + generator.choice(few, few.size).mean()) / 2 for _ in range(4000)
    ]
    assert [low, high] == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.5)
    assert np.isnan(mean_of_tasks([many, few[:1]])[1:]).all()
    assert np.isnan(mean_of_tasks([])).all()
