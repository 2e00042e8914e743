"""Triton's kernels run in its interpreter here, on CPU; on a GPU they are compiled."""

import pytest
import torch

GPU = torch.cuda.is_available()
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if GPU else [])
# Rounding of one result in each dtype, for sums of some dozen products of about 1.
TOLERANCE = {
    torch.float32: {"atol": 2e-5, "rtol": 2e-5},
    torch.float16: {"atol": 2e-2, "rtol": 1e-2},
    torch.bfloat16: {"atol": 1e-1, "rtol": 5e-2},
}
# The same shape in memory that is not contiguous; what lies between is valid, but not the same.
LAYOUTS = {
    "strided": lambda t: torch.stack([t, t.roll(1, 0)], -1)[..., 0],
    "transposed": lambda t: t.mT.contiguous().mT if t.ndim > 1 else LAYOUTS["strided"](t),
    "expanded": lambda t: t[:1].expand_as(t),  # all rows the first
}


@pytest.fixture(params=LAYOUTS)
def layout(request):
    """A function from tensor to tensor, of the same shape but not contiguous."""
    return LAYOUTS[request.param]


@pytest.fixture
def device() -> str:
    return "cuda" if GPU else "cpu"


@pytest.fixture(params=DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture
def close(dtype):
    """Assert that two tensors are equal up to rounding in this test's dtype."""

    def check(ours, expected):
        torch.testing.assert_close(ours.float(), expected.float(), **TOLERANCE[dtype])

    return check


@pytest.fixture
def gradients():
    """(function, *inputs) -> output and the gradients of its sum weighted by position."""

    def run(function, *inputs):
        leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
        out = function(*leaves)
        slope = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape)
        (out * slope.to(out.dtype)).sum().backward()
        return out.detach(), [x.grad for x in leaves if x.is_floating_point()]

    return run
