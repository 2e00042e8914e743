import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lablib.compression import curvature as cv
from lablib.compression.curvature import Factors, kronecker_factors
from lablib.models import GPT, GPTConfig, anatomy
from lablib.studies import llm_surgeon as study
from lablib.studies.cherry import fixed_model, fixed_rows


def small_model(seed=0):
    torch.manual_seed(seed)
    config = {"vocab_size": 50, "dim": 16, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2}
    return GPT(GPTConfig(**config, ffn_dim=24, max_length=16))


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads))


def some_rows(n=3, length=7):
    return torch.randint(50, (n, length + 1), generator=torch.Generator().manual_seed(1))


def by_hand(model, rows, name):
    """x and g of each token, one row and one leaf at a time: a shift of the output has gradient g.

    Written without the module's hooks: the projection is replaced by one that adds a parameter.
    """

    class Shifted(nn.Module):
        def __init__(self, layer, length):
            super().__init__()
            self.layer = layer
            self.shift = nn.Parameter(torch.zeros(length, layer.out_features))
            self.seen = None

        def forward(self, x):
            self.seen = x.detach()[0]
            return self.layer(x) + self.shift

    layer, xs, gs = model.get_submodule(name), [], []
    for row in rows:
        shifted = Shifted(layer, len(row) - 1)
        anatomy.replace(model, name, shifted)
        F.cross_entropy(
            anatomy.logits(model, row[None, :-1])[0], row[1:], reduction="sum"
        ).backward()
        xs.append(shifted.seen)
        gs.append(shifted.shift.grad)
    anatomy.replace(model, name, layer)
    return torch.cat(xs), torch.cat(gs)


@pytest.mark.parametrize("make", [small_model, llama])
@pytest.mark.parametrize("role", ["query", "value", "output", "up", "down"])
def test_factors_are_means_over_each_tokens_pairs(make, role):
    model, rows = make(), some_rows()
    name = next(iter(anatomy.projections(model, role)))
    ours = kronecker_factors(model, rows, role)[name]
    x, g = by_hand(model, rows, name)
    torch.testing.assert_close(ours.inputs, x.t() @ x / len(x))
    torch.testing.assert_close(ours.outputs, g.t() @ g / len(g))
    assert ours.outputs.abs().max() > 0
    pairs = cv.token_pairs(model, rows, name)
    for found, wanted in zip(pairs, (x, g), strict=True):
        torch.testing.assert_close(found, wanted)


def test_a_batch_changes_nothing_and_the_model_is_left_as_it_was():
    model, rows = small_model().train(), some_rows()
    model.embedding.weight.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    one, all_of = (kronecker_factors(model, rows, batch=size) for size in (1, 3))
    for name, factors in one.items():
        torch.testing.assert_close(factors.inputs, all_of[name].inputs)
        torch.testing.assert_close(factors.outputs, all_of[name].outputs)
    assert model.training and not model.embedding.weight.requires_grad
    assert (model.head.weight.grad == 1).all()
    layer = anatomy.projection(model, 0, "up")
    assert layer.weight.requires_grad and layer.weight.grad is None
    assert not any(module._forward_hooks for module in model.modules())


def test_some_blocks_alone():
    model, rows = llama(), some_rows()
    some, all_of = (
        kronecker_factors(model, rows, "down", blocks=[1]),
        kronecker_factors(model, rows),
    )
    assert [*some] == ["model.layers.1.mlp.down_proj"]
    for name, factors in some.items():
        torch.testing.assert_close(factors.outputs, all_of[name].outputs)


def test_hooks_are_gone_when_a_pass_fails():
    model = small_model()
    with pytest.raises(IndexError):
        kronecker_factors(model, some_rows() + 50)
    assert not any(module._forward_hooks for module in model.modules())


def test_drawn_labels_follow_the_seed_and_the_models_own_probabilities():
    model, rows = small_model(), some_rows(40)
    first, again, other = (
        kronecker_factors(model, rows, "down", sampled=seed) for seed in (0, 0, 1)
    )
    name = next(iter(first))
    assert torch.equal(first[name].outputs, again[name].outputs)
    assert not torch.equal(first[name].outputs, other[name].outputs)
    counts = torch.stack(
        [
            cv._drawn(torch.log(torch.tensor([[0.7, 0.2, 0.1]])), torch.Generator().manual_seed(s))
            for s in range(400)
        ]
    ).flatten()
    shares = counts.bincount(minlength=3) / 400
    torch.testing.assert_close(shares, torch.tensor([0.7, 0.2, 0.1]), atol=0.08, rtol=0)


# curvlinops. It comes with no extra: what it gave is stored (curvature.json), and the lab compares
# with that. `pip install curvlinops-for-pytorch==3.0.1`, and these two tests ask it again.


def by_curvlinops():
    """Name -> factors. Its loss is the sum over tokens, so G is a sum where ours is a mean."""
    curvlinops = pytest.importorskip("curvlinops")

    class Turned(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, rows):
            return self.model(rows).transpose(1, 2)  # (batch, vocab, length), as the loss wants it

    model, rows = Turned(fixed_model()), fixed_rows()
    weights = [layer.weight for layer in anatomy.projections(model.model).values()]
    kfac = curvlinops.KFACLinearOperator(
        model,
        nn.CrossEntropyLoss(reduction="sum"),
        weights,
        [(rows[:, :-1], rows[:, 1:])],
        check_deterministic=False,
        fisher_type=curvlinops.FisherType.EMPIRICAL,
        kfac_approx=curvlinops.KFACType.EXPAND,
    )
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        dense = kfac @ torch.eye(sum(weight.numel() for weight in weights))
    n = rows[:, 1:].numel()
    sides = {
        name: Factors(
            kfac._input_covariances[f"model.{name}"],
            kfac._gradient_covariances[f"model.{name}"] / n,
        )
        for name in anatomy.projections(model.model)
    }
    return sides, dense / n


