import pytest
import torch
from families_for_tests import MODELS, TOKENS, moved

from lablib.models import anatomy
from lablib.models.classifier import Classifier, cached_below, encode, encoder
from lablib.peft.adapter import adapters, disabled, freeze_base_, n_trainable, remove_, trainable
from lablib.peft.catalogue import BUILT, DRAWN, FAMILIES, KINDS, METHODS, Probe, put_, upper


def probe():
    rows = torch.randint(2, 60, (4, 7), generator=torch.Generator().manual_seed(4))
    return Probe([rows[:2], rows[2:]], lambda model, rows: loss(model, rows))


def loss(model, rows):
    return torch.nn.functional.cross_entropy(
        anatomy.logits(model, rows).flatten(0, 1), rows.flatten()
    )


@pytest.mark.parametrize("name", METHODS)
def test_every_entry_is_of_known_families_and_is_built_or_says_why_not(name):
    entry = METHODS[name]
    assert entry.family in FAMILIES and entry.kinds and set(entry.kinds) <= set(KINDS)
    assert (entry.put is None) == bool(entry.why_not)
    assert entry.equation and entry.source[-4:].isdigit()


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("name", BUILT)
def test_it_goes_into_every_family_learns_and_leaves_no_trace(name, family):
    torch.manual_seed(0)
    model = MODELS[family]().eval()
    before = anatomy.logits(model, TOKENS)
    if name == "UniPELT" and family not in ("bert", "roberta"):
        with pytest.raises(ValueError, match="not for a decoder"):
            put_(model, name)
        return
    put_(model, name, probe())
    if name not in DRAWN:
        torch.testing.assert_close(anatomy.logits(model, TOKENS), before, atol=2e-3, rtol=1e-2)
    freeze_base_(model)
    loss(model, TOKENS).backward()
    assert any(p.grad is not None and p.grad.any() for p in trainable(model).values())
    assert n_trainable(model) > 0
    with torch.no_grad():
        assert not torch.equal(anatomy.logits(moved(model), TOKENS), before)
        with disabled(model):
            assert torch.equal(anatomy.logits(model, TOKENS), before)
    remove_(model)
    assert not adapters(model)
    assert torch.equal(anatomy.logits(model, TOKENS), before)


def test_one_that_is_not_built_says_why_and_one_that_looks_at_data_asks_for_it():
    model = MODELS["gpt"]()
    with pytest.raises(ValueError, match="SPoT is not built here: it is a prompt"):
        put_(model, "SPoT")
    with pytest.raises(ValueError, match="FISH chooses by data"):
        put_(model, "FISH")


def test_upper_blocks_alone_classify_as_the_whole_model_does():
    model, tokenizer = encoder()
    encoded = encode(tokenizer, ["a fine film", "what a waste of two hours"])
    torch.manual_seed(0)
    whole = Classifier(model, 2).eval()
    torch.manual_seed(0)
    above = Classifier(upper(model, 4), 2).eval()
    with torch.no_grad():
        expected = whole(encoded)
        torch.testing.assert_close(
            above(cached_below(model, encoded, 4)), expected, atol=1e-5, rtol=1e-5
        )
    assert len(anatomy.blocks(above.model)) == 2 and len(anatomy.blocks(model)) == 6
