import json
import math
import runpy
import time
from pathlib import Path

import numpy as np
import pytest

from lablib.embeddings import lexical

HERE = Path(__file__).parent
DRAW = runpy.run_path(str(HERE / "record_evaluate.py"))
RECORD = json.loads((HERE / "evaluate.json").read_text())


def test_words_are_runs_in_small_letters():
    assert lexical.words("It's x_1, naïve ÉCOLE!\n30%") == [
        "it",
        "s",
        "x_1",
        "naïve",
        "école",
        "30",
    ]
    assert lexical.words("हिन्दी में cafe\u0301") == ["हिन्दी", "में", "cafe\u0301"]
    assert lexical.words("parse_HTMLPage2()") == ["parse_htmlpage2"]
    assert lexical.words(" ... ") == []


def test_identifiers_are_split_only_if_asked():
    assert lexical.code_words("parse_HTMLPage2(self.urlOpen, __name__)") == [
        *("parse", "html", "page2", "self", "url", "open", "name")
    ]
    assert lexical.words("getURL", identifiers=True) == ["get", "url"]
    assert lexical.code_words("plain words, Only") == lexical.words("plain words, Only")


@pytest.mark.parametrize("seed", DRAW["SEEDS"])
@pytest.mark.parametrize(("place", "constants"), enumerate(DRAW["CONSTANTS"]))
def test_bm25_equals_bm25s(seed, place, constants):
    documents, queries = DRAW["texts"](seed)
    ours = lexical.bm25(documents, *constants, tokenize=str.split)(queries)
    np.testing.assert_allclose(ours, RECORD["bm25"][seed][place], atol=1e-6, rtol=0)
    assert (ours[-1] == 0).all() and (ours[:, 0] == 0).all() and ours[0].max() > 1


def test_bm25_is_bm25s_as_it_comes():
    assert DRAW["CONSTANTS"][0] == (1.5, 0.75)  # its defaults, and ours
    documents, queries = DRAW["texts"](0)
    np.testing.assert_array_equal(
        lexical.bm25(documents)(queries), lexical.bm25(documents, 1.5, 0.75)(queries)
    )


def plain_bm25(documents, query, k1, b):
    """Scores of one query, word by word."""
    split = [text.lower().split() for text in documents]
    mean = sum(map(len, split)) / len(split)
    scores = []
    for words in split:
        score = 0
        for word in query.split():
            n_with = sum(word in other for other in split)
            idf = math.log(1 + (len(split) - n_with + 0.5) / (n_with + 0.5))
            slack = k1 * (1 - b + b * len(words) / mean)
            tf = words.count(word)
            score += idf * tf / (tf + slack) if tf else 0
        scores.append(score)
    return scores


@pytest.mark.parametrize(("k1", "b"), [(1.2, 0.75), (0.4, 0), (2, 1)])
def test_bm25_equals_a_plain_loop(k1, b):
    documents, queries = DRAW["texts"](7)
    ours = lexical.bm25(documents, k1, b)(queries)
    theirs = [plain_bm25(documents, query, k1, b) for query in queries]
    np.testing.assert_allclose(ours, theirs, atol=1e-12)


@pytest.mark.parametrize("seed", DRAW["SEEDS"])
def test_tfidf_equals_scikit_learn(seed):
    text = pytest.importorskip("sklearn.feature_extraction.text")
    documents, queries = DRAW["texts"](seed)
    vectorizer = text.TfidfVectorizer(analyzer=str.split)
    columns = vectorizer.fit_transform(documents)
    theirs = (vectorizer.transform(queries) @ columns.T).toarray()
    ours = lexical.tfidf(documents, tokenize=str.split)(queries)
    np.testing.assert_allclose(ours, theirs, atol=1e-12)


def test_tfidf_by_hand():
    """Of two documents one has "b": idf log(3 / 2) + 1; both have "a": 1."""
    rare = math.log(3 / 2) + 1
    ours = lexical.tfidf(["a b", "a"])(["a", "b", "A c", "c", ""])
    first = np.array([1, rare]) / math.hypot(1, rare)
    np.testing.assert_allclose(ours, [[first[0], 1], [first[1], 0], [first[0], 1], [0, 0], [0, 0]])


def test_vectors_have_length_one_and_compare_as_scores_do():
    documents, queries = DRAW["texts"](1)
    vectors = lexical.tfidf_vectors(documents)
    rows = vectors(documents).toarray()
    length = np.linalg.norm(rows, axis=1)
    np.testing.assert_allclose(length, [0.0] + [1.0] * 39)  # the first is empty
    np.testing.assert_allclose(vectors(queries) @ rows.T, lexical.tfidf(documents)(queries))


def test_the_tokens_may_be_ones_own():
    documents = ["def parseHTML(page)", "def load(page)"]
    query = ["parse a page"]
    assert lexical.bm25(documents)(query)[0].tolist() == pytest.approx(
        [lexical.bm25(documents)(["page"])[0, 0], lexical.bm25(documents)(["page"])[0, 1]]
    )
    scores = lexical.bm25(documents, tokenize=lexical.code_words)(query)[0]
    assert scores[0] > scores[1] + 0.1


def test_no_document_or_no_query_is_no_problem_of_shape():
    assert lexical.bm25(["a", "b"])([]).shape == lexical.tfidf(["a", "b"])([]).shape == (0, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lexical.bm25([]), "none of the 0 documents has a word"),
        (lambda: lexical.tfidf(["", "..."]), "none of the 2 documents has a word"),
        (lambda: lexical.bm25("a text"), "texts come as a list"),
        (lambda: lexical.bm25(["a text"])("a"), "texts come as a list"),
        (lambda: lexical.bm25(["a"], k1=-1), "k1 is -1"),
        (lambda: lexical.bm25(["a"], b=1.5), "b is 1.5"),
    ],
)
def test_bad_inputs_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_thousand_queries_of_five_thousand_documents_take_under_two_seconds():
    rng = np.random.default_rng(0)
    drawn = rng.zipf(1.3, size=(6000, 30)) % 20000
    texts = [" ".join(f"w{n}" for n in row) for row in drawn]
    start = time.process_time()
    scores = lexical.bm25(texts[:5000])(texts[5000:])
    assert scores.shape == (1000, 5000) and time.process_time() - start < 2
