# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Merge what a kvpress press would throw away into what it keeps."""

from kvpress_merging.attention_matching_press import AttentionMatchingPress
from kvpress_merging.eviction import Eviction
from kvpress_merging.merge_on_evict_press import MergeOnEvictPress
from kvpress_merging.merging_press import MergingPress
from kvpress_merging.registry import PRESS_REGISTRY
from kvpress_merging.report import MergeReport

__version__ = "0.1.0"

__all__ = [
    "PRESS_REGISTRY",
    "AttentionMatchingPress",
    "Eviction",
    "MergeOnEvictPress",
    "MergeReport",
    "MergingPress",
]
