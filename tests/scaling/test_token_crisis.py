import copy
import inspect
import itertools

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lablib.evidence import matching
from lablib.evidence.studies import Study
from lablib.exercises import token_crisis as exercises
from lablib.experts.accounting import flops
from lablib.models import GPT, GPTConfig
from lablib.papers import paper
from lablib.scaling import token_crisis as tc
from lablib.studies import token_crisis as study
from lablib.training import fit, next_token_loss


def small(**options):
    torch.manual_seed(1)
    sizes = {"vocab_size": 50, "dim": 16, "n_layers": 3, "n_heads": 2, "init_std": 0.3}
    return GPT(GPTConfig(**sizes | {"max_length": 32} | options))


def tokens(rows=4, length=13):
    return torch.randint(50, (rows, length))


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_is_torchs(p):
    x = torch.randn(200, 300)
    torch.manual_seed(3)
    ours = tc.dropout(x, p)
    lost = ours == 0
    torch.testing.assert_close(ours[~lost], x[~lost] / (1 - p))
    assert lost.float().mean().item() == pytest.approx(p, abs=0.01)
    theirs = F.dropout(x, p)
    assert (theirs == 0).float().mean().item() == pytest.approx(p, abs=0.01)
    torch.testing.assert_close(ours.var(), theirs.var(), rtol=0.05, atol=0)


def test_drop_path_takes_whole_sequences_and_keeps_the_mean():
    x = torch.ones(4000, 3, 2)
    made = tc.drop_path(x, 0.25)
    torch.testing.assert_close(made.unique(), torch.tensor([0, 4 / 3]))
    assert (made == made[:, :1, :1]).all(), "a sequence is kept or lost as a whole"
    assert made.mean().item() == pytest.approx(1, abs=0.03)
    assert 0 < (made[:, 0, 0] == 0).sum() < 4000


def test_smoothing_equals_torchs_in_training_and_is_off_in_evaluation():
    model, batch = small(), tokens()
    logits = model(batch[:, :-1]).flatten(0, 1)
    wanted = F.cross_entropy(logits, batch[:, 1:].flatten(), label_smoothing=0.2)
    torch.testing.assert_close(tc.smoothed_loss(model, batch, 0.2), wanted)
    model.eval()
    plain = next_token_loss(model, batch)
    torch.testing.assert_close(tc.smoothed_loss(model, batch, 0.2), plain)
    assert not torch.allclose(wanted, plain)


@pytest.mark.parametrize("drop", [tc.dropout, tc.drop_path])
def test_noise_is_off_in_evaluation_and_at_0(drop):
    model, batch = small(), tokens()
    before = model(batch)
    noise = tc.noisy_(model, 0.5, drop)
    assert not torch.allclose(model(batch), before)
    torch.testing.assert_close(model.eval()(batch), before)
    noise.p = 0.0
    torch.testing.assert_close(model.train()(batch), before)


def test_noise_is_in_every_part_once_also_where_blocks_are_shared():
    model = tc.share_blocks_(small())
    calls = []
    noise = tc.noisy_(model, 0.5, lambda x, p: calls.append(p) or x)
    model(tokens())
    assert calls == [0.5] * 6, "two parts of each of three layers"
    noise.drop = tc.drop_path
    with pytest.raises(ValueError, match="p is 1"):
        tc.Noise(1.0)


def test_drop_path_of_all_parts_leaves_the_embedding():
    model, batch = small(), tokens()
    tc.noisy_(model, 0.999999, tc.drop_path)
    torch.testing.assert_close(model(batch), model.head(model.norm(model.embedding(batch))))


def test_noise_works_on_a_model_of_transformers():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 50}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).train()
    batch = tokens()
    before = model(batch).logits
    tc.noisy_(model, 0.5)
    assert not torch.allclose(model(batch).logits, before)
    torch.testing.assert_close(model.eval()(batch).logits, before)


def test_late_dropout_is_the_plain_run_until_its_step():
    rows = [tokens() for _ in range(6)]
    losses = []
    for late in (False, True):
        model = small()
        noise = tc.noisy_(model, 0.0)
        options = {"callbacks": [tc.switched_on(noise, 0.5, 3)]} if late else {}
        losses.append(fit(model, rows, steps=6, lr=1e-3, progress=False, **options).losses)
    assert losses[0][:3] == losses[1][:3]
    assert losses[0][3] != losses[1][3] and noise.p == 0.5


