import copy

import numpy as np
import pytest
import torch
import transformers as hf
from families_for_tests import MODELS, SIZES, STILL, TOKENS, moved

from lablib.evidence.claims import NOT_REPRODUCED, judge
from lablib.evidence.studies import Study, matching
from lablib.exercises import hypertuning as exercises
from lablib.models import anatomy
from lablib.models.classifier import Classifier, Encoded
from lablib.papers import paper
from lablib.peft import hypertuning as ht
from lablib.peft.adapter import adapters, disabled, freeze_base_, merge_, remove_, trainable
from lablib.peft.prefix import Prefix, prefix_
from lablib.studies import hypertuning as study

TASKS, ROWS = 2, 3


def drawn_phi(places, tasks=TASKS, rows=ROWS):
    torch.manual_seed(4)
    return {
        place: tuple((0.3 * torch.randn(tasks, rows, n)).requires_grad_() for n in pair)
        for place, pair in places.items()
    }


def hyper(places=None, dim=16, **options):
    torch.manual_seed(2)
    places = {"a": (16, 12), "b": (16, 16)} if places is None else places
    return ht.HyperModel(places, dim, ROWS, width=16, n_layers=1, **options)


def examples(tasks=3, k=6, dim=16):
    torch.manual_seed(6)
    return torch.randn(tasks, k, dim), torch.arange(k).remainder(2).expand(tasks, k)


# H.


def test_h_writes_rows_of_every_place_for_every_task():
    phi = hyper()(*examples())
    assert {place: [tuple(t.shape) for t in pair] for place, pair in phi.items()} == {
        "a": [(3, ROWS, 16), (3, ROWS, 12)],
        "b": [(3, ROWS, 16), (3, ROWS, 16)],
    }


def trained_a_little(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def test_examples_are_a_set_and_tasks_are_apart():
    model, (vectors, labels) = trained_a_little(hyper()), examples()
    order = torch.randperm(6)
    phi, mixed = model(vectors, labels), model(vectors[:, order], labels[:, order])
    alone = model(vectors[1:2], labels[1:2])
    for place in phi:
        torch.testing.assert_close(phi[place], mixed[place], atol=1e-5, rtol=1e-5)
        for rows, own in zip(phi[place], alone[place]):
            torch.testing.assert_close(rows[1:2], own, atol=1e-5, rtol=1e-5)


def test_labels_go_with_their_examples():
    model, (vectors, labels) = trained_a_little(hyper()), examples()
    rows, turned = model(vectors, labels)["a"][0], model(vectors, 1 - labels)["a"][0]
    assert (rows - turned).abs().max() > 1e-2


def test_first_rows_start_from_one_mean_to_the_other_and_second_rows_at_zero():
    torch.manual_seed(0)
    model = ht.HyperModel({"a": (64, 8)}, 64, 1, width=64, n_layers=2)
    vectors = torch.randn(20, 10, 64)
    labels = torch.arange(10).remainder(2).expand(20, 10)
    first, second = model(vectors, labels)["a"]
    across = vectors[:, 1::2].mean(1) - vectors[:, ::2].mean(1)
    away = first[:, 0] - first[:, 0].mean(0)  # what all tasks share is the label vectors'
    alike = torch.cosine_similarity(away, across - across.mean(0))
    assert alike.mean() > 0.5 and (alike > 0).all()
    assert not second.any()


def test_every_part_of_h_learns():
    model = trained_a_little(hyper())
    sum(t.square().sum() for pair in model(*examples()).values() for t in pair).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_shared_and_own_phi_read_no_example():
    vectors, labels = examples()
    shared = ht.SharedPhi({"a": (16, 12)}, ROWS)(vectors, labels)
    assert all((rows == rows[:1]).all() for rows in shared["a"]) and not shared["a"][1].any()
    assert ht.SharedPhi({"a": (8, 8)}, ROWS, "prefix")(vectors, labels)["a"][1].any()
    phi = drawn_phi({"a": (16, 12)}, 3)
    own = ht.OwnPhi(phi)
    torch.testing.assert_close(own(0 * vectors, labels)["a"], phi["a"])
    assert len(list(own.parameters())) == 2


# Segments.


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (3, 1, 2, 5), (4, 4, 4, 4)])
def test_segments_tile_the_text(sizes):
    text = torch.randn(2, sum(sizes))
    parts = ht.segments(text, sizes)
    assert [part.shape[-1] for part in parts] == list(sizes)
    assert torch.equal(torch.cat(parts, -1), text)


