"""Exercises of lab 1004."""

import torch
from torch.nn import functional as F

from lablib.exercises import Exercise, expect


def _prefer(chosen, rejected, beta):
    return -F.logsigmoid(beta * (chosen - rejected)).mean()


def _test_prefer(candidate) -> None:
    why = "the margin is 10 nats for the first passage, 0 for the second: log(1 + e^-1) and log 2"
    chosen, rejected = torch.tensor([-30.0, -50.0]), torch.tensor([-40.0, -50.0])
    expect(candidate(chosen, rejected, 0.1), torch.tensor(0.503204), why, atol=1e-5)
    for _ in range(3):
        chosen, rejected = -40 * torch.rand(5), -40 * torch.rand(5)
        right = _prefer(chosen, rejected, 0.2)
        margin = 0.2 * (chosen - rejected)
        known = [
            (_prefer(rejected, chosen, 0.2), "the right passage is to be the likelier one"),
            (-F.logsigmoid(margin.mean()), "each query has its own sigmoid; the mean comes last"),
            (-F.logsigmoid(margin).sum(), "a mean over queries, not a sum"),
            (-torch.sigmoid(margin).mean(), "the logarithm of the sigmoid"),
            (_prefer(chosen, rejected, 1.0), "beta multiplies the margin"),
        ]
        expect(candidate(chosen, rejected, 0.2), right, why, known=known, atol=1e-5)


prefer = Exercise(
    reference=_prefer,
    test=_test_prefer,
    question="A long passage is less likely than a short one, whatever it says. What does "
    "this loss make of that?",
    hint="One margin a query, in nats. What is -log sigmoid(0)?",
    minutes=8,
    difficulty="easy",
)


def _agree(cosines, nats, temperature):
    known = F.softmax(nats.detach(), dim=-1)
    ours = F.log_softmax(cosines / temperature, dim=-1)
    return (known * (known.log() - ours)).sum(-1).mean()


def _test_agree(candidate) -> None:
    why = "KL(g || r): g from the writer's nats, given; r from cosines over the temperature"
    for _ in range(3):
        cosines = torch.rand(4, 3, requires_grad=True)
        nats = (-3 * torch.rand(4, 3)).requires_grad_()
        right = _agree(cosines, nats, 0.1).detach()
        found = candidate(cosines, nats, 0.1)
        r, g = (F.softmax(part, -1) for part in (cosines.detach() / 0.1, nats.detach()))
        known = [
            ((r * (r.log() - g.log())).sum(-1).mean(), "the other way round: g comes first"),
            (right * 4, "a mean over queries, not a sum"),
            (_agree(cosines, nats, 1.0).detach(), "cosines go over the temperature"),
            (
                -(g * r.log()).sum(-1).mean(),
                "that is the cross-entropy: g's own entropy is missing",
            ),
        ]
        expect(found.detach(), right, why, known=known, atol=1e-5)
        wanted = torch.autograd.grad(_agree(cosines, nats, 0.1), cosines)[0]
        slopes = torch.autograd.grad(found, (cosines, nats), allow_unused=True)
        expect(slopes[0], wanted, "the gradient of the cosines has to stay", atol=1e-5)
        if slopes[1] is not None:
            expect(slopes[1], torch.zeros(4, 3), "the writer is to be left alone: detach it")


agree = Exercise(
    reference=_agree,
    test=_test_agree,
    question="What would the two agree on if the writer's scores were not detached?",
    hint="Two softmaxes over the candidates; `.detach()` cuts one of them off.",
    minutes=12,
    difficulty="medium",
)


def _a_token(log_p, wrote):
    return (log_p * wrote).sum(-1) / wrote.sum(-1)


def _test_a_token(candidate) -> None:
    why = "only the passage's tokens count: (-2 - 4) / 2"
    log_p = torch.tensor([[-9.0, -2.0, -4.0, -7.0]])
    wrote = torch.tensor([[False, True, True, False]])
    expect(candidate(log_p, wrote), torch.tensor([-3.0]), why)
    for _ in range(3):
        log_p = -5 * torch.rand(4, 9)
        place = torch.arange(9)
        start, end = torch.randint(1, 3, (4, 1)), torch.randint(6, 9, (4, 1))
        wrote = (place >= start) & (place < end)
        right = _a_token(log_p, wrote)
        known = [
            ((log_p * wrote).sum(-1), "longer passages would always lose: a token's mean"),
            ((log_p * wrote).mean(-1), "padding and query are no part of the passage"),
            (log_p.mean(-1), "the query's own tokens and the padding count for nothing"),
        ]
        expect(candidate(log_p, wrote), right, why, known=known, atol=1e-5)


a_token = Exercise(
    reference=_a_token,
    test=_test_a_token,
    question="Which passages does the mean favor, where the sum favors short ones?",
    hint="A mask keeps what the passage wrote. Divide by how much that is.",
    minutes=6,
    difficulty="easy",
)
