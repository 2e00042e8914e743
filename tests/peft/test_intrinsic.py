import copy

import pytest
import scipy.linalg
import torch
from families_for_tests import MODELS, TOKENS, loads_again, merges, moved, same_under_a_cache

from lablib.models import anatomy
from lablib.peft.adapter import (
    adapters,
    disabled,
    fold_,
    freeze_base_,
    matrix,
    merge_,
    n_trainable,
    remove_,
    save_adapter,
    trainable,
)
from lablib.peft.intrinsic import PROJECTIONS, Dense, Fastfood, intrinsic_
from lablib.peft.lora import lora_

WAYS = [("fastfood", False), ("fastfood", True), ("dense", False), ("dense", True)]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("d", "size"), [(8, 16), (5, 16), (7, 12), (20, 6), (1, 1), (3, 100)])
def test_fastfood_is_the_product_of_its_five_matrices(d, size):
    fastfood = Fastfood(d, size, seeded())
    n = fastfood.n
    assert n >= max(d, size) and n < 2 * max(d, size)
    h = torch.tensor(scipy.linalg.hadamard(n), dtype=torch.float64)
    order, scales = torch.eye(n, dtype=torch.float64)[fastfood.order], fastfood.scales.double()
    dense = h @ scales.diag() @ order @ h @ fastfood.signs.double().diag()  # H G Pi H B
    dense = dense[:size, :d] / (size * scales.square().sum()).sqrt()
    x = torch.randn(4, d, dtype=torch.float64)
    torch.testing.assert_close(fastfood(x), x @ dense.T, atol=1e-6, rtol=1e-5)
    if n == size:
        torch.testing.assert_close(dense.norm(dim=0), torch.ones(d).double(), atol=1e-6, rtol=1e-6)


def test_columns_have_length_1():
    columns = Fastfood(50, 3000, seeded())(torch.eye(50))  # n is 4096: rows are cut off
    assert (
        abs(columns.norm(dim=1).mean() - 1) < 0.02 and (columns.norm(dim=1) - 1).abs().max() < 0.2
    )
    overlap = columns @ columns.T - columns.norm(dim=1).square().diag()
    assert overlap.abs().max() < 0.2
    dense = Dense(50, 3000, seeded())(torch.eye(50))
    torch.testing.assert_close(dense.norm(dim=1), torch.ones(50))


def test_gradients_of_fastfood_are_right():
    fastfood = Fastfood(5, 12, seeded())
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(fastfood, (x,))


