"""Katz and Stupid Backoff against their definitions in dictionaries, and kenlm's reader."""

import math
import random
from collections import Counter, defaultdict

import numpy as np
import pytest

from lablib.language_models.backoff import Katz, StupidBackoff, good_turing
from lablib.language_models.kneser_ney import KneserNey


def corpus(seed: int, size: int) -> list[list[str]]:
    """Sentences of 0 to 11 words from a noisy chain over 97 words."""
    rng, made = random.Random(seed), []
    for _ in range(size):
        word, sentence = 0, []
        for _ in range(int(rng.random() * 12)):
            word = (word * 7 + int(60 * rng.random() ** 3)) % 97
            sentence.append(f"w{word}")
        made.append(sentence)
    return made


TRAIN = corpus(0, 1500)
TEST = [*corpus(1, 60), ["new", "w3", "words"], []]


class Definitions:
    """Counts of all n-grams, and what the two papers make of them, one word at a time."""

    def __init__(self, order, sentences):
        self.order, self.counts = order, Counter()
        for sentence in sentences:
            padded = ("<s>", *sentence, "</s>")
            for end in range(1, len(padded)):
                for start in range(max(0, end - order + 1), end + 1):
                    self.counts[padded[start : end + 1]] += 1
        self.counts["<unk>",] = 1
        self.words = [gram[0] for gram in self.counts if len(gram) == 1]
        self.followers = defaultdict(dict)
        for gram, count in self.counts.items():
            self.followers[gram[:-1]][gram[-1]] = count
        self.n = defaultdict(Counter)
        for gram, count in self.counts.items():
            self.n[len(gram)][count] += 1

    def ratio(self, length, count, highest=5):
        """Katz's d_r."""
        n = self.n[length]
        if count > highest:
            return 1
        common = (highest + 1) * n[highest + 1] / n[1]
        ratio = ((count + 1) * n[count + 1] / (count * n[count]) - common) / (1 - common)
        return ratio if 0 < ratio < 1 else 1

    def katz(self, word, context):
        after = self.followers.get(context, {})
        if not context:
            return after[word] / sum(after.values())
        if not after:
            return self.katz(word, context[1:])
        left = {w: n * self.ratio(len(context) + 1, n) for w, n in after.items()}
        total = sum(after.values())
        total += sum(left.values()) == total
        if word in after:
            return left[word] / total
        room = 1 - sum(self.katz(w, context[1:]) for w in after)
        return (1 - sum(left.values()) / total) / room * self.katz(word, context[1:])

    def score(self, word, context, factor):
        """Brants' S."""
        after = self.followers.get(context, {})
        if word in after:
            return after[word] / sum(after.values())
        return factor * self.score(word, context[1:], factor)

    def stupid(self, word, context, factor=0.4):
        total = sum(self.score(w, context, factor) for w in self.words)
        return self.score(word, context, factor) / total

    def contexts(self, sentence):
        """(word, context) of each word, cut to the order, strange words as <unk>."""
        known = set(self.words)
        words = ["<s>", *(w if w in known else "<unk>" for w in sentence), "</s>"]
        for i in range(1, len(words)):
            yield words[i], tuple(words[max(0, i - self.order + 1) : i])


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize(("kind", "name"), [(Katz, "katz"), (StupidBackoff, "stupid")])
def test_equals_the_definitions(kind, name, order):
    definitions, model = Definitions(order, TRAIN), kind(order).fit(TRAIN)
    for sentence in TEST:
        wanted = [
            math.log(getattr(definitions, name)(word, context))
            for word, context in definitions.contexts(sentence)
        ]
        assert model.word_logprobs([sentence]) == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("threshold", [0, 1, [0, 0, 3]])
@pytest.mark.parametrize("model", [Katz(4), StupidBackoff(4), StupidBackoff(3, 0.05)])
def test_distributions_sum_to_one_and_agree_with_scores(model, threshold):
    model.fit(TRAIN).prune(threshold)
    for context in ([], ["w3"], ["w3", "never-seen", "w21"], TRAIN[5][:4]):
        probs = model.distribution(context)
        assert probs.sum() == pytest.approx(1)
        for word in ("w3", "never-seen"):
            place = model.vocabulary.index(word) if word in model.vocabulary else 0
            scored = model.word_logprobs([[*context, word]])[len(context)]
            assert math.log(probs[place]) == pytest.approx(scored)


@pytest.mark.parametrize("kind", [Katz, StupidBackoff])
def test_kenlm_reads_the_arpa_file_and_scores_it_equally(kind, tmp_path):
    kenlm = pytest.importorskip("kenlm", reason="the kenlm package is not installed")
    model = kind(4).fit(TRAIN)
    model.write_arpa(tmp_path / "model.arpa")
    theirs = kenlm.Model(str(tmp_path / "model.arpa"))
    for sentence in TEST:
        log10 = model.logprob(sentence) / math.log(10)
        assert log10 == pytest.approx(theirs.score(" ".join(sentence)), abs=1e-4)


def test_good_turing_leaves_less_of_small_counts_and_all_of_large_ones():
    counts = np.repeat([1, 2, 3, 4, 5, 6, 9], [600, 200, 100, 60, 40, 28, 10])
    left = good_turing(counts)
    shares = {int(count): kept / count for count, kept in zip(counts, left)}
    assert shares[1] < shares[2] < shares[3] < 1
    assert shares[6] == shares[9] == 1
    # Katz's condition: what is taken from counts up to 5 is the mass of n-grams seen once.
    assert (counts - left).sum() == pytest.approx(600)


def test_a_context_after_which_every_word_was_seen_leaves_nothing():
    text = [["a", "a", "b"], ["a", "b", "a"], ["b", "b"], [], ["<unk>", "<unk>"], ["<unk>", "a"]]
    text += [["a", "<unk>"], ["b", "<unk>", "b"], ["b"]]
    for model in (Katz(3), StupidBackoff(3), Katz(1), StupidBackoff(2)):
        model.fit(text)
        for context in ([], ["a"], ["b"], ["<unk>"], ["a", "b"]):
            assert model.distribution(context).sum() == pytest.approx(1)


def test_kneser_ney_is_ahead_where_there_is_little_text():
    kneser_ney, katz, stupid = (
        model.fit(TRAIN).perplexity(TEST) for model in (KneserNey(4), Katz(4), StupidBackoff(4))
    )
    assert kneser_ney < katz < stupid


def test_a_factor_of_nothing_is_refused():
    with pytest.raises(ValueError, match="factor must be above 0"):
        StupidBackoff(3, 0)
