# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""What was merged, per layer."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch

from kvpress_merging.eviction import Eviction
from kvpress_merging.figures import COLUMNS, Layer, in_words, pairs_to_frame

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from transformers import PreTrainedTokenizerBase

# Evictions of one layer that are kept apart before they are joined: while decoding there may be one per token.
MAX_PARTS = 64


class MergeReport:
    """
    What a press merged, layer by layer, of the sequence that each layer saw last.

    Collecting costs next to nothing and no device synchronisation: what the kernels return anyway is kept, on the
    device (16 bytes per evicted position and head for merging), and worked out when one of the methods reads it.

    Each layer's row has

    - ``kept``: positions left after the last eviction, summed over batch rows and heads;
    - ``evicted``, ``merged``: positions, summed over batch rows, heads and evictions;
    - ``similarity_mean``, ``similarity_q05``, ``similarity_q50``: cosine similarity of the merged positions to the
      survivor that took them in: mean, 5 % and 50 % quantile; None if nothing was merged;
    - ``bound_mean``: mean of ``1 / (1 + w)``, to which a merge of weight ``w`` shrinks the distance between an evicted
      value and the one that stands for it, where the survivor takes in no other; None likewise;
    - ``most_merges``: the largest number of positions that one survivor took in at one eviction.

    Matching adds

    - ``heads``, ``heads_fitted``: heads (times batch rows and evictions) that lost positions, and those of them that
      took the fit;
    - ``exchanged``: evicted positions that took the place of a survivor in these, see
      :func:`kvpress_merging.kernels.nearby.clusters`;
    - ``error_before``, ``error_after``: their mean squared error of the attention output over reference queries,
      relative to the output's, as eviction leaves it and as it is left in the end;
    - ``n_queries``: reference queries per head that the last fit was made for.

    Examples
    --------
    >>> import torch
    >>> from kvpress import KnormPress
    >>> from kvpress_merging import MergingPress
    >>> from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=2)
    >>> model, cache = LlamaForCausalLM(config), DynamicCache()
    >>> press = MergingPress(KnormPress(0.5), record_pairs=True)
    >>> with torch.no_grad(), press(model):
    ...     _ = model(torch.arange(40)[None], past_key_values=cache)
    >>> print(press.report)  # doctest: +ELLIPSIS
    2 layers: 80 positions evicted, ... merged (...) into 80 kept; mean similarity ...
    >>> list(press.report.merges(layer_idx=1).columns)
    ['eviction', 'batch', 'head', 'evicted', 'survivor', 'similarity', 'weight']
    """

    def __init__(self) -> None:
        self._layers: defaultdict[int, Layer] = defaultdict(Layer)

    def start(self, layer_idx: int) -> None:
        """
        Forget a layer: it works on another sequence.

        Parameters
        ----------
        layer_idx : int
            The layer.
        """
        self._layers[layer_idx] = Layer()

    def record(self, layer_idx: int, eviction: Eviction) -> None:
        """
        Note an eviction, whatever becomes of what it evicted.

        Parameters
        ----------
        layer_idx : int
            The layer.
        eviction : Eviction
            What was evicted.
        """
        layer = self._layers[layer_idx]
        layer.n_survivors = eviction.n_survivors
        layer.n_evicted += eviction.n_evicted
        if max(len(layer.merges), len(layer.heads)) >= MAX_PARTS:
            layer.join()

    def record_merges(
        self,
        layer_idx: int,
        eviction: Eviction,
        similarity: torch.Tensor,
        weight: torch.Tensor,
        target: torch.Tensor,
        *,
        keep_pairs: bool = False,
    ) -> None:
        """
        Note what one eviction merged.

        Parameters
        ----------
        layer_idx, eviction : int, Eviction
            As in :meth:`record`.
        similarity, weight, target : torch.Tensor
            As :func:`kvpress_merging.kernels.blend.cosine_blend` returns them; the similarity is of no meaning where
            the weight is 0, unless ``keep_pairs``. They are kept, so not to be written.
        keep_pairs : bool
            Keep the eviction too, for :meth:`merges` and :meth:`plot`.
        """
        layer = self._layers[layer_idx]
        merges = (similarity, weight, target, eviction.survivors.shape[-1])
        layer.merges.append(merges)
        if keep_pairs:
            layer.pairs.append((eviction, merges))

    def record_fit(
        self,
        layer_idx: int,
        eviction: Eviction,
        is_fitted: torch.Tensor,
        n_exchanged: torch.Tensor,
        eviction_error: torch.Tensor,
        matching_error: torch.Tensor,
        output_norm: torch.Tensor,
        *,
        n_queries: int | None = None,
    ) -> None:
        """
        Note what matching made of one eviction.

        Parameters
        ----------
        layer_idx, eviction : int, Eviction
            As in :meth:`record`.
        is_fitted, n_exchanged, eviction_error, matching_error, output_norm : torch.Tensor
            As :func:`kvpress_merging.kernels.match.attention_match` returns them, which are kept.
        n_queries : int, optional
            How many reference queries per head it was made for.
        """
        self._layers[layer_idx].n_queries = n_queries
        has_lost = [n > 0 for _, n in eviction.counts] if eviction.counts else [True] * is_fitted.numel()
        heads = (is_fitted, n_exchanged, eviction_error, matching_error, output_norm)
        self._layers[layer_idx].heads.append((torch.tensor(has_lost, device="cpu"), *heads))

    def to_dict(self) -> dict[int, dict[str, Any]]:
        """One dict of figures per layer, by layer index; see the class for their names."""
        return {layer_idx: layer.read() for layer_idx, layer in sorted(self._layers.items())}

    def to_frame(self) -> pd.DataFrame:
        """The same as a pandas DataFrame: one row per layer, indexed by ``layer``."""
        import pandas as pd

        return pd.DataFrame.from_dict(self.to_dict(), orient="index").rename_axis(index="layer")

    def merges(self, layer_idx: int) -> pd.DataFrame:
        """
        Which evicted position of a layer went to which survivor, and how much of it.

        Parameters
        ----------
        layer_idx : int
            The layer. Its press must have had ``record_pairs=True``, see :class:`kvpress_merging.MergingPress`.

        Returns
        -------
        pandas.DataFrame
            One row per evicted position, in the order of

            - ``eviction``: 0 for the first since the prefill, 1 for the next, ...;
            - ``batch``, ``head``: batch row and KV head;
            - ``evicted``: the position; at the first eviction that of the token, later on in what earlier ones left;
            - ``survivor``: position of the survivor with the most similar key; -1 where no survivor may be merged into;
            - ``similarity``: their keys' cosine, -inf where there is no such survivor;
            - ``weight``: ``w`` in the blend, 0 where the evicted position was not merged but forgotten.

        Raises
        ------
        ValueError
            If the layer was not seen, its pairs were not recorded, or it was matched, which knows no pairs.
        """
        import pandas as pd

        if layer_idx not in self._layers:
            seen = ", ".join(map(str, sorted(self._layers))) or "none yet"
            raise ValueError(f"layer_idx must be a layer that the press has seen ({seen}), got {layer_idx!r}")
        layer = self._layers[layer_idx]
        if layer.heads:
            raise ValueError(
                "matching moves all survivors of a head together, so there are no pairs to show: "
                "plot_layers() and to_frame() tell what it did"
            )
        if layer.n_evicted and not layer.pairs:
            raise ValueError(
                f"the pairs of layer {layer_idx} were not recorded: make the press with record_pairs=True, "
                "MergingPress(..., record_pairs=True), and prefill again"
            )
        frames = [pairs_to_frame(number, *pairs) for number, pairs in enumerate(layer.pairs)]
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=COLUMNS)

    def plot(
        self,
        tokenizer: PreTrainedTokenizerBase,
        input_ids: torch.Tensor,
        layer_idx: int,
        head: int = 0,
        *,
        batch: int = 0,
        start: int = 0,
        stop: int | None = None,
    ) -> Figure:
        """
        Draw over the tokens what the first eviction since the prefill merged into what, for one layer and head.

        An arc goes from each merged token to the survivor that took it in: its colour is the similarity, its width the
        weight. Bars say how much weight each survivor took in; survivors' tokens are bold, and a cross marks tokens
        that were forgotten. Needs matplotlib.

        Parameters
        ----------
        tokenizer : PreTrainedTokenizerBase
            Turns the ids into words.
        input_ids : torch.Tensor
            What was prefilled, int64, shape ``(bsz, k_len)``, or ``(k_len,)`` for a batch of one.
        layer_idx, head, batch : int
            Layer, KV head and batch row.
        start, stop : int
            The first position to draw and the one after the last; at most 80 by default.

        Raises
        ------
        ValueError
            As :meth:`merges`; also if there is no such head, batch row or stretch of positions, or ``input_ids`` is
            shorter than what was prefilled.
        """
        from kvpress_merging.plots import plot_merges

        return plot_merges(self.merges(layer_idx), tokenizer, input_ids, layer_idx, head, batch, start, stop)

    def plot_layers(self) -> Figure:
        """Draw the figures of :meth:`to_frame`, with matplotlib; a ValueError if nothing was evicted."""
        from kvpress_merging.plots import plot_layers

        return plot_layers(self.to_frame())

    def __str__(self) -> str:
        return in_words(list(self.to_dict().values()))

    __repr__ = __str__
