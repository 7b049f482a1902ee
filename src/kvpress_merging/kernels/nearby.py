# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""
What stands for what, once positions are evicted: which positions are the centres of clusters, and the nearest centre
of each other position, by a search that is linear in the context.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from kvpress_merging.kernels.rows import block_bytes, first_max, flat_rows, gather_rows, on_device

WINDOW = 256
"""Centres among which a position looks for the nearest: about half of them before it, half behind."""

BLOCK = WINDOW // 2
"""Neighbouring positions that share a window, at most."""

MIN_GAIN = 4.0
"""
How many times as far from every survivor, squared, a position is that takes the place of one, as that one is from the
nearest other: twice the distance.
"""


class Metric(NamedTuple):
    """
    How far two positions are apart: ``(k - k')^T keys (k - k') + values |v - v'|^2``, squared.

    Float32, shapes ``(n_heads, head_dim, head_dim)``, symmetric and positive definite, and ``(n_heads, 1, 1)``, at
    least 0.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def times(self, rows: torch.Tensor) -> torch.Tensor:
        """What the inner product with a row is by this metric, of keys and values side by side."""
        keys, values = rows[..., : self.keys.shape[1]], rows[..., self.keys.shape[1] :]
        return torch.cat([torch.bmm(keys, self.keys), values * self.values], dim=-1)


def block_length(n_centres: int, n_positions: int) -> int:
    """Neighbouring positions that share a window: as many as lie within the middle half of it, a power of 2."""
    fitting = max(1, BLOCK * n_positions // max(1, n_centres))
    return min(BLOCK, 1 << (fitting.bit_length() - 1))


def clusters(
    rows: torch.Tensor,
    is_nowhere: torch.Tensor,
    survivors: torch.Tensor,
    counts: np.ndarray,
    metric: Metric,
    length: int,
    *,
    exchange: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Which survivor is to stand for each position.

    Survivors are the centres of clusters, but for some that are almost the same as another: a survivor is spare if the
    nearest other lies before it. The spare one that is nearest to its other gives its place to the evicted position
    that is farthest from every survivor, the next to the next farthest, and so on, as long as that is :data:`MIN_GAIN`
    times as far, squared. Then each position without a place is counted to the centre nearest to it.

    Parameters
    ----------
    rows : torch.Tensor
        A key and its value side by side: float32, shape ``(n_heads, n_rows, head_dim + value_dim)``.
    is_nowhere : torch.Tensor
        Which rows are neither survivors nor evicted, among them the last one, and zeros: bool, shape
        ``(n_heads, n_rows)``. There are a multiple of :data:`BLOCK` rows.
    survivors : torch.Tensor
        Positions, ascending, then, for a head that has fewer, whatever: int64, shape ``(n_heads, max_survivors)``.
    counts : numpy.ndarray
        How many survivors and evicted positions each head has, int64, shape ``(n_heads, 2)``.
    metric : Metric
        Of distances.
    length : int
        How many positions that have no place share a window, see :func:`block_length`.
    exchange : bool
        Whether places are given away.

    Returns
    -------
    place : torch.Tensor
        The survivor in ``survivors`` of its head that stands for a position, int64, shape ``(n_heads, n_rows)``; some
        survivor, or ``max_survivors``, where there is none or no position.
    n_exchanged : torch.Tensor
        How many survivors of each head gave their place away, int64, shape ``(n_heads,)``.
    """
    (n_heads, n_rows, _), n_places, device = rows.shape, survivors.shape[1], rows.device
    n_centres, n_others = counts.T
    nowhere = n_rows - 1
    row, number = (torch.arange(n, device=device).expand(n_heads, n) for n in (n_rows, n_places))
    centres = survivors.masked_fill(number >= on_device(n_centres[:, None], device), nowhere)
    place = torch.full((n_heads, n_rows), n_places, device=device).scatter_(1, centres, number)
    place[:, nowhere] = n_places
    has_place = place < n_places
    measured = metric.times(rows)
    square = (rows * measured).sum(dim=-1)
    square[:, nowhere] = torch.inf

    n_exchanged = torch.zeros(n_heads, dtype=torch.int64, device=device)
    if exchange:
        n_asked = np.full_like(n_others, n_rows)
        nearest = nearest_nearby(rows, measured, square, centres, n_centres, row, n_asked, BLOCK, others=True)
        as_measured = gather_rows(measured, nearest).sub_(measured)
        distance = gather_rows(rows, nearest).sub_(rows).mul_(as_measured).sum(dim=-1)
        is_needed = ~has_place | (nearest >= flat_rows(row, n_rows))
        apart, spare = distance.masked_fill(is_needed, torch.inf).sort(dim=1, stable=True)
        away, far = distance.masked_fill(is_nowhere | has_place, 0.0).sort(dim=1, descending=True, stable=True)
        gains = away > MIN_GAIN * apart
        # What gains nothing goes nowhere.
        spare, far = (some.masked_fill_(~gains, nowhere) for some in (spare, far))
        place.scatter_(1, far, place.gather(1, spare)).scatter_(1, spare, n_places)
        has_place, n_exchanged = place < n_places, gains.sum(dim=1)
        centres = row.masked_fill(~has_place, nowhere).sort(dim=1).values[:, :n_places].contiguous()

    n_padded = -(-int(n_others.max()) // length) * length
    others = row.masked_fill(is_nowhere | has_place, nowhere).sort(dim=1).values[:, :n_padded]
    nearest = nearest_nearby(rows, measured, square, centres, n_centres, others, n_others, length)
    return place.scatter_(1, others, gather_rows(place, nearest)), n_exchanged


def nearest_nearby(
    rows: torch.Tensor,
    measured: torch.Tensor,
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
    For each position, the centre with the nearest key and value among those near it in the context.

    Near are :data:`WINDOW` centres around a block of neighbouring positions, so the cost is linear in the context;
    where there are no more centres than that, the search is exact.

    Parameters
    ----------
    rows : torch.Tensor
        As :func:`clusters` takes them.
    measured, square : torch.Tensor
        What :meth:`Metric.times` makes of the rows, and the inner product of both, infinite for the last row.
    centres, positions : torch.Tensor
        Ascending, then the last row, int64, shapes ``(n_heads, max_centres)`` and ``(n_heads, max_positions)``.
    n_centres, n_positions : numpy.ndarray
        How many of both each head has, int64, shape ``(n_heads,)``.
    length : int
        Positions of a block, see :func:`block_length`, which ``max_positions`` is a multiple of.
    others : bool
        Whether positions may be centres, which then look for another.

    Returns
    -------
    torch.Tensor
        The centre's row, in rows of all heads laid end to end, int64, shape ``(n_heads, max_positions)``. Where there
        is no centre, or no other, some row of the head.
    """
    (n_heads, n_rows, n_channels), n_places, device = rows.shape, centres.shape[1], rows.device
    window = min(WINDOW, n_places)
    middle = np.minimum(np.arange(length // 2, positions.shape[1], length), (n_positions[:, None] - 1).clip(0))
    last = on_device((n_centres - window).clip(0)[:, None], device)
    start = torch.searchsorted(centres, positions.gather(1, on_device(middle, device)))
    start = start.sub_(WINDOW // 2).clamp_(min=0).minimum(last)[..., None] + torch.arange(window, device=device)
    first = torch.arange(0, n_heads * n_rows, n_rows, device=device)[:, None]
    near = (centres.gather(1, start.flatten(1)) + first).view(-1, window)
    blocks = (positions + first).view(-1, length)

    found = []
    at_once = max(1, block_bytes(device) // (4 * window * (n_channels + length)))
    for some_near, some in zip(near.split(at_once), blocks.split(at_once)):
        # The distance of x to y is smallest where x^T M y - y^T M y / 2 is largest.
        closeness = torch.baddbmm(
            gather_rows(square, some_near)[..., None],
            gather_rows(measured, some_near),
            gather_rows(rows, some).mT,
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
    value_metric: torch.Tensor,
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
        distance = ((of_keys @ key_metric) * of_keys).sum(dim=-1) + value_metric * of_values.square().sum(dim=-1)
        distance[centres == position] = torch.inf
        return int(centres[distance.argmin()]), float(distance.min())

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
