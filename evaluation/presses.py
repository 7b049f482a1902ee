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

from evaluation.config import EVICTION_SETTINGS, PRESS_FIELDS, SETTINGS, EvaluationConfig
from evaluation.evaluate_registry import PRESS_REGISTRY, check_names
from evaluation.peers.kvfold import KVFoldPress
from evaluation.prefill import acts_while_decoding
from kvpress_merging import MergeOnEvictPress
from kvpress_merging.wrapping import nested_presses

logger = logging.getLogger(__name__)

# What sets how much these evict is not their compression ratio.
_WITHOUT_RATIO = (DecodingPress, DMSPress, DuoAttentionPress, ThinKPress)


def usable_settings(press: BasePress | None) -> set[str]:
    """
    Which of ``EVICTION_SETTINGS`` and ``PRESS_FIELDS`` reach a press.

    A merging press answers ``isinstance`` as the press inside and hands on what is set, so both are treated alike.
    """
    own = {field.name for field in dataclasses.fields(press)} if isinstance(press, MergeOnEvictPress) else set()
    return own.intersection(PRESS_FIELDS).union(*(_eviction_settings(child) for child in _children(press)))


def configure_press(config: EvaluationConfig) -> BasePress | None:
    """
    Make the press that a configuration names, and set its fields as kvpress's evaluation sets those of the bare one.

    A ValueError says if there is no such press, or it needs a setting that is not there, cannot use one that is, or
    refuses a value.
    """
    check_names(config)
    press = PRESS_REGISTRY[config.press_name]
    usable = usable_settings(press)
    for name in (*EVICTION_SETTINGS, *PRESS_FIELDS):
        # There is always a ratio, if only the default one.
        if name != "compression_ratio" and name not in usable and getattr(config, name) is not None:
            raise ValueError(f"--{name} is of no use for the press {config.press_name}")
    for child in _children(press):
        if not (names := _eviction_settings(child)):
            logger.warning("%s has no compression ratio", type(child).__name__)
        for name in names:
            if (value := getattr(config, name)) is not None:
                setattr(child, name, value)
            elif SETTINGS[name].is_needed:
                raise ValueError(f"the press {config.press_name} needs --{name}")
    if own := {name: getattr(config, name) for name in PRESS_FIELDS if getattr(config, name) is not None}:
        try:
            # Not one after the other: the press checks them together.
            press = dataclasses.replace(press, **own)  # type: ignore[type-var]
        except TypeError as error:
            raise ValueError(str(error)) from error
    if isinstance(press, FinchPress) and not config.query_aware:
        raise ValueError(
            f"the press {config.press_name} needs --query_aware: it evicts what the question has no use for"
        )
    if acts_while_decoding(press) and (config.max_new_tokens == 0 or config.answer_kl):
        raise ValueError(
            f"the press {config.press_name} evicts while it answers: it has no likelihood, so --max_new_tokens 0 and "
            "--answer_kl are of no use for it"
        )
    if config.dataset == "fidelity" and isinstance(press, (DecodingPress, FinchPress)):
        raise ValueError(
            f"the dataset fidelity needs a press that evicts at prefill without a question, not {config.press_name}"
        )
    return press


def choose_attention(config: EvaluationConfig, press: BasePress | None, model: PreTrainedModel) -> str:
    """
    The transformers implementation of attention to use, as kvpress's evaluation chooses.

    An ``ObservedAttentionPress``, at whatever depth, needs attention weights: ``"eager"``; kvfold a mask that is added:
    ``"sdpa"``. A model in half precision on a GPU gets FlashAttention 2 where it is installed, unless ``model_kwargs``
    say otherwise.
    """
    if press is not None and any(isinstance(inner, ObservedAttentionPress) for inner in nested_presses(press)):
        return "eager"
    if isinstance(press, KVFoldPress):
        return "sdpa"
    is_half = model.device.type == "cuda" and model.dtype in (torch.float16, torch.bfloat16)
    if is_half and is_flash_attn_2_available() and "attn_implementation" not in given_model_kwargs(config):
        return "flash_attention_2"
    return model.config._attn_implementation


def given_model_kwargs(config: EvaluationConfig) -> dict[str, Any]:
    """Those with a value: kvpress's own configuration file has some without."""
    given = config.model_kwargs if isinstance(config.model_kwargs, dict) else {}
    return {name: value for name, value in given.items() if value is not None}


def _children(press: BasePress | None) -> list[BasePress]:
    """The presses that evict, of a composition or alone."""
    return [] if press is None else list(press.presses) if isinstance(press, ComposedPress) else [press]


def _eviction_settings(press: BasePress) -> list[str]:
    kinds = [kind for kind in _WITHOUT_RATIO if isinstance(press, kind)]
    if not kinds:
        return ["compression_ratio"] if hasattr(press, "compression_ratio") else []
    return [name for name in EVICTION_SETTINGS if SETTINGS[name].press in kinds]
