import math

import pytest
import torch

from lablib.compression import dress
from lablib.compression.calibration import token_losses
from lablib.compression.recover import recover
from lablib.compression.structures import Keep, masked, sizes, sliced
from lablib.exercises import dress as exercises
from lablib.models import GPT, GPTConfig, anatomy, to_hf
from lablib.studies import dress as study


def small_model():
    torch.manual_seed(0)
    sizes = {"dim": 16, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 20}
    return GPT(GPTConfig(vocab_size=20, **sizes, init_std=0.2, max_length=16))


@pytest.fixture
def rows():
    torch.manual_seed(3)
    return torch.randint(20, (12, 9))


# The choice.


@pytest.mark.parametrize("by", ["activation", "magnitude", "curvature"])
def test_what_adds_least_goes(by, rows):
    model = small_model()
    small = [3, 8, 11, 19, 0]
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.down.weight[:, small] *= 1e-3
    keep = dress.choose(model, rows, 0.25, by=by)
    assert [sorted({*range(20)} - {*stays}) for stays in keep.neurons] == [sorted(small)] * 2


@pytest.mark.parametrize("by", ["activation", "magnitude", "curvature"])
def test_heads_go_in_whole_groups(by, rows):
    model = small_model()
    width = 2 * sizes(model).head_dim
    with torch.no_grad():
        model.blocks[0].attention.output.weight[:, :width] *= 1e-3
        model.blocks[1].attention.output.weight[:, width:] *= 1e-3
    keep = dress.choose(model, rows, 0.5, parts="heads", by=by)
    assert keep.heads == [[2, 3], [0, 1]] and keep.neurons is None


def test_a_neuron_with_a_twin_is_cheap_by_curvature_alone(rows):
    scores = {}
    for twins in (False, True):
        model = small_model()
        with torch.no_grad():
            for block in model.blocks:
                block.mlp.gate.weight[4] *= 3
                if twins:
                    for layer in (block.mlp.gate, block.mlp.up):
                        layer.weight[9] = layer.weight[4]
        for by in ("activation", "curvature"):
            scores[by, twins] = dress._scores(model, rows, "neurons", by)[0][4]
    assert scores["curvature", True] < 0.8 * scores["curvature", False]
    assert scores["activation", True] == pytest.approx(scores["activation", False])


def test_channels_that_nobody_reads_go(rows):
    model = small_model()
    unread = [2, 7, 11, 13]
    with torch.no_grad():
        for layer in anatomy.projections(model, "query", "key", "value", "gate", "up").values():
            layer.weight[:, unread] = 0
    keep = dress.choose(model, rows, 0.25, parts="channels")
    assert keep.channels == sorted({*range(16)} - {*unread})
    assert keep.heads is None and keep.neurons is None


@pytest.mark.parametrize("ratio", [1.0, -0.1])
def test_a_share_that_leaves_nothing_is_said(ratio, rows):
    with pytest.raises(ValueError, match=f"a share of {ratio}"):
        dress.choose(small_model(), rows, ratio)


# The penalty.


@pytest.mark.parametrize("parts", ["neurons", "heads", "channels"])
def test_the_doomed_are_what_slicing_takes(parts, rows):
    model = small_model()
    keep = dress.choose(model, rows, 0.5, parts=parts)
    masks = dress.doomed(model, keep)
    lost = model.n_parameters() - sliced(model, keep).n_parameters()
    assert sum(int(mask.sum()) for mask in masks.values()) == lost
    tokens = rows[:, :-1]
    with masked(model, keep):
        expected = model(tokens)
    dress.shrink_(model, masks, 1.0)
    assert torch.equal(model(tokens), expected)