def test_shared_blocks_have_a_blocks_parameters_and_the_same_flops():
    dense, shared = small(), tc.share_blocks_(small())
    block = sum(p.numel() for p in dense.blocks[0].parameters())
    assert dense.n_parameters() - shared.n_parameters() == 2 * block
    dense.blocks[1] = copy.deepcopy(dense.blocks[0])
    dense.blocks[2] = copy.deepcopy(dense.blocks[0])
    batch = tokens()
    torch.testing.assert_close(shared(batch), dense(batch))


def test_the_studys_models_have_equal_flops_and_other_sizes():
    plain, experts = study.build("plain", 0), study.build("experts", 0)
    assert flops(experts, 128) == flops(plain, 128)
    kinds = ("small", "shared", "plain", "experts")
    sizes = [study.build(kind, 0).n_parameters(embeddings=False) for kind in kinds]
    assert sizes == sorted(set(sizes)), "each has more parameters than the one before"
    deviation = experts.blocks[0].mlp.experts.gate_up.std().item()
    assert deviation == pytest.approx(48**-0.5, rel=0.05)


def test_degradation():
    made = tc.degradation([3.0, 2.5, 2.75], fresh=2.25)
    assert made == (0.25, 0.5)


def test_bytes_losses_are_the_models():
    model = small(vocab_size=256)
    text = b"to be or not"
    ids = torch.tensor(list(text))[None]
    losses = tc.byte_losses(model, text)
    assert len(losses) == len(text) - 1
    torch.testing.assert_close(losses.mean(), next_token_loss(model, ids))
    with pytest.raises(ValueError, match="1 bytes"):
        tc.byte_losses(model, b"t")
    with pytest.raises(ValueError, match="2 to 33"):
        tc.byte_losses(model, b"t" * 34)


@pytest.mark.parametrize("size", ["base", "large", "xl"])
def test_t5_counts_are_those_of_transformers(size):
    from transformers import T5Config, T5ForConditionalGeneration

    dim, width, layers, heads = tc.T5[size]
    sizes = {"d_model": dim, "d_ff": width, "num_layers": layers, "num_heads": heads}
    gated = {"feed_forward_proj": "gated-gelu", "vocab_size": 32128}
    with torch.device("meta"):
        model = T5ForConditionalGeneration(T5Config(**sizes, **gated))
        # Version 1.1 has a head of its own; transformers 5 ties every T5's.
        model.lm_head = torch.nn.Linear(dim, 32128, bias=False)
    assert tc.t5_parameters(size) == sum(p.numel() for p in model.parameters())


def test_published_values_agree_with_the_counts():
    printed = {name: float(row["value"]) for name, row in tc.published().items()}
    counts = {
        "t5-large": tc.t5_parameters("large"),
        "moe-base": tc.t5_parameters("base", experts=16),
        "moe-large": tc.t5_parameters("large", experts=16),
        "t5-xl": tc.t5_parameters("xl"),
    }
    for name, count in counts.items():
        assert count / 1e6 == pytest.approx(printed[name], rel=0.02)
    assert printed["repeated"] < printed["smoothing"] < printed["dropout"] < printed["fresh"]
    assert all(row["source"] for row in tc.published().values())


def test_a_valley_has_each_strength_once_on_one_seed_at_the_rate_of_new_text():
    rows = [
        {"kind": "plain", "unique": 8, "lr": study.RATE},
        {"kind": "plain", "unique": None},
        {"kind": "slow", "unique": 8, "lr": study.SLOW},
        {"kind": "dropout", "unique": 8, "strength": 0.1},
        {"kind": "large", "unique": 8, "strength": 0.1},
        {"kind": "large", "unique": 8, "lr": study.RATE},
        {"kind": "large", "unique": 8, "lr": study.SLOW_LARGE},
    ]
    rows = [row | {"seed": seed} for seed in (100, 101) for row in rows]
    assert study.valley(rows, 8) == {0.0: rows[0], 0.1: rows[3]}
    assert study.valley(rows, None) == {0.0: rows[1]}
    assert study.valley(rows, 8, "large") == {0.1: rows[4], 0.0: rows[5]}
    assert study.valley(rows, 8, seed=101) == {0.0: rows[7], 0.1: rows[10]}


