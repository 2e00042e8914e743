import pytest

from lablib.bench.encoding import bench_encoding, mixed_texts


def test_encoding_is_timed_beside_sentence_transformers(capsys):
    pytest.importorskip("sentence_transformers")
    speeds = bench_encoding(8, repeats=1)
    assert list(speeds) == ["sentence-transformers", "Encoder"]
    assert all(speed > 0 for speed in speeds.values())
    assert capsys.readouterr().out.count("texts a second") == 2


def test_texts_are_mixed():
    lengths = sorted(len(text.split()) for text in mixed_texts(200))
    assert lengths[0] < 10 and lengths[-1] > 110 and 40 < lengths[100] < 80
    assert mixed_texts(5) == mixed_texts(5) != mixed_texts(5, seed=1)
