"""Exercises of lab 304."""

import torch
from torch import Tensor
from torch.nn import functional as F

from lablib.exercises import Exercise, expect


def _saturation(early: Tensor, late: Tensor) -> float:
    common = (early[:, :, None] == late[:, None, :]).any(2)  # (tokens, top_k)
    return common.float().mean().item()


def _drawn(tokens: int, n_experts: int, top_k: int) -> Tensor:
    """(tokens, top_k) distinct experts a row, in random order."""
    return torch.rand(tokens, n_experts).topk(top_k).indices


def _test_saturation(candidate) -> None:
    late = torch.tensor([[0, 1], [2, 3]])
    expect(candidate(late, late), 1.0, "The same experts: all of them are those of the end")
    expect(candidate(late.flip(1), late), 1.0, "The same experts in another order are the same")
    early = torch.tensor([[1, 5], [4, 5]])
    expect(candidate(early, late), 0.25, "One of four choices, the first token's 1, is the end's")
    early, late = _drawn(37, 8, 3), _drawn(37, 8, 3)  # no round share of 111
    known = [
        ((early == late).float().mean().item(), "the order of a token's experts does not count"),
        (
            torch.isin(early, late).float().mean().item(),
            "an expert must be among the same token's later ones",
        ),
        (3 * _saturation(early, late), "divide by top_k: it is a share"),
    ]
    hint = "Of each token's top_k early experts, the share that is among its late ones"
    expect(candidate(early, late), _saturation(early, late), hint, known=known)


saturation = Exercise(
    reference=_saturation,
    test=_test_saturation,
    question="Which saturation do two routers that draw 8 of 64 experts at random have?",
    hint="Compare each of a token's early experts with each of its late ones: shapes "
    "(tokens, top_k, 1) and (tokens, 1, top_k). Then `any`, then the mean.",
    minutes=6,
    difficulty="easy",
)


def _specialization(experts: Tensor, domains: Tensor, n_experts: int, n_domains: int) -> Tensor:
    chosen = F.one_hot(experts, n_experts).sum(1).float()  # (tokens, n_experts)
    of = F.one_hot(domains, n_domains).float()  # (tokens, n_domains)
    return (of.t() @ chosen) / of.sum(0)[:, None]


def _test_specialization(candidate) -> None:
    experts = torch.tensor([[0, 1], [0, 2], [1, 2]])
    domains = torch.tensor([0, 0, 1])
    wanted = torch.tensor([[1.0, 0.5, 0.5], [0.0, 1.0, 1.0]])
    why = "Both tokens of domain 0 ask expert 0, one of them expert 1; domain 1's asks 1 and 2"
    expect(candidate(experts, domains, 3, 2), wanted, why)
    experts = _drawn(60, 6, 2)
    sizes = torch.tensor([17, 19, 24])  # shares of 17 and 19 tokens have many decimals
    domains = torch.arange(3).repeat_interleave(sizes)[torch.randperm(60)]
    right = _specialization(experts, domains, 6, 3)
    counts = right * domains.bincount(minlength=3)[:, None]
    known = [
        (right / 2, "rows sum to top_k: each of a token's experts counts whole"),
        (counts / counts.sum(0), "divide by the domain's tokens, not by the expert's"),
        (counts / 60, "divide by the tokens of the domain, not by all"),
    ]
    hint = "Tokens of the domain for which the expert is among the top k, over its tokens"
    expect(candidate(experts, domains, 6, 3), right, hint, known=known)


specialization = Exercise(
    reference=_specialization,
    test=_test_specialization,
    question="What would all of its values be if 4 of 16 experts were drawn at random?",
    hint="`F.one_hot(experts, n_experts).sum(1)` has a 1 where an expert is among a token's. Sum "
    "these rows over each domain's tokens.",
    minutes=10,
    difficulty="medium",
)


def _asked_parts(
    x: Tensor, gate: Tensor, up: Tensor, down: Tensor, parts: int, asked: list[int]
) -> Tensor:
    hidden = F.silu(x @ gate.t()) * (x @ up.t())  # (tokens, width)
    part = torch.arange(len(gate)) // (len(gate) // parts)  # (width,): 0 0 0 1 1 1 ...
    works = torch.isin(part, torch.tensor(asked))
    return hidden[:, works] @ down[:, works].t()  # (tokens, dim)


def _test_asked_parts(candidate) -> None:
    x, gate, up, down = (
        torch.randn(7, 5),
        torch.randn(12, 5),
        torch.randn(12, 5),
        torch.randn(5, 12),
    )
    whole = F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
    why = "Asked together, the parts do what the whole expert does"
    known = [(whole / 3, "outputs are added, not averaged")]
    expect(candidate(x, gate, up, down, 3, [0, 1, 2]), whole, why, known=known, atol=1e-4)
    for parts, asked in ((3, [1]), (4, [0, 3]), (12, [5])):
        right = _asked_parts(x, gate, up, down, parts, asked)
        rest = [part for part in range(parts) if part not in asked]
        striped = torch.isin(torch.arange(12) % parts, torch.tensor(asked))
        known = [
            (whole - right, f"parts {asked} work, the others, {rest}, do not"),
            (
                F.silu(x @ gate[striped].t()) * (x @ up[striped].t()) @ down[:, striped].t(),
                "a part is a run of neighbors: units 0 to width / parts - 1 are part 0",
            ),
        ]
        hint = "A hidden unit is a row of gate and of up, and a column of down"
        expect(candidate(x, gate, up, down, parts, asked), right, hint, known=known, atol=1e-4)


asked_parts = Exercise(
    reference=_asked_parts,
    test=_test_asked_parts,
    question="So what can 16 small experts do that 4 large ones can not?",
    hint="Hidden unit h is row h of gate and up, and column h of down; it belongs to part "
    "h // (width // parts). Keep the units of the asked parts.",
    minutes=8,
    difficulty="medium",
)