@pytest.mark.parametrize("norm", [1, 2])
def test_the_penalty_pulls_at_the_doomed_alone(norm, rows):
    model = small_model()
    masks = dress.doomed(model, dress.choose(model, rows, 0.5))
    penalty = dress.streamlining_penalty(model, masks, norm)
    picked = torch.cat([model.get_parameter(name)[mask] for name, mask in masks.items()])
    torch.testing.assert_close(penalty, picked.abs().pow(norm).sum())
    penalty.backward()
    for name, parameter in model.named_parameters():
        if name in masks:
            slope = 2 * parameter if norm == 2 else parameter.sign()
            torch.testing.assert_close(parameter.grad, slope * masks[name])
        else:
            assert parameter.grad is None


def test_shrinking_is_a_step_down_the_penalty(rows):
    for norm, slope in ((2, lambda w: w), (1, torch.sign)):
        model = small_model()
        masks = dress.doomed(model, dress.choose(model, rows, 0.5))
        before = {name: model.get_parameter(name).detach().clone() for name in masks}
        dress.shrink_(model, masks, 1e-6, norm)
        for name, mask in masks.items():
            expected = before[name] - 1e-6 * slope(before[name]) * mask
            torch.testing.assert_close(model.get_parameter(name).detach(), expected)


def test_the_absolute_value_stops_at_zero(rows):
    model = small_model()
    masks = dress.doomed(model, dress.choose(model, rows, 0.5))
    dress.shrink_(model, masks, 10.0, norm=1)
    assert all((model.get_parameter(name)[mask] == 0).all() for name, mask in masks.items())


# The leak.


def test_the_leak_is_the_part_of_the_output_that_goes(rows):
    model = small_model().eval()
    keep = dress.choose(model, rows, 0.5)
    seen = {}
    for place, block in enumerate(model.blocks):
        block.mlp.down.register_forward_pre_hook(
            lambda m, x, place=place: seen.update({place: x[0].detach().flatten(0, 1)})
        )
    leaks = dress.leak(model, rows[:8], keep)
    for place, block in enumerate(model.blocks):
        goes = torch.ones(20, dtype=torch.bool)
        goes[keep.neurons[place]] = False
        expected = exercises._leak(block.mlp.down.weight.detach(), seen[place], goes)
        assert leaks[place] == pytest.approx(expected.item(), rel=1e-5)


def test_nothing_leaks_from_an_empty_part(rows):
    model = small_model()
    keep = dress.choose(model, rows, 0.5)
    assert min(dress.leak(model, rows, keep)) > 0.05
    with masked(model, keep):
        assert dress.leak(model, rows, keep) == [0.0, 0.0]


# Emptying.


@pytest.mark.parametrize("how", [{}, {"norm": 1, "weight": 0.1}, {"decoupled": True, "weight": 20}])
def test_emptying_drains_what_will_go(how, rows):
    model, seen = small_model(), []
    keep = dress.choose(model, rows, 0.5)
    before = max(dress.leak(model, rows, keep))

    def look(step, now):
        seen.append(max(dress.leak(model, rows, keep)))

    dress.empty(model, rows, keep, 12, 1e-2, 10, **({"weight": 0.1} | how), after_step=look)
    assert seen[8] < before / 3 and seen[8] > 0
    assert seen[9:] == [0.0, 0.0, 0.0]


def test_after_the_cut_it_is_the_smaller_model_that_trains(rows):
    model, small = small_model(), small_model()
    keep = dress.choose(model, rows, 0.5)
    small = sliced(small, keep)
    losses = dress.empty(model, rows, keep, 5, 1e-2, 0, 0.0)
    assert losses == pytest.approx(recover(small, rows, 5, 1e-2), abs=1e-5)
    found, expected = (token_losses(m, rows) for m in (sliced(model, keep), small))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_without_a_weight_nothing_is_emptied(rows):
    model = small_model()
    keep, seen = dress.choose(model, rows, 0.5), []
    dress.empty(
        model,
        rows,
        keep,
        4,
        1e-3,
        4,
        0.0,
        after_step=lambda step, now: seen.append(max(dress.leak(model, rows, keep))),
    )
    assert min(seen[:3]) > 0.05 and seen[3] == 0


