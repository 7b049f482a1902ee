# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""What a press may change, as it is now, to be put back should something fail."""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from typing import Any

from torch import nn

from kvpress_merging.following.cache import OpenLayer


class Snapshot:
    """
    The attributes of presses, modules or other objects, and the content of cache layers that are not open yet.

    The items of lists and dicts among the attributes are kept too, and which of a module's parameters require a
    gradient. What a press writes into the tensors of the layers is undone too.
    """

    def __init__(self, *objects: Any, layers: Iterable[OpenLayer] = ()):
        self.layers = list(layers)
        kept = [*objects, *(part for layer in self.layers for part in (layer.cache, layer.layer))]
        self.attributes = [(item, dict(vars(item))) for item in kept]
        self.items: list[tuple[Any, Any]] = [
            (value, copy(value))
            for _, attributes in self.attributes
            for value in attributes.values()
            if isinstance(value, (list, dict))
        ]
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
        for value, items in self.items:
            if isinstance(value, list):
                value[:] = items
            else:
                _refill(value, items)
        for item, attributes in self.attributes:
            _refill(vars(item), attributes)
        for parameter, requires_grad in self.requires_grad:
            parameter.requires_grad_(requires_grad)


def _refill(changed: dict[Any, Any], items: dict[Any, Any]) -> None:
    """Make ``changed`` hold these items in this order; not touched where it does, since others may be reading it."""
    is_same = list(changed) == list(items) and all(changed[name] is value for name, value in items.items())
    if not is_same:
        changed.clear()
        changed.update(items)
