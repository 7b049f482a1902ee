# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""
A press around a press that kvpress takes for the inner one.

kvpress's pipeline and evaluation ask ``isinstance(press, KeyRerotationPress)`` and the like, and read and write fields
such as ``press.threshold``; ``PressWrapper`` answers as the press inside would.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

from kvpress import BasePress, ScorerPress


def nested_presses(press: BasePress) -> Iterator[BasePress]:
    """``press`` and every press that its attributes hold, in lists, tuples and dicts too, each once."""
    seen: set[int] = set()
    waiting: list[Any] = [press]
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, BasePress):
            yield item
            waiting.extend(vars(item).values())
        elif isinstance(item, (list, tuple)):
            waiting.extend(item)
        elif isinstance(item, dict):
            waiting.extend(item.values())


@cache
def _stand_in(own: type, inner: type) -> type:
    """A subclass of ``inner`` that makes an ``own``: ``dataclasses.replace`` calls it, ``__repr__`` reads its name."""

    def make(cls: type, *args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    meta = type(f"{own.__name__}Meta", (type(inner),), {"__call__": make})
    names = ("__module__", "__qualname__", "__doc__")
    return meta(own.__name__, (inner,), {name: getattr(own, name) for name in names})


def _has(press: BasePress, name: str) -> bool:
    """Whether there is such an attribute, without reading it: a property may raise what it likes."""
    return name in vars(press) or hasattr(type(press), name)


def _rebuild(cls: type, kwargs: dict[str, Any]) -> Any:
    return cls(**kwargs)


@dataclass
class PressWrapper(BasePress):
    """
    Base of presses that wrap another press, ``press``, and are used in its place.

    To ``isinstance`` such a press is of its own class and of the inner press's, except where the inner one is a
    ``ScorerPress``: other presses ask scorers for scores, and would then pass the wrapper by. So those that need a
    scorer refuse the wrapper, and those that take any press get an error from ``score``. Attributes that the inner
    press has and the wrapper has not are read from, and written to, the inner press.
    """

    press: BasePress

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        own, inner = type(self), self.__dict__.get("press")
        is_own = inner is None or isinstance(inner, ScorerPress)
        return own if is_own else _stand_in(own, type(inner))  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__") and "press" in self.__dict__ and _has(self.press, name):
            return getattr(self.press, name)
        raise self._no_attribute(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in type(self).__dataclass_fields__:
            self._check_field(name, value)
        elif not hasattr(type(self), name):
            if not _has(self.press, name):
                raise self._no_attribute(name)
            setattr(self.press, name, value)
            return
        object.__setattr__(self, name, value)

    def _no_attribute(self, name: str) -> AttributeError:
        own, inner = type(self), self.__dict__.get("press")
        names = {*own.__dataclass_fields__, *dir(own), *(() if inner is None else dir(inner))}
        near = difflib.get_close_matches(name, [other for other in names if not other.startswith("_")], n=1)
        return AttributeError(
            f"{own.__name__} has no attribute {name!r}"
            + (f", and neither has the {type(inner).__name__} inside it" if inner is not None else "")
            + (f"; did you mean {near[0]!r}?" if near else "")
            + "; what a merge rule keeps for itself is declared as a field of its dataclass, "
            "field(init=False, repr=False, compare=False, default_factory=...)"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), {f.name: getattr(self, f.name) for f in fields(type(self)) if f.init})

    def _check_field(self, name: str, value: Any) -> None:
        """Raise a TypeError or ValueError if ``value`` is not allowed for the field ``name``."""

    def post_init_from_model(self, model: Any) -> None:
        """Passed on to the inner press."""
        self.press.post_init_from_model(model)

    @property
    def compression_ratio(self) -> float:
        """The inner press's, read and written through, with what it raises where it is read-only or not known yet."""
        return self.__getattr__("compression_ratio")

    @compression_ratio.setter
    def compression_ratio(self, value: float) -> None:
        if not _has(self.press, "compression_ratio"):
            raise self._no_attribute("compression_ratio")
        self.press.compression_ratio = value  # type: ignore[attr-defined]

    def score(self, *args: Any, **kwargs: Any) -> Any:
        """Always a ValueError: a press that asks for scores evicts by itself, and what this one does would be lost."""
        inner, own = type(self.press).__name__, type(self).__name__
        # Within a forward pass, transformers 5.0 and 5.1 answer a TypeError with a second one over the same cache.
        raise ValueError(
            f"{own} has no scores to give to the press around it, which would evict without merging: "
            f"put {own} outermost, {own}(OuterPress({inner}(...)))"
        )
