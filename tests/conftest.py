# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os

from hypothesis import settings

# Triton decides at import whether its kernels run in its interpreter, which needs no GPU.
os.environ["TRITON_INTERPRET"] = "1"

# The same cases on every run. `make test-long` draws thousands from a seed that it is given and that pytest prints.
settings.register_profile("ci", max_examples=200, derandomize=True, deadline=None)
settings.register_profile("long", max_examples=5000, derandomize=False, database=None, deadline=None, print_blob=True)
settings.load_profile("ci")
