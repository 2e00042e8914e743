import copy
import itertools
import math

import pytest
import torch
import transformers as hf
from families_for_tests import MODELS, SIZES, STILL, TOKENS, merges, moved
from torch.distributions import Normal, kl_divergence

from lablib.evidence.claims import REPRODUCED, judge
from lablib.evidence.studies import exchanged
from lablib.exercises import blob as exercises
from lablib.models import anatomy
from lablib.models.classifier import Classifier, Encoded
from lablib.papers import paper
from lablib.peft import blob
from lablib.peft.adapter import (
    adapters,
    freeze_base_,
    load_adapter,
    n_trainable,
    remove_,
    save_adapter,
    trainable,
)
from lablib.peft.lora import lora_
from lablib.studies import blob as study


def layer(n_in=6, n_out=5, rank=2, **options):
    torch.manual_seed(0)
    made = blob.BayesianLoRA(torch.nn.Linear(n_in, n_out), rank, 2 * rank, **options)
    torch.nn.init.normal_(made.up)
    torch.nn.init.uniform_(made.root, 0.3, 0.9)
    return made


# The divergence.


def test_kl_is_torchs():
    mean, deviation = torch.randn(4, 7), torch.rand(4, 7) + 0.01
    expected = kl_divergence(Normal(mean, deviation), Normal(0.0, 0.2)).sum()
    torch.testing.assert_close(blob.kl(mean, deviation, 0.2), expected)


def test_kl_is_zero_at_the_prior_and_there_alone():
    assert blob.kl(torch.zeros(3), torch.full((3,), 0.2)).item() == pytest.approx(0, abs=1e-6)
    assert blob.kl(torch.zeros(3), torch.full((3,), 0.1)) > 0
    assert blob.kl(torch.full((3,), 0.1), torch.full((3,), 0.2)) > 0


def test_descending_leads_to_the_prior_and_leaves_b():
    model = torch.nn.Sequential(layer())
    before = model[0].up.clone()
    for _ in range(500):
        blob.descend_(model, 5e-3)
    assert model[0].mean.abs().max() < 0.01
    torch.testing.assert_close(model[0].deviation, torch.full((2, 6), 0.2), atol=0.01, rtol=0)
    assert torch.equal(model[0].up, before) and model[0].mean.grad is None


def test_weights_of_a_cycle_double_and_sum_to_nearly_one():
    weights = [blob.kl_weight(step, 6) for step in range(12)]
    assert weights[:6] == weights[6:]
    assert weights[0] == 2 / 127 and weights[5] == 64 / 127
    assert all(b == 2 * a for a, b in itertools.pairwise(weights[:6]))
    assert sum(weights[:6]) == pytest.approx(126 / 127)
    assert blob.kl_weight(319, 320) == pytest.approx(0.5)  # no overflow


def test_the_papers_cycle():
    assert blob.cycle_length(640, 4) == int(100 * 640 ** (math.pi / 8) / 4) == 316


# What is drawn.


def test_its_mean_is_lora_with_the_same_matrices(model):
    blob.blob_(model, ["output", "up"], rank=2, alpha=6)
    moved(model)
    other = copy.deepcopy(model)
    remove_(other)
    lora_(other, ["output", "up"], rank=2, alpha=6)
    for ours, theirs in zip(adapters(model).values(), adapters(other).values(), strict=True):
        theirs.down.data, theirs.up.data = ours.mean.data, ours.up.data
    torch.testing.assert_close(anatomy.logits(model, TOKENS), anatomy.logits(other, TOKENS))


def test_it_starts_as_the_base_even_when_it_draws(model):
    before = anatomy.logits(model, TOKENS)
    blob.blob_(model, rank=2)
    for part in adapters(model).values():
        part.train()
    torch.testing.assert_close(anatomy.logits(model, TOKENS), before)
    freeze_base_(model)
    asking = {n for n, p in model.named_parameters() if p.requires_grad}
    assert asking == set(trainable(model)) and len(asking) == 3 * len(anatomy.projections(model))


