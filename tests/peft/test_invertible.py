import copy

import pytest
import torch
from families_for_tests import MODELS, TOKENS, leaves_nothing, moved

from lablib.models import anatomy
from lablib.peft.adapter import n_trainable
from lablib.peft.adapter_drop import without_lowest
from lablib.peft.bottleneck import houlsby_
from lablib.peft.fusion import Fusion
from lablib.peft.invertible import Invertible, invertible_
from lablib.peft.lora import lora_


def test_back_undoes_there():
    torch.manual_seed(0)
    coupling = moved(torch.nn.ModuleList([Invertible(12)]), 0.5)[0]
    e = torch.randn(3, 5, 12)
    assert (coupling.there(e) - e).abs().max() > 0.1
    torch.testing.assert_close(coupling.back(coupling.there(e)), e, atol=1e-6, rtol=1e-5)


def test_it_starts_as_the_base_and_goes_without_a_trace(model, tmp_path):
    plain = copy.deepcopy(model)
    before = anatomy.logits(model, TOKENS)
    invertible_(model)
    torch.testing.assert_close(anatomy.logits(model, TOKENS), before)
    leaves_nothing(model, plain, before, tmp_path)
    assert not anatomy.embedding(model)._forward_hooks
    assert not anatomy.head(model)._forward_pre_hooks


def test_without_blocks_the_head_reads_what_the_embedding_wrote():
    model = MODELS["gpt"]().eval()
    seen = []
    invertible_(model)
    moved(model, 0.5)
    model.blocks = torch.nn.ModuleList()
    model.norm = torch.nn.Identity()
    model.head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(TOKENS)
    torch.testing.assert_close(
        seen[0], torch.nn.functional.embedding(TOKENS, model.embedding.weight), atol=1e-5, rtol=1e-5
    )


def test_its_size_is_that_of_two_networks_between_halves():
    model = MODELS["bert"]()
    invertible_(model)
    assert n_trainable(model) == 2 * (16 * 8 + 8 + 8 * 16 + 16)


def test_two_and_an_odd_width_are_refused():
    model = MODELS["gpt"]()
    invertible_(model)
    with pytest.raises(ValueError, match="GPT has an invertible adapter already"):
        invertible_(model)
    with pytest.raises(ValueError, match="a width of 7 has no two halves"):
        Invertible(7)


def test_lowest_blocks_without_adapters_are_the_base(model):
    tuned = copy.deepcopy(model)
    houlsby_(tuned, 4)
    lora_(tuned, ["output"], rank=2)
    moved(tuned)
    with_all = anatomy.logits(tuned, TOKENS)
    with without_lowest(tuned, 2):
        assert torch.equal(anatomy.logits(tuned, TOKENS), anatomy.logits(model, TOKENS))
    with without_lowest(tuned, 1):
        half = anatomy.logits(tuned, TOKENS)
    assert not torch.equal(half, with_all)
    assert torch.equal(anatomy.logits(tuned, TOKENS), with_all)
    with (
        pytest.raises(ValueError, match="3 blocks are to be without adapters"),
        without_lowest(tuned, 3),
    ):
        pass


def test_fusion_is_attention_over_adapters_token_by_token():
    torch.manual_seed(0)
    fusion = Fusion(6, std=1.0)
    for parameter in fusion.parameters():
        torch.nn.init.normal_(parameter)
    h, added = torch.randn(2, 3, 6), torch.randn(4, 2, 3, 6)
    got = fusion(h, added)
    for b, t in [(0, 0), (1, 2)]:
        scores = [fusion.query(h[b, t]) @ fusion.key(z[b, t]) for z in added]
        shares = torch.stack(scores).softmax(0)
        mixed = sum(s * (fusion.value.weight @ z[b, t]) for s, z in zip(shares, added, strict=True))
        torch.testing.assert_close(got[b, t], h[b, t] + mixed, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(fusion.shares(h, added).sum(0), torch.ones(2, 3))
    assert fusion.penalty() > 1 and Fusion(6).penalty() == 0


def test_fusion_starts_as_the_mean_of_its_adapters():
    torch.manual_seed(0)
    h, added = torch.randn(2, 3, 6), torch.randn(4, 2, 3, 6)
    torch.testing.assert_close(Fusion(6, std=0.0)(h, added), h + added.mean(0))
