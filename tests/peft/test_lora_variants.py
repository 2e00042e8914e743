import copy

import pytest
import torch
from families_for_tests import MODELS, TOKENS, loads_again, moved, same_under_a_cache

from lablib.models import anatomy
from lablib.peft.adapter import (
    adapters,
    disabled,
    freeze_base_,
    merge_,
    n_trainable,
    remove_,
    trainable,
    unmerge_,
)
from lablib.peft.lora_variants import (
    AdaLoRALinear,
    RankBudget,
    adalora_,
    dora_,
    lora_fa_,
    orthogonality,
    vera_,
)
from lablib.peft.measure import account

METHODS = {
    "lora-fa": lambda model: lora_fa_(model, rank=3, alpha=6),
    "dora": lambda model: dora_(model, rank=3, alpha=6),
    "vera": lambda model: vera_(model, rank=5),
    "adalora": lambda model: adalora_(model, rank=3, alpha=6),
}


@pytest.fixture(params=METHODS)
def put(request):
    return METHODS[request.param]


def test_it_starts_as_the_base_merges_and_goes_without_a_trace(model, put):
    before = anatomy.logits(model, TOKENS)
    bits = {n: p.clone() for n, p in model.named_parameters()}
    put(model)
    torch.testing.assert_close(anatomy.logits(model, TOKENS), before, atol=1e-6, rtol=1e-5)
    changed = anatomy.logits(moved(model), TOKENS)
    assert (changed - before).abs().max() > 1e-3
    with disabled(model):
        assert torch.equal(anatomy.logits(model, TOKENS), before)
    merge_(model)
    torch.testing.assert_close(anatomy.logits(model, TOKENS), changed, atol=1e-5, rtol=1e-5)
    unmerge_(model)
    assert torch.equal(anatomy.logits(model, TOKENS), changed)
    remove_(model)
    assert not adapters(model)
    assert all(torch.equal(p, bits[n]) for n, p in model.named_parameters())


def test_saved_and_loaded_is_the_same(model, put, tmp_path):
    plain = copy.deepcopy(model)
    put(model)
    changed = anatomy.logits(moved(model), TOKENS)
    loads_again(model, plain, changed, tmp_path)


def test_bfloat16_and_a_cache_go_with_it(put):
    model = MODELS["gpt"]().eval()
    put(model)
    moved(model.to(torch.bfloat16))
    same_under_a_cache(model, atol=0.2)


def test_lora_fa_trains_half_and_keeps_less():
    model, held = MODELS["llama"](), {}
    for name in ("lora-fa", "dora"):
        other = copy.deepcopy(model)
        METHODS[name](other)
        freeze_base_(other)
        held[name] = account(other, lambda m: m(TOKENS).logits.square().mean())["saved"]
        assert all(n.endswith(".up") for n in trainable(other)) == (name == "lora-fa")
    assert held["lora-fa"] < held["dora"]


def _same(model, theirs, names):
    """Random numbers in each of our parameters and in the peer's of that kind."""
    torch.manual_seed(1)
    their = dict(theirs.named_parameters())
    pairs = []
    for place, adapter in adapters(model).items():
        for ours, other in names.items():
            parameter = getattr(adapter, ours)
            peer = their[f"base_model.model.{place}.{other}"]
            peer.data.copy_((parameter + 0.3 * torch.randn(parameter.shape)).view(peer.shape))
            parameter.data.copy_(peer.data.view(parameter.shape))
            pairs.append((parameter, peer))
    return pairs


def _config(peft, name, targets):
    if name == "lora-fa":
        return peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets)
    if name == "dora":
        return peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets, use_dora=True)
    if name == "vera":
        return peft.VeraConfig(r=5, target_modules=targets, d_initial=0.1)
    return peft.AdaLoraConfig(
        init_r=3, target_r=2, lora_alpha=6, target_modules=targets, tinit=2, tfinal=2, total_step=10
    )