def tuning(value, **where):
    """Mean loss over the tuning seeds, by what was tried; what one seed alone tried is left out."""
    losses = {}
    for run in matching(Study(paper("token-crisis")).runs("TUNING"), unique=study.LITTLE, **where):
        losses.setdefault(run[value], []).append(run["loss"])
    return {tried: sum(both) / 2 for tried, both in losses.items() if len(both) == 2}


def test_what_is_judged_was_the_best_of_four_on_two_tuning_seeds():
    means = {kind: tuning("strength", kind=kind) for kind in study.REMEDIES}
    best = {kind: min(tried, key=tried.get) for kind, tried in means.items()}
    assert all(len(tried) == 4 for tried in means.values())
    assert best == {kind: study.STRENGTH[kind] for kind in study.REMEDIES}
    assert study.STRENGTH["late"] == study.STRENGTH["dropout"]
    lowest = {kind: min(means[kind].values()) for kind in study.REMEDIES if kind != "dropout"}
    assert min(lowest, key=lowest.get) == study.RIVAL
    rates = tuning("lr", kind="slow")
    assert len(rates) == 4 and min(rates, key=rates.get) == study.SLOW


@pytest.mark.parametrize(
    ("twins", "carried", "slow", "tries"),
    [
        (study.TWINS, study.CARRIED, study.SLOW_LARGE, (4, 5)),
        (study.MILLION, study.CARRIED_MILLION, study.SLOW_MILLION, (5, 7)),
    ],
)
def test_what_is_carried_is_the_best_of_the_tuning_seed(twins, carried, slow, tries):
    runs = Study(paper("token-crisis")).runs("TUNING")
    experts = study.valley(runs, study.LITTLE, twins[0])
    assert min(experts, key=lambda p: experts[p]["loss"]) == carried
    plain = [r for r in runs if r["kind"] == twins[1] and "strength" not in r]
    assert min(plain, key=lambda r: r["loss"])["lr"] == slow
    assert (len(experts) - 1, len(plain)) == tries
    if twins == study.MILLION:
        assert carried < max(experts) and slow > min(r["lr"] for r in plain), "no end is the best"


def test_a_carried_dropout_is_judged_against_none_at_the_best_rate_and_at_its_own():
    role = study.ROLES["carried-million"]
    assert {role[side]["kind"] for side in role} == {study.MILLION[1]}
    rates = [(role[side]["strength"], role[side]["lr"]) for side in ("method", "baseline")]
    assert rates == [(study.CARRIED_MILLION, study.RATE), (0.0, study.SLOW_MILLION)]
    assert role["control"] == role["baseline"] | {"lr": study.RATE}
    for side in role.values():
        assert len(matching(study.POINTS, **side)) == len(study.SEEDS)


def test_the_objectives_have_the_rate_that_is_best_for_new_text_on_ul2():
    runs = Study(paper("token-crisis")).runs("TUNING")
    rates = {r["lr"]: r["loss"] for r in matching(runs, kind="ul2", unique=None)}
    assert len(rates) == 3 and min(rates, key=rates.get) == study.OBJECTIVE_RATE
    judged = [p for p in study.POINTS if p["kind"] in study.OBJECTIVES]
    assert {point["lr"] for point in judged} == {study.OBJECTIVE_RATE}


def test_a_change_is_paired_by_seed_and_a_cost_is_that_of_repeating():
    losses = {("ul2", study.LITTLE): 3.0, ("ul2", None): 2.5, ("spans", None): 2.25}
    rows = [
        {"kind": kind, "unique": unique, "seed": seed, "loss": loss + seed}
        for (kind, unique), loss in losses.items()
        for seed in (1, 0)
    ]
    assert study.change(rows, {"kind": "spans"}, {"kind": "ul2", "unique": None}) == [-0.25] * 2
    assert study.cost(rows, "ul2") == {0: 0.5, 1: 0.5}


def test_every_model_sees_as_many_bytes_and_what_is_repeated_32_or_8_times():
    assert {study.LITTLE * 32, study.MORE * 8} == {study.MB}
    assert inspect.signature(study.run).parameters["tokens"].default == study.MB
    assert not any("tokens" in point for point in study.POINTS + study.TUNING)


