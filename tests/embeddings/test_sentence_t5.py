import copy
import math

import numpy as np
import pytest
import torch
import transformers as hf
from transformers.models.mt5.modeling_mt5 import MT5Attention

from lablib.embeddings import sentence_t5 as st
from lablib.embeddings.contrastive import info_nce
from lablib.embeddings.encode import Encoder
from lablib.embeddings.evaluate import cosine, margin
from lablib.evidence.claims import judge
from lablib.evidence.studies import Study, matching
from lablib.exercises import sentence_t5 as exercises
from lablib.models.classifier import Encoded, cached_below
from lablib.papers import paper
from lablib.studies import sentence_t5 as study

TEXTS = ["a", "Enter a valid URL.", "日本語", "Bitte geben Sie eine gültige URL ein. " * 3, "é"]


def mt5(**changes):
    torch.manual_seed(0)
    shapes = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3}
    config = hf.MT5Config(**shapes | {"num_heads": 4, "dropout_rate": 0.0} | changes)
    model = hf.MT5EncoderModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def small(dim=32, seed=0):
    torch.manual_seed(seed)
    return st.SentenceT5(st.T5Encoder(st.byte_config(dim)))


# The encoder.


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"d_kv": 16, "num_heads": 3, "num_layers": 1},
        {"relative_attention_num_buckets": 16, "relative_attention_max_distance": 20},
        {"layer_norm_epsilon": 0.1},
    ],
)
def test_it_computes_what_transformers_does(changes):
    theirs = mt5(**changes)
    ours = st.from_transformers(theirs)
    tokens = torch.randint(99, (3, 200))  # beyond the largest distance of a bucket
    mask = torch.arange(200) < torch.tensor([200, 90, 1])[:, None]
    with torch.no_grad():
        wanted = theirs(tokens, attention_mask=mask.long()).last_hidden_state
        found = ours(tokens, mask)
    torch.testing.assert_close(found[mask], wanted[mask], atol=1e-5, rtol=1e-5)
    assert wanted[mask].std() > 0.05


def test_gradients_are_those_of_transformers():
    theirs = mt5()
    ours = st.from_transformers(theirs)
    tokens, mask = torch.randint(99, (2, 9)), torch.ones(2, 9, dtype=torch.bool)
    theirs(tokens).last_hidden_state.square().sum().backward()
    ours(tokens, mask).square().sum().backward()
    names = {"bias.weight": "block.0.layer.0.SelfAttention.relative_attention_bias.weight"}
    names |= {"blocks.2.q.weight": "block.2.layer.0.SelfAttention.q.weight"}
    names |= {"blocks.1.down.weight": "block.1.layer.1.DenseReluDense.wo.weight"}
    wanted = dict(theirs.encoder.named_parameters())
    for name, other in names.items():
        found = ours.get_parameter(name).grad
        torch.testing.assert_close(found, wanted[other].grad, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("sizes", [(32, 128), (16, 20), (8, 64)])
def test_buckets_are_those_of_transformers(sizes):
    distance = torch.arange(-300, 301)
    wanted = MT5Attention._relative_position_bucket(distance, True, *sizes)
    assert torch.equal(st.bucket(distance, *sizes), wanted)


def test_an_encoder_without_a_gate_is_refused():
    with pytest.raises(ValueError, match="'relu': only a gated"):
        st.from_transformers(mt5(feed_forward_proj="relu"))


def test_sizes_of_the_family_follow_from_configurations():
    billions = {name: st.n_parameters(c)["total"] / 1e9 for name, c in st.MT5.items()}
    rounded = {name: float(f"{size:.3g}") for name, size in billions.items()}
    assert rounded == {"base": 0.277, "large": 0.564, "XL": 1.67, "XXL": 5.66}


@pytest.mark.parametrize("name", st.MT5)
def test_sizes_are_those_of_transformers(name):
    c = st.MT5[name]
    shapes = {"vocab_size": c.vocab_size, "d_model": c.dim, "num_layers": c.n_layers}
    config = hf.MT5Config(**shapes, num_heads=c.n_heads, d_ff=c.ffn_dim, d_kv=c.head_dim)
    with torch.device("meta"):
        models = hf.MT5EncoderModel(config), st.T5Encoder(c)
    counts = [sum(p.numel() for p in model.parameters()) for model in models]
    assert counts == [st.n_parameters(c)["total"]] * 2


def test_the_start_keeps_states_of_like_size():
    c = st.T5Config(50, 64, 1, 4, 160, head_dim=16)
    torch.manual_seed(0)
    block = st.T5Encoder(c).blocks[0]
    x = torch.randn(4, 20, 64)
    q, k = block.q(x), block.k(x)
    scores = torch.einsum("nid,njd->nij", q[..., :16], k[..., :16])
    assert 0.5 < scores.std() < 2  # without a scale
    assert 0.5 < block.v(x).std() < 2


# Vectors.


def test_vectors_have_length_one_and_padding_changes_nothing():
    model = small().eval()
    together = st.vectors(model, st.byte_tokens(TEXTS))
    alone = torch.cat([model(st.byte_tokens([text])) for text in TEXTS])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(len(TEXTS)))


