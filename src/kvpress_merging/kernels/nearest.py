# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""
For each evicted position, the survivor whose key is most alike: a maximum inner product search on unit keys.

The matrix of all cosines grows with the square of the context, so :func:`nearest_survivors` holds one tile of it at a
time and keeps of each tile only the best survivor per evicted position. :func:`naive_nearest_survivors` says the same
in a few lines, with the whole matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

import torch

from kvpress_merging.eviction import Eviction
from kvpress_merging.kernels import tiles
from kvpress_merging.kernels.buckets import is_padding, on_device
from kvpress_merging.kernels.products import ScaledKeys, full_precision, without_autocast
from kvpress_merging.kernels.rows import DEFAULT_TILE_BYTES, first_rows, head_blocks, row_norms
from kvpress_merging.kernels.trial import serves

KERNELS = ("auto", "torch", "triton")
"""
The allowed values of ``kernel``: ``"torch"`` holds one tile of cosines at a time, ``"triton"`` none (see
``nearest_triton.py``). ``"auto"`` takes the second on CUDA, where it is there and agrees with the first.
"""


def naive_nearest_survivors(
    keys: torch.Tensor, has_finite_value: torch.Tensor, eviction: Eviction
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The whole matrix of cosines, head by head: :func:`nearest_survivors` as one would write it down.

    Products are summed pair by pair, not by BLAS, so that equal keys tie whatever the shapes.
    """
    similarity = torch.full(eviction.evicted.shape, -torch.inf, dtype=torch.float32, device=keys.device)
    target = torch.zeros_like(eviction.evicted)
    for b, heads, n_survivors, n_evicted in head_blocks(eviction, heads_per_block=1):
        h = heads.start
        survivors, evicted = eviction.survivors[b, h, :n_survivors], eviction.evicted[b, h, :n_evicted]
        if n_survivors == 0 or n_evicted == 0:
            continue
        rows = keys[b, h].float()
        usable = rows.isfinite().all(dim=-1) & has_finite_value[b, h]
        unit = rows / rows.abs().amax(dim=-1, keepdim=True)
        unit = (unit / unit.norm(dim=-1, keepdim=True)).nan_to_num(0.0)

        cosine = (unit[evicted, None] * unit[survivors]).sum(dim=-1)
        cosine = cosine.masked_fill(~usable[evicted, None] | ~usable[survivors], -torch.inf)
        similarity[b, h, :n_evicted], target[b, h, :n_evicted] = cosine.max(dim=-1)
    return similarity, target


@torch.no_grad()
def nearest_survivors(
    keys: torch.Tensor,
    has_finite_value: torch.Tensor,
    eviction: Eviction,
    *,
    tile_bytes: int = DEFAULT_TILE_BYTES,
    kernel: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    For each evicted position, its most cosine-similar survivor of the same head.

    ``similarity_i = max_j cos(k_i, k_j)`` over the survivors j, in float32 on rows scaled by their largest magnitude; a
    zero key has cosine 0 with everything. The survivor at the lowest position wins a tie. A survivor whose key or value
    is not finite is never chosen; an evicted position whose key or value is not finite, and every position of a head
    without a survivor to choose, gets similarity -inf. Neither depends on the tile, beyond float32 rounding.

    16-bit keys on CUDA are multiplied as they are and added up in float32, all others as float32 by IEEE's rules: the
    user's settings for TF32 and the like change nothing (see ``products.py``).

    Needs, besides its result, a copy of the survivors' keys of one head (of several where they are small) in the dtype
    that is multiplied, and one tile. Reads nothing back from the device, but for the one small trial by which
    ``"auto"`` decides on a kernel. The same input gives the same bits on every run, on CUDA as far as cuBLAS promises
    it: on one kind of GPU, on one stream.

    Parameters
    ----------
    keys : torch.Tensor
        The layer's keys before the eviction, shape ``(bsz, num_key_value_heads, k_len, head_dim)``, any float dtype.
    has_finite_value : torch.Tensor
        Where the value beside the key is finite, bool, shape ``(bsz, num_key_value_heads, k_len)``.
    eviction : Eviction
        Which positions survived and which were evicted.
    tile_bytes : int
        Most bytes that one tile of cosines takes; a tile has at least 16 x 16 cosines.
    kernel : str
        One of :data:`KERNELS`.

    Returns
    -------
    similarity : torch.Tensor
        float32, shape ``(bsz, num_key_value_heads, n_evicted)``; -inf in padding.
    target : torch.Tensor
        Index into ``eviction.survivors`` of the same head, int64, same shape; 0 where the similarity is -inf.

    Raises
    ------
    ValueError
        If ``tile_bytes`` is below 1, ``kernel`` is not one of :data:`KERNELS`, or it is ``"triton"`` where Triton
        cannot run.
    """
    value_norm = torch.zeros(has_finite_value.shape, dtype=torch.float64, device=keys.device)
    found = find_nearest(
        keys, value_norm.masked_fill_(~has_finite_value, torch.inf), eviction, tile_bytes=tile_bytes, kernel=kernel
    )
    similarity = found.similarity
    return similarity, found.target.masked_fill(similarity == -torch.inf, 0)


@dataclass(frozen=True, eq=False)
class Found:
    """
    What a search found, before anybody asked where it found nothing.

    All tensors have the shape ``(bsz, num_key_value_heads, n_evicted)`` but ``flat``.

    Parameters
    ----------
    cosine : torch.Tensor
        Of each evicted position with its nearest survivor, float32; of no meaning where ``norm_sum`` is not finite.
    target : torch.Tensor
        Index into ``eviction.survivors`` of that survivor, int64.
    norm, norm_sum : torch.Tensor
        Norm of the evicted value, and the sum of that and of the survivor's, float64. The second is not finite where
        either position has a key or value that is not, and in padding.
    flat : torch.Tensor
        Where survivors and then evicted positions stand among those of all heads laid end to end, int64, shape
        ``(bsz * num_key_value_heads, n_survivors + n_evicted)``. One that is not finite, and padding, is stood in for
        by a survivor that is, if the head has any.
    """

    cosine: torch.Tensor
    target: torch.Tensor
    norm: torch.Tensor
    norm_sum: torch.Tensor
    flat: torch.Tensor

    @property
    def similarity(self) -> torch.Tensor:
        """The cosine, -inf where there is none."""
        return torch.where(self.norm_sum < torch.inf, self.cosine, -torch.inf)


def find_nearest(
    keys: torch.Tensor, value_norm: torch.Tensor, eviction: Eviction, *, tile_bytes: int, kernel: str
) -> Found:
    """
    :func:`nearest_survivors`, with what it finds on the way.

    What may not be chosen is marked in the norms of the values: the norm of a key, times 0, is added to them. The
    survivors that may not be chosen are then stood in for by the lowest of the head that may. Such a copy can only tie
    with the original, and where it stands before it, the original is meant. Padding is made of the same copies.

    Parameters
    ----------
    keys, eviction, tile_bytes, kernel
        See :func:`nearest_survivors`.
    value_norm : torch.Tensor
        As :func:`row_norms` returns it. Overwritten.
    """
    if tile_bytes < 1:
        raise ValueError(f"tile_bytes must be at least 1, got {tile_bytes}")
    if kernel not in KERNELS:
        raise ValueError(f"kernel must be one of {', '.join(map(repr, KERNELS))}, got {kernel!r}")
    if kernel == "triton":
        _check_triton_runs(keys)

    shape, device = eviction.evicted.shape, keys.device
    n_heads, k_len = shape[0] * shape[1], keys.shape[2]
    n_survivors, n_evicted = eviction.survivors.shape[-1], shape[-1]
    if eviction.n_survivors == 0 or eviction.n_evicted == 0:
        nothing = torch.full(shape, torch.nan, dtype=torch.float64, device=device)
        target = torch.zeros_like(eviction.evicted)
        return Found(nothing.float(), target, nothing, nothing, target.view(n_heads, n_evicted))

    key_norm = row_norms(keys)
    positions = eviction.positions
    norm = value_norm.add_(key_norm, alpha=0).gather(-1, positions)
    if eviction.counts is not None:
        is_nothing = on_device(is_padding(eviction.counts, n_survivors, n_evicted), device)
        norm.masked_fill_(is_nothing.view(norm.shape), torch.inf)
    norm_of_survivors, norm_of_evicted = norm[..., :n_survivors], norm[..., n_survivors:]
    is_usable = (norm < torch.inf).view(n_heads, -1)
    lowest = is_usable[:, :n_survivors].view(torch.uint8).argmax(dim=-1, keepdim=True)
    flat = positions.view(n_heads, -1) + first_rows(n_heads, k_len, device)
    flat = torch.where(is_usable, flat, flat.gather(-1, lowest))

    scaled = ScaledKeys.of(keys.flatten(0, 1), key_norm.flatten(0, 1))
    with full_precision(), without_autocast(device):
        search = tiles.search
        if kernel == "triton" or (kernel == "auto" and takes_triton(keys)):
            from kvpress_merging.kernels import nearest_triton

            search = nearest_triton.search
        cosine, index = search(scaled, flat, n_survivors, eviction.counts, tile_bytes)
    target = torch.maximum(index, lowest).view(shape)
    norm_sum = norm_of_survivors.gather(-1, target).add_(norm_of_evicted)
    return Found(cosine.view(shape), target, norm_of_evicted, norm_sum, flat)


def _check_triton_runs(keys: torch.Tensor) -> None:
    """Raise a ValueError that says why the Triton kernel cannot search these keys, if it cannot."""
    if find_spec("triton") is None:
        raise ValueError("kernel='triton' needs triton, which is not installed; use kernel='torch'")
    from kvpress_merging.kernels import nearest_triton

    nearest_triton.check_runs(keys.device, keys.shape[-1])


def takes_triton(keys: torch.Tensor) -> bool:
    """Whether ``"auto"`` takes the Triton kernel. Triton is imported only where it may serve."""
    if keys.device.type != "cuda" or find_spec("triton") is None:
        return False
    return serves(keys.device, keys.dtype, keys.shape[-1], nearest_survivors)
