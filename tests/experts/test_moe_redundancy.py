"""A second kind of token in a text mixture: what changes, what must not, and where rows start."""

import copy

import numpy as np
import pytest
import torch

from lablib.exercises import moe_redundancy as exercises
from lablib.experts import digits, pot
from lablib.experts import moe_redundancy as mr
from lablib.experts.moe import moe_layers, recorded
from lablib.experts.switch_transformers import switch_
from lablib.experts.upcycling import upcycle_
from lablib.models import GPT, GPTConfig
from lablib.training import fit


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def small():
    sizes = {"vocab_size": 30, "dim": 16, "n_layers": 2, "n_heads": 2, "max_length": 32}
    model = upcycle_(GPT(GPTConfig(**sizes, init_std=0.2)), 4, 1, 2, "after")
    for layer in moe_layers(model).values():
        layer.experts.gate_up.data.add_(0.1 * torch.randn_like(layer.experts.gate_up))
        layer.router.weight.data.mul_(20)
    return model


def grown(model=None, adapted=((0, 2), (1,)), **options):
    model = small() if model is None else model
    experts = [torch.tensor(which) for which in adapted]
    return mr.grow_(model, torch.randn(5, 16), experts, **options)


def mixed(rows=4):
    return torch.cat([torch.randint(30, (rows, 6)), torch.randint(30, 35, (rows, 8))], 1)


def train(model, steps=8):
    batches = [mixed() for _ in range(steps)]
    fit(model, batches, steps=steps, lr=3e-2, progress=False, seed=0)
    return model


def test_text_logits_stay_bit_for_bit_and_the_new_tokens_do_learn():
    before, text = small().eval(), torch.randint(30, (3, 12))
    expected = before(text)
    model = grown(copy.deepcopy(before))
    start = model(mixed()).detach()
    train(model).eval()
    assert torch.equal(model(text)[..., :30], expected)
    assert not torch.allclose(model(mixed()), start)


def test_at_the_start_updates_do_nothing():
    before = small().eval()
    model = grown(copy.deepcopy(before)).eval()
    before.embedding = mr.GrownEmbedding(before.embedding, model.embedding.rows)
    before.head = mr.GrownHead(before.embedding)
    tokens = mixed()
    torch.testing.assert_close(model(tokens), before(tokens))


def test_only_what_is_new_is_trained_and_text_before_an_image_is_untouched():
    model = grown()
    kept = {n: p.detach().clone() for n, p in model.named_parameters()}
    tokens = mixed()
    early = model.eval()(tokens)[:, :6, :30].detach()
    train(model.train())
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, kept[n])}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert changed == trained
    assert all(part.rpartition(".")[2] in NEW for part in trained)
    assert torch.equal(model.eval()(tokens)[:, :6, :30], early)


NEW = {"A", "B", "gate_up_A", "gate_up_B", "down_A", "down_B", "update", "rows"}


def test_a_partial_layer_is_the_linear_one_plus_its_update_for_new_tokens():
    base = torch.nn.Linear(6, 4, bias=False)
    layer = mr.PartialLoRA(base, 2)
    layer.B.data.normal_()
    x, layer.new = torch.randn(3, 5, 6), torch.rand(3, 5) > 0.5
    whole = x @ (base.weight + layer.B @ layer.A).T
    torch.testing.assert_close(layer(x)[layer.new], whole[layer.new])
    assert torch.equal(layer(x)[~layer.new], base(x)[~layer.new])


def test_new_tokens_see_the_updated_weights_of_adapted_experts_alone():
    model = grown()
    layer = next(iter(moe_layers(model).values()))
    for name in ("gate_up_B", "down_B"):
        getattr(layer.experts, name).data.normal_()
    updated = layer.experts.updated("down")
    same = (updated == layer.experts.base.down).all(-1).all(-1)
    assert same.tolist() == [False, True, False, True]
    x = torch.randn(20, 16)
    new = torch.rand(20) > 0.5
    layer.router.new = layer.experts.new = new
    plain = copy.deepcopy(layer)
    plain.experts = copy.deepcopy(layer.experts.base)
    old = plain(x)
    plain.experts.gate_up.data = layer.experts.updated("gate_up").detach()
    plain.experts.down.data = updated.detach()
    torch.testing.assert_close(layer(x), torch.where(new[:, None], plain(x), old))


def test_routers_move_for_new_tokens_only():
    model = grown()
    layer = next(iter(moe_layers(model).values()))
    layer.router.update.data.normal_(0, 10)
    x, new = torch.randn(40, 16), torch.arange(40) % 2 == 0
    with recorded(torch.nn.Sequential(layer)) as records:
        for layer.router.new in (torch.zeros(40, dtype=torch.bool), new):
            layer.experts.new = layer.router.new
            layer(x)
    first, second = (record.experts for record in records["0"])
    assert torch.equal(first[~new], second[~new]) and not torch.equal(first[new], second[new])