def test_batches_by_length_give_the_same_gradients():
    encoded = st.byte_tokens(TEXTS)
    grads = []
    for budget in (10, 10_000):
        model = small()
        st.vectors(model, encoded, budget)[:, 0].sum().backward()
        grads.append(model.encoder.embedding.weight.grad)
    torch.testing.assert_close(*grads, atol=1e-6, rtol=1e-4)


def test_the_mean_is_projected():
    encoder = st.T5Encoder(st.byte_config(32))
    plain, whole = st.SentenceT5(encoder, projected=False), st.SentenceT5(encoder)
    encoded = st.byte_tokens(["abc"])
    mean = encoder(*encoded)[0].mean(0)
    torch.testing.assert_close(plain(encoded)[0], mean / mean.norm())
    turned = whole.projection.weight @ mean
    torch.testing.assert_close(whole(encoded)[0], turned / turned.norm(), atol=1e-6, rtol=1e-5)


def test_bytes_are_those_of_byt5():
    tokenizer = hf.ByT5Tokenizer()
    tokens, mask = st.byte_tokens(TEXTS, 1000)
    wanted = tokenizer(TEXTS, padding=True, return_tensors="pt")
    assert torch.equal(tokens, wanted["input_ids"])
    assert torch.equal(mask.long(), wanted["attention_mask"])
    short = st.byte_tokens(TEXTS, 5).inputs
    assert short.shape[1] == 5 and (short[:, -1] <= 1).all()
    with pytest.raises(ValueError, match="no text to encode"):
        st.byte_tokens([])


def test_lora_starts_as_nothing_and_trains_attention_alone():
    model = small()
    encoded = st.byte_tokens(TEXTS)
    before = model(encoded)
    plain = copy.deepcopy(model.state_dict())
    names = st.lora_attention_(model.encoder, rank=2)
    torch.testing.assert_close(model(encoded), before)
    assert len(names) == 2 * 4 * len(model.encoder.blocks)
    sizes = [model.encoder.get_parameter(name).numel() for name in names]
    assert sum(sizes) == 2 * 4 * 2 * (32 + 32)  # blocks, projections, rank, in and out
    kept = {name.replace(".base.", "."): value for name, value in model.state_dict().items()}
    assert all(torch.equal(kept[name], value) for name, value in plain.items())


def test_the_loss_is_the_papers_sum():
    random = torch.Generator().manual_seed(0)
    a, b, c = torch.nn.functional.normalize(torch.randn(3, 6, 5, generator=random), dim=-1)
    by_hand = st.term_by_term(a, b, c, 0.1)
    assert math.isclose(info_nce(a, b, c, 0.1).item(), by_hand, rel_tol=1e-5)
    assert st.term_by_term(a[:1], b[:1], [], 0.1) == pytest.approx(0)
    e = [[1.0, 0.0], [0.0, 1.0]]
    wanted = -math.log(math.e / (2 * math.e + 2))  # weights e, 1, 1, e
    assert st.term_by_term(e, e, e[::-1], 1.0) == pytest.approx(wanted)


