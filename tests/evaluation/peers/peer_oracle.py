# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""kvfold's and GRKV's rules in float64, loop by loop, from their definitions; linear systems alone are NumPy's."""

from __future__ import annotations

import math

import numpy as np


def log_masses(scores: list[float], score_map: str) -> list[float]:
    """Scores of one head as logarithms of masses."""
    if score_map == "log":
        return [math.log(max(score, 1e-30)) for score in scores]
    if score_map == "identity":
        return list(scores)
    mean = math.fsum(scores) / len(scores)
    deviation = math.sqrt(math.fsum((score - mean) ** 2 for score in scores) / (len(scores) - 1))
    return [(score - mean) / max(deviation, 1e-6) for score in scores]


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return math.fsum(a * b) / math.sqrt(math.fsum(a * a) * math.fsum(b * b))


def fold_head(
    keys: np.ndarray, values: np.ndarray, log_mass: list[float], survivors: list[int], evicted: list[int], n_sink: int
) -> tuple[dict[int, np.ndarray], dict[int, float]]:
    """New value and bias of each survivor of one head."""
    takers = [i for i in survivors if i >= n_sink]
    total = dict.fromkeys(survivors, 0.0)
    moved = {i: np.zeros(values.shape[1]) for i in survivors}
    for j in evicted:
        best = max(takers, key=lambda i: (cosine(keys[j], keys[i]), -i))
        weight = math.exp(min(log_mass[j] - log_mass[best], 30.0))
        total[best] += weight
        moved[best] = moved[best] + weight * values[j]
    new = {i: (values[i] + moved[i]) / (1 + total[i]) for i in survivors}
    return new, {i: math.log1p(total[i]) for i in survivors}


def attend(
    queries: np.ndarray, keys: np.ndarray, values: np.ndarray, bias: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Attention weights of each query and output, of one head; ``bias`` is added to the logits, of shape (n, k_len)."""
    weights = np.zeros((len(queries), len(keys)))
    for n, query in enumerate(queries):
        logits = [math.fsum(query * key) + bias[n][i] for i, key in enumerate(keys)]
        largest = max(logits)
        masses = [math.exp(logit - largest) for logit in logits]
        for i, mass in enumerate(masses):
            weights[n, i] = mass / math.fsum(masses)
    output = np.array([sum(weight * value for weight, value in zip(row, values)) for row in weights])
    return weights, output


def free_survivors(survivors: list[int], scores: list[float], k_len: int, window: int, guard: float) -> list[int]:
    """Which survivors of one head may move."""
    before = [i for i in survivors if i < k_len - window]
    best_first = sorted(before, key=lambda i: -scores[i])
    return sorted(best_first[int(guard * len(before)) :])


def grkv(
    heads: list[dict], weight: float, ridge: float, n_iterations: int
) -> tuple[list[np.ndarray], list[np.ndarray], list[float]]:
    """
    New keys and values of the survivors of one layer, without any cap, and the objective of each state.

    Each head has scaled ``queries``, the ``full`` output, ``keys`` and ``values`` of its survivors, and ``free``, the
    places in these lists that may move.
    """
    states = [([head["keys"] for head in heads], [head["values"] for head in heads])]
    new_values = []
    for head in heads:
        none = np.zeros((len(head["queries"]), len(head["keys"])))
        weights, output = attend(head["queries"], head["keys"], head["values"], none)
        columns = math.sqrt(weight) * weights[:, head["free"]]
        lacking = math.sqrt(weight) * (head["full"] - output)
        dual = np.linalg.solve(columns @ columns.T + ridge * np.eye(len(columns)), lacking)
        moved = head["values"].copy()
        moved[head["free"]] += columns.T @ dual
        new_values.append(moved)
    states.append((states[0][0], new_values))

    # The derivative of all outputs by all free keys, a block for each head.
    blocks, lacking = [], []
    for head, values in zip(heads, new_values):
        none = np.zeros((len(head["queries"]), len(head["keys"])))
        weights, output = attend(head["queries"], head["keys"], values, none)
        n, d = head["queries"].shape
        block = np.zeros((n * d, len(head["free"]) * d))
        for row in range(n):
            for column, i in enumerate(head["free"]):
                change = np.outer(values[i] - output[row], head["queries"][row])
                block[row * d : (row + 1) * d, column * d : (column + 1) * d] = weights[row, i] * change
        blocks.append(math.sqrt(weight) * block)
        lacking.append(math.sqrt(weight) * (head["full"] - output).ravel())
    remainder = np.concatenate(lacking)
    dual, direction = np.zeros_like(remainder), remainder
    ends = np.cumsum([len(part) for part in lacking])[:-1]
    for _ in range(n_iterations):
        parts = zip(blocks, np.split(direction, ends))
        applied = np.concatenate([block @ (block.T @ part) for block, part in parts]) + ridge * direction
        step = remainder @ remainder / (direction @ applied)
        dual = dual + step * direction
        rest = remainder - step * applied
        direction = rest + (rest @ rest) / (remainder @ remainder) * direction
        remainder = rest
    new_keys = []
    for head, block, part in zip(heads, blocks, np.split(dual, ends)):
        moved = head["keys"].copy()
        moved[head["free"]] += (block.T @ part).reshape(len(head["free"]), -1)
        new_keys.append(moved)
    states.append((new_keys, new_values))

    objectives = []
    for keys, values in states:
        objective = 0.0
        for head, its_keys, its_values in zip(heads, keys, values):
            none = np.zeros((len(head["queries"]), len(its_keys)))
            _, output = attend(head["queries"], its_keys, its_values, none)
            objective += weight * ((output - head["full"]) ** 2).sum()
            objective += ridge * (((its_keys - head["keys"]) ** 2).sum() + ((its_values - head["values"]) ** 2).sum())
        objectives.append(objective)
    best = objectives.index(min(objectives))
    return *states[best], objectives
