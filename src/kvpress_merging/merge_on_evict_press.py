# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Runs any press, sees which positions it evicted, and folds what they held into the survivors."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from kvpress import BasePress, CAMPress
from kvpress import MergingPress as KVPressMergingPress
from torch import nn
from transformers import Cache, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from typing_extensions import Self

from kvpress_merging.cache import OpenLayer, OpenTensors, is_followed, layer_length, layer_of
from kvpress_merging.checks import check_folded, evicts_no_positions, not_followed, refuse_what_the_press_gets_wrong
from kvpress_merging.eviction import Eviction
from kvpress_merging.hooks import Tracks, attention_modules, remove, replace_new_hooks, uncompiled
from kvpress_merging.layer_state import LayerState, is_same, masks_of
from kvpress_merging.padding import Padding
from kvpress_merging.report import MergeReport
from kvpress_merging.wrapping import PressWrapper, nested_presses


@dataclass
class MergeOnEvictPress(PressWrapper):
    """
    Base of presses that merge what another press evicts.

    The inner press runs unchanged. What it evicted is seen from what it did, not from its class: a shorter cache
    (``tracing.py``) or newly masked positions, in its forward hook, in its ``compress``, or when its context exits.
    Then ``fold`` gives the survivors' new keys and values. A subclass is a dataclass with a ``fold``.

    Parameters
    ----------
    press : BasePress
        The press whose evictions are merged.

    Raises
    ------
    TypeError
        If ``press`` is not a press, merges already (anywhere inside), or evicts no positions.

    Examples
    --------
    A rule that adds a share of the mean of what each head lost to all of its survivors, for presses that evict equally
    many positions in all heads:

    >>> from dataclasses import dataclass
    >>> import torch
    >>> from kvpress import KnormPress
    >>> from kvpress_merging import MergeOnEvictPress
    >>> from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
    >>> @dataclass
    ... class MeanPress(MergeOnEvictPress):
    ...     share: float = 0.1
    ...
    ...     def fold(self, module, hidden_states, keys, values, kept_keys, kept_values, eviction, kwargs):
    ...         index = eviction.evicted.unsqueeze(-1).expand(-1, -1, -1, values.shape[-1])
    ...         return kept_keys, kept_values + self.share * values.gather(2, index).mean(dim=2, keepdim=True)
    >>> config = LlamaConfig(
    ...     vocab_size=100, hidden_size=64, num_hidden_layers=2,
    ...     num_attention_heads=4, num_key_value_heads=2,
    ... )
    >>> model, cache = LlamaForCausalLM(config), DynamicCache()
    >>> with torch.no_grad(), MeanPress(KnormPress(0.5))(model):
    ...     _ = model(torch.arange(40)[None], past_key_values=cache)
    >>> cache.get_seq_length()
    20
    """

    # Not fields: they are no part of a press's configuration.
    _report: ClassVar[MergeReport]
    _states: ClassVar[WeakKeyDictionary[nn.Module, LayerState]]
    _padding: ClassVar[Padding]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        self = super().__new__(cls)
        object.__setattr__(self, "_report", MergeReport())
        object.__setattr__(self, "_states", WeakKeyDictionary())
        object.__setattr__(self, "_padding", Padding())
        return self

    @property
    def report(self) -> MergeReport:
        """What was merged since each layer's last prefill."""
        return self._report

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
        """
        Fold what was evicted into the survivors: the one method that a merge rule has to write.

        Parameters
        ----------
        module : nn.Module
            The attention layer.
        hidden_states : torch.Tensor or None
            Its input, shape ``(bsz, q_len, hidden_dim)``; None for an eviction after the forward pass.
        keys, values : torch.Tensor
            The whole layer before the eviction, shape ``(bsz, num_key_value_heads, k_len, head_dim)``. Not to be
            written.
        kept_keys, kept_values : torch.Tensor
            What the bare press left, shape ``(bsz, num_key_value_heads, n_slots, head_dim)``. Not to be written.
        eviction : Eviction
            Which positions survived, in which slots, and which were evicted. At least one was.
        kwargs : dict
            Keyword arguments of the layer's forward pass; empty for an eviction after it.

        Returns
        -------
        tuple of torch.Tensor
            Keys and values in the order, shape, dtype and device of ``kept_keys`` and ``kept_values``. An unchanged
            one is returned as it came: then it is not written (nor quantized) again.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement fold")

    def observe(self, module: nn.Module, kwargs: dict[str, Any], is_prefill: bool) -> None:
        """
        Look at a forward pass of ``module``, before the inner press does: for rules whose ``fold`` needs more later.

        Parameters
        ----------
        module : nn.Module
            The attention layer.
        kwargs : dict
            Keyword arguments of its forward pass: ``hidden_states``, ``position_embeddings``, ``past_key_values``, ...
        is_prefill : bool
            Whether the pass filled an empty cache: what was remembered of the layer is then out of date.
        """

    def _check_field(self, name: str, value: Any) -> None:
        if name != "press":
            return
        own = type(self).__name__
        if not isinstance(value, BasePress):
            hint = f"; pass an instance, {value.__name__}(...)" if isinstance(value, type) else ""
            raise TypeError(f"press must be a kvpress BasePress, got {value!r}{hint}")
        for press in nested_presses(value):
            if isinstance(press, (MergeOnEvictPress, KVPressMergingPress, CAMPress)):
                raise TypeError(
                    f"{type(press).__name__} already merges what it evicts: give {own} the press inside it, "
                    f"or use {type(press).__name__} alone"
                )
        if evicts_no_positions(value):
            raise TypeError(
                f"{type(value).__name__} prunes key channels and evicts no positions, so there is nothing to merge: "
                f"combine it with a press that does, ComposedPress([{own}(...), ThinKPress(...)])"
            )

    # Where a press evicts: in its forward hook, in compress, or when its context exits.

    @contextmanager
    def __call__(self, model: PreTrainedModel) -> Generator[None, None, None]:
        """
        Context manager: apply the inner press to ``model``, and merge what it evicts.

        If anything inside raises, what the press would do on leaving the context is undone, the model is left as it
        was, and the exception surfaces as it was raised.

        Parameters
        ----------
        model : PreTrainedModel
            The model that the press works on.
        """
        tracks = Tracks(model, self.press)
        try:
            yield from self._apply(model, tracks)
            tracks.remove()
        except BaseException:
            tracks.undo()
            raise

    def _apply(self, model: PreTrainedModel, tracks: Tracks) -> Generator[None, None, None]:
        earlier_hooks = {module: set(module._forward_hooks) for module in model.modules()}
        seen: dict[nn.Module, Cache] = {}
        handles: list[Any] = []
        inner = ExitStack()  # leaves the press's context once, whatever happens
        try:
            inner.enter_context(self.press(model))
            modules = attention_modules(model)
            for module in model.modules():
                if len(module._forward_hooks) > len(earlier_hooks.get(module, ())) and module not in modules:
                    inside = set(module.modules()).intersection(modules)
                    replace_new_hooks(
                        module, earlier_hooks.get(module), partial(self._followed_around, seen=seen, inside=inside)
                    )
            last = [module for module in modules if not getattr(module, "is_sliding", False)][-1:]
            for module in modules:
                # A press that shares one budget among all layers may evict when the last of them has run.
                others = seen if module in last else {}
                replace_new_hooks(module, earlier_hooks.get(module), partial(self._followed, others=others))
                handles.append(module.register_forward_pre_hook(uncompiled(self._check_forward), with_kwargs=True))
                # Runs before the inner press's hook, which may shrink the layer or fail.
                observe = uncompiled(partial(self._observe_hook, seen=seen))
                handles.append(module.register_forward_hook(observe, with_kwargs=True, prepend=True))
            tracks.entered()
            yield
            tracks.leaving()
            remove(handles)
            self._exit(inner, seen)
        except BaseException:
            is_swallowed: bool | None = False
            with _unchanged(seen, attention_modules(model)), suppress(BaseException):
                is_swallowed = inner.__exit__(*sys.exc_info())
            if not is_swallowed:
                raise
            tracks.undo()

    def forward_hook(
        self, module: nn.Module, input: list[torch.Tensor], kwargs: dict[str, Any], output: list[Any]
    ) -> Any:
        """Run the inner press's forward hook and merge what it evicted: for presses that call an inner press's hook."""
        self._observe(module, kwargs, {})
        return self._followed(self.press.forward_hook)(module, input, kwargs, output)

    def compress(
        self,
        module: nn.Module,
        hidden_states: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        attentions: torch.Tensor,
        kwargs: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the inner press's ``compress`` and merge what it evicted: for presses that call their inner press's."""
        layer = OpenTensors(keys, values)
        if module not in self._states or hidden_states.shape[1] == keys.shape[2]:
            self._start(module, keys.shape[2], hidden_states.shape[0], kwargs)

        def run() -> None:
            layer.result = self.press.compress(
                module, hidden_states, layer.traced_keys, layer.traced_values, attentions, kwargs
            )

        self._run(run, module, layer, hidden_states, kwargs)
        return layer.result

    def _followed(
        self, hook: Callable[..., Any], others: Mapping[nn.Module, Cache] | None = None
    ) -> Callable[..., Any]:
        """Follow what a hook does to its own layer, and at prefill to ``others``."""

        def followed_hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
            cache = kwargs.get("past_key_values")
            if cache is None or getattr(module, "is_sliding", False) or not is_followed(cache.layers[module.layer_idx]):
                return hook(module, args, kwargs, output)

            result = output

            def run() -> None:
                nonlocal result
                result = hook(module, args, kwargs, output)

            run_all: Callable[..., Any] = run
            if layer_length(cache.layers[module.layer_idx]) == kwargs["hidden_states"].shape[1]:  # at prefill
                run_all = partial(self._run_over, run, {m: c for m, c in (others or {}).items() if m is not module})
            layer = layer_of(cache, module.layer_idx)  # type: ignore[arg-type]
            self._run(run_all, module, layer, kwargs.get("hidden_states"), kwargs)
            self._states[module].k_len = layer_length(cache.layers[module.layer_idx])
            return result

        return followed_hook

    def _followed_around(
        self, hook: Callable[..., Any], seen: Mapping[nn.Module, Cache], inside: set[nn.Module]
    ) -> Callable[..., Any]:
        """Follow what a hook on a module with attention layers ``inside`` does to these."""

        def followed_hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
            result = output

            def run() -> None:
                nonlocal result
                result = hook(module, args, kwargs, output)

            self._run_over(run, {m: c for m, c in seen.items() if m in inside})
            return result

        return followed_hook

    def _run_over(self, run: Callable[..., Any], layers: dict[nn.Module, Cache]) -> None:
        """Let the inner press work on several open layers and merge, or put everything back."""
        for module, cache in layers.items():
            run = partial(self._run, run, module, layer_of(cache, module.layer_idx), None, {})  # type: ignore[arg-type]
        run()
        for module, cache in layers.items():
            self._states[module].k_len = layer_length(cache.layers[module.layer_idx])  # type: ignore[index]

    def _run(
        self,
        run: Callable[..., Any],
        module: nn.Module,
        layer: OpenLayer,
        hidden_states: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> None:
        """Let the inner press work on an open layer and merge, or put everything back."""
        masked_before = masks_of(module)
        ratios = _own_compression_ratios(self.press)
        try:
            layer.open()
            run()
            self._merge(module, layer, masked_before, hidden_states, kwargs, limit=None)
        except BaseException:
            layer.restore()
            if not is_same(masks_of(module), masked_before):
                module.masked_key_indices = masked_before  # type: ignore[assignment]
            for press, ratio in ratios:
                press.compression_ratio = ratio  # type: ignore[attr-defined]
            raise

    def _exit(self, inner: ExitStack, seen: dict[nn.Module, Cache]) -> None:
        """Leave the inner press's context, in which it may evict, and merge what it evicted then."""
        masked_before = {module: masks_of(module) for module in seen}
        opened: list[tuple[nn.Module, OpenLayer]] = []
        handles = []
        try:
            for module, cache in seen.items():
                layer = layer_of(cache, module.layer_idx)  # type: ignore[arg-type]
                opened.append((module, layer))
                layer.open()
                # The press may run the model to score: that is none of our business. From then on it works on plain
                # tensors, and what it evicts is seen from its masks.
                handles.append(module.register_forward_pre_hook(lambda module, args, layer=layer: layer.close()))
            try:
                inner.__exit__(None, None, None)
            finally:
                remove(handles)
            for (module, layer), cache in zip(tuple(opened), seen.values()):
                context_length = self._states[module].context_length
                if layer.is_closed:
                    layer = layer_of(cache, module.layer_idx)  # type: ignore[arg-type]
                    opened.append((module, layer))
                    layer.open()
                    if layer.lengths()[0] < min(context_length, self._states[module].k_len):
                        raise not_followed(self.press)
                self._merge(module, layer, masked_before[module], None, {}, limit=context_length)
        except BaseException:
            for module, layer in reversed(opened):  # what was opened first knows the layer as it was
                layer.restore()
                module.masked_key_indices = masked_before[module]  # type: ignore[assignment]
            raise

    # What is remembered between forward passes.

    def _start(self, module: nn.Module, k_len: int, bsz: int, kwargs: dict[str, Any]) -> None:
        is_padding = self._padding.find(kwargs.get("attention_mask"), bsz, k_len)
        self._states[module] = LayerState(context_length=k_len, k_len=k_len, is_padding=is_padding)
        self.report.start(int(module.layer_idx))  # type: ignore[arg-type]

    def _observe_hook(
        self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any, seen: dict[nn.Module, Cache]
    ) -> None:
        self._observe(module, kwargs, seen)

    def _observe(self, module: nn.Module, kwargs: dict[str, Any], seen: dict[nn.Module, Cache]) -> None:
        """Note a forward pass of ``module``, after its attention and before the inner press."""
        cache = kwargs.get("past_key_values")
        if cache is None or getattr(module, "is_sliding", False) or not is_followed(cache.layers[module.layer_idx]):
            return
        k_len = layer_length(cache.layers[module.layer_idx])
        bsz, q_len = kwargs["hidden_states"].shape[:2]
        is_prefill = k_len == q_len  # as kvpress's, without reading from the device
        if is_prefill:
            refuse_what_the_press_gets_wrong(self.press, cache, bsz)
            self._start(module, k_len, bsz, kwargs)
            if module.config._attn_implementation not in ALL_ATTENTION_FUNCTIONS:  # type: ignore[union-attr]
                self._states[module].stale_masks = getattr(module, "masked_key_indices", None)
        elif module not in self._states:
            self._start(module, k_len, bsz, kwargs)
        self._states[module].k_len = k_len
        seen[module] = cache
        self.observe(module, kwargs, is_prefill)

    def _check_forward(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Refuse to go on with a cache that was cut back under masks that reach beyond it."""
        cache, state = kwargs.get("past_key_values"), self._states.get(module)
        if cache is None or state is None or int(module.layer_idx) >= len(cache.layers):  # type: ignore[arg-type]
            return
        masked = state.masks_of(module)
        if masked is None:
            return
        k_len = layer_length(cache.layers[module.layer_idx])
        if not 0 < k_len < state.k_len or len(masked[-1]) == 0:
            return
        k_len += kwargs["hidden_states"].shape[1]
        if int(masked[-1].max()) >= k_len:
            raise ValueError(
                f"{type(self.press).__name__} masked positions while decoding, and the cache was then cut back to "
                f"{k_len} positions, short of them: ask one question per prefill"
            )

    # From what the press did to one merge.

    def _merge(
        self,
        module: nn.Module,
        layer: OpenLayer,
        masked_before: Any,
        hidden_states: torch.Tensor | None,
        kwargs: dict[str, Any],
        limit: int | None,
    ) -> None:
        """Commit what the press left, with the survivors of a new eviction merged into."""
        state = self._states[module]
        masked_before = None if is_same(masked_before, state.stale_masks) else masked_before
        masked_after = state.masks_of(module)
        k_len, n_slots = layer.lengths()
        newly_masked = masked_after is not None and not is_same(masked_after, masked_before)
        if n_slots >= k_len and not newly_masked:
            layer.commit()
            return

        left = layer.left()
        if n_slots < k_len and left.positions is None:
            raise not_followed(self.press)
        eviction = state.find_eviction(left, k_len, masked_before, masked_after, limit)
        self.report.record(int(module.layer_idx), eviction)  # type: ignore[arg-type]
        if eviction.n_evicted == 0:
            layer.commit()
            return
        new_keys, new_values = self.fold(
            module, hidden_states, *layer.before(), left.keys, left.values, eviction, kwargs
        )
        check_folded(self, new_keys, left.keys)
        check_folded(self, new_values, left.values)
        layer.commit(
            None if new_keys is left.keys else new_keys,
            None if new_values is left.values else new_values,
        )


def _own_compression_ratios(press: BasePress) -> list[tuple[BasePress, Any]]:
    """The ratios that presses set on those inside them for one call, and would leave so if it fails."""
    return [
        (inner, vars(inner)["compression_ratio"])
        for inner in nested_presses(press)
        if "compression_ratio" in vars(inner)
    ]


@contextmanager
def _unchanged(seen: dict[nn.Module, Cache], modules: list[nn.Module]) -> Generator[None, None, None]:
    """Undo what is done inside to the caches of the layers seen, and to the masks of all."""
    masked_before = {module: masks_of(module) for module in modules}
    layers = [(module, layer_of(cache, module.layer_idx)) for module, cache in seen.items()]  # type: ignore[arg-type]
    try:
        for _, layer in layers:
            layer.open()
        yield
    finally:
        for _, layer in layers:
            layer.restore()
        for module, masked in masked_before.items():
            if not is_same(masks_of(module), masked):
                module.masked_key_indices = masked  # type: ignore[assignment]
