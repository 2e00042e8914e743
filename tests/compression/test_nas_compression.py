import itertools
import json

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lablib.compression import nas_compression as nas
from lablib.compression.recover import recover
from lablib.exercises import nas_compression as exercises
from lablib.models import GPT, GPTConfig, anatomy, pretrained, to_hf
from lablib.paths import PACKAGE
from lablib.peft.adapter import fold_, trainable
from lablib.peft.lora import lora_
from lablib.studies import nas_compression as study


def small_model():
    torch.manual_seed(0)
    sizes = {"dim": 24, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 12}
    model = GPT(GPTConfig(vocab_size=20, **sizes, init_std=0.3, max_length=16))
    with torch.no_grad():
        for norm in anatomy.norms(model).values():
            norm.weight.uniform_(0.5, 2)
    return model


@pytest.fixture(params=["ours", "transformers"])
def model(request, tmp_path):
    if request.param == "ours":
        return small_model()
    from transformers import AutoModelForCausalLM

    to_hf(small_model(), tmp_path)
    return AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.fixture
def rows():
    torch.manual_seed(3)
    return torch.randint(20, (12, 9))


CHOICES = {"blocks": (1, 2, 3), "groups": (1, 2), "neurons": (3, 6, 12), "channels": (12, 24)}


# Sorting.


@pytest.mark.parametrize("of", [("neurons",), ("heads",), ("channels",), ()])
def test_sorting_changes_no_logit(of, model, rows):
    tokens = rows[:, :-1]
    before = anatomy.logits(model, tokens).detach()
    weights = [p.detach().clone() for p in model.parameters()]
    nas.sort_by_importance_(model, rows, *of)
    torch.testing.assert_close(anatomy.logits(model, tokens), before, atol=1e-4, rtol=1e-5)
    assert any(not torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


def test_after_sorting_the_important_come_first(model, rows):
    from lablib.compression import importance

    nas.sort_by_importance_(model, rows)
    for score in importance.of_neurons(model, rows):
        assert torch.equal(score, score.sort(descending=True).values)
    for score in importance.of_heads(model, rows):
        groups = score.square().view(2, 2).sum(1)
        assert groups[0] >= groups[1]


# Sub-networks.


@pytest.mark.parametrize("seed", range(6))
def test_a_sub_network_is_the_sliced_model(seed, model, rows):
    fine = isinstance(model, GPT)
    space = nas.Space(model, **CHOICES, fine=fine, order=[1, 2, 0])
    config = space.sample(np.random.default_rng(seed))
    cut = space.cut(config)
    found = space.sub_network(config)(rows[:, :-1])
    torch.testing.assert_close(found, anatomy.logits(cut, rows[:, :-1]), atol=1e-5, rtol=1e-5)
    assert space.parameters(config) == sum(p.numel() for p in cut.parameters())


def test_training_a_sub_network_trains_the_whole_models_weights(rows):
    model = small_model()
    space = nas.Space(model, **CHOICES)
    loss = nas.own_loss(space, space.smallest)(model, rows)
    loss.backward()
    down = model.blocks[0].mlp.down.weight.grad
    assert down[:12, :3].abs().min() > 0 and down[12:].abs().max() == 0
    assert down[:, 3:].abs().max() == 0
    assert (
        model.blocks[1].mlp.down.weight.grad is None
        or not model.blocks[1].mlp.down.weight.grad.any()
    )


def test_the_gradient_is_the_sliced_models(rows):
    model = small_model()
    space = nas.Space(model, **CHOICES)
    config = space.config(3, 1, 6, 12)
    nas.own_loss(space, config)(model, rows).backward()
    cut = space.cut(config)
    logits = cut(rows[:, :-1])
    F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).backward()
    whole, small = model.blocks[2].mlp.up.weight.grad, cut.blocks[2].mlp.up.weight.grad
    torch.testing.assert_close(whole[:6, :12], small, atol=1e-6, rtol=1e-4)


def test_what_is_kept_is_a_prefix_and_blocks_go_by_importance():
    space = nas.Space(small_model(), **CHOICES, order=[2, 0, 1])
    keep = space.keep(space.config(2, 1, 6, 12))
    assert list(keep.blocks) == [0, 2]
    assert [list(heads) for heads in keep.heads] == [[0, 1]] * 3
    assert [list(n) for n in keep.neurons] == [list(range(6))] * 3
    assert list(keep.channels) == list(range(12))


