"""GRL's three losses, by hand and against closed forms; writing and reading with one model."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F

from lablib.embeddings.contrastive import info_nce
from lablib.embeddings.encode import Encoder
from lablib.embeddings.ullme import (
    LogLikelihood,
    Objective,
    consistency,
    grl,
    log_likelihood,
    preference_loss,
    train_grl,
    two_rankings,
    written,
)
from lablib.evidence import Pair
from lablib.evidence.studies import Study, matching
from lablib.exercises import ullme as exercises
from lablib.models.weights import pretrained
from lablib.papers import paper
from lablib.studies import ullme as study

TRIPLES = [
    (f"About {name}", f"{name} built a house by the river.", "Nobody lives in the desert.")
    for name in ("Adam", "Seth", "Noah", "Ham", "Lot", "Job")
]


@pytest.fixture
def encoder():
    return Encoder(*pretrained("tiny-1m"), causal=False, max_length=40)


@pytest.fixture
def scores():
    torch.manual_seed(0)
    return [
        LogLikelihood(
            (-30 * torch.rand(5, dtype=torch.float64)).requires_grad_(),
            (-3 * torch.rand(5, dtype=torch.float64)).requires_grad_(),
        )
        for _ in range(4)
    ]


def test_preferences_are_their_closed_forms(scores):
    chosen, rejected, *reference = scores
    free = chosen.total - rejected.total
    held = free - reference[0].total + reference[1].total
    for margin, given in ((free, None), (held, tuple(reference))):
        found = preference_loss(chosen, rejected, "dpo", 0.1, given)
        wanted = sum(math.log1p(math.exp(-0.1 * m)) for m in margin.tolist()) / 5
        assert math.isclose(found.item(), wanted, rel_tol=1e-9)
    a_token = chosen.mean - rejected.mean
    wanted = sum((m - 5) ** 2 for m in a_token.tolist()) / 5
    found = preference_loss(chosen, rejected, "ipo", 0.1)
    assert math.isclose(found.item(), wanted, rel_tol=1e-9)
    found = preference_loss(chosen, rejected, "sft")
    assert math.isclose(found.item(), -chosen.mean.mean().item())
    with pytest.raises(ValueError, match="'hinge' is no preference loss: dpo"):
        preference_loss(chosen, rejected, "hinge")


def test_kto_by_hand():
    """Gains over the reference of 2 and 4, and of -1 and -1: means 3 and 0 (cut off)."""
    chosen, rejected = (LogLikelihood(torch.tensor(v), None) for v in ([2.0, 4.0], [-1.0, -1.0]))
    none = LogLikelihood(torch.zeros(2), None)
    found = preference_loss(chosen, rejected, "kto", 0.5, (none, none))
    lost = [1 - 1 / (1 + math.exp(-0.5 * v)) for v in (2 - 0, 4 - 0, 3 + 1, 3 + 1)]
    assert math.isclose(found.item(), sum(lost) / 4, rel_tol=1e-6)


def test_consistency_by_hand():
    represented = torch.tensor([[0.0, 0.05 * math.log(3)]])  # r = 1/4, 3/4
    generated = torch.tensor([[math.log(2), math.log(2)]])  # g = 1/2, 1/2
    wanted = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert math.isclose(consistency(represented, generated).item(), wanted, rel_tol=1e-5)
    assert abs(consistency(generated * 0.05, generated).item()) < 1e-7


def test_no_gradient_reaches_the_writer_through_the_consistency():
    represented, generated = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
    consistency(represented, generated).backward()
    assert represented.grad.abs().sum() > 0 and generated.grad is None


def test_the_weights_weigh_and_zero_is_contrast_alone(scores):
    chosen, rejected, *_ = scores
    vectors = [torch.randn(5, 8, dtype=torch.float64) for _ in range(3)]

    def loss(*weights):
        return grl(*vectors, chosen, rejected, weights).item()

    assert math.isclose(loss(1, 0, 0), info_nce(*vectors).item())
    assert math.isclose(loss(0, 1, 0), preference_loss(chosen, rejected).item())
    parts = [loss(1, 0, 0), loss(0, 1, 0), loss(0, 0, 1)]
    assert math.isclose(loss(2, 0.5, 3), 2 * parts[0] + 0.5 * parts[1] + 3 * parts[2])


def test_likelihoods_are_those_of_a_loop(encoder):
    queries, right, wrong = zip(*TRIPLES)
    for passages in (right, wrong):
        rows = written(encoder.tokenizer, queries, passages, 40)
        found = log_likelihood(encoder.model, rows)
        for row in range(len(queries)):
            before = encoder.tokenizer(queries[row] + "\n")["input_ids"]
            after = encoder.tokenizer(passages[row])["input_ids"]
            log_p = F.log_softmax(encoder.model(torch.tensor([before + after]))[0], -1)
            nats = [
                log_p[len(before) + i - 1, token].item() for i, token in enumerate(after)
            ]  # each token's place is told one before  # fmt: skip
            assert math.isclose(found.total[row].item(), sum(nats), rel_tol=1e-4)
            assert math.isclose(found.mean[row].item(), sum(nats) / len(nats), rel_tol=1e-4)


def test_a_long_query_leaves_its_passage_half_the_room(encoder):
    rows = written(encoder.tokenizer, ["long words " * 30, "short"], ["a passage " * 30] * 2, 20)
    assert rows.encoded.mask.all() and rows.wrote.sum(1).tolist()[0] == 10 < rows.wrote[1].sum()
    with pytest.raises(ValueError, match="the passage of 'a' has no token"):
        written(encoder.tokenizer, ["a"], [""], 40)


def test_training_with_all_three_learns_both_and_writing_stays_causal(encoder):
    def seen():
        queries, right, wrong = zip(*TRIPLES)
        scores = [log_likelihood(encoder.model, written(encoder.tokenizer, queries, p, 40))
                  for p in (right, wrong)]  # fmt: skip
        vectors = [encoder(texts) for texts in (queries, right, wrong)]
        return preference_loss(*scores).item(), info_nce(*vectors).item()

    before = seen()
    losses = train_grl(encoder, TRIPLES, 10, 1e-3, batch=6)
    after = seen()
    assert after[0] < before[0] and after[1] < before[1] and losses[-1] < losses[0]
    tokens = torch.tensor([[5, 6, 7, 8]])
    cut = encoder.model(tokens[:, :2])
    torch.testing.assert_close(encoder.model(tokens)[:, :2], cut)


def test_contrast_alone_never_writes(encoder, monkeypatch):
    monkeypatch.setattr("lablib.embeddings.ullme.log_likelihood", None)
    other = copy.deepcopy(encoder.model)
    losses = train_grl(encoder, TRIPLES, 2, 0.0, Objective((1.0, 0.0, 0.0)), batch=6)
    assert len(losses) == 2 and all(
        map(torch.equal, encoder.model.parameters(), other.parameters())
    )


def test_two_rankings_of_one_model(encoder):
    passages = [right for _, right, _ in TRIPLES]
    cosines, nats = two_rankings(encoder, "About Noah", passages)
    for place, passage in enumerate(passages):
        cosine = encoder(["About Noah"])[0] @ encoder([passage])[0]
        alone = written(encoder.tokenizer, ["About Noah"], [passage], 40)
        assert math.isclose(cosines[place].item(), cosine.item(), rel_tol=1e-5)
        mean = log_likelihood(encoder.model, alone).mean.item()
        assert math.isclose(nats[place].item(), mean, rel_tol=1e-5)


# The study.


def test_weights_of_their_own_are_those_of_an_objective():
    point = study.CANARY | {"held_out": 10}
    named = study.run(**point | {"objective": "grl", "weight": 0.1})
    own = study.run(**point | {"objective": "weights", "weights": [1.0, 0.1, 0.1]})
    other = study.run(**point | {"objective": "weights", "weights": [1.0, 0.1, 1.0]})
    assert own["loss"] == named["loss"] != other["loss"]


def test_every_setting_that_trains_something_is_stored():
    turned = study.turned(Study(paper("ullme")).runs())
    assert len(turned) == 2 * 3 * 3 - 1 and (0.0, 0.0, 0.0) not in turned
    assert {run["seed"] for run in turned.values()} == {study.SEEDS[0]}
    assert {run["rate"] for run in turned.values()} == {study.TUNED["grl"]["rate"]}
    for weights, run in turned.items():
        if run["objective"] != "weights":
            named = study.WEIGHTS[run["objective"]]
            assert weights == (1.0, *(run.get("weight", 1.0) * part for part in named))


def test_imitation_is_the_writers_own_loss():
    point = study.CANARY | {"held_out": 10, "objective": "x", "weights": (0.0, 1.0, 0.0)}
    losses = {kind: study.run(**point, preference=kind)["loss"] for kind in ("dpo", "sft")}
    assert losses["dpo"] < 2 < losses["sft"]  # near log 2, and nats of a token


def best_of_both_seeds(key, **where):
    """What of a point gave the highest nDCG, in the sum of two tuning seeds."""
    runs = matching(Study(paper("ullme")).runs("TUNING"), **where)
    first, second = (
        sorted(matching(runs, seed=seed), key=lambda run: run[key]) for seed in (100, 101)
    )
    assert [run[key] for run in first] == [run[key] for run in second]
    sums = [a["ndcg"] + b["ndcg"] for a, b in zip(first, second, strict=True)]
    assert 0 < sums.index(max(sums)) < len(sums) - 1, "the best of a grid lies inside"
    return first[sums.index(max(sums))][key]


def test_rates_and_weights_are_the_best_of_two_seeds():
    usual = {"pooling": "mean", "causal": False}
    assert best_of_both_seeds("rate", objective="cl", **usual) == study.TUNED["cl"]["rate"]
    own = study.TUNED["grl"]
    assert best_of_both_seeds("rate", objective="grl", weight=own["weight"]) == own["rate"]
    assert best_of_both_seeds("weight", objective="grl", rate=study.MIDDLE) == own["weight"]
    for (pooling, causal), rate in study.READ.items():
        assert best_of_both_seeds("rate", objective="cl", pooling=pooling, causal=causal) == rate
    assert best_of_both_seeds("weights", objective="imitation") == [1.0, study.IMITATED, 0.0]
    for name, kind in study.DOCSTRINGS.items():
        assert best_of_both_seeds("rate", objective=kind["objective"]) == study.DOC_RATES[name]


def test_docstrings_are_judged_apart_from_headings():
    runs = [p | {"ndcg": p["seed"] / 10, "agreement": 0.0} for p in study.POINTS]
    for run in runs:
        run["ndcg"] += run.get("collection") == "docstrings"
    found = study.values(runs)["grl-docstrings"]
    assert found == [Pair(seed, 1 + seed / 10, 1 + seed / 10) for seed in study.SEEDS]
    assert all(pair.method < 1 for pair in study.values(runs)["grl"])


def test_counts_of_words_are_far_ahead_of_chance():
    found = study.by_words(0)
    assert set(found) == {"BM25", "tf-idf"} and all(0.5 < score < 1 for score in found.values())
    assert study.by_words(1) != found != study.by_words(0, "docstrings")


# Exercises.


def _softmax_of(values, temperature=1.0):
    return F.softmax(values / temperature, -1)


WRONG = {
    "prefer": [
        lambda chosen, rejected, beta: -F.logsigmoid(beta * (rejected - chosen)).mean(),
        lambda chosen, rejected, beta: -F.logsigmoid(beta * chosen).mean(),
        lambda chosen, rejected, beta: F.relu(1 - beta * (chosen - rejected)).mean(),
        lambda chosen, rejected, beta: -F.logsigmoid(beta * (chosen - rejected)),
    ],
    "agree": [
        lambda cosines, nats, t: exercises._agree(nats, cosines, t),
        lambda cosines, nats, t: F.kl_div(
            F.log_softmax(cosines / t, -1), _softmax_of(nats), reduction="batchmean"
        ),
        lambda cosines, nats, t: exercises._agree(cosines, nats / t, t),
    ],
    "a_token": [
        lambda log_p, wrote: log_p.sum(-1) / wrote.sum(-1),
        lambda log_p, wrote: (log_p * wrote).sum(-1) / len(log_p),
        lambda log_p, wrote: log_p[wrote].mean(),
        lambda log_p, wrote: (log_p * ~wrote).sum(-1) / (~wrote).sum(-1),
    ],
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_answers_are_told(name, tells_right_from_wrong):
    tells_right_from_wrong(getattr(exercises, name), WRONG[name])
