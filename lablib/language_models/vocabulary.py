"""Words as numbers: the vocabulary that every model of a benchmark shares.

A sentence is a list of words. Every model refuses the same input: a string in a sentence's place,
whose letters would be taken for words, and words that are no strings.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

UNKNOWN, END = "<UNK>", "</s>"
Sentence = Sequence[str]


def checked(sentence: Sentence) -> Sentence:
    """The sentence itself. Raises ValueError when it is a string, or a word is none."""
    if isinstance(sentence, (str, bytes)) or not hasattr(sentence, "__iter__"):
        raise ValueError(f"a sentence is a list of words, not {sentence!r:.60}")
    for word in sentence:
        if not isinstance(word, str):
            raise ValueError(f"words must be strings, not {word!r}")
    return sentence


def vocabulary_by_count(sentences: Iterable[Sentence], min_count: int = 3) -> list[str]:
    """`<UNK>`, `</s>`, then every word seen at least min_count times, most frequent first."""
    counts = Counter(word for sentence in sentences for word in checked(sentence))
    kept = [word for word, count in counts.most_common() if count >= min_count]
    return [UNKNOWN, END, *(word for word in kept if word not in (UNKNOWN, END))]


def map_unknown(sentences: Iterable[Sentence], vocabulary: Iterable[str]) -> list[list[str]]:
    """The sentences with `<UNK>` for every word outside the vocabulary, and for `</s>`."""
    known = set(vocabulary) - {END}  # only code ends a sentence
    return [[w if w in known else UNKNOWN for w in checked(sentence)] for sentence in sentences]


class Encoder:
    """Words to numbers and back. Number len(vocabulary) is the sentence start, never predicted."""

    def __init__(self, vocabulary: Sequence[str]):
        self.vocabulary = list(vocabulary)
        self.ids = {word: i for i, word in enumerate(vocabulary)}
        self.start = len(self.vocabulary)

    def __call__(self, sentence: Sentence, end: bool = True) -> list[int]:
        """The start, the words, and (unless this is a context) the end."""
        # Only code ends a sentence: in text the marker is an unknown word.
        body = [0 if word == END else self.ids.get(word, 0) for word in checked(sentence)]
        return [self.start, *body, *([self.ids[END]] if end else [])]
