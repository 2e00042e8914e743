import copy
import itertools

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from lablib.compression import flexigpt as fg
from lablib.compression.recover import recover
from lablib.evidence import matching
from lablib.evidence.studies import Study
from lablib.exercises import flexigpt as exercises
from lablib.models import GPT, GPTConfig, anatomy
from lablib.papers import paper
from lablib.studies import flexigpt as study

METRICS = ("paper", "whole", "plain")


def gpt(**options):
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "dim": 32, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2}
    return GPT(GPTConfig(**sizes, max_length=40, init_std=0.1, **options)).eval()


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes, **heads)).eval()


both = pytest.mark.parametrize("make", [gpt, llama])


def tokens(rows=3, length=12):
    return torch.randint(50, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model, x=None):
    return anatomy.logits(model, tokens() if x is None else x)


# Influence.


def test_influence_by_hand():
    x = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]])
    y = torch.tensor([[6.0, 8.0], [0.0, 1.0], [0.0, -2.0]])
    assert fg.influence(x, y).item() == pytest.approx(1 - (1 + 0 - 1) / 3)


def test_influence_sees_angles_not_lengths():
    x, y = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    torch.testing.assert_close(fg.influence(3 * x, 0.1 * y), fg.influence(x, y))
    assert fg.influence(x, 7 * x).abs() < 1e-6


@both
def test_block_influence_reads_each_block(make):
    model, rows = make(), tokens()
    states = [anatomy.embedding(model)(rows[:, :-1])]
    grab = [
        block.register_forward_hook(lambda m, given, made: states.append(made))
        for block in anatomy.blocks(model)
    ]
    logits(model, rows[:, :-1])
    for handle in grab:
        handle.remove()
    by_hand = [1 - F.cosine_similarity(x, y, -1).mean() for x, y in itertools.pairwise(states)]
    torch.testing.assert_close(fg.block_influence(model, rows), torch.stack(by_hand).detach())


def test_hooks_are_gone_also_when_a_pass_fails():
    model = gpt()
    with pytest.raises(IndexError):
        fg.block_influence(model, tokens() + 50)
    assert not any(block._forward_hooks for block in model.blocks)


def test_the_least_go():
    assert fg.least(torch.tensor([0.9, 0.1, 0.4, 0.2]), 2) == [1, 3]
    with pytest.raises(ValueError, match="at least one must stay"):
        fg.least(torch.rand(3), 3)


# Low rank.


def test_low_rank_is_the_nearest_product():
    weight = torch.randn(9, 6)
    for rank in range(1, 7):
        a, b = fg.low_rank(weight, rank)
        assert a.shape == (9, rank) and b.shape == (rank, 6)
        missed = (weight - a @ b).norm()
        torch.testing.assert_close(missed, torch.linalg.svdvals(weight)[rank:].norm())
        random, _ = torch.linalg.qr(torch.randn(9, rank))
        assert missed <= (weight - random @ (random.t() @ weight)).norm() + 1e-5


def test_low_rank_is_as_near_as_torchs_own():
    torch.manual_seed(0)
    weight = torch.randn(60, 40)
    u, s, v = torch.svd_lowrank(weight, q=8, niter=60)
    a, b = fg.low_rank(weight, 8)
    torch.testing.assert_close((weight - a @ b).norm(), (weight - u * s @ v.t()).norm())


def test_distance_by_hand():
    one, other = (
        torch.diag(torch.tensor([3.0, 1.0, 0.0])),
        torch.diag(torch.tensor([0.0, 2.0, 0.0])),
    )
    # whole: the difference is diag(3, -1, 0), and its first singular value is held
    assert fg.distance(one, other, 1, "whole").item() == pytest.approx(1.0)
    # paper: seen through one each, diag(3, 0, 0) and diag(0, 2, 0)
    assert fg.distance(one, other, 1).item() == pytest.approx(2.0)
    assert fg.distance(one, other, 1, "plain").item() == pytest.approx(10**0.5)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("rank", [1, 5, 24])
