# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""
The cosine blend of one head as plain loops over Python floats (float64), written from its definition.

It comes in stages, so that a test can judge each stage by what the code under test really handed it: two cosines may
differ by less than float32 can tell, and then either survivor is right.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

Row = Sequence[float]


def is_finite(row: Row) -> bool:
    return all(math.isfinite(number) for number in row)


def norm(row: Row) -> float:
    return math.hypot(*row)


def cosine(a: Row, b: Row) -> float:
    """Cosine of two finite rows; 0 if either is zero."""
    largest_a, largest_b = max(map(abs, a)), max(map(abs, b))
    if largest_a == 0 or largest_b == 0:
        return 0.0
    a, b = [x / largest_a for x in a], [x / largest_b for x in b]
    return math.fsum(x * y for x, y in zip(a, b)) / (norm(a) * norm(b))


def cosines(
    keys: Sequence[Row], values: Sequence[Row], survivors: Sequence[int], evicted: Sequence[int]
) -> list[list[float]]:
    """Cosine of each evicted position with each survivor; -inf where the two may not merge."""
    usable = [is_finite(key) and is_finite(value) for key, value in zip(keys, values)]
    return [[cosine(keys[i], keys[j]) if usable[i] and usable[j] else -math.inf for j in survivors] for i in evicted]


def nearest(cosines_of_one: Sequence[float]) -> tuple[float, int]:
    """Largest cosine of one evicted position and the first survivor that reaches it; (-inf, 0) without a survivor."""
    best, target = -math.inf, 0
    for j, candidate in enumerate(cosines_of_one):
        if candidate > best:
            best, target = candidate, j
    return best, target


def select(
    similarity: Sequence[float],
    target: Sequence[int],
    similarity_threshold: float,
    merge_fraction: float,
    max_merge_per_token: int,
) -> list[bool]:
    """The gates, one after the other; positions come in ascending order."""
    left = [i for i, s in enumerate(similarity) if math.isfinite(s) and s >= similarity_threshold]
    most_similar_first = sorted(left, key=lambda i: (-similarity[i], i))
    most_similar_first = most_similar_first[: round(merge_fraction * len(left))]
    taken: dict[int, int] = defaultdict(int)
    chosen = set()
    for i in most_similar_first:
        if max_merge_per_token == 0 or taken[target[i]] < max_merge_per_token:
            taken[target[i]] += 1
            chosen.add(i)
    return [i in chosen for i in range(len(similarity))]


def merge_weight(similarity: float, evicted_value: Row, target_value: Row, value_norm_weighting: bool) -> float:
    weight = max(similarity, 0.0)
    if value_norm_weighting:
        evicted_norm, target_norm = norm(evicted_value), norm(target_value)
        weight *= evicted_norm / (evicted_norm + target_norm) if evicted_norm > 0 else 0.0
    return weight


def blend(row: Row, merged: Sequence[tuple[float, Row]]) -> list[float]:
    """``(r_j + sum w_i r_i) / (1 + sum w_i)`` for one survivor and the (w_i, r_i) that go to it."""
    total = 1 + math.fsum(weight for weight, _ in merged)
    # Each weight is divided first: a sum of values near 1e308 is of no concern in float64, but loses nothing either.
    return [
        math.fsum([row[d] / total, *(weight / total * other[d] for weight, other in merged)]) for d in range(len(row))
    ]
