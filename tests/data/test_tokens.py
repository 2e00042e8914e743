import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from lablib.data import (
    END_OF_TEXT,
    Batches,
    BPETokenizer,
    ByteTokenizer,
    Document,
    LetterTokenizer,
    MarkovSource,
    TokenData,
    encode_documents,
    load,
    sentences,
    sequential,
    train_bpe,
    words,
)


@pytest.fixture(scope="module")
def bpe():
    return train_bpe((document.text for document in load("bible")[:5]), 600)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_bytes_round_trip(text):
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([tokenizer.bos, *tokenizer.encode(text), tokenizer.eos]) == text


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_letters_keep_a_to_z_and_one_space_for_all_else(text):
    tokenizer = LetterTokenizer()
    ids = tokenizer.encode(text)
    assert all(0 <= i < 27 for i in ids) and (0, 0) not in pairwise(ids)
    kept = [c if "a" <= c <= "z" else " " for c in text.lower()]
    assert tokenizer.decode(ids).split() == "".join(kept).split()


def test_letters_by_hand():
    assert LetterTokenizer().encode("Az, B!") == [1, 26, 0, 2, 0]


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_bpe_round_trip(bpe, text):
    assert bpe.decode(bpe.encode(text)) == text


def test_a_marker_in_a_text_is_text(bpe, tmp_path):
    text = f"one{END_OF_TEXT} two"
    bpe.save(tmp_path / "tokenizer.json")
    bpe.fast.save_pretrained(tmp_path / "fast")
    fast = PreTrainedTokenizerFast.from_pretrained(tmp_path / "fast")
    ids = bpe.encode(text)
    assert bpe.eos not in ids and bpe.decode(ids) == text
    assert bpe.encode_batch([text]) == [ids] == [bpe.fast.encode(text)] == [fast.encode(text)]
    assert BPETokenizer.load(tmp_path / "tokenizer.json").encode(text) == ids
    packed = encode_documents([Document("a", text), Document("b", END_OF_TEXT)], bpe)
    assert (packed == bpe.eos).sum() == 2 and bpe.decode(packed) == text + END_OF_TEXT


def test_bpe_saves_loads_and_matches_transformers(bpe, tmp_path):
    bpe.save(tmp_path / "tokenizer.json")
    again = BPETokenizer.load(tmp_path / "tokenizer.json")
    text = "In the beginning, 7 zebras — naïve ones!"
    assert again.encode(text) == bpe.encode(text) == bpe.fast(text)["input_ids"]
    assert again.vocab_size == bpe.vocab_size == 600
    assert bpe.fast.eos_token_id == bpe.eos
    assert len(bpe.encode("In the beginning")) < len("In the beginning")
    with pytest.raises(ValueError, match="below 257"):
        train_bpe(["text"], 100)
    with pytest.raises(ValueError, match="1000000000 is above a million"):
        train_bpe(["text"], 10**9)
    with pytest.raises(ValueError, match="no text"):
        train_bpe([""], 300)


def test_documents_are_packed_with_an_end_after_each(bpe):
    documents = [Document("a", "Adam"), Document("b", "Eve")]
    for tokenizer in (bpe, ByteTokenizer()):
        ids = encode_documents(documents, tokenizer)
        ends = np.flatnonzero(ids == tokenizer.eos)
        assert len(ends) == 2 and ends[-1] == len(ids) - 1
        assert tokenizer.decode(ids[: ends[0]]) == "Adam"
    assert encode_documents([], bpe).shape == (0,)


def take(batches, n):
    return [next(batches) for _ in range(n)]


def test_an_epoch_covers_each_row_once_and_in_a_new_order():
    batches = Batches(np.arange(1001), batch_size=3, length=10, seed=5)
    epoch = take(batches, batches.batches_per_epoch)
    rows = torch.cat(epoch)
    assert rows.shape == (batches.batches_per_epoch * 3, 11) and rows.dtype == torch.int64
    assert (rows[:, 1:] - rows[:, :-1] == 1).all(), "a row is consecutive tokens"
    inputs = rows[:, :-1].flatten().tolist()
    assert len(set(inputs)) == len(inputs) >= 950
    second = take(batches, batches.batches_per_epoch)
    assert not torch.equal(epoch[0], second[0])


