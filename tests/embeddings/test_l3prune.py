"""Cut encoders against forward hooks, transformers and sentence-transformers; depths; counts."""

import math

import pytest
import torch
import transformers as hf
from models_for_tests import models, sizes
from torch import nn
from torch.nn import functional as F

from lablib.embeddings import l3prune as l3
from lablib.embeddings.encode import Encoder, pool
from lablib.evidence import Pair, matching
from lablib.evidence.studies import Study
from lablib.exercises import l3prune as exercises
from lablib.models import GPT, GPTConfig, anatomy, pretrained
from lablib.papers import paper
from lablib.studies import l3prune as study

MODELS = models(4)
TEXTS = ["8 9 10 11 12 13", "20 21", "30 31 32 33", "7"]


def words(texts, verbose=False):
    """Numbers as tokens."""
    return {"input_ids": [[int(word) for word in text.split()] for text in texts]}


@pytest.fixture(params=MODELS)
def encoder(request):
    torch.manual_seed(0)
    return Encoder(MODELS[request.param]().eval(), words, pooling="weighted-mean")


def test_a_cut_model_gives_the_vectors_of_its_depth(encoder):
    from_one_pass = l3.layer_vectors(encoder, TEXTS, batch_tokens=12)
    assert from_one_pass.shape == (4, len(TEXTS), 32)
    for n in range(1, 5):
        torch.testing.assert_close(l3.cut(encoder, n)(TEXTS), from_one_pass[n - 1])
    assert not torch.allclose(from_one_pass[0], from_one_pass[1], atol=1e-4)


def test_they_are_the_full_models_states_normed_by_hand(encoder):
    """What a hook sees after a block, without `hidden_layers`."""
    model, seen = encoder.model, []
    anatomy.blocks(model)[1].register_forward_hook(
        lambda module, args, made: seen.append(made if isinstance(made, torch.Tensor) else made[0])
    )
    ids = torch.tensor([[8, 9, 10, 11, 12, 13]])
    with torch.no_grad():
        model(ids)
        norms = {"GPT": "norm", "LlamaForCausalLM": "model.norm"}
        norms |= {"GPT2LMHeadModel": "transformer.ln_f"}
        name = norms.get(type(model).__name__)
        normed = model.get_submodule(name)(seen[0]) if name else seen[0]
    weights = torch.arange(1.0, 7)[:, None]
    by_hand = F.normalize((weights * normed[0]).sum(0) / weights.sum(), dim=0)
    torch.testing.assert_close(l3.layer_vectors(encoder, TEXTS)[1, 0], by_hand)


def test_a_copy_is_cut_and_the_model_stays(encoder):
    before = encoder(TEXTS)
    short = l3.truncate(encoder.model, 2)
    assert len(anatomy.blocks(short)) == 2 and len(anatomy.blocks(encoder.model)) == 4
    config = short.config
    assert (config.n_layers if isinstance(short, GPT) else config.num_hidden_layers) == 2
    ours = {id(p) for p in short.parameters()}
    assert ours.isdisjoint(id(p) for p in encoder.model.parameters())
    with torch.no_grad():
        for p in short.parameters():
            p.zero_()
    assert torch.equal(encoder(TEXTS), before)
    assert encoder.model.config is not config
    for n in (0, 5):
        with pytest.raises(ValueError, match=f"{n} blocks are to stay, of 4"):
            l3.truncate(encoder.model, n)


def test_a_tied_head_stays_tied_and_a_cut_llama_is_transformers_own():
    config = hf.LlamaConfig(**sizes(4), num_key_value_heads=2, tie_word_embeddings=True)
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(config).eval()
    short = l3.truncate(model, 3)
    assert short.lm_head.weight is short.model.embed_tokens.weight
    theirs = hf.LlamaForCausalLM(hf.LlamaConfig(**config.to_dict() | {"num_hidden_layers": 3}))
    theirs.load_state_dict(
        {k: v for k, v in model.state_dict().items() if ".layers.3." not in k}, strict=True
    )
    ids = torch.tensor([[8, 9, 10, 11]])
    with torch.no_grad():
        torch.testing.assert_close(short(ids).logits, theirs.eval()(ids).logits)


TRIPLES = [(f"{a} {a + 1} {a + 2}", f"{a + 2} {a}", f"{a + 9}") for a in range(5, 40, 5)]


def test_losses_are_those_of_cut_models_by_loops(encoder):
    losses = l3.layer_losses(encoder, TRIPLES, batch=3)
    assert losses.shape == (4,)
    for n in range(1, 5):
        short, found = l3.cut(encoder, n), []
        for start in (0, 3, 6):
            q, d, hard = (short(side) for side in zip(*TRIPLES[start : start + 3]))
            rows = []
            for i in range(len(q)):
                every = sum(math.exp(20 * float(q[i] @ x)) for x in [*d, *hard])
                rows.append(-math.log(math.exp(20 * float(q[i] @ d[i])) / every))
            found.append(sum(rows) / len(rows))
        assert float(losses[n - 1]) == pytest.approx(sum(found) / 3, abs=1e-4)
    with pytest.raises(ValueError, match="no triples"):
        l3.layer_losses(encoder, [])