def test_it_works_on_models_of_transformers(rows, tmp_path):
    from transformers import AutoModelForCausalLM

    to_hf(small_model(), tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    ours, keep = small_model(), dress.choose(theirs, rows, 0.5)
    assert keep == dress.choose(ours, rows, 0.5)
    losses = [dress.empty(m, rows, keep, 4, 1e-2, 3, 0.01) for m in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


# The study.


def test_equal_operations_are_more_steps_of_the_smaller_model():
    model = small_model()
    keep = Keep(neurons=[range(10)] * 2)
    steps = study.as_dear(model, keep, 30, 40)
    assert 40 < steps < 70
    assert study.as_dear(model, Keep(), 30, 40) == 40


def test_both_orders_leave_the_model_as_it_was_and_train_its_last_blocks_alone(rows, monkeypatch):
    model = small_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained, empty = [], dress.empty

    def watched(model, rows, keep, *rest, **options):
        trained.append((options["trainable"], [n is None for n in keep.neurons], rest[2]))
        return empty(model, rows, keep, *rest, **options)

    monkeypatch.setattr(dress, "empty", watched)
    found = study.both_orders(model, rows, rows[:4], blocks=1, steps=4, rate=1e-2)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    last = len(anatomy.blocks(model)) - 1
    for names, kept, _ in trained:
        assert len(names) == 3 and all(f".{last}." in name for name in names)
        assert kept == [True] * last + [False]
    assert [phase for *_, phase in trained] == [2, 0]
    assert len(set(found.values())) == 3 and found["whole"] == study.loss(model, rows[:4])


def test_held_out_windows_are_of_other_documents():
    for text in (study.NEW, study.KNOWN):
        train, held_out = study.texts("tiny-1m", text)
        seen = {tuple(row.tolist()) for row in train}
        same = sum(tuple(row.tolist()) in seen for row in held_out)
        assert same < len(held_out) / 100  # licences and the like are everywhere


def test_a_seed_has_its_own_slice():
    slices = [study.windows("tiny-1m", seed, 96, study.NEW)[1] for seed in (0, 1)]
    first, second = ({tuple(row.tolist()) for row in part} for part in slices)
    assert len(first & second) < 5


# The exercises.


def leak_of_squares(down, hidden, goes):
    return exercises._leak(down, hidden, goes) ** 2


def leak_of_the_whole(down, hidden, goes):
    part = (hidden[:, goes] @ down[:, goes].t()).square().sum()
    return (part / (hidden @ down.t()).square().sum()).sqrt()


def one_head(query, key, value, output, group, share, head_dim):
    one = slice(group * head_dim, (group + 1) * head_dim)
    return sum(p.square().sum() for p in (query[one], key[one], value[one], output[:, one]))


def no_output(query, key, value, output, group, share, head_dim):
    return exercises._head_penalty(query, key, value, output * 0, group, share, head_dim)


def both_end(weight, amount, norm):
    return math.ceil(abs(weight) / amount)


def rounded_down(weight, amount, norm):
    return int(abs(weight) / amount) if norm == 1 else math.inf


def one_by_one(leak_of, weights):
    return next(weight for weight in weights if leak_of(weight) < 0.01)


def below_one(leak_of, weights):
    return exercises._smallest_weight(lambda weight: leak_of(weight) / 100, weights)


def one_too_small(leak_of, weights):
    return weights[weights.index(exercises._smallest_weight(leak_of, weights)) - 1]


WRONG = {
    "smallest_weight": [one_by_one, below_one, one_too_small],
    "leak": [leak_of_squares, leak_of_the_whole],
    "head_penalty": [one_head, no_output],
    "steps_to_empty": [both_end, rounded_down],
}


@pytest.mark.parametrize("name", WRONG)
def test_exercises_tell_right_from_wrong(name, tells_right_from_wrong):
    tells_right_from_wrong(getattr(exercises, name), WRONG[name])
