# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""
What stands for what, once positions are evicted: which positions are the centres of clusters, and the nearest centre
of each other position, by a search that is linear in the context.
"""

from __future__ import annotations

import numpy as np
import torch

from kvpress_merging.kernels.rows import block_bytes, first_max, gather_rows, on_device

WINDOW = 256
"""Centres among which a position looks for the nearest: about half of them before it, half behind."""

BLOCK = WINDOW // 2
"""Neighbouring positions that share a window, at most."""

MIN_GAIN = 2.0
"""A position that takes a place is at least so many times as far from every survivor as its owner from the next."""


def block_length(n_centres: int, n_positions: int) -> int:
    """Neighbouring positions that share a window: as many as lie within the middle half of it, a power of 2."""
    fitting = max(1, BLOCK * n_positions // max(1, n_centres))
    return min(BLOCK, 1 << (fitting.bit_length() - 1))


def points_of(
    keys: torch.Tensor, values: torch.Tensor, key_metric: torch.Tensor, value_scale: torch.Tensor
) -> torch.Tensor:
    """
    Points that are ``sqrt((k - k')^T key_metric (k - k') + |value_scale (v - v')|^2)`` apart.

    Parameters
    ----------
    keys, values : torch.Tensor
        Float32, shapes ``(n_heads, n_rows, head_dim)`` and ``(n_heads, n_rows, value_dim)``.
    key_metric : torch.Tensor
        Float32, shape ``(n_heads, head_dim, head_dim)``, symmetric and positive definite.
    value_scale : torch.Tensor
        Float32, shape ``(n_heads, 1, 1)``.

    Returns
    -------
    torch.Tensor
        Float32, shape ``(n_heads, n_rows, head_dim + value_dim)``.
    """
    root = torch.linalg.cholesky_ex(key_metric).L
    return torch.cat([torch.bmm(keys, root), values * value_scale], dim=-1)


def clusters(
    points: torch.Tensor,
    is_nowhere: torch.Tensor,
    survivors: torch.Tensor,
    counts: np.ndarray,
    length: int,
    *,
    exchange: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Which survivor is to stand for each position.

    Survivors are the centres of clusters, but for some that are almost the same as another: a survivor is spare if the
    nearest other lies before it. The spare one that is nearest to its other gives its place to the evicted position
    that is farthest from every survivor, the next to the next farthest, and so on, as long as that is :data:`MIN_GAIN`
    times as far. Then each position without a place is counted to the centre nearest to it.

    Parameters
    ----------
    points : torch.Tensor
        As :func:`points_of` gives them, of a multiple of :data:`BLOCK` rows, the last of which is nowhere.
    is_nowhere : torch.Tensor
        Which rows are neither survivors nor evicted: bool, shape ``(n_heads, n_rows)``.
    survivors : torch.Tensor
        Their rows, ascending, then, for a head that has fewer, some row that is nowhere: int64, shape
        ``(n_heads, max_survivors)``.
    counts : numpy.ndarray
        How many survivors and evicted positions each head has, int64, shape ``(n_heads, 2)``.
    length : int
        How many positions that have no place share a window, see :func:`block_length`.
    exchange : bool
        Whether places are given away.

    Returns
    -------
    place : torch.Tensor
        Which of the survivors of all heads laid end to end stands for each row, int64, shape ``(n_heads, n_rows)``;
        ``n_heads * max_survivors``, or any, where the row is nowhere.
    n_exchanged : torch.Tensor
        How many survivors of each head gave their place away, int64, shape ``(n_heads,)``.
    """
    (n_heads, n_rows, _), n_places, device = points.shape, survivors.shape[1], points.device
    n_centres, n_others = counts.T
    # Rows, like places, are numbered through from the first head's to the last one's.
    row = torch.arange(n_heads * n_rows, device=device).view(n_heads, n_rows)
    nowhere, none = row[:, -1:], n_heads * n_places
    number = torch.arange(none, device=device).view(n_heads, n_places)
    place = torch.full_like(row, none).scatter_(1, survivors, number).masked_fill_(is_nowhere, none)
    has_place = place < none
    square = torch.linalg.vector_norm(points, dim=-1).square_().masked_fill_(is_nowhere, torch.inf)
    centres = survivors + row[:, :1]
    if not exchange:
        n_exchanged = torch.zeros(n_heads, dtype=torch.int64, device=device)
    else:
        n_asked = np.full_like(n_others, n_rows)
        nearest = nearest_nearby(points, square, centres, n_centres, row, n_asked, BLOCK, others=True)
        distance = torch.linalg.vector_norm(gather_rows(points, nearest).sub_(points), dim=-1)
        is_needed = ~has_place | (nearest >= row)
        apart, spare = distance.masked_fill(is_needed, torch.inf).sort(dim=1, stable=True)
        away, far = distance.masked_fill(is_nowhere | has_place, 0.0).sort(dim=1, descending=True, stable=True)
        gains = away > MIN_GAIN * apart
        # What gains nothing goes nowhere.
        spare, far = (some.masked_fill_(~gains, n_rows - 1) for some in (spare, far))
        place.scatter_(1, far, place.gather(1, spare)).scatter_(1, spare, none)
        has_place, n_exchanged = place < none, gains.sum(dim=1)
        centres = torch.where(has_place, row, nowhere).sort(dim=1).values[:, :n_places].contiguous()

    n_padded = -(-int(n_others.max()) // length) * length
    others = torch.where(is_nowhere | has_place, nowhere, row).sort(dim=1).values[:, :n_padded]
    nearest = nearest_nearby(points, square, centres, n_centres, others, n_others, length)
    place.view(-1).scatter_(0, others.flatten(), gather_rows(place, nearest).flatten())
    return place, n_exchanged


def nearest_nearby(
    points: torch.Tensor,
    square: torch.Tensor,
    centres: torch.Tensor,
    n_centres: np.ndarray,
    positions: torch.Tensor,
    n_positions: np.ndarray,
    length: int,
    *,
    others: bool = False,
) -> torch.Tensor:
    """
    For each position, the nearest of the centres near it in the context.

    Near are :data:`WINDOW` centres around a block of neighbouring positions, so the cost is linear in the context;
    where there are no more centres than that, the search is exact.

    Parameters
    ----------
    points : torch.Tensor
        As :func:`clusters` takes them.
    square : torch.Tensor
        Square of their norms, infinite nowhere, float32, shape ``(n_heads, n_rows)``.
    centres, positions : torch.Tensor
        Rows of all heads laid end to end, those of a head ascending, then some that are nowhere: int64, shapes
        ``(n_heads, max_centres)`` and ``(n_heads, max_positions)``.
    n_centres, n_positions : numpy.ndarray
        How many of both each head has, int64, shape ``(n_heads,)``.
    length : int
        Positions of a block, see :func:`block_length`, which ``max_positions`` is a multiple of.
    others : bool
        Whether positions may be centres, which then look for another.

    Returns
    -------
    torch.Tensor
        The centre, a row of all heads laid end to end, int64, shape ``(n_heads, max_positions)``. Where there is no
        centre, or no other, some row of the head.
    """
    n_places, n_channels, device = centres.shape[1], points.shape[2], points.device
    window = min(WINDOW, n_places)
    middle = np.minimum(np.arange(length // 2, positions.shape[1], length), (n_positions[:, None] - 1).clip(0))
    half = WINDOW // 2
    last = on_device((n_centres - window).clip(0)[:, None] + half, device)
    centre = torch.searchsorted(centres, positions.gather(1, on_device(middle, device))).clamp_(min=half).minimum(last)
    around = centre[..., None] + torch.arange(-half, window - half, device=device)
    near, blocks = centres.gather(1, around.flatten(1)).view(-1, window), positions.reshape(-1, length)

    found = []
    at_once = max(1, block_bytes(device) // (4 * window * (n_channels + length)))
    for some_near, some in zip(near.split(at_once), blocks.split(at_once)):
        # The distance of x to y is smallest where x^T y - |y|^2 / 2 is largest.
        closeness = torch.baddbmm(
            gather_rows(square, some_near)[..., None],
            gather_rows(points, some_near),
            gather_rows(points, some).mT,
            beta=-0.5,
        )
        if others:
            closeness.masked_fill_(some_near[..., None] == some[:, None], -torch.inf)
        found.append(some_near.gather(1, first_max(closeness)[1]))
    return torch.cat(found).view(positions.shape)


def naive_clusters(
    keys: torch.Tensor,
    values: torch.Tensor,
    survivors: torch.Tensor,
    evicted: torch.Tensor,
    key_metric: torch.Tensor,
    value_scale: torch.Tensor,
    length: int,
    *,
    exchange: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    :func:`clusters` for one head, one position after the other.

    Returns the position that has each survivor's place, and of every position of the context which survivor stands for
    it, -1 if it is neither of both.
    """
    has_place, positions = survivors.tolist(), torch.cat([survivors, evicted]).sort().values.tolist()

    def nearest(position: int, middle: int) -> tuple[int, float]:
        """The nearest other of the centres around, and how far it is."""
        centres = torch.tensor(sorted(has_place))
        start = max(0, min(int((centres < middle).sum()) - WINDOW // 2, len(centres) - WINDOW))
        centres = centres[start : start + WINDOW]
        of_keys, of_values = keys[centres] - keys[position], values[centres] - values[position]
        square = ((of_keys @ key_metric) * of_keys).sum(dim=-1) + (value_scale * of_values).square().sum(dim=-1)
        square[centres == position] = torch.inf
        return int(centres[square.argmin()]), float(square.min().sqrt())

    if exchange:
        found = {position: nearest(position, position - position % BLOCK + BLOCK // 2) for position in positions}
        spare = sorted((j for j in has_place if found[j][0] < j), key=lambda j: found[j][1])
        far = sorted((i for i in positions if i not in has_place), key=lambda i: -found[i][1])
        exchanged = [(j, i) for j, i in zip(spare, far) if found[i][1] > MIN_GAIN * found[j][1]]
        for j, i in exchanged:
            has_place[has_place.index(j)] = i
    place = torch.full((len(keys),), -1)
    place[has_place] = torch.arange(len(has_place))
    others = [position for position in positions if position not in has_place]
    for number, position in enumerate(others):
        middle = others[min(number - number % length + length // 2, len(others) - 1)]
        place[position] = has_place.index(nearest(position, middle)[0])
    return torch.tensor(has_place), place