def test_losses_equal_those_of_sentence_transformers(encoder):
    losses = pytest.importorskip("sentence_transformers.losses")

    class Vectors(nn.Module):
        def forward(self, features):
            return features

        def get_embedding_dimension(self):
            return 32

    theirs = losses.MultipleNegativesRankingLoss(Vectors(), scale=20.0)
    q, d, hard = (l3.layer_vectors(encoder, side) for side in zip(*TRIPLES))
    ours = l3.losses_of(q, d, hard)
    for layer in range(4):
        features = [{"sentence_embedding": part[layer].clone()} for part in (q, d, hard)]
        torch.testing.assert_close(ours[layer], theirs(features, None))


def test_a_larger_scale_only_sharpens():
    torch.manual_seed(0)
    a = F.normalize(torch.randn(1, 6, 8), dim=-1)
    sharp, soft = (l3.losses_of(a, a, -a, scale) for scale in (100.0, 1.0))
    assert float(sharp) < 1e-6 < float(soft)


def test_depths_by_hand():
    assert l3.choose([3.0, 1.0, 5.0, 4.0]) == (2, 4)
    assert l3.choose([1.0, 2.0, 3.0]) == (1, 2)  # halves of one block and of two
    assert l3.choose([3.0, 2.0, 1.0]) == (1, 3)
    assert l3.choose(torch.tensor([2.0, 1.0])) == l3.Depths(small=1, large=2)
    with pytest.raises(ValueError, match="two blocks at least, not 1"):
        l3.choose([1.0])


# What goes.

LLAMA = {"hidden_size": 4096, "intermediate_size": 14336, "num_key_value_heads": 8}
QWEN = {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28}
QWEN |= {"num_hidden_layers": 28, "num_key_value_heads": 4, "vocab_size": 152064}
THEIRS = {
    "Llama-3-8B": lambda: hf.LlamaConfig(vocab_size=128256, **LLAMA),
    "Mistral-7B": lambda: hf.MistralConfig(),
    "Qwen2-7B": lambda: hf.Qwen2Config(**QWEN, tie_word_embeddings=False),
    "Phi-3-mini": lambda: hf.Phi3Config(),
}


@pytest.mark.parametrize("name", THEIRS)
def test_shares_are_counts_of_transformers_models(name):
    config = THEIRS[name]()
    config.num_hidden_layers = 2  # all blocks are alike
    with torch.device("meta"):
        model = hf.AutoModelForCausalLM.from_config(config)
    blocks = anatomy.blocks(model)
    block = sum(p.numel() for p in blocks[0].parameters())
    table, norm = model.get_input_embeddings().weight.numel(), config.hidden_size
    ours, n = l3.FOUR[name], l3.CONFIGURED[name]
    away = 100 * block * (ours.n_layers - n)
    whole = block * ours.n_layers + norm
    assert l3.removed(ours, n) == pytest.approx(away / (whole + table))
    assert l3.removed(ours, n, head=True) == pytest.approx(away / (whole + 2 * table))
    assert l3.removed(ours, n, embedding=False) == pytest.approx(away / whole)
    totals = {"Llama-3-8B": 8_030_261_248, "Mistral-7B": 7_241_732_096}
    totals |= {"Qwen2-7B": 7_615_616_512, "Phi-3-mini": 3_821_079_552}
    assert whole + 2 * table == totals[name]  # as published


def test_smollm2s_table_is_a_fifth_and_counts_once():
    whole, bare = l3.removed(l3.SMOLLM2, 0), l3.removed(l3.SMOLLM2, 0, embedding=False)
    assert whole == pytest.approx(l3.removed(l3.SMOLLM2, 0, head=True))
    assert 0.78 < whole / bare < 0.8
    model, _ = pretrained("tiny-1m")
    parts = [sum(p.numel() for p in part.parameters()) for part in (model, model.blocks[2])]
    assert l3.removed(model.config, 2) == pytest.approx(100 * parts[1] / parts[0])


# The study.


def test_a_short_study_run_tells_of_every_cut():
    row = study.run(**study.CANARY)
    assert len(row["losses"]) == 3 and len(row["influence blocks"]) == 2
    after = [row[f"{n} trained"] for n in (1, 2, 3)]
    small, large = l3.choose(row["losses"])
    assert row["chosen"] == pytest.approx((after[small - 1] + after[large - 1]) / 2)
    assert row["random"] == pytest.approx((after[0] + (after[1] + after[2]) / 2) / 2)
    alone = study.run(**study.CANARY | {"kept": "2"})
    assert alone["trained"] == row["2 trained"] and alone["loss"] == row["2 loss"]


def test_a_margin_never_falls_below_the_untrained_model():
    run = {"seed": 3, "4 trained": 80.0, "4 before": 60.0, "3 trained": 79.5}
    assert study.within(run, "3", 1.0) == Pair(3, 79.5, 79.0)
    assert study.within(run | {"4 before": 90.0}, "3", 1.0) == Pair(3, 79.5, 90.0)


