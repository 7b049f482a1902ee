# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""
Merge what a kvpress press would throw away into what it keeps.

`MergingPress` blends each evicted value into its most similar survivor, `AttentionMatchingPress` changes the survivors
so that attention over them gives what it gave; both wrap any press that evicts positions, and go wherever a press goes.
`MergeOnEvictPress` is what both are made of, for a merge rule of one's own, whose `fold` is given an `Eviction`.
`MergeReport` tells what was merged, and `kvpress_merging.registry.PRESS_REGISTRY` has the wrapped presses of kvpress's
evaluation by name.

The mathematics is in functions of tensors: `kvpress_merging.kernels.nearest.nearest_survivors` and
`kvpress_merging.kernels.blend.cosine_blend` for the merge, `kvpress_merging.kernels.match.attention_match` for the
matching.
"""

from kvpress_merging.attention_matching_press import AttentionMatchingPress
from kvpress_merging.environment import warn_of_what_is_not_allowed
from kvpress_merging.eviction import Eviction
from kvpress_merging.merge_on_evict_press import MergeOnEvictPress
from kvpress_merging.merging_press import MergingPress
from kvpress_merging.registry import PRESS_REGISTRY
from kvpress_merging.report import MergeReport

__version__ = "0.1.0"

# In the order in which one meets them: the API reference follows it.
__all__ = [
    "MergingPress",
    "AttentionMatchingPress",
    "MergeReport",
    "PRESS_REGISTRY",
    "MergeOnEvictPress",
    "Eviction",
]

warn_of_what_is_not_allowed()
