"""Switch Transformers: the layer against transformers, and each part of section 2.4 and 4.2."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lablib.exercises import switch_transformers as exercises
from lablib.experts import switch_transformers as st
from lablib.experts.hub import from_hf_switch
from lablib.experts.moe import MoE, moe_layers, recorded
from lablib.experts.routing import TokenChoice, load_balancing_loss
from lablib.models import GPT, GPTConfig, SwiGLU, anatomy
from lablib.training import fit
from lablib.training.losses import auxiliary_loss, next_token_loss


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def small(**options):
    sizes = {"vocab_size": 40, "dim": 16, "n_layers": 4, "n_heads": 2, "max_length": 32}
    return GPT(GPTConfig(**sizes | options))


def tokens(rows=3, length=20):
    return torch.randint(40, (rows, length))


def test_every_second_feed_forward_layer_is_replaced_at_equal_width():
    dense, model = small(), st.switch_(small(), 4)
    kinds = [isinstance(block.mlp, MoE) for block in model.blocks]
    assert kinds == [False, True, False, True]
    width = dense.config.ffn_dim
    assert model.blocks[1].mlp.experts.gate_up.shape == (4, 2 * width, 16)
    one, four = (st.switch_(small(), n).n_parameters() for n in (1, 4))
    assert four - one == 2 * 3 * (3 * 16 * width + 16)
    assert model(tokens()).shape == (3, 20, 40)
    with pytest.raises(ValueError, match="4 blocks have no 5th one"):
        st.switch_(small(), 4, every=5)


def test_what_is_switched_already_is_refused_and_left_as_it_was():
    model = st.switch_(small(), 4)
    before = [block.mlp for block in model.blocks]
    with pytest.raises(ValueError, match="block 1 is a mixture of experts already"):
        st.switch_(model, 4, every=1)
    assert [block.mlp for block in model.blocks] == before
    model.blocks[1].mlp = st.SwitchFFN(16, [nn.Linear(16, 16)])
    with pytest.raises(ValueError, match="block 1"):
        st.switch_(model, 4)


def test_switch_works_on_a_llama_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = st.switch_(transformers.LlamaForCausalLM(config), 3, every=1)
    assert list(moe_layers(model)) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert anatomy.logits(model, tokens()).shape == (3, 20, 40)


@pytest.mark.parametrize("capacity", [1, 3, 20])
def test_equals_the_switch_layer_of_transformers(capacity):
    theirs_of = pytest.importorskip(
        "transformers.models.switch_transformers.modeling_switch_transformers"
    )
    from transformers import SwitchTransformersConfig, __version__

    if capacity < 20 and tuple(map(int, __version__.split(".")[:2])) < (5, 18):
        pytest.skip("transformers drops no token before 5.18")
    config = SwitchTransformersConfig(
        d_model=8, d_ff=12, num_experts=4, expert_capacity=capacity, dropout_rate=0.0
    )
    theirs = theirs_of.SwitchTransformersSparseMLP(config).eval()
    for parameter in theirs.parameters():
        parameter.data.normal_()
    fast = from_hf_switch(theirs, capacity_factor=capacity * 4 / 20)
    definition = st.SwitchFFN(
        8, [FromT5(one) for one in theirs.experts.values()], capacity * 4 / 20
    )
    definition.router.weight.data.copy_(theirs.router.classifier.weight)
    x = torch.randn(3, 20, 8)
    with torch.no_grad():
        assert torch.allclose(fast.eval()(x), theirs(x), atol=1e-5)
        for text in x:  # the definition's capacity is of the batch
            assert torch.allclose(definition(text), theirs(text[None])[0], atol=1e-5)


class FromT5(nn.Module):
    def __init__(self, expert):
        super().__init__()
        self.expert = expert

    def forward(self, rows):
        return self.expert.wo(F.relu(self.expert.wi(rows)))


def both_layers(n_experts, capacity_factor, alpha=0.1):
    """The definition, with plain SwiGLU layers for experts, and the fast layer of its weights."""
    config = GPTConfig(dim=6, ffn_dim=10, n_heads=1)
    experts = [SwiGLU(config) for _ in range(n_experts)]
    definition = st.SwitchFFN(6, experts, capacity_factor, alpha)
    options = {"capacity_factor": capacity_factor, "balance": alpha, "jitter": 0.0}
    fast = st.switch_layer(6, 10, n_experts, **options)
    fast.router.weight.data.copy_(definition.router.weight)
    for index, one in enumerate(experts):
        fast.experts.gate_up.data[index] = torch.cat([one.gate.weight, one.up.weight])
        fast.experts.down.data[index] = one.down.weight
    return definition, fast


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("capacity_factor", [0.5, 9.0])
@pytest.mark.parametrize("shape", [(29, 6), (3, 17, 6)])
def test_the_fast_layer_is_the_definition(shape, capacity_factor, training):
    definition, fast = both_layers(5, capacity_factor)
    x = torch.randn(shape)
    sides = []
    for layer in (definition.train(training), fast.train(training)):
        given = x.clone().requires_grad_()
        y = layer(given)
        loss = auxiliary_loss(layer)
        assert torch.is_tensor(loss) == training
        (y.square().sum() + loss).backward()
        sides.append([y.detach(), torch.as_tensor(loss), given.grad, layer.router.weight.grad])
    for ours, theirs in zip(*sides):
        torch.testing.assert_close(ours, theirs)
    for index, one in enumerate(definition.experts):
        gate_up = torch.cat([one.gate.weight.grad, one.up.weight.grad])
        torch.testing.assert_close(fast.experts.gate_up.grad[index], gate_up)
        torch.testing.assert_close(fast.experts.down.grad[index], one.down.weight.grad)
    dropped = (sides[0][0] == 0).all(-1).sum()
    assert (dropped > 0) == (training and capacity_factor < 9)


def test_the_output_is_the_probability_times_the_chosen_experts_output():
    layer = st.switch_layer(6, 10, 3, capacity_factor=None).eval()
    x = torch.randn(7, 6)
    probs = (x @ layer.router.weight.t()).softmax(-1)
    for row, share, out in zip(x, probs, layer(x)):
        best = share.argmax()
        gate, up = (layer.experts.gate_up[best] @ row).chunk(2)
        expected = share[best] * (layer.experts.down[best] @ (F.silu(gate) * up))
        assert torch.allclose(out, expected, atol=1e-6)


def test_the_balancing_loss_is_left_for_fit_and_lowers_the_fullest_experts_probability():
    layer = st.switch_layer(6, 10, 4, jitter=0.0)
    layer.router.weight.data.zero_()
    layer.router.weight.data[2] = 1.0
    x = torch.rand(50, 6) + 0.5
    layer(x)
    auxiliary_loss(layer).backward()
    layer.router.weight.data -= 100 * layer.router.weight.grad
    after = (x @ layer.router.weight.t()).softmax(-1).mean(0)
    layer.router.weight.data.zero_()
    layer.router.weight.data[2] = 1.0
    assert after[2] < (x @ layer.router.weight.t()).softmax(-1).mean(0)[2]


@pytest.mark.parametrize("scale", [0.1, 1.0])
def test_reduced_initialization_has_the_papers_deviation(scale):
    model = st.reduced_init_(st.switch_(small(dim=64, n_layers=2), 4), scale)
    weights = [model.blocks[0].attention.query.weight, *model.blocks[1].mlp.experts.parameters()]
    for weight in weights:
        bound = math.sqrt(scale / weight.shape[-1])
        # A normal distribution cut at two standard deviations keeps 0.880 of its own.
        assert weight.std().item() == pytest.approx(0.880 * bound, rel=0.05)
        assert weight.abs().max() <= 2 * bound
    before = small()
    embedding = before.embedding.weight.clone()
    assert torch.equal(st.reduced_init_(before).embedding.weight, embedding)
    assert before.head.weight is before.embedding.weight


def test_selective_precision_keeps_the_router_exact_in_a_bfloat16_model():
    layer = st.switch_layer(32, 16, 8, capacity_factor=None).bfloat16().eval()
    layer.router.weight.data.mul_(10)
    x = torch.randn(500, 32).bfloat16()
    exact = x.double() @ layer.router.weight.double().t()
    kept = layer.router.logits(x)
    rounded = st.BFloat16Router.of(layer.router).logits(x)
    assert kept.dtype == torch.float32 and rounded.dtype == torch.bfloat16
    assert (kept - exact).abs().max() < 1e-5 < 1e-3 < (rounded - exact).abs().max()
    assert layer(x).dtype == torch.bfloat16


def test_a_bfloat16_router_serves_in_a_layer():
    layer = st.switch_layer(8, 16, 4, capacity_factor=None).eval()
    x = torch.randn(20, 8)
    expected = layer(x)
    layer.router = st.BFloat16Router.of(layer.router)
    assert isinstance(layer.router, TokenChoice) and not layer.router.training
    assert torch.allclose(layer(x), expected, atol=1e-2)


def test_expert_dropout_acts_between_the_two_products_in_training_alone():
    layer = st.switch_layer(6, 2000, 2, expert_dropout=0.4, jitter=0.0, capacity_factor=None)
    plain = st.switch_layer(6, 2000, 2, jitter=0.0, capacity_factor=None)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(9, 6)
    assert torch.equal(layer.eval()(x), plain.eval()(x))
    layer.train()
    layer.experts.gate_up.data.fill_(1.0)  # all hidden values of a row are equal
    layer.experts.down.data.fill_(1.0)
    dropped = layer(torch.ones(9, 6))
    whole = layer.eval()(torch.ones(9, 6))
    ratio = dropped / whole
    assert ratio.std() > 0 and ratio.mean().item() == pytest.approx(1.0, abs=0.05)
    kept = ratio * 0.6 * 2000  # a whole number of hidden units
    assert (kept - kept.round()).abs().max() < 0.05


def test_dropout_of_fine_tuning_sets_both_rates_and_can_be_removed():
    model = st.switch_(small(n_layers=2), 2, capacity_factor=None, jitter=0.0)
    st.reduced_init_(model, 1.0)
    text = tokens()
    plain = model(text)
    assert torch.equal(model(text), plain)
    st.add_dropout(model, 0.5, 0.0)
    assert not torch.allclose(model(text), plain)
    assert torch.equal(model.eval()(text), plain)
    st.add_dropout(model.train(), 0.0, 0.0)
    assert torch.equal(model(text), plain)
    st.add_dropout(model, 0.0, 0.9)
    assert model.blocks[1].mlp.experts.dropout.p == 0.9
    assert not torch.allclose(model(text), plain)


def test_dropout_added_twice_has_the_second_rate():
    model = st.switch_(small(n_layers=2), 2)
    for rate in (0.2, 0.5):
        st.add_dropout(model, rate, 0.4)
    seen = []
    part = model.blocks[0].mlp
    part.down.register_forward_hook(lambda module, inputs, output: seen.append(output))
    x = torch.rand(400, 16) + 0.1
    out = part(x)
    assert (out == 0).float().mean().item() == pytest.approx(0.5, abs=0.03)
    kept = out != 0
    torch.testing.assert_close(out[kept], 2 * seen[0][kept])


def test_dropout_reaches_the_attention_of_transformers_and_says_where_it_cannot():
    transformers = pytest.importorskip("transformers")
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.LlamaConfig(vocab_size=40, hidden_size=16, **sizes)
    model = transformers.LlamaForCausalLM(config)
    text = tokens()
    st.add_dropout(model, 0.5, 0.0)
    assert not torch.allclose(model(text).logits, model(text).logits)
    from lablib.experts.moe import SwiGLUExperts

    anatomy.replace_part(model, 0, "mlp", MoE(TokenChoice(16, 2), SwiGLUExperts(2, 16, 8)))
    with pytest.raises(ValueError, match="SwiGLUExperts have no dropout"):
        st.add_dropout(model, 0.1, 0.4)


def test_a_student_gets_all_weights_but_those_of_experts():
    teacher, student = st.switch_(small(n_layers=2), 4), small(n_layers=2)
    own = student.blocks[1].mlp.gate.weight.clone()
    copied = st.copy_non_experts_(student, teacher)
    assert torch.equal(student.blocks[0].mlp.gate.weight, teacher.blocks[0].mlp.gate.weight)
    assert torch.equal(student.embedding.weight, teacher.embedding.weight)
    assert torch.equal(student.blocks[1].mlp.gate.weight, own)
    missing = {name for name, _ in student.named_parameters()} - set(copied)
    assert missing == {f"blocks.1.mlp.{role}.weight" for role in ("gate", "up", "down")}
    with pytest.raises(ValueError, match="no parameter of one name and shape"):
        st.copy_non_experts_(student, nn.Linear(2, 2))


def test_distillation_mixes_teacher_and_labels():
    logits, teacher = torch.randn(2, 5, 7, requires_grad=True), torch.randn(2, 5, 7)
    targets = torch.randint(7, (2, 5))
    hard = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    soft = -(teacher.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
    found = st.distill_loss(logits, teacher, targets)
    assert found.item() == pytest.approx((0.25 * soft + 0.75 * hard).item(), rel=1e-5)
    only = st.distill_loss(logits, teacher, targets, teacher_weight=0.0)
    assert only.item() == pytest.approx(hard.item(), rel=1e-6)
    # Cross-entropy with the teacher is lowest where the student is the teacher.
    same = st.distill_loss(teacher, teacher, targets, 1.0)
    assert same < st.distill_loss(logits, teacher, targets, 1.0)


def test_distilling_gives_no_gradient_to_the_teacher():
    teacher, student = st.switch_(small(n_layers=2), 4), small(n_layers=2)
    st.distilling(teacher)(student, tokens()).backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in student.parameters())
    assert not teacher.training


def test_steps_to_a_loss_are_read_between_points():
    assert st.steps_to([10, 20, 30], [3.0, 2.0, 1.5], 2.5) == 15
    assert st.steps_to([10, 20], [3.0, 2.0], 3.5) == 10
    assert st.steps_to([10, 20], [3.0, 2.0], 1.0) == math.inf


def test_speed_up_is_of_steps_to_the_higher_final_loss_and_turns_over():
    steps = [0, 100, 200, 300, 400]
    slow, fast = [4.0, 3.5, 3.0, 2.5, 2.0], [4.0, 3.0, 2.0, 1.5, 1.0]
    assert st.speed_up(steps, slow, fast) == 2
    assert st.speed_up(steps, fast, slow) == 0.5
    assert st.speed_up(steps, slow, slow) == 1


def test_watched_loads_count_what_tokens_ask_for():
    model = st.switch_(small(n_layers=2), 4, capacity_factor=0.25)
    text = tokens()
    with st.watched_load(model) as loads:
        model(text)
        model(text)
        model.eval()(text)
    model.train()(text)
    assert list(loads) == ["blocks.1.mlp"] and len(loads["blocks.1.mlp"]) == 2
    assert all(int(counts.sum()) == 60 for counts in loads["blocks.1.mlp"])


@pytest.mark.parametrize("factor", [0.25, 1.0, 1.25, 4.0])
def test_dropped_shares_equal_what_the_layer_drops(factor):
    layer = st.switch_layer(6, 8, 5, capacity_factor=factor, jitter=0.0)
    layer.router.weight.data.mul_(50)
    with recorded(nn.Sequential(layer)) as records:
        layer(torch.randn(101, 6) + 0.5)
    (record,) = records["0"]
    asked = record.experts.flatten().bincount(minlength=5)
    dropped = 1 - int(record.counts.sum()) / 101
    assert st.dropped_at(asked, factor).item() == pytest.approx(dropped, abs=1e-6)
    if factor < 1:
        assert dropped > 0


def test_dropped_shares_have_the_layers_capacity_where_binary_arithmetic_rounds_up():
    """1.1 * 40 / 4 is a little more than 11, the layer's capacity is 11."""
    asked = torch.tensor([[12, 10, 10, 8], [10, 10, 10, 10], [0, 0, 0, 0]])
    torch.testing.assert_close(st.dropped_at(asked, 1.1), torch.tensor([1 / 40, 0.0, 0.0]))
    layer = st.switch_layer(4, 8, 4, capacity_factor=1.1, jitter=0.0)
    layer.router.weight.data.copy_(torch.eye(4))
    x = torch.eye(4)[torch.repeat_interleave(torch.arange(4), asked[0])]
    assert int(layer.router(x).counts.sum()) == 39