@pytest.mark.parametrize("sizes", [(3, 3, 3), (3, 3, 3, 2), (0, 4, 4, 4), (2, 2, 2, 2, 4)])
def test_segments_that_do_not_are_said(sizes):
    with pytest.raises(ValueError, match="no four parts of 12 tokens"):
        ht.segments(torch.arange(12), sizes)


def test_the_conditional_loss_is_that_of_c_after_b_and_h_sees_the_ends_alone():
    model, sizes = MODELS["gpt"](), (2, 1, 3, 2)
    torch.manual_seed(0)
    text, other = torch.randint(2, 60, (2, 3, 8))
    tuned = ht.HyperTuned(trained_a_little(hyper(ht.slots_(model, "prefix"), 32)), model)
    seen = []
    tuned.hyper.register_forward_hook(lambda module, args, phi: seen.append((args, phi)))
    found = ht.conditional_loss(tuned, text, sizes)
    (words, side), phi = seen[0]
    table = model.embedding.weight
    ends = torch.cat([text[:, :2], text[:, 6:]], 1)
    torch.testing.assert_close(words, table[ends] / table.std())
    assert side.tolist() == [[0, 0, 1, 1]] * 3
    with ht.given(model, phi):
        chances = model(text[:, 2:6]).log_softmax(-1)  # B and C
    by_hand = [-chances[n, at, text[n, 3 + at]] for n in range(3) for at in range(3)]
    torch.testing.assert_close(found, torch.stack(by_hand).mean(), atol=1e-5, rtol=1e-5)
    ht.conditional_loss(tuned, text, sizes, other)
    torch.testing.assert_close(seen[1][0][0][:, :2], table[other[:, :2]] / table.std())


# A phi in a model.


@pytest.mark.parametrize("kind", ht.KINDS)
def test_given_is_what_ordinary_adapters_with_these_numbers_do(model, kind):
    plain = copy.deepcopy(model)
    places = ht.slots_(model, kind)
    phi = drawn_phi(places)
    tokens = TOKENS.repeat(TASKS, 1)
    with ht.given(model, phi):
        ours = anatomy.logits(model, tokens).unflatten(0, (TASKS, -1))
    for task in range(TASKS):
        other = copy.deepcopy(plain)
        ht.install_(other, phi, task)
        theirs = anatomy.logits(other, TOKENS)
        torch.testing.assert_close(ours[task], theirs, atol=1e-5, rtol=1e-5)
    assert (ours[0] - ours[1]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ht.KINDS)
def test_gradients_are_those_of_ordinary_adapters(model, kind):
    plain = copy.deepcopy(model)
    phi = drawn_phi(ht.slots_(model, kind))
    with ht.given(model, phi):
        anatomy.logits(model, TOKENS.repeat(TASKS, 1)).square().sum().backward()
    for task in range(TASKS):
        other = copy.deepcopy(plain)
        ht.install_(other, phi, task)
        anatomy.logits(other, TOKENS).square().sum().backward()
        found = trainable(other)
        for place, (first, second) in phi.items():
            names = ("down", "up") if kind == "lora" else ("prefix.keys", "prefix.values")
            theirs = [found[f"{place}.{name}"].grad for name in names]
            wanted = [theirs[0], theirs[1].T if kind == "lora" else theirs[1]]
            ours = [first.grad[task], second.grad[task]]
            torch.testing.assert_close(ours, wanted, atol=1e-4, rtol=1e-3)