def test_all_distances_at_once_are_those_of_the_definition(metric, rank):
    model = gpt()
    table = fg.distances(model, rank, metric)
    for i, j in itertools.product(range(4), repeat=2):
        by_hand = sum(
            fg.distance(*(anatomy.projection(model, b, role).weight for b in (i, j)), rank, metric)
            for role in anatomy.family(model).projections
        )
        assert table[i, j].item() == pytest.approx(0.0 if i == j else by_hand.item(), abs=2e-3)


def test_distances_of_some_roles_add_up():
    model = gpt()
    parts = [fg.distances(model, 4, roles=(role,)) for role in ("query", "down")]
    torch.testing.assert_close(fg.distances(model, 4, roles=("query", "down")), sum(parts))


def test_a_base_stays():
    table = torch.tensor([[0.0, 1, 2, 9], [1, 0, 3, 9], [2, 3, 0, 4], [9, 9, 4, 0]])
    assert fg.bases(table, [0]) == {0: 1}
    assert fg.bases(table, [0, 1]) == {0: 2, 1: 2}
    assert fg.bases(table, [1, 3]) == {1: 0, 3: 2}


# Shared blocks.


@both
def test_at_full_rank_nothing_changes(make):
    model = make()
    before = logits(model)
    fg.share_(model, {1: 2, 3: 0}, 999, gamma=None)
    assert fg.shared_places(model) == [1, 3]
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-4)


@both
def test_with_zero_thin_matrices_it_computes_as_its_base(make):
    model, other = make(), make()
    blocks = anatomy.blocks(other)
    for role in anatomy.family(model).projections:
        place, base = (anatomy.projection(other, i, role).weight.data for i in (1, 2))
        place.copy_(base)
    assert len(blocks) == 4
    fg.share_(model, {1: 2}, 4, gamma=None, start="zero")
    torch.testing.assert_close(logits(model), logits(other), atol=1e-5, rtol=1e-4)


@both
def test_higher_ranks_come_nearer(make):
    model = make()
    off = []
    for rank in (1, 8, 20, 32):
        shared = fg.share_(copy.deepcopy(model), {1: 2}, rank, gamma=None)
        off.append((logits(shared) - logits(model)).norm().item())
    assert off == sorted(off, reverse=True) and off[-1] < 1e-3 < off[0]


@both
def test_the_base_is_shared_by_reference(make):
    model = make()
    whole = sum(p.numel() for p in model.parameters())
    block = sum(p.numel() for p in anatomy.blocks(model)[1].parameters())
    fg.share_(model, {1: 2}, 2)
    sizes = dict(model.named_parameters())
    new = sum(sizes[name].numel() for name in fg.learning(model))
    norms = 2 * 32
    assert sum(p.numel() for p in model.parameters()) == whole - block + new + norms
    base = anatomy.projection(model, 2, "down")
    assert anatomy.projection(model, 1, "down").base is base
    with torch.no_grad():
        before = logits(model)
        base.weight.add_(0.1)
    assert not torch.allclose(logits(model), before)


def test_a_shared_block_keeps_its_own_norms():
    model = gpt()
    with torch.no_grad():
        model.blocks[1].mlp_norm.weight.fill_(3.0)
    fg.share_(model, {1: 2}, 2)
    assert (model.blocks[1].mlp_norm.weight == 3).all()
    assert (model.blocks[2].mlp_norm.weight == 1).all()


def test_outputs_are_normalized_where_they_join_the_residual():
    model = fg.share_(gpt(), {1: 2}, 4, gamma=0.25)
    x = torch.randn(2, 5, 32)
    y = model.blocks[1].mlp(x)
    torch.testing.assert_close(y.mean(-1), torch.zeros(2, 5), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.std(-1, correction=0), torch.full((2, 5), 0.25), atol=5e-3, rtol=0)
    plain = fg.share_(gpt(), {1: 2}, 4, gamma=None).blocks[1].mlp(x)
    by_hand = 0.25 * (plain - plain.mean(-1, True)) / plain.std(-1, correction=0, keepdim=True)
    torch.testing.assert_close(y, by_hand, atol=5e-3, rtol=1e-2)
    gained = [n for n, m in model.named_modules() if getattr(m, "gain", None) is not None]
    assert gained == ["blocks.1.attention.output", "blocks.1.mlp.down"]


