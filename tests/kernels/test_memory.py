import gc
import threading

import pytest
import torch

from lablib.kernels import memory

LIKE = torch.empty(1)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(memory, "_idle", {})
    monkeypatch.setattr(memory, "LARGE", 10)


def kept() -> int:
    return sum(size * len(buffers) for size, buffers in memory._idle.items())


def test_memory_of_a_tensor_that_is_gone_is_used_again():
    first = memory.empty(LIKE, 100, 3)
    address = first.data_ptr()
    assert address % 64 == 0
    del first
    assert memory.empty(LIKE, 3, 100).data_ptr() == address


@pytest.mark.parametrize("hold", ["view", "numpy", "saved for backward"])
def test_memory_in_use_is_not_handed_out(hold):
    tensor = memory.empty(LIKE, 64).fill_(1.0)
    if hold == "saved for backward":
        leaf = torch.ones(64, requires_grad=True)
        held = leaf * tensor
    else:
        held = tensor[3:] if hold == "view" else tensor.numpy()
    del tensor
    gc.collect()
    memory.empty(LIKE, 64).fill_(2.0)
    if hold == "saved for backward":
        held.sum().backward()
        held = leaf.grad
    assert (held == 1).all()


def test_no_more_is_kept_than_the_limit(monkeypatch):
    monkeypatch.setattr(memory, "KEPT", 1000)
    tensors = [memory.empty(LIKE, size) for size in (300, 400, 500, 2000)]
    while tensors:
        tensors.pop()
        assert kept() <= 1000
    assert kept() > 0


def test_threads_never_share_a_buffer():
    wrong = []

    def work(value):
        for _ in range(300):
            tensor = memory.empty(LIKE, 5000).fill_(value)
            wrong.extend([value] if (tensor != value).any() else [])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3)])
def test_empty_shapes(shape):
    assert memory.empty(LIKE, *shape).shape == shape


@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 64), (torch.float32, 9)])
def test_small_tensors_and_other_dtypes_are_torchs(dtype, size):
    assert memory.empty(LIKE.to(dtype), size).dtype == dtype
    assert memory._idle == {}


def test_sizes_that_are_not_idle_leave_no_trace():
    for size in range(20, 60):
        held = memory.empty(LIKE, size)
        del held
        held = memory.empty(LIKE, size)
        assert held.numel() == size
        assert size + memory.LINE not in memory._idle
