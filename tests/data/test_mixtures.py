"""Several corpora as one stream: right, cached, and safe beside another process."""

import json
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest

from lablib.data import CORPORA, encode_documents, load, mixture, mixtures, split
from lablib.files import opened

NAMES = ("shakespeare", "bible")
OPTIONS = {"vocab_size": 300, "held_out": 0.25}


def write(home, name, words):
    texts = [[f"{name}{i}", f"{words} {i} " * 40] for i in range(8)]
    path = home / "corpora" / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(text)}\n" for text in texts), "utf-8")
    path.with_suffix(".size").write_text(str(path.stat().st_size))


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("LABLIB_HOME", str(tmp_path))
    write(tmp_path, "shakespeare", "to be or not to be")
    write(tmp_path, "bible", "in the beginning")
    yield tmp_path
    mixtures._mixture.cache_clear()


def files(home):
    return sorted(path.name for path in (home / "mixtures").iterdir())


def test_each_domain_is_its_documents_encoded(home):
    found = mixture(NAMES, **OPTIONS)
    for name in NAMES:
        parts = split(load(name), (0.75, 0.25))
        for documents, ids in zip(parts, (found.train_of[name], found.held_out_of[name])):
            assert np.array_equal(ids, encode_documents(documents, found.tokenizer))
    assert np.array_equal(found.train, np.concatenate([found.train_of[name] for name in NAMES]))
    assert len(found.held_out) == sum(map(len, found.held_out_of.values()))
    assert found.tokenizer.vocab_size <= 300 and found.train.dtype == np.int32


def test_it_is_read_from_the_cache_and_made_anew_when_a_corpus_changes(home, monkeypatch):
    first = mixture(NAMES, **OPTIONS)
    mixtures._mixture.cache_clear()
    opened.clear()
    with monkeypatch.context() as patched:
        patched.setattr(mixtures, "_write", None)  # it need not write
        again = mixture(list(NAMES), **OPTIONS)
    assert np.array_equal(again.train, first.train) and len(files(home)) == 1
    assert set(opened) == {f"corpus {name}" for name in NAMES}
    write(home, "bible", "thou shalt not")
    mixtures._mixture.cache_clear()
    assert not np.array_equal(mixture(NAMES, **OPTIONS).train, first.train)
    assert len(files(home)) == 2


def test_corpora_are_recorded_as_opened_each_time(home):
    mixture(NAMES, **OPTIONS)
    opened.clear()
    mixture(NAMES, **OPTIONS)
    assert set(opened) == {f"corpus {name}" for name in NAMES}


def _sums(_):
    found = mixture(NAMES, **OPTIONS)
    return int(found.train.sum()), int(found.held_out.sum())


def test_two_processes_at_once_agree(home):
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        first, second = pool.map(_sums, range(2))
    assert first == second == _sums(0) and len(files(home)) == 1


def test_windows_are_spread_over_all_domains(home):
    found = mixture(NAMES, **OPTIONS)
    whole = [tuple(row.tolist()) for batch in found.windows(4, 8) for row in batch]
    assert len(whole) == (len(found.held_out) - 1) // 8
    some = [tuple(row.tolist()) for batch in found.windows(4, 8, limit=6) for row in batch]
    assert len(some) == 6 and (some[0], some[-1]) == (whole[0], whole[-1])
    assert some == sorted(some, key=whole.index) and len(some[0]) == 9
    with pytest.raises(ValueError, match="0 windows"):
        found.windows(limit=0)


@pytest.mark.skipif(
    not all(path.is_file() for path in (CORPORA[name].path for name in mixtures.DOMAINS)),
    reason="run python -m lablib setup",
)
def test_the_second_call_is_fast():
    first = mixture()
    mixtures._mixture.cache_clear()
    start = time.process_time()
    again = mixture()
    assert time.process_time() - start < 0.3
    assert np.array_equal(first.train, again.train) and len(first.train) > 4_000_000
