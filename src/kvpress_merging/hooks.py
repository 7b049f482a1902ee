# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""The modules of a model that presses work on: find them, follow the hooks put on them, take off what is left there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import copy
from typing import Any

import torch
import torch._dynamo.config
from kvpress import BasePress
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from kvpress_merging.wrapping import nested_presses

# Or a compiled model would overlook hooks put on or taken off after its first run: a press would silently do nothing,
# or go on when its context is left.
torch._dynamo.config.skip_nnmodule_hook_guards = False


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The attention layers, where kvpress finds them."""
    base = getattr(model, "model", model)
    language_model = getattr(base, "language_model", base)
    return [layer.self_attn for layer in getattr(language_model, "layers", ())]


def uncompiled(hook: Callable[..., Any]) -> Callable[..., Any]:
    """The hook, for which a model compiled with ``torch.compile`` leaves its graph."""
    return torch.compiler.disable(hook)


def replace_new_hooks(module: nn.Module, earlier: set[int] | None, followed: Callable) -> None:
    """Put ``followed(hook)`` in place of each hook that the inner press has just put on ``module``."""
    for hook_id, hook in module._forward_hooks.items():
        if hook_id not in (earlier or ()):
            takes_kwargs = hook_id in module._forward_hooks_with_kwargs
            followed_hook = followed(hook if takes_kwargs else _dropping_kwargs(hook))
            module._forward_hooks[hook_id] = uncompiled(followed_hook)
            module._forward_hooks_with_kwargs[hook_id] = True


def _dropping_kwargs(hook: Callable) -> Callable:
    return lambda module, args, kwargs, output: hook(module, args, output)


def remove(handles: Iterable[Any]) -> None:
    """Take off the hooks of these handles."""
    for handle in handles:
        handle.remove()


class Tracks:
    """
    What a press and its context put on a model and into the presses, to be taken back.

    Some of it every press leaves behind: ``forward`` as an attribute of a module that had it from its class, and
    ``rotary_emb``, lent to the attention layers. The rest a press takes back itself, unless an exception keeps it from
    that: hooks, kept forwards, the attention implementation, the presses' own attributes.

    Parameters
    ----------
    model : PreTrainedModel
        The model, before the press is entered.
    press : BasePress
        The press.
    """

    def __init__(self, model: PreTrainedModel, press: BasePress):
        self.model, self.press = model, press
        self.attn_implementation = model.config._attn_implementation
        self.names = {module: set(vars(module)) for module in model.modules()}
        self.forwards = {module: vars(module).get("forward") for module in self.names}
        self.without_rotary_emb = [module for module in attention_modules(model) if not hasattr(module, "rotary_emb")]
        # Hooks are numbered as they are put on: those of the press before its context's body runs and after it.
        self.first_hook = self.body_hooks_start = self.body_hooks_end = RemovableHandle.next_id
        self.attributes = [_attributes_of(inner) for inner in nested_presses(press)]
        self.module_attributes: dict[nn.Module, dict[str, Any]] = {}
        self.requires_grad: dict[nn.Parameter, bool] = {}

    def entered(self) -> None:
        """The press has been entered: what it has loaded by now stays, and hooks from here on are not its own."""
        self.attributes = [_attributes_of(inner) for inner in nested_presses(self.press)]
        self.body_hooks_start = self.body_hooks_end = RemovableHandle.next_id

    def leaving(self) -> None:
        """The body is done and the press is about to be left: all that changes on the model from here on is its."""
        self.module_attributes = {module: dict(vars(module)) for module in self.model.modules()}
        self.requires_grad = {parameter: parameter.requires_grad for parameter in self.model.parameters()}
        self.body_hooks_end = RemovableHandle.next_id

    def remove(self) -> None:
        """Take off what presses leave behind when all goes well."""
        for module, forward in self.forwards.items():
            if forward is None:
                vars(module).pop("forward", None)
            else:
                module.forward = forward
        for module in self.without_rotary_emb:
            if hasattr(module, "rotary_emb"):
                del module.rotary_emb

    def undo(self) -> None:
        """Take off everything, after an exception: model and presses are as they were."""
        self.model.config._attn_implementation = self.attn_implementation
        for module, attributes in self.module_attributes.items():
            # What is masked belongs to the cache, and is put back with it.
            attributes |= {name: value for name, value in vars(module).items() if name == "masked_key_indices"}
            vars(module).clear()
            vars(module).update(attributes)
        for parameter, requires_grad in self.requires_grad.items():
            parameter.requires_grad_(requires_grad)
        for module in self.model.modules():
            self._remove_hooks(module)
            for name in set(vars(module)).difference(self.names.get(module, vars(module))):
                if callable(vars(module)[name]):  # a forward that the press kept, to put it back
                    del vars(module)[name]
        self.remove()
        for inner, attributes in self.attributes:
            vars(inner).clear()
            for name, (value, content) in attributes.items():
                vars(inner)[name] = value
                if isinstance(value, list):
                    value[:] = content
                elif isinstance(value, dict):
                    value.clear()
                    value.update(content)

    def _remove_hooks(self, module: nn.Module) -> None:
        for name, hooks in vars(module).items():
            if "_hooks" in name and isinstance(hooks, dict):
                for hook_id in [hook_id for hook_id in hooks if self._is_of_the_press(hook_id)]:
                    del hooks[hook_id]

    def _is_of_the_press(self, hook_id: Any) -> bool:
        if not isinstance(hook_id, int) or hook_id < self.first_hook:
            return False
        return not self.body_hooks_start <= hook_id < self.body_hooks_end


def _attributes_of(press: BasePress) -> tuple[BasePress, dict[str, tuple[Any, Any]]]:
    """A press's attributes, and what its lists and dicts hold."""
    return press, {
        name: (value, copy(value) if isinstance(value, (list, dict)) else None) for name, value in vars(press).items()
    }
