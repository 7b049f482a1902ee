# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Merge rules that others have published, written anew from their formulas, to be measured beside ours."""