def test_draws_are_in_training_mode_alone():
    made, x = layer(), torch.randn(3, 4, 6)
    assert torch.equal(made.eval()(x), made(x))
    assert not torch.equal(made.train()(x), made(x))


@pytest.mark.parametrize("tokenwise", [False, True])
def test_draws_have_the_mean_and_covariance_of_the_theorem(tokenwise):
    made = layer(tokenwise=tokenwise).train()
    x = torch.randn(6)
    mean, covariance = blob.full_weight_moments(made)
    rows = torch.cat([made(x.expand(10, 1, 6)).detach()[:, 0] for _ in range(4000)])
    expected = mean @ x + made.base.bias
    spread = torch.einsum("iop,i->op", covariance, x.square()).detach()  # of W x
    assert ((rows.mean(0) - expected).abs() < 5 * (spread.diagonal() / len(rows)).sqrt()).all()
    torch.testing.assert_close(rows.T.cov(), spread, rtol=0.1, atol=0.05 * spread.max().item())


def test_moments_are_those_of_every_entry():
    made = layer()
    mean, covariance = blob.full_weight_moments(made)
    for i, o, p in ((0, 1, 3), (5, 2, 2), (3, 4, 0)):
        by_hand = sum(
            made.factor**2 * made.up[o, r] * made.up[p, r] * made.deviation[r, i] ** 2
            for r in range(2)
        )
        torch.testing.assert_close(covariance[i, o, p], by_hand)
    torch.testing.assert_close(mean, made.base.weight + 2 * made.up @ made.mean)


def test_flipped_is_a_matrix_of_its_own_for_each_text(monkeypatch):
    drawn = []
    real = blob.signs
    monkeypatch.setattr(blob, "signs", lambda *a, **k: drawn.append(real(*a, **k)) or drawn[-1])
    x, noise = torch.randn(3, 4, 6), torch.randn(2, 6)
    made = blob.flipped(x, noise)
    s, t = drawn
    assert s.shape == (3, 1, 6) and t.shape == (3, 1, 2) and set(s.unique().tolist()) == {-1, 1}
    for text in range(3):
        own = noise * torch.outer(t[text, 0], s[text, 0])
        torch.testing.assert_close(made[text], x[text] @ own.T)
    blob.flipped(x, noise, tokenwise=True)
    assert drawn[2].shape == (3, 4, 6) and drawn[3].shape == (3, 4, 2)
    blob.flipped(x[:, 0], noise)
    assert drawn[4].shape == (3, 6)


def test_texts_do_not_share_their_noise():
    made = layer().train()
    x = torch.randn(6).expand(2, 1, 6)
    pairs = torch.stack([made(x).detach()[:, 0, 0] for _ in range(4000)])
    assert torch.corrcoef(pairs.T)[0, 1].abs() < 0.08


# The verbs of every method.


def test_merged_unmerged_removed_and_disabled(model):
    before = anatomy.logits(model, TOKENS)
    bits = {n: p.clone() for n, p in model.named_parameters()}
    blob.blob_(model, rank=2, alpha=8)
    changed = anatomy.logits(moved(model), TOKENS)
    assert (changed - before).abs().max() > 1e-3
    merges(model, before, changed)
    remove_(model)
    assert all(torch.equal(p, bits[n]) for n, p in model.named_parameters())


def test_saved_and_loaded_is_the_same(tmp_path):
    torch.manual_seed(0)
    model = MODELS["bert"]().eval()
    plain = copy.deepcopy(model)
    blob.blob_(model, ["query"], rank=2, alpha=4, tokenwise=True)
    moved(model)
    save_adapter(model, tmp_path / "a.safetensors")
    load_adapter(plain, tmp_path / "a.safetensors")
    assert torch.equal(anatomy.logits(plain, TOKENS), anatomy.logits(model, TOKENS))
    assert blob.layers(plain)[0].tokenwise and n_trainable(plain) == n_trainable(model)
    assert torch.equal(blob.layers(plain)[1].root, blob.layers(model)[1].root)


