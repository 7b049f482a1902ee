# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""MergingPress: blend what a press evicts into the survivors with the most similar keys."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from kvpress_merging.checks import check_int, check_number, rotated_keys_error, rotates_keys
from kvpress_merging.eviction import Eviction
from kvpress_merging.following.model import layer_index
from kvpress_merging.kernels.blend import Blend, cosine_blend
from kvpress_merging.kernels.nearest import KERNELS
from kvpress_merging.kernels.rows import DEFAULT_TILE_BYTES
from kvpress_merging.merge_on_evict_press import MergeOnEvictPress


@dataclass
class MergingPress(MergeOnEvictPress):
    """
    Merge on evict: before a press throws a position away, blend its value into the survivor whose key is most similar.

    For each evicted position ``i`` and its most cosine-similar survivor ``j`` in the same head, with
    ``w_i = max(cos(k_i, k_j), 0)``, times ``|v_i| / (|v_i| + |v_j|)`` by default, ``j`` then holds
    ``v'_j = (v_j + sum_i w_i v_i) / (1 + sum_i w_i)``.

    Keys stay as they are, so that RoPE stays right. Which positions survive is the inner press's choice alone.

    The idea of merging instead of evicting is that of [Token Merging](https://arxiv.org/abs/2210.09461), for KV caches
    that of [CaM](https://openreview.net/forum?id=LCTmppB165) and [D2O](https://arxiv.org/abs/2406.13035).

    Parameters
    ----------
    press : BasePress
        The press whose evictions are merged: any press that evicts positions.
    similarity_threshold : float, default=0.0
        Least cosine similarity for a merge, in [0, 1].
    merge_keys : bool, default=False
        Blend keys too. Blended keys have no one position, which breaks RoPE: off by default.
    value_norm_weighting : bool, default=True
        Scale a merge by the evicted value's share of both norms.
    max_merge_per_token : int, default=0
        Most evicted positions that one survivor takes, the most similar first; 0 is no limit.
    merge_fraction : float, default=1.0
        Share of the evicted positions that pass the threshold that is merged, the most similar first, in (0, 1].
    tile_bytes : int, keyword-only
        Memory budget of the search for the most similar survivor, in bytes per tile of similarities.
    kernel : str, keyword-only, default="auto"
        Which implementation searches: ``"torch"``; ``"triton"``, a fused kernel for GPUs (a ``ValueError`` at the
        first eviction where it cannot run); or ``"auto"``, which is the first, until the second has been measured on a
        GPU.
    record_pairs : bool, keyword-only, default=False
        Keep, on the device, which evicted position went to which survivor, for ``report.merges`` and ``report.plot``:
        16 bytes per evicted position and KV head of each layer, until its next prefill.

    Raises
    ------
    TypeError, ValueError
        If a field has a wrong type or value, at construction and when it is set.

    Examples
    --------
    A model as small as can be, with random weights; any that kvpress supports will do:

    >>> import torch
    >>> from kvpress import KnormPress
    >>> from kvpress_merging import MergingPress
    >>> from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=2)
    >>> model, cache = LlamaForCausalLM(config), DynamicCache()
    >>> press = MergingPress(KnormPress(compression_ratio=0.5), similarity_threshold=0.3)
    >>> with torch.no_grad(), press(model):
    ...     _ = model(torch.arange(40)[None], past_key_values=cache)
    >>> cache.get_seq_length()
    20
    >>> press.report.to_frame()["evicted"].tolist()  # per layer, from both of its heads
    [40, 40]
    """

    similarity_threshold: float = 0.0
    merge_keys: bool = False
    value_norm_weighting: bool = True
    max_merge_per_token: int = 0
    merge_fraction: float = 1.0
    tile_bytes: int = field(default=DEFAULT_TILE_BYTES, kw_only=True, repr=False)
    kernel: str = field(default="auto", kw_only=True, repr=False)
    record_pairs: bool = field(default=False, kw_only=True, repr=False)

    def __post_init__(self) -> None:
        if self.merge_keys and rotates_keys(self.press):
            raise rotated_keys_error(self.press)

    def _check_field(self, name: str, value: Any) -> None:
        super()._check_field(name, value)
        if name == "similarity_threshold" and not 0 <= check_number(name, value) <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {value!r}")
        if name == "merge_fraction" and not 0 < check_number(name, value) <= 1:
            raise ValueError(f"{name} must be in (0, 1], got {value!r}")
        if name in ("merge_keys", "value_norm_weighting", "record_pairs") and not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")
        if name in ("max_merge_per_token", "tile_bytes"):
            check_int(name, value, min_value=0 if name == "max_merge_per_token" else 1)
        if name == "kernel" and value not in KERNELS:
            raise ValueError(f"kernel must be one of {', '.join(map(repr, KERNELS))}, got {value!r}")

    def fold(
        self,
        module: nn.Module,
        hidden_states: torch.Tensor | None,
        keys: torch.Tensor,
        values: torch.Tensor,
        kept_keys: torch.Tensor,
        kept_values: torch.Tensor,
        eviction: Eviction,
        kwargs: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Blend; see the class. Similarities are those of ``keys``, also where the press rotates the survivors'."""
        if self.merge_keys and eviction.keys_rewritten:
            raise rotated_keys_error(self.press)
        blend = self._blend(keys, values, kept_keys, kept_values, eviction)
        self.report.record_merges(
            layer_index(module), eviction, blend.similarity, blend.weight, blend.target, keep_pairs=self.record_pairs
        )
        return blend.keys, blend.values

    def merge(
        self, keys: torch.Tensor, values: torch.Tensor, indices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Blend what is about to be evicted into what is kept, as kvpress's own MergingPress does by this name.

        Parameters
        ----------
        keys, values : torch.Tensor
            One layer, shape ``(bsz, num_key_value_heads, k_len, head_dim)``. Not written to.
        indices : torch.Tensor
            Positions that will be kept, int64, shape ``(bsz, num_key_value_heads, n_kept)``, in any order.

        Returns
        -------
        tuple of torch.Tensor
            Keys and values of all positions, those at ``indices`` blended; the keys as they came unless ``merge_keys``.
        """
        key_index, value_index = (indices.unsqueeze(-1).expand(-1, -1, -1, rows.shape[-1]) for rows in (keys, values))
        eviction = Eviction.from_kept(indices, keys.shape[2])
        blend = self._blend(keys, values, keys.gather(2, key_index), values.gather(2, value_index), eviction)
        merged_keys = keys.scatter(2, key_index, blend.keys) if self.merge_keys else keys
        return merged_keys, values.scatter(2, value_index, blend.values)

    def _blend(self, *layer: Any) -> Blend:
        """The kernel, with this press's parameters."""
        return cosine_blend(
            *layer,
            similarity_threshold=self.similarity_threshold,
            merge_fraction=self.merge_fraction,
            max_merge_per_token=self.max_merge_per_token,
            value_norm_weighting=self.value_norm_weighting,
            merge_keys=self.merge_keys,
            tile_bytes=self.tile_bytes,
            kernel=self.kernel,
        )
