# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel: what it finds, in Triton's interpreter, and what compilers for three kinds of GPU make of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from kernel_cases import (
    Layer,
    assert_nearest,
    evict,
    exact_keys,
    layers,
    masked,
    put_special_row,
    random_layer,
)

from kvpress_merging.eviction import Eviction
from kvpress_merging.kernels import nearest as nearest_module
from kvpress_merging.kernels import products, rows
from kvpress_merging.kernels.blend import cosine_blend
from kvpress_merging.kernels.nearest import naive_nearest_survivors, nearest_survivors

pytest.importorskip("triton", reason="triton has no package for this platform")
import triton
from interpreter import why_not

from kvpress_merging.kernels import nearest_triton

WHY_NOT = why_not()
interpreted = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))

# The interpreter is numpy, which warns of rows that are not finite.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HEAD_DIMS = [64, 80, 96, 128, 256]


@pytest.fixture(autouse=True)
def keys_as_on_cuda(monkeypatch):
    """16-bit keys reach the kernel as they are."""
    monkeypatch.setattr(products, "multiplies_16_bits", lambda device, dtype: dtype in (torch.float16, torch.bfloat16))


def search(layer: Layer, **options) -> tuple[torch.Tensor, torch.Tensor]:
    has_finite_value = layer.values.float().isfinite().all(dim=-1)
    return nearest_survivors(layer.keys, has_finite_value, layer.eviction, kernel="triton", **options)


def naive(layer: Layer) -> tuple[torch.Tensor, torch.Tensor]:
    return naive_nearest_survivors(layer.keys, layer.values.float().isfinite().all(dim=-1), layer.eviction)


def cosine_with(layer: Layer, target: torch.Tensor) -> torch.Tensor:
    """Cosine of each evicted key with the survivor that ``target`` names, in float64."""

    def unit(positions: torch.Tensor) -> torch.Tensor:
        rows = layer.keys.double().gather(2, positions[..., None].expand(-1, -1, -1, layer.keys.shape[-1]))
        return rows / rows.norm(dim=-1, keepdim=True).clamp(min=1e-300)

    evicted, survivors = layer.eviction.evicted, layer.eviction.survivors.gather(-1, target)
    return (unit(evicted) * unit(survivors)).sum(dim=-1)


@settings(max_examples=40, deadline=None)
@given(layer=layers())
@interpreted
def test_kernel_finds_what_the_oracle_finds(layer):
    with mock.patch.object(products, "multiplies_16_bits", lambda device, dtype: dtype != torch.float32):
        assert_nearest(layer, *search(layer))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("k_len", "n_kept", "kind"),
    [(3, 1, "shrunk"), (130, 129, "shrunk"), (149, 68, "masked"), (171, 30, "ragged")],
)
@interpreted
def test_kernel_finds_what_the_naive_form_finds(k_len, n_kept, kind, dtype, head_dim):
    layer = random_layer(1, 2, k_len, n_kept, head_dim=head_dim, kind=kind, dtype=dtype, seed=head_dim + k_len)
    for position, name in enumerate(("nan", "inf", "zero", "huge", "subnormal", "one_nan")):
        if k_len > 100:
            put_special_row(layer.keys, 0, 1, 7 * position, name)
    similarity, target = search(layer)
    expected, expected_target = naive(layer)
    torch.testing.assert_close(similarity, expected, rtol=0, atol=2e-6)
    is_found = expected.isfinite()
    is_same = (target == expected_target) | ~is_found
    assert is_same.float().mean() > 0.95
    cosine = cosine_with(layer, target).float()
    torch.testing.assert_close(cosine[is_found], expected[is_found], rtol=0, atol=2e-6)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["shrunk", "masked", "ragged"])
@interpreted
def test_ties_go_to_the_lowest_survivor(kind, dtype, head_dim):
    """Cosines of these keys are multiples of 1/16 in whatever order they are added up: most tie with others."""
    keys = exact_keys(2 * 171, head_dim, torch.Generator().manual_seed(head_dim))
    keys = keys.view(1, 2, 171, head_dim).to(dtype)
    layer = evict(keys, keys, 130, kind, seed=3)
    similarity, target = search(layer)
    for ours, expected in zip((similarity, target), naive(layer)):
        assert torch.equal(ours, expected)
    assert (16 * similarity[similarity.isfinite()]).frac().eq(0).all()


@interpreted
def test_ragged_heads_are_searched_up_to_their_own_counts():
    layer = random_layer(1, 2, 400, 200, head_dim=64, kind="masked")
    even = layer.eviction
    layer.eviction = Eviction(even.survivors, even.slots, even.evicted, even.k_len, counts=((60, 11), (0, 150)))
    similarity, target = search(layer)
    assert similarity[0, 0, :11].isfinite().all()
    assert (target[0, 0, :11] < 60).all()
    assert (similarity[0, 0, 11:] == -torch.inf).all()
    assert (similarity[0, 1] == -torch.inf).all()
    assert (target[0, 1] == 0).all()


@interpreted
def test_search_in_blocks_of_heads_finds_the_same(monkeypatch):
    layer = random_layer(2, 3, 150, 60, head_dim=64, kind="ragged", dtype=torch.bfloat16)
    expected = search(layer)
    monkeypatch.setattr(rows, "_CPU_BLOCK_BYTES", 1)
    for ours, together in zip(search(layer), expected):
        assert torch.equal(ours, together)


def test_auto_is_torch_until_triton_has_been_measured():
    layer = random_layer(1, 1, 60, 20, head_dim=64)
    with mock.patch.object(nearest_triton, "search", wraps=nearest_triton.search) as searched:
        nearest_survivors(layer.keys, torch.ones(1, 1, 60, dtype=torch.bool), layer.eviction, kernel="auto")
    assert not searched.called


