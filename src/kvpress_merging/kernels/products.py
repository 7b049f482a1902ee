# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""
Products of keys, from which cosines come: in float32, or on a CUDA device in the cache's own 16 bits.

A product of two 16-bit numbers is exact in float32, so multiplying 16-bit keys as they are and adding in float32 is as
exact as converting them first, and keeps tensor cores busy. The norms then have to be applied after the product.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

# BLAS rounds the last columns of a product differently where they do not fill a vector register, see nearest.py.
_HEAD_DIM_MULTIPLE = 8
_FLOAT32_EXPONENT_BIAS, _FLOAT32_MANTISSA_BITS = 127, 23


def multiplies_16_bits(device: torch.device, dtype: torch.dtype) -> bool:
    """
    Whether keys of this dtype are multiplied as they are, rather than as float32.

    So it is on CUDA, and on ``meta``, which stands for it. No BLAS of a CPU has 16-bit products with a float32 result.
    """
    is_cuda = device.type == "cuda" and torch.version.hip is None
    return (is_cuda or device.type == "meta") and dtype in (torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class ScaledKeys:
    """
    Keys and what makes cosines of their products.

    Parameters
    ----------
    keys : torch.Tensor
        Shape ``(n_heads, k_len, head_dim)``.
    factor : torch.Tensor or None
        By how much to multiply each row before the product, shape of ``keys`` without ``head_dim``. Float32 keys: one
        over the square root of the norm, to be applied twice (one over the norm itself may be too large or too small
        for float32). Bfloat16 keys: the power of two that brings the norm into [1/128, 64], in which no product
        overflows, and none that float32 would tell from zero beside the others vanishes. Float16 keys: None, since
        their products stay within 2^-48 and 2^32.
    inverse_norm : torch.Tensor or None
        One over the norm of a row so multiplied, float32, same shape; None where that norm is 1.
    """

    keys: torch.Tensor
    factor: torch.Tensor | None
    inverse_norm: torch.Tensor | None

    @classmethod
    def of(cls, keys: torch.Tensor, norm: torch.Tensor) -> ScaledKeys:
        """
        Find the factors from the norms, as :func:`row_norms` returns them, which are overwritten.

        A zero key stays zero. A key that is not finite gets a factor of no meaning: that concerns its own products
        alone.
        """
        finfo = torch.finfo(torch.float32 if keys.dtype == torch.float64 else keys.dtype)
        norm = norm.clamp_(min=finfo.smallest_normal * finfo.eps)
        keys = keys.float() if keys.dtype == torch.float64 else keys
        if not multiplies_16_bits(keys.device, keys.dtype):
            return cls(keys, norm.rsqrt_().float(), None)
        if keys.dtype == torch.float16:
            return cls(keys, None, norm.reciprocal_().float())
        # Written bit by bit, so that it is a power of two on every device; both ends are normal in bfloat16 too.
        biased = (_FLOAT32_EXPONENT_BIAS - torch.frexp(norm).exponent).clamp_(1, 2 * _FLOAT32_EXPONENT_BIAS)
        factor = (biased << _FLOAT32_MANTISSA_BITS).view(torch.float32)
        return cls(keys, factor.to(keys.dtype), norm.mul_(factor).reciprocal_().float())

    @property
    def row_dtype(self) -> torch.dtype:
        """Dtype of what :meth:`rows` returns: float32, or the 16 bits of the cache."""
        return torch.float32 if self.inverse_norm is None else self.keys.dtype

    def __getitem__(self, heads: slice) -> ScaledKeys:
        """Some of the heads."""
        if heads.stop - heads.start == len(self.keys):
            return self
        factor = None if self.factor is None else self.factor[heads]
        return ScaledKeys(self.keys[heads], factor, None if self.inverse_norm is None else self.inverse_norm[heads])

    def rows(self, flat: torch.Tensor) -> torch.Tensor:
        """
        The multiplied keys at these places, ``head_dim`` padded with zeros to a multiple of 8.

        Parameters
        ----------
        flat : torch.Tensor
            Positions in the heads laid end to end, int64.

        Returns
        -------
        torch.Tensor
            New tensor of shape ``(*flat.shape, padded head_dim)``, float32 or the 16 bits of the cache.
        """
        rows = self.keys
        if self.factor is not None:
            rows = rows * self.factor[..., None]
            if self.inverse_norm is None:
                rows.mul_(self.factor[..., None])
        elif rows.dtype != self.row_dtype:
            rows = rows.to(self.row_dtype)
        n_missing = -rows.shape[-1] % _HEAD_DIM_MULTIPLE
        if n_missing:
            rows = F.pad(rows, (0, n_missing))
        return rows.reshape(-1, rows.shape[-1]).index_select(0, flat.reshape(-1)).view(*flat.shape, -1)

    def inverse_norms(self, flat: torch.Tensor) -> torch.Tensor | None:
        """What is left to multiply the products of these rows with, float32, shape of ``flat``; None if 1."""
        if self.inverse_norm is None:
            return None
        return self.inverse_norm.reshape(-1).index_select(0, flat.reshape(-1)).view(flat.shape)


def products(rows: torch.Tensor, columns: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """
    ``rows @ columns`` for each head, added up and written in float32.

    Parameters
    ----------
    rows, columns : torch.Tensor
        Shapes ``(n_heads, n_rows, head_dim)`` and ``(n_heads, head_dim, n_columns)``, of one dtype: float32 or 16 bits.
    out : torch.Tensor, optional
        Where to write them, float32, shape ``(n_heads, n_rows, n_columns)``.
    """
    if rows.dtype != torch.float32 and _writes_float32(rows.device.type):
        return torch.bmm(rows, columns, out_dtype=torch.float32, out=out)
    return torch.bmm(rows.float(), columns.float(), out=out)


@cache
def _writes_float32(device_type: str) -> bool:
    """Whether PyTorch writes products of 16-bit numbers in float32 on this kind of device: tried once."""
    one = torch.ones(1, 1, 1, dtype=torch.bfloat16, device=device_type)
    try:
        torch.bmm(one, one, out_dtype=torch.float32)
    except (TypeError, RuntimeError):  # this PyTorch does not know of it, or not for this device
        return False
    return True


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Products in the dtype of their factors, also inside an autocast region."""
    is_available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if is_available else nullcontext()


@contextmanager
def full_precision() -> Iterator[None]:
    """
    Within it float32 products are IEEE and 16-bit ones are added up in float32, whatever the user allows elsewhere.

    TF32 on a GPU or bfloat16 on a CPU would move cosines by 1e-3. The user's settings are process-wide flags of
    PyTorch: they are set and put back without touching a device, and not at all where they ask for nothing less.
    """
    cuda: Any = torch.backends.cuda.matmul
    mkldnn: Any = getattr(torch.backends.mkldnn, "matmul", None)
    # An older PyTorch has not all of these switches.
    backends = [backend for backend in (cuda, mkldnn) if hasattr(backend, "fp32_precision")]
    precisions = [(backend, backend.fp32_precision) for backend in backends]
    adds_in_float16 = getattr(cuda, "allow_fp16_accumulation", False)
    if backends and all(precision in ("none", "ieee") for _, precision in precisions) and not adds_in_float16:
        yield
        return
    # The older switch knows of settings made through it alone, and PyTorch refuses to work where the two disagree.
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:
        older = "highest"
    try:
        if older != "highest":
            torch.set_float32_matmul_precision("highest")
        for backend, _ in precisions:
            backend.fp32_precision = "ieee"
        if adds_in_float16:
            cuda.allow_fp16_accumulation = False
        yield
    finally:
        if older != "highest":
            torch.set_float32_matmul_precision(older)
        for backend, precision in precisions:
            backend.fp32_precision = precision
        if adds_in_float16:
            cuda.allow_fp16_accumulation = True