@pytest.mark.parametrize(("projection", "said"), WAYS)
def test_verbs(model, projection, said, tmp_path):
    plain = copy.deepcopy(model)
    before = anatomy.logits(model, TOKENS)
    bits = {n: p.clone() for n, p in model.named_parameters()}
    n_matrices = len(anatomy.projections(model))
    intrinsic_(model, 40, projection=projection, said=said, seed=3)
    assert torch.equal(anatomy.logits(model, TOKENS), before)
    freeze_base_(model)
    assert n_trainable(model) == sum(p.numel() for p in model.parameters() if p.requires_grad) == 40
    assert len(trainable(model)) == (1 + n_matrices if said else 1)
    changed = anatomy.logits(moved(model, 0.3), TOKENS)
    assert (changed - before).abs().max() > 1e-3
    with disabled(model):
        assert torch.equal(anatomy.logits(model, TOKENS), before)
    assert torch.equal(anatomy.logits(copy.deepcopy(model), TOKENS), changed)
    loads_again(model, plain, changed, tmp_path)
    merges(model, before, changed)
    merge_(model)
    remove_(model)
    assert not adapters(model)
    assert all(torch.equal(p, bits[n]) for n, p in model.named_parameters())
    fold_(plain)
    assert not adapters(plain)
    torch.testing.assert_close(anatomy.logits(plain, TOKENS), changed, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_weights_and_gradients_are_those_of_the_equation(model, projection):
    """theta_i = theta_0,i + lambda_i P_i(theta_d), with P_i written out and W tuned in full."""
    plain = copy.deepcopy(model)
    before = {n: matrix(layer).detach() for n, layer in anatomy.projections(model).items()}
    intrinsic_(model, 40, projection=projection, said=True)
    freeze_base_(moved(model, 0.3))
    layers = adapters(model)
    vector = next(iter(layers.values())).vector
    written = {n: a.projection(torch.eye(len(vector))).T for n, a in layers.items()}  # (D_i, d)
    for name, layer in layers.items():
        change = (layer.scale * (written[name] @ vector)).view(before[name].shape)
        torch.testing.assert_close(layer.weight, before[name] + change, atol=1e-6, rtol=1e-5)
        with torch.no_grad():
            matrix(plain.get_submodule(name)).add_(change)
    anatomy.logits(model, TOKENS).square().mean().backward()
    anatomy.logits(plain, TOKENS).square().mean().backward()
    wanted = 0
    for name, layer in layers.items():
        full = plain.get_submodule(name)
        slope = full.weight.grad if matrix(full) is full.weight else full.weight.grad.T
        slope = slope.flatten() @ written[name]  # dL/dtheta_i P_i: (D_i,) -> (d,)
        wanted = wanted + layer.scale * slope
        torch.testing.assert_close(layer.scale.grad[0], slope @ vector, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(vector.grad, wanted, atol=1e-6, rtol=1e-4)


def test_the_file_has_the_trained_numbers_alone(tmp_path):
    model = MODELS["gpt"]()
    intrinsic_(model, 100, said=True)
    save_adapter(model, tmp_path / "a.safetensors")
    header = (tmp_path / "a.safetensors").read_bytes()[:8]
    held = (tmp_path / "a.safetensors").stat().st_size - int.from_bytes(header, "little") - 8
    assert held == 4 * 100


def test_the_seed_gives_the_random_parts_and_each_matrix_has_its_own():
    model = MODELS["gpt"]()
    first, second, other = (copy.deepcopy(model) for _ in range(3))
    for one, seed in ((first, 1), (second, 1), (other, 2)):
        intrinsic_(one, 10, ["query"], seed=seed)
        moved(one)
    assert torch.equal(first(TOKENS), second(TOKENS))
    assert not torch.equal(first(TOKENS), other(TOKENS))
    one, two = adapters(first).values()
    assert not torch.equal(one.delta(), two.delta())


def test_the_vector_stays_where_its_holder_is_taken_out():
    torch.manual_seed(0)
    model = MODELS["gpt"]().eval()
    intrinsic_(model, 10)
    moved(model)
    last = {n: p.weight.detach() for n, p in anatomy.projections(model).items() if "blocks.1" in n}
    remove_(model.blocks[0])
    assert n_trainable(model) == 10
    assert {name.split(".")[1] for name in adapters(model)} == {"1"}
    for name, weight in last.items():
        assert torch.equal(model.get_submodule(name).weight, weight)
    model(TOKENS).square().mean().backward()
    assert all(p.grad.abs().sum() > 0 for p in trainable(model).values())


def test_two_groups_and_lora_go_together(model, tmp_path):
    plain = copy.deepcopy(model)
    lora_(model, ["output"], rank=2)
    intrinsic_(model, 20, ["output", "up"])
    intrinsic_(model, 30, ["up"], projection="dense", seed=5)
    changed = anatomy.logits(moved(model), TOKENS)
    loads_again(model, plain, changed, tmp_path)
    fold_(model)
    torch.testing.assert_close(anatomy.logits(model, TOKENS), changed, atol=1e-5, rtol=1e-5)


def test_bfloat16_and_a_cache_go_with_it():
    torch.manual_seed(0)
    model = MODELS["gpt"]().to(torch.bfloat16).eval()
    intrinsic_(model, 40, said=True)
    same_under_a_cache(moved(model))


def test_what_can_not_be_is_said():
    model = MODELS["gpt"]()
    with pytest.raises(ValueError, match="'sparse' is none of fastfood, dense"):
        intrinsic_(model, 10, projection="sparse")
    with pytest.raises(ValueError, match="14 leaves 0 numbers for the vector beside 14 scales"):
        intrinsic_(model, 14, said=True)
    assert not adapters(model)
