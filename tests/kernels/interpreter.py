# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Whether Triton's interpreter, which is NumPy, runs with the NumPy that is installed: tried on one tiny kernel."""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl


@triton.jit
def count_kernel(n, out):
    """Counts up to a number that is read from memory, as a kernel does that walks the rows of one head."""
    total = 0
    for _ in range(0, tl.load(n), 1):
        total += 1
    tl.store(out, total)


def why_not() -> str | None:
    """What keeps kernels from running in the interpreter; None if they do."""
    n, out = torch.tensor([3], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    try:
        count_kernel[(1,)](n, out)
    except Exception as error:
        versions = f"Triton {triton.__version__} in its interpreter fails with NumPy {np.__version__}"
        return f"{versions}: {str(error.__cause__ or error).splitlines()[0]}"
    return None if int(out) == 3 else "Triton's interpreter counts to 3 wrongly"