def test_a_rank_that_is_too_large_is_said():
    with pytest.raises(ValueError, match="rank 17 is not 1 to 16"):
        blob.BayesianLoRA(torch.nn.Linear(16, 32), 17)


def test_bfloat16_goes_with_it():
    model = MODELS["gpt"]().to(torch.bfloat16)
    blob.blob_(model, rank=2)
    assert moved(model).train()(TOKENS).dtype == torch.bfloat16


# Training and predicting.


def task():
    """A text is of the second class when token 9 is in it."""
    torch.manual_seed(0)
    tokens = torch.randint(10, 60, (64, 6))
    labels = torch.arange(64) % 2
    tokens[labels == 1, 3] = 9
    return Encoded(tokens, torch.ones(64, 6, dtype=torch.bool)), labels


def classifier():
    torch.manual_seed(1)
    model = hf.BertModel(hf.BertConfig(**SIZES, **STILL))
    blob.blob_(model, ["query", "value", "up", "down"], rank=4)
    return Classifier(model, 2)


def test_it_learns_and_the_divergence_widens_it():
    encoded, labels = task()
    loose, free = classifier(), classifier()
    losses = blob.tune_blob(loose, encoded, labels, 93, 1e-2, 0.1, batch=16)
    blob.tune_blob(free, encoded, labels, 93, 1e-2, 0.0, batch=16)
    assert losses[-1] < losses[0] / 2
    probabilities = blob.averaged(blob.draws(loose, encoded, 5))
    assert (probabilities.argmax(1) == labels).double().mean() > 0.9
    wide, narrow = (
        sum(part.deviation.mean() for part in blob.layers(c.model)) for c in (loose, free)
    )
    assert wide > 3 * narrow


def test_draws_differ_and_the_mean_does_not():
    encoded, _ = task()
    made = classifier()
    moved(made.model)
    made.train()
    three = blob.draws(made, encoded, 3, batch=10)
    assert three.shape == (3, 64, 2) and not torch.equal(three[0], three[1])
    alone = blob.draws(made, encoded, 0)
    assert alone.shape == (1, 64, 2) and torch.equal(alone, blob.draws(made, encoded, 0))
    assert all(part.training for part in made.modules()), "modes are put back"


def test_dropout_of_lora_draws_too():
    encoded, _ = task()
    torch.manual_seed(0)
    made = Classifier(hf.BertModel(hf.BertConfig(**SIZES, **STILL)), 2)
    lora_(made.model, rank=2, dropout=0.5)
    moved(made.model)
    two = blob.draws(made, encoded, 2)
    assert not torch.equal(two[0], two[1])


def test_an_average_of_probabilities_is_less_sure_than_of_logits():
    logits = torch.tensor([[[4.0, 0.0]], [[-2.0, 0.0]]])
    made = blob.averaged(logits)
    torch.testing.assert_close(made, logits.double().softmax(-1).mean(0))
    assert made.max() < logits.mean(0).softmax(-1).max()


# The study.


def test_laplace_is_less_sure_than_the_point_and_flips_nothing():
    torch.manual_seed(0)
    head, fitted, x = torch.nn.Linear(5, 2), torch.randn(20, 5), 3 * torch.randn(30, 5)
    sharp = study.cooled(head, fitted, x, 1.0)
    torch.testing.assert_close(study.laplace(head, fitted, x, 1e6), sharp, atol=5e-3, rtol=0)
    soft = study.laplace(head, fitted, x, 0.1)
    assert soft.max(1).values.mean() < sharp.max(1).values.mean()
    warm = study.cooled(head, fitted, x, 8.0)
    assert torch.equal(warm.argmax(1), sharp.argmax(1)) and warm.max() < sharp.max()


