"""Pruning to a shape, labels from large models, losses against sentence-transformers; the study."""

import math
import random
import runpy
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch.nn import functional as F

from lablib.compression.structures import sizes
from lablib.embeddings import drama
from lablib.embeddings.contrastive import info_nce, matryoshka
from lablib.embeddings.encode import Encoder
from lablib.evidence.studies import Study
from lablib.exercises import drama as exercises
from lablib.models import GPT, GPTConfig, pretrained
from lablib.papers import paper
from lablib.studies import drama as study

PEER = runpy.run_path(str(Path(__file__).parent / "record_drama.py"))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT(GPTConfig(60, 32, 3, 4, 2, ffn_dim=48, init_std=0.2)).eval()


def words(texts, verbose=False, add_special_tokens=True):
    """Numbers as tokens, of one text or of several."""
    if isinstance(texts, str):
        return {"input_ids": [int(word) for word in texts.split()]}
    return {"input_ids": [[int(word) for word in text.split()] for text in texts]}


# The student.


def test_a_student_has_its_shape_and_the_whole_model_stays(model):
    before = {name: p.clone() for name, p in model.named_parameters()}
    small = drama.pruned(model, drama.Shape(2, 2, 20, 16))
    size = sizes(small)
    assert (size.blocks, size.heads, size.kv_heads) == (2, 2, 1)
    assert (size.neurons, size.channels) == (20, 16)
    assert small(torch.tensor([[1, 2, 3]])).shape == (1, 3, 60)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_all_of_it_computes_what_the_whole_does(model):
    tokens = torch.tensor([[5, 6, 7, 8]])
    whole = drama.Shape(3, 4, 48, 32)
    with torch.no_grad():
        torch.testing.assert_close(drama.pruned(model, whole)(tokens), model(tokens))


def test_what_has_no_weight_goes_first(model):
    with torch.no_grad():
        model.embedding.weight[:, [3, 9]] = 0
        for block in model.blocks:
            block.mlp.down.weight[:, [0, 7, 40]] = 0
            block.attention.output.weight[:, :16] = 0  # heads 0 and 1, which share keys
    kept = drama.keep(model, drama.Shape(2, 2, 45, 30))
    assert set(range(32)) - {*kept.channels} == {3, 9}
    assert all(set(range(48)) - {*places} == {0, 7, 40} for places in kept.neurons)
    assert [list(heads) for heads in kept.heads] == [[2, 3]] * 3
    assert kept.blocks == (0, 1)
    with pytest.raises(ValueError, match="heads share keys by 2: 3 can't stay"):
        drama.keep(model, drama.Shape(2, 3, 45, 30))


def test_queries_have_a_prefix_and_both_sides_read_both_ways(model):
    def letters(texts, verbose=False):
        return {"input_ids": [[ord(c) % 60 for c in text] for text in texts]}

    query, text = drama.encoders(model, letters)
    assert query.model is text.model is model
    torch.testing.assert_close(query(["abc"]), text(["Query: abc"]))
    assert not torch.allclose(query(["abc"]), text(["abc"]), atol=1e-3)
    causal = Encoder(model, letters, causal=True)(["abc"])
    assert not torch.allclose(text(["abc"]), causal, atol=1e-3)


def test_training_lowers_the_loss_over_both_sizes(model):
    triples = [(f"{n} {n + 1}", f"{n + 1} {n}", f"{n + 9}") for n in range(5, 40, 5)]

    def tokens(texts, verbose=False):
        return words([text.removeprefix("Query: ") for text in texts])

    losses = drama.fit(model, tokens, triples, 20, 3e-3, (32, 8), batch=7)
    assert losses[-1] < 0.5 * losses[0]
    untrained = GPT(model.config)
    first = drama.fit(untrained, tokens, triples, 1, 0.0, (32, 8), batch=7, seed=0)[0]
    vectors = [Encoder(untrained, words, causal=False)(side) for side in zip(*triples)]
    wanted = info_nce(*vectors) + info_nce(*(v[:, :8] for v in vectors))
    assert first == pytest.approx(float(wanted), abs=1e-4)


def test_shortened_vectors_have_the_cosines_of_their_first_numbers():
    torch.manual_seed(1)
    a, b = F.normalize(torch.randn(2, 5, 12), dim=-1)
    short = drama.shortened(a, 4), drama.shortened(b, 4)
    assert short[0].shape == (5, 4)
    torch.testing.assert_close(
        (short[0] * short[1]).sum(1), F.cosine_similarity(a[:, :4], b[:, :4])
    )
    assert torch.equal(drama.shortened(a, 12), F.normalize(a, dim=-1))


