"""Exercises of lab 705."""

import torch

from lablib.exercises import Exercise, expect


def _chance_open(logits, width):
    mu = logits.tanh()
    return 0.5 + 0.5 * torch.erf((mu + 0.5) / (width * 2**0.5))


def _test_chance_open(candidate) -> None:
    start = torch.tensor([0.0, -0.5]).atanh()
    why = "mu = 0 lies one width above -1/2: 0.841 of a normal's area; mu = -1/2 lies on it: half"
    expect(candidate(start, 0.5), torch.tensor([0.8413447, 0.5]), why, atol=1e-4)
    for _ in range(2):
        logits, width = 0.8 * torch.randn(6), 0.3 + float(torch.rand(()))
        right = _chance_open(logits, width)
        raw, mu = (logits + 0.5) / width, (logits.tanh() + 0.5) / width
        known = [
            (1 - right, "that is the chance to be closed"),
            (0.5 + 0.5 * torch.erf(raw / 2**0.5), "mu is the tanh of the logit"),
            (0.5 + 0.5 * torch.erf(mu), "erf's argument is the distance over width times root 2"),
            (0.5 + 0.5 * torch.erf((logits.tanh()) / (width * 2**0.5)), "the gate is mu + 1/2"),
            ((logits.tanh() + 0.5).clamp(0, 1), "that is the gate without noise, not a chance"),
        ]
        why = "the area of a normal around mu + 1/2 that lies above 0"
        expect(candidate(logits, width), right, why, known=known, atol=1e-4)


chance_open = Exercise(
    reference=_chance_open,
    test=_test_chance_open,
    question="Which chance do all gates have at the start, where logits are near 1?",
    hint="The normal distribution's area below z is 1/2 + 1/2 erf(z / sqrt 2): `torch.erf`.",
    minutes=8,
    difficulty="easy",
)


def _cut_out(weight, bias, rows, columns):
    gated = rows[:, None] * weight * columns
    small, shift = gated[rows > 0][:, columns > 0], (rows * bias)[rows > 0]
    return torch.cat([small, shift[:, None]], 1)


def _test_cut_out(candidate) -> None:
    weight, bias = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([10.0, 20.0])
    made = candidate(weight, bias, torch.tensor([0.5, 0.0]), torch.tensor([0.0, 0.5]))
    why = (
        "row 0 and column 1 are open at 1/2 each: 2 is left of the matrix, times 1/4; 10 times 1/2"
    )
    expect(made, torch.tensor([[0.5, 5.0]]), why, atol=1e-4)
    for _ in range(2):
        weight, bias = torch.randn(6, 5), torch.randn(6)
        rows, columns = 0.2 + 0.7 * torch.rand(6), 0.2 + 0.7 * torch.rand(5)
        rows[torch.randperm(6)[:2]] = columns[torch.randperm(5)[:2]] = 0.0
        right = _cut_out(weight, bias, rows, columns)
        shut = (rows > 0).float(), (columns > 0).float()
        whole = torch.cat([rows[:, None] * weight * columns, (rows * bias)[:, None]], 1)
        known = [
            (_cut_out(weight, bias, *shut), "gates between 0 and 1 must be multiplied in"),
            (_cut_out(weight, bias / rows.clamp(0.1), rows, columns), "the row's gate is on the "
             "bias, too"),
            (_cut_out(weight, bias, rows, shut[1]), "the columns' gates are missing"),
            (_cut_out(weight, bias, shut[0], columns), "the rows' gates are missing"),
            (whole, "zeros are no cut: leave closed rows and columns out"),
            (torch.cat([right[:, :-1], torch.ones(4, 1)], 1), "the last column is the bias"),
        ]  # fmt: skip
        why = "g_r W g_c and g_r b, without closed rows and columns"
        expect(candidate(weight, bias, rows, columns), right, why, known=known, atol=1e-4)


cut_out = Exercise(
    reference=_cut_out,
    test=_test_cut_out,
    question="The input still has all its features, the next layer still wants all of them: what "
    "has to happen around the small matrix?",
    hint="Multiply first, then select: `rows > 0` picks rows, `[:, columns > 0]` columns. "
    "`torch.cat` puts the bias beside them.",
    minutes=10,
    difficulty="easy",
)


def _share_removed(rows, columns):
    left = sum(float((r > 0).sum() * (c > 0).sum()) for r, c in zip(rows, columns))
    return 1 - left / sum(len(r) * len(c) for r, c in zip(rows, columns))


def _test_share_removed(candidate) -> None:
    half = torch.tensor([0.3, 0.0])
    why = "half of the rows and half of the columns leave a quarter"
    expect(candidate([half], [half]), 0.75, why, atol=1e-4)
    for _ in range(4):
        sizes = torch.randint(3, 12, (3, 2)).tolist()
        drawn = [[torch.randn(n).clamp(0, 1) for n in pair] for pair in sizes]
        drawn[0][0][0], drawn[0][1][0] = 0.37, 0.0
        rows, columns = zip(*drawn, strict=True)
        gates = torch.cat([*rows, *columns])
        right = _share_removed(rows, columns)
        each = [float((r > 0).double().mean() * (c > 0).double().mean()) for r, c in drawn]
        known = [
            (1 - right, "that is what remains"),
            (float((gates == 0).double().mean()), "gates are counted there, not weights"),
            (1 - sum(each) / len(each), "large matrices count for more than small ones"),
        ]
        why = "a weight remains where its row and its column are open"
        expect(candidate(rows, columns), right, why, known=known, atol=1e-4)


share_removed = Exercise(
    reference=_share_removed,
    test=_test_share_removed,
    question="A share c of all rows and columns is closed. For which c are 20 % of weights gone?",
    hint="Of each matrix: open rows times open columns.",
    minutes=8,
    difficulty="medium",
)
