# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""From a configuration to its press, and to the attention that goes with it."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import torch
from kvpress import (
    BasePress,
    ComposedPress,
    DecodingPress,
    DMSPress,
    DuoAttentionPress,
    FinchPress,
    ObservedAttentionPress,
    ThinKPress,
)
from transformers import PreTrainedModel
from transformers.utils import is_flash_attn_2_available

from evaluation.config import PRESS_FIELDS, EvaluationConfig
from evaluation.evaluate_registry import PRESS_REGISTRY
from kvpress_merging import MergeOnEvictPress
from kvpress_merging.wrapping import nested_presses

logger = logging.getLogger(__name__)

EVICTION_SETTINGS = (
    "compression_ratio",
    "threshold",
    "head_compression_ratio",
    "key_channel_compression_ratio",
    "compression_interval",
    "target_size",
    "hidden_states_buffer_size",
)
"""Settings that say when and how much a press evicts. Each reaches presses of some kinds only."""


def usable_settings(press: BasePress | None) -> set[str]:
    """
    Which of ``EVICTION_SETTINGS`` and ``PRESS_FIELDS`` reach a press.

    A merging press answers ``isinstance`` as the press inside and hands on what is set, so both are treated alike.
    """
    own = {field.name for field in dataclasses.fields(press)} if isinstance(press, MergeOnEvictPress) else set()
    own &= set(PRESS_FIELDS)
    if isinstance(press, DuoAttentionPress):
        return own | {"head_compression_ratio"}
    if isinstance(press, DMSPress):
        return own | {"threshold"}
    if isinstance(press, DecodingPress):
        return own | {"compression_interval", "target_size", "hidden_states_buffer_size"}
    for child in press.presses if isinstance(press, ComposedPress) else [press]:
        if isinstance(child, ThinKPress):
            own.add("key_channel_compression_ratio")
        elif hasattr(child, "compression_ratio"):
            own.add("compression_ratio")
    return own


def configure_press(config: EvaluationConfig) -> BasePress | None:
    """
    Make the press that a configuration names, and set its fields as kvpress's evaluation sets those of the bare one.

    Raises
    ------
    ValueError
        If the press needs a setting that is not there, cannot use one that is, or refuses a value.
    """
    press = PRESS_REGISTRY[config.press_name]
    usable = usable_settings(press)
    for name in (*EVICTION_SETTINGS, *PRESS_FIELDS):
        # There is always a ratio, if only the default one.
        if name != "compression_ratio" and name not in usable and getattr(config, name) is not None:
            raise ValueError(f"--{name} is of no use for the press {config.press_name}")
    if isinstance(press, DuoAttentionPress):
        press.head_compression_ratio = _needed(config, "head_compression_ratio")
    elif isinstance(press, DMSPress):
        press.threshold = _needed(config, "threshold")
    elif isinstance(press, DecodingPress):
        for name in usable & set(EVICTION_SETTINGS):
            if getattr(config, name) is not None:
                setattr(press, name, getattr(config, name))
    elif press is not None:
        for child in press.presses if isinstance(press, ComposedPress) else [press]:
            if isinstance(child, ThinKPress):
                child.key_channel_compression_ratio = _needed(config, "key_channel_compression_ratio")
            elif hasattr(child, "compression_ratio"):
                child.compression_ratio = config.compression_ratio
            else:
                logger.warning("%s has no compression ratio", type(child).__name__)
    own = {name: getattr(config, name) for name in PRESS_FIELDS if getattr(config, name) is not None}
    if own:
        try:
            # Not one after the other: the press checks them together.
            press = dataclasses.replace(press, **own)  # type: ignore[type-var]
        except TypeError as error:
            raise ValueError(str(error)) from error
    if isinstance(press, FinchPress) and not config.query_aware:
        raise ValueError(
            f"the press {config.press_name} needs --query_aware: it evicts what the question has no use for"
        )
    if config.dataset == "fidelity" and isinstance(press, (DecodingPress, FinchPress)):
        raise ValueError(
            f"the dataset fidelity needs a press that evicts at prefill without a question, not {config.press_name}"
        )
    return press


def choose_attention(config: EvaluationConfig, press: BasePress | None, model: PreTrainedModel) -> str:
    """
    How attention is to be computed, as kvpress's evaluation chooses.

    Parameters
    ----------
    config : EvaluationConfig
        Its ``model_kwargs`` may say.
    press : BasePress or None
        An ``ObservedAttentionPress``, at whatever depth, needs attention weights: ``"eager"``.
    model : PreTrainedModel
        Where it runs in half precision on a GPU, and FlashAttention 2 is installed, that is taken.

    Returns
    -------
    str
        The name of transformers' implementation.
    """
    if press is not None and any(isinstance(inner, ObservedAttentionPress) for inner in nested_presses(press)):
        return "eager"
    is_half = model.device.type == "cuda" and model.dtype in (torch.float16, torch.bfloat16)
    if is_half and is_flash_attn_2_available() and "attn_implementation" not in given_model_kwargs(config):
        return "flash_attention_2"
    return model.config._attn_implementation


def given_model_kwargs(config: EvaluationConfig) -> dict[str, Any]:
    """Those with a value: kvpress's own configuration file has some without."""
    given = config.model_kwargs if isinstance(config.model_kwargs, dict) else {}
    return {name: value for name, value in given.items() if value is not None}


def _needed(config: EvaluationConfig, name: str) -> Any:
    if (value := getattr(config, name)) is None:
        raise ValueError(f"the press {config.press_name} needs --{name}")
    return value