def ignores_capacity(experts, n_experts, capacity_factor):
    return 0


def pools_capacity(experts, n_experts, capacity_factor):
    return max(0, len(experts) - int(capacity_factor * len(experts)))


def rounds_down(experts, n_experts, capacity_factor):
    places = int(capacity_factor * len(experts) / n_experts)
    return sum(max(0, count - places) for count in experts.bincount(minlength=n_experts).tolist())


def rounds_to_nearest(experts, n_experts, capacity_factor):
    places = round(capacity_factor * len(experts) / n_experts)
    return sum(max(0, count - places) for count in experts.bincount(minlength=n_experts).tolist())


def forgets_the_factor(experts, n_experts, capacity_factor):
    return exercises._dropped(experts, n_experts, 1.0)


def by_probabilities(probs, experts):
    share = experts.bincount(minlength=probs.shape[1]) / len(experts)
    return (probs.shape[1] * share / len(experts)).expand_as(probs)


def without_the_mean(probs, experts):
    return probs * by_probabilities(probs, experts)


def downhill(probs, experts):
    return -exercises._balance_gradient(probs, experts)


def without_n_experts(probs, experts):
    return exercises._balance_gradient(probs, experts) / probs.shape[1]


def of_each_token_apart(probs, experts):
    return exercises._balance_gradient(probs, experts) * len(probs)


