# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest
from tiny import tiny_checkpoint, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A tiny model's folder."""
    folder = tmp_path_factory.mktemp("model")
    tiny_checkpoint(folder)
    return folder