def test_factors_and_the_diagonal_are_those_of_curvlinops():
    theirs, dense = by_curvlinops()
    start = 0
    for name, factors in kronecker_factors(fixed_model(), fixed_rows()).items():
        torch.testing.assert_close(factors.inputs, theirs[name].inputs, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(factors.outputs, theirs[name].outputs, atol=1e-5, rtol=1e-5)
        diagonal = factors.diagonal().flatten()
        block = dense.diagonal()[start : start + len(diagonal)]
        torch.testing.assert_close(diagonal, block, atol=1e-5, rtol=1e-5)
        start += len(diagonal)


def test_recorded_values_are_those_of_curvlinops():
    theirs, _ = by_curvlinops()
    recorded = study.by_curvlinops()
    assert recorded.keys() == theirs.keys()
    for name, factors in recorded.items():
        torch.testing.assert_close(factors.inputs, theirs[name].inputs, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(factors.outputs, theirs[name].outputs, atol=1e-5, rtol=1e-5)


def test_factors_equal_the_recorded_values():
    recorded, ours = study.by_curvlinops(), kronecker_factors(fixed_model(), fixed_rows())
    assert recorded.keys() == ours.keys()
    for name, factors in ours.items():
        torch.testing.assert_close(factors.inputs, recorded[name].inputs, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(factors.outputs, recorded[name].outputs, atol=1e-5, rtol=1e-5)


# The product, and nearer ones.


def tokens(n=30, size=4, out=3):
    draw = torch.Generator().manual_seed(2)
    x, g = (torch.randn(n, width, generator=draw) for width in (size, out))
    return x * (0.2 + g[:, :1].abs()), g  # how large x is depends on g


def fisher(x, g):
    """(out in, out in): the mean of each token's outer product."""
    flat = torch.einsum("ti,tj->tij", g, x).flatten(1)
    return flat.t() @ flat / len(flat)


def dense(terms):
    return sum(torch.kron(term.outputs, term.inputs) for term in terms)


def test_a_rise_is_the_quadratic_form_of_the_product():
    x, g = tokens()
    factors = Factors(x.t() @ x / 30, g.t() @ g / 30)
    change = torch.randn(3, 4)
    flat = change.flatten()
    torch.testing.assert_close(factors.rise(change), flat @ dense([factors]) @ flat / 2)
    one = torch.zeros(3, 4).index_put_((torch.tensor(1), torch.tensor(2)), torch.tensor(0.5))
    torch.testing.assert_close(factors.rise(one), factors.diagonal()[1, 2] * 0.5**2 / 2)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_nearest_products_are_those_of_the_singular_values(rank):
    x, g = tokens()
    terms = cv.nearest_kronecker(x.double(), g.double(), rank, steps=200)
    whole = fisher(x.double(), g.double())
    # rearranged so that a Kronecker product is an outer product: rows (out out), columns (in in)
    rearranged = whole.view(3, 4, 3, 4).permute(0, 2, 1, 3).reshape(9, 16)
    u, s, v = torch.linalg.svd(rearranged, full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ v[:rank]
    found = sum(torch.outer(t.outputs.flatten(), t.inputs.flatten()) for t in terms)
    torch.testing.assert_close(found, best, atol=1e-6, rtol=1e-5)
    missed = (s[rank:].square().sum() / s.square().sum()).sqrt().item()
    assert cv.kronecker_error(x.double(), g.double(), terms) == pytest.approx(missed, abs=1e-6)


def test_the_error_is_that_of_the_dense_matrices_and_falls_with_the_rank():
    x, g = (side.double() for side in tokens())
    kfac = Factors(x.t() @ x / len(x), g.t() @ g / len(g))
    whole = fisher(x, g)
    direct = ((whole - dense([kfac])).norm() / whole.norm()).item()
    errors = [cv.kronecker_error(x, g, [kfac])]
    assert errors[0] == pytest.approx(direct)
    errors += [cv.kronecker_error(x, g, cv.nearest_kronecker(x, g, rank)) for rank in (1, 2, 3)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.5 * errors[0]


def test_where_inputs_and_pulls_are_independent_the_product_is_exact():
    g = torch.randn(4, 2, dtype=torch.double).repeat(3, 1)
    x = torch.eye(3, dtype=torch.double).repeat_interleave(4, 0)  # every x with every g
    kfac = Factors(x.t() @ x / 12, g.t() @ g / 12)
    torch.testing.assert_close(fisher(x, g), dense([kfac]))
    assert cv.kronecker_error(x, g, [kfac]) < 1e-6


def test_no_rank_and_no_pairs_are_refused():
    x, g = tokens()
    with pytest.raises(ValueError, match="rank 0"):
        cv.nearest_kronecker(x, g, 0)
    with pytest.raises(ValueError, match="30 inputs, 29 pulls"):
        cv.nearest_kronecker(x, g[1:])
