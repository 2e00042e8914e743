import copy
import re

import pytest
import torch
from families_for_tests import TOKENS, loads_again, moved
from safetensors.torch import load_file

from lablib.compression.recover import language_loss, recover
from lablib.evidence import Pair
from lablib.evidence.studies import study
from lablib.exercises import peft_position as exercises
from lablib.models import GPT, GPTConfig, anatomy
from lablib.papers import paper, papers
from lablib.peft import peft_position as pp
from lablib.peft.adapter import (
    adapters,
    freeze_base_,
    matrix,
    merge_,
    n_trainable,
    remove_,
    save_adapter,
    trainable,
)
from lablib.peft.lora import lora_

ROWS = torch.randint(2, 60, (6, 9), generator=torch.Generator().manual_seed(2))


def learn(model, rows, steps=3, rate=0.05):
    names = list(trainable(model)) or "all"
    return recover(model, rows, steps, rate, batch=2, trainable=names, seed=0)


def score(model, rows):
    with torch.no_grad():
        return language_loss(model, rows).item()


def gpt(dim=32, n_layers=2):
    torch.manual_seed(0)
    return GPT(GPTConfig(60, dim, n_layers, 4, 2)).eval()


def test_a_frozen_step_multiplies_four_times_for_six():
    with torch.device("meta"):
        rows = torch.zeros(1, 9, dtype=torch.long)
        full = pp.step_flops(gpt(256, 3), lambda m: language_loss(m, rows))
        assert full["backward"] == 2 * full["forward"]
        model = gpt(256, 3)
        lora_(model, rank=1)
        freeze_base_(model)
        ratio = pp.step_flops(model, lambda m: language_loss(m, rows))["total"] / full["total"]
    assert ratio == pytest.approx(4 / 6, abs=0.04)


def test_one_matrix_costs_what_is_counted_by_hand():
    layer, x = torch.nn.Linear(5, 7, bias=False), torch.randn(3, 5, requires_grad=True)
    found = pp.step_flops(layer, lambda m: m(x).sum())
    assert found == {"forward": 2 * 105, "backward": 4 * 105, "total": 6 * 105}
    layer.weight.requires_grad_(False)
    assert pp.step_flops(layer, lambda m: m(x).sum())["total"] == 4 * 105


def test_bytes_of_training_are_sums_by_hand():
    assert pp.training_bytes(1e9, "full tuning") == 16e9
    assert pp.training_bytes(1e9, "LoRA", 0.01) == pytest.approx(2.16e9)
    assert pp.training_bytes(1e9, "LoRA over 4 bits", 0) == pytest.approx(0.516e9, rel=1e-3)


def test_a_question_is_a_claim_of_a_lab_or_stands_elsewhere():
    asked = [leaf for leaf in pp.MAP if leaf.claim]
    assert {paper(leaf.paper).claim(leaf.claim).kind for leaf in asked} == {"direction"}
    assert len({leaf.claim for leaf in asked}) == len(asked)
    for leaf in pp.MAP:
        own = leaf.claim and leaf.paper == "peft-position"
        assert bool(own) != bool(leaf.where) and leaf.hoped in ("lower", "higher")
    labs = {int(n) for leaf in pp.MAP for n in re.findall(r"\d+", leaf.where)}
    assert labs <= {each.lab for each in papers()}
    bad_news = [
        leaf.claim for leaf in asked if leaf.hoped != paper(leaf.paper).claim(leaf.claim).better
    ]
    assert bad_news == ["rates"]


@pytest.mark.parametrize(
    "leaf", [leaf for leaf in pp.MAP if leaf.claim], ids=lambda leaf: leaf.claim
)
def test_a_questions_study_has_pairs_for_its_needle(leaf):
    kept = study(leaf.paper)
    pairs = kept.module.values(kept.runs())[leaf.claim]
    assert len(pairs) >= 5 and all(isinstance(pair, Pair) for pair in pairs)


