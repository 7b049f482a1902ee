# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Whether the kernels are right on the device: against their naive forms in float64, the CPU, and a second run."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch

from evaluation.gpu.bench import Bench, why_missing
from evaluation.speed.rounds import failure
from evaluation.speed.subjects import DTYPES
from kvpress_merging import AttentionMatchingPress
from kvpress_merging.eviction import Eviction
from kvpress_merging.kernels.blend import Blend, cosine_blend, naive_cosine_blend
from kvpress_merging.kernels.match import attention_match, naive_attention_match
from kvpress_merging.kernels.nearest import naive_nearest_survivors, nearest_survivors

HEAD_DIMS = (64, 128, 256, 33)
EVICTIONS = ("even", "ragged")
N_QUERIES = 24

# A tensor core adds up with a little less than float32's rounding; TF32, which nobody asked for, is 100 times coarser.
COSINE_BOUND = 5e-6
MERGING_BOUNDS = {"float32": 4e-6, "float16": 1e-3, "bfloat16": 8e-3}
MATCHING_BOUNDS = {"float32": 1e-3, "float16": 4e-3, "bfloat16": 3e-2}
"""How far results may be from float64's: cosines; and keys and values, as a share of the largest in their head."""


@dataclass(frozen=True, eq=False)
class Layer:
    """A cache layer before and after an eviction, and reference queries."""

    keys: torch.Tensor
    values: torch.Tensor
    kept_keys: torch.Tensor
    kept_values: torch.Tensor
    queries: torch.Tensor
    eviction: Eviction

    def to(self, where: torch.device | torch.dtype) -> Layer:
        """The same on another device, or its keys and values in another dtype."""
        names = ["keys", "values", "kept_keys", "kept_values"]
        moved = {name: getattr(self, name).to(where) for name in names}
        if isinstance(where, torch.dtype):
            return replace(self, **moved)
        lists = {name: getattr(self.eviction, name).to(where) for name in ("survivors", "slots", "evicted")}
        eviction = replace(self.eviction, **lists)
        return replace(self, **moved, queries=self.queries.to(where), eviction=eviction)

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys and values before, and after."""
        return self.keys, self.values, self.kept_keys, self.kept_values

    @property
    def has_finite_value(self) -> torch.Tensor:
        """Where a value is finite, bool, shape ``(bsz, num_key_value_heads, k_len)``."""
        return self.values.isfinite().all(dim=-1)

    @cached_property
    def naive_merge(self) -> Blend:
        """What the naive form makes of it in float64, but for the cosines, which it takes in float32."""
        return naive_cosine_blend(*self.to(torch.float64).tensors, self.eviction, merge_keys=True)


def random_layer(k_len: int, head_dim: int, dtype: torch.dtype, eviction: str) -> Layer:
    """
    A batch of 2 with 2 heads, on the CPU, whose neighbours resemble each other as a text's do.

    The first head has rows that are not finite, and a zero key, both among the survivors and among the evicted.
    """
    generator = torch.Generator().manual_seed(head_dim)
    shape = (2, 2, k_len, head_dim)
    each_4, each = (torch.randn(2, *shape, generator=generator) for _ in range(2))
    keys, values = (each_4[..., ::4, :].repeat_interleave(4, dim=-2)[..., :k_len, :] + 0.5 * each).to(dtype)
    scores = torch.rand(shape[:3], generator=generator)
    order = scores.argsort(dim=-1)
    kept, gone = order[0, 0, : k_len // 2], order[0, 0, k_len // 2 :]
    for positions in (kept, gone):
        keys[0, 0, positions[0]], values[0, 0, positions[1]], keys[0, 0, positions[2]] = torch.nan, torch.inf, 0
    queries = torch.randn(2, 2, N_QUERIES, head_dim, generator=generator) * head_dim**-0.5
    if eviction == "ragged":
        n_kept = torch.tensor([[k_len // 2, k_len // 3], [k_len // 4, 2 * k_len // 3]])
        is_survivor = order.argsort(dim=-1) < n_kept[..., None]
        return Layer(keys, values, keys, values, queries, Eviction.from_masks(is_survivor, ~is_survivor))
    index = order[..., : k_len // 2]
    kept_keys, kept_values = (rows.gather(2, index[..., None].expand(-1, -1, -1, head_dim)) for rows in (keys, values))
    return Layer(keys, values, kept_keys, kept_values, queries, Eviction.from_kept(index, k_len))


def check_kernels(bench: Bench, kernels: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A row for each kernel, dtype, head_dim and kind of eviction; ``kernels`` are those of the search, or "match"."""
    for (name, dtype), head_dim, eviction in itertools.product(DTYPES.items(), HEAD_DIMS, EVICTIONS):
        cell = {"dtype": name, "head_dim": head_dim, "eviction": eviction}
        if not bench.goes_on():
            yield {"check": "kernels", **cell, "left_out": "no time was left"}
            continue
        layer = random_layer(bench.sizes.check_k_len, head_dim, dtype, eviction)
        for kernel in kernels:
            checks = {"matching": partial(_check_matching, bound=MATCHING_BOUNDS[name])}
            if kernel != "match":
                search = partial(_check_search, kernel=kernel)
                checks = {
                    "search": search,
                    "merging": partial(_check_merging, kernel=kernel, bound=MERGING_BOUNDS[name]),
                }
            for check, function in checks.items():
                row = {"check": check, "kernel": kernel, **cell}
                try:
                    yield {**row, **function(layer, layer.to(bench.device))}
                except Exception as error:
                    yield {**row, **why_missing(failure(error))}


