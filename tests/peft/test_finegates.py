import copy
import math

import pytest
import torch
import transformers as hf
from families_for_tests import MODELS, SIZES, TOKENS
from scipy import stats
from torch import nn
from torch.nn import functional as F

from lablib.compression.recover import drawn, language_loss, recover
from lablib.data.tasks import load_task
from lablib.evidence.studies import Study
from lablib.exercises import finegates as exercises
from lablib.models import anatomy, pretrained
from lablib.models.classifier import Classifier, Encoded, predicted
from lablib.papers import paper
from lablib.peft import finegates as fg
from lablib.peft.adapter import (
    adapters,
    disabled,
    freeze_base_,
    load_adapter,
    merge_,
    n_trainable,
    remove_,
    save_adapter,
    trainable,
)
from lablib.peft.tuning import tune
from lablib.studies import finegates as study
from lablib.training.clipping import clip_gradients
from lablib.training.schedules import learning_rate_factor


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    made = MODELS[request.param]().eval()
    with torch.no_grad():  # so that biases are no zeros
        for name, parameter in made.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    return made


def spread(model):
    """Gates as after training: closed, open, and between; low-rank parts moved."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in trainable(model).items():
            if name.endswith(("row", "column")):
                parameter.normal_(-0.2, 1.0)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def test_gates_by_hand():
    logits = torch.tensor([-2.0, -math.atanh(0.5), 0.0, math.atanh(0.25), 1.0])
    torch.testing.assert_close(fg.gate(logits), torch.tensor([0.0, 0.0, 0.5, 0.75, 1.0]))
    assert fg.gate(torch.tensor(0.0), 0.2).item() == pytest.approx(0.7)


def test_the_chance_to_be_open_is_a_normal_ones():
    logits = torch.linspace(-3, 3, 25, dtype=torch.float64)
    mu = logits.tanh().numpy()
    expected = stats.norm.sf(0, loc=mu + 0.5, scale=0.5)
    torch.testing.assert_close(fg.open_probability(logits), torch.from_numpy(expected))


def test_a_gated_layer_by_hand():
    layer = fg.GatedLinear(nn.Linear(2, 2)).eval()
    with torch.no_grad():
        layer.base.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        layer.base.bias.copy_(torch.tensor([10.0, 20.0]))
        layer.row.copy_(torch.tensor([0.0, -9.0]))  # 1/2, 0
        layer.column.copy_(torch.tensor([9.0, 0.0]))  # 1, 1/2
    # 1/2 (1 * 1 + 2 * 1/2 * 3 + 10) and 0, the bias included
    assert layer(torch.tensor([1.0, 3.0])).tolist() == pytest.approx([7.0, 0.0])


def test_noise_comes_in_training_alone():
    layer = fg.GatedLinear(nn.Linear(40, 30))
    with torch.no_grad():
        layer.row.zero_()
    layer.eval()
    assert torch.equal(layer.gates()[0], layer.gates()[0])
    layer.train()
    torch.manual_seed(0)
    drawn = torch.stack([layer.gates()[0] for _ in range(200)])
    assert drawn.std().item() == pytest.approx(fg.NOISE, rel=0.05)
    assert drawn.mean().item() == pytest.approx(0.5, abs=0.01)


def test_it_starts_as_the_base_and_only_it_trains(model):
    before = anatomy.logits(model, TOKENS)
    sizes = [sum(fg.matrix(m).shape) for m in anatomy.projections(model).values()]
    torch.manual_seed(1)
    fg.gate_(model)
    torch.testing.assert_close(anatomy.logits(model, TOKENS), before)  # every gate is at 1
    assert fg.states(model) == {"closed": 0.0, "between": 0.0, "open": 1.0}
    freeze_base_(model)
    assert n_trainable(model) == sum(sizes)
    assert n_trainable(model) == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("rank", [0, 3])
def test_what_is_cut_computes_what_was_gated(model, rank):
    fg.gate_(model, rank=rank)
    before = anatomy.logits(spread(model), TOKENS)
    share = fg.removed(model)
    sizes = {n: math.prod(map(len, fg.kept(layer))) for n, layer in fg.layers(model).items()}
    n_weights = sum(math.prod(layer.weight.shape) for layer in fg.layers(model).values())
    assert 0.3 < share < 0.95
    assert sum(sizes.values()) == pytest.approx((1 - share) * n_weights)
    fg.compress_(model)
    assert not adapters(model)
    torch.testing.assert_close(anatomy.logits(model, TOKENS), before, atol=1e-5, rtol=1e-5)
    for name, size in sizes.items():
        assert model.get_submodule(name).weight.numel() <= size


def test_inner_neurons_are_cut_on_both_sides(model):
    fg.gate_(model)
    before = anatomy.logits(spread(model), TOKENS)
    up, down = (anatomy.projection(model, 0, role) for role in ("up", "down"))
    both = (fg.gate(up.row) > 0) & (fg.gate(down.column) > 0)
    if "gate" in anatomy.family(model).projections:
        both = both & (fg.gate(anatomy.projection(model, 0, "gate").row) > 0)
    fg.compress_(model)
    up, down = (anatomy.projection(model, 0, role) for role in ("up", "down"))
    assert up.rows is None and down.columns is None
    assert up.weight.shape[0] == down.weight.shape[1] == both.sum()
    torch.testing.assert_close(anatomy.logits(model, TOKENS), before, atol=1e-5, rtol=1e-5)


def test_one_role_alone_is_gathered_and_scattered(model):
    fg.gate_(model, ["down"])
    before = anatomy.logits(spread(model), TOKENS)
    fg.compress_(model)
    assert anatomy.projection(model, 0, "down").columns is not None
    torch.testing.assert_close(anatomy.logits(model, TOKENS), before, atol=1e-5, rtol=1e-5)


def test_all_closed_and_all_open(model):
    plain = anatomy.logits(model, TOKENS)
    fg.gate_(model)
    whole = copy.deepcopy(model)
    fg.compress_(whole)
    torch.testing.assert_close(anatomy.logits(whole, TOKENS), plain, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.fill_(fg.SHUT)
    assert fg.removed(model) == 1 and fg.states(model)["closed"] == 1
    before = anatomy.logits(model, TOKENS)
    fg.compress_(model)
    torch.testing.assert_close(anatomy.logits(model, TOKENS), before)


def test_blocks_below_stay(model):
    fg.gate_(model, below=1)
    place = anatomy.family(model).blocks
    assert fg.layers(model) and all(name.startswith(f"{place}.1.") for name in fg.layers(model))


def test_disabled_removed_saved(model, tmp_path):
    plain, before = copy.deepcopy(model), anatomy.logits(model, TOKENS)
    fg.gate_(model, ["output", "up"], rank=2)
    changed = anatomy.logits(spread(model), TOKENS)
    with disabled(model):
        assert torch.equal(anatomy.logits(model, TOKENS), before)
    with pytest.raises(ValueError, match="can't be merged"):
        merge_(model)
    save_adapter(model, tmp_path / "gates.safetensors")
    load_adapter(plain, tmp_path / "gates.safetensors")
    assert torch.equal(anatomy.logits(plain, TOKENS), changed)
    remove_(model)
    assert torch.equal(anatomy.logits(model, TOKENS), before)


def test_gradients_of_gates_are_those_of_the_formula():
    torch.manual_seed(0)
    layer = fg.GatedLinear(nn.Linear(5, 4), rank=2).double().eval()
    with torch.no_grad():
        for parameter in (layer.row, layer.column, layer.up):
            parameter.normal_(0, 0.2)
    x = torch.randn(3, 5, dtype=torch.float64)
    by_layer = torch.autograd.grad(layer(x).square().sum(), [layer.row, layer.column])
    rows, columns = (p.detach().clone().requires_grad_() for p in (layer.row, layer.column))
    weight = layer.base.weight.detach() + (layer.up @ layer.down).detach()
    gated = torch.diag(rows.tanh() + 0.5) @ weight @ torch.diag(columns.tanh() + 0.5)
    y = F.linear(x, gated) + (rows.tanh() + 0.5) * layer.base.bias.detach()
    for ours, theirs in zip(by_layer, torch.autograd.grad(y.square().sum(), [rows, columns])):
        torch.testing.assert_close(ours, theirs)


def test_penalty_by_hand():
    model = MODELS["bert"]()
    fg.gate_(model, ["up"], below=1)
    (layer,) = fg.layers(model).values()
    with torch.no_grad():
        layer.row.zero_()
        layer.column.fill_(-math.atanh(0.5))
    # mu = 0: Phi(1); mu = -1/2: Phi(0)
    expected = (abs(stats.norm.cdf(1.0) - 0.7) + abs(0.5 - 0.7)) / 2
    assert fg.penalty(model, 0.3).item() == pytest.approx(expected, abs=1e-6)


def test_the_target_can_be_met_with_no_gate_closed():
    model = MODELS["bert"]()
    fg.gate_(model)
    level = stats.norm.ppf(0.6) * fg.WIDTH - 0.5  # the mu whose chance to be open is 0.6
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.fill_(math.atanh(level))
    assert fg.penalty(model, 0.4).item() < 1e-6
    assert fg.states(model)["between"] == 1 and fg.removed(model) == 0


def test_at_the_start_hardly_a_gate_gets_a_gradient():
    torch.manual_seed(0)
    layer = fg.GatedLinear(nn.Linear(2000, 2000))
    layer(torch.randn(2, 2000)).square().sum().backward()
    assert (layer.row.grad != 0).double().mean() < 0.03
    layer.row.grad = None
    with torch.no_grad():
        layer.row.zero_()
    layer(torch.randn(2, 2000)).square().sum().backward()
    assert (layer.row.grad != 0).all()


def test_rivals_have_the_counts_they_are_given():
    torch.manual_seed(0)
    layer = fg.GatedLinear(nn.Linear(9, 7)).eval()
    for choice in ("magnitude", "random"):
        fg.shut_(layer, choice, 3, 5)
        assert [*map(len, fg.kept(layer))] == [3, 5]
        assert set(fg.gate(layer.row).tolist()) == {0.0, 1.0}
    fg.shut_(layer, "magnitude", 3, 5)
    largest = layer.base.weight.norm(dim=1).argsort(descending=True)[:3]
    assert set(fg.kept(layer)[0].tolist()) == set(largest.tolist())
    with pytest.raises(ValueError, match="no choice"):
        fg.shut_(layer, "first", 3, 5)


def test_hard_gates_keep_the_choice():
    model = MODELS["bert"]()
    fg.gate_(model)
    before = [fg.kept(layer) for layer in fg.layers(spread(model)).values()]
    fg.harden_(model)
    assert fg.states(model)["between"] == 0
    for old, layer in zip(before, fg.layers(model).values(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(old, fg.kept(layer), strict=True))


def test_wrong_arguments():
    with pytest.raises(ValueError, match="rank 9"):
        fg.GatedLinear(nn.Linear(4, 8), rank=9)
    with pytest.raises(ValueError, match="no projection"):
        fg.gate_(MODELS["bert"](), ["gate"])


def test_training_meets_the_target_and_leaves_the_base():
    torch.manual_seed(0)
    model = hf.BertModel(hf.BertConfig(**SIZES))
    bits = {n: p.clone() for n, p in model.named_parameters()}
    fg.gate_(model)
    classifier = Classifier(model, 2)
    encoded = Encoded(torch.randint(2, 60, (40, 6)), torch.ones(40, 6, dtype=torch.bool))
    labels = torch.randint(2, (40,))
    before = fg.penalty(model, 0.4).item()
    wanted = lambda step: fg.WEIGHT * fg.penalty(model, 0.4)  # noqa: E731
    tune(classifier, encoded, labels, 60, 0.1, batch=8, penalty=wanted)
    assert fg.penalty(model, 0.4).item() < 0.02 < 0.3 < before
    remove_(model)
    assert all(torch.equal(p, bits[n]) for n, p in model.named_parameters())


# Study and exercises


def test_lengthened_steps_are_a_rate_of_their_own():
    torch.manual_seed(0)
    start = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))
    x, steps = torch.randn(40, 6), 12
    loss = lambda m, rows: (m(rows[:, :5])[:, 0] - rows[:, 5]).square().mean()  # noqa: E731
    one, two = copy.deepcopy(start), copy.deepcopy(start)
    longer = study.lengthened(one[0].parameters(), 7.0)
    recover(one, x, steps, 0.01, seed=3, loss=loss, after_step=longer)
    groups = [{"params": two[place].parameters()} for place in (0, 2)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
    for step, places in enumerate(drawn(len(x), 8, steps, 3)):
        now = 0.01 * learning_rate_factor(step, steps, warmup=1)
        for group, times in zip(optimizer.param_groups, (7, 1), strict=True):
            group["lr"] = times * now
        loss(two, x[places]).backward()
        clip_gradients(two.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for ours, theirs in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    moved = [(a - b).abs().max().item() for a, b in zip(one.parameters(), start.parameters())]
    assert min(moved[:2]) > 0.3 > 0.12 > max(moved[2:]) > 0.01


def test_gates_of_roberta():
    assert study.n_gates(768, 3072, 12) == 165_888
    with torch.device("meta"):
        model = hf.RobertaModel(hf.RobertaConfig(vocab_size=50_265, max_position_embeddings=514,
                                                 type_vocab_size=1))  # fmt: skip
        fg.gate_(model)
    assert n_trainable(model) == study.n_gates(768, 3072, 12)
    assert sum(p.numel() for p in model.parameters()) - n_trainable(model) == study.ROBERTA
    assert sum(p.numel() for p in model.encoder.parameters()) - n_trainable(model) == study.BLOCKS


def test_rivals_are_as_small_as_the_method(monkeypatch):
    monkeypatch.setitem(study.RATES, "low", [(2.0, 0.01)] * 5)  # gates close in four steps
    options = {"seed": 201, "target": 0.4, "steps": 4, "train": 20, "test": 20}
    told = study.run("low", **options)
    assert told["off"] == 1.0 and 0 < told["removed"] < 1
    assert {study.run(kind, **options)["removed"] for kind in study.SMALLER} == {told["removed"]}


def test_what_not_worse_allows_is_on_loras_side_alone():
    options = {"seed": 201, "steps": 1, "train": 20, "test": 20}
    for low, lora in (("low", "lora"), ("pairs-low", "pairs-lora")):
        gaps = {k: (r := study.run(k, **options))["judged"] - r["points"] for k in (low, lora)}
        assert gaps == {low: 0.0, lora: -study.MARGIN}


def test_of_pairs_one_number_is_learned_and_ranks_are_scored():
    encoded, labels = study.lesson(201, 20, study.PAIRS)
    assert labels.is_floating_point() and -0.5 <= labels.min() < labels.max() <= 0.5
    assert encoded.inputs.shape[:2] == encoded.mask.shape and len(labels) == 20
    classifier = Classifier(study.upper(), study.outputs(study.PAIRS))
    told = study.told_of(classifier, (encoded, labels))
    made = predicted(classifier, encoded)
    ranks = stats.spearmanr(made.flatten().numpy(), labels.numpy()).statistic
    assert told["points"] == pytest.approx(100 * ranks, abs=0.01)
    assert told["nll"] == pytest.approx((made.flatten() - labels).square().mean().item(), abs=1e-4)


def test_low_rank_parts_learn_beside_the_gates():
    options = {"seed": 201, "n": 20, "target": 0.2, "rates": (0.1, 0.01), "steps": 2}
    classifier, losses = study.trained("ranked", **options)
    learned = trainable(classifier.model)
    assert {name.rpartition(".")[2] for name in learned} == {"row", "column", "down", "up"}
    assert all(layer.up.abs().max() > 0 for layer in fg.layers(classifier.model).values())
    assert len(losses) == 2


def test_a_higher_target_leaves_less(monkeypatch):
    monkeypatch.setitem(study.RATES, "low", [(1.0, 0.01)] * 5)
    sentences = study.lesson(201, 20)
    made, seen = {}, {}
    for target in (20, 80):
        made[target], seen[target] = study.gated(target / 100, sentences, sentences, 6, 0)
    assert [moment[0] for moment in seen[20]] == [1, 2, 3, 4, 5, 6]
    cuts, whole = study.cuts_of(made, sentences)
    assert 0 < cuts[20][0] < cuts[80][0] <= 1
    assert min(whole, *(spent for *_, spent in cuts.values())) > 0
    for target, (gone, points, _) in cuts.items():
        assert gone == fg.removed(made[target].model) == seen[target][-1][2]
        assert points == study.told_of(made[target], sentences)["points"]  # cut, it answers alike
        assert points == pytest.approx(100 * seen[target][-1][1])
    logits = [[m.row.tolist(), m.column.tolist()] for m in fg.layers(made[80].model).values()]
    assert logits == seen[80][-1][3] != seen[80][0][3]


def test_speed_is_judged_where_some_forty_per_cent_are_removed():
    stored = Study(paper("finegates"))
    runs, told = stored.runs(), stored.module.values(stored.runs())
    gone = [seed["forty_removed"] for seed in study.of_seeds(runs).values()]
    assert 0.3 < min(gone) <= max(gone) < 0.45
    for seed, pair in zip(study.of_seeds(runs).values(), told["speed"], strict=True):
        assert [*pair][1:] == [seed["forty_cut_seconds"], seed["forty_dense_seconds"]]
    gone = [seed["high_removed"] for seed in study.of_seeds(runs).values()]
    assert min(gone) > 0.6  # of `speed-large`


def test_licences_go_through_the_last_blocks_as_through_all():
    model, tokenizer = pretrained("tiny-1m")
    whole, n_blocks = copy.deepcopy(model), len(model.blocks)
    loss_of, milliseconds = study.on_licences(model, tokenizer, 3, 2, 2)
    assert len(model.blocks) == 2 < n_blocks
    train, _, test = load_task("licences")
    for examples, places in ((train, [0, 1, 2]), (test, [3, 4])):
        tokens = [t for e in examples[: len(places)] for t in tokenizer.encode(e.text[:600])]
        rows = torch.tensor(tokens[: 33 * len(places)]).view(-1, 33)
        ours = loss_of(model, torch.tensor(places)[:, None])
        torch.testing.assert_close(ours, language_loss(whole, rows), atol=1e-5, rtol=1e-5)
    assert milliseconds(model, torch.tensor([0])) > 0


WRONG = {
    "chance_open": [
        lambda logits, width: 0.5 + 0.5 * torch.erf((logits + 0.5) / (width * 2**0.5)),
        lambda logits, width: 0.5 + 0.5 * torch.erf((logits.tanh() + 0.5) / width),
        lambda logits, width: 0.5 - 0.5 * torch.erf((logits.tanh() + 0.5) / (width * 2**0.5)),
        lambda logits, width: (logits.tanh() + 0.5).clamp(0, 1),
    ],
    "cut_out": [
        lambda weight, bias, rows, columns: exercises._cut_out(
            weight, bias, (rows > 0).float(), (columns > 0).float()),
        lambda weight, bias, rows, columns: torch.cat([
            (rows[:, None] * weight * columns)[rows > 0][:, columns > 0],
            bias[rows > 0][:, None]], 1),
        lambda weight, bias, rows, columns: exercises._cut_out(
            weight, bias, rows, (columns > 0).float()),
        lambda weight, bias, rows, columns: torch.cat(
            [rows[:, None] * weight * columns, (rows * bias)[:, None]], 1),
    ],
    "share_removed": [
        lambda rows, columns: float(
            torch.cat([*rows, *columns]).eq(0).double().mean()),
        lambda rows, columns: 1 - sum(
            float((r > 0).double().mean() * (c > 0).double().mean()) for r, c in
            zip(rows, columns)) / len(rows),
        lambda rows, columns: 1 - sum(float(r.sum() * c.sum()) for r, c in zip(rows, columns))
        / sum(len(r) * len(c) for r, c in zip(rows, columns)),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_answers_are_told(name, tells_right_from_wrong):
    tells_right_from_wrong(getattr(exercises, name), WRONG[name])


def test_kurtosis_is_pearsons():
    values = (
        torch.randn(50, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) ** 3
    )
    values[:, 3] = 2.0
    expected = stats.kurtosis(values[:, :3].numpy(), fisher=False)
    torch.testing.assert_close(fg.kurtosis(values)[:3], torch.from_numpy(expected))
    assert fg.kurtosis(values)[3] == 0  # nothing varies


def test_what_has_few_strong_connections_counts_less():
    torch.manual_seed(0)
    weight = torch.randn(60, 40)
    weight[5] *= 0.01
    weight[5, 7] = 50.0  # all of row 5 hangs on one input
    rows, columns = fg.weighed(weight, torch.ones(40))
    assert rows.sum() == pytest.approx(1) and columns.sum() == pytest.approx(1)
    assert rows.argmin() == 5 and columns.argmin() == 7
    assert fg.weighed(weight, torch.zeros(40))[0].std() == 0  # nothing passes, all are alike


def test_a_weighed_penalty_speaks_of_open_gates(model):
    torch.manual_seed(2)
    fg.gate_(model)
    fg.watch_(model)
    anatomy.logits(model, TOKENS)
    with torch.no_grad():
        for layer in fg.layers(model).values():
            for logits in (layer.row, layer.column):
                logits.fill_(0.0)
                logits[: len(logits) // 2] = fg.SHUT
    chance = fg.open_probability(torch.tensor(0.0)).item()
    # all that are open have one chance, so their weights don't matter
    assert fg.weighed_penalty(model, 0.2).item() == pytest.approx(abs(chance - 0.8), abs=1e-5)
    assert fg.penalty(model, 0.2).item() > 0.2  # closed ones count there
    fg.weighed_penalty(model, 0.2).backward()
    layer = next(iter(fg.layers(model).values()))
    assert layer.row.grad[0] == 0 and layer.row.grad[-1] != 0
