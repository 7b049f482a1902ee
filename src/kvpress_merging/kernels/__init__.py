# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Pure functions on tensors: they know an ``Eviction``, never a press, a model or a cache."""