PEER_NAMES = {
    "lora-fa": {"down": "lora_A.default.weight", "up": "lora_B.default.weight"},
    "dora": {
        "down": "lora_A.default.weight",
        "up": "lora_B.default.weight",
        "magnitude": "lora_magnitude_vector.default.weight",
    },
    "vera": {"b": "vera_lambda_b.default", "d": "vera_lambda_d.default"},
    "adalora": {
        "left": "lora_B.default",
        "values": "lora_E.default",
        "right": "lora_A.default",
    },
}


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("name", PEER_NAMES)
def test_outputs_and_gradients_are_those_of_peft(name, family):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = MODELS[family]().eval().double()
    targets = list(anatomy.projections(model))
    theirs = peft.get_peft_model(copy.deepcopy(model), _config(peft, name, targets)).eval().double()
    METHODS[name](model.double())
    freeze_base_(model.double())
    if name == "lora-fa":  # its optimizer freezes what stays as drawn
        optimizers = pytest.importorskip("peft.optimizers")
        optimizers.create_lorafa_optimizer(theirs, r=3, lora_alpha=6, lr=1e-3)
    if name == "adalora":  # peft divides by the number of ranks and a hundred-thousandth
        for _, ranks in filter(lambda named: "ranknum" in named[0], theirs.named_parameters()):
            ranks.data -= 1e-5
    if name == "vera":
        with torch.no_grad():
            for ours in adapters(model).values():
                for drawn, other in zip(
                    ours.shared, (theirs.vera_A["default"], theirs.vera_B["default"]), strict=True
                ):
                    drawn.copy_(other[: len(drawn), : drawn.shape[1]])
    pairs = _same(model, theirs, PEER_NAMES[name])
    expected, mine = theirs(TOKENS).logits, anatomy.logits(model, TOKENS)
    torch.testing.assert_close(mine, expected, atol=1e-6, rtol=1e-6)
    mine.square().mean().backward()
    expected.square().mean().backward()
    for one, other in pairs:
        assert one.requires_grad == other.requires_grad
        if one.requires_grad:
            torch.testing.assert_close(one.grad, other.grad.view(one.shape), atol=1e-6, rtol=1e-6)
    if name != "adalora":  # which counts its frozen rank numbers, too
        assert n_trainable(model) == theirs.get_nb_trainable_parameters()[0]


def test_the_budget_is_that_of_peft_step_by_step():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = MODELS["llama"]()
    targets = list(anatomy.projections(model))
    config = peft.AdaLoraConfig(
        init_r=3,
        target_r=1,
        lora_alpha=6,
        target_modules=targets,
        tinit=2,
        tfinal=3,
        deltaT=2,
        total_step=12,
        beta1=0.85,
        beta2=0.85,
    )
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    adalora_(model, rank=3, alpha=6)
    freeze_base_(model)
    _same(model, theirs, PEER_NAMES["adalora"])
    ours = RankBudget(model, ranks=1, steps=12, warmup=2, final=3, every=2)
    both = [
        torch.optim.SGD([p for p in m.parameters() if p.requires_grad], 0.1)
        for m in (model, theirs)
    ]
    for step in range(1, 11):
        losses = anatomy.logits(model, TOKENS), theirs(TOKENS).logits
        for logits, optimizer in zip(losses, both, strict=True):
            optimizer.zero_grad()
            logits.square().mean().backward()
            optimizer.step()
        ours.step()
        theirs.base_model.update_and_allocate(step)
        left = {
            n: (m.lora_E["default"] != 0).sum().item()
            for n, m in theirs.named_modules()
            if hasattr(m, "lora_E")
        }
        assert list(ours.left().values()) == list(left.values()), step
    assert sum(ours.left().values()) == len(targets)


def test_the_penalty_is_zero_for_orthogonal_factors_alone():
    model = MODELS["gpt"]()
    adalora_(model, ["query"], rank=3)
    assert orthogonality(model) > 1
    with torch.no_grad():
        for layer in adapters(model).values():
            assert isinstance(layer, AdaLoRALinear)
            layer.left.copy_(torch.linalg.qr(torch.randn_like(layer.left))[0])
            layer.right.copy_(torch.linalg.qr(torch.randn_like(layer.right).mT)[0].mT)
    assert orthogonality(model) < 1e-5
