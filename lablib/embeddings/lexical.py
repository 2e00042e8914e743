"""BM25 and tf-idf: how far words alone go. The baselines beside every encoder.

BM25 (Robertson and Walker, 1994), with the logarithm that stays positive for frequent words:

    score(q, d) = sum over words w of q of idf(w) tf / (tf + k1 (1 - b + b |d| / mean |d|))
    idf(w) = log(1 + (N - n_w + 1/2) / (n_w + 1/2))

tf: how often w is in d; n_w of N documents have it; |d|: d's words. A word counts as often as q has
it. This is Lucene's and package bm25s's; times k1 + 1 it is the classic form: same ranking.
tf-idf is the cosine of vectors of tf (log((1 + N) / (1 + n_w)) + 1), as scikit-learn has it.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from scipy import sparse

Tokenize = Callable[[str], list[str]]
# Inside a run of letters and digits: before a capital that follows a small letter or a digit, and
# before the last capital of several when a small letter follows (HTMLPage).
_HUMPS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


def words(text: str, identifiers: bool = False) -> list[str]:
    """Runs of letters, digits and underscores, in small letters: "It's x_1!" -> it s x_1.

    A letter's combining marks belong to its word. identifiers: split at underscores and humps, so
    that parse_HTMLPage2 -> parse html page2. Chinese and Thai, without spaces, come as long runs.
    """
    marks = {c for c in text if not c.isascii() and unicodedata.category(c)[0] == "M"}
    runs = re.findall(rf"[\w{''.join(sorted(marks))}]+", text)
    if identifiers:
        runs = [part for run in runs for part in _HUMPS.sub("_", run).split("_") if part]
    return [run.lower() for run in runs]


def code_words(text: str) -> list[str]:
    """`words` with identifiers split, for program text."""
    return words(text, identifiers=True)


def counts(
    texts: Sequence[str], tokenize: Tokenize, vocabulary: dict[str, int] | None = None
) -> tuple[sparse.csr_matrix, dict[str, int]]:
    """How often each word is in each text (n, words), and the words' columns.

    Without a vocabulary it grows; with one, other words are left out.
    """
    if isinstance(texts, str):
        raise ValueError("one text alone was given: texts come as a list")
    grows, vocabulary = vocabulary is None, {} if vocabulary is None else vocabulary
    columns, values, ends = [], [], [0]
    for text in texts:
        for word, count in Counter(tokenize(text)).items():
            if grows:
                vocabulary.setdefault(word, len(vocabulary))
            if word in vocabulary:
                columns.append(vocabulary[word])
                values.append(float(count))
        ends.append(len(columns))
    shape = (len(texts), len(vocabulary))
    return sparse.csr_matrix((values, columns, ends), shape=shape, dtype=float), vocabulary


def bm25(
    documents: Sequence[str], k1: float = 1.5, b: float = 0.75, tokenize: Tokenize = words
) -> Callable[[Sequence[str]], np.ndarray]:
    """An index of the documents: call it with queries for scores (queries, documents).

    k1: how late a repeated word stops counting. b: how much long documents are held back, 0 to 1.
    Raises ValueError when no document has a word, for k1 below 0 or b outside 0 to 1.
    """
    if k1 < 0 or not 0 <= b <= 1:
        raise ValueError(f"k1 is {k1} and b is {b}: k1 must be 0 or more, b from 0 to 1")
    tf, vocabulary = _indexed(documents, tokenize)  # (documents, words)
    n_with = np.bincount(tf.indices, minlength=tf.shape[1])
    idf = np.log1p((len(documents) - n_with + 0.5) / (n_with + 0.5))
    length = np.asarray(tf.sum(1))[:, 0]
    slack = k1 * (1 - b + b * length / length.mean())  # (documents,)
    slack = np.repeat(slack, np.diff(tf.indptr))  # one for each stored count
    weights = sparse.csr_matrix(
        (idf[tf.indices] * tf.data / (tf.data + slack), tf.indices, tf.indptr), shape=tf.shape
    )
    inverted = weights.T.tocsr()  # (words, documents)

    def score(queries: Sequence[str]) -> np.ndarray:
        return (counts(queries, tokenize, vocabulary)[0] @ inverted).toarray()

    return score


def tfidf_vectors(
    documents: Sequence[str], tokenize: Tokenize = words
) -> Callable[[Sequence[str]], sparse.csr_matrix]:
    """Weighs words by these documents: call it with texts for rows (n, words) of length 1.

    Words that no document has are left out; a text without any other is a row of zeros.
    Raises ValueError when no document has a word.
    """
    tf, vocabulary = _indexed(documents, tokenize)
    n_with = np.bincount(tf.indices, minlength=tf.shape[1])
    idf = np.log((1 + len(documents)) / (1 + n_with)) + 1

    def vectors(texts: Sequence[str]) -> sparse.csr_matrix:
        rows = counts(texts, tokenize, vocabulary)[0].multiply(idf).tocsr()  # (n, words)
        length = np.sqrt(np.asarray(rows.multiply(rows).sum(1))[:, 0])
        return sparse.diags_array(1 / np.where(length == 0, 1, length)) @ rows

    return vectors


def tfidf(
    documents: Sequence[str], tokenize: Tokenize = words
) -> Callable[[Sequence[str]], np.ndarray]:
    """An index of the documents: call it with queries for cosines (queries, documents)."""
    vectors = tfidf_vectors(documents, tokenize)
    inverted = vectors(documents).T.tocsr()  # (words, documents)
    return lambda queries: (vectors(queries) @ inverted).toarray()


def _indexed(
    documents: Iterable[str], tokenize: Tokenize
) -> tuple[sparse.csr_matrix, dict[str, int]]:
    """`counts` of documents, of which one at least has a word."""
    tf, vocabulary = counts(documents, tokenize)
    if not vocabulary:
        raise ValueError(f"none of the {len(documents)} documents has a word")
    return tf, vocabulary
