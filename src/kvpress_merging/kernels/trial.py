# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Whether the Triton kernel does on this machine what PyTorch's own operations do: tried once, on small layers."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch

from kvpress_merging.eviction import Eviction

_served: dict[tuple[torch.device, torch.dtype, int], bool] = {}


def serves(
    device: torch.device, dtype: torch.dtype, head_dim: int, search: Callable[..., tuple[torch.Tensor, torch.Tensor]]
) -> bool:
    """
    Whether the kernel agrees with the torch path on a small trial, made once for each device, dtype and ``head_dim``.

    The trial waits for the device. Where it fails, one warning says how. ``search`` is
    :func:`kvpress_merging.kernels.nearest.nearest_survivors`.
    """
    key = (device, dtype, head_dim)
    if key not in _served:
        failure = trial(*key, search)
        if failure is not None:
            warnings.warn(
                f"The Triton kernel does not serve {dtype} keys of head_dim {head_dim} on {device}, so PyTorch's own "
                f"operations do: {failure}",
                RuntimeWarning,
                stacklevel=2,
            )
        _served[key] = failure is None
    return _served[key]


def trial(
    device: torch.device, dtype: torch.dtype, head_dim: int, search: Callable[..., tuple[torch.Tensor, torch.Tensor]]
) -> str | None:
    """
    Search two small layers with the kernel and with torch.

    One has keys whose cosines no rounding touches (see :func:`exact_keys`), so that many survivors tie and both have to
    give the same bits, the other random ones, so that fewer bits than float32's show.

    Returns
    -------
    str or None
        What went wrong; None if both agree.
    """
    n_survivors, k_len = 150, 290
    generator = torch.Generator().manual_seed(0)
    positions = torch.arange(k_len, device=device).expand(1, 2, -1)
    survivors, evicted = positions[..., :n_survivors], positions[..., n_survivors:]
    counts = ((n_survivors, evicted.shape[-1] - 9), (n_survivors - 20, evicted.shape[-1]))
    eviction = Eviction(survivors, survivors, evicted, k_len, counts)
    has_finite_value = torch.ones(1, 2, k_len, dtype=torch.bool, device=device)
    for is_exact in (True, False):
        keys = (
            exact_keys(2 * k_len, head_dim, generator)
            if is_exact
            else torch.randn(2 * k_len, head_dim, generator=generator)
        )
        keys[[0, k_len + 3, 2 * k_len - 5]] = torch.nan
        keys[[5, k_len - 20]] = 0
        keys = keys.view(1, 2, k_len, head_dim).to(device, dtype)
        by_torch = search(keys, has_finite_value, eviction, kernel="torch")
        try:
            by_triton = search(keys, has_finite_value, eviction, kernel="triton")
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        # The target of an evicted key that is not finite has no meaning.
        is_found = by_torch[0].isfinite()
        if is_exact and not torch.equal(by_triton[1][is_found], by_torch[1][is_found]):
            return "it finds other survivors than torch"
        if not torch.allclose(by_triton[0], by_torch[0], rtol=0, atol=0 if is_exact else 1e-5):
            return "its cosines differ from torch's"
    return None


def exact_keys(n_keys: int, head_dim: int, generator: torch.Generator) -> torch.Tensor:
    """
    Keys of 16 numbers (of one, if ``head_dim`` is less than 16) that are not 0, each a power of 4 or its negative.

    Their norms are powers of 4 and their cosines multiples of 1/16, in all dtypes and in whatever order they are added
    up. Returns float32, shape ``(n_keys, head_dim)``.
    """
    n_numbers = 16 if head_dim >= 16 else 1
    place = torch.rand(n_keys, head_dim, generator=generator).topk(n_numbers, dim=-1).indices
    signs = torch.randint(2, (n_keys, n_numbers), generator=generator) * 2.0 - 1
    lengths = 4.0 ** torch.randint(-3, 4, (n_keys, 1), generator=generator)
    return torch.zeros(n_keys, head_dim).scatter_(1, place, signs * lengths)
