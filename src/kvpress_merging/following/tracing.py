# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""
Tensors that remember which cache positions they hold.

A press is run on ``TracedTensor`` views of one layer's keys and values. What it does to pick survivors (indexing,
slicing, gathering, concatenating, reshaping) is done to the positions too; every other operation sees a plain tensor.
So the positions that a press kept can be read off what it returns, whatever its class.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeGuard

import torch

Function: TypeAlias = Callable[..., Any]
Args: TypeAlias = tuple[Any, ...]
Kwargs: TypeAlias = dict[str, Any]

# A row that did not come from the traced cache: a token that the press appended for its own use.
FOREIGN = -1

# In-place operations that may put other rows at a position. Every other in-place operation changes rows where they are.
_MOVING = {"copy_", "set_", "resize_", "put_", "index_copy_", "index_put_", "index_fill_", "masked_scatter_"}
_MOVING |= {"scatter_", "scatter_add_", "scatter_reduce_", "__setitem__", "__set__"}
_MOVING |= {"swapaxes_", "swapdims_", "transpose_", "t_", "squeeze_", "unsqueeze_", "as_strided_"}
_SAME_ROWS = {"contiguous", "clone", "detach", "alias", "to", "type", "type_as", "cpu", "cuda"}
_SAME_ROWS |= {"float", "half", "bfloat16", "double"}
_RESHAPING = {"view", "view_as", "reshape", "reshape_as", "flatten", "unflatten"}
_EXPANDING = {"expand", "expand_as", "broadcast_to"}
_BY_DIM = {"transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis", "unsqueeze", "squeeze", "flip"}
_BY_DIM |= {"narrow", "select", "split", "split_with_sizes", "chunk", "tensor_split", "unbind"}
_INDEXING = {"gather", "take_along_dim", "index_select", "repeat_interleave"}
_JOINING = {"cat", "concat", "concatenate", "stack"}
_GET_DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]


class Origin:
    """The cache tensor that traced tensors stem from, and what was done to it."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor
        self.is_lost = False
        self.is_modified = False
        self._original: torch.Tensor | None = None

    @property
    def original(self) -> torch.Tensor:
        """The tensor as it was before the press wrote into it."""
        return self.tensor if self._original is None else self._original

    def keep_original(self, written: torch.Tensor) -> None:
        """Save the tensor before the first in-place write that reaches its storage."""
        self.is_modified = True
        if self._original is None and written.untyped_storage()._cdata == self.tensor.untyped_storage()._cdata:
            self._original = self.tensor.clone()

    def undo_writes(self) -> None:
        """Undo what the press wrote into the tensor."""
        if self._original is not None:
            self.tensor.copy_(self._original)


class TracedTensor(torch.Tensor):
    """
    A view of a cache tensor that carries the position of each of its rows along.

    A row is what lies along the last dimension, so the positions of a tensor of shape ``(..., head_dim)`` have the
    shape ``(..., 1)``. They are worked out only when they are asked for, except through indexing, whose index the
    press may change later.
    """

    _origin: Origin
    _rows: Callable[[], torch.Tensor]
    _has_foreign_rows: bool = False

    @classmethod
    def __torch_function__(
        cls, func: Function, types: Sequence[type], args: Args = (), kwargs: Kwargs | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        with torch._C.DisableTorchFunctionSubclass():
            if _writes_in_place(name):
                _before_write(name, args, kwargs)
            written = kwargs.get("out")
            for tensor in written if isinstance(written, (tuple, list)) else (written,):
                _before_write("copy_", (tensor,), {})
            out = func(*args, **kwargs)
            return _follow(name, func, args, kwargs, out)


def trace(tensor: torch.Tensor) -> TracedTensor:
    """View a cache tensor as one that holds the positions ``0 .. k_len - 1`` in every head. Shares its memory."""

    def identity() -> torch.Tensor:
        return torch.arange(tensor.shape[2], device=tensor.device)[:, None].expand(*tensor.shape[:3], 1)

    traced = tensor.as_subclass(TracedTensor)
    traced._origin, traced._rows = Origin(tensor), identity
    return traced


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor without its positions. Shares its memory."""
    return tensor.as_subclass(torch.Tensor) if isinstance(tensor, TracedTensor) else tensor


