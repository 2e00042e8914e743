"""Exercises of lab 710."""

import torch
from torch.nn import functional as F

from lablib.exercises import Exercise, expect


def _answer_log_probability(logits, tokens, is_answer):
    logs = logits[:, :-1].log_softmax(-1)
    picked = logs.gather(-1, tokens[:, 1:, None]).squeeze(-1)
    return (picked * is_answer[:, 1:]).sum(1)


def _test_answer(candidate) -> None:
    for _ in range(2):
        logits = 2 * torch.randn(3, 6, 5)
        tokens = torch.randint(5, (3, 6))
        is_answer = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 0], [0, 1, 1, 0, 0, 0]]) > 0
        right = _answer_log_probability(logits, tokens, is_answer)
        logs = logits.log_softmax(-1)
        here = logs.gather(-1, tokens[..., None]).squeeze(-1)
        after = logs[:, :-1].gather(-1, tokens[:, 1:, None]).squeeze(-1)
        kept = is_answer[:, 1:]
        raw = logits[:, :-1].gather(-1, tokens[:, 1:, None]).squeeze(-1)
        known = [
            (after.sum(1), "prompt and padding count, too: keep the answer's tokens alone"),
            ((here * is_answer).sum(1), "logits at a place speak of the token after it"),
            ((after * is_answer[:, :-1]).sum(1), "shift the mask together with the tokens"),
            ((after * kept).sum(1) / kept.sum(1), "a sum: a whole answer's log-probability"),
            (-right, "log-probabilities are below zero: no minus sign"),
            ((raw * kept).sum(1), "logits are no log-probabilities yet"),
        ]
        why = "log p of each answer token, given all before it, added up"
        expect(candidate(logits, tokens, is_answer), right, why, known=known, atol=1e-4)


answer_log_probability = Exercise(
    reference=_answer_log_probability,
    test=_test_answer,
    question="A long answer has a lower log-probability than a short one, whatever it says. Does "
    "that bias DPO's loss?",
    hint="`logits[:, :-1].log_softmax(-1)` speaks of `tokens[:, 1:]`; `gather` picks one of each.",
    minutes=12,
    difficulty="medium",
)


def _preference_loss(policy, reference, beta):
    moved = policy - reference
    return -F.logsigmoid(beta * (moved[:, 0] - moved[:, 1])).mean()


def _test_loss(candidate) -> None:
    same = torch.tensor([[-3.0, -4.0]])
    why = "-log sigmoid(beta * how much the gap has grown since the reference), a mean over pairs"
    expect(candidate(same, same, 0.5), torch.tensor(2.0).log(), why, atol=1e-5)
    for _ in range(2):
        policy, reference = -10 * torch.rand(4, 2), -10 * torch.rand(4, 2)
        beta = 0.1 + torch.rand(()).item()
        gap = (policy - reference)[:, 0] - (policy - reference)[:, 1]
        known = [
            (
                -F.logsigmoid(beta * (policy[:, 0] - policy[:, 1])).mean(),
                "the reference is missing",
            ),
            (-F.logsigmoid(-beta * gap).mean(), "column 0 is what was chosen: its side is plus"),
            (F.logsigmoid(beta * gap).mean(), "the loss falls as the gap grows: a minus in front"),
            (-F.logsigmoid(gap).mean(), "beta is missing"),
            (-F.logsigmoid(gap / beta).mean(), "beta multiplies the gap"),
            (-F.logsigmoid(beta * gap.mean()), "a loss for each pair first, then the mean"),
            (-F.logsigmoid(beta * gap).sum(), "a mean over pairs, not a sum"),
        ]
        right = _preference_loss(policy, reference, beta)
        expect(candidate(policy, reference, beta), right, why, known=known, atol=1e-4)


preference_loss = Exercise(
    reference=_preference_loss,
    test=_test_loss,
    question="Add the same number to both log-probabilities of a pair. What does the loss do, and "
    "what may a model do, then, while it learns?",
    hint="`moved = policy - reference` has a column for each answer; `F.logsigmoid` is steady.",
    minutes=10,
    difficulty="easy",
)


def _pull(policy, reference, beta):
    moved = policy - reference
    return beta * torch.sigmoid(-beta * (moved[:, 0] - moved[:, 1]))


def _test_pull(candidate) -> None:
    same = torch.tensor([[-3.0, -4.0]])
    why = "beta * sigmoid(-beta * gap): half of beta at the start, less once a pair is learned"
    expect(candidate(same, same, 0.5), torch.tensor([0.25]), why, atol=1e-5)
    for _ in range(2):
        policy, reference = -10 * torch.rand(4, 2), -10 * torch.rand(4, 2)
        beta = 0.2 + torch.rand(()).item()
        gap = (policy - reference)[:, 0] - (policy - reference)[:, 1]
        plain = policy[:, 0] - policy[:, 1]
        known = [
            (beta * torch.sigmoid(beta * gap), "what is learned pulls less: mind the sign"),
            (torch.sigmoid(-beta * gap), "the chain rule brings one more beta"),
            (beta * torch.sigmoid(-beta * plain), "measured from the reference"),
            (-beta * torch.sigmoid(-beta * gap), "how hard, so above zero"),
            (beta * torch.sigmoid(-beta * gap) / 4, "of each pair's own loss, not of the mean"),
        ]
        right = _pull(policy, reference, beta)
        expect(candidate(policy, reference, beta), right, why, known=known, atol=1e-4)


pull = Exercise(
    reference=_pull,
    test=_test_pull,
    question="Without a reference, which pairs would pull hardest at the first step, and which not "
    "at all?",
    hint="The derivative of -log sigmoid(z) is -sigmoid(-z).",
    minutes=10,
    difficulty="medium",
)