def test_right_counts_own_neighbors_among_distractors():
    a = torch.eye(4)
    hard = torch.cat([a[:, [1, 0, 2, 3]], 2 * a[2:3]])  # two swapped, one beaten by a distractor
    assert study.right(a, hard) == 25.0
    assert study.right(a, a) == 100.0


def test_learning_judging_and_tuning_share_no_verse():
    train, judged, triples = study.verses(0, 10, 50)
    tuned = study.verses(100, 10, 50)[1]
    texts = [{text for row in rows for text in row} for rows in (train, judged, tuned)]
    assert len(train) == 240 and len(judged) == 50 and len(triples) == 128
    assert texts[0].isdisjoint(texts[1] | texts[2]) and texts[1].isdisjoint(texts[2])


def test_minilm_is_cut_and_tuned_at_each_depths_own_rate(monkeypatch):
    monkeypatch.setattr(study, "CUTS", (3, 2))
    monkeypatch.setattr(study, "MINI", {"steps": 2, "batch": 4, "length": 12, "held_out": 8})
    seen = []

    def train(short, pairs, steps, rate, **options):
        seen.append((len(anatomy.blocks(short.model)), rate, len(pairs)))

    monkeypatch.setattr(study.students, "train", train)
    told = study.run("minilm", 100, rates=[1e-3, 2e-3])
    assert seen == [(3, 1e-3, 8), (2, 2e-3, 8)]
    assert told["3 before"] == told["3 trained"] > 100 / 8  # better than chance, untrained
    with pytest.raises(ValueError, match="zip"):
        study.run("minilm", 100, rates=[1e-3])


def test_rates_are_the_best_of_both_tuning_seeds_and_on_no_edge():
    runs = matching(Study(paper("l3prune")).runs("TUNING"), kept="all")
    assert {run["seed"] for run in runs} == {100, 101}
    for name, rate in study.TUNED.items():
        right = dict.fromkeys(study.GRID, 0.0)
        for run in runs:
            right[study.GRID[run["attempt"]]] += run[f"{name} trained"]
        assert max(right, key=right.get) == rate == sorted(right)[1], name


def test_minilms_rates_are_the_best_of_the_tuning_seed_and_on_no_edge():
    tries = matching(Study(paper("l3prune")).runs("TUNING"), kept="minilm, tries")
    rates = [rate for run in tries for rate in run["rates"]]
    assert sorted(rates) == [*study.MINI_GRID]
    for n, rate in zip(study.CUTS, study.MINI_RATES, strict=True):
        right = [share for run in tries for share in run[f"{n} trained"]]
        assert rates[right.index(max(right))] == rate
        assert min(rates) < rate < max(rates)


def test_judged_headings_are_none_that_minilm_learned():
    n = study.MINI["steps"] * study.MINI["batch"]
    learned = study.drawn(study.collections.pairs("headings", "train"), n, 0)
    texts = [{text for row in rows for text in row} for rows in (learned, study.headings(0))]
    assert texts[0].isdisjoint(texts[1]) and len(study.headings(0)) == study.MINI["held_out"]


def test_words_find_what_shares_them():
    rows = [("a red house", "the red house"), ("two dogs", "dogs, two"), ("nothing", "at all")]
    assert study.by_words(rows[:2]) == (100.0, 100.0)
    assert study.by_words([(rows[0][0], rows[1][1]), (rows[1][0], rows[0][1])]) == (0.0, 0.0)


# Exercises.


def test_references_agree_with_lablib():
    torch.manual_seed(0)
    states, losses = torch.randn(5, 3, dtype=torch.float64), torch.rand(9)
    mask = torch.tensor([[1, 1, 1, 0, 0]]).bool()
    ours = exercises.weighted_mean.reference(states.numpy(), 3)
    torch.testing.assert_close(torch.as_tensor(ours), pool(states[None], mask, "weighted-mean")[0])
    assert exercises.two_minima.reference(losses.numpy()) == l3.choose(losses)
    config = GPTConfig(50, 16, 6, 4, 4, ffn_dim=40)
    for embedding in (True, False):
        ours = exercises.share_removed.reference(16, 40, 6, 50, 2, embedding)
        assert ours == pytest.approx(l3.removed(config, 2, embedding), rel=0.02)  # norms


WRONG = {
    "weighted_mean": [
        lambda states, n: states[:n].mean(0),
        lambda states, n: states[n - 1],
    ],
    "two_minima": [
        lambda losses: (int(losses.argmin()) + 1, len(losses)),
        lambda losses: tuple(sorted((losses.argsort()[:2] + 1).tolist())),
    ],
    "share_removed": [
        lambda dim, ffn, blocks, vocab, n, embedding: 100 * (1 - n / blocks),
        lambda *sizes: 100 - exercises.share_removed.reference(*sizes),
    ],
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_answers_fail(name, tells_right_from_wrong):
    tells_right_from_wrong(getattr(exercises, name), WRONG[name])


def test_the_share_of_the_paper_is_a_rounded_one():
    claim = paper("l3prune").claim("share")
    assert claim.value * claim.tolerance == pytest.approx(0.5, abs=0.005)