@interpreted
def test_cosine_does_not_depend_on_the_length_of_a_key():
    """Lengths over the whole range of bfloat16: unscaled products would reach 2^254 and 2^-266."""
    plain = exact_keys(266, 64, torch.Generator().manual_seed(0))
    exponents = torch.arange(-133, 133).clamp(max=127)
    keys = (plain.sign().double() * 2.0 ** exponents[:, None].double()).bfloat16()[None, None]
    assert keys.isfinite().all()
    is_survivor = (torch.arange(266) % 2 == 0)[None, None]
    layer = masked(keys, torch.ones_like(keys), is_survivor, ~is_survivor)
    unscaled = masked(plain.sign()[None, None], torch.ones_like(keys), is_survivor, ~is_survivor)
    for ours, expected in zip(search(layer), naive(unscaled)):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6 if ours.is_floating_point() else 0)


@interpreted
def test_blend_takes_the_kernel_that_is_named():
    layer = random_layer(1, 2, 120, 50, head_dim=64, dtype=torch.bfloat16)
    arguments = (layer.keys, layer.values, layer.kept_keys, layer.kept_values, layer.eviction)
    with mock.patch.object(nearest_triton, "search", wraps=nearest_triton.search) as launched:
        by_torch = cosine_blend(*arguments, kernel="torch")
        assert not launched.called
        by_triton = cosine_blend(*arguments, kernel="triton")
        assert launched.called
    torch.testing.assert_close(by_triton.values, by_torch.values)


# Where it cannot run


def test_keys_that_are_too_long_are_named():
    with pytest.raises(ValueError, match="kernel='triton' takes keys of head_dim up to 256, got 320"):
        search(random_layer(1, 1, 20, 10, head_dim=320))


def test_a_machine_without_triton_is_told(monkeypatch):
    monkeypatch.setattr(nearest_module, "find_spec", lambda name: None)
    layer = random_layer(1, 1, 20, 10, head_dim=64)
    with pytest.raises(ValueError, match=r"^kernel='triton' needs triton, which is not installed; use kernel='torch'$"):
        search(layer)
    assert_nearest(layer, *nearest_survivors(layer.keys, torch.ones(1, 1, 20, dtype=torch.bool), layer.eviction))


def in_another_process(code: str, **environment: str) -> str:
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parents[2]
    variables["PYTHONPATH"] = os.pathsep.join([str(root / "src"), str(root / "tests" / "kernels")])
    finished = subprocess.run(
        [sys.executable, "-c", code], env={**variables, **environment}, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.fixture(scope="module")
def printed_elsewhere() -> list[str]:
    """What one process without the interpreter prints: to start a process costs more than all that it does here."""
    return in_another_process(
        """if True:
        import json
        import sys
        import torch
        import kvpress_merging
        from kernel_cases import random_layer
        from kvpress_merging.kernels.nearest import nearest_survivors

        layer = random_layer(1, 1, 20, 10, head_dim=64)
        arguments = (layer.keys, torch.ones(1, 1, 20, dtype=torch.bool), layer.eviction)
        nearest_survivors(*arguments)
        print("kvpress_merging.kernels.nearest_triton" in sys.modules)
        try:
            nearest_survivors(*arguments, kernel="triton")
        except ValueError as error:
            print(error)
        from compile_for_gpus import compile_one
        try:
            print(json.dumps(compile_one(90, torch.bfloat16, 128)))
        except TypeError as error:
            print(json.dumps(str(error)))
        """
    ).splitlines()


def test_package_imports_no_triton_and_a_cpu_is_told_that_the_kernel_needs_a_gpu(printed_elsewhere):
    imported, message, _ = printed_elsewhere
    assert imported == "False"
    assert message.startswith("kernel='triton' needs a GPU, got tensors on cpu; use kernel='torch'")


# What compilers make of it

MAX_SHARED_BYTES = 99 * 1024
INSTRUCTIONS = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}


def assert_spills_nothing_fits_and_uses_tensor_cores_for_16_bits(variant: dict) -> None:
    assert variant["spilled_bytes"] == 0, variant
    assert variant["shared_bytes"] <= MAX_SHARED_BYTES, variant
    assert variant["registers"] * 32 * variant["warps"] <= 65_536, variant
    expected = [] if variant["dtype"] == "fp32" else [INSTRUCTIONS[variant["capability"]]]
    assert list(variant["tensor_core_instructions"]) == expected, variant


def test_compiled_for_one_gpu_it_spills_nothing_fits_and_uses_tensor_cores(printed_elsewhere):
    variant = json.loads(printed_elsewhere[-1])
    if isinstance(variant, str):
        pytest.skip(f"the compiler of Triton {triton.__version__} is asked in another way: {variant}")
    assert_spills_nothing_fits_and_uses_tensor_cores_for_16_bits(variant)


@pytest.mark.long
def test_compiled_for_gpus_it_spills_nothing_fits_and_uses_tensor_cores_for_16_bits():
    variants = json.loads(in_another_process("import runpy; runpy.run_module('compile_for_gpus', run_name='__main__')"))
    assert {(variant["capability"], variant["dtype"], variant["head_dim"]) for variant in variants} >= {
        (capability, dtype, head_dim)
        for capability in (80, 90, 100)
        for dtype in ("bf16", "fp32")
        for head_dim in HEAD_DIMS
    }
    for variant in variants:
        assert_spills_nothing_fits_and_uses_tensor_cores_for_16_bits(variant)