# Letters.


def test_what_translators_copy_is_masked():
    told = {
        "Ensure this value is %(limit)s (it is %(show)s).": "Ensure this value is _ (it is _).",
        "Enter a valid IPv4 address.": "Enter a valid _ address.",
        "%d items": "_ items",
        "<b>Django</b> 5.2": "___ _",
        "Сделай JSON": "Сделай _",
        "no change": "no change",
        "URL": "_",
    }
    assert {text: st.masked(text) for text in told} == told


def test_overlap_is_a_share_of_pieces():
    found = st.overlap(["abc", "xyz"], ["abc", "ab"])
    assert found.shape == (2, 2) and found[0, 0] == 1 and found[1, 0] == 0
    assert found[0, 1] == 1 / 4  # " ab" of " ab", "abc", "bc " and "ab "


def test_letters_find_what_is_written_alike():
    english = ["Delete this file", "Enter a number"]
    french = ["Entrer un nombre", "Supprimer this file"]
    assert st.by_letters([english, english, french]) == [100.0, 0.0]
    assert st.by_letters([english, french[::-1]]) == [100.0]


# Upper blocks.


def bert():
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    return hf.BertModel(hf.BertConfig(**sizes, intermediate_size=48)).eval()


def test_upper_vectors_are_those_of_the_whole_model():
    model = bert()
    mask = torch.arange(7) < torch.tensor([7, 3])[:, None]
    encoded = Encoded(torch.randint(50, (2, 7)), mask)
    lower = cached_below(model, encoded, 2)
    found = st.upper_vectors(model, lower, 2)
    wanted = Encoder(model, None).vectors(encoded)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)
    names = st.lora_above_(model, 2, rank=4)
    torch.testing.assert_close(st.upper_vectors(model, lower, 2), found)
    assert len(names) == 2 * 4 and all(".layer.2.attention." in name for name in names)
    assert sum(model.get_parameter(name).numel() for name in names) == 4 * 4 * (32 + 32)


# The study.


def stored(points="POINTS"):
    return Study(paper("sentence-t5")).runs(points)


def test_rates_are_the_best_of_the_tuning_runs_and_on_no_edge():
    for (regime, dim), rate in study.RATES.items():
        runs = matching(stored("TUNING"), regime=regime, dim=dim)
        best = max(runs, key=study.found)["rate"]
        assert rate == best
        tries = [run["rate"] for run in runs]
        assert min(tries) < best < max(tries) and len(tries) >= 4
        assert sorted(tries) == [*study.TRIED[regime, dim]]


def test_nothing_that_is_judged_was_trained_on():
    languages = ("fr", "ru")
    for seed in (0, 1):
        split = study.drawn(seed, languages)
        for kind, n in study.HELD_OUT.items():
            asked, known = split["held_out"][kind], split["train"][kind]
            assert len(asked) == n and not set(asked) & set(known)
        assert set(split["held_out"]["messages"]) <= set(split["sentences"])
        random = np.random.default_rng(0)
        for regime in ("across", "english"):
            first, second, negatives = study.planned(split, regime, random)
            assert len(first) == len(second) == len(set(first)) == study.MESSAGES + study.NAMES
            assert len(negatives) == study.MESSAGES
            held = {text for texts in split["held_out"].values() for text in texts}
            assert not set(first) & held
    assert study.drawn(0, languages)["held_out"] != study.drawn(1, languages)["held_out"]


def test_partners_are_translations_and_negatives_of_the_same_language():
    languages = ("ru",)
    split = study.drawn(0, languages)
    tables = {kind: study.table_of(kind, languages) for kind in study.HELD_OUT}
    either = tables["names"] | tables["messages"]
    first, second, negatives = study.planned(split, "across", np.random.default_rng(1))
    assert [either[text][1] for text in first] == second
    russian = [row[1] for row in tables["messages"].values()]
    assert all(text in russian for text in negatives)
    assert all(n != text for n, text in zip(negatives, second))


