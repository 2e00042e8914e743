"""Kneser-Ney against lmplz's own numbers, kenlm's reader, and the definitions in dictionaries."""

import math
import random
from collections import Counter, defaultdict

import numpy as np
import pytest

from lablib.language_models import lmplz
from lablib.language_models.kneser_ney import FALLBACK, KneserNey


def corpus(seed: int, size: int) -> list[list[str]]:
    """Sentences of 0 to 11 words from a noisy chain over 97 words."""
    rng = random.Random(seed)

    def sentence():
        word, made = 0, []
        for _ in range(int(rng.random() * 12)):
            word = (word * 7 + int(60 * rng.random() ** 3)) % 97
            made.append(f"w{word}")
        return made

    return [sentence() for _ in range(size)]


TRAIN = corpus(0, 3000)
TEST = [*corpus(1, 300), ["new", "w3", "words"], []]

# Printed by `query -v summary` of kenlm 0.3.0 after `lmplz --discount_fallback [--prune ...]`:
# order, training sentences, pruning, perplexity including and excluding OOVs.
LMPLZ = [
    (2, 3000, None, 34.20231634010216, 33.96826974678305),
    (3, 3000, None, 37.22425580981752, 36.981551939446376),
    (5, 3000, None, 37.37341124571655, 37.12988778924015),
    (3, 3000, [0, 1], 36.70581077364212, 36.46856305632631),
    (5, 3000, [0, 0, 1, 2], 35.851336647309026, 35.616205824890734),
    (2, 8, None, 50.92848696228949, 33.289588012575464),
    (3, 8, None, 52.946298833165216, 34.76699579188993),
    (5, 8, None, 53.078612342865014, 34.87660777224443),
]


@pytest.mark.parametrize(("order", "size", "prune", "with_oov", "without"), LMPLZ)
def test_perplexity_equals_lmplz_and_query(order, size, prune, with_oov, without):
    model = KneserNey(order).fit(TRAIN[:size])
    if prune:
        model.prune(prune)
    assert model.perplexity(TEST) == pytest.approx(with_oov, rel=2e-6)
    assert model.perplexity(TEST, include_oov=False) == pytest.approx(without, rel=2e-6)


@pytest.fixture(scope="module")
def plays():
    return KneserNey(5).fit(lmplz.training_lines())


def test_real_text_gets_what_lmplz_and_query_give_it(plays):
    """Recorded from kenlm's own estimator, word by word: see lablib.language_models.lmplz."""
    wanted, ours = lmplz.recorded(), plays.word_logprobs(lmplz.scored_lines()) / math.log(10)
    assert ours == pytest.approx(np.array(wanted["word_log10"]), abs=5e-6)
    assert np.array(plays.discounts) == pytest.approx(np.array(wanted["discounts"]), abs=1e-5)
    broken = plays.with_discounts([tuple(0.9 * d for d in row) for row in plays.discounts])
    other = broken.word_logprobs(lmplz.scored_lines()) / math.log(10)
    assert np.abs(other - wanted["word_log10"]).max() > 0.05


def test_our_arpa_file_holds_lmplz_s_own_entries(plays, tmp_path):
    plays.write_arpa(tmp_path / "ours.arpa")
    lines = (tmp_path / "ours.arpa").read_text("utf-8").splitlines()
    rows = [line.split("\t") for line in lines if "\t" in line]
    ours = {row[1]: [float(row[0]), *map(float, row[2:])] for row in rows}
    wanted = lmplz.recorded()["ngrams_log10"]
    assert len(wanted) == 200
    for gram, entry in wanted.items():
        if gram != "<s>":  # its probability is never asked for
            padded = [*ours[gram], 0.0][: len(entry)]
            assert padded == pytest.approx(entry, abs=1e-5), gram


@pytest.mark.parametrize("prune", [0, 1])
def test_kenlm_reads_the_arpa_file_and_scores_it_equally(tmp_path, prune):
    kenlm = pytest.importorskip("kenlm", reason="the kenlm package is not installed")
    model = KneserNey(4).fit(TRAIN).prune(prune)
    model.write_arpa(tmp_path / "model.arpa")
    theirs = kenlm.Model(str(tmp_path / "model.arpa"))
    for sentence in TEST:
        log10 = model.logprob(sentence) / math.log(10)
        assert log10 == pytest.approx(theirs.score(" ".join(sentence)), abs=1e-4)