def recorded():
    return json.loads((PACKAGE / "compression" / "nas_compression.json").read_text("utf-8"))


def test_parameters_are_those_of_whittle():
    model = pretrained("tiny-1m")[0]
    space = nas.Space(model)
    n = 0
    for blocks, groups, neurons, channels, theirs in recorded()["counts"]:
        each = tuple(neurons) if isinstance(neurons, list) else (neurons,) * 3
        config = nas.Config(blocks, (groups,) * 3, each, channels)
        ours = space.parameters(config) + 4096 * channels  # their head is not the embedding
        # Of one group of two query heads whittle's counter counts one query head.
        short = blocks * 2 * 32 * channels if groups == 1 else 0
        assert ours - short == theirs
        n += groups == 2
    assert n >= 36


def test_adapters_of_a_super_network_learn_in_its_sub_networks(rows):
    model = small_model()
    space = nas.Space(model, **CHOICES)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    random = np.random.default_rng(0)
    loss = nas.sandwich_loss(space, random)
    expected = space.sub_network(space.smallest)(rows[:, :-1])
    lora_(model, rank=2)
    names = list(trainable(model))
    found = space.sub_network(space.smallest)(rows[:, :-1])
    torch.testing.assert_close(found, expected)
    recover(model, rows, 3, 1e-2, trainable=names, loss=loss)
    fold_(model)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {f"{name}.weight" for name in anatomy.projections(model)}


# Training.


def test_the_sandwich_adds_largest_smallest_and_random(rows):
    model = small_model()
    space = nas.Space(model, **CHOICES)
    found = nas.sandwich_loss(space, np.random.default_rng(5), n_random=2)(model, rows)
    random = np.random.default_rng(5)
    configs = [space.largest, space.smallest, space.sample(random), space.sample(random)]
    expected = sum(nas.own_loss(space, config)(model, rows) for config in configs)
    torch.testing.assert_close(found, expected)


def test_in_place_distillation_is_kl_to_the_largest(rows):
    model = small_model()
    space = nas.Space(model, **CHOICES)
    random = np.random.default_rng(5)
    found = nas.sandwich_loss(space, random, n_random=0, distill=1.0, temperature=2.0)(model, rows)
    teacher, student = (space.sub_network(c)(rows[:, :-1]) for c in (space.largest, space.smallest))
    parts = [F.log_softmax(logits.flatten(0, 1) / 2, -1) for logits in (student, teacher)]
    kl = 4 * F.kl_div(*parts, log_target=True, reduction="batchmean")
    torch.testing.assert_close(found, nas.own_loss(space, space.largest)(model, rows) + kl)
    assert nas.divergence(student, student).abs() < 1e-6


def test_the_teacher_does_not_learn_from_its_pupils(rows):
    model = small_model()
    space = nas.Space(model, **CHOICES)
    nas.own_loss(space, space.largest)(model, rows).backward()
    expected = model.blocks[2].mlp.up.weight.grad[6:].clone()
    model.zero_grad()
    nas.sandwich_loss(space, np.random.default_rng(0), n_random=0, distill=1.0)(
        model, rows
    ).backward()
    torch.testing.assert_close(model.blocks[2].mlp.up.weight.grad[6:], expected)


def test_sandwich_training_helps_the_smallest(rows):
    model = small_model()
    space = nas.Space(model, **CHOICES)
    one = rows[:1].repeat(12, 1)
    before = nas.own_loss(space, space.smallest)(model, one).item()
    recover(model, one, 30, 1e-2, loss=nas.sandwich_loss(space, np.random.default_rng(0)))
    assert nas.own_loss(space, space.smallest)(model, one).item() < before / 2


# Sampling.


@pytest.mark.parametrize("fine", [False, True])
def test_samples_lie_in_the_space(fine):
    space = nas.Space(small_model(), **CHOICES, fine=fine)
    random = np.random.default_rng(0)
    drawn = [space.sample(random) for _ in range(60)]
    drawn += [space.neighbor(config, random) for config in drawn]
    drawn += [space.crossed(*pair, random) for pair in itertools.pairwise(drawn)]
    for config in drawn:
        assert config.blocks in space.blocks and config.channels in space.channels
        assert {*config.groups} <= {*space.groups} and {*config.neurons} <= {*space.neurons}
        assert fine or (len({*config.groups}) == len({*config.neurons}) == 1)
        assert isinstance(config.neurons[0], int)
    assert fine == any(len({*config.neurons}) > 1 for config in drawn)


