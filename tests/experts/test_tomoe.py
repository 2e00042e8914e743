import pytest
import torch
from torch.nn import functional as F

from lablib.exercises import tomoe as exercises
from lablib.experts import tomoe
from lablib.experts.accounting import parameters
from lablib.experts.moe import moe_layers
from lablib.models import GPT, GPTConfig
from lablib.models.hub import from_hf
from lablib.studies import tomoe as study
from lablib.training import fit


def small(**options):
    torch.manual_seed(1)
    sizes = {"vocab_size": 50, "dim": 16, "n_layers": 2, "n_heads": 2, "ffn_dim": 20}
    return GPT(GPTConfig(**sizes | {"init_std": 0.3, "max_length": 32} | options))


def tokens(rows=3, length=12):
    return torch.randint(50, (rows, length))


def converted(share=0.5, n_experts=4, **options):
    moe = tomoe.ToMoE(small(), n_experts, share, **options)
    for layer in moe.layers:
        torch.nn.init.normal_(layer.router.weight)
    if moe.hypernetwork:
        for decoder in moe.hypernetwork.decoders:
            torch.nn.init.normal_(decoder.weight)
    return moe


def test_choices_have_one_and_masks_are_0_or_1_with_the_soft_gradient():
    logits = torch.randn(40, 6, requires_grad=True)
    chosen = tomoe.choose(logits, noise=False)
    assert torch.equal(chosen.argmax(1), logits.argmax(1)) and (chosen.sum(1) == 1).all()
    upstream = torch.randn(40, 6)
    (chosen * upstream).sum().backward()
    soft = (logits.detach() / 0.4).requires_grad_()
    (soft.softmax(-1) * upstream).sum().backward()
    torch.testing.assert_close(logits.grad, soft.grad / 0.4)
    kept = tomoe.keep(logits.detach(), noise=False)
    assert torch.equal(kept, (logits > 0).float())


def test_gumbel_draws_are_from_the_softmax_and_keep_has_its_probability():
    torch.manual_seed(0)
    logits = torch.tensor([0.0, 1.0, 2.0])
    share = tomoe.choose(logits.expand(20_000, 3)).mean(0)
    torch.testing.assert_close(share, logits.softmax(-1), atol=0.015, rtol=0)
    kept = tomoe.keep(logits.expand(20_000, 3)).mean(0)
    # P(logit + G > 0) of a Gumbel variable G
    torch.testing.assert_close(kept, 1 - (-logits.exp()).exp(), atol=0.015, rtol=0)


def test_without_masks_it_is_the_dense_model_and_with_all_ones_too():
    text, dense = tokens(), small()
    moe = converted()
    torch.testing.assert_close(moe.dense(text), dense(text))
    moe.fixed = [torch.ones(4, 20)] * 2
    torch.testing.assert_close(moe.eval()(text), dense(text))


def test_a_token_gets_its_experts_units_alone():
    moe = converted().decide()
    layer, x = moe.layers[0], torch.randn(9, 16)
    moe.set_masks(moe.masks())
    for row, made in zip(x, layer(x)):
        expert = (layer.router.weight @ row).argmax()
        units = moe.fixed[0][expert].nonzero()[:, 0]
        hidden = F.silu(layer.gate.weight[units] @ row) * (layer.up.weight[units] @ row)
        torch.testing.assert_close(made, layer.down.weight[:, units] @ hidden)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.75])
def test_gathered_experts_give_the_masked_models_outputs(share):
    text = tokens()
    moe = converted(share).decide()
    masked = moe(text)
    model = tomoe.gather_(moe)
    assert len(moe_layers(model)) == 2
    torch.testing.assert_close(model(text), masked)
    other = converted(share).decide()
    other.fixed = [mask.flip(0) for mask in other.fixed]
    assert not torch.allclose(other(text), masked), "experts of another order are other experts"


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
def test_decided_experts_have_the_share_of_parameters(share):
    moe = converted(share, n_experts=3).decide()
    assert float(tomoe.active_share(moe.fixed)) == pytest.approx(share, abs=0.5 / 40)
    model = tomoe.gather_(moe)
    dense = 3 * 16 * 20 * 2
    routers = 2 * 3 * 16
    rest = small().n_parameters() - dense
    assert parameters(model).active == pytest.approx(rest + routers + share * dense, rel=0.01)


