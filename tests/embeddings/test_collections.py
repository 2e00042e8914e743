import re
import sys
from collections import Counter, defaultdict

import numpy as np
import pytest

from lablib.data import CORPORA, DataError, load
from lablib.embeddings import collections
from lablib.embeddings.collections import (
    SPLITS,
    folders,
    language_names,
    languages,
    lee,
    names,
    pairs,
    parallel,
    polarity,
    simlex,
    triples,
    widespread,
    wordsim,
)
from lablib.files import opened

needed = ("bible-web", "bible-ylt", "similarities", "docstrings", "django-docs", "django", "babel")
pytestmark = pytest.mark.skipif(
    not all(CORPORA[name].is_ready for name in needed), reason="run python -m lablib setup"
)
# Pairs of which no text stands twice. Those from Python's library and from Babel's data change
# with their versions: 4,866 docstrings are Python 3.11's.
SIZES = {
    "verses": 30488,
    "headings": 4213,
    "docstrings": 4866,
    "messages-fr": 320,
    "messages-hi": 231,
    "names-fr": 1240,
    "names-zh": 1100,
}
# Words that both translations have, lower case.
VERSES = {
    "Genesis 22:13": "abraham ram thicket horns",
    "Leviticus 19:18": "vengeance love thy|your",
    "Numbers 22:28": "mouth balaam three times",
    "Joshua 6:20": "people trumpets shout wall",
    "Judges 16:19": "sleep knees seven locks",
    "1 Samuel 17:50": "david philistine sling stone",
    "1 Kings 3:25": "king child half",
    "2 Chronicles 9:1": "queen sheba solomon spices",
    "Esther 7:10": "haman mordecai",
    "Psalms 23:1": "shepherd lack",
    "Psalms 119:105": "lamp light path",
    "Proverbs 16:18": "pride destruction haughty",
    "Isaiah 40:31": "eagles run faint",
    "Daniel 6:16": "daniel den lions",
    "Jonah 1:17": "great fish jonah three nights",
    "Luke 2:7": "brought forth wrapped laid",
    "John 3:16": "god love|loved son life",
    "John 11:35": "jesus wept",
    "1 Corinthians 13:13": "faith hope love greatest",
    "3 John 1:1": "elder gaius beloved truth",
}


def words(text):
    return set(re.findall(r"[a-z]+", text.lower()))


def verses():
    """Place -> (WEB, YLT), of the whole collection."""
    items = collections._items("verses")
    return {f"{item.source}:{item.place.split(':')[1]}": (item.a, item.b) for item in items}


def test_twenty_verses_are_beside_themselves():
    joined = verses()
    assert len(VERSES) == 20
    for place, expected in VERSES.items():
        for text in joined[place]:
            for word in expected.split():
                assert words(text) & set(word.split("|")), f"{place}: {word} in {text}"


def test_no_chapter_has_drifted():
    chapters = defaultdict(dict)
    for place, (a, b) in verses().items():
        chapter, _, verse = place.rpartition(":")
        chapters[chapter][int(verse)] = words(a), words(b)
    for chapter, rows in chapters.items():
        alike = [
            sum(len(a & rows[v + shift][1]) for v, (a, _) in rows.items() if v + shift in rows)
            for shift in (0, 1, -1)
        ]
        assert len(rows) < 3 or alike[0] == max(alike), chapter


def test_both_bibles_have_the_verses_of_the_king_james():
    for name in ("bible-web", "bible-ylt"):
        books = dict(load(name))
        assert list(books) == [document.name for document in load("bible")]
        places = [line.split("\t")[0] for line in books["Jude"].splitlines()]
        assert places == [f"1:{verse}" for verse in range(1, 26)]
        assert sum(text.count("\n") for text in books.values()) == 31102
    assert len(list(collections._verses())) == 31099


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_about_those_seen(name):
    sizes = np.array([len(pairs(name, split)) for split in SPLITS])
    assert sizes.sum() == pytest.approx(SIZES[name], rel=0.1), sys.version
    shares = sizes / sizes.sum()
    assert shares == pytest.approx([0.6, 0.15, 0.25], abs=0.08)


