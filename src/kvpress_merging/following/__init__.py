# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""From what a press did to an ``Eviction``: hooks, undo, state, caches, traced tensors."""
