# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""
Products of keys, from which cosines come: in float32, or on a CUDA device in the cache's own 16 bits.

A product of two 16-bit numbers is exact in float32, so multiplying 16-bit keys as they are and adding in float32 is as
exact as converting them first, and keeps tensor cores busy. The norms then have to be applied after the product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

# BLAS rounds the last numbers of a product differently where they do not fill a vector register, see nearest.py.
_CHANNEL_MULTIPLE = 8


def multiplies_16_bits(device: torch.device, dtype: torch.dtype) -> bool:
    """
    Whether keys of this dtype are multiplied as they are, rather than as float32.

    So it is on CUDA, and on ``meta``, which stands for it. No BLAS of a CPU has 16-bit products with a float32 result.
    """
    is_cuda = device.type == "cuda" and torch.version.hip is None
    return (is_cuda or device.type == "meta") and dtype in (torch.float16, torch.bfloat16)


class Side(NamedTuple):
    """
    The survivors of some heads, or their evicted positions, as they are multiplied: see :func:`scaled_keys`.

    ``rows`` have the shape ``(n_heads, n, n_channels)``; ``scale``, float32, above 0, shape ``(n_heads, n)``, is what
    to multiply products with, None where it is 1.
    """

    rows: torch.Tensor
    scale: torch.Tensor | None

    def part(self, heads: slice, columns: slice) -> Side:
        """Some columns of some heads."""
        return Side(self.rows[heads, columns], None if self.scale is None else self.scale[heads, columns])


def scaled_keys(keys: torch.Tensor, norm: torch.Tensor) -> Side:
    """
    Keys to multiply, all ``k_len`` positions of some heads and nowhere behind the last; the product of two rows and
    both of their scales is their cosine. ``norm`` is what :func:`kvpress_merging.kernels.rows.row_norms` gives.

    Float32 keys become unit keys: multiplied twice by one over the root of the norm, since one over the norm itself may
    be too large or too small for float32. 16-bit keys stay as they are, but for a power of two in bfloat16, which
    brings the norm near 1: no product then overflows, and none that float32 would tell from zero vanishes.

    Behind a key stand two numbers more, its *bias* and a 1. The bias is 0, and nowhere -inf. Evicted rows have the two
    the other way round, so that each product has the biases of both its rows added. What stands where a key is not
    finite has no meaning.
    """
    (n_heads, k_len, head_dim), scale = keys.shape, None
    dtype = keys.dtype if multiplies_16_bits(keys.device, keys.dtype) else torch.float32
    n_channels = head_dim + 2
    n_channels += -n_channels % _CHANNEL_MULTIPLE
    rows = torch.zeros(n_heads, k_len + 1, n_channels, dtype=dtype, device=keys.device)
    rows[:, k_len, head_dim], rows[..., head_dim + 1] = -torch.inf, 1.0
    keys_of_rows = rows[:, :k_len, :head_dim]
    norm = norm.clamp(min=torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps)
    if dtype != torch.float32:
        power = torch.ones_like(norm)
        if dtype == torch.bfloat16:
            power = torch.exp2(-norm.log2().round_().clamp_(-126, 126))
        torch.mul(keys, power.to(dtype)[..., None], out=keys_of_rows)
        scale = F.pad((norm * power).reciprocal_().float(), (0, 1), value=1.0)
    else:
        root = norm.rsqrt_().float()[..., None]
        torch.mul(keys, root, out=keys_of_rows).mul_(root)
    return Side(rows, scale)


def multiply(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """``rows @ columns`` for each head, of float32 or 16 bits, added up and written in float32."""
    if rows.dtype != torch.float32 and _writes_float32(rows.device.type):
        return torch.bmm(rows, columns, out_dtype=torch.float32)
    return torch.bmm(rows.float(), columns.float())


@cache
def _writes_float32(device_type: str) -> bool:
    """Whether PyTorch writes products of 16-bit numbers in float32 on this kind of device: tried once."""
    one = torch.ones(1, 1, 1, dtype=torch.bfloat16, device=device_type)
    try:
        torch.bmm(one, one, out_dtype=torch.float32)
    except (TypeError, RuntimeError):  # this PyTorch does not know of it, or not for this device
        return False
    return True


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """
    Within it float32 products are IEEE and 16-bit ones are added up in float32, whatever the user allows elsewhere.

    TF32 on a GPU, or bfloat16 on a CPU, would move cosines and logits by 1e-3, and autocast even more. The user's
    settings are process-wide flags of PyTorch: they are set and put back without touching a device, and not at all
    where they ask for nothing less. Older versions of PyTorch have fewer of them: those are asked that are there.
    """
    cuda, mkldnn = torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)
    precision, sums = "fp32_precision", "allow_fp16_accumulation"
    flags = (cuda, precision, "ieee"), (mkldnn, precision, "ieee"), (cuda, sums, False)
    # The older switch knows of settings made through it alone, and PyTorch refuses to work where the two disagree.
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:
        older = "highest"
    # What sets each, what it is, and what it is to be.
    switches: list[tuple[Callable[[Any], None], Any, Any]] = [
        (partial(setattr, backend, flag), getattr(backend, flag), full)
        for backend, flag, full in flags
        if hasattr(backend, flag)
    ]
    if older != "highest":
        switches.insert(0, (torch.set_float32_matmul_precision, older, "highest"))
    if all(before in ("none", "ieee", False) for _, before, _ in switches):
        switches = []
    has_autocast = torch.amp.is_autocast_available(device.type)
    try:
        for switch, _, full in switches:
            switch(full)
        with torch.autocast(device.type, enabled=False) if has_autocast else nullcontext():
            yield
    finally:
        for switch, before, _ in switches:
            switch(before)