@pytest.mark.parametrize("name", SIZES)
def test_no_text_and_no_source_is_in_two_splits(name):
    texts = Counter()
    for split in SPLITS:
        found = pairs(name, split)
        assert found and all(a.strip() and b.strip() for a, b in found)
        texts.update(t for pair in found for t in {" ".join(p.lower().split()) for p in pair})
    assert max(texts.values()) == 1
    sources = [{item.source for item in collections._of_split(name, split)} for split in SPLITS]
    assert sum(map(len, sources)) == len(set.union(*sources))


@pytest.mark.parametrize("name", ["verses", "headings", "docstrings"])
def test_the_first_are_a_fair_sample(name):
    found, first = (Counter(), Counter())
    items = collections._of_split(name, "train")
    assert [(item.a, item.b) for item in items] == pairs(name, "train")
    found.update(item.source for item in items)
    first.update(item.source for item in items[:200])
    assert len(first) > 60 and max(first.values()) < 40, "not one source after another"
    lengths = np.array([len(item.b) for item in items])
    error = lengths.std() / 200**0.5
    assert abs(lengths[:200].mean() - lengths.mean()) < 3 * error


def test_a_message_is_in_the_same_split_in_every_language():
    of = {split: {a for a, _ in pairs("messages-fr", split)} for split in SPLITS}
    for code in ("hi", "is", "zh_Hans"):
        for split, english in of.items():
            others = set().union(*(of[other] for other in SPLITS if other != split))
            found = {a for a, _ in pairs(f"messages-{code}", split)}
            assert found & english and not found & others
    rows = parallel("messages", ["fr", "hi", "is"], "test")
    assert {row[0] for row in rows} <= of["test"] and {len(row) for row in rows} == {4}
    assert [row[0] for row in parallel("messages", ["fr"], "test")] == [
        a for a, _ in pairs("messages-fr", "test")
    ]


def test_translations_are_those_of_the_language():
    everything = {a: b for split in SPLITS for a, b in pairs("messages-de", split)}
    assert everything["Enter a whole number."] == "Bitte eine ganze Zahl eingeben."
    assert everything["Monday"] == "Montag"
    rows = [row for split in SPLITS for row in names(["de", "ja"], split)]
    assert ("place", ("Germany", "Deutschland", "ドイツ")) in rows
    assert ("language", ("German", "Deutsch", "ドイツ語")) in rows
    assert {kind for kind, _ in rows} == {"language", "place", "currency"}
    assert len(languages("messages", 300)) == 57 and len(languages("messages")) == 97
    assert "is" in languages("names", 1000) and len(languages("names")) > 200


def test_the_most_widespread_messages_are_those_that_most_languages_have():
    tables = widespread("messages", 5, lambda text: len(text.split()) > 3)
    german = {a: b for split in SPLITS for a, b in pairs("messages-de", split)}
    chosen = {text for table in tables.values() for text in table}
    spread = {text: sum(text in table for table in tables.values()) for text in chosen}
    assert len(chosen) == 5 and min(spread.values()) > 85
    assert all(tables["de"][text] == german[text] for text in tables["de"])
    assert all(code.partition("_")[0] != "en" and table for code, table in tables.items())
    rest = widespread("messages", 1, lambda text: len(text.split()) > 3 and text not in chosen)
    assert sum(map(len, rest.values())) <= min(spread.values())


def test_languages_have_their_english_names():
    told = language_names(["de", "pt", "pt_BR", "sr", "sr_Latn", "zh_Hans", "no-such"])
    assert told["de"] == "German" and told["zh_Hans"] == "Chinese"  # the only one of its kind
    assert told["pt"] == "Portuguese" and told["pt_BR"] == "Portuguese (Brazil)"
    assert told["sr_Latn"] == "Serbian (Latin)" and told["no-such"] == "no-such"
    every = language_names(languages("messages"))
    assert len({*every.values()}) == len(every) == 97


