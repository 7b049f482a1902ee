# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Products of 16-bit keys as a GPU takes them, but worked out in float32, and what the user's settings change."""

from __future__ import annotations

from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import TILE_BYTES, assert_nearest, layers, masked, random_layer, random_rows
from torch.utils._python_dispatch import TorchDispatchMode

from kvpress_merging.eviction import Eviction
from kvpress_merging.kernels import match_heads, nearest, products
from kvpress_merging.kernels.match import attention_match
from kvpress_merging.kernels.nearest import nearest_survivors
from kvpress_merging.kernels.products import full_precision, multiply, scaled_keys
from kvpress_merging.kernels.rows import row_norms

SIXTEEN_BITS = [torch.float16, torch.bfloat16]


@contextmanager
def keys_as_on_cuda():
    with mock.patch.object(products, "multiplies_16_bits", lambda device, dtype: dtype in SIXTEEN_BITS):
        yield


def search(layer, **options):
    return nearest_survivors(layer.keys, layer.values.float().isfinite().all(dim=-1), layer.eviction, **options)


def test_16_bit_keys_are_multiplied_as_they_are_on_cuda_alone():
    on_cuda, on_cpu = torch.device("cuda"), torch.device("cpu")
    for dtype in SIXTEEN_BITS:
        assert products.multiplies_16_bits(on_cuda, dtype)
        assert not products.multiplies_16_bits(on_cpu, dtype)
    for dtype in (torch.float32, torch.float64):
        assert not products.multiplies_16_bits(on_cuda, dtype)


@settings(max_examples=80, deadline=None)
@given(layer=layers(), tile_bytes=st.sampled_from(TILE_BYTES))
def test_search_by_16_bit_products_finds_what_the_oracle_finds(layer, tile_bytes):
    with keys_as_on_cuda():
        assert_nearest(layer, *search(layer, tile_bytes=tile_bytes))


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_16_bit_products_are_as_exact_as_those_in_float32(dtype, head_dim):
    layer = random_layer(1, 2, 300, 140, head_dim=head_dim, dtype=dtype, kind="ragged")
    expected, _ = search(layer)
    with keys_as_on_cuda():
        similarity, _ = search(layer)
    torch.testing.assert_close(similarity, expected, rtol=0, atol=4 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_keys_of_every_length_that_the_dtype_has_give_the_same_cosines(dtype):
    """Unscaled, products of bfloat16 keys would reach 2^254 and 2^-266."""
    limits = torch.finfo(dtype)
    n = int(torch.tensor(limits.max).log2().floor()) - int(torch.tensor(limits.smallest_normal).log2())
    signs = random_rows(1, 1, n, 64, seed=1).sign()
    lengths = limits.smallest_normal * 2.0 ** torch.arange(n, dtype=torch.float64)
    keys = (signs * lengths[:, None]).to(dtype)
    assert keys.isfinite().all()
    assert (keys != 0).all()
    is_survivor = torch.arange(n).expand(1, 1, -1) % 2 == 0
    plain = search(masked(signs, signs, is_survivor, ~is_survivor))
    with keys_as_on_cuda():
        scaled = search(masked(keys, signs, is_survivor, ~is_survivor))
    torch.testing.assert_close(scaled[0], plain[0], rtol=0, atol=1e-6)


def test_bfloat16_keys_are_multiplied_by_powers_of_two_into_a_safe_range():
    keys = random_rows(1, 260, 48, seed=2) * 2.0 ** torch.arange(-133.0, 127).double()[:, None]
    keys = keys.clamp(-3e38, 3e38).bfloat16()
    with keys_as_on_cuda():
        rows, scale = scaled_keys(keys, row_norms(keys))
    assert rows.dtype == torch.bfloat16
    rows, scale = rows[0, :260, :48].double(), scale[0, :260]
    norms = rows.norm(dim=-1)
    assert (norms >= 1 / 128).all()
    assert (norms <= 64).all()
    torch.testing.assert_close(norms * scale, torch.ones_like(norms), rtol=1e-6, atol=0)
    power = 2.0 ** (rows.abs().amax(dim=-1) / keys[0].double().abs().amax(dim=-1)).log2().round()
    torch.testing.assert_close(rows, keys[0].double() * power[:, None], rtol=0, atol=2.0**-134)


@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN_BITS])
@pytest.mark.parametrize("head_dim", [5, 6, 8, 16, 20])
def test_behind_each_key_stand_its_bias_and_a_one_and_nowhere_is_zeros_behind_the_last(dtype, head_dim):
    keys = random_rows(2, 7, head_dim, seed=0, dtype=dtype)
    keys[1, 3] = 0
    with keys_as_on_cuda():
        rows, _ = scaled_keys(keys, row_norms(keys))
    assert rows.dtype == dtype
    assert rows.shape[:2] == (2, 8)
    assert rows.shape[2] % 8 == 0
    assert not rows[:, 7, :head_dim].any()
    assert not rows[1, 3, : head_dim + 1].any()
    assert (rows[:, :7, head_dim] == 0).all()
    assert (rows[:, 7, head_dim] == -torch.inf).all()
    assert (rows[..., head_dim + 1] == 1).all()
    assert not rows[..., head_dim + 2 :].any()


@pytest.mark.parametrize("shape", [(3, 9000, 128), (6, 40, 16), (2, 0, 8), (0, 5, 8)])
def test_norms_are_those_of_each_row(shape):
    rows = random_rows(*shape, seed=0)
    assert torch.equal(row_norms(rows), rows.double().norm(dim=-1))


