import pytest
import torch

from lablib.peft import peft_library as library
from lablib.peft.adapter import freeze_base_, merge_, n_trainable, trainable
from lablib.peft.catalogue import BUILT

record = pytest.importorskip("record_merge", reason="needs peft")
record_peft = pytest.importorskip("record_peft", reason="needs peft")


def test_merged_weights_are_those_that_peft_merges():
    found = library.compare_merged()
    assert found.keys() == library.METHODS.keys()
    for ours, theirs in found.values():
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("kind", library.METHODS)
def test_the_recorded_weights_change_much_and_compute_the_same_before_they_are_merged(kind):
    tokens, model = library.recorded()[1]["tokens"], record.base()
    model.load_state_dict(library.recorded_of("base:"))
    given = library.recorded_of(f"{kind}:")
    ours = library.with_its_weights(kind)
    torch.testing.assert_close(ours(tokens).logits, given["before"], atol=1e-5, rtol=0)
    assert (model(tokens).logits - given["before"]).abs().max() > 0.1


@torch.no_grad()
def test_weights_that_are_not_the_librarys_are_told_from_its():
    model = library.with_its_weights("LoRA")
    next(p for n, p in model.named_parameters() if n.endswith(".up")).mul_(1.1)
    merge_(model)
    theirs = library.recorded_of("LoRA:")["merged"]
    assert (model(library.recorded()[1]["tokens"]).logits - theirs).abs().max() > 1e-3


@pytest.mark.parametrize("kind", library.METHODS)
def test_the_record_is_what_peft_computes(kind):
    tokens, model = library.recorded()[1]["tokens"], record.base()
    torch.manual_seed(list(record.METHODS).index(kind))
    for name, tensor in record.merged(model, tokens, record.METHODS[kind]).items():
        recorded = library.recorded_of(f"{kind}:")[name]
        torch.testing.assert_close(tensor, recorded, atol=1e-5, rtol=1e-5)


# Every leaf that both have.


def test_every_leaf_computes_what_peft_does():
    found = library.compare_leaves()
    assert found.keys() == library.LEAVES.keys() == record_peft.LEAVES.keys()
    assert found.keys() <= set(BUILT)
    for ours, theirs in found.values():
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("kind", library.LEAVES)
def test_a_leaf_has_changed_much_and_trains_as_many_numbers_as_in_peft(kind):
    header, tensors = library.recorded(library.PLAIN)
    model = record.base()
    model.load_state_dict(library.recorded_of("base:", library.PLAIN))
    theirs = library.recorded_of(f"{kind}:", library.PLAIN)["output"]
    assert (model(tensors["tokens"]).logits - theirs).abs().max() > 0.1
    ours = library.with_its_weights(kind, library.PLAIN)
    freeze_base_(ours)
    assert n_trainable(ours) == header["counts"][kind]


@torch.no_grad()
@pytest.mark.parametrize("kind", library.LEAVES)
def test_other_numbers_than_the_recorded_are_told_from_them(kind):
    model = library.with_its_weights(kind, library.PLAIN)
    for parameter in trainable(model).values():
        parameter.mul_(1.1)
    theirs = library.recorded_of(f"{kind}:", library.PLAIN)["output"]
    made = model(library.recorded(library.PLAIN)[1]["tokens"]).logits
    assert (made - theirs).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", library.LEAVES)
def test_the_record_of_leaves_is_what_peft_computes(kind):
    (header, tensors), model = library.recorded(library.PLAIN), record.base()
    torch.manual_seed(list(record_peft.LEAVES).index(kind))
    found, count = record_peft.leaf(model, tensors["tokens"], kind)
    recorded = library.recorded_of(f"{kind}:", library.PLAIN)
    assert found.keys() == recorded.keys() and count == header["counts"][kind]
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, recorded[name], atol=1e-5, rtol=1e-5)


def test_tuned_norms_have_pefts_gradients():
    ours, theirs = library.compare_norms()
    assert ours[0] == theirs[0] == 5 * 16 and len(ours) > 80 + 3 * 7 * 20
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert theirs[-80:].abs().min() > 0  # the gradients, all of them there
