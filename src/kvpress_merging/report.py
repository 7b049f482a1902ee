# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""What was merged, per layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from kvpress_merging.eviction import Eviction
from kvpress_merging.layer_report import LayerReport, in_words
from kvpress_merging.pairs import COLUMNS, Pairs

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from transformers import PreTrainedTokenizerBase


class MergeReport:
    """
    What a press merged, layer by layer, since each layer's last prefill.

    Collecting costs no device synchronisation: the figures stay on the device (8 bytes per evicted position and head)
    until one of the methods reads them.

    Each layer's row has

    - ``kept``: positions left after the last eviction, summed over batch rows and heads;
    - ``evicted``, ``merged``: positions, summed over batch rows, heads and evictions;
    - ``similarity_mean``, ``similarity_q05``, ``similarity_q50``: cosine similarity of the merged positions to the
      survivor that took them in: mean, 5 % and 50 % quantile;
    - ``bound_mean``: mean of ``1 / (1 + w)``, to which a merge of weight ``w`` shrinks the distance between an evicted
      value and the one that stands for it, where the survivor takes in no other;
    - ``most_merges``: the largest number of positions that one survivor took in at one eviction.

    Figures that are not defined, since nothing was merged, are None. A press that re-fits instead of merging adds

    - ``heads``, ``heads_fitted``: heads (times batch rows and evictions) that lost positions, and those of them that
      took the fit;
    - ``error_before``, ``error_after``: their mean squared error of the attention output over reference queries,
      relative to the output's, as eviction leaves it and as it is left in the end.

    Examples
    --------
    >>> import torch
    >>> from kvpress import KnormPress
    >>> from kvpress_merging import MergingPress
    >>> from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(
    ...     vocab_size=100, hidden_size=64, num_hidden_layers=2,
    ...     num_attention_heads=4, num_key_value_heads=2,
    ... )
    >>> model, cache = LlamaForCausalLM(config), DynamicCache()
    >>> press = MergingPress(KnormPress(0.5), record_pairs=True)
    >>> press.report
    0 layers, nothing evicted
    >>> with torch.no_grad(), press(model):
    ...     _ = model(torch.arange(40)[None], past_key_values=cache)
    >>> print(press.report)  # doctest: +ELLIPSIS
    2 layers: 80 positions evicted, ... merged (...) into 80 kept; mean similarity ...
    >>> press.report.to_frame()["kept"].tolist()
    [40, 40]
    >>> list(press.report.merges(layer_idx=1).columns)
    ['eviction', 'batch', 'head', 'evicted', 'survivor', 'similarity', 'weight']
    """

    def __init__(self) -> None:
        self._layers: dict[int, LayerReport] = {}

    def start(self, layer_idx: int) -> None:
        """
        Forget a layer: it is prefilled anew.

        Parameters
        ----------
        layer_idx : int
            The layer.
        """
        self._layers[layer_idx] = LayerReport()

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
        layer = self._layers.setdefault(layer_idx, LayerReport())
        layer.n_survivors = eviction.n_survivors
        layer.n_evicted += eviction.n_evicted

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
        layer_idx : int
            The layer.
        eviction : Eviction
            What was evicted.
        similarity, weight : torch.Tensor
            Per evicted position, float32, shape ``(bsz, num_key_value_heads, n_evicted)``; weight 0 where not merged,
            and the similarity then of no meaning unless ``keep_pairs``.
        target : torch.Tensor
            Index into ``eviction.survivors``, int64, same shape.
        keep_pairs : bool
            Whether to keep what :meth:`merges` and :meth:`plot` tell: 16 bytes per evicted position and head.
        """
        layer = self._layers.setdefault(layer_idx, LayerReport())
        layer.add(similarity, weight, target, max(1, eviction.survivors.shape[-1]))
        if keep_pairs:
            layer.pairs.append(Pairs.of(eviction, similarity, weight, target))

    def record_fit(
        self,
        layer_idx: int,
        eviction: Eviction,
        is_fitted: torch.Tensor,
        eviction_error: torch.Tensor,
        matching_error: torch.Tensor,
        output_norm: torch.Tensor,
    ) -> None:
        """
        Note what matching did at one eviction.

        Parameters
        ----------
        layer_idx : int
            The layer.
        eviction : Eviction
            What was evicted.
        is_fitted, eviction_error, matching_error, output_norm : torch.Tensor
            See :class:`kvpress_merging.kernels.match.Match`.
        """
        layer = self._layers.setdefault(layer_idx, LayerReport())
        layer.add_fits(eviction, (is_fitted, eviction_error, matching_error, output_norm))

    def to_dict(self) -> dict[int, dict[str, Any]]:
        """One dict of figures per layer, by layer index; see the class for their names."""
        return {layer_idx: self._layers[layer_idx].summary() for layer_idx in sorted(self._layers)}

    def to_frame(self) -> pd.DataFrame:
        """The same as a pandas DataFrame: one row per layer, indexed by ``layer``."""
        import pandas as pd

        frame = pd.DataFrame.from_dict(self.to_dict(), orient="index")
        return frame.rename_axis(index="layer")

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
            - ``evicted``: the position. At the first eviction positions are those of the tokens, later on those in
              what earlier evictions left;

            and with

            - ``survivor``: position of the survivor with the most similar key; -1 where no survivor may be merged into;
            - ``similarity``: their keys' cosine, -inf where there is no such survivor;
            - ``weight``: ``w`` in the blend, 0 where the evicted position was not merged but forgotten.

        Raises
        ------
        ValueError
            If the layer was not seen, its pairs were not recorded, or it was re-fitted, which knows no pairs.
        """
        import pandas as pd

        layer = self._layers.get(layer_idx)
        if layer is None:
            seen = ", ".join(map(str, sorted(self._layers))) or "none yet"
            raise ValueError(f"layer_idx must be a layer that the press has seen ({seen}), got {layer_idx!r}")
        if layer.fits or layer.new_fits:
            raise ValueError(
                "a re-fit moves all survivors of a head together, so there are no pairs to show: "
                "plot_layers() and to_frame() tell what it did"
            )
        if layer.n_evicted and not layer.pairs:
            raise ValueError(
                f"the pairs of layer {layer_idx} were not recorded: make the press with record_pairs=True, "
                "MergingPress(..., record_pairs=True), and prefill again"
            )
        frames = [pairs.to_frame(number) for number, pairs in enumerate(layer.pairs)]
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
        that were forgotten.

        Parameters
        ----------
        tokenizer : PreTrainedTokenizerBase
            Turns the ids into words.
        input_ids : torch.Tensor
            What was prefilled, int64, shape ``(bsz, k_len)``, or ``(k_len,)`` for a batch of one.
        layer_idx, head, batch : int
            Layer, KV head and batch row.
        start, stop : int
            The first position to draw and the one after the last: by default the first 80, or the 80 that follow a
            given start. Arcs that leave them are cut off.

        Returns
        -------
        matplotlib.figure.Figure
            The notebook shows it; ``figure.savefig("merges.png")`` writes it.

        Raises
        ------
        ImportError
            If matplotlib is missing.
        ValueError
            As :meth:`merges`; also if there is no such head, batch row or stretch of positions, or ``input_ids`` is
            shorter than what was prefilled.
        """
        from kvpress_merging.plots import plot_merges

        return plot_merges(self.merges(layer_idx), tokenizer, input_ids, layer_idx, head, batch, start, stop)

    def plot_layers(self) -> Figure:
        """
        Draw the figures of :meth:`to_frame`, layer by layer.

        Returns
        -------
        matplotlib.figure.Figure
            For a blend: how many evicted positions were merged, how similar they were, and the perturbation bound. For
            a re-fit: how many heads took it, and the error of the attention output before and after.

        Raises
        ------
        ImportError
            If matplotlib is missing.
        ValueError
            If nothing was evicted.
        """
        from kvpress_merging.plots import plot_layers

        return plot_layers(self.to_frame())

    def __str__(self) -> str:
        return in_words(list(self.to_dict().values()))

    __repr__ = __str__