@both
def test_only_thin_matrices_and_gains_learn(make):
    model = fg.share_(make(), {1: 2}, 4)
    before = {name: p.clone() for name, p in model.named_parameters()}
    recover(model, tokens(8), 3, 1e-2, batch=4, trainable=fg.learning(model))
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == set(fg.learning(model)) and len(changed) == 7 * 2 + 2


@both
def test_blocks_that_are_shared_are_no_bases(make):
    model = fg.share_(make(), {1: 2}, 4)
    for pair in ({0: 1}, {1: 0}):
        with pytest.raises(ValueError, match="shared block"):
            fg.share_(model, pair, 4)


def test_other_layers_are_refused():
    with pytest.raises(ValueError, match=r"no nn\.Linear"):
        fg.shared_block(torch.nn.ReLU(), torch.nn.ReLU(), 2)


def test_prune_takes_the_least_and_their_nearest():
    model, rows = gpt(), tokens()
    gone = fg.least(fg.block_influence(model, rows), 2)
    chosen = fg.bases(fg.distances(model, 4), gone)
    assert fg.prune_(model, rows, 0.5, 4) == chosen
    assert fg.shared_places(model) == gone


# Without blocks, and with more of them.


@both
def test_without_blocks_and_back(make):
    model = make()
    before = logits(model)
    with fg.without(model, [1, 2]):
        dropped = logits(model)
    assert torch.equal(logits(model), before) and not torch.allclose(dropped, before)
    small = copy.deepcopy(model)
    kept = torch.nn.ModuleList([anatomy.blocks(small)[i] for i in (0, 3)])
    anatomy.replace(small, anatomy.family(small).blocks, kept)
    fg._number(small)
    torch.testing.assert_close(logits(small), dropped)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [("block", [0, 1, 1, 1, 2, 2, 2, 3]), ("sequential", [0, 1, 2, 1, 2, 1, 2, 3])],
)
def test_order_of_repetitions(pattern, expected):
    assert fg.order(4, 1, 2, 3, pattern) == expected


def test_orders_that_cant_be():
    for span in ((2, 1, 2), (0, 4, 2), (0, 1, 0)):
        with pytest.raises(ValueError, match="no span"):
            fg.order(4, *span)
    with pytest.raises(ValueError, match="pattern"):
        fg.order(4, 1, 2, 2, "random")


@both
@pytest.mark.parametrize("pattern", ["block", "sequential"])
def test_a_longer_model_begins_as_it_was_where_gains_are_zero(make, pattern):
    model = make()
    before, size = logits(model), sum(p.numel() for p in model.parameters())
    fg.extend_(model, 1, 2, 2, pattern, rank=2, gamma=0.0)
    assert len(anatomy.blocks(model)) == 6
    torch.testing.assert_close(logits(model), before)
    more = sum(p.numel() for p in model.parameters()) - size
    per_block = sum(2 * sum(p.shape) for p in weights_of(model)) + 2 * 32 + 2 * 32
    assert more == 2 * per_block


def weights_of(model):
    return [anatomy.projection(model, 0, r).weight for r in anatomy.family(model).projections]


def test_a_longer_model_trains_as_a_whole():
    model = fg.extend_(gpt(), 1, 2, rank=2)
    before = {name: p.clone() for name, p in model.named_parameters()}
    recover(model, tokens(8), 3, 1e-2, batch=4)
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert not still


@both
def test_a_longer_model_has_a_cache_for_each_block(make):
    model = fg.extend_(make(), 1, 2, rank=2, gamma=0.5)
    x = tokens(1, 6)
    if make is gpt:
        by_cache = model.generate(x, 8, greedy=True)
        assert torch.equal(by_cache, model.generate(x, 8, greedy=True, use_cache=False))
    else:
        options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        by_cache = model.generate(x, **options)
        assert torch.equal(by_cache, model.generate(x, **options, use_cache=False))


# Speculation.


