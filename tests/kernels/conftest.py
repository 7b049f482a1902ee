# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Devices for the tests of the kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch


@pytest.fixture(
    params=[
        "cpu",
        "meta",
        pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")),
    ]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each kind of device in turn."""
    return torch.device(request.param)


@contextmanager
def nothing_read_back(device: torch.device) -> Iterator[None]:
    """Within it, waiting for a GPU is an error. Tensors on ``meta`` have nothing to read."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
