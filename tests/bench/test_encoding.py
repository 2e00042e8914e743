import statistics

import pytest

from lablib.bench import encoding
from lablib.bench.encoding import bench_encoding, mixed_texts


def test_encoding_is_timed_beside_sentence_transformers(capsys):
    pytest.importorskip("sentence_transformers")
    speeds = bench_encoding(8, repeats=1)
    assert list(speeds) == ["sentence-transformers", "Encoder"]
    assert all(speed > 0 for speed in speeds.values())
    assert capsys.readouterr().out.count("texts a second") == 2


def test_what_is_stored_is_the_ratio_of_each_round(monkeypatch, tmp_path):
    times = {encoding.PEER: [2.0, 4.0], "Encoder": [1.0, 3.0]}
    monkeypatch.setattr(encoding, "MEASURED", tmp_path / "encoding.json")
    monkeypatch.setattr(encoding, "timed", lambda n, repeats: times)
    encoding.store(8, 2)
    assert encoding.stored() == {"texts": 8, "seconds to the peer's, by round": [0.5, 0.75]}
    encoding.MEASURED.unlink()
    del times[encoding.PEER]
    encoding.store(8, 2)
    assert not encoding.MEASURED.exists()


def test_lablib_is_no_slower_than_its_peer_was():
    kept = encoding.stored()
    rounds = kept["seconds to the peer's, by round"]
    assert kept["texts"] >= 1000 and len(rounds) >= 3
    assert statistics.median(rounds) <= 1.0


def test_texts_are_mixed():
    lengths = sorted(len(text.split()) for text in mixed_texts(200))
    assert lengths[0] < 10 and lengths[-1] > 110 and 40 < lengths[100] < 80
    assert mixed_texts(5) == mixed_texts(5) != mixed_texts(5, seed=1)