def test_what_cannot_grow_is_refused():
    with pytest.raises(ValueError, match="1 lists of experts for 2 MoE layers"):
        grown(adapted=((0,),))
    loose = GPT(GPTConfig(vocab_size=30, dim=16, n_layers=1, n_heads=2, tied=False))
    with pytest.raises(ValueError, match="must be tied"):
        mr.grow_(switch_(loose, 2, every=1), torch.randn(5, 16), [torch.tensor([0])])


def test_the_least_used_experts_are_those_of_the_smallest_load():
    assert mr.least_used(torch.tensor([0.4, 0.1, 0.3, 0.2]), 2).tolist() == [1, 3]
    model, text = small(), [torch.randint(30, (4, 13))]
    loads = mr.text_loads(model, text)
    with recorded(model.eval()) as records:
        model(text[0][:, :-1])
    for load, (record,) in zip(loads, records.values()):
        counts = [(record.experts == e).sum().item() for e in range(4)]
        assert load.tolist() == pytest.approx([count / sum(counts) for count in counts])


def test_the_coupling_is_that_of_pot():
    first, second, theirs = pot.recorded()
    ours = mr.gromov_wasserstein(first, second, pot.EPSILON, rounds=50, sinkhorn=500)
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=0)


def test_a_coupling_has_its_marginals_and_its_loss_is_brute_forces():
    first, second = (mr.distances(torch.randn(n, 3)) for n in (5, 7))
    plan = mr.gromov_wasserstein(first, second, 0.02, sinkhorn=2000)
    torch.testing.assert_close(plan.sum(1), torch.full((5,), 1 / 5).double())
    torch.testing.assert_close(plan.sum(0), torch.full((7,), 1 / 7).double(), atol=1e-6, rtol=0)
    apart = (first[:, None, :, None] - second[None, :, None, :]).square()  # (i, j, k, l)
    brute = torch.einsum("ijkl,ij,kl->", apart, plan, plan)
    assert mr.gw_loss(first, second, plan) == pytest.approx(brute.item())
    even = torch.full((5, 7), 1 / 35).double()
    assert mr.gw_loss(first, second, plan) < mr.gw_loss(first, second, even)


def test_a_set_and_its_rotated_shuffled_copy_are_matched_point_to_point():
    x = torch.randn(6, 3)
    turn, _ = torch.linalg.qr(torch.randn(3, 3))
    order = torch.randperm(6)
    plan = mr.gromov_wasserstein(mr.distances(x), mr.distances(x[order] @ turn), 2e-3)
    assert torch.equal(plan.argmax(0), order)
    start = mr.gw_start(x, (x[order] @ turn), 2e-3)
    torch.testing.assert_close(start, x @ turn, atol=0.05, rtol=0.05)


def test_images_survive_being_cut_and_named_by_patches():
    images, labels = digits.digits()
    assert images.shape == (1797, 8, 8) and images.max() == 1
    assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert np.array_equal(digits.pictures(digits.patches(images)), images)
    assert np.array_equal(digits.patches(images)[0, 1], images[0, :2, 2:4].ravel())
    codes = digits.codebook(images[:500], 32)
    ids = digits.nearest(digits.patches(images), codes)
    brute = ((digits.patches(images[:5])[:, :, None] - codes) ** 2).sum(-1).argmin(-1)
    assert np.array_equal(ids[:5], brute)
    recognize = digits.recognizer(images[:1500], labels[:1500])
    again = digits.pictures(codes[ids[1500:]])
    assert (recognize(again) == labels[1500:]).mean() > 0.9


def touches_all(x, new, W, A, B):
    return x @ (W + B @ A).T


def touches_old(x, new, W, A, B):
    return exercises._partial(x, ~new, W, A, B)


def transposed(x, new, W, A, B):
    return x @ W.T + new[:, None] * (x @ A.T @ B.T) / len(A)


def apart(first, second):
    return first[:, None, :, None] - second[None, :, None, :]


def one_plan(first, second, plan):
    return torch.einsum("ijkl,ij->", apart(first, second).square(), plan)


def absolute(first, second, plan):
    return torch.einsum("ijkl,ij,kl->", apart(first, second).abs(), plan, plan)


def squared_at_last(first, second, plan):
    return torch.einsum("ijkl,ij,kl->", apart(first, second), plan, plan).square()


def crossed(first, second, plan):
    return torch.einsum("ijkl,ik,jl->", apart(first, second).square(), plan @ plan.T, plan.T @ plan)


def sums(plan, text):
    return plan @ text


def nearest_only(plan, text):
    return text[plan.argmax(1)]


WRONG = {
    "partial": [touches_all, touches_old, transposed],
    "distortion": [one_plan, absolute, squared_at_last, crossed],
    "start": [sums, nearest_only],
}


@pytest.mark.parametrize("name", WRONG)
def test_exercises_tell_right_from_wrong(name, tells_right_from_wrong):
    tells_right_from_wrong(getattr(exercises, name), WRONG[name])
