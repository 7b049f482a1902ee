# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""
A press around a press that kvpress takes for the inner one.

kvpress's pipeline and evaluation ask ``isinstance(press, KeyRerotationPress)`` and the like, and read and write fields
such as ``press.threshold``. ``PressWrapper`` answers these as the press inside would.
"""

from __future__ import annotations

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
    """
    A subclass of ``inner`` that is never instantiated: calling it makes an ``own``.

    ``dataclasses.replace`` calls ``instance.__class__``, and the dataclass ``__repr__`` and ``__eq__`` read its name
    and compare it.
    """

    def make(cls: type, *args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    meta = type(f"{own.__name__}Meta", (type(inner),), {"__call__": make})
    names = ("__module__", "__qualname__", "__doc__")
    return meta(own.__name__, (inner,), {name: getattr(own, name) for name in names})


def _rebuild(cls: type, kwargs: dict[str, Any]) -> Any:
    return cls(**kwargs)


@dataclass
class PressWrapper(BasePress):
    """
    Base of presses that wrap another press and are used in its place.

    To ``isinstance`` such a press is of its own class and of the inner press's, except where the inner one is a
    ``ScorerPress``: other presses ask scorers for scores, and would then pass the wrapper by. Attributes that the
    wrapper does not have are read from, and written to, the inner press.

    Parameters
    ----------
    press : BasePress
        The press that is wrapped.
    """

    press: BasePress

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        own = type(self)
        inner = self.__dict__.get("press")
        if inner is None or isinstance(inner, ScorerPress):
            return own
        return _stand_in(own, type(inner))  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        if (name.startswith("__") and name.endswith("__")) or "press" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self.press, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in type(self).__dataclass_fields__:
            self._check_field(name, value)
        elif not hasattr(type(self), name):
            setattr(self.press, name, value)
            return
        object.__setattr__(self, name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), {f.name: getattr(self, f.name) for f in fields(type(self)) if f.init})

    def _check_field(self, name: str, value: Any) -> None:
        """Raise a TypeError or ValueError if ``value`` is not allowed for the field ``name``."""

    def post_init_from_model(self, model: Any) -> None:
        """Passed on to the inner press."""
        self.press.post_init_from_model(model)

    @property
    def compression_ratio(self) -> float:
        """The inner press's, read and written through; what it raises where it is read-only or not known yet is
        raised."""
        return self.press.compression_ratio  # type: ignore[attr-defined]

    @compression_ratio.setter
    def compression_ratio(self, value: float) -> None:
        self.press.compression_ratio = value  # type: ignore[attr-defined]

    def score(self, *args: Any, **kwargs: Any) -> Any:
        """
        Not offered: a press that asks for scores evicts by itself, and what this press does would be lost.

        Raises
        ------
        TypeError
            Always.
        """
        inner, own = type(self.press).__name__, type(self).__name__
        raise TypeError(
            f"{own} has no scores to give to the press around it, which would evict without merging: "
            f"wrap that press instead, {own}(OuterPress({inner}(...)))"
        )