def test_an_installed_prefix_is_that_of_prefix_():
    model = MODELS["bert"]()
    other = copy.deepcopy(model)
    phi = drawn_phi(ht.slots_(copy.deepcopy(model), "prefix"), 1)
    prefix_(other, ROWS)
    theirs = [a for a in adapters(other).values() if isinstance(a, Prefix)]
    with torch.no_grad():
        for adapter, (keys, values) in zip(theirs, phi.values(), strict=True):
            adapter.keys.copy_(keys[0]), adapter.values.copy_(values[0])
    ht.install_(model, phi)
    assert torch.equal(anatomy.logits(model, TOKENS), anatomy.logits(other, TOKENS))


@pytest.mark.parametrize("kind", ht.KINDS)
def test_empty_slots_change_nothing_and_come_out(model, kind):
    before = anatomy.logits(model, TOKENS)
    phi = drawn_phi(ht.slots_(model, kind), 1)
    assert torch.equal(anatomy.logits(model, TOKENS), before)
    with ht.given(model, phi):
        assert (anatomy.logits(model, TOKENS) - before).abs().max() > 1e-3
        with disabled(model):
            assert torch.equal(anatomy.logits(model, TOKENS), before)
    assert torch.equal(anatomy.logits(model, TOKENS), before)
    remove_(model)
    assert not adapters(model) and torch.equal(anatomy.logits(model, TOKENS), before)


def test_slots_are_emptied_when_the_model_fails():
    model = MODELS["bert"]()
    phi = drawn_phi(ht.slots_(model, roles=["value"]), 1)
    with pytest.raises(RuntimeError, match="on purpose"), ht.given(model, phi):
        raise RuntimeError("on purpose")
    assert all(slot.phi is None for slot in ht.slots_of(model).values())


def test_slots_of_upper_blocks_and_roles_alone():
    model = MODELS["bert"]()
    places = ht.slots_(model, roles=["value", "up"], below=1)
    assert list(places.values()) == [(32, 32), (32, 48)]
    assert all(".layer.1." in place for place in places)


def test_wrong_kinds_and_places_are_said():
    model = MODELS["bert"]()
    with pytest.raises(ValueError, match="'adapter' is none of lora, prefix"):
        ht.slots_(model, "adapter")
    with pytest.raises(ValueError, match="nowhere is no slot"), ht.given(model, {"nowhere": ()}):
        pass


def test_installed_lora_trains_merges_and_comes_out(model):
    before = anatomy.logits(model, TOKENS)
    ht.install_(model, drawn_phi(ht.slots_(copy.deepcopy(model), roles=["output"]), 1))
    freeze_base_(model)
    assert {n.rsplit(".")[-1] for n in trainable(model)} == {"up", "down"}
    changed = anatomy.logits(moved(model, 0.06), TOKENS)
    merge_(model)
    torch.testing.assert_close(anatomy.logits(model, TOKENS), changed, atol=1e-5, rtol=1e-5)
    remove_(model)
    assert torch.equal(anatomy.logits(model, TOKENS), before)


# H and a frozen model.


def bert():
    torch.manual_seed(1)
    return hf.BertModel(hf.BertConfig(**SIZES, **STILL)).eval()


def texts(count=4):
    torch.manual_seed(8)
    return Encoded(torch.randn(count, 5, 32), torch.ones(count, 5, dtype=torch.bool))


def test_only_h_learns_and_each_task_gets_its_own():
    frozen = Classifier(bert(), 2, below=1)
    places = ht.slots_(frozen.model, roles=["value"], below=1)
    model = ht.HyperTuned(trained_a_little(hyper(places, 32)), frozen)
    vectors, labels = examples(2, 6, 32)
    logits = model(vectors, labels, texts())
    alone = model(vectors[1:], labels[1:], texts().at(slice(2, 4)))
    torch.testing.assert_close(logits[2:], alone, atol=1e-5, rtol=1e-5)
    learning = model.learning()
    assert set(learning) == {f"hyper.{n}" for n, _ in model.hyper.named_parameters()}
    with pytest.raises(AssertionError):
        torch.testing.assert_close(
            logits[2:], model(vectors[:1], labels[:1], texts().at(slice(2, 4)))
        )


