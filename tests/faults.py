# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Raises an exception at any one call boundary of a run, and tells what a run may leave of a cache."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from inspect import CO_GENERATOR
from itertools import zip_longest
from types import CodeType, FrameType
from typing import Any, TypeAlias

import torch
from replay import attention_modules
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import QuantizedLayer

# Where the boundaries lie: the calls and returns of Python functions of these packages. A generator's are left out,
# since Python would unwind it there without running its ``finally``, as no exception that comes by itself does. So is
# loading a tokenizer, in which transformers swallows exceptions.
PACKAGES = (
    "/kvpress/",
    "/kvpress_merging/",
    "/transformers/models/llama/modeling_llama",
    "/transformers/cache_utils",
    "/torch/nn/modules/",
)


class Boundaries:
    """
    The calls and returns of a run, one after the other, and an exception at one of them.

    Parameters
    ----------
    raise_at : int, optional
        Which of them raises ``error``; None for a run that only counts.
    error : BaseException, optional
        What is raised.
    """

    def __init__(self, raise_at: int | None = None, error: BaseException | None = None):
        self.raise_at, self.error = raise_at, error
        self.places: list[tuple[Any, ...]] = []
        self.is_raised = False
        self._is_counted: dict[CodeType, bool] = {}

    def _profile(self, frame: FrameType, event: str, _: Any) -> None:
        if event not in ("call", "return"):
            return
        code = frame.f_code
        if code not in self._is_counted:
            is_inside = any(package in code.co_filename for package in PACKAGES)
            self._is_counted[code] = is_inside and not code.co_flags & CO_GENERATOR
        if not self._is_counted[code]:
            return
        caller = frame.f_back
        self.places.append((event, code, caller and caller.f_code, caller and caller.f_lineno))
        if len(self.places) - 1 == self.raise_at:
            sys.setprofile(None)
            assert self.error is not None
            self.is_raised = True
            raise self.error

    def __enter__(self) -> Boundaries:
        sys.setprofile(self._profile)
        return self

    def __exit__(self, *exc_info: Any) -> None:
        sys.setprofile(None)

    def chosen(self, most: int | None = None) -> Iterator[int]:
        """
        Of each function and line that calls it, the first and the last boundary; or ``most`` of these, evenly.
        """
        first: dict[tuple[Any, ...], int] = {}
        last: dict[tuple[Any, ...], int] = {}
        for n, place in enumerate(self.places):
            first.setdefault(place, n)
            last[place] = n
        differing = sorted({*first.values(), *last.values()})
        n_chosen = len(differing) if most is None else min(most, len(differing))
        yield from (differing[i * len(differing) // n_chosen] for i in range(n_chosen))


def tracks_of(model: PreTrainedModel) -> dict[str, Any]:
    """What a press may leave behind on a model, and in torch."""
    tracks: dict[str, Any] = {
        "attn_implementation": model.config._attn_implementation,
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
    }
    for name, module in model.named_modules(remove_duplicate=False):
        tracks[name] = (
            set(vars(module)) - {"masked_key_indices"},  # speaks of a cache
            vars(module).get("forward"),
            *(tuple(hooks.items()) for attribute, hooks in vars(module).items() if attribute.endswith("_hooks")),
        )
    return tracks


Print: TypeAlias = tuple[bytes, bytes, bytes] | None


def print_of(module: Any, layer: Any) -> Print:
    """The bits of one cache layer and of its mask; None where nothing has been written to it."""
    if layer is None or layer.keys is None:
        return None
    assert not {"_quantize", "_dequantize"}.intersection(vars(layer))
    parts = [layer.keys], [layer.values]
    if isinstance(layer, QuantizedLayer):
        stored = layer._quantized_keys, layer._quantized_values
        parts = tuple([layer._dequantize(old), *new] for old, new in zip(stored, parts))
    assert all(type(part) is torch.Tensor for both in parts for part in both)
    if all(part.numel() == 0 for part in parts[1]):
        return None
    keys, values = (torch.cat([part for part in both if part.numel()], dim=2).detach() for both in parts)
    is_masked = torch.zeros(values.shape[:3], dtype=torch.bool)
    masks = getattr(module, "masked_key_indices", None)
    if masks is not None:
        is_masked[tuple(masks)] = True
    keys[is_masked] = 0  # attention overwrites these
    return keys.numpy().tobytes(), values.numpy().tobytes(), is_masked.numpy().tobytes()


def prints_of(model: PreTrainedModel, cache: Cache) -> list[Print]:
    """:func:`print_of` of every layer."""
    return [print_of(module, layer) for module, layer in zip_longest(attention_modules(model), cache.layers)]


@contextmanager
def watched_updates(cache: Cache, watch: Callable[[int], None]) -> Generator[None, None, None]:
    """Call ``watch(layer_idx)`` whenever the model has written to a layer of ``cache``, before any eviction."""
    original = cache.update

    def update(keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        out = original(keys, values, layer_idx, *args, **kwargs)
        watch(layer_idx)
        return out

    cache.update = update  # type: ignore[method-assign]
    try:
        yield
    finally:
        del cache.update