def test_where_pytorch_writes_no_float32_16_bits_are_multiplied_as_float32(monkeypatch):
    """As in versions of PyTorch that have no ``out_dtype``."""
    monkeypatch.setattr(products, "_writes_float32", lambda device_type: False)
    rows, columns = (random_rows(2, 5, 8, seed=seed, dtype=torch.bfloat16) for seed in (0, 1))
    assert torch.equal(multiply(rows, columns.mT), rows.float() @ columns.float().mT)
    assert multiply(rows.to("meta"), columns.to("meta").mT).dtype == torch.float32


class Operations(TorchDispatchMode):
    """Remembers which operations ran, and the largest float32 tensor with ``head_dim`` columns that any made."""

    def __init__(self, head_dim: int):
        super().__init__()
        self.head_dim, self.names, self.has_float32_keys = head_dim, set(), False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.add(str(func))
        if (
            isinstance(out, torch.Tensor)
            and out.dtype == torch.float32
            and out.shape[-1:] in ((self.head_dim,), (self.head_dim + 8,))
        ):
            self.has_float32_keys = True
        return out


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_on_a_gpu_no_key_is_converted_to_float32(dtype):
    """Seen on ``meta`` tensors, which take the same path."""
    if not products._writes_float32("meta"):
        pytest.skip(f"torch {torch.__version__} has no bmm with an out_dtype on meta")
    survivors = torch.empty(1, 2, 500, dtype=torch.int64, device="meta")
    eviction = Eviction(survivors, survivors, torch.empty_like(survivors), 1000)
    keys = torch.empty(1, 2, 1000, 96, dtype=dtype, device="meta")
    with Operations(head_dim=96) as operations:
        nearest_survivors(keys, torch.empty(1, 2, 1000, dtype=torch.bool, device="meta"), eviction)
    assert {"aten.bmm.dtype", "aten.bmm.dtype_out"} & operations.names
    assert not {"aten.bmm.default", "aten.bmm.out"} & operations.names
    assert not operations.has_float32_keys


def float32_settings() -> tuple:
    cuda, mkldnn = torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:
        older = "refused"
    precisions = [getattr(backend, "fp32_precision", None) for backend in (cuda, mkldnn)]
    return *precisions, getattr(cuda, "allow_fp16_accumulation", None), older


def blend_somewhere(watch):
    with mock.patch.object(nearest, "multiply", watch(nearest.multiply)):
        search(random_layer(1, 1, 50, 20))


def match_somewhere(watch):
    layer = random_layer(1, 1, 50, 20)
    queries = random_rows(1, 1, 7, 8, seed=1)
    with mock.patch.object(match_heads, "clusters", watch(match_heads.clusters)):
        tensors = (layer.keys, layer.values, layer.kept_keys, layer.kept_values)
        attention_match(*tensors, queries, queries, layer.eviction, key_ridge=0.1)


def set_cuda_by_the_older_name():
    torch.backends.cuda.matmul.allow_tf32 = True


def set_cuda():
    torch.backends.cuda.matmul.fp32_precision = "tf32"


def set_cpu():
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"


def set_float16_sums():
    torch.backends.cuda.matmul.allow_fp16_accumulation = True


@pytest.mark.parametrize(
    "allow_fewer_bits",
    [
        lambda: torch.set_float32_matmul_precision("high"),
        lambda: torch.set_float32_matmul_precision("medium"),
        set_cuda_by_the_older_name,
        set_cuda,
        set_cpu,
        set_float16_sums,
    ],
)
@pytest.mark.parametrize("kernel", [blend_somewhere, match_somewhere])
def test_what_the_user_allows_for_products_elsewhere_is_off_during_a_kernel_and_on_again_after_it(
    kernel, allow_fewer_bits
):
    before = float32_settings()
    is_missing = {set_cuda: before[0] is None, set_cpu: before[1] is None, set_float16_sums: before[2] is None}
    if is_missing.get(allow_fewer_bits):
        pytest.skip(f"torch {torch.__version__} has no such switch")
    within = []

    def watch(function):
        def watched(*arguments, **options):
            # A consistent state: PyTorch refuses to multiply where its older and newer settings disagree.
            assert not torch.backends.cuda.matmul.allow_tf32
            within.append(float32_settings())
            return function(*arguments, **options)

        return watched

    try:
        allow_fewer_bits()
        allowed = float32_settings()
        assert allowed != before
        kernel(watch)
        assert float32_settings() == allowed
        with pytest.raises(ZeroDivisionError), full_precision(torch.device("cpu")):
            raise ZeroDivisionError
        assert float32_settings() == allowed
    finally:
        torch.set_float32_matmul_precision("highest")
        if before[0] is not None:
            torch.backends.cuda.matmul.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "none"
        if before[2] is not None:
            torch.backends.cuda.matmul.allow_fp16_accumulation = False
    assert within
    ieee, no = None if before[0] is None else "ieee", None if before[2] is None else False
    assert set(within) == {(ieee, ieee, no, "highest")}
    assert float32_settings() == before


def test_settings_that_ask_for_nothing_less_are_not_touched():
    before = float32_settings()
    with full_precision(torch.device("cpu")):
        assert float32_settings() == before


def test_older_versions_of_pytorch_with_the_older_switch_alone_are_asked_by_that(monkeypatch):
    for backend in (torch.backends.cuda, torch.backends.mkldnn):
        monkeypatch.setattr(backend, "matmul", object(), raising=False)
    set_to = []
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    monkeypatch.setattr(torch, "set_float32_matmul_precision", set_to.append)
    with full_precision(torch.device("cpu")):
        assert set_to == ["highest"]
    assert set_to == ["highest", "high"]