def test_a_worn_text_has_letters_of_the_text_alone():
    random = np.random.default_rng(0)
    text = "Enter a valid date, then go on."
    made = [study.worn(text, random) for _ in range(50)]
    assert all(made) and len(set(made)) > 40
    for one in made:
        rest = iter(text)
        assert all(letter in rest for letter in one)  # in order
    assert study.worn("é", random)


def test_both_ways_counts_what_is_nearest():
    eye = torch.eye(4)
    swapped = eye[[1, 0, 2, 3]]
    assert study.both_ways([eye, eye, swapped], 4) == [100.0, 50.0]
    assert study.both_ways([eye, swapped], 2) == [0.0]


def test_groups_are_all_languages_and_every_run_tells_of_each():
    assert len(study.LANGUAGES) == len(set(study.LANGUAGES)) == 18
    for run in matching(stored(), regime="all"):
        for kind in study.KINDS:
            row = study.part(run, *kind)
            assert len(row["sentences"]) == len(row["masked"]) == len(row["names"]) == 18
            for place, group in enumerate(study.GROUPS):
                each = row["sentences"][6 * place : 6 * place + 6]
                assert row[group] == pytest.approx(np.mean(each))
            assert row["found"] == pytest.approx(study.found(row))
        large, small = (study.part(run, "across", dim) for dim in (study.LARGE, study.SMALL))
        gain = (large["far"] + large["far names"] - small["far"] - small["far names"]) / 2
        assert run["far gain"] == pytest.approx(gain)


def test_one_kind_alone_is_that_kind_among_all():
    (alone,) = matching(stored(), regime="across")
    (every,) = matching(stored(), regime="all", seed=alone["seed"])
    among = study.part(every, "across", alone["dim"])
    assert alone["loss"] == pytest.approx(among["loss"], rel=1e-3)


def test_a_gain_that_is_the_same_for_all_is_no_gain_of_the_far():
    runs = [run | {"far gain": run["close gain"]} for run in matching(stored(), regime="all")]
    with pytest.raises(ValueError, match="one and the same effect"):
        judge(paper("sentence-t5").claim("far"), study.values(runs)["far"])


def test_an_encoder_of_a_run_learns():
    point = study.CANARY | {"steps": 12, "rate": 3e-3}
    run = study.run(**point)
    assert run["loss"] < run["first"]


# Exercises.

WRONG = {
    "hard_loss": [
        lambda a, p, c, t: exercises._hard_loss(a, p, c, 1.0),
        lambda a, p, c, t: exercises._hard_loss(a, p, p, t),
        lambda a, p, c, t: exercises._hard_loss(p, a, c, t),
        lambda a, p, c, t: exercises._hard_loss(a, p, c, t) * len(a),
    ],
    "t5_numbers": [
        lambda v, d, n, h, f: exercises._t5_numbers(v, d, n, h, f) - n * d * f,
        lambda v, d, n, h, f: exercises._t5_numbers(v, d, n, d // 64, f),
        lambda v, d, n, h, f: exercises._t5_numbers(v, d, n, h, f) + 32 * h * (n - 1),
    ],
    "ratio_margin": [
        lambda cosine, k: cosine,
        lambda cosine, k: exercises._ratio_margin(cosine, 1),
        lambda cosine, k: exercises._ratio_margin(cosine.T, k).T[::-1],
        lambda cosine, k: 2 * exercises._ratio_margin(cosine, k),
    ],
}


def test_the_margin_is_that_of_the_evaluator():
    a, b = np.random.default_rng(0).uniform(0.1, 1, (2, 6, 4))
    wanted = margin(a, b, 3)
    np.testing.assert_allclose(exercises._ratio_margin(cosine(a, b), 3), wanted, rtol=1e-6)


def test_counting_by_hand_is_counting_by_configuration():
    for c in st.MT5.values():
        shapes = c.vocab_size, c.dim, c.n_layers, c.n_heads, c.ffn_dim
        assert exercises._t5_numbers(*shapes) == st.n_parameters(c)["total"]


@pytest.mark.parametrize("name", WRONG)
def test_wrong_answers_are_told(name, tells_right_from_wrong):
    tells_right_from_wrong(getattr(exercises, name), WRONG[name])
