"""OLMoE: the layer against its definition and transformers, and the analyses by brute force."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lablib.exercises import olmoe as exercises
from lablib.experts import olmoe, statistics
from lablib.experts.accounting import parameters
from lablib.experts.hub import WideNorm, from_hf_moe
from lablib.experts.moe import MoE, moe_layers
from lablib.models import GPT, GPTConfig
from lablib.training import fit
from lablib.training.losses import auxiliary_loss, next_token_loss


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Expert(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, gate_up, down):
        super().__init__()
        self.gate_up, self.down = nn.Parameter(gate_up.clone()), nn.Parameter(down.clone())

    def forward(self, x):
        gate, up = F.linear(x, self.gate_up).chunk(2, -1)
        return F.linear(F.silu(gate) * up, self.down)


def both_layers(n=6, top_k=3):
    fast = olmoe.olmoe_layer(8, 10, n, top_k)
    for weight in fast.parameters():
        weight.data.normal_(0, 0.5)
    pairs = zip(fast.experts.gate_up.data, fast.experts.down.data)
    definition = olmoe.OLMoEFFN(8, [Expert(*pair) for pair in pairs], top_k)
    definition.router.weight.data.copy_(fast.router.weight)
    return definition, fast


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(29, 8), (3, 17, 8)])
def test_the_fast_layer_is_the_definition(shape, training):
    sides = []
    for layer in both_layers():
        torch.manual_seed(1)
        x = torch.randn(shape, requires_grad=True)
        y = layer.train(training)(x)
        loss = auxiliary_loss(layer)
        assert torch.is_tensor(loss) == training
        (y.square().sum() + loss).backward()
        sides.append([y.detach(), torch.as_tensor(loss), x.grad, layer.router.weight.grad])
    for ours, theirs in zip(*sides):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def small(n_layers=2, **options):
    sizes = {"vocab_size": 40, "dim": 16, "n_heads": 2, "max_length": 32, "ffn_dim": 32}
    return GPT(GPTConfig(n_layers=n_layers, **sizes | options))


@pytest.mark.parametrize("kind", [(16, 4), (4, 1), (32, 8)])
def test_granularity_keeps_weights_but_for_the_routers(kind):
    n_experts, top_k = kind
    model = olmoe.olmoe_(small(), n_experts, top_k)
    total, active = parameters(model)
    routers = sum(layer.router.weight.numel() for layer in moe_layers(model).values())
    coarse = parameters(olmoe.olmoe_(small(), 4, 1))
    assert total - routers == coarse.total - 2 * 4 * 16
    assert active - routers == coarse.active - 2 * 4 * 16
    assert all(isinstance(block.mlp, MoE) for block in model.blocks)
    assert isinstance(model.blocks[0].attention.query_norm, WideNorm)
    assert model(torch.randint(40, (2, 9))).shape == (2, 9, 40)


def test_a_width_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="a width of 32 can't be split among 3 experts"):
        olmoe.olmoe_(small(), 9, 3)


def theirs(**options):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 12, "vocab_size": 40, "num_experts": 6}
    config = transformers.OlmoeConfig(**sizes, num_experts_per_tok=3, pad_token_id=0, **options)
    return transformers.OlmoeForCausalLM(config).eval()


def test_routes_of_transformers_model_and_of_ours_are_the_same():
    model = theirs()
    text = torch.randint(40, (3, 11))
    wanted = olmoe.routes(model, text)
    assert wanted.shape == (2, 33, 3)
    assert torch.equal(olmoe.routes(from_hf_moe(model), text), wanted)


def test_routes_leave_modes_alone():
    model = olmoe.olmoe_(small(), 8, 2)
    model.blocks[0].eval()
    olmoe.routes(model, torch.randint(40, (2, 9)))
    assert model.training and not model.blocks[0].training


def test_saturation_by_brute_force():
    seen = [torch.rand(2, 30, 8).topk(3).indices for _ in range(4)]
    curve = olmoe.saturation_curve(seen)
    assert curve.shape == (4, 2) and (curve[-1] == 1).all()
    for (at, early), layer in itertools.product(enumerate(seen), range(2)):
        pairs = zip(early[layer].tolist(), seen[-1][layer].tolist())
        common = [len(set(a) & set(b)) / 3 for a, b in pairs]
        assert curve[at, layer].item() == pytest.approx(sum(common) / 30, abs=1e-6)


def test_specialization_and_co_activation_by_brute_force():
    experts, domains = torch.rand(50, 6).topk(2).indices, torch.arange(50) % 3
    shares = statistics.specialization(experts, domains, 6, 3)
    together = statistics.co_activation(experts, 6)
    rows = list(zip(experts.tolist(), domains.tolist()))
    for domain, expert in itertools.product(range(3), range(6)):
        mine = [expert in row for row, of in rows if of == domain]
        assert shares[domain, expert].item() == pytest.approx(sum(mine) / len(mine), abs=1e-6)
    for one, other in itertools.product(range(6), repeat=2):
        mine = [other in row for row, _ in rows if one in row]
        assert together[one, other].item() == pytest.approx(sum(mine) / len(mine), abs=1e-6)


def test_domain_distance_is_what_would_have_to_move():
    alike = torch.tensor([[0, 1], [1, 2], [0, 1], [1, 2]])
    domains = torch.tensor([0, 0, 1, 1])
    assert olmoe.domain_distance(alike, domains, 4, 2) == 0
    apart = torch.tensor([[0, 1], [0, 1], [2, 3], [2, 3]])
    assert olmoe.domain_distance(apart, domains, 4, 2) == 0.5
    half = torch.tensor([[0, 1], [0, 1], [0, 2], [0, 2]])
    assert olmoe.domain_distance(half, domains, 4, 2) == 0.25


def test_vocabulary_specialization_by_brute_force():
    experts = torch.rand(400, 5).topk(2).indices
    ids = torch.randint(0, 12, (400,))
    ids[:3] = 19
    shares = []
    for token in range(12):
        first = [row[0] for row, at in zip(experts.tolist(), ids.tolist()) if at == token]
        shares.append(max(first.count(expert) for expert in range(5)) / len(first))
    found = olmoe.vocabulary_specialization(experts, ids, 5, 20)
    assert found == pytest.approx(sum(shares) / 12, abs=1e-6)
    with pytest.raises(ValueError, match="no id occurs 500 times"):
        olmoe.vocabulary_specialization(experts, ids, 5, 20, least=500)


def test_watching_reads_routes_every_few_steps_and_changes_no_weight():
    text, probe = torch.randint(40, (3, 21)), torch.randint(40, (2, 10))
    models, seen = [], []
    for loss in (next_token_loss, olmoe.watching(probe, seen, 2)):
        torch.manual_seed(1)
        models.append(olmoe.olmoe_(small(), 8, 2))
        fit(models[-1], [text], steps=5, seed=0, loss=loss, held_out=[text], progress=False)
    assert len(seen) == 3 and seen[0].shape == (2, 20, 2)
    for one, other in zip(models[0].parameters(), models[1].parameters()):
        assert torch.equal(one, other)


def test_the_routers_z_is_the_mean_of_the_layers():
    model = olmoe.olmoe_(small(), 8, 2, balance=0.0, z=1.0).train()
    text = torch.randint(40, (3, 10))
    model(text[:, :-1])
    expected = sum(layer.router.auxiliary_loss for layer in moe_layers(model).values()) / 2
    assert olmoe.router_z(model, [text]) == pytest.approx(expected.item(), rel=1e-5)


def in_place(early, late):
    return (early == late).float().mean().item()


def of_anyone(early, late):
    return torch.isin(early, late).float().mean().item()


def of_the_experts(experts, domains, n_experts, n_domains):
    shares = exercises._specialization(experts, domains, n_experts, n_domains)
    counts = shares * domains.bincount(minlength=n_domains)[:, None]
    return counts / counts.sum(0)


def of_all(experts, domains, n_experts, n_domains):
    shares = exercises._specialization(experts, domains, n_experts, n_domains)
    return shares * domains.bincount(minlength=n_domains)[:, None] / len(domains)


def averaged(x, gate, up, down, parts, asked):
    return exercises._asked_parts(x, gate, up, down, parts, asked) / len(asked)


def the_others(x, gate, up, down, parts, asked):
    rest = [part for part in range(parts) if part not in asked] or asked
    return exercises._asked_parts(x, gate, up, down, parts, rest)


def in_stripes(x, gate, up, down, parts, asked):
    works = torch.isin(torch.arange(len(gate)) % parts, torch.tensor(asked))
    return (F.silu(x @ gate[works].t()) * (x @ up[works].t())) @ down[:, works].t()


WRONG = {
    "saturation": [in_place, of_anyone],
    "specialization": [of_the_experts, of_all],
    "asked_parts": [averaged, the_others, in_stripes],
}


@pytest.mark.parametrize("name", WRONG)
def test_exercises_tell_right_from_wrong(name, tells_right_from_wrong):
    tells_right_from_wrong(getattr(exercises, name), WRONG[name])