def test_ranks_by_block_start_as_the_base_merge_and_come_back(model, tmp_path):
    plain = copy.deepcopy(model)
    before = anatomy.logits(model, TOKENS)
    pp.ranked_lora_(model, [0, 3], alpha=2.0)
    torch.testing.assert_close(anatomy.logits(model, TOKENS), before)
    assert all(f"{anatomy.family(model).blocks}.1." in name for name in adapters(model))
    assert {a.factor for a in adapters(model).values()} == {2.0}
    changed = anatomy.logits(moved(model), TOKENS)
    loads_again(model, plain, changed, tmp_path)
    merge_(model)
    torch.testing.assert_close(anatomy.logits(model, TOKENS), changed, atol=1e-5, rtol=1e-5)
    remove_(model)
    assert torch.equal(anatomy.logits(model, TOKENS), before)


def test_ranks_alike_are_plain_lora():
    one, other = gpt(), gpt()
    for model, put in ((one, lambda m: pp.ranked_lora_(m, [4, 4])), (other, lora_)):
        torch.manual_seed(1)
        put(model) if model is one else put(model, rank=4)
        moved(model)
    assert torch.equal(one(TOKENS), other(TOKENS))
    with pytest.raises(ValueError, match="3 ranks are given, and the model has 2 blocks"):
        pp.ranked_lora_(gpt(), [1, 2, 3])


def test_allocations_share_the_whole_budget_in_different_ways():
    found = pp.allocations(3, 12, 20, seed=0)
    assert found[0] == (4, 4, 4) and len(set(found)) == 20
    assert all(sum(ranks) == 12 and min(ranks) >= 0 for ranks in found)
    assert found == pp.allocations(3, 12, 20, seed=0) != pp.allocations(3, 12, 20, seed=1)
    model = gpt(n_layers=3)
    counts = set()
    for ranks in found:
        pp.ranked_lora_(model, ranks)
        counts.add(n_trainable(model))
        remove_(model)
    assert len(counts) == 1
    with pytest.raises(ValueError, match="can't be shared evenly"):
        pp.allocations(5, 12, 2, seed=0)
    with pytest.raises(ValueError, match="there are no 4 ways"):
        pp.allocations(2, 2, 4, seed=0)


def test_halving_keeps_the_better_half_and_doubles_the_steps():
    seen = []

    def loss(candidate, steps):
        seen.append((candidate, steps))
        return abs(candidate - 5) + 1 / steps

    best, rounds = pp.successive_halving([1, 9, 4, 5, 20, 7, 30, 6], loss, steps=10)
    assert best == 5
    assert [sorted(r) for r in rounds] == [[1, 4, 5, 6, 7, 9, 20, 30], [4, 5, 6, 7], [4, 5]]
    assert {steps for _, steps in seen} == {10, 20, 40}


def test_pruning_takes_the_smallest_of_each_matrix_and_a_merge_fills_them_again(model):
    kept = pp.prune_(model, 0.3)
    for name, layer in anatomy.projections(model).items():
        mask, weight = kept[name], matrix(layer)
        assert (weight[~mask] == 0).all() and (~mask).float().mean() == pytest.approx(0.3, abs=1e-3)
    lora_(model, rank=2)
    merge_(moved(model))
    zeros = [(layer.base.weight == 0).float().mean() for layer in adapters(model).values()]
    assert max(zeros) < 0.01


def test_what_stays_is_larger_than_what_goes():
    model = gpt()
    before = {n: p.weight.detach().clone() for n, p in anatomy.projections(model).items()}
    for name, mask in pp.prune_(model, 0.5).items():
        assert before[name][mask].abs().min() >= before[name][~mask].abs().max()


def test_an_adapter_a_task_forgets_nothing_and_one_for_all_does():
    tasks = {"one": ROWS, "two": (ROWS + 7) % 60, "three": (ROWS * 3) % 60}
    apart = pp.continual(gpt(), tasks, learn, score, lambda m: lora_(m, rank=2))
    assert pp.forgotten(apart) == 0
    assert apart[0]["one"] == apart[2]["one"] != apart[2]["two"]
    whole = gpt()
    together = pp.continual(whole, tasks, learn, score)
    assert pp.forgotten(together) > 0.01
    assert together[2]["three"] == pytest.approx(score(whole, tasks["three"]))


