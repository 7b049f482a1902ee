# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""The trial that the Triton kernel has to pass: what it asks, and what it lets pass."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import pytest
import torch

from kvpress_merging.eviction import Eviction
from kvpress_merging.kernels import trial
from kvpress_merging.kernels.nearest import nearest_survivors

CPU = torch.device("cpu")


@dataclass
class Question:
    """One call of the search."""

    keys: torch.Tensor
    has_finite_value: torch.Tensor
    eviction: Eviction
    kernel: str


@pytest.fixture
def ask():
    """Makes a trial of a kernel that answers as torch does but for ``spoil(similarity, target, is_exact)``."""

    def ask(spoil=lambda similarity, target, is_exact: None, dtype=torch.float32, head_dim=32):
        questions = []

        def search(keys, has_finite_value, eviction, *, kernel):
            questions.append(Question(keys, has_finite_value, eviction, kernel))
            similarity, target = nearest_survivors(keys, has_finite_value, eviction, kernel="torch")
            if kernel == "triton":
                spoil(similarity, target, len(questions) == 2)
            return similarity, target

        return trial.trial(CPU, dtype, head_dim, search), questions

    return ask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_kernels_are_asked_about_an_exact_and_a_random_ragged_layer(dtype, ask):
    failure, questions = ask(dtype=dtype)
    assert failure is None
    assert [question.kernel for question in questions] == ["torch", "triton"] * 2
    for by_torch, by_triton in (questions[:2], questions[2:]):
        assert by_torch.keys is by_triton.keys
        assert by_torch.eviction is by_triton.eviction
    for question in questions[::2]:
        eviction, keys = question.eviction, question.keys
        assert keys.shape == (1, 2, eviction.k_len, 32)
        assert keys.dtype == dtype
        assert question.has_finite_value.shape == keys.shape[:3]
        assert question.has_finite_value.all()
        # More than one tile of either, no multiple of its side, and a different number in each head.
        (n_survivors, n_evicted), (n_survivors_of_second, n_evicted_of_second) = eviction.counts
        assert n_survivors > n_survivors_of_second > 128
        assert 128 < n_evicted < n_evicted_of_second == eviction.evicted.shape[-1]
        assert n_survivors == eviction.survivors.shape[-1]
        assert n_survivors + n_evicted_of_second == eviction.k_len
        assert torch.equal(eviction.survivors, eviction.slots)
        assert eviction.survivors[0, 1].tolist() == list(range(n_survivors))
        assert eviction.evicted[0, 0].tolist() == list(range(n_survivors, eviction.k_len))
        # Among survivors and evicted positions some that are no number, and some that are zero.
        for is_special in (keys.isnan().all(dim=-1), (keys == 0).all(dim=-1)):
            assert is_special[..., : n_survivors - 20].any()
            assert is_special[..., n_survivors:].any()
            assert is_special.sum() < 5
    assert is_exact(questions[0].keys)
    assert not is_exact(questions[2].keys)
    assert questions[2].keys.isfinite().all(dim=-1).sum() > 500


def test_what_is_asked_lies_on_the_device_that_is_asked_about():
    questions, meta = [], torch.device("meta")

    def search(keys, has_finite_value, eviction, *, kernel):
        questions.append(Question(keys, has_finite_value, eviction, kernel))
        if kernel == "triton":
            raise RuntimeError("no kernel")
        return None, None

    assert trial.trial(meta, torch.bfloat16, 32, search) == "RuntimeError: no kernel"
    for question in questions:
        eviction = question.eviction
        tensors = (question.keys, question.has_finite_value, eviction.survivors, eviction.slots, eviction.evicted)
        assert [tensor.device for tensor in tensors] == [meta] * 5


def is_exact(keys: torch.Tensor) -> bool:
    numbers = keys[keys.isfinite() & (keys != 0)].float().abs()
    return bool((numbers.log2() / 2 == (numbers.log2() / 2).round()).all())


def test_the_same_question_is_asked_each_time(ask):
    first, second = (ask()[1] for _ in range(2))
    for one, other in zip(first, second):
        assert torch.equal(one.keys.nan_to_num(7.0), other.keys.nan_to_num(7.0))


def test_another_survivor_is_noticed_where_many_tie(ask):
    def spoil(similarity, target, is_exact):
        if is_exact:
            target[0, 1, 7] += 1

    assert ask(spoil)[0] == "it finds other survivors than torch"


def test_another_survivor_passes_where_the_evicted_key_is_no_number_or_keys_are_random(ask):
    def spoil(similarity, target, is_exact):
        if is_exact:
            assert similarity.isinf().any()
            target[similarity.isinf()] += 1
        else:
            target[0, 1, 7] += 1

    assert ask(spoil)[0] is None


@pytest.mark.parametrize(
    ("of_exact", "error", "passes"),
    [(True, 1e-7, False), (True, 1e-3, False), (False, 2e-6, True), (False, 2e-5, False), (False, 0.5, False)],
)
def test_cosines_have_to_be_exact_where_they_can_be_and_within_float32s_rounding_elsewhere(
    of_exact, error, passes, ask
):
    def spoil(similarity, target, is_exact):
        if is_exact == of_exact:
            similarity[0, 0, 3] -= error

    assert ask(spoil)[0] == (None if passes else "its cosines differ from torch's")


def test_a_kernel_that_raises_fails_with_what_it_said(ask):
    def spoil(similarity, target, is_exact):
        raise MemoryError("out of shared memory")

    assert ask(spoil)[0] == "MemoryError: out of shared memory"


@pytest.mark.parametrize(("head_dim", "n_numbers"), [(1, 1), (15, 1), (16, 16), (17, 16), (96, 16)])
def test_exact_keys_have_norms_that_are_powers_of_four_and_cosines_that_are_sixteenths(head_dim, n_numbers):
    keys = trial.exact_keys(200, head_dim, torch.Generator().manual_seed(0))
    assert keys.shape == (200, head_dim)
    assert keys.dtype == torch.float32
    assert ((keys != 0).sum(dim=-1) == n_numbers).all()
    lengths = keys.abs().amax(dim=-1)
    assert torch.equal(lengths.unique(), 4.0 ** torch.arange(-3, 4))
    assert torch.equal(keys.abs().sum(dim=-1), n_numbers * lengths)
    assert {-1.0, 1.0} <= set(keys.sign().unique().tolist())
    units = keys.double() / keys.double().norm(dim=-1, keepdim=True)
    sixteenths = 16 * units @ units.T
    torch.testing.assert_close(sixteenths, sixteenths.round(), rtol=0, atol=1e-9)
    if head_dim > n_numbers:
        assert len((keys != 0).float().argmax(dim=-1).unique()) > 1
    assert torch.equal(keys, trial.exact_keys(200, head_dim, torch.Generator().manual_seed(0)))


def test_the_warning_points_at_who_asked(monkeypatch):
    monkeypatch.setattr(trial, "_served", {})
    monkeypatch.setattr(trial, "trial", lambda device, dtype, head_dim, search: "it broke")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert not trial.serves(CPU, torch.float16, 64, nearest_survivors)
    assert [warning.filename for warning in warned] == [__file__]
    assert str(warned[0].message) == (
        "The Triton kernel does not serve torch.float16 keys of head_dim 64 on cpu, so PyTorch's own operations do: "
        "it broke"
    )