def test_examples_in_attention_are_a_prefix_of_their_own_keys_and_values():
    frozen = Classifier(bert(), 2, below=1)
    plain = copy.deepcopy(frozen)
    attention = plain.model.encoder.layer[1].attention.self
    shared = ht.SharedPhi(ht.slots_(frozen.model, roles=["value"], below=1), ROWS)
    context = ht.InContext(shared, 32)
    (place,) = ht.slots_(frozen.model, "prefix", below=1)
    context.attend(frozen.model, place)
    vectors, labels = examples(1, 6, 32)
    found = ht.HyperTuned(context, frozen)(vectors, labels, texts())
    marked = vectors + context.label[labels]
    rows = attention.key(marked), attention.value(marked)
    ht.install_(plain.model, {place: rows})
    torch.testing.assert_close(found, plain(texts()), atol=1e-5, rtol=1e-5)
    assert {n.split(".")[0] for n, _ in context.named_parameters()} == {"shared", "label"}


# The study.


def bank(groups=9, size=24, dim=32):
    torch.manual_seed(3)
    vectors = torch.randn(groups * size, dim) + 2 * torch.randn(groups, 1, dim).expand(
        groups, size, dim
    ).reshape(-1, dim)
    kinds = ["x"] * 6 + ["y"] * 3
    states = Encoded(vectors[:, None], torch.ones(len(vectors), 1, dtype=torch.bool))
    return ht.Bank(states, vectors, kinds, size, torch.zeros(dim))


def test_unseen_groups_are_a_third_of_each_kind():
    kinds = ["x"] * 6 + ["y"] * 3
    seen, unseen = study.split(kinds, 5)
    assert [len(group) for group in (*seen, *unseen)] == [4, 2, 2, 1]
    assert sorted(place for group in (*seen, *unseen) for place in group) == list(range(9))
    assert study.split(kinds, 6) != (seen, unseen)


def test_tasks_tell_two_classes_of_one_kind_apart_and_ask_about_other_texts():
    made, groups = bank(), [[0, 2, 4], [6, 7]]
    tasks = study.drawn_tasks(made, groups, 200, 3, np.random.default_rng(0))
    assert tasks.examples.shape == (200, 16) and tasks.asked.shape == (200, 6)
    group = torch.cat([tasks.examples, tasks.asked], 1) // made.size
    label = torch.cat([tasks.labels, tasks.answers], 1)
    first, second = ([int(g[y == k][0]) for g, y in zip(group, label)] for k in (0, 1))
    assert all(len(set(g[y == k].tolist())) == 1 for g, y in zip(group, label) for k in (0, 1))
    assert all({a, b} <= {0, 2, 4} or {a, b} == {6, 7} for a, b in zip(first, second))
    assert 0.1 < np.mean(np.array(first) > np.array(second)) < 0.4
    for chosen in torch.cat([tasks.examples, tasks.asked], 1):
        assert len(chosen.unique()) == len(chosen)