def test_widths_keep_their_proportions_up_to_the_limit():
    assert tomoe.scaled(torch.tensor([10.0, 30.0]), [40, 40], 0.5) == [10, 30]
    assert tomoe.scaled(torch.tensor([1.0, 99.0]), [100, 100], 0.6) == [20, 100]
    assert sum(tomoe.scaled(torch.tensor([3.0, 5.0, 7.0]), [11, 11, 11], 0.5)) == round(16.5)


def test_losses_of_size_and_union():
    masks = [torch.tensor([[1.0, 1, 0, 0], [1, 0, 0, 0]]), torch.tensor([[0.0, 1], [1, 1]])]
    assert tomoe.active_share(masks) == (2 + 2) / 6
    assert tomoe.union(masks[0]) == 0.5 and tomoe.union(masks[1]) == 1
    half = torch.tensor(0.25)
    assert tomoe.ratio_loss(half, 0.5) == pytest.approx(0.6931, abs=1e-3)
    assert tomoe.ratio_loss(half, 0.125) == pytest.approx(0.6931, abs=1e-3)
    assert tomoe.ratio_loss(half, 0.25) == 0


def test_training_changes_masks_and_routers_and_no_weight_of_the_model():
    moe = converted()
    before = {name: p.clone() for name, p in moe.named_parameters()}
    fit(moe, [tokens(4, 13)], steps=3, loss=tomoe.tomoe_loss, lr=1e-2, progress=False)
    changed = {name for name, p in moe.named_parameters() if not torch.equal(p, before[name])}
    learned = {n for n in before if "router" in n or n.startswith("hypernetwork")}
    assert changed == learned and len(learned) > 4


def test_training_comes_nearer_to_the_share():
    moe = converted(0.3)
    start = tomoe.active_share(moe.eval().masks()).item()
    fit(moe.train(), [tokens(4, 13)], steps=40, loss=tomoe.tomoe_loss, lr=1e-2, progress=False)
    end = tomoe.active_share(moe.eval().masks()).item()
    assert abs(end - 0.3) < abs(start - 0.3) / 2


def test_static_pruning_keeps_the_best_scored_units():
    moe = converted(0.5, n_experts=1)
    layer = moe.layers[0]
    scores = tomoe.by_magnitude(layer)
    unit = 7
    by_hand = (
        layer.gate.weight[unit].norm()
        * layer.up.weight[unit].norm()
        * layer.down.weight[:, unit].norm()
    )
    torch.testing.assert_close(scores[unit], by_hand)
    text = tokens()
    active = tomoe.by_activation(moe, text)
    x = moe.model.blocks[0].attention_norm(moe.model.embedding(text))
    assert [len(row) for row in active] == [20, 20] and x.shape == (3, 12, 16)
    tomoe.prune_(moe, active)
    kept = active[1].argsort(descending=True)[:10]
    assert set(moe.fixed[1][0].nonzero()[:, 0].tolist()) == set(kept.tolist())
    tomoe.prune_(moe, [active[0], 10 * active[1].max() + active[1]], together=True)
    assert [int(mask.sum()) for mask in moe.fixed] == [0, 20], "one list for all layers"


def test_activation_scores_are_what_a_unit_writes():
    moe = converted(0.5, n_experts=1)
    seen = []
    layer = moe.layers[1]
    hook = layer.register_forward_hook(lambda part, given, made: seen.append(given[0]))
    text = tokens()
    (score,) = tomoe.by_activation(moe, text)[1:]
    hook.remove()
    hidden = F.silu(layer.gate(seen[0])) * layer.up(seen[0])
    rms = hidden.square().mean((0, 1)).sqrt()
    torch.testing.assert_close(score, rms * layer.down.weight.norm(dim=0))


def test_units_needed_are_counted_a_token_and_for_all():
    model = small(n_layers=1, dim=4, n_heads=2, ffn_dim=5)
    mlp = model.blocks[0].mlp
    mlp.down.weight.data = torch.eye(4, 5)
    mlp.down.weight.data[0, 4] = 1.0  # each unit writes with norm 1
    spoken = torch.tensor([[8.0, 1, 1, 0, 0], [0, 0, 0, 5, 5]])
    mlp.down.register_forward_pre_hook(lambda part, given: (spoken[None],))
    own, same = tomoe.units_needed(model, tokens(1, 2), part=0.85)[0].tolist()
    assert own == pytest.approx((2 + 2) / 2 / 5) and same == pytest.approx(3 / 5)


