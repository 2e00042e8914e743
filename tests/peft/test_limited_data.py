import random
from functools import partial

import numpy as np
import pytest
import torch
import transformers as hf
from families_for_tests import MODELS, SIZES, STILL
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from lablib.compression.recover import language_loss, recover
from lablib.evidence import Pair
from lablib.exercises import limited_data as exercises
from lablib.models.classifier import Classifier, Encoded, cached_below, predicted
from lablib.peft import limited_data as guide
from lablib.peft.adapter import adapters
from lablib.peft.tuning import backbone_above, task_loss, tune
from lablib.studies import limited_data as study


def classifier():
    torch.manual_seed(0)
    sizes = SIZES | STILL | {"intermediate_size": 24, "initializer_range": 0.3}
    return Classifier(hf.BertModel(hf.BertConfig(**sizes)).eval(), 2, below=1)


def texts(made, n=24, seed=0):
    """Texts of two labels, told apart by which half of the vocabulary they use."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 2
    tokens = torch.randint(1, 30, (n, 7), generator=draw) + 29 * labels[:, None]
    mask = torch.ones(n, 7, dtype=torch.bool)
    mask[::3, 5:] = False
    return guide.Few(cached_below(made.model, Encoded(tokens, mask), 1), labels)


def right(made, few):
    return (predicted(made, few.encoded).argmax(1) == few.labels).float().mean().item()


def test_pair_loss_in_closed_form():
    torch.manual_seed(1)
    first, second = (torch.randn(9, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    same = torch.randint(2, (9,)).double()
    loss = guide.pair_loss(first, second, same)
    loss.backward()
    a, b = (x.detach() / x.detach().norm(dim=1, keepdim=True) for x in (first, second))
    cosine = (a * b).sum(1)
    assert loss.item() == pytest.approx(((cosine - same) ** 2).mean().item())
    slope = 2 * (cosine - same)[:, None] / 9 * (b - cosine[:, None] * a)
    torch.testing.assert_close(first.grad, slope / first.detach().norm(dim=1, keepdim=True))


def test_the_loss_and_its_slopes_are_those_of_sentence_transformers():
    versions, peer = guide.recorded()
    sides = [peer[name].clone().requires_grad_() for name in ("first", "second")]
    loss = guide.pair_loss(*sides, peer["same"].double())
    loss.backward()
    close = partial(torch.testing.assert_close, atol=1e-12, rtol=1e-12)
    close(loss.detach().view(1), peer["loss"])
    close(sides[0].grad, peer["slope of first"])
    close(sides[1].grad, peer["slope of second"])
    assert peer["same"].unique().tolist() == [0, 1] and "sentence-transformers" in versions


def test_pairs_are_those_of_setfit_without_a_text_beside_itself():
    _, peer = guide.recorded()
    labels, theirs = peer["labels"], peer["pairs"]
    ours = guide.pairs(labels, 40 * len(theirs))
    possible = guide.possible(ours, len(labels))
    assert torch.equal(possible, guide.possible(theirs, len(labels)))
    assert (theirs[:, 0] == theirs[:, 1]).any()  # there it does pair a text with itself
    alternating = [1, 0] * (len(theirs) // 2)  # equal and different in turns
    assert theirs[:, 2].tolist() == ours[: len(theirs), 2].tolist() == alternating
    known = labels[:, None] == labels
    assert torch.equal(possible[1], known & ~torch.eye(len(labels), dtype=torch.bool))
    assert torch.equal(possible[0], ~known)
    assert not torch.equal(guide.possible(ours[:9], len(labels)), possible)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 3), min_size=3, max_size=12), st.integers(0, 99))
def test_pairs_are_of_two_texts_and_half_of_them_equal(labels, seed):
    known = set(labels)
    if len(known) < 2 or len(known) == len(labels):
        with pytest.raises(ValueError, match="pairs need"):
            guide.pairs(torch.tensor(labels), 10, seed)
        return
    rows = guide.pairs(torch.tensor(labels), 10, seed).tolist()
    assert sum(same for *_, same in rows) == 5
    assert all(i != j and (labels[i] == labels[j]) == same for i, j, same in rows)


def test_the_adversary_beats_every_step_of_its_length():
    """To first order, by Cauchy and Schwarz; and in truth where the step is small."""
    made = classifier()
    few = texts(made)

    def each(inputs):
        logits = made(Encoded(inputs, few.encoded.mask))
        return F.cross_entropy(logits, few.labels, reduction="none")

    at = few.encoded.inputs.clone().requires_grad_()
    before = each(at)
    (slope,) = torch.autograd.grad(before.sum(), at)
    step = guide.adversary(slope, 0.05)
    torch.testing.assert_close(step.flatten(1).norm(dim=1), torch.full((24,), 0.05))
    with torch.no_grad():
        worst = each(at + step)
        assert (worst > before).all()
        for seed in range(5):
            torch.manual_seed(seed)
            other = guide.adversary(torch.randn_like(at) * few.encoded.mask[..., None], 0.05)
            assert (each(at + other) < worst).all()


def test_a_text_without_a_slope_stays():
    assert guide.adversary(torch.zeros(2, 3, 4), 1.0).abs().max() == 0


@pytest.mark.parametrize("name", ["standard", "efficient", "contrastive", "adversarial"])
def test_each_strategy_learns_and_leaves_the_lower_blocks(name):
    made = classifier()
    before = {n: p.clone() for n, p in made.model.named_parameters()}
    few, new = texts(made), texts(made, seed=1)
    getattr(guide, name)(made, few, guide.Training(40, 3e-2 if name == "efficient" else 3e-3))
    assert right(made, new) > 0.8
    now = dict(made.model.named_parameters())
    moved = {n for n in before if n in now and not torch.equal(before[n], now[n])}
    assert all(n.startswith("encoder.layer.1") for n in moved)
    assert bool(moved) == (name != "efficient")
    assert len(adapters(made.model)) == (6 if name == "efficient" else 0)


def test_the_linear_head_is_at_its_minimum():
    """The slope of the penalized loss is zero there; the blocks stay."""
    made = classifier()
    few = texts(made)
    before = predicted(made, few.encoded)
    guide.linear_head(made, few, strength=0.5)
    assert not torch.equal(before, predicted(made, few.encoded))
    pooled = guide.embedded(made, few.encoded).double()
    weight = made.head.weight.detach().double().requires_grad_()
    fit = F.cross_entropy(pooled @ weight.T + made.head.bias.double(), few.labels, reduction="sum")
    (slope,) = torch.autograd.grad(fit + weight.square().sum(), weight)
    assert slope.abs().max() < 1e-3


def decoder():
    torch.manual_seed(0)
    return Classifier(MODELS["gpt"](), 2)


def of_a_decoder(n=12, seed=0):
    """Texts of two labels, and rows to read: each token is followed by the next one."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 2
    tokens = torch.randint(1, 30, (n, 7), generator=draw) + 29 * labels[:, None]
    start = torch.randint(0, 60, (n, 1), generator=draw)
    encoded = Encoded(tokens, torch.ones(n, 7, dtype=torch.bool))
    return guide.Few(encoded, labels), (start + torch.arange(9)) % 60