@pytest.mark.parametrize("ahead", [1, 3, 8])
def test_speculation_says_what_the_whole_model_says(ahead):
    torch.manual_seed(3)
    model = gpt()
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            parameter.mul_(2.5)
    fg.share_(model, {1: 0, 2: 3}, 4, gamma=0.8)
    prompt = tokens(1, 5)[0]
    told, share = fg.speculate(model, prompt, 17, ahead)
    assert torch.equal(told, model.generate(prompt, 17, greedy=True))
    assert 0 <= share <= 1


def test_speculation_keeps_all_where_shared_blocks_do_nothing():
    model = fg.share_(gpt(), {1: 0}, 4, gamma=0.0)
    assert fg.speculate(model, tokens(1, 5)[0], 9)[1] == 1.0


# Numbers, study, exercises.


def test_a_block_of_llama():
    assert fg.block_parameters(4096, 11008) == 202_383_360
    assert fg.shared_parameters(4096, 11008, 256) == 19_996_672


@pytest.mark.parametrize("make", [gpt])
def test_parameters_are_those_of_a_model(make):
    model = make()
    block = sum(p.numel() for p in model.blocks[0].parameters())
    ffn = model.config.ffn_dim
    assert fg.block_parameters(32, ffn, 16) == block
    fg.share_(model, {1: 2}, 3)
    named = dict(model.named_parameters())
    learning = sum(named[name].numel() for name in fg.learning(model))
    assert fg.shared_parameters(32, ffn, 3, 16) == learning


def test_published_figures():
    rows = fg.published()
    assert {row["unit"] for row in rows} <= {"perplexity", "%", "%, about", "", "tokens"}
    assert all(float(row["value"]) > 0 and row["source"] for row in rows)
    start = {row["method"]: row["value"] for row in rows if row["what"] == "start PPL"}
    assert start["without output norm"] == "8648.94" and start["full method"] == "21.82"


def test_lora_trains_at_least_as_much():
    sizes = (study.SMALL, study.RANK), (study.SMALL, study.MORE), (study.REAL, study.REAL_RANK)
    for model, rank in sizes:
        blocks = len(anatomy.blocks(study.whole(model)))
        gone = study.GONE[model]
        assert study.lora_rank(model, rank) * (blocks - gone) >= rank * gone


def test_slices_of_held_out_text_are_disjoint():
    ids = torch.arange(40 * (study.SCORED + 1) * 32)
    parts = [study.slice_of(ids, seed, 32).flatten() for seed in range(5)]
    assert len(torch.cat(parts).unique()) == sum(map(len, parts))


def test_distances_are_stored_for_each_power_of_two_that_the_lab_offers():
    maps = matching(Study(paper("flexigpt")).runs(), kind="map", metric="paper")
    assert [run["rank"] for run in maps] == [2**power for power in range(2, 8)]
    assert len({tuple(run["distances"]) for run in maps}) == len(maps)
    for run in maps:
        assert len(run["distances"]) == 30 * 29 // 2
        assert all(block != near for block, near in enumerate(run["nearest"]))


WRONG = {
    "block_influence": [
        lambda x, y: F.cosine_similarity(x, y, dim=-1).mean(),
        lambda x, y: (1 - F.cosine_similarity(x, y, dim=-1)).sum(),
        lambda x, y: 1 - F.cosine_similarity(x.flatten(), y.flatten(), dim=0),
    ],
    "stand_in": [
        lambda removed, base, rank: removed,
        lambda removed, base, rank: base + fg.low_rank(base - removed, rank)[0] @ fg.low_rank(
            base - removed, rank)[1],
        lambda removed, base, rank: torch.matmul(*fg.low_rank(removed, rank)),
    ],
    "rank_that_saves_nothing": [
        lambda shapes: min(min(shape) for shape in shapes),
        lambda shapes: sum(o * i for o, i in shapes) // sum(o + i for o, i in shapes),
        lambda shapes: 2,
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_answers_are_told(name, tells_right_from_wrong):
    tells_right_from_wrong(getattr(exercises, name), WRONG[name])