def test_laplaces_spread_is_the_closed_form_of_two_classes():
    torch.manual_seed(0)
    head, fitted, x = torch.nn.Linear(3, 2), torch.randn(40, 3), torch.randn(6, 3)
    known, p = fitted.double(), head(fitted).double().softmax(1)[:, 0]
    curve = torch.einsum("n,ni,nj->ij", p * (1 - p), known, known).detach()
    # the difference of the two weights has the prior N(0, 2 / precision)
    covariance = torch.linalg.inv(2 * curve + 0.7 * torch.eye(3, dtype=torch.float64)) * 2
    gap = (head(x)[:, 0] - head(x)[:, 1]).double().detach()
    sigma = torch.einsum("ti,ij,tj->t", x.double(), covariance, x.double()).sqrt()
    normal = torch.linspace(-6, 6, 2001, dtype=torch.float64)
    density = torch.exp(-normal.square() / 2) / normal.neg().square().div(-2).exp().sum()
    expected = (torch.sigmoid(gap[:, None] + sigma[:, None] * normal) * density).sum(1)
    made = study.laplace(head, fitted, x, 0.7, n=40_000)[:, 0]
    torch.testing.assert_close(made, expected, atol=0.01, rtol=0)


def made_runs():
    """Six runs."""
    ours, theirs = [0.1, 0.12, 0.09] * 2, [0.3, 0.27, 0.35] * 2
    one = {"kind": "several", "settings": {"mle": ("mle", 1e-3, 0.0)}}
    return [
        one | {"seed": seed, "blob_ece": a, "mle_ece": b + seed / 100}
        for seed, (a, b) in enumerate(zip(ours, theirs, strict=True))
    ]


def test_a_verdict_turns_with_a_planted_defect():
    claim = paper("blob").claim("ece")
    judged = judge(claim, study.values(made_runs())["ece"])
    assert judged.verdict == REPRODUCED and len(judged.values) == 6
    swapped = exchanged(made_runs(), "blob_ece", "mle_ece")
    assert judge(claim, study.values(swapped)["ece"]).verdict != REPRODUCED


def test_flat_gives_each_setting_its_own_row():
    rows = study.flat(made_runs()[:3])
    assert [(row["name"], row["seed"], row["ece"]) for row in rows] == [
        ("mle", 0, 0.3),
        ("mle", 1, 0.28),
        ("mle", 2, 0.37),
    ]
    assert study.flat([{"kind": "mle", "seed": 4, "rate": 1.0}])[0]["seed"] == 4


# The exercises.


def test_the_exercises_are_the_modules_own():
    mean, deviation = torch.randn(3, 4), torch.rand(3, 4) + 0.1
    torch.testing.assert_close(
        exercises.divergence.reference(mean, deviation, 0.2), blob.kl(mean, deviation, 0.2)
    )


def _largest_gap(confidence, right, bins):
    return exercises._gaps(confidence, right, bins)[0].abs().max()


WRONG = {
    "divergence": [
        lambda mean, deviation, prior: blob.kl(mean, deviation, prior) / mean.numel(),
        lambda mean, deviation, prior: blob.kl(0 * mean, deviation, prior),
        lambda mean, deviation, prior: blob.kl(mean, deviation.sqrt(), prior),
    ],
    "calibration_error": [
        lambda confidence, right, bins: (confidence - right).abs().mean(),
        lambda confidence, right, bins: (confidence.mean() - right.mean()).abs(),
        _largest_gap,
    ],
    "flipped_noise": [
        lambda x, noise, s, t: x @ noise.T,
        lambda x, noise, s, t: (s * x) @ noise.T,
        lambda x, noise, s, t: t * (x @ noise.T),
    ],
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_answers_are_told(name, tells_right_from_wrong):
    tells_right_from_wrong(getattr(exercises, name), WRONG[name])


def test_a_prior_pulls_the_matrices_to_zero(monkeypatch):
    def size(kind, decay):
        monkeypatch.setattr(study, "DECAY", decay)
        classifier, _ = study.trained(kind, 201, 0, 1e-2, 0.0, 6, 8)
        return study.squares(classifier).item()

    plain = size("mle", 0.0)
    assert size("map", 0.0) == pytest.approx(plain)
    assert size("map", 30.0) < 0.9 * plain