# Losses.


def test_what_is_recorded_is_what_sentence_transformers_computes():
    pytest.importorskip("sentence_transformers")
    told, now = drama.recorded(), PEER["computed"]()
    assert told["sizes"] == [*PEER["SIZES"]] and told["computed"].keys() == now.keys()
    assert told["given"].keys() == PEER["inputs"]().keys()
    for name, values in PEER["inputs"]().items():
        assert torch.equal(told["given"][name], values)
    for name, values in now.items():
        torch.testing.assert_close(told["computed"][name], values.detach().double(), msg=name)


def test_losses_gradients_and_short_cosines_are_those_of_sentence_transformers():
    told = drama.recorded()
    given = {name: values.requires_grad_(name != "gains") for name, values in told["given"].items()}
    *sides, scores, gains = given.values()
    ours = {"matryoshka": matryoshka(info_nce, told["sizes"])(*sides)}
    ours["list-wise"] = drama.listwise(scores, gains)
    slopes = torch.autograd.grad(sum(ours.values()), [*sides, scores])
    ours |= {f"gradient of {name}": slope for name, slope in zip(given, slopes)}
    a, b = (drama.shortened(side, told["sizes"][-1]) for side in sides[:2])
    ours["short cosines"] = (a * b).sum(1)
    assert ours.keys() == told["computed"].keys()
    for name, values in ours.items():
        wanted = told["computed"][name]
        torch.testing.assert_close(values.detach(), wanted, atol=1e-6, rtol=1e-6, msg=name)


def test_the_list_wise_loss_is_least_for_scores_that_agree():
    gains = torch.tensor([[3.0, 1.0, 0.0]])
    least = drama.listwise(gains + 5, gains)
    p = gains.softmax(-1)
    assert float(least) == pytest.approx(float(-(p * p.log()).sum()))
    assert drama.listwise(gains.flip(-1), gains) > least + 0.5


# Published shapes.


@pytest.mark.parametrize("name", drama.RELEASED)
def test_shapes_are_counted_as_transformers_has_them(name):
    ours = drama.RELEASED[name]
    sides = {"hidden_size": ours.dim, "intermediate_size": ours.ffn_dim, "vocab_size": 99}
    heads = {"num_attention_heads": ours.n_heads, "num_key_value_heads": ours.n_kv_heads}
    with torch.device("meta"):
        theirs = hf.LlamaModel(hf.LlamaConfig(**sides, **heads, num_hidden_layers=ours.n_layers))
    wanted = sum(p.numel() for p in theirs.parameters()) - 99 * ours.dim
    shape = (ours.dim, ours.n_layers, ours.n_heads, ours.n_kv_heads, ours.ffn_dim)
    assert drama.counted(ours) == drama.by_hand(*shape) == wanted


def test_published_sizes_are_rounded_counts():
    sizes_of = {row["model"]: float(row["billions"]) for row in drama.published()}
    assert [*sizes_of] == ["drama-base", "drama-large", "drama-1b"]
    for name, config in drama.RELEASED.items():
        assert round(drama.counted(config) / 1e9, 1) == sizes_of[name]
    claim = paper("drama").claim("size")
    assert claim.value * claim.tolerance == pytest.approx(0.05)
    base = drama.RELEASED["drama-base"]
    with_embedding = drama.counted(base) + base.vocab_size * base.dim
    assert with_embedding / 1e9 > 0.15  # would not pass


# Texts and what was said of them.


def test_texts_are_whole_and_of_two_kinds():
    texts = drama.texts()
    assert len({*texts}) == len(texts) == drama.N_TEXTS
    assert all(len(text.split()) == drama.WORDS for text in texts)
    for text in texts:
        first, second = drama.crops(text, 2)
        assert first != second and first in text and second in text
        assert drama.crops(text) == [first] and len(first.split()) >= 5


def test_rankings_put_the_nearest_first():
    documents = F.normalize(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), dim=-1)
    asked = F.normalize(torch.tensor([[1.0, 0.1], [0.0, -1.0]]), dim=-1)
    assert drama.ranking(asked, documents, 3).tolist() == [[0, 2, 1], [0, 2, 1]]


