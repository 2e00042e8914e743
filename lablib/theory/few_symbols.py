"""Texts in a few symbols, small enough that all of a model's states can be listed."""

import numpy as np

# Ways to write English in a few symbols. The first is Markov's own: in 1913 he counted vowels and
# consonants in 20,000 letters of Pushkin, and so drew the first Markov chain of a text.
ALPHABETS: dict[int, dict[str, str]] = {
    2: {"V": "aeiouy", "C": "bcdfghjklmnpqrstvwxz"},
    3: {"V": "aeiouy", "C": "bcdfghjklmnpqrstvwxz", "_": " "},
    4: {"V": "aeiouy", "C": "bcdfghjklmnpqrstvwxz", "_": " ", ".": ".,;:!?"},
    8: {
        "e": "e",
        "V": "aiouy",
        "N": "lmnr",
        "T": "bcdgkpqt",
        "S": "fhjsvwxz",
        "_": " ",
        ",": ",;:",
        ".": ".!?",
    },
}


def symbolize(text: str, size: int) -> np.ndarray:
    """Text written in the `size` symbols of ALPHABETS: (n,) int64; other characters are left out.

    White space counts as one space. Raises ValueError when there is no alphabet of that size.
    """
    if size not in ALPHABETS:
        raise ValueError(
            f"no alphabet has {size} symbols; there are {', '.join(map(str, ALPHABETS))}"
        )
    place = {c: i for i, group in enumerate(ALPHABETS[size].values()) for c in group}
    clean = " ".join(text.lower().split())
    return np.array([place[c] for c in clean if c in place], np.int64)


def spell(tokens, size: int) -> str:
    """The tokens in the letters of the alphabet of `size` symbols."""
    letters = list(ALPHABETS[size])
    return "".join(letters[token] for token in tokens)


def parity_text(length: int, start: tuple[int, int, int] = (0, 0, 1)) -> np.ndarray:
    """Bits of which each is the parity of the three before it: (length,) int64.

    Source: the toy example of Large Language Models as Markov Chains (Zekri et al., 2024), section
    3.2: 0 when the three before it hold an even number of ones, else 1.
    """
    bits = list(start)
    while len(bits) < length:
        bits.append(sum(bits[-3:]) % 2)
    return np.array(bits[:length], np.int64)
