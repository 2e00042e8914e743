"""Exercises of lab 701."""

import numpy as np
import torch

from lablib.exercises import Exercise, expect


def _gate_of_head(q, keys, rows):
    on_text = (keys @ q).exp().sum()
    on_rows = (rows @ q).exp().sum()
    return on_rows / (on_rows + on_text)


def _test_gate(candidate) -> None:
    q, keys = torch.tensor([1.0, 0.0]), torch.zeros(3, 2)
    rows = torch.tensor([[float(np.log(2)), 5.0]])
    why = "three keys score 0, the row ln 2: exp gives 1 + 1 + 1 and 2, so the row takes 2 of 5"
    expect(candidate(q, keys, rows), torch.tensor(0.4), why, atol=1e-5)
    for _ in range(2):  # a rounded answer passes one draw by chance
        q, keys, rows = torch.randn(4), torch.randn(5, 4), torch.randn(3, 4)
        text, prefix = (keys @ q).exp(), (rows @ q).exp()
        known = [
            (1 - _gate_of_head(q, keys, rows), "that is what the text keeps: lambda is the rest"),
            (torch.tensor(3 / 8), "scores count, not only how many rows there are"),
            (prefix.sum() / text.sum(), "a share of all: the rows are in the denominator, too"),
            ((rows @ q).sum() / ((rows @ q).sum() + (keys @ q).sum()), "exponentials of scores"),
            (prefix / (prefix.sum() + text.sum()), "one number a head: sum over the rows"),
            (prefix.mean() / (prefix.mean() + text.mean()), "sums, not means: more rows take more"),
        ]
        right = _gate_of_head(q, keys, rows)
        expect(candidate(q, keys, rows), right, why, known=known, atol=1e-5)


gate_of_head = Exercise(
    reference=_gate_of_head,
    test=_test_gate,
    question="The text gets longer and the prefix stays. What becomes of lambda, and is that so in "
    "an adapter?",
    hint="A score is `keys @ q`, one a key. Softmax divides each score's exponential by the sum of "
    "all; add up those of the rows.",
    minutes=10,
    difficulty="easy",
)


def _parallel_adapter(x, h, down, up, scale):
    return h + scale * torch.relu(x @ down) @ up


def _test_parallel(candidate) -> None:
    x, h = torch.tensor([[1.0, -1.0]]), torch.tensor([[10.0, 10.0]])
    down, up = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    why = "x is (1, -1); ReLU leaves (1, 0); W_up makes it (2, 0), s = 3 makes it (6, 0); plus h"
    expect(candidate(x, h, down, up, 3.0), torch.tensor([[16.0, 10.0]]), why, atol=1e-5)
    for _ in range(2):
        x, h, down, up = (torch.randn(s) for s in ((5, 6), (5, 6), (6, 2), (2, 6)))
        scale = float(np.random.uniform(1.5, 4))
        low = torch.relu(x @ down) @ up
        known = [
            (h + scale * torch.relu(h @ down) @ up, "that is serial: read x, not h"),
            (h + low, "the scale is missing"),
            (x + scale * low, "what is changed is h: x goes nowhere else"),
            (scale * low, "the change is added to h"),
            (scale * (h + low), "scale the change alone, not h"),
            (h + scale * (x @ down) @ up, "ReLU between the two matrices; without it this is LoRA"),
            (h + scale * torch.relu(x @ down @ up), "ReLU in the bottleneck, before W_up"),
        ]
        right = _parallel_adapter(x, h, down, up, scale)
        expect(candidate(x, h, down, up, scale), right, why, known=known, atol=1e-4)


parallel_adapter = Exercise(
    reference=_parallel_adapter,
    test=_test_parallel,
    question="On two devices, could the parallel adapter compute while the layer itself does? And "
    "could the serial one?",
    hint="Take the serial line and change two things: what goes into W_down, and a factor.",
    minutes=8,
    difficulty="easy",
)


def _added_parameters(method, size, dim, ffn_dim):
    if method == "lora on the feed-forward layer":
        return 2 * size * (dim + ffn_dim)
    if method == "lora on query and value":
        return 2 * size * (dim + dim)
    return 2 * size * dim


METHODS = (
    "prefix",
    "adapter",
    "lora on query and value",
    "lora on the feed-forward layer",
)


def _test_added(candidate) -> None:
    whys = {
        "prefix": "a prefix row is one key and one value, each of `dim` numbers in all heads",
        "adapter": "W_down is dim by size, W_up size by dim",
        "lora on query and value": "two weights, dim by dim each, and a pair of thin matrices each",
        "lora on the feed-forward layer": "two weights, dim by ffn_dim, and a pair each: a thin "
        "matrix costs size times one of the weight's sides",
    }
    size, dim = (int(n) for n in np.random.randint(3, 40, 2))
    ffn_dim = dim * int(np.random.randint(3, 6))
    for method in METHODS:
        right = _added_parameters(method, size, dim, ffn_dim)
        known = [
            (size * dim, "there are two matrices, or a key and a value"),
            (
                right // 2 if right != 4 * size * dim else -1,
                "only half of them: count every matrix",
            ),
            (2 * size * dim * ffn_dim, "thin matrices don't have all of the weight's numbers"),
            (dim * ffn_dim, "that is the frozen weight itself"),
        ]
        known = [(value, told) for value, told in known if value != right]
        expect(candidate(method, size, dim, ffn_dim), right, whys[method], known=known)


added_parameters = Exercise(
    reference=_added_parameters,
    test=_test_added,
    question="At equal parameters, how much smaller must LoRA's rank be than an adapter's "
    "bottleneck at the feed-forward layer, when ffn_dim is 4 dim?",
    hint="A weight of shape (a, b) gets thin matrices (a, size) and (size, b).",
    minutes=10,
    difficulty="medium",
)