def test_routed_values_keep_k_dimensions_of_each_tokens_values():
    text, dense = tokens(), small()
    moe = converted(values=3).decide()
    part, block = moe.values[0], moe.model.blocks[0]
    seen = []
    block.attention.output.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    moe(text)
    assert (part.mask.sum(-1) == 3).all()
    heads = seen[0].unflatten(-1, (2, 8))
    assert ((heads != 0).any(-2) <= part.mask.bool()).all(), "no head reads another dimension"
    torch.testing.assert_close(moe.dense(text), dense(text))
    all_of_them = converted(values=8)
    all_of_them.fixed = [torch.ones(4, 20)] * 2
    torch.testing.assert_close(all_of_them.eval()(text), dense(text))


def test_it_converts_transformers_models():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=20, num_hidden_layers=2,
        num_attention_heads=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    text = tokens()
    dense = model(text).logits
    moe = tomoe.ToMoE(model, 4, 0.5)
    torch.testing.assert_close(moe.dense(text), dense)
    masked = moe.decide()(text)
    torch.testing.assert_close(tomoe.gather_(moe)(text).logits, masked)


@pytest.mark.parametrize("kind", ["activation", "tomoe"])
def test_the_study_converts_any_llama(kind, monkeypatch):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=20, num_hidden_layers=2,
        num_attention_heads=2,
    )  # fmt: skip
    hub = transformers.LlamaForCausalLM(config)
    monkeypatch.setattr(study, "fresh", lambda name: from_hf(hub).eval())
    monkeypatch.setattr(study, "texts", lambda name: (tokens(1, 9000)[0], tokens(1, 2000)[0]))
    made = study.run(0, kind, 0.5, steps=2, model="a llama", rows=4, batch=2)
    assert made["active"] == 0.5 and sum(made["widths"]) == 20
    assert made["loss"] != made["dense"]


def test_only_decided_layers_can_be_gathered():
    moe = converted()
    with pytest.raises(ValueError, match="once decided"):
        tomoe.gathered(moe.layers[0])


def every_copy(masks, dim):
    return 3 * dim * int(masks.sum(1).max()), 3 * dim * int(masks.sum())


def one_matrix(masks, dim):
    return dim * int(masks.sum(1).max()), dim * int((masks.sum(0) > 0).sum())


def all_units(masks, dim):
    return 3 * dim * int(masks.sum(1).max()), 3 * dim * masks.shape[1]


def first_expert(masks, dim):
    return 3 * dim * int(masks[0].sum()), 3 * dim * int((masks.sum(0) > 0).sum()) + 1


def through_hard(logits, noise, upstream, temperature):
    return upstream * (((logits + noise) / temperature) > 0).float()


def without_temperature(logits, noise, upstream, temperature):
    soft = ((logits + noise) / temperature).sigmoid()
    return upstream * soft * (1 - soft)


def without_noise(logits, noise, upstream, temperature):
    return exercises._keep_gradient(logits, 0 * noise, upstream, temperature)


def straight(logits, noise, upstream, temperature):
    return upstream.clone()


def kept_by_any(masks):
    shared = (masks.sum(0, keepdim=True) > 0).long()
    return torch.cat([shared, masks * (1 - shared)])


def twice(masks):
    return torch.cat([masks.prod(0, keepdim=True), masks])


def kept_by_two(masks):
    shared = (masks.sum(0, keepdim=True) > 1).long()
    return torch.cat([shared, masks * (1 - shared)])


WRONG = {
    "parameters": [every_copy, one_matrix, all_units, first_expert],
    "keep_gradient": [through_hard, without_temperature, without_noise, straight],
    "split_shared": [kept_by_any, twice, kept_by_two],
}


@pytest.mark.parametrize("name", WRONG)
def test_exercises_tell_right_from_wrong(name, tells_right_from_wrong):
    tells_right_from_wrong(getattr(exercises, name), WRONG[name])
