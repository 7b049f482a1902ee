# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Runs read back from their folders, compared on the same samples, and shown."""