def test_the_calibrated_sampler_is_even_over_sizes():
    space = nas.Space(small_model(), **CHOICES, fine=True)
    low, high = (space.parameters(config) for config in (space.smallest, space.largest))
    counts = []
    for draw in (space.sample, lambda random: space.sample_evenly(random, bins=4)):
        random = np.random.default_rng(0)
        sizes = [space.parameters(draw(random)) for _ in range(200)]
        counts.append(np.histogram(sizes, 4, (low, high))[0])
    assert counts[1].std() < counts[0].std() / 1.5


def test_a_neighbor_is_one_step_away():
    space = nas.Space(small_model(), **CHOICES, fine=True)
    random = np.random.default_rng(0)
    for _ in range(50):
        config = space.sample(random)
        other = space.neighbor(config, random)
        if config.blocks != other.blocks:
            assert abs(config.blocks - other.blocks) == 1
            continue
        off = [config.channels != other.channels]
        off += [a != b for a, b in zip(config.groups, other.groups, strict=True)]
        off += [a != b for a, b in zip(config.neurons, other.neurons, strict=True)]
        assert sum(off) <= 1


# The front.


def by_brute_force(points):
    return [
        place
        for place, (x, y) in enumerate(points)
        if not any(a <= x and b <= y and (a, b) != (x, y) for a, b in points)
    ]


def test_the_front_is_what_nothing_beats():
    random = np.random.default_rng(0)
    for n in (1, 2, 50):
        points = [(float(x), float(y)) for x, y in random.integers(0, 9, (n, 2))]
        front = nas.pareto(points)
        assert {points[p] for p in front} == {points[p] for p in by_brute_force(points)}
        assert [points[p] for p in front] == sorted({points[p] for p in front})


def test_the_hypervolume_is_the_dominated_area():
    assert nas.hypervolume([(1, 3), (2, 1)], (4, 4)) == 3 * 1 + 2 * 2
    assert nas.hypervolume([(5, 5)], (4, 4)) == 0
    random = np.random.default_rng(0)
    points, inside = (
        [(float(x), float(y)) for x, y in random.random((20, 2))],
        random.random((20_000, 2)),
    )
    dominated = np.mean([any(x <= a and y <= b for x, y in points) for a, b in inside])
    assert nas.hypervolume(points, (1, 1)) == pytest.approx(dominated, abs=0.01)


def test_crowding_is_the_box_of_neighbours():
    assert nas.crowding([(0, 4), (1, 2), (3, 1), (4, 0)])[1:3] == [3 / 4 + 3 / 4, 3 / 4 + 2 / 4]
    assert nas.crowding([(0, 1)]) == [np.inf] and nas.crowding([(0, 1), (1, 0)]) == [np.inf] * 2


@pytest.mark.parametrize("how", ["random", "local", "evolve"])
def test_search_finds_what_is_good(how):
    """A world in which one setting of neurons is right: more is better at the end."""
    model = small_model()
    space = nas.Space(model, neurons=(3, 6, 12), fine=True)
    worth = np.array([1.0, 2.0, 6.0])

    def measure(config):
        return sum(config.neurons), -float(worth @ np.log(config.neurons))

    random = np.random.default_rng(0)
    search = {
        "random": nas.random_search,
        "local": lambda *given: nas.local_search(*given, start=space.largest),
        "evolve": lambda *given: nas.evolve(*given, population=6),
    }[how]
    found = search(space, measure, 20, random)
    assert 15 <= len(found) <= 20  # local search ends where its front has no new neighbour
    if how == "random":
        return
    best = min((c for c in found if sum(c.neurons) <= 18), key=lambda c: found[c][1])
    assert measure(best)[1] < measure(space.config(3, 2, 6))[1]


