import copy
import json

import pytest
import torch
import transformers as hf
from families_for_tests import MODELS, SIZES, STILL, TOKENS, moved
from torch.nn.attention import SDPBackend, sdpa_kernel

from lablib.compression.recover import language_loss
from lablib.evidence.claims import NOT_REPRODUCED, judge
from lablib.evidence.studies import Study, matching, replaced
from lablib.exercises import peft_review as exercises
from lablib.models import GPT, GPTConfig, anatomy, pretrained
from lablib.models.classifier import Classifier, Encoded, cached_below
from lablib.models.weights import pretrained_path
from lablib.papers import paper
from lablib.peft import catalogue, propelt
from lablib.peft import peft_review as pr
from lablib.peft.adapter import (
    adapter_state,
    adapters,
    disabled,
    freeze_base_,
    n_trainable,
    remove_,
    trainable,
)
from lablib.peft.measure import account
from lablib.peft.qlora import nf4_, qlora_
from lablib.studies import peft_review as study


def bert():
    return hf.BertModel(hf.BertConfig(**SIZES, **STILL)).eval()


def probe():
    return catalogue.Probe([TOKENS], lambda m, rows: m(rows).last_hidden_state.square().mean())


# Families.


@pytest.mark.parametrize("name", catalogue.BUILT)
def test_a_family_is_read_off_what_a_method_leaves(name):
    model = bert()
    catalogue.put_(model, name, probe())
    merges = name == "(IA)3"  # which the review calls additive
    assert pr.family(model) == ("reparameterized" if merges else catalogue.METHODS[name].family)


def test_a_model_without_an_adapter_is_of_no_family():
    with pytest.raises(ValueError, match="BertModel has no adapter"):
        pr.family(bert())


def test_every_leaf_is_in_one_family_and_built_ones_come_first():
    families = [pr.leaves(family) for family in catalogue.FAMILIES]
    assert sorted(n for found in families for n in found) == sorted(catalogue.METHODS)
    for found in families:
        built = [method.put is not None for method in found.values()]
        assert built == sorted(built, reverse=True)
    assert set(pr.ELEVEN) <= set(catalogue.BUILT) and len(pr.ELEVEN) == 11


# Numbers.


def test_counts_on_roberta_follow_from_its_configuration():
    rows = pr.on_roberta()
    assert {name: row["asks"] for name, row in rows.items()} == {
        name: pr.by_formula(name) for name in pr.ELEVEN
    }
    whole = 124_645_632 - 768 * 769  # roberta-base without its pooler
    assert pr.n_parameters(pr.roberta()) == whole
    assert rows["LoRA"]["share"] == pytest.approx(100 * 294_912 / whole)


