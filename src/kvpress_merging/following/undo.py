# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""What a press may change, as it is now: to be put back should something fail, and to tell what entering adds to it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from kvpress_merging.following.cache import OpenLayer


def contents_of(objects: Iterable[Any]) -> list[tuple[Any, Any]]:
    """The attributes of each object, and each list and dict among them, with a copy of what it holds."""
    places = []
    for item in objects:
        places += [vars(item), *(value for value in vars(item).values() if isinstance(value, (list, dict)))]
    return [(place, place.copy()) for place in places]


class Snapshot:
    """
    The attributes of presses, modules or other objects, and the content of cache layers that are not open yet.

    The items of lists and dicts among the attributes are kept too, and which of a module's parameters require a
    gradient. What a press writes into the tensors of the layers is undone too.
    """

    def __init__(self, *objects: Any, layers: Iterable[OpenLayer] = ()):
        self.layers = list(layers)
        self.contents = contents_of([*objects, *(part for layer in self.layers for part in (layer.cache, layer.layer))])
        self.requires_grad = [
            (parameter, parameter.requires_grad)
            for module in objects
            if isinstance(module, nn.Module)
            for parameter in module.parameters(recurse=False)
        ]

    def __enter__(self) -> Snapshot:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, traceback: Any) -> None:
        """Put everything back if something failed."""
        if kind is not None:
            self.restore()

    def restore(self) -> None:
        """Put everything back."""
        for layer in self.layers:
            layer.undo_writes()
        for place, content in self.contents:
            if isinstance(place, list):
                place[:] = content
            # Not touched where it holds these items in this order, since others may be reading it.
            elif list(place) != list(content) or any(place[name] is not value for name, value in content.items()):
                place.clear()
                place.update(content)
        for parameter, requires_grad in self.requires_grad:
            parameter.requires_grad_(requires_grad)


class EnteredModel:
    """A model that a press is about to be entered on, and what entering puts there, to be taken off."""

    def __init__(self, model: PreTrainedModel):
        self.config, self.attn_implementation = model.config, model.config._attn_implementation
        self.contents = [(place, content) for place, content in contents_of(model.modules()) if isinstance(place, dict)]
        # The press's hooks, and ours; None while it is being entered, when all that are new are.
        self.hooks: list[tuple[dict[Any, Any], Any]] | None = None

    def new_hooks(self) -> list[tuple[dict[Any, Any], Any]]:
        """The hooks that are there now and were not before: the dict of their kind and module, and their number."""
        return [(hooks, number) for hooks, number in self._additions() if isinstance(number, int)]

    def take_off_leavings(self) -> None:
        """Take off what presses leave when all goes well: a ``forward`` that was the class's, a lent ``rotary_emb``."""
        for place, content in self.contents:
            for name in ("forward", "rotary_emb"):
                if name in content:
                    place[name] = content[name]
                else:
                    place.pop(name, None)

    def take_off(self) -> None:
        """Take off everything, after an exception that kept the press from it."""
        self.config._attn_implementation = self.attn_implementation
        for hooks, number in self.new_hooks() if self.hooks is None else self.hooks:
            hooks.pop(number, None)
        for place, name in self._additions():
            # A forward that the press kept, to put it back.
            if isinstance(name, str) and callable(place[name]) and not isinstance(place[name], nn.Module):
                del place[name]
        self.take_off_leavings()

    def _additions(self) -> list[tuple[dict[Any, Any], Any]]:
        return [(place, name) for place, content in self.contents for name in place.keys() - content.keys()]
