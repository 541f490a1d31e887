"""Models that the rollout tests share; nothing changes them."""

from __future__ import annotations

import pytest
import torch

from tests.tiny import eurobert


@pytest.fixture(scope="session")
def model():
    return eurobert(layers=1, hidden=16)


@pytest.fixture(scope="session")
def model32():
    return eurobert(layers=1, hidden=16, dtype=torch.float32)