def test_survivors_are_whole_fronts_then_the_loneliest():
    points = [(0, 4), (2, 2), (2.1, 1.9), (4, 0), (5, 5)]
    worlds = dict(zip("abcde", points, strict=True))
    assert {*nas.survivors(worlds, 4)} == {*"abcd"} and {*nas.survivors(worlds, 2)} == {"a", "d"}


def test_uniform_shrinking_takes_the_same_share_of_all():
    space = nas.Space(small_model(), **CHOICES)
    found = [(c.blocks, c.groups[0], c.neurons[0]) for c in nas.uniform(space)]
    assert found == [(3, 1, 3), (3, 1, 6), (3, 2, 12)]


# The exercises.


def two_matrices(blocks, heads, groups, head_dim, neurons, channels):
    attention = channels * head_dim * (2 * heads + 2 * groups)
    return blocks * (attention + 2 * channels * neurons + 2 * channels)


def as_many_keys(blocks, heads, groups, head_dim, neurons, channels):
    return exercises._parameters(blocks, heads, heads, head_dim, neurons, channels)


def the_other_side(points):
    return nas.pareto([(-x, -y) for x, y in points])


def everything(points):
    return sorted(range(len(points)), key=lambda place: points[place])


def over_budget(neurons, step, choices, random):
    place = random.integers(len(neurons))
    up = choices[min(choices.index(neurons[place]) + 1, len(choices) - 1)]
    return tuple(up if i == place else n for i, n in enumerate(neurons))


def beyond(neurons, step, choices, random):
    up, down = random.permutation(len(neurons))[:2]
    return tuple(n + step * (i == up) - step * (i == down) for i, n in enumerate(neurons))


def unchanged(neurons, step, choices, random):
    return tuple(neurons)


WRONG = {
    "parameters": [two_matrices, as_many_keys],
    "front": [the_other_side, everything],
    "swap": [over_budget, beyond, unchanged],
}


@pytest.mark.parametrize("name", WRONG)
def test_exercises_tell_right_from_wrong(name, tells_right_from_wrong):
    tells_right_from_wrong(getattr(exercises, name), WRONG[name])


# SmolLM2's cloud, on a smaller model.


@pytest.fixture(scope="module")
def cloud():
    return study.run(kind="untrained", model="tiny-1m", seed=0, tries=3, rows=8)


def test_a_cloud_stays_within_its_budget(cloud):
    whole = nas.Space(pretrained("tiny-1m")[0])
    most = study.BUDGET * whole.parameters(whole.largest) / 1e6
    assert len(cloud["cloud"]) == len(cloud["shapes"]) == len(cloud["heads"]) == 6
    assert all(0.97 * most <= size <= most for size, _ in cloud["cloud"])
    assert len(set(zip(cloud["shapes"], cloud["heads"], strict=True))) == 6


def test_a_clouds_shapes_have_the_parameters_that_it_says(cloud):
    size = nas.Space(pretrained("tiny-1m")[0]).size
    for (millions, _), shape, heads in zip(cloud["cloud"], cloud["shapes"], cloud["heads"]):
        stays = [(int(n), int(h)) for n, h in zip(shape, heads) if n != "-"]
        neurons = sum(size.neurons * n // 4 for n, _ in stays)
        groups, share = sum(h for _, h in stays), size.heads // size.kv_heads
        blocks = size.channels * (3 * neurons + 2 * groups * size.head_dim * (share + 1))
        norms = size.channels * (2 * len(stays) + 1)
        table = 4096 * size.channels
        assert blocks + norms + table == round(1e6 * millions)


def test_the_best_of_a_cloud_are_judged_on_other_text(cloud):
    losses = [loss for _, loss in cloud["cloud"]]
    assert cloud["whole"] < min(cloud["best"].values())
    assert not {round(loss, 4) for loss in cloud["best"].values()} & set(losses)


def test_what_is_cut_out_is_smaller_and_timed():
    found = study.run(kind="sliced", model="tiny-1m", seed=0, rows=2)
    assert all(set(found[key]) == set(study.SHAPES) for key in ("millions", "nats", "seconds"))
    whole, *others = found["millions"].values()
    assert whole == pretrained("tiny-1m")[0].n_parameters() / 1e6
    assert all(millions < whole for millions in others)
    assert all(0 < seconds < 0.1 for seconds in found["seconds"].values())
    assert len(set(found["nats"].values())) == len(study.SHAPES)