@given(st.integers(0, 80), st.integers(0, 3))
def test_batches_resume_anywhere(done, seed):
    straight = Batches(np.arange(500), batch_size=4, length=7, seed=seed)
    take(straight, done)
    resumed = Batches(np.arange(500), batch_size=4, length=7, seed=seed)
    resumed.load_state_dict(straight.state_dict())
    for expected, found in zip(take(straight, 20), take(resumed, 20)):
        assert torch.equal(expected, found)


def test_too_few_tokens_is_one_sentence():
    with pytest.raises(ValueError, match="30 tokens are too few for a batch of 4 rows of 7"):
        Batches(np.arange(30), batch_size=4, length=7)
    assert Batches(np.arange(36), batch_size=4, length=7).batches_per_epoch == 1


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.arange(99) / 3, "tokens are integers, not float64"),
        ([True, False] * 50, "tokens are integers, not bool"),
        (np.arange(99) - 1, "token -1 is negative"),
        (np.ones((9, 9), int), r"one long row of ids, not of shape \(9, 9\)"),
    ],
)
def test_what_is_no_id_is_refused(tokens, message):
    for make in (Batches, sequential):
        with pytest.raises(ValueError, match=message):
            make(tokens, 2, 5)


def test_sizes_are_one_or_more():
    for sizes in ((0, 5), (2, 0), (2, -1)):
        for make in (Batches, sequential):
            with pytest.raises(ValueError, match="must be 1 or more"):
                make(np.arange(99), *sizes)
    assert sequential(np.arange(5), 2, 5) == sequential([], 2, 5) == []


def test_held_out_rows_come_once_in_order():
    rows = torch.cat(sequential(np.arange(100), batch_size=4, length=9))
    assert rows.shape == (11, 10)
    assert torch.equal(rows[:, 0], torch.arange(0, 99, 9))
    data = TokenData(np.arange(500), np.arange(100), batch_size=4, length=9, seed=2)
    next(data.train_dataloader())
    assert data.state_dict()["position"] == 1
    assert torch.equal(torch.cat(data.val_dataloader()), rows)


def test_words_and_sentences():
    assert words("O, don't! 3.5 times; _x_") == ["O", ",", "don't", "!", "3.5", "times", ";"] + [
        "_",
        "x",
        "_",
    ]
    found = sentences("He came. She left! (Why?) \n\nNo one\nknows. i.e. nothing")
    assert [" ".join(s) for s in found][:2] == ["He came .", "She left !"]
    assert sentences("  \n ") == []


def test_marks_belong_to_the_letters_they_stand_on():
    assert words("हिन्दी में, ९ बार") == ["हिन्दी", "में", ",", "९", "बार"]
    assert words("cafe\u0301s naïve") == ["cafe\u0301s", "naïve"]
    assert words("می\u200cخواهم") == ["می\u200cخواهم"]
    assert words("\u0301 \u200d") == ["\u0301", "\u200d"], "without a letter they stand alone"
    hindi = next(document.text for document in load("django") if document.name == "hi")
    translated = "\n".join(line.partition("\t")[2] for line in hindi.splitlines())
    spaced = len(translated.split())
    assert spaced == 655 and len(words(translated)) < 1.4 * spaced, "punctuation is told apart"


def test_words_of_english_are_what_a_plain_pattern_finds():
    plain = re.compile(r"[^\W\d_]+(?:['’\-][^\W\d_]+)*|\d+(?:[.,]\d+)*|[^\w\s]|_+")
    for document in load("shakespeare")[:10]:
        assert words(document.text) == plain.findall(document.text)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_entropy_of_a_markov_source_is_that_of_its_samples(order):
    source = MarkovSource(3, order=order, seed=order)
    assert np.allclose(source.transition.sum(1), 1)
    symbols = source.sample(60_000, seed=1)
    contexts = np.zeros(len(symbols) - order, dtype=int)
    for back in range(order):
        contexts = contexts * 3 + symbols[back : back + len(contexts)]
    loss = -np.log(source.transition[contexts, symbols[order:]]).mean()
    assert loss == pytest.approx(source.entropy_rate, rel=0.02)
    seen = np.bincount(contexts, minlength=3**order) / len(contexts)
    assert np.abs(seen - source.stationary).sum() < 0.05
    assert np.array_equal(symbols, source.sample(60_000, seed=1))


def test_a_markov_source_needs_two_symbols():
    with pytest.raises(ValueError, match="2 symbols"):
        MarkovSource(1)
