# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""What a press and its fields have to be, what kvpress's presses cannot do, and the errors that say so."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

import torch
from kvpress import (
    BasePress,
    ComposedPress,
    FinchPress,
    KeyRerotationPress,
    KVComposePress,
    PrefillDecodingPress,
    ThinKPress,
)
from transformers import Cache
from transformers.cache_utils import QuantizedLayer


def check_int(name: str, value: Any, min_value: int) -> None:
    """Raise a TypeError unless ``value`` is a whole number, and a ValueError if it is below ``min_value``."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < min_value:
        raise ValueError(f"{name} must be at least {min_value}, got {value!r}")


def check_number(name: str, value: Any) -> float:
    """The value; raise a TypeError unless it is a real number."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return value  # type: ignore[return-value]


def rotates_keys(press: BasePress) -> bool:
    """Whether the press writes keys for new positions of the survivors."""
    return isinstance(press, KeyRerotationPress) or (isinstance(press, FinchPress) and press.rerotate_keys)


def rotated_keys_error(press: BasePress) -> ValueError:
    """Keys that the press rotated anew were to be blended with those of the cache."""
    return ValueError(
        f"merge_keys=True cannot be used with {type(press).__name__}, which writes new keys for the survivors: "
        "blending in the old ones would undo that; use merge_keys=False"
    )


def evicts_no_positions(press: BasePress) -> bool:
    """Whether the press, or each of those that it is made of, prunes channels alone."""
    if isinstance(press, ComposedPress):
        return all(evicts_no_positions(child) for child in press.presses)
    if isinstance(press, PrefillDecodingPress) and press.decoding_press is None and press.prefilling_press is not None:
        return evicts_no_positions(press.prefilling_press)
    return isinstance(press, ThinKPress)


def refuse_what_the_press_gets_wrong(press: BasePress, cache: Cache, bsz: int) -> None:
    """Raise a ValueError where the press would compress this cache to something else than it means to."""
    if not isinstance(press, KVComposePress):
        return
    if any(isinstance(layer, QuantizedLayer) for layer in cache.layers):
        raise ValueError("KVComposePress cannot compress a QuantizedCache: use a DynamicCache")
    if bsz > 1:
        raise ValueError(f"KVComposePress scores one sequence at a time, got a batch of {bsz}: prefill them one by one")


def not_followed(press: BasePress) -> ValueError:
    """The press rebuilt the cache from something else than rows of it."""
    return ValueError(
        f"{type(press).__name__} shortened the cache in a way that does not show which positions it kept, so what it "
        "evicted cannot be merged: let it pick survivors by indexing, slicing, gathering or concatenating the keys and "
        "values that it is given, or use it without merging. The cache was left as it was."
    )


def check_folded(press: BasePress, new: torch.Tensor, kept: torch.Tensor) -> None:
    """Raise a ValueError unless what ``fold`` gave can stand in the place of what the inner press kept."""
    for name in ("shape", "dtype", "device"):
        if getattr(new, name) != getattr(kept, name):
            raise ValueError(
                f"{type(press).__name__}.fold must return tensors of the survivors' {name}, {getattr(kept, name)}, "
                f"got {getattr(new, name)}"
            )