def with_rows_of(tensor: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """``tensor`` as a stand-in for ``source``, of the same shape: traced, and at the same positions, if that is."""
    return _child(source, tensor, source._rows) if isinstance(source, TracedTensor) else tensor


def is_traced(tensor: torch.Tensor) -> TypeGuard[TracedTensor]:
    """Whether the positions that ``tensor`` holds are known."""
    return isinstance(tensor, TracedTensor) and not tensor._origin.is_lost


def positions_of(tensor: torch.Tensor) -> torch.Tensor | None:
    """The positions that ``tensor`` holds, int64, shape ``tensor.shape[:-1]``, or ``FOREIGN``; None if not known."""
    if not is_traced(tensor):
        return None
    with torch._C.DisableTorchFunctionSubclass():
        return tensor._rows().squeeze(-1)


def has_foreign_rows(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` may hold rows that did not come from the traced cache."""
    return isinstance(tensor, TracedTensor) and tensor._has_foreign_rows


def _writes_in_place(name: str) -> bool:
    if name in ("__setitem__", "__set__"):
        return True
    if name.startswith("__i") and name.endswith("__") and name not in ("__index__", "__int__", "__invert__"):
        return True
    return name.endswith("_") and not name.endswith("__") and name != "requires_grad_"


def _before_write(name: str, args: Args, kwargs: Kwargs) -> None:
    target = args[0] if args else None
    if not isinstance(target, TracedTensor):
        return
    target._origin.keep_original(target)
    if name not in _MOVING:
        return
    if name == "scatter_" and len(args) > 1 and args[1] in (-1, target.dim() - 1):
        return  # along channels: rows stay where they are
    value = kwargs.get("value", args[-1])
    is_scalar = not isinstance(value, torch.Tensor) or value.dim() == 0
    if not (name in ("__setitem__", "index_fill_", "scatter_", "index_put_") and is_scalar):
        target._origin.is_lost = True


def _follow(name: str, func: Function, args: Args, kwargs: Kwargs, out: Any) -> Any:
    if name in _JOINING:
        return _follow_join(func, args, kwargs, out)
    source = args[0] if args else None
    if not isinstance(source, TracedTensor):
        return _to_plain(out)
    if out is source:
        return out
    parent = source._rows

    if name in _SAME_ROWS or func == _GET_DATA:
        return _child(source, out, parent) if out.shape == source.shape else _to_plain(out)
    if name in _RESHAPING or name in _EXPANDING:
        if out.shape[-1:] != source.shape[-1:]:
            return _to_plain(out)
        shape = (*out.shape[:-1], 1)
        reshape = torch.Tensor.expand if name in _EXPANDING else torch.Tensor.reshape
        return _child(source, out, lambda: reshape(parent(), shape))
    if name in _BY_DIM:
        return _follow_by_dim(func, source, args[1:], kwargs, out)
    if name == "__getitem__":
        return _follow_getitem(source, args[1], out)
    if name in _INDEXING:
        return _follow_index(name, source, args, kwargs, out)
    return _to_plain(out)


def _follow_by_dim(func: Function, source: TracedTensor, args: Args, kwargs: Kwargs, out: Any) -> Any:
    # The positions have the tensor's dimensions but for the last, which has size 1: the same call does the same to
    # them, and a call that touches the last dimension does not give the shape that is expected, or fails.
    outs = out if isinstance(out, (tuple, list)) else (out,)
    probe = torch.empty((*source.shape[:-1], 1), device="meta")
    try:
        shapes = func(probe, *args, **kwargs)
    except (RuntimeError, IndexError, ValueError):
        return _to_plain(out)
    shapes = shapes if isinstance(shapes, (tuple, list)) else (shapes,)
    if len(shapes) != len(outs) or any(s.shape != (*o.shape[:-1], 1) for s, o in zip(shapes, outs)):
        return _to_plain(out)
    parent = source._rows
    if not isinstance(out, (tuple, list)):
        return _child(source, out, lambda: func(parent(), *args, **kwargs))
    return type(out)(
        _child(source, o, lambda i=i: func(parent(), *args, **kwargs)[i])  # type: ignore[misc]
        for i, o in enumerate(outs)
    )


def _follow_getitem(source: TracedTensor, index: Any, out: torch.Tensor) -> torch.Tensor:
    index = index if isinstance(index, tuple) else (index,)
    masks = (torch.bool, torch.uint8)
    consumed = sum(
        item.dim() if isinstance(item, torch.Tensor) and item.dtype in masks else 1
        for item in index
        if item is not None and item is not Ellipsis
    )
    # What applies to the last dimension if anything does: None items add dimensions before it.
    last = index[-1] if index and (index[-1] is Ellipsis or isinstance(index[-1], slice)) else None
    has_ellipsis = any(item is Ellipsis for item in index)
    touches_last = consumed >= source.dim() or (has_ellipsis and last is not Ellipsis)
    if touches_last and not (consumed <= source.dim() and last == slice(None)):
        return _to_plain(out)
    parent = source._rows
    if any(isinstance(item, (torch.Tensor, list)) for item in index):
        rows = parent()[index]
        return _child(source, out, lambda: rows)
    return _child(source, out, lambda: parent()[index])


def _follow_index(name: str, source: TracedTensor, args: Args, kwargs: Kwargs, out: torch.Tensor) -> torch.Tensor:
    bound = dict(zip(("dim", "index") if name in ("gather", "index_select") else ("index", "dim"), args[1:]))
    bound.update(kwargs)
    index: Any = bound.get("index", bound.get("indices", bound.get("repeats")))
    dim = bound.get("dim")
    if dim is None or dim in (-1, source.dim() - 1):
        return _to_plain(out)
    parent = source._rows
    if name == "index_select":
        rows = parent().index_select(dim, index)
    elif name == "repeat_interleave":
        rows = parent().repeat_interleave(index, dim=dim)
    else:
        # A gather may take other rows for other channels; then no position belongs to a row.
        head = index[..., :1]
        is_one_row = index.shape[-1] == 1 or index.stride(-1) == 0 or torch.equal(index, head.expand_as(index))
        if not is_one_row or out.shape[-1] != source.shape[-1]:
            return _to_plain(out)
        rows = parent().gather(dim, head) if name == "gather" else parent().take_along_dim(head, dim=dim)
    return _child(source, out, lambda: rows)


def _follow_join(func: Function, args: Args, kwargs: Kwargs, out: torch.Tensor) -> torch.Tensor:
    tensors = args[0] if args else kwargs["tensors"]
    traced = [tensor for tensor in tensors if isinstance(tensor, TracedTensor)]
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
    is_stack = getattr(func, "__name__", "") == "stack"
    if not traced or dim in (-1, out.dim() - 1) or any(t._origin is not traced[0]._origin for t in traced):
        return _to_plain(out)
    if is_stack and len(traced) != len(tensors):
        return _to_plain(out)
    parts: list[Callable[[], torch.Tensor]] = []
    for tensor in tensors:
        if isinstance(tensor, TracedTensor):
            parts.append(tensor._rows)
        elif tensor.dim() == traced[0].dim():  # an empty 1-D tensor, as a fresh cache layer holds, adds no rows
            rows = torch.full((*tensor.shape[:-1], 1), FOREIGN, device=tensor.device)
            parts.append(lambda rows=rows: rows)  # type: ignore[misc]
    join: Function = torch.stack if is_stack else torch.cat
    child = _child(traced[0], out, lambda: join([part() for part in parts], dim=dim))
    child._has_foreign_rows = len(parts) != len(traced) or any(has_foreign_rows(tensor) for tensor in traced)
    return child


def _child(source: TracedTensor, out: torch.Tensor, rows: Callable[[], torch.Tensor]) -> TracedTensor:
    child = out.as_subclass(TracedTensor)
    child._origin, child._rows, child._has_foreign_rows = source._origin, rows, source._has_foreign_rows
    return child


def _to_plain(out: Any) -> Any:
    if isinstance(out, (tuple, list)) and any(isinstance(item, TracedTensor) for item in out):
        return type(out)(map(plain, out))
    return plain(out)
