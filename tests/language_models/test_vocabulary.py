"""Words as numbers, and the input that every model refuses alike."""

import pytest

from lablib.language_models import one_billion_word as lm
from lablib.language_models.backoff import Katz, StupidBackoff
from lablib.language_models.kneser_ney import KneserNey
from lablib.language_models.lstm import LSTM, SentenceBatches
from lablib.language_models.maxent import MaxEnt
from lablib.language_models.vocabulary import END, UNKNOWN, Encoder, vocabulary_by_count

TEXT = [["a", "b", "a"], ["b", "a"], ["a"], ["b", "b"]]
VOCABULARY = vocabulary_by_count(TEXT, 1)
MODELS = [
    KneserNey(2).fit(TEXT),
    Katz(2).fit(TEXT),
    StupidBackoff(2).fit(TEXT),
    LSTM(VOCABULARY, 4, 4),
    MaxEnt(VOCABULARY, bits=6).fit(TEXT, epochs=1),
]
WRONG = [
    ("a b a", "a sentence is a list of words, not 'a b a'"),
    (["a", 3], "words must be strings, not 3"),
    (7, "a sentence is a list of words, not 7"),
]
each_model = pytest.mark.parametrize("model", MODELS, ids=lambda model: type(model).__name__)
each_wrong = pytest.mark.parametrize(("sentence", "message"), WRONG)


@each_model
@each_wrong
def test_what_is_no_list_of_words_is_refused_by_every_model(model, sentence, message):
    calls = [lambda: model.word_logprobs([["a"], sentence]), lambda: model.distribution(sentence)]
    if not isinstance(model, LSTM):
        calls.append(lambda: model.fit([["a"], sentence]))
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()


@each_wrong
def test_and_by_all_that_prepares_text(sentence, message):
    for prepare in (
        lambda text: SentenceBatches(text, Encoder(VOCABULARY)),
        lambda text: lm.benchmark(text),
        lambda text: lm.map_unknown(text, VOCABULARY),
        vocabulary_by_count,
    ):
        with pytest.raises(ValueError, match=message):
            prepare([["a"], sentence])


@each_model
def test_one_string_for_all_sentences_is_refused(model):
    with pytest.raises(ValueError, match="a sentence is a list of words, not 'a'"):
        model.word_logprobs("a b a")


def test_words_and_numbers():
    encode = Encoder(VOCABULARY)
    assert VOCABULARY[:2] == [UNKNOWN, END]
    assert encode(["a", "new"]) == [encode.start, encode.ids["a"], 0, 1]
    assert encode(["a"], end=False) == [encode.start, encode.ids["a"]]


@pytest.mark.parametrize("marker", ["<s>", "</s>"])
@pytest.mark.parametrize("model", MODELS, ids=lambda model: type(model).__name__)
def test_a_marker_in_scored_text_is_an_unknown_word(model, marker):
    """Only code opens and closes sentences, so text cannot make itself more probable."""
    told, unknown = ["a", marker, "b"], ["a", "no such word", "b"]
    assert model.word_logprobs([told]) == pytest.approx(model.word_logprobs([unknown]))