class Definitions:
    """Chen and Goodman's formulas, one n-gram at a time."""

    def __init__(self, order, sentences):
        self.order = order
        raw = Counter()
        for sentence in sentences:
            padded = ("<s>", *sentence, "</s>")
            for end in range(1, len(padded)):
                for start in range(max(0, end - order + 1), end + 1):
                    raw[padded[start : end + 1]] += 1
        variety = defaultdict(set)
        for gram in raw:
            variety[gram[1:]].add(gram[0])
        self.counts = {
            g: n if len(g) == order or g[0] == "<s>" else len(variety[g]) for g, n in raw.items()
        }
        self.followers = defaultdict(list)
        for gram, count in self.counts.items():
            self.followers[gram[:-1]].append(count)
        self.size = len({word for gram in raw for word in gram} - {"<s>"}) + 1
        self.discounts = [self._discount(k) for k in range(1, order + 1)]

    def _discount(self, k):
        n = Counter(count for gram, count in self.counts.items() if len(gram) == k)
        if not (n[1] and n[2] and n[3]):
            return FALLBACK
        y = n[1] / (n[1] + 2 * n[2])
        found = tuple(c - (c + 1) * y * n[c + 1] / n[c] for c in (1, 2, 3))
        return found if all(0 <= d <= c for c, d in zip((1, 2, 3), found)) else FALLBACK

    def prob(self, word, context):
        context = tuple(context[-(self.order - 1) :]) if self.order > 1 else ()
        lower = self.prob(word, context[1:]) if context else 1 / self.size
        counts = self.followers.get(context)
        if not counts:
            return lower
        discount = (0, *self.discounts[len(context)])
        left = sum(discount[min(count, 3)] for count in counts) / sum(counts)
        count = self.counts.get((*context, word), 0)
        return (count - discount[min(count, 3)]) / sum(counts) + left * lower


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_equals_the_definitions(order):
    train = corpus(5, 400)
    definitions = Definitions(order, train)
    # lmplz counts one n-gram an order otherwise; here both get the same discounts.
    model = KneserNey(order, definitions.discounts).fit(train)
    for sentence in TEST[:40]:
        words = [*sentence, "</s>"]
        expected = []
        for i, word in enumerate(words):
            context = [w if w in model.vocabulary else "<unk>" for w in ["<s>", *words[:i]]]
            expected.append(math.log(definitions.prob(word, context)))
        assert model.word_logprobs([sentence]) == pytest.approx(expected, abs=1e-10)


def test_estimated_discounts_are_those_of_the_definitions_up_to_lmplz_s_one_count():
    ours, definitions = KneserNey(3).fit(TRAIN), Definitions(3, TRAIN)
    assert ours.discounts[2] == pytest.approx(definitions.discounts[2])
    assert np.allclose(ours.discounts[1], definitions.discounts[1], atol=0.01)


@pytest.mark.parametrize("prune", [0, 1, [0, 0, 3]])
def test_distributions_sum_to_one_and_agree_with_scores(prune):
    model = KneserNey(4).fit(TRAIN).prune(prune)
    for context in ([], ["w3"], ["w3", "never-seen", "w21"], TRAIN[5][:4]):
        probs = model.distribution(context)
        assert probs.sum() == pytest.approx(1)
        assert probs[model.vocabulary.index("<s>")] == 0
        for word in ("w3", "</s>", "never-seen"):
            scored = model.word_logprobs([[*context, word] if word != "</s>" else context])
            place = model.vocabulary.index(word) if word in model.vocabulary else 0
            assert math.log(probs[place]) == pytest.approx(scored[len(context)])


def test_unknown_words_in_the_training_text_are_counted(tmp_path):
    train = [["<UNK>" if word == "w3" else word for word in sentence] for sentence in TRAIN]
    model = KneserNey(3).fit(train)
    assert "<UNK>" not in model.vocabulary
    assert model.logprob(["w1", "<unk>"]) == model.logprob(["w1", "<UNK>"])
    assert model.logprob(["w1", "w3"]) == model.logprob(["w1", "<unk>"])
    assert model.logprob(["w3"]) > KneserNey(3).fit(TRAIN).logprob(["never-seen"])


def test_save_and_load_give_the_same_model(tmp_path):
    model = KneserNey(3).fit(TRAIN).prune(1)
    model.save(tmp_path / "model.npz")
    loaded = KneserNey.load(tmp_path / "model.npz")
    assert np.array_equal(loaded.word_logprobs(TEST), model.word_logprobs(TEST))
    assert loaded.prune(0).perplexity(TEST) == KneserNey(3).fit(TRAIN).perplexity(TEST)
    assert loaded.discounts == model.discounts
    (tmp_path / "other.npz").write_bytes(b"not an archive")
    with pytest.raises(ValueError, match="holds no Kneser-Ney model"):
        KneserNey.load(tmp_path / "other.npz")