def test_reading_on_lowers_the_texts_loss_and_then_tunes_as_the_study_does():
    made, twin, plain = decoder(), decoder(), decoder()
    (few, rows), training = of_a_decoder(), guide.Training(4, 1e-3, 4, 3)
    reading = guide.Training(30, 1e-2, 8, 3)
    heard = []

    def listening(classifier, few, training):
        heard.append(language_loss(classifier.model, rows).item())
        guide.standard(classifier, few, training)

    guide.continued(made, few, rows, training, reading, listening)
    assert heard[0] < 0.8 * language_loss(plain.model, rows).item()
    recover(twin.model, rows, 30, 1e-2, batch=8, seed=3)
    tune(twin, *few, 4, 1e-3, trainable=backbone_above(twin), batch=4, seed=3)
    assert torch.equal(predicted(made, few.encoded), predicted(twin, few.encoded))


def test_the_domain_is_read_first_and_then_the_tasks_own_text():
    made, twin = decoder(), decoder()
    few, domain = of_a_decoder()
    _, own = of_a_decoder(seed=5)
    training, reading = guide.Training(2, 1e-3, 4), guide.Training(3, 1e-2, 4)
    task = partial(guide.continued, unlabelled=own, reading=reading)
    guide.continued(made, few, domain, training, reading, then=task)
    for rows in (domain, own):
        recover(twin.model, rows, 3, 1e-2, batch=4)
    guide.standard(twin, few, training)
    torch.testing.assert_close(predicted(made, few.encoded), predicted(twin, few.encoded))


def test_reading_on_is_refused_where_states_are_kept():
    made, rows, training = (
        classifier(),
        torch.zeros(2, 5, dtype=torch.int64),
        guide.Training(1, 0.1),
    )
    with pytest.raises(ValueError, match="1 are computed once"):
        guide.continued(made, texts(made), rows, training, training)


