# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""
One cache layer while a press works on it: what it held before, what the press left, and how to write the merge back.

``open`` puts traced tensors where the press reads. ``commit`` ends that and leaves what the press did, with new values
(and keys) where they are given; to put a layer back as it was, take an ``undo.Snapshot`` of it before it is opened.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    QuantizedLayer,
    StaticLayer,
)

from kvpress_merging.following.tracing import (
    TracedTensor,
    has_foreign_rows,
    is_traced,
    plain,
    positions_of,
    trace,
    with_rows_of,
)


@dataclass
class CompressedLayer:
    """What a press left of one layer."""

    # Plain tensors, shape (bsz, num_key_value_heads, n_slots, head_dim).
    keys: torch.Tensor
    values: torch.Tensor
    # The position that each slot's value holds, int64, shape (bsz, num_key_value_heads, n_slots); None where the press
    # rebuilt the values in a way that cannot be followed.
    positions: torch.Tensor | None
    # Whether the keys are not those of the cache any more (rotated anew, or with channels set to zero).
    keys_rewritten: bool
    # Whether some slots may hold tokens that the press appended.
    has_foreign_rows: bool


def is_followed(layer: CacheLayerMixin) -> bool:
    """Whether evictions from this kind of cache layer can be merged; a ValueError for one that no press can shrink."""
    # kvpress would evict from its unwritten tail as well.
    if isinstance(layer, StaticLayer):
        raise ValueError(
            f"a {type(layer).__name__} has a fixed length, which no press can shrink: "
            "use a DynamicCache or a QuantizedCache"
        )
    return isinstance(layer, DynamicLayer)


def tokens_seen(layer: CacheLayerMixin) -> int:
    """Number of tokens that a cache layer stands for: all that a sliding one ever saw, those that any other holds."""
    return int(layer.get_seq_length())


def layer_length(layer: Any) -> int:
    """Number of positions that a cache layer holds; like ``tokens_seen``, read without a device synchronisation."""
    is_sliding = isinstance(layer, DynamicSlidingWindowLayer)
    return int(layer.keys.shape[2] if is_sliding else tokens_seen(layer))


def open_layer(cache: Cache, layer_idx: int) -> OpenLayer:
    """What follows a press on one layer of ``cache``, not open yet."""
    is_quantized = isinstance(cache.layers[layer_idx], QuantizedLayer)
    return (OpenQuantizedLayer if is_quantized else OpenLayer)(cache, layer_idx)


