import numpy as np
import pytest

from lablib.data import Batches, byte_text
from lablib.data.byte_texts import ByteText, mixed


def test_every_prefix_is_the_same_mixture():
    text = byte_text()
    assert 14.4e6 < len(text.train) < 14.7e6 and 0.6e6 < len(text.held_out) < 0.8e6
    shares = [
        np.bincount(part, minlength=256) / len(part)
        for part in (text.train, text.train[: 2**18], text.held_out)
    ]
    assert np.abs(shares[0] - shares[1]).sum() < 0.1
    assert byte_text().train is text.train


def test_pieces_keep_all_bytes_in_one_order():
    texts = ["abcdefgh" * 50, "äöü" * 30]
    made = mixed(texts, 64)
    assert sorted(made) == sorted("".join(texts).encode())
    assert (made == mixed(texts, 64)).all() and made.tobytes() != "".join(texts).encode()


def test_no_document_is_on_both_sides():
    text = byte_text(("bible",), piece=200)
    rows = {bytes(text.train[i : i + 60]) for i in range(0, len(text.train) - 60, 7)}
    assert bytes(text.held_out[1000:1060]) not in rows


def test_batches_of_the_first_bytes_are_exactly_one_epoch():
    text = ByteText(np.arange(5000) % 251, np.arange(600) % 251)
    batches = Batches(text.first(1024, 64), 4, 64)
    assert batches.batches_per_epoch * 4 * 64 == 1024
    assert [len(rows) for rows in text.windows(64, 5, 4)] == [4, 1]
    with pytest.raises(ValueError, match="5065 bytes are needed; the text has 5000"):
        text.first(5000, 64)
    with pytest.raises(ValueError, match="piece is 0"):
        byte_text(piece=0)
