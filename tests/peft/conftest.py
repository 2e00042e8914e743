"""Shared by tests of parameter-efficient methods."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from families_for_tests import MODELS


@pytest.fixture(params=MODELS)
def model(request):
    """One of each family, in evaluation mode."""
    torch.manual_seed(0)
    return MODELS[request.param]().eval()