def test_likelihood_is_a_mean_over_the_query_alone(model, monkeypatch):
    monkeypatch.setattr(drama, "ids", lambda tokenizer, text: [ord(c) % 60 for c in text])
    texts, query = ["abcdef", "xyz"], "what"
    found = drama.likelihood(model, None, query, texts)
    for value, text in zip(found, texts):
        tokens = [ord(c) % 60 for c in f"{text}\nQuery: {query}"]
        with torch.no_grad():
            log_p = model(torch.tensor([tokens]))[0].log_softmax(-1)
        wanted = [log_p[at - 1, tokens[at]] for at in range(len(text), len(tokens))]
        assert float(value) == pytest.approx(float(sum(wanted) / len(wanted)), abs=1e-5)


def test_a_prompt_read_once_gives_what_the_whole_prompt_gives(monkeypatch):
    model, tokenizer = pretrained("tiny-1m")

    def prompt(tokenizer, text):
        return f"Of this:{text} ask:"

    monkeypatch.setattr(drama, "written_prompt", prompt)
    monkeypatch.setattr(drama, "TOP_P", 1e-9)  # the likeliest token alone
    texts = [" ".join(text.split()) for text in drama.texts()[:2]]
    ours = drama.write_queries(model, tokenizer, texts, seed=0, longest=6)
    for text, query in zip(texts, ours):
        before, after = (drama.ids(tokenizer, part) for part in prompt(None, "\0").split("\0"))
        tokens = before + drama.ids(tokenizer, text)[: drama.TOKENS] + after
        whole = model.generate(tokens, 6, greedy=True)[len(tokens) :]
        assert query == tokenizer.decode(whole).split("\n")[0].strip()
    with pytest.raises(ValueError, match="'short' has fewer than 40 tokens"):
        drama.write_queries(model, tokenizer, ["short"], seed=0)


def test_stored_labels_are_what_the_study_got():
    (run,) = [run for run in Study(paper("drama")).runs("TUNING") if run["mixture"] == "labels"]
    assert drama.plain(drama.labels()) == run["labels"]
    counts = {s: sum(row.source == s for row in drama.labels()) for s in drama.SOURCES[1:]}
    crops = drama.CROPS * drama.N_TEXTS
    assert list(counts.values()) == [crops, drama.N_WRITTEN, drama.N_RERANKED]
    ours = {row.query for row in drama.labels() if row.source == "crop" and row.text == 7}
    assert ours == {*drama.crops(drama.texts()[7], drama.CROPS)}


def test_triples_take_the_first_and_a_later_one():
    draw = random.Random(0)
    for label in drama.labels():
        query, right, wrong = drama.triple(label, draw)
        assert query == label.query and right == drama.texts()[label.ranked[0]]
        assert wrong in [drama.texts()[place] for place in label.ranked[3:]]
        assert len(label.ranked) == (4 if label.source == "reranked" else drama.TOP)
        if label.source == "crop":
            assert query in drama.crops(drama.texts()[label.text], drama.CROPS)


def test_written_queries_stay_where_the_teacher_finds_their_text():
    far = drama.Label("synthetic", 5, "what", tuple(range(10)))
    assert not drama.kept(far) and drama.kept(far._replace(text=2))
    assert drama.kept(far._replace(source="crop"))


def test_a_mixture_has_its_counts_and_follows_the_seed():
    mixed = drama.mixture(study.MIXTURES["mixed"], 3)
    assert len(mixed) == study.EQUAL and mixed == drama.mixture(study.MIXTURES["mixed"], 3)
    assert {*mixed} != {*drama.mixture(study.MIXTURES["mixed"], 4)}
    assert len(drama.mixture({"crop": None}, 0)) == drama.CROPS * drama.N_TEXTS
    with pytest.raises(ValueError, match="crop has 2000 triples, not 2001"):
        drama.drawn("crop", 2001, 0)


# The study.


def test_mixtures_at_equal_pairs_have_equal_pairs():
    single = [study.MIXTURES[source] for source in drama.SOURCES]
    assert all(list(counts.values()) == [study.EQUAL] for counts in single)
    assert sum(study.MIXTURES["mixed"].values()) == study.EQUAL
    assert study.MIXTURES["augmented"] == study.MIXTURES["random start"]
    assert study.MIXTURES["augmented"].items() > study.MIXTURES["few"].items()