def test_stretches_show_their_ends_and_ask_about_their_middle():
    made = bank()._replace(size=8)
    tasks = study.stretch_tasks(made, 50, np.random.default_rng(0))
    assert set((tasks.examples % 8).unique().tolist()) == {0, 1, 2, 5, 6, 7}
    assert set((tasks.asked % 8).unique().tolist()) == {3, 4}
    group = tasks.asked // 8
    assert all((group[:, ::2] == group[:, :1]).all(1)) and (group[:, 0] != group[:, 1]).all()
    assert tasks.answers.tolist() == [[0, 1, 0, 1]] * 50
    for examples_, labels, asked in zip(tasks.examples // 8, tasks.labels, group):
        assert all(place == asked[label] for place, label in zip(examples_, labels))


def test_nearest_mean_is_what_it_is_by_hand():
    made = bank()
    tasks = study.drawn_tasks(made, [[0, 1], [6, 7]], 12, 4, np.random.default_rng(1))
    unit = made.vectors / made.vectors.norm(dim=1, keepdim=True)
    right = []
    for row in range(12):
        means = [unit[tasks.examples[row][tasks.labels[row] == y]].mean(0) for y in (0, 1)]
        for place, answer in zip(tasks.asked[row], tasks.answers[row]):
            far = [(unit[place] - mean).norm() for mean in means]
            right.append((far[1] < far[0]).long() == answer)
    assert study.nearest_mean(made, tasks) == pytest.approx(100 * np.mean(right), abs=1e-4)
    assert study.nearest_mean(made, tasks) > 90


def test_fewer_keeps_both_classes_and_shuffled_keeps_the_counts():
    tasks = study.drawn_tasks(bank(), [[0, 1]], 5, 4, np.random.default_rng(1))
    assert study.fewer(tasks, 2).labels.sum(1).tolist() == [2] * 5
    mixed = study.shuffled(tasks.labels)
    assert mixed.sum(1).tolist() == [8] * 5 and not torch.equal(mixed, tasks.labels)


@pytest.mark.parametrize("id", ["labels-matter", "unseen-tasks"])
def test_a_hypermodel_that_ignores_labels_or_writes_the_shared_phi_is_told(id):
    pairs = study.values(Study(paper("hypertuning")).runs())[id]
    blind = [pair._replace(method=pair.baseline + 0.1 * (-1) ** pair.seed) for pair in pairs]
    assert judge(paper("hypertuning").claim(id), blind).verdict == NOT_REPRODUCED


@pytest.mark.parametrize("kind", study.TUNED_LONGER)
def test_the_longer_training_has_the_best_of_four_rates_and_no_edge(kind):
    tried = matching(Study(paper("hypertuning")).runs("TUNING"), kind=kind, **study.LONGER)
    right = {run["rate"]: run["accuracy"] for run in tried}
    best = max(right, key=right.get)
    assert len(right) == 4 and min(right) < best < max(right)
    assert study.TUNED_LONGER[kind] == best


@pytest.mark.parametrize("kind", study.START_LONGER)
def test_tuning_starts_at_the_best_of_four_rates_and_no_edge(kind):
    (run,) = (
        run
        for run in matching(Study(paper("hypertuning")).runs("TUNING"), kind=kind, **study.LONGER)
        if "starts" in run
    )
    losses = dict(zip(run["starts"], run["tuned_losses"]))
    best = min(losses, key=losses.get)
    assert len(losses) == 4 and min(losses) < best < max(losses)
    assert study.START_LONGER[kind] == best


WRONG = {
    "seen_by_h": [
        lambda text, a, b, c: text[:a],
        lambda text, a, b, c: text,
        lambda text, a, b, c: exercises._seen_by_h(text, a, c, b)[1:],
        lambda text, a, b, c: text[a : a + b + c],
    ],
    "change_from": [
        lambda flat, rank, n_in, n_out: exercises._change_from(flat, rank, n_in, n_out).T,
        lambda flat, rank, n_in, n_out: exercises._change_from(flat, rank, n_in, n_out) / rank,
        lambda flat, rank, n_in, n_out: (
            flat[rank * n_in :].view(n_out, rank) @ flat[: rank * n_in].view(rank, n_in)
        ),
    ],
    "share_of_the_task": [
        lambda phis: exercises._share_of_the_task(phis) ** 2,
        lambda phis: (phis - phis.mean()).norm() / phis.norm(),
        lambda phis: torch.tensor(0.0),
    ],
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_answers_are_told(name, tells_right_from_wrong):
    tells_right_from_wrong(getattr(exercises, name), WRONG[name])
