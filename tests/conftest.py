# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os

# Triton decides at import whether its kernels run in its interpreter, which needs no GPU.
os.environ["TRITON_INTERPRET"] = "1"