def test_a_task_to_come_is_scored_by_the_base_and_the_base_stays():
    model, tasks = gpt(), {"one": ROWS, "two": (ROWS + 7) % 60}
    before = score(model, tasks["two"])
    table = pp.continual(model, tasks, learn, score, lambda m: lora_(m, rank=2))
    assert table[0]["two"] == before == score(model, tasks["two"])
    assert not adapters(model)


def test_forgotten_is_a_mean_by_hand():
    table = [{"a": 1.0, "b": 9, "c": 9}, {"a": 2.0, "b": 3.0, "c": 9}, {"a": 4.0, "b": 3.5, "c": 1}]
    assert pp.forgotten(table) == pytest.approx((3.0 + 0.5) / 2)


def test_one_client_alone_is_ordinary_training_and_bytes_are_those_of_its_file():
    one, other = gpt(), gpt()
    for model in (one, other):
        torch.manual_seed(1)
        lora_(model, rank=2)
    names = list(trainable(one))
    told = pp.federated(one, names, {"me": ROWS}, learn, score, rounds=2)
    for _ in range(2):
        learn(other, ROWS)
    for name, parameter in trainable(other).items():
        torch.testing.assert_close(trainable(one)[name], parameter)
    assert told.scores[-1]["me"] == pytest.approx(score(other, ROWS))
    assert told.sent == 2 * 2 * sum(p.nbytes for p in trainable(one).values())
    assert told.sent == 2 * 2 * pp.saved_bytes(one).tensors


def test_bytes_of_a_saved_adapter_are_those_of_its_file(tmp_path):
    model = gpt()
    lora_(model, rank=2)
    save_adapter(model, file := tmp_path / "a.safetensors")
    saved = pp.saved_bytes(model)
    assert sum(saved) == file.stat().st_size
    assert saved.tensors == sum(t.nbytes for t in load_file(file).values())
    lora_(twice := gpt(), rank=4)
    assert pp.saved_bytes(twice).tensors == 2 * saved.tensors and saved.header > 0


def test_two_clients_meet_in_the_middle_whatever_their_order():
    data = {"one": ROWS, "two": (ROWS + 7) % 60}
    results = []
    for clients in (data, dict(reversed(data.items()))):
        model = gpt()
        torch.manual_seed(1)
        lora_(model, rank=2)
        pp.federated(model, list(trainable(model)), clients, learn, score, rounds=1)
        results.append(model(TOKENS))
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


def test_a_mean_is_weighed():
    states = [{"a": torch.tensor([1.0, 2.0])}, {"a": torch.tensor([5.0, 2.0])}]
    assert pp.average(states)["a"].tolist() == [3.0, 2.0]
    assert pp.average(states, [3, 1])["a"].tolist() == [2.0, 2.0]
    assert pp.average(states, [0, 1])["a"].tolist() == [5.0, 2.0]


def _product_of_means(pairs):
    """B and A averaged apart, as the loop of federated averaging does it."""
    ups, downs = (torch.stack(part) for part in zip(*pairs))
    return ups.mean(0) @ downs.mean(0)


WRONG = {
    "step_flops": [
        lambda n_out, n_in, tokens, trains: 2 * n_out * n_in * tokens,
        lambda n_out, n_in, tokens, trains: (4 if trains else 2) * n_out * n_in * tokens,
        lambda n_out, n_in, tokens, trains: 6 * n_out * n_in * tokens,
    ],
    "average_change": [
        _product_of_means,
        lambda pairs: sum(up @ down for up, down in pairs),
    ],
    "round_bytes": [
        lambda shapes, rank, clients, size: 2 * clients * size * sum(a * b for a, b in shapes),
        lambda shapes, rank, clients, size: clients * size * rank * sum(a + b for a, b in shapes),
        lambda shapes, rank, clients, size: 2 * size * rank * sum(a + b for a, b in shapes),
    ],
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_answers_are_told(name, tells_right_from_wrong):
    tells_right_from_wrong(getattr(exercises, name), WRONG[name])