def test_texts_are_packed_without_a_gap():
    def tokenizer(text):
        return {"input_ids": [int(letter) for letter in text]}

    assert guide.packed(tokenizer, ["123", "45678"], 2).tolist() == [[1, 2, 3], [4, 5, 6]]
    assert guide.packed(tokenizer, ["1"], 2).shape == (0, 3)


MORE = texts(classifier(), n=20, seed=2).encoded
PSEUDO = partial(guide.pseudo_labelled, unlabelled=MORE, threshold=0.6)


@pytest.mark.parametrize("then", [guide.standard, guide.contrastive, PSEUDO])
def test_another_languages_labels_are_learned_beside_the_few(then):
    made, twin = classifier(), classifier()
    few, others = texts(made, n=6), texts(made, n=20, seed=1)
    training = guide.Training(10, 3e-3)
    guide.cross_lingual(made, few, others, training, then)
    then(twin, few.and_(others), training=training)
    assert torch.equal(predicted(made, few.encoded), predicted(twin, few.encoded))


def test_only_the_confident_are_believed():
    logits = torch.tensor([[4.0, 0.0], [0.1, 0.0], [0.0, 5.0], [0.0, 2.0]])
    places, labels = guide.confident(logits, 0.9)
    assert places.tolist() == [0, 2] and labels.tolist() == [0, 1]


def test_pseudo_labels_are_those_of_the_first_round():
    made, twin, training = classifier(), classifier(), guide.Training(20, 3e-3)
    few, other = texts(made, n=8), texts(made, n=40, seed=1)
    places, labels = guide.pseudo_labelled(made, few, other.encoded, training, 0.8)
    guide.standard(twin, few, training)
    expected = guide.confident(predicted(twin, other.encoded), 0.8)
    assert torch.equal(places, expected[0]) and torch.equal(labels, expected[1])
    assert 0 < len(places) < 40
    both = few.and_(guide.Few(other.encoded.at(places), labels))
    guide.standard(twin, both, training)
    torch.testing.assert_close(predicted(made, few.encoded), predicted(twin, few.encoded))
    none, _ = guide.pseudo_labelled(made, few, other.encoded, guide.Training(1, 1e-6), 1.0)
    assert len(none) == 0


def test_the_uncertain_have_the_largest_entropy():
    logits = torch.tensor([[9.0, 0.0], [0.1, 0.0], [0.0, 1.0], [0.0, 0.2]])
    assert guide.uncertain(logits, 2).tolist() == [1, 3]
    made = classifier()
    pool = texts(made, n=40)
    chosen = guide.draw_uncertain(made, pool, range(6), 20)
    assert len(set(chosen)) == len(chosen) == 20 and chosen[:6] == list(range(6))


def test_k_center_takes_the_farthest():
    points = torch.tensor([[0.0], [1.0], [10.0], [4.0]])
    assert guide.k_center(points, 3) == [0, 2, 3]
    assert guide.k_center(points, 2, chosen=[2]) == [0, 3]


def test_both_together_are_padded_to_the_longer():
    made = classifier()
    long, short = texts(made, n=4), texts(made, n=6, seed=1)
    short = guide.Few(Encoded(*(t[:, :5] for t in short.encoded)), short.labels)
    both = long.and_(short)
    assert both.encoded.inputs.shape == (10, 7, 32) and both.encoded.mask[4:, 5:].sum() == 0
    alone = torch.cat([predicted(made, part.encoded) for part in (long, short)])
    torch.testing.assert_close(predicted(made, both.encoded), alone, atol=1e-5, rtol=1e-5)


def test_names_alone_choose_the_nearest():
    names = torch.eye(3)
    nearest = guide.by_names(torch.tensor([[5.0, 1.0, 0.0], [0.0, 0.1, 0.3]]), names)
    assert nearest.argmax(1).tolist() == [0, 2] and nearest.max() <= 1


def test_in_context_is_reading_everything_anew():
    """The cache spares the labelled texts, and no text sees the one before it."""
    torch.manual_seed(2)
    model = MODELS["gpt"]().eval()

    def tokenizer(text):
        return {"input_ids": [ord(letter) % 60 for letter in text]}

    words, texts = ("no", "yes"), ["a long text:", "b:", "and c:"]
    for before in ("", "good: yes. bad: no. "):
        ours = guide.in_context(model, tokenizer, before, texts, words)
        for text, row in zip(texts, ours, strict=True):
            whole = torch.tensor([tokenizer(before + text)["input_ids"]])
            ends = [ord(word[-1]) % 60 for word in words]
            with torch.no_grad():
                torch.testing.assert_close(row, model(whole)[0, -1, ends], atol=1e-4, rtol=1e-4)


