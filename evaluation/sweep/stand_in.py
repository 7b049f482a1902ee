# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""
A press that watches a prefill of a model from a stand-in of it.

A *stand-in* has the model's parameters, but attention layers, and modules inside them, of its own: for hooks and masks
of its own. When a module of the model has run, its stand-in is called. It computes nothing: it gives the model's output
as its own, an attention layer after it has put a copy of the layer's keys and values into the press's own cache, and
PyTorch runs the press's hooks.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from contextlib import ExitStack
from typing import Any

import torch
from kvpress import BasePress
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from evaluation.prefill import put_masks
from kvpress_merging.following.model import attention_modules


class CannotShareError(Exception):
    """The press needs a prefill of its own. The message says what it does."""


class Watcher:
    """
    One press on its stand-in of a model.

    Parameters
    ----------
    model : PreTrainedModel
        The model.
    press : BasePress or None
        The press; None leaves the cache as it is.
    """

    def __init__(self, model: PreTrainedModel, press: BasePress | None):
        self.press = press
        self.cache = DynamicCache()
        self.context = ExitStack()
        self.attention = attention_modules(model)
        self.stand_ins: dict[nn.Module, Any] = {}
        self.model = _stand_in(model, set(self.attention), self.stand_ins)
        self.watched: set[nn.Module] = set(self.attention)
        put_masks([self.stand_ins[module] for module in self.attention], [None] * len(self.attention))

    def enter(self) -> None:
        """Enter the press's context, and see that it works in hooks on attention layers, or inside them, alone."""
        if self.press is None:
            return
        before = {module: _traits(module) for module in self.model.modules()}
        names = {module: name or "the model" for name, module in self.model.named_modules()}
        of_stand_in = {stand_in: module for module, stand_in in self.stand_ins.items()}
        own = {self.stand_ins[inner] for module in self.attention for inner in module.modules()}
        self.context.enter_context(self.press(self.model))
        for module in self.model.modules():
            if module not in before:
                raise CannotShareError(f"it adds a {type(module).__name__} to the model")
            hooks, forward = _traits(module)
            if forward is not before[module][1]:
                raise CannotShareError(f"it replaces the forward of {names[module]}")
            if hooks != before[module][0]:
                if module not in own and not _only_look(module, before[module][0]):
                    raise CannotShareError(f"it puts a hook on {names[module]}")
                self.watched.add(of_stand_in[module])

    def watch(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Let the press do what it does when a watched module has run; to its own cache, if that is attention."""
        stand_in, layer = self.stand_ins[module], None
        if module in self.attention:
            layer = kwargs["past_key_values"].layers[module.layer_idx]
            kwargs = {**kwargs, "past_key_values": self.cache}

        own_forward = vars(stand_in).get("forward")

        def put_back() -> None:
            vars(stand_in).pop("forward", None)
            if own_forward is not None:
                stand_in.forward = own_forward

        def forward(*given_args: Any, **given_kwargs: Any) -> Any:
            put_back()  # a press may call the layer's own forward in its hook
            if not _is_same([*args, *kwargs.values()], [*given_args, *map(given_kwargs.get, kwargs)]):
                raise CannotShareError(f"it changes what a {type(module).__name__} is given")
            if layer is not None:
                self.cache.update(layer.keys, layer.values, module.layer_idx)  # type: ignore[arg-type]
            return output

        stand_in.forward = forward
        try:
            result = stand_in(*args, **kwargs)
        finally:
            put_back()
        if result is not output and (isinstance(output, torch.Tensor) or not _is_same(output, result)):
            raise CannotShareError(f"it changes what a {type(module).__name__} gives")

    def leave(self) -> None:
        """Leave the press's context."""
        self.context.close()

    def give_up(self) -> None:
        """Leave the press's context as an exception does, and let go of what it holds."""
        with contextlib.suppress(Exception):
            self.context.__exit__(*sys.exc_info())
        self.cache = DynamicCache()

    def masked_key_indices(self) -> list[Any]:
        """What the press masked in each attention layer."""
        return [getattr(self.stand_ins[module], "masked_key_indices", None) for module in self.attention]


def _stand_in(module: Any, attention: set[nn.Module], stand_ins: dict[nn.Module, Any], inside: bool = False) -> Any:
    """A copy of a module, and of those on the way to and inside of ``attention``; other modules are its own."""
    stand_in = stand_ins[module] = copy.copy(module)
    for name, value in vars(module).items():
        if isinstance(value, dict):  # hooks, parameters, modules
            vars(stand_in)[name] = value.copy()
    inside = inside or module in attention
    for name, child in module.named_children():
        if inside or not attention.isdisjoint(child.modules()):
            stand_in._modules[name] = _stand_in(child, attention, stand_ins, inside)
    return stand_in


def _traits(module: nn.Module) -> tuple[dict[str, list[int]], Any]:
    """The hooks on a module, by number, and its forward, if that is not its class's."""
    hooks = {name: list(value) for name, value in vars(module).items() if "_hooks" in name and isinstance(value, dict)}
    return hooks, vars(module).get("forward")


def _only_look(module: nn.Module, earlier: dict[str, list[int]]) -> bool:
    """Whether the hooks on a module that were not there earlier say that they change nothing."""
    hooks = {
        hook
        for name, numbers in _traits(module)[0].items()
        for number in set(numbers).difference(earlier[name])
        if callable(hook := vars(module)[name][number])
    }
    return all(getattr(hook, "only_looks", False) for hook in hooks)


def _is_same(values: Any, others: Any) -> bool:
    return len(values) == len(others) and all(value is other for value, other in zip(values, others))