def any_free_place(probs, places):
    free, expert = [places] * probs.shape[1], []
    for order in probs.argsort(1, descending=True).tolist():
        expert.append(next((i for i in order if free[i]), -1))
        if expert[-1] >= 0:
            free[expert[-1]] -= 1
    return torch.tensor(expert)


def no_limit_for_second(probs, places):
    second = probs.topk(2, dim=1).indices[:, 1]
    first = exercises._first_choice(probs, places)
    return torch.where(first < 0, second, first)


WRONG = {
    "dropped": [
        ignores_capacity,
        pools_capacity,
        rounds_down,
        rounds_to_nearest,
        forgets_the_factor,
    ],
    "balance_gradient": [
        by_probabilities,
        without_the_mean,
        downhill,
        without_n_experts,
        of_each_token_apart,
    ],
    "second_choice": [
        exercises._first_choice,
        exercises._in_turn,
        any_free_place,
        no_limit_for_second,
    ],
}


@pytest.mark.parametrize("name", WRONG)
def test_exercises_tell_right_from_wrong(name, tells_right_from_wrong):
    tells_right_from_wrong(getattr(exercises, name), WRONG[name])


def by_autograd(probs, experts):
    logits = probs.log().requires_grad_()
    counts = experts.bincount(minlength=probs.shape[1])
    load_balancing_loss(logits.softmax(-1), counts).backward()
    return logits.grad


def test_the_gradient_by_hand_is_autograds():
    from lablib.lab.grading import outcome

    assert outcome(exercises.balance_gradient, by_autograd) == ("correct", "Correct.")


def test_routes_are_those_of_the_layers_and_leave_modes_alone():
    model = st.switch_(small(n_layers=2), 4, every=1)
    model.blocks[0].eval()
    text = tokens()
    routes = st.routes(model, text)
    assert routes.shape == (2, 60) and model.training and not model.blocks[0].training
    with recorded(model.eval()) as records:
        model(text)
    for row, (record,) in zip(routes, records.values()):
        assert torch.equal(row, record.experts[:, 0])


def test_watching_notes_each_training_step_and_changes_no_weight():
    text, probe = tokens(length=21), tokens()
    models, losses, seen = [], [next_token_loss], []
    losses.append(st.watching(probe, seen))
    for loss in losses:
        torch.manual_seed(1)
        models.append(st.switch_(small(), 4))
        fit(models[-1], [text], steps=3, seed=0, loss=loss, held_out=[text], progress=False)
    assert len(seen) == 3 and seen[0].shape == (2, 60)
    for one, other in zip(models[0].parameters(), models[1].parameters()):
        assert torch.equal(one, other)