@pytest.mark.parametrize(
    ("twins", "least", "most"), [(study.TWINS, 1.5e5, 1.7e5), (study.MILLION, 0.8e6, 0.9e6)]
)
def test_the_twins_have_nearly_as_many_parameters(twins, least, most):
    models = [study.build(kind, 0) for kind in twins]
    experts, dense = (model.n_parameters(embeddings=False) for model in models)
    assert least < dense < experts < most and experts / dense < 1.12  # the paper's: 0.89, 0.86
    cheap, dear = (flops(model, 128).training for model in models)
    assert cheap < 0.5 * dear


def test_a_twin_of_a_million_has_eight_experts_as_wide_as_the_dense_models():
    experts, dense = study.build(study.MILLION[0], 0), study.build("large", 0)
    assert len(experts.blocks[0].mlp.experts.gate_up) == study.MANY_EXPERTS == 8
    assert flops(experts, 128) == flops(dense, 128)


def test_by_heart_takes_as_much_of_what_is_read_as_of_what_never_is(monkeypatch):
    pieces = []

    def counted(model, piece):
        pieces.append(piece)
        return torch.tensor([float(len(pieces))])

    monkeypatch.setattr(study.tc, "byte_losses", counted)
    read, never = study.by_heart(None)
    text, n = study.byte_text(), len(pieces) // 2
    assert (read, never) == ((n + 1) / 2, (n + 1) / 2 + n)
    start = 516 * (n - 1)
    assert pieces[0] == bytes(text.train[:129]) and pieces[n] == bytes(text.held_out[:129])
    assert pieces[n - 1] == bytes(text.train[start : start + 129]) and start + 129 < study.LITTLE


def not_scaled(x, draws, p):
    return x * (draws >= p)


def by_what_is_lost(x, draws, p):
    return x * (draws >= p) / p


def stream_lost_too(x, added, draws, p):
    return (x + added) * (draws >= p)[:, None, None] / (1 - p)


def path_not_scaled(x, added, draws, p):
    return x + added * (draws >= p)[:, None, None]


def all_experts_met(attention, feed_forward, layers, experts, shared):
    stored, _ = exercises._counted(attention, feed_forward, layers, experts, shared)
    return stored, layers * (attention + experts * feed_forward)


def shared_met_once(attention, feed_forward, layers, experts, shared):
    stored, met = exercises._counted(attention, feed_forward, layers, experts, shared)
    return stored, met // layers if shared else met


def at_the_lowest_of_all(held_out, every, patience):
    return (int(np.argmin(held_out)) + 1) * every


def at_the_first_rise(held_out, every, patience):
    rises = np.flatnonzero(np.diff(held_out) >= 0)
    return (int(rises[0]) + 2) * every if len(rises) else len(held_out) * every


def after_rises_in_a_row(held_out, every, patience):
    run = 0
    for reading, (before, now) in enumerate(itertools.pairwise(held_out), 2):
        run = run + 1 if now >= before else 0
        if run == patience:
            return reading * every
    return len(held_out) * every


def a_reading_early(held_out, every, patience):
    found = exercises._switch_step(held_out, every, patience)
    return found - every if found < len(held_out) * every else found


WRONG = {
    "switch_step": [
        at_the_lowest_of_all,
        at_the_first_rise,
        after_rises_in_a_row,
        a_reading_early,
    ],
    "inverted_dropout": [not_scaled, by_what_is_lost],
    "residual": [stream_lost_too, path_not_scaled],
    "counted": [all_experts_met, shared_met_once],
}


@pytest.mark.parametrize("name", WRONG)
def test_exercises_tell_right_from_wrong(name, tells_right_from_wrong):
    tells_right_from_wrong(getattr(exercises, name), WRONG[name])


@pytest.mark.parametrize("kind", study.OBJECTIVES)
def test_a_decoder_learns_to_fill_in_what_was_taken_away(kind):
    options = {"seed": 200, "unique": 4096, "batch": 1024}
    losses = [study.run(kind, tokens=tokens, **options)["loss"] for tokens in (1024, 16384)]
    assert losses[1] < losses[0] - 0.5