def test_rates_and_the_best_single_source_are_those_of_two_seeds():
    runs = [run for run in Study(paper("drama")).runs("TUNING") if run["mixture"] == "every"]
    best = {}
    for name in study.MIXTURES:
        means = dict.fromkeys(sorted(study.GRID), 0.0)
        for run in runs:
            means[study.GRID[run["attempt"]]] += run[f"{name} mean"]
        rate = max(means, key=means.get)
        assert rate == study.TUNED[name] and min(means) < rate < max(means)
        best[name] = means[rate]
    assert {run["seed"] for run in runs} == {100, 101}
    assert max(drama.SOURCES, key=best.get) == study.BEST_SINGLE


def test_a_random_start_has_the_students_shape_and_none_of_its_weights():
    ours, other = study.student(1), study.student(1, seed=0)
    pairs = list(zip(ours.parameters(), other.parameters(), strict=True))
    assert all(a.shape == b.shape for a, b in pairs)
    assert not any(torch.equal(a, b) for a, b in pairs if a.ndim == 2)
    assert sizes(ours).neurons == study.SHAPE.neurons


def test_no_judged_text_is_learned():
    held = study.judged(0, 100)
    learned = {text for row in drama.mixture(study.MIXTURES["augmented"], 0) for text in row}
    assert learned.isdisjoint(text for sides in held.values() for side in sides for text in side)
    tuned = study.judged(100, 100)
    assert {*held["verses"][0]}.isdisjoint(tuned["verses"][0])


def test_sources_put_together_have_as_many_pairs_of_each(monkeypatch):
    seen = []
    monkeypatch.setattr(study, "taught", lambda counts, *_: (seen.append(counts), (None, 0))[1])
    monkeypatch.setattr(study, "scores", lambda *_: dict.fromkeys(study.SHOWN, 50.0) | {"x": 1.0})
    told = study.put_together(0, 1e-3, 1, 1, {})
    assert len(seen) == 11 and {len(counts) for counts in seen} == {2, 3, 4}
    assert {n for counts in seen for n in counts.values()} == {study.EQUAL}
    assert len(told) == 11 * len(study.SHOWN) and told["crop+synthetic mean"] == 50


def test_every_mixture_is_stored_for_every_draw():
    runs = Study(paper("drama")).runs()
    every = [run for run in runs if run["mixture"] == "every"]
    assert study.mixed_of(runs, [])["mean"] == [run["before mean"] for run in every]
    assert study.mixed_of(runs, ["crop"])["verses"] == [run["crop verses"] for run in every]
    swapped = study.mixed_of(runs, ["synthetic", "supervised"])
    assert swapped == study.mixed_of(runs, ["supervised", "synthetic"])
    whole = study.mixed_of(runs, drama.SOURCES)
    assert list(whole) == list(study.SHOWN) and {len(row) for row in whole.values()} == {5}


def test_ndcg_by_hand():
    q = torch.eye(3)
    assert study.ndcg(q, q) == pytest.approx(100)
    swapped = q[[1, 0, 2]] + 0.1 * q  # two queries find their own text second
    assert study.ndcg(q, swapped) == pytest.approx(100 * (1 + 2 / math.log2(3)) / 3)


# Exercises.

WRONG = {
    "hard_negative": [
        lambda scores, own, margin: int(scores.argmin()),
        lambda scores, own, margin: int((scores - 9 * (scores >= scores[own])).argmax()),
    ],
    "nested_loss": [
        lambda q, d, dims, t: exercises.nested_loss.reference(q, d, dims[:1], t),
        lambda q, d, dims, t: exercises.nested_loss.reference(q, d, dims, t) / len(dims),
    ],
    "units_for": [
        lambda budget, dim, *rest: exercises.units_for.reference(budget, dim, *rest) + 1,
        lambda budget, dim, blocks, heads, kv: budget // (3 * dim * blocks),
    ],
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_answers_fail(name, tells_right_from_wrong):
    tells_right_from_wrong(getattr(exercises, name), WRONG[name])


def test_references_agree_with_lablib():
    torch.manual_seed(0)
    q, d = torch.randn(2, 5, 8, dtype=torch.float64)
    ours = exercises.nested_loss.reference(q.numpy(), d.numpy(), [8, 3], 0.05)
    assert ours == pytest.approx(float(matryoshka(info_nce, [8, 3])(q, d)))
    base = drama.RELEASED["drama-base"]
    shape = (base.dim, base.n_layers, base.n_heads, base.n_kv_heads)
    assert exercises.units_for.reference(drama.counted(base), *shape) == base.ffn_dim
