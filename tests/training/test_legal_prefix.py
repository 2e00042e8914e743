import copy

import pytest
import torch
from safetensors.torch import load_file

from lablib.data import Document
from lablib.models import anatomy, pretrained
from lablib.peft.adapter import load_adapter, trainable
from lablib.training import legal_prefix

TEXTS = [
    Document("a", "You may copy this work. " * 40),
    Document("b", "No warranty is given. " * 40),
]


@pytest.fixture(scope="module")
def read():
    model, tokenizer = pretrained("tiny-1m")
    rows = legal_prefix.rows_of(tokenizer, TEXTS)
    plain = copy.deepcopy(model)
    losses = legal_prefix.read_(model, rows.repeat(4, 1), steps=2)
    return model, plain, rows, losses


def test_rows_are_whole_pieces_of_a_licence(read):
    rows = read[2]
    assert rows.shape[1] == legal_prefix.WORDS + 1 and len(rows) >= 2


def test_a_saved_prefix_opens_as_it_was(read, tmp_path):
    model, plain, rows, losses = read
    assert len(losses) == 2
    legal_prefix.save(model, tmp_path / "prefix.safetensors")
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}
    before = anatomy.logits(plain, rows[:, :-1])
    load_adapter(plain, tmp_path / "prefix.safetensors")
    after = anatomy.logits(plain, rows[:, :-1])
    assert torch.equal(after, anatomy.logits(model, rows[:, :-1])) and not torch.equal(
        after, before
    )


def test_the_stored_prefix_fits_its_model_in_shape():
    numbers = sum(tensor.numel() for tensor in load_file(legal_prefix.FILE).values())
    assert numbers == 30 * 2 * legal_prefix.LENGTH * 192  # SmolLM2: thirty blocks, keys 192 wide