def test_words_are_deleted_and_swapped_and_none_is_invented():
    text, draw = "one two three four five six seven", random.Random(0)
    assert set(guide.deleted(text, 0.5, draw).split()) < set(text.split())
    assert guide.deleted(text, 1.0, draw) == "one"
    changed = guide.swapped(text, 2, draw)
    assert sorted(changed.split()) == sorted(text.split()) and changed != text
    assert guide.swapped("one", 3, draw) == "one"


def test_the_map_opens_with_what_one_has():
    assert guide.advised(0) == ["label names alone"]
    few, more = guide.advised(16), guide.advised(16, unlabelled=True, language=True)
    assert set(few) < set(more) and "pseudo-labels" in more
    assert guide.advised(16, trains=False) == ["label names alone", "linear head"]
    assert "full fine-tuning" in guide.advised(1000) and "linear head" not in guide.advised(1000)


def test_pairs_are_of_seeds_that_have_both():
    runs = [{"seed": 0, "full:16": [1.0, 2.0]}, {"seed": 5, "full:16": [3.0]}]
    runs += [{"seed": 1, "lead:1000": [4.0]}, {"seed": 5, "lead:1000": [6.0, 7.0]}]
    assert study.pairs_of(runs, "lead:1000", "full:16") == [Pair(1, 4.0, 2.0), Pair(5, 6.0, 3.0)]


def test_crossing_on_a_logarithmic_axis():
    assert guide.crossing([4, 16], [-1, 1]) == pytest.approx(8)
    assert guide.crossing([2, 4, 8], [3, 1, -1]) == pytest.approx(2**2.5)
    assert guide.crossing([2, 4], [-1, 0]) == pytest.approx(4)
    assert np.isnan(guide.crossing([2, 4, 8], [1, 2, 3]))


def test_a_bootstrap_of_the_crossing():
    """Against brute force over all draws of two seeds; one of the four never crosses."""
    counts, gaps = [4, 16], np.array([[-3.0, 1.0], [1.0, 3.0]])
    draws = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    every, low, high, share = guide.crossing_interval(counts, gaps, draws)
    assert every == pytest.approx(guide.crossing(counts, [-1, 2])) and share == 0.75
    among = np.quantile([guide.crossing(counts, one) for one in ([-3, 1], [-1, 2], [-1, 2])], 0.975)
    assert every == pytest.approx(low) and high == pytest.approx(among)
    none = guide.crossing_interval(counts, gaps + 9, draws)
    assert np.isnan(none[:3]).all() and none[3] == 0


def test_the_bootstrap_covers_the_true_crossing():
    rng, counts = np.random.default_rng(0), np.array([8.0, 16.0, 64.0, 256.0])
    inside = []
    for _ in range(60):
        gaps = np.log2(counts) - 5 + rng.normal(0, 1, (20, 1)) + rng.normal(0, 0.2, (20, 4))
        draws = rng.integers(20, size=(200, 20))
        _, low, high, _ = guide.crossing_interval(counts, gaps, draws)
        inside.append(low < 32 < high)
    assert 0.85 < np.mean(inside) <= 1


def test_adversarial_training_takes_the_mean_of_both_losses():
    """With epsilon near zero it is plain fine-tuning."""
    plain, other = classifier(), classifier()
    few = texts(plain)
    guide.standard(plain, few, guide.Training(3, 1e-3))
    guide.adversarial(other, few, guide.Training(3, 1e-3), epsilon=1e-9)
    logits = [task_loss(predicted(made, few.encoded), few.labels).item() for made in (plain, other)]
    assert logits[0] == pytest.approx(logits[1], abs=1e-4)


# Exercises.


def with_itself(labels, n, draw):
    rows = []
    for number in range(n):
        i = draw.randrange(len(labels))
        same = number % 2 == 0
        others = [j for j in range(len(labels)) if (labels[i] == labels[j]) == same]
        rows.append((i, draw.choice(others) if not same else i, int(same)))
    return rows


def as_they_come(labels, n, draw):
    rows = [draw.sample(range(len(labels)), 2) for _ in range(n)]
    return [(i, j, int(labels[i] == labels[j])) for i, j in rows[:-1]] + [(0, 0, 1)]


def always_the_same(labels, n, draw):
    return exercises.sample_pairs.reference(labels, n, random.Random(0))


def of_the_batch(gradient, epsilon):
    return epsilon * gradient / gradient.norm()


def each_token(gradient, epsilon):
    return epsilon * gradient / gradient.norm(dim=2, keepdim=True)


def downhill(gradient, epsilon):
    return -exercises.adversary.reference(gradient, epsilon)


