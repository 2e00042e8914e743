"""A small model and small batches, shared by the tests of training."""

import pytest
import torch

from lablib.data import Batches
from lablib.models import GPT, GPTConfig


@pytest.fixture
def model():
    """Make a GPT of 31 tokens from a seed."""

    def make(seed: int = 0) -> GPT:
        torch.manual_seed(seed)
        return GPT(GPTConfig(31, 16, 1, 2, max_length=16))

    return make


@pytest.fixture
def batches():
    """Make the batches of one known text."""
    return lambda **options: Batches(
        torch.arange(600) ** 2 % 31, **{"batch_size": 4, "length": 8} | options
    )