def test_headings_stand_over_their_sections_without_marks():
    everything = {a: b for split in SPLITS for a, b in pairs("headings", split)}
    assert everything["Aggregating annotations"].startswith("You can also generate an aggregate")
    text = " ".join(everything) + " ".join(everything.values())
    assert text.count(".. versionadded") < 10, "a page tells how to write it"
    assert text.count("`") < 100
    labels = folders("test")
    assert len(labels) == len(pairs("headings", "test"))
    assert {"ref", "topics", "releases", "howto"} <= set(labels)


def test_bodies_come_without_their_docstrings():
    everything = {a: b for split in SPLITS for a, b in pairs("docstrings", split)}
    body = everything["Remove any common leading whitespace from every line in `text`."]
    assert body.startswith("margin = None\n"), "from the first statement on"
    inside = [said for said, body in everything.items() if said in " ".join(body.split())]
    assert len(inside) < 0.01 * len(everything)
    assert all(len(said.split()) >= 5 for said in everything)


@pytest.mark.parametrize("name", ["verses", "headings", "docstrings"])
def test_a_hard_negative_is_the_neighbor(name):
    found = triples(name, "test")
    every = pairs(name, "test")
    assert 0.8 * len(every) < len(found) <= len(every)
    assert [row[:2] for row in found] == [pair for pair in every if pair in {r[:2] for r in found}]
    source = {item.b: item.source for item in collections._of_split(name, "test")}
    for _, b, negative in found:
        assert negative != b and source[negative] == source[b]


def test_the_neighbor_of_a_verse_is_the_next_one():
    beside = {b: negative for split in SPLITS for _, b, negative in triples("verses", split)}
    joined = verses()
    assert beside[joined["John 11:35"][1]] == joined["John 11:36"][1]
    assert beside[joined["Psalms 150:6"][1]] == joined["Psalms 150:5"][1], "it is the last"


def test_lee_is_rated_in_pairs():
    texts, couples, ratings = lee()
    assert len(texts) == 50 and couples.shape == (1225, 2) and ratings.shape == (1225,)
    assert (couples[:, 0] < couples[:, 1]).all() and 0 < ratings.min() < ratings.max() <= 1
    assert 60 < np.mean([len(text.split()) for text in texts]) < 100
    assert ratings[(couples == [0, 49]).all(1)] == [0.5], "the last of the first row"
    assert "strife-torn Democrats" in texts[0] and "Greens" in texts[49], (
        "both on Australian politics"
    )


def test_words_and_sentences_are_rated():
    couples, ratings = wordsim()
    assert len(couples) == 353 and ratings.shape == (353,) and ratings.max() == 10
    assert ratings[couples.index(("love", "sex"))] == 6.77
    couples, ratings = simlex()
    assert len(couples) == 999 and ratings[couples.index(("old", "new"))] == 1.58
    texts, labels = polarity()
    assert len(texts) == len(set(texts)) == 200 and labels.dtype == np.int64
    assert labels.sum() == 100 and labels[texts.index("simplistic , silly and tedious .")] == 0


def test_other_names_are_refused_in_a_sentence():
    with pytest.raises(DataError, match="no collection is called 'verse'; there are verses, head"):
        pairs("verse", "test")
    with pytest.raises(DataError, match="no collection is called 'messages'"):
        pairs("messages", "test")
    with pytest.raises(DataError, match="no messages are in 'xx'; there are "):
        pairs("messages-xx", "test")
    with pytest.raises(ValueError, match="'dev' is no split: train, validation, test"):
        pairs("verses", "dev")
    with pytest.raises(ValueError, match="messages-fr has no neighbors"):
        triples("messages-fr", "test")


def test_what_was_opened_is_recorded_each_time():
    for _ in range(2):
        opened.pop("corpus bible-ylt", None)
        pairs("verses", "test")
        assert opened["corpus bible-ylt"] == CORPORA["bible-ylt"].path