def drawn_curves(counts, gaps, draws):
    return [guide.crossing(counts, gaps[places].mean(0)) for places in draws]


def with_interval(low_and_high):
    """A wrong answer: everything right but the interval, which is that of so many values."""

    def wrong(counts, gaps, draws):
        every, *_, share = exercises.crossing.reference(counts, gaps, draws)
        low, high = low_and_high(counts, gaps, draws)
        return every, low, high, share

    return wrong


@with_interval
def one_left_out(counts, gaps, draws):
    fewer = [np.delete(gaps, seed, axis=0).mean(0) for seed in range(len(gaps))]
    return np.nanquantile([guide.crossing(counts, curve) for curve in fewer], [0, 1])


@with_interval
def one_seed_each(counts, gaps, draws):
    return np.nanquantile([guide.crossing(counts, row) for row in gaps], [0.025, 0.975])


@with_interval
def extremes(counts, gaps, draws):
    return np.nanquantile(drawn_curves(counts, gaps, draws), [0, 1])


@with_interval
def ninety_percent(counts, gaps, draws):
    return np.nanquantile(drawn_curves(counts, gaps, draws), [0.05, 0.95])


@with_interval
def without_repeats(counts, gaps, draws):
    return np.nanquantile(drawn_curves(counts, gaps, map(np.unique, draws)), [0.025, 0.975])


@with_interval
def no_interval(counts, gaps, draws):
    return [guide.crossing(counts, gaps.mean(0))] * 2


def not_a_number_is_kept(counts, gaps, draws):
    every, *_, share = exercises.crossing.reference(counts, gaps, draws)
    return every, *np.quantile(drawn_curves(counts, gaps, draws), [0.025, 0.975]), share


def always_crosses(counts, gaps, draws):
    return *exercises.crossing.reference(counts, gaps, draws)[:3], 1.0


def straight(counts, gaps, draws):
    _, *interval = exercises.crossing.reference(counts, gaps, draws)
    return float(np.interp(0, gaps.mean(0), counts)), *interval


def mean_of_the_draws(counts, gaps, draws):
    _, *interval = exercises.crossing.reference(counts, gaps, draws)
    return float(np.nanmean(drawn_curves(counts, gaps, draws))), *interval


WRONG = {
    "sample_pairs": [with_itself, as_they_come, always_the_same],
    "adversary": [of_the_batch, each_token, downhill],
    "crossing": [
        one_left_out,
        one_seed_each,
        extremes,
        ninety_percent,
        without_repeats,
        no_interval,
        not_a_number_is_kept,
        always_crosses,
        straight,
        mean_of_the_draws,
    ],
}


@pytest.mark.parametrize("name", WRONG)
def test_exercises_tell_right_from_wrong(name, tells_right_from_wrong):
    tells_right_from_wrong(getattr(exercises, name), WRONG[name])


def test_the_exercises_interval_is_the_modules():
    rng, counts = np.random.default_rng(1), np.array([8.0, 16.0, 64.0])
    gaps, draws = np.log2(counts) - 4.5 + rng.normal(0, 1, (6, 3)), rng.integers(6, size=(50, 6))
    theirs = exercises.crossing.reference(counts, gaps, draws)
    assert guide.crossing_interval(counts, gaps, draws) == pytest.approx(theirs)


def test_other_texts_take_the_same_strategies():
    ways = "licences.full:2:0.0003 licences.head:2 topics.contrastive:2:0.0001 "
    ways += "reviews.efficient:2:0.001"
    told = study.run(ways, 200, steps=1, test=8)
    assert all(len(told[way]) == 1 and 0 <= told[way][0] <= 100 for way in ways.split())
    assert [study.labels_of(name) for name in ("licences", "topics", "reviews", "")] == [
        4,
        20,
        2,
        2,
    ]


def test_a_curve_is_full_tuning_plus_the_difference_in_shared_draws():
    runs = [
        {"seed": 0, "full:8": [60.0, 70.0], "contrastive:8": [64.0, 72.0], "full:16": [80.0]},
        {"seed": 2, "full:8": [80.0], "licences.full:4:0.001": [30.0], "licences.head:4": [31.0]},
    ]
    films, licences = study.curves(runs), study.curves(runs, "licences.")
    names = [row.name for row in study.guide.GUIDE[1:5]]  # head, contrastive, efficient, full
    assert films[names[3]] == {8: 70.0, 16: 80.0} and films[names[1]] == {8: 73.0}
    assert names[2] not in films and licences == {names[0]: {4: 31.0}, names[3]: {4: 30.0}}
