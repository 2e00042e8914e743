import copy

import pytest
import torch
from families_for_tests import MODELS, TOKENS, loads_again, moved, same_under_a_cache

from lablib.models import anatomy, sublayers
from lablib.peft.adapter import (
    adapters,
    disabled,
    freeze_base_,
    merge_,
    n_trainable,
    remove_,
    unmerge_,
)
from lablib.peft.kronecker import (
    KronALinear,
    PHMLinear,
    compacter_,
    kron_linear,
    krona_,
    near_square,
)

METHODS = {"krona": lambda m: krona_(m, scale=2.0), "compacter": lambda m: compacter_(m, 8)}


@pytest.fixture(params=METHODS)
def put(request):
    return METHODS[request.param]


def test_the_product_is_never_formed_and_the_same():
    torch.manual_seed(0)
    a, b, x = torch.randn(3, 4), torch.randn(5, 2), torch.randn(2, 7, 8)
    torch.testing.assert_close(kron_linear(x, a, b), x @ torch.kron(a, b).mT)


def test_a_near_square_shape_has_the_fewest_numbers():
    m, n = near_square(48, 32)
    counts = [
        p * q + (48 // p) * (32 // q)
        for p in (1, 2, 3, 4, 6, 8, 12, 16, 24, 48)
        for q in (1, 2, 4, 8, 16, 32)
    ]
    assert m * n + (48 // m) * (32 // n) == min(counts)


def test_it_goes_without_a_trace_and_is_disabled_bit_for_bit(model, put):
    before = anatomy.logits(model, TOKENS)
    bits = {n: p.clone() for n, p in model.named_parameters()}
    put(model)
    torch.testing.assert_close(anatomy.logits(model, TOKENS), before, atol=1e-3, rtol=1e-3)
    changed = anatomy.logits(moved(model), TOKENS)
    assert (changed - before).abs().max() > 1e-3
    with disabled(model):
        assert torch.equal(anatomy.logits(model, TOKENS), before)
    remove_(model)
    assert not adapters(model) and not sublayers.changes(model)
    assert all(torch.equal(p, bits[n]) for n, p in model.named_parameters())
    assert torch.equal(anatomy.logits(model, TOKENS), before)


def test_saved_and_loaded_is_the_same(model, put, tmp_path):
    plain = copy.deepcopy(model)
    put(model)
    changed = anatomy.logits(moved(model), TOKENS)
    loads_again(model, plain, changed, tmp_path)


def test_krona_starts_as_the_base_and_merges(model):
    before = anatomy.logits(model, TOKENS)
    krona_(model)
    assert torch.equal(anatomy.logits(model, TOKENS), before)
    changed = anatomy.logits(moved(model), TOKENS)
    merge_(model)
    torch.testing.assert_close(anatomy.logits(model, TOKENS), changed, atol=1e-5, rtol=1e-5)
    unmerge_(model)
    assert torch.equal(anatomy.logits(model, TOKENS), changed)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_krona_is_pefts_lokr_with_both_factors_whole(family):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = MODELS[family]().eval().double()
    targets = list(anatomy.projections(model, "query"))
    config = peft.LoKrConfig(r=32, alpha=32, target_modules=targets, decompose_both=False)
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval().double()
    layer = next(m for m in theirs.modules() if hasattr(m, "lokr_w1"))
    krona_(model, ["query"], shape=tuple(layer.lokr_w1["default"].shape))
    freeze_base_(model)
    pairs = []
    for place, ours in adapters(model).items():
        other = theirs.get_submodule(f"base_model.model.{place}")
        for mine, their in ((ours.a, other.lokr_w1["default"]), (ours.b, other.lokr_w2["default"])):
            their.data.normal_()
            mine.data.copy_(their.data)
            pairs.append((mine, their))
    expected, mine = theirs(TOKENS).logits, anatomy.logits(model, TOKENS)
    torch.testing.assert_close(mine, expected, atol=1e-6, rtol=1e-6)
    mine.square().mean().backward()
    expected.square().mean().backward()
    for one, other in pairs:
        torch.testing.assert_close(one.grad, other.grad, atol=1e-6, rtol=1e-6)
    assert n_trainable(model) == theirs.get_nb_trainable_parameters()[0]


def test_a_hypercomplex_layer_is_the_sum_of_its_products():
    torch.manual_seed(0)
    shared = torch.nn.Parameter(torch.randn(4, 4, 4))
    layer, x = PHMLinear(12, 8, shared, rank=2), torch.randn(3, 5, 12)
    weight = sum(torch.kron(shared[i], layer.left[i] @ layer.right[i]) for i in range(4))
    torch.testing.assert_close(layer.weight(), weight)
    torch.testing.assert_close(layer(x), x @ weight.mT, atol=1e-5, rtol=1e-5)


def test_the_small_matrices_are_one_for_all_layers_and_counted_once():
    model = MODELS["bert"]()
    compacter_(model, rank=8, n=4)
    layers = [m for m in model.modules() if isinstance(m, PHMLinear)]
    assert len(layers) == 8 and len({id(m.shared) for m in layers}) == 1
    a_layer = (32 + 8) * 1  # s and t of four products of (out/4, 1) and (1, in/4)
    assert n_trainable(model) == 4**3 + 8 * a_layer + 4 * (32 + 8)


def test_shapes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"\(3, 2\) does not divide \(8, 8\)"):
        KronALinear(torch.nn.Linear(8, 8), (3, 2))
    with pytest.raises(ValueError, match=r"4 does not divide \(8, 6\)"):
        PHMLinear(6, 8, torch.nn.Parameter(torch.zeros(4, 4, 4)))


def test_bfloat16_and_a_cache_go_with_it(put):
    model = MODELS["gpt"]().eval()
    put(model)
    moved(model.to(torch.bfloat16))
    same_under_a_cache(model)
