# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""What a press asks of the device for each layer, over the bare press: at most so many operations."""

from __future__ import annotations

import pytest

pytest.importorskip("matplotlib", reason="needs matplotlib, of the extra 'eval'")
from evaluation.speed.operations import operations_per_layer

MAX_OPERATIONS = {
    ("merging", "even"): 73,
    ("merging", "ragged"): 90,
    ("matching", "even"): 225,
    ("matching", "ragged"): 235,
}


@pytest.mark.parametrize(("heads", "bsz"), [(2, 1), (8, 1), (16, 1), (4, 3), (16, 3)])
@pytest.mark.parametrize(("press", "eviction"), MAX_OPERATIONS)
def test_a_layer_takes_few_operations_whatever_the_number_of_heads_and_rows(press, eviction, heads, bsz):
    n_operations, by_line = operations_per_layer(press, eviction, num_key_value_heads=heads, bsz=bsz)
    assert n_operations <= MAX_OPERATIONS[press, eviction], by_line