class OpenLayer:
    """A layer that keeps its keys and values as tensors. The press may put another layer in its place."""

    is_closed = False

    def __init__(self, cache: Any, layer_idx: int):
        self.cache, self.layer_idx = cache, layer_idx
        self.layer: Any = cache.layers[layer_idx]

    @cached_property
    def traced(self) -> tuple[TracedTensor, TracedTensor]:
        """Keys and values that the press works on."""
        return trace(plain(self.layer.keys)), trace(plain(self.layer.values))

    def open(self) -> None:
        """Put traced tensors where the press reads."""
        self.layer.keys, self.layer.values = self.traced

    def close(self) -> None:
        """Leave what the press did so far and follow it no more."""
        if not self.is_closed:
            self.commit()
            self.is_closed = True

    def undo_writes(self) -> None:
        """Undo what the press wrote into the layer's tensors."""
        for traced in self.traced:
            traced._origin.undo_writes()

    def before(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as they were before the press, plain."""
        keys, values = self.traced
        return keys._origin.original, values._origin.original

    def written(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as the press left them, traced if it did not rebuild them."""
        layer = self.cache.layers[self.layer_idx]
        return layer.keys, layer.values

    def lengths(self) -> tuple[int, int]:
        """Positions before the press, and slots that it left."""
        return self.traced[1].shape[2], self.written()[1].shape[2]

    def compressed(self) -> CompressedLayer:
        """What the press left."""
        keys, values = self.written()
        traced_keys = self.traced[0]
        keys_rewritten = traced_keys._origin.is_modified or (keys is not traced_keys and not is_traced(keys))
        positions = positions_of(values)
        if positions is not None:
            positions = positions.to(values.device)
        return CompressedLayer(plain(keys), plain(values), positions, keys_rewritten, has_foreign_rows(values))

    def commit(self, keys: torch.Tensor | None = None, values: torch.Tensor | None = None) -> None:
        """Leave what the press did, with these keys and values in place of its own where they are given."""
        layer = self.cache.layers[self.layer_idx]
        for name, traced, new in zip(("keys", "values"), self.traced, (keys, values)):
            written = getattr(layer, name)
            left = traced._origin.tensor if written is traced else plain(written)
            setattr(layer, name, left if new is None else new)


@dataclass
class _Unquantized:
    """Stands where a press wrote a quantized tensor, until the merge is known."""

    tensor: torch.Tensor
    axis: int


class OpenQuantizedLayer(OpenLayer):
    """
    A layer that keeps its older keys and values quantized and the most recent ones, its residual, as they are.

    The press sees what it sees without us: the dequantized part. What it quantizes waits until the merge is known, so
    that each tensor is quantized once, and only if it has to be. The residual is not shown to the press, as in kvpress,
    but where kvpress drops it we keep it: its tokens stay behind the survivors, and may be merged into.
    """

    def __init__(self, cache: Cache, layer_idx: int):
        super().__init__(cache, layer_idx)
        layer = self.layer
        self.stored = (layer._quantized_keys, layer._quantized_values)
        self.residual = (layer.keys, layer.values)
        self.k_len = layer.cumulative_length
        self.n_residual = layer.keys.shape[2] if layer.keys.dim() == 4 else 0

    def open(self) -> None:
        self.layer._dequantize = self._dequantize
        self.layer._quantize = _Unquantized

    @cached_property
    def traced(self) -> tuple[TracedTensor, TracedTensor]:
        keys, values = (type(self.layer)._dequantize(self.layer, stored) for stored in self.stored)
        return trace(keys), trace(values)

    def undo_writes(self) -> None:
        """Nothing to undo: the press was given copies."""

    def _dequantize(self, stored: Any) -> torch.Tensor:
        for which in (0, 1):
            if stored is self.stored[which]:
                return self.traced[which]
        layer, layer_class = self.layer, type(self.layer)
        if isinstance(stored, _Unquantized):
            # One press after another: the second is to see what it would see without us, to the last bit.
            rounded = layer_class._quantize(layer, plain(stored.tensor).contiguous(), stored.axis)
            return with_rows_of(layer_class._dequantize(layer, rounded), stored.tensor)
        return layer_class._dequantize(layer, stored)

    def before(self) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = super().before()
        return self._with_residual(keys, 0), self._with_residual(values, 1)

    def lengths(self) -> tuple[int, int]:
        written = self.layer._quantized_values
        is_written = isinstance(written, _Unquantized)
        return self.k_len, written.tensor.shape[2] + self.n_residual if is_written else self.k_len

    def written(self) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.layer._quantized_keys, self.layer._quantized_values
        return (
            keys.tensor if isinstance(keys, _Unquantized) else self.traced[0],
            values.tensor if isinstance(values, _Unquantized) else self.traced[1],
        )

    def compressed(self) -> CompressedLayer:
        compressed = super().compressed()
        compressed.keys = self._with_residual(compressed.keys, 0)
        compressed.values = self._with_residual(compressed.values, 1)
        if self.n_residual and (positions := compressed.positions) is not None:
            recent = torch.arange(self.k_len - self.n_residual, self.k_len, device=positions.device)
            recent = recent.expand(*positions.shape[:2], self.n_residual)
            compressed.positions = torch.cat([positions, recent], dim=-1)
        return compressed

    def commit(self, keys: torch.Tensor | None = None, values: torch.Tensor | None = None) -> None:
        layer = self.layer
        n_stored = self.lengths()[1] - self.n_residual
        for name in ("_dequantize", "_quantize"):
            vars(layer).pop(name, None)
        stored, residual = list(self.stored), list(self.residual)
        for which, new in enumerate((keys, values)):
            written = (layer._quantized_keys, layer._quantized_values)[which]
            if new is not None:
                if self.n_residual:
                    residual[which] = new[:, :, n_stored:]
                new = new[:, :, :n_stored]
            elif isinstance(written, _Unquantized):
                traced = self.traced[which]
                if written.tensor is traced and not traced._origin.is_modified:
                    continue  # nothing to write: quantizing again would only lose precision
                new = plain(written.tensor)
            else:
                continue
            axis = (layer.axis_key, layer.axis_value)[which]
            stored[which] = layer._quantize(new.contiguous(), axis=axis)
        layer._quantized_keys, layer._quantized_values = stored
        layer.keys, layer.values = residual
        layer.cumulative_length = n_stored + self.n_residual

    def _with_residual(self, tensor: torch.Tensor, which: int) -> torch.Tensor:
        return torch.cat([tensor, self.residual[which]], dim=2) if self.n_residual else tensor