def test_pruning_refers_to_the_fitted_counts():
    model = KneserNey(3).fit(TRAIN)
    before = model.perplexity(TEST)
    sizes = [len(level.keys) for level in model._levels]
    assert model.prune(2) is model
    assert [len(level.keys) < size for level, size in zip(model._levels, sizes)] == [0, 1, 1]
    assert model.prune(0).perplexity(TEST) == before
    assert model.prune(2).fit(TRAIN).perplexity(TEST) == before
    with pytest.raises(ValueError, match="never decrease"):
        model.prune([0, 2, 1])
    with pytest.raises(ValueError, match="start at 0"):
        model.prune([1, 1, 1])


def test_pruning_everything_leaves_the_words():
    model = KneserNey(3).fit(TRAIN).prune(10**9)
    assert model.perplexity(TEST) < 200
    assert model.distribution(["w3"]).sum() == pytest.approx(1)


def test_discounts_can_be_given():
    model = KneserNey(2).fit(TRAIN)
    assert model.with_discounts(None).perplexity(TEST) == model.perplexity(TEST)
    other = model.with_discounts(0.75)
    assert other.discounts == [(0.75,) * 3] * 2
    assert other.perplexity(TEST) == KneserNey(2, 0.75).fit(TRAIN).perplexity(TEST)
    assert model.with_discounts(0.0).perplexity(TEST) == math.inf
    for wrong in (1.5, -0.1, [(0.5, 1, 1.5)]):
        with pytest.raises(ValueError, match="discounts"):
            KneserNey(2, wrong)


def test_one_word_is_enough():
    model = KneserNey(5).fit([["yes"]])
    assert model.discounts == [FALLBACK] * 5
    assert math.exp(model.logprob(["yes"])) > 0.3
    assert math.isfinite(model.logprob(["no", "never", "yes"]))


def test_empty_sentences_count_as_sentence_ends():
    model = KneserNey(3).fit([[], [], ["a"]])
    assert model.perplexity([[]]) < model.perplexity([["a"]])
    assert math.isnan(model.perplexity([]))
    assert len(model.word_logprobs([[], ["a", "b"]])) == 4


def test_order_one_is_a_unigram_model():
    model = KneserNey(1).fit(TRAIN)
    assert model.logprob(["w3", "w5"]) == pytest.approx(model.logprob(["w5", "w3"]))


@pytest.mark.parametrize("order", [0, -1, 2.0, "3"])
def test_order_must_be_a_whole_number(order):
    with pytest.raises(ValueError, match="order must be a whole number"):
        KneserNey(order)


@pytest.mark.parametrize(
    ("sentences", "message"),
    [
        ([], "no sentences to fit"),
        (["a string"], "list of words"),
        ([["two words"]], "whitespace"),
        ([[""]], "empty"),
        ([[3]], "words must be strings"),
        ([["<s>", "a"]], "marks sentence bounds"),
    ],
)
def test_text_that_cannot_be_counted(sentences, message):
    with pytest.raises(ValueError, match=message):
        KneserNey(2).fit(sentences)


@pytest.mark.parametrize("wrong", [[["a"], "b"], [["a"], ["two words"]], [["a", 3]], []])
def test_refused_text_leaves_the_model_as_it_was(wrong):
    model = KneserNey(3).fit(TRAIN).prune(1)
    before = model.perplexity(TEST)
    with pytest.raises(ValueError, match="word"):
        model.fit(wrong)
    assert model.perplexity(TEST) == before
    assert model.thresholds == [0, 1, 1]


def test_an_unfitted_model_says_so():
    for call in ("perplexity", "word_logprobs", "prune", "distribution"):
        with pytest.raises(RuntimeError, match=r"call fit\(sentences\) first"):
            getattr(KneserNey(2), call)([["a"]])


def test_it_is_fast_enough_for_a_lab():
    """Loosely: the bar is 10 s for 750,000 tokens on one idle core; this is a tenth of it."""
    import time

    rng = np.random.default_rng(0)
    words = [f"w{int(i)}" for i in rng.zipf(1.3, 75_000) % 20_000]
    sentences = [words[i : i + 20] for i in range(0, len(words), 20)]
    start = time.process_time()
    KneserNey(5).fit(sentences).perplexity(sentences[:750])
    assert time.process_time() - start < 4