def _check_search(layer: Layer, there: Layer, kernel: str) -> dict[str, Any]:
    def search(layer: Layer, kernel: str) -> tuple[torch.Tensor, ...]:
        return nearest_survivors(layer.keys, layer.has_finite_value, layer.eviction, kernel=kernel)

    found, again, here = search(there, kernel), search(there, kernel), search(layer, "torch")
    cosine, target = (part.cpu() for part in found)
    exact = _exact_cosines(layer)
    best = exact.amax(dim=-1)
    is_found = best.isfinite()
    if not torch.equal(cosine.isfinite(), is_found):
        return {"right": False, "failed": "it finds a survivor where there is none, or none where there is one"}
    # What is found must be as near as the nearest, and said to be as near as it is.
    of_target = exact.gather(-1, target[..., None])[..., 0]
    worst = max(float((part - best)[is_found].abs().max()) for part in (cosine, of_target))
    to_cpu = float((cosine - here[0])[is_found].abs().max())
    return _judged(worst, to_cpu, COSINE_BOUND, found, again)


def _exact_cosines(layer: Layer) -> torch.Tensor:
    """Of each evicted position with each survivor, float64, shape ``(..., n_evicted, n_survivors)``; -inf for none."""
    is_usable = layer.has_finite_value & layer.keys.isfinite().all(dim=-1)
    rows = torch.where(is_usable[..., None], layer.keys.double(), 0.0)
    unit = rows / rows.norm(dim=-1, keepdim=True).clamp(min=1e-300)

    def listed(positions: torch.Tensor, which: int) -> tuple[torch.Tensor, torch.Tensor]:
        is_listed = is_usable.gather(-1, positions)
        if layer.eviction.counts is not None:
            counts = torch.tensor(layer.eviction.counts).view(*positions.shape[:2], 2)[..., which, None]
            is_listed = is_listed & (torch.arange(positions.shape[-1]) < counts)
        return unit.gather(2, positions[..., None].expand(-1, -1, -1, unit.shape[-1])), is_listed

    (survivors, may_take), (evicted, may_go) = listed(layer.eviction.survivors, 0), listed(layer.eviction.evicted, 1)
    is_pair = may_go[..., :, None] & may_take[..., None, :]
    return (evicted @ survivors.mT).masked_fill(~is_pair, -torch.inf)


def _check_merging(layer: Layer, there: Layer, kernel: str, bound: float) -> dict[str, Any]:
    def merge(layer: Layer, kernel: str) -> tuple[torch.Tensor, torch.Tensor]:
        blend = cosine_blend(*layer.tensors, layer.eviction, merge_keys=True, kernel=kernel)
        return blend.keys, blend.values

    merged, again, here = merge(there, kernel), merge(there, kernel), merge(layer, "torch")
    naive = layer.naive_merge
    # Where two survivors are as near as float32 can tell, either is right: what was merged elsewhere is not compared.
    _, ours = nearest_survivors(there.keys, there.has_finite_value, there.eviction, kernel=kernel)
    _, theirs = naive_nearest_survivors(layer.keys, layer.has_finite_value, layer.eviction)
    is_elsewhere = torch.zeros(merged[0].shape[:3], dtype=torch.bool)
    for target in (ours.cpu(), theirs):
        slots = layer.eviction.slots.gather(-1, target)
        is_elsewhere.scatter_reduce_(-1, slots, ours.cpu() != theirs, "amax")
    worst, to_cpu = (
        max(_deviation(a, b, is_elsewhere) for a, b in zip(merged, others))
        for others in ((naive.keys, naive.values), here)
    )
    return _judged(worst, to_cpu, bound, merged, again) | {"ties": int(is_elsewhere.sum())}


def _check_matching(layer: Layer, there: Layer, bound: float) -> dict[str, Any]:
    def match(layer: Layer, function: Callable[..., Any] = attention_match) -> tuple[torch.Tensor, ...]:
        ridge = AttentionMatchingPress.key_ridge
        result = function(*layer.tensors, layer.queries, layer.queries, layer.eviction, key_ridge=ridge)
        return result.keys, result.values, result.is_fitted

    matched, again, here = match(there), match(there), match(layer)
    naive = match(layer.to(torch.float64), naive_attention_match)
    if not torch.equal(matched[2].cpu(), naive[2]):
        return {"right": False, "failed": "other heads take the fit than those that the naive form has take it"}
    nowhere = torch.zeros(matched[0].shape[:3], dtype=torch.bool)
    worst, to_cpu = (
        max(_deviation(a, b, nowhere) for a, b in zip(matched[:2], others[:2])) for others in (naive, here)
    )
    return _judged(worst, to_cpu, bound, matched, again) | {"fitted": int(naive[2].sum())}


def _deviation(ours: torch.Tensor, theirs: torch.Tensor, is_left_out: torch.Tensor) -> float:
    """The largest difference, as a share of the largest finite number of its head; what is not finite has to agree."""
    ours, theirs = ours.cpu().double(), theirs.double()
    if not torch.equal(ours.isfinite(), theirs.isfinite()):
        raise ValueError("numbers are finite that should not be, or the other way round")
    ours, theirs = ours.nan_to_num(0, 0, 0), theirs.nan_to_num(0, 0, 0)
    difference = (ours - theirs).abs().masked_fill(is_left_out[..., None], 0)
    return float((difference.amax(dim=(-1, -2)) / theirs.abs().amax(dim=(-1, -2)).clamp(min=1e-300)).max())


def _judged(
    worst: float, to_cpu: float, bound: float, one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]
) -> dict[str, Any]:
    same_bits = all(torch.equal(_bits(a), _bits(b)) for a, b in zip(one, other))
    is_right = worst <= bound and to_cpu <= 2 * bound and same_bits
    return {"right": is_right, "worst": worst, "worst_to_cpu": to_cpu, "bound": bound, "same_bits": same_bits}


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)