PEERS = {
    "LoRA": ("LoraConfig", {"r": 8, "target_modules": ["query", "value"]}),
    "AdaLoRA": (
        "AdaLoraConfig",
        {"init_r": 12, "target_modules": ["query", "value"], "total_step": 10},
    ),
    "(IA)3": (
        "IA3Config",
        {
            "target_modules": r".*(self\.(key|value)|\d\.output\.dense)",
            "feedforward_modules": r".*\d\.output\.dense",
        },
    ),
    "prompt": ("PromptTuningConfig", {"num_virtual_tokens": 20, "task_type": "FEATURE_EXTRACTION"}),
    "prefix": ("PrefixTuningConfig", {"num_virtual_tokens": 16, "task_type": "FEATURE_EXTRACTION"}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PEERS)
def test_as_many_numbers_as_peft_has(name):
    peft = pytest.importorskip("peft")
    kind, options = PEERS[name]
    peer = peft.get_peft_model(bert(), getattr(peft, kind)(**options))
    model = bert()
    catalogue.put_(model, name)
    assert pr.counted(model)["asks"] == sum(p.numel() for p in peer.parameters() if p.requires_grad)


def test_a_mask_asks_for_all_moves_a_part_and_keeps_bits():
    model = bert()
    catalogue.put_(model, "child tuning", probe())
    row = pr.counted(model)
    children = adapters(model).values()
    assert row["asks"] == sum(child.weight.numel() for child in children)
    moves = sum(int(child.mask.sum()) for child in children)
    assert row["moves"] == pytest.approx(moves, abs=len(children))
    assert row["kept_bits"] == 32 * row["moves"] + row["asks"]


def test_what_propelt_keeps_is_what_lies_in_its_file():
    model = bert()
    propelt.propelt_adapter_(model, rank=8)
    kept = pr.counted(model)["kept_bits"]
    propelt.freeze_masks_(model)
    assert kept == 8 * sum(tensor.nbytes for tensor in adapter_state(model).values())


def test_propelts_share_is_the_sum_of_its_parts():
    parts = pr.propelt_share()
    assert parts["total"] == pytest.approx(parts["prototype"] + parts["scores"] + parts["head"])
    masked = 12 * 2 * 768 * 64
    assert parts["scores"] == pytest.approx(100 * masked / 124_647_170)
    assert parts["kept"] == pytest.approx(parts["prototype"] + parts["scores"] / 32)


# Memory.


@pytest.mark.parametrize("way", pr.WAYS)
def test_memory_without_numbers_is_memory_with_them(way):
    config = GPTConfig(60, 32, 2, 4, 2)
    plain = GPT(config)
    rows = torch.randint(60, (3, 10))
    pr.put_way_(plain, way)
    told = account(plain, lambda model: language_loss(model, rows))
    assert pr.held(plain, lambda model: language_loss(model, rows)) == told
    with sdpa_kernel(SDPBackend.MATH):  # what the meta device does
        by_hand = pr.held(plain, lambda model: language_loss(model, rows))
    assert pr.training(config, way, 3, 9) == by_hand


def test_an_unknown_way_is_said():
    with pytest.raises(ValueError, match="'half' is none of full, LoRA, QLoRA"):
        pr.training(pr.TINY, "half", 1, 8)


@pytest.mark.parametrize("way", ["full", "LoRA"])
def test_memory_to_draw_is_memory_counted(way):
    drawn = pr.growth(pr.TINY, way)
    for batch, length in ((1, 32), (5, 100)):
        counted = pr.training(pr.TINY, way, batch, length)["total"]
        assert drawn(batch, length) == pytest.approx(counted, rel=0.005)


def test_shapes_are_those_of_the_models():
    ours, theirs = GPT(pr.TINY), pretrained("tiny-1m")[0]
    shapes = [{n: p.shape for n, p in model.named_parameters()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]
    config = json.loads((pretrained_path("smollm2-135m-instruct") / "config.json").read_text())
    wanted = {
        "vocab_size": "vocab_size",
        "dim": "hidden_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "n_kv_heads": "num_key_value_heads",
        "ffn_dim": "intermediate_size",
    }
    assert {k: getattr(pr.SMOLLM2, k) for k in wanted} == {k: config[v] for k, v in wanted.items()}
    with torch.device("meta"):
        assert pr.n_parameters(GPT(pr.LLAMA_2_7B)) == 6_738_415_616


def four_bits():
    torch.manual_seed(0)
    model = GPT(GPTConfig(60, 64, 2, 4, 2))
    nf4_(model)
    qlora_(model, rank=4)
    freeze_base_(model)
    return moved(model)


def test_a_weight_computed_again_gives_the_same_gradients():
    plain, again = four_bits(), four_bits()
    pr.recompute_(again)
    rows = torch.randint(60, (2, 9))
    losses = [language_loss(model, rows) for model in (plain, again)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    pairs = zip(trainable(plain).items(), trainable(again).values(), strict=True)
    for (name, ours), theirs in pairs:
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)


# A prompt among the states.


def states():
    model = bert()
    mask = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    return model, cached_below(model, Encoded(TOKENS, mask), 1)


def test_a_prompt_among_states_is_rows_before_them():
    model, encoded = states()
    upper = catalogue.upper(model, 1)
    classifier = Classifier(upper, 2).eval()
    with torch.no_grad():
        before = classifier.states(encoded)
        torch.manual_seed(0)
        pr.state_prompt_(upper, 3, encoded.inputs[encoded.mask])
        rows = upper.state_prompt.rows
        assert all((row == encoded.inputs).all(-1).any() for row in rows)
        longer = torch.cat([rows.expand(2, -1, -1), encoded.inputs], 1)
        seen = torch.cat([torch.ones(2, 3, dtype=torch.bool), encoded.mask], 1)
        prompted = classifier.states(encoded)
        with disabled(upper):
            assert torch.equal(classifier.states(encoded), before)
        by_hand = classifier.__class__(catalogue.upper(model, 1), 2).eval()
        wanted = by_hand.states(Encoded(longer, seen))[:, 3:]
        torch.testing.assert_close(prompted[encoded.mask], wanted[encoded.mask])
        remove_(upper)
        assert torch.equal(classifier.states(encoded), before)
    assert not adapters(upper) and not any(m._forward_pre_hooks for m in upper.modules())


# Equations.


@pytest.mark.parametrize("name", catalogue.METHODS)
def test_equations_become_text(name):
    shown = pr.pieces(catalogue.METHODS[name].equation)
    assert shown and not any(mark in piece for piece in shown for mark in "\\{}^_")


def test_pieces_are_symbols_with_their_indices():
    assert pr.pieces(r"h \leftarrow h + W_{up}\, f(W_{down}\, x)") == [
        *("h", "←", "h", "+", "W<sub>up</sub>", "f", "("),
        *("W<sub>down</sub>", "x", ")"),
    ]
    assert pr.pieces(r"\tfrac{\alpha}{r} B A") == ["α", "/", "r", "B", "A"]
    assert pr.pieces(r"s_i t_i^T,\ \text{drawn each step}") == [
        *("s<sub>i</sub>", "t<sub>i</sub><sup>T</sup>", ",", "drawn\xa0each\xa0step")
    ]


def test_what_two_equations_share_is_marked_in_both():
    serial, parallel = pr.side_by_side("h + W h", "h + s W x")
    assert [piece for piece, same in serial if same] == ["h", "+", "W"]
    assert [piece for piece, same in parallel if not same] == ["s", "x"]
    alike = pr.side_by_side("W + m", "W + m")
    assert all(same for row in alike for _, same in row)


# Points and curves.


def test_names_stand_where_there_is_room():
    x, y = {"low": 1.0, "high": 1.0, "far": 100.0}, {"low": 0.0, "high": 0.05, "far": 1.0}
    sides = pr.label_sides(x, y, log=True)
    assert sides["low"] == "bottom center" and sides["high"] == "top center"
    assert pr.ends((10, 100), log=True) == pytest.approx([10**0.82, 10**2.18])
    assert pr.ends((0, 1)) == pytest.approx([-0.18, 1.18])


def test_the_nearest_curve_is_told_by_means():
    curves = {"a": [[0, 4], [2, 0]], "b": [[1, 2.5]], "c": [[3, 3]]}
    assert pr.nearest(curves) == {"a": "b", "b": "a", "c": "b"}


# The study.


def stored(points="POINTS"):
    return Study(paper("peft-review")).runs(points)


CHOSEN = {"movies": (study.TUNED, study.THREE)}
CHOSEN[study.PAIRS] = study.TUNED_ON_PAIRS, study.THREE_ON_PAIRS
CHOSEN[study.TOPICS] = study.TUNED_ON_TOPICS, study.THREE_ON_TOPICS
COMPARABLE = dict(zip(CHOSEN, ("comparable", "comparable-pairs", "comparable-topics"), strict=True))


def tried(task):
    """Method -> rate -> nll of the tuning runs."""
    losses = {name: {} for name in study.GRIDS}
    for run in stored("TUNING"):
        if run.get("task", "movies") != task:
            continue
        if run["method"] != "all":
            losses[run["method"]][run["rate"]] = run["nll"]
        for name, grid in study.GRIDS.items():
            if f"{name} nll" in run:
                losses[name][grid[run["attempt"]]] = run[f"{name} nll"]
    return losses


@pytest.mark.parametrize("task", CHOSEN)
def test_rates_are_the_best_of_the_tuning_runs_and_on_no_edge(task):
    for name, losses in tried(task).items():
        assert len(losses) >= len(study.GRIDS[name])
        best = min(losses, key=losses.get)
        assert CHOSEN[task][0][name] == best and min(losses) < best < max(losses)


@pytest.mark.parametrize("task", CHOSEN)
def test_three_are_those_that_did_best_on_the_tuning_seed(task):
    best = {name: min(losses.values()) for name, losses in tried(task).items()}
    assert set(CHOSEN[task][1]) == set(sorted(pr.ELEVEN, key=best.get)[:3])


@pytest.mark.parametrize("task", CHOSEN)
def test_a_method_that_does_nothing_is_not_comparable(task):
    id = COMPARABLE[task]
    claim = paper("peft-review").claim(id)
    for name in CHOSEN[task][1]:
        idle = replaced(stored(), f"{name} accuracy", "head accuracy")
        pairs = study.values(idle)[id]
        level = all(pair.method == pair.baseline for pair in pairs)  # the head beside itself
        assert level or judge(claim, pairs).verdict == NOT_REPRODUCED


def test_each_task_is_judged_on_its_own_runs():
    apart = [study.of_task(stored(), task) for task in CHOSEN]
    for runs in apart:
        assert [run["seed"] for run in runs] == list(study.SEEDS)
    assert sum(map(len, apart)) == len(matching(stored(), method="all"))


def test_a_topic_is_one_of_twenty():
    learned, labels, new, truth = study.sentences_of(100, 30, 6, study.TOPICS)
    assert len(labels) == 30 and len(truth) == 120 and learned.mask.shape[1] <= 6
    assert set(labels.tolist()) | set(truth.tolist()) <= set(range(study.LABELS[study.TOPICS]))
    assert max(truth) > 10 and new.inputs.shape[0] == 120


def test_of_pairs_the_score_is_a_rank_correlation():
    truth, made = torch.tensor([-0.5, 0.0, 0.5]), torch.tensor([[-3.0], [2.0], [9.0]])
    told = study.scores_of(made, truth)
    assert told["accuracy"] == pytest.approx(100)
    assert told["nll"] == pytest.approx((2.5**2 + 2.0**2 + 8.5**2) / 3)


def test_every_run_of_all_tells_of_every_method():
    for run in matching(stored(), method="all"):
        assert all(len(run[f"{name} curve"]) == 10 for name in study.NAMES)
        assert run["full learning"] == 2 * 1_774_464 and run["head learning"] == 0


@pytest.mark.parametrize("method", study.NAMES)
def test_a_method_trains_and_leaves_what_it_does_not_train(method):
    model, encoded = states()
    torch.manual_seed(0)
    classifier = Classifier(catalogue.upper(model, 1), 2)
    labels = torch.tensor([0, 1])
    study.put_(classifier, method, encoded, labels)
    names = study.learning(classifier, method)
    before = copy.deepcopy(classifier.state_dict())
    told = study.holding(classifier, names, encoded, labels)
    counts = study.counts(classifier, method, names)
    options, finish = study.schedule(classifier, method, 6)
    study.tune(classifier, encoded, labels, 6, 1e-2, batch=2, seed=0, trainable=names, **options)
    finish()
    after = classifier.state_dict()
    assert {n for n in before if not torch.equal(before[n], after[n])} <= set(names)
    assert any(
        not torch.equal(before[n], after[n]) for n in names if not n.startswith("head.")
    ) or (method == "head")
    heads = sum(p.numel() for p in classifier.head.parameters())
    sizes = {n: p.numel() for n, p in classifier.named_parameters()}
    assert counts["learning"] == sum(sizes[n] for n in names) - heads
    assert told["gradients"] == pytest.approx(4e-6 * sum(sizes[n] for n in names), abs=1e-4)


def test_adalora_ends_at_its_budget():
    model, encoded = states()
    classifier = Classifier(catalogue.upper(model, 1), 2)
    labels = torch.tensor([0, 1])
    study.put_(classifier, "AdaLoRA", encoded, labels)
    options, finish = study.schedule(classifier, "AdaLoRA", 12)
    names = study.learning(classifier, "AdaLoRA")
    study.tune(classifier, encoded, labels, 12, 1e-2, batch=2, seed=0, trainable=names, **options)
    finish()
    layers = adapters(classifier.model).values()
    left = sum(int(layer.values.count_nonzero()) for layer in layers)
    assert left == study.BUDGET * len(layers) < n_trainable(classifier.model)


def test_anatomy_of_upper_models_has_fewer_blocks():
    assert len(anatomy.blocks(catalogue.upper(MODELS["bert"](), 1))) == 1


# Exercises.

WRONG = {
    "classify": [
        lambda traits: exercises._classify(traits) * 0,
        lambda traits: exercises._classify(traits * [1, 0, 1, 1]),
        lambda traits: exercises._classify(traits[:, [0, 2, 1, 3]]),
    ],
    "shared_masks": [
        lambda d, r, n: (2 * d * r + r + d + n * 2 * d * r, 32 * (2 * d * r + n * 2 * d * r)),
        lambda d, r, n: (2 * d * r + r + d, exercises._shared_masks(d, r, n)[1]),
        lambda d, r, n: exercises._shared_masks(d, r, 1),
    ],
    "adam_bytes": [
        lambda shapes, rank: (
            exercises._adam_bytes(shapes, rank)[0],
            16 * sum(rank * (a + b) for a, b in shapes),
        ),
        lambda shapes, rank: exercises._adam_bytes(shapes, rank)[::-1],
        lambda shapes, rank: exercises._adam_bytes(shapes, 1),
    ],
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_answers_are_told(name, tells_right_from_wrong):
    tells_right_from_wrong(getattr(exercises, name), WRONG[name])
