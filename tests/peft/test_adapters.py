import copy

import pytest
import torch
import transformers as hf
from families_for_tests import TOKENS, moved

from lablib.data.tasks import load_task
from lablib.evidence import matching
from lablib.evidence.claims import NOT_REPRODUCED, judge
from lablib.evidence.studies import Study, replaced
from lablib.exercises import adapters as exercises
from lablib.models import anatomy
from lablib.models.classifier import Encoded, cached_below, upper_states
from lablib.papers import paper
from lablib.peft import adapters as ad
from lablib.peft import adapters_library as lib
from lablib.peft.adapter import (
    adapters,
    disabled,
    load_adapter,
    merge_,
    n_trainable,
    remove_,
    save_adapter,
    trainable,
)
from lablib.studies import adapters as study

HEADER, TENSORS = lib.recorded()
SIZES, METHODS = lib.RECORDED, lib.METHODS
INPUTS = {key: TENSORS[key] for key in ("input_ids", "attention_mask")}
peer_base = lib.recorded_base


@torch.no_grad()
def states(model, **inputs):
    output = model(**(inputs or INPUTS), output_hidden_states=False)
    return output.last_hidden_state


# Against the library.


def test_the_record_is_of_the_version_that_is_named():
    assert HEADER["versions"] == {"adapters": "1.3.0", "transformers": "4.57.6"}
    assert set(HEADER["counts"]) == set(METHODS) == set(SIZES)


def test_methods_compute_what_the_library_computes():
    plain, found = states(peer_base()), lib.compare_methods()
    assert list(found) == list(METHODS)
    for kind, (ours, theirs) in found.items():
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0, msg=kind)
        assert (plain - theirs).abs().max() > 0.1, kind  # the weights are not new


@pytest.mark.parametrize("kind", METHODS)
def test_it_trains_as_many_numbers_as_the_library(kind):
    with torch.device("meta"):
        model = hf.RobertaModel(hf.RobertaConfig(vocab_size=20), add_pooling_layer=False)
    METHODS[kind](model)
    assert n_trainable(model) == HEADER["counts"][kind]


@pytest.mark.parametrize("kind", ["seq_bn", "double_seq_bn", "lora"])
def test_compositions_compute_what_the_library_computes(kind):
    found = ad.compare_compositions(kind)
    assert len(found) >= 4 and ("Fuse(a, b)" in found) == (kind == "seq_bn")
    for text, (ours, theirs) in found.items():
        if not text.startswith("its own") and (kind, text) != TWICE:
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0, msg=text)


TWICE = ("seq_bn", "Parallel(Stack(a, b), b)")  # the library takes the norm twice there


def test_a_stack_in_a_parallel_is_that_stack():
    found = ad.compare_compositions(TWICE[0])
    ours, theirs = found[TWICE[1]]
    assert (ours - theirs).abs().max() > 0.1
    torch.testing.assert_close(ours[4:], theirs[4:], atol=1e-5, rtol=0)
    torch.testing.assert_close(ours[:4], found["Stack(a, b)"][1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["seq_bn", "double_seq_bn"])
def test_the_librarys_average_is_divided_twice(kind):
    with ad.active(model := ad.recorded_pair(kind), "Average(a, b, weights=[0.25, 0.25])"):
        ours = lib.recorded_states(model)
    theirs = TENSORS[f"{kind}:its own Average(a, b)"]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_other_tensors_than_the_models_are_refused():
    model = peer_base()
    METHODS["lora"](model, rank=3)
    with pytest.raises(ValueError, match="no match"):
        lib.copy_from_library_(model, {"encoder.layer.0.attention.self.key.loras.a.lora_A": TOKENS})


# Compositions, in every family.


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return anatomy.logits(model, tokens)


def filled(model, kind="double_seq_bn", names="abc"):
    for name in names:
        ad.add_(model, name, kind, SIZES[kind])
    return moved(model, 0.3)


def composed(model, text, tokens=TOKENS):
    with ad.active(model, text):
        return logits(model, tokens)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ad.COMPOSABLE)
def test_each_kind_composes(model, kind):
    base = logits(model)
    filled(model, kind)
    assert torch.equal(logits(model), base)  # nothing is active
    alone = {name: composed(model, name) for name in "abc"}
    assert (alone["a"] - base).abs().max() > 1e-3 < (alone["a"] - alone["b"]).abs().max()
    close(composed(model, "Parallel(a, b, c)"), torch.cat(list(alone.values())))
    split = torch.cat([alone["a"][:1], alone["b"][1:]])
    close(composed(model, "BatchSplit(a, b, sizes=[1, 1])"), split)
    close(composed(model, "Average(a, b, weights=[1, 0])"), alone["a"])
    close(composed(model, "Stack(a)"), alone["a"])
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize("kind", ["seq_bn", "par_bn", "lora"])
def test_an_adapter_alone_is_the_method(model, kind):
    plain = copy.deepcopy(model)
    torch.manual_seed(7)
    METHODS[kind](plain, **SIZES[kind])
    torch.manual_seed(7)
    ad.add_(model, "a", kind, SIZES[kind])
    moved(plain), moved(model)
    close(composed(model, "a"), logits(plain))


def test_a_stack_is_nesting():
    model = filled(peer_base())
    place = next(iter(ad.places(model).values()))
    x, h = torch.randn(2, 2, 5, 32)
    f, g = place.parts["a"], place.parts["b"]
    close(ad.Stack("a", "b")(place, x, h), g(x, f(x, h)))
    average = ad.Average("a", "b", weights=[2, -1])(place, x, h)
    close(average, 2 * f(x, h) - g(x, h))
    split = ad.Split("a", "b", sizes=[2, 3])(place, x, h)
    close(split[:, 2:], g(x, h)[:, 2:])


def test_stacked_changes_of_a_weight_add():
    model = filled(peer_base(), "lora", "ab")
    name, place = next(iter(ad.places(model).items()))
    x = torch.randn(2, 5, 32)
    deltas = place.parts["a"].delta() + place.parts["b"].delta()
    with ad.active(model, "Stack(a, b)"):
        close(place(x), place.base(x) + x @ deltas.T)
    with pytest.raises(ValueError, match="stay beside the weight"):
        merge_(model)
    assert torch.equal(place.weight, place.base.weight) and "query" in name


def test_a_fusion_of_equal_adapters_is_one_of_them():
    model = filled(peer_base())
    for place in ad.places(model).values():
        place.parts["b"].load_state_dict(place.parts["a"].state_dict())
    ad.add_fusion_(model, ["a", "b"])
    close(composed_states(model, "Fuse(a, b)"), composed_states(model, "a"))


def composed_states(model, text, **inputs):
    with ad.active(model, text):
        return states(model, **inputs)


def test_parallel_runs_the_blocks_below_once():
    model, seen = peer_base(), []
    for name in "ab":
        ad.add_(model, name, "seq_bn", SIZES["seq_bn"], below=1)
    moved(model, 0.3)
    blocks = anatomy.blocks(model)
    assert not list(ad.places(blocks[0].attention)) and len(ad.places(model)) == 1
    for block in blocks:
        block.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    both = composed_states(model, "Parallel(a, b)")
    assert seen == [4, 8]
    close(both, torch.cat([composed_states(model, name) for name in "ab"]))
    encoded = cached_below(model, Encoded(INPUTS["input_ids"], INPUTS["attention_mask"] > 0), 1)
    with ad.active(model, "Parallel(a, b)"), torch.no_grad():
        close(upper_states(model, encoded, 1)[:2], both[:2])


def test_weights_are_averaged_and_subtracted():
    model = filled(peer_base(), "compacter", "ab")
    ad.average_(model, "middle", {"a": 0.5, "b": 0.5})
    ad.average_(model, "back", {"a": 1.0, "b": 1.0})
    ad.average_(model, "same", {"back": 1.0, "b": -1.0})
    close(composed_states(model, "same"), composed_states(model, "a"))
    place = next(iter(ad.places(model).values()))
    mean = (place.parts["a"].down.left + place.parts["b"].down.left) / 2
    close(place.parts["middle"].down.left, mean)
    shared = {id(p.parts["middle"].down.shared) for p in ad.places(model).values()}
    assert len(shared) == 1


def test_one_adapter_trains_and_the_others_stay():
    model = filled(peer_base(), "seq_bn", "ab")
    own = ad.parameters_of(model, "a")
    assert len(own) == 8 and all(".parts.a." in name for name in own)
    with ad.active(model, "a"):
        model(**INPUTS).last_hidden_state.square().sum().backward()
    grads = {n: p.grad for n, p in trainable(model).items()}
    assert all((grads[n] is not None) == (n in own) for n in grads)


def test_it_comes_out_and_is_saved(model, tmp_path):
    plain, hooks = copy.deepcopy(model), n_hooks(model)
    filled(model, "seq_bn", "ab"), filled(model, "lora", "c")
    ad.add_fusion_(model, ["a", "b"])
    text = "Stack(Fuse(a, b), c)"
    before = composed(model, text)
    save_adapter(model, tmp_path / "three.safetensors")
    load_adapter(plain, tmp_path / "three.safetensors")
    close(composed(plain, text), before)
    with ad.active(model, text), disabled(model):
        off = logits(model)
    remove_(model)
    assert torch.equal(logits(model), off) and not adapters(model)
    assert n_hooks(model) == hooks


def n_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("kind", METHODS)
def test_every_method_comes_out_and_is_saved(model, kind, tmp_path):
    if kind == "prompt_tuning" and anatomy.family(model).name == "BERT":
        pytest.importorskip("transformers")
    plain, off, hooks = copy.deepcopy(model), logits(model), n_hooks(model)
    METHODS[kind](model, **SIZES[kind])
    moved(model, 0.2)
    before = logits(model)
    assert before.shape == off.shape and (before - off).abs().max() > 1e-4
    with disabled(model):
        assert torch.equal(logits(model), off)
    save_adapter(model, tmp_path / "one.safetensors")
    load_adapter(plain, tmp_path / "one.safetensors")
    close(logits(plain), before)
    remove_(model)
    assert torch.equal(logits(model), off) and n_hooks(model) == hooks


def test_a_union_is_both():
    model = peer_base()
    lib.union(lambda m: METHODS["lora"](m, rank=3), lambda m: METHODS["seq_bn"](m, reduction=4))(
        model
    )
    both = n_trainable(model)
    remove_(model)
    apart = 0
    for kind in ("lora", "seq_bn"):
        METHODS[kind](model, **SIZES[kind])
        apart += n_trainable(model)
        remove_(model)
    assert both == apart


# The text of a composition.


@pytest.mark.parametrize(
    "text",
    ["a", "Stack(a, b)", "Stack(fr, Parallel(mood, topic))", "Fuse(a, Stack(b, c))"],
)
def test_text_is_read_and_written(text):
    assert str(ad.parse(text)) == text


def test_numbers_come_by_keyword():
    assert ad.parse("Average(a, b, weights=[2, -1])").weights == (2, -1)
    assert ad.parse("Average(a, b)").weights == (0.5, 0.5)
    assert ad.parse("Split(a, b, sizes=[3, 4])").sizes == (3, 4)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("Stack(a", "can't be read"),
        ("Pile(a, b)", "neither a name nor one of Stack"),
        ("a + b", "neither a name"),
        ("Stack()", "nothing in it"),
        ("Stack(a, sizes=[1])", "unexpected keyword"),
        ("Split(a, b)", "missing"),
        ("Average(a, b, weights=[1])", "1 weights for 2 children"),
    ],
)
def test_what_is_no_composition_is_said(text, why):
    with pytest.raises(ValueError, match=why):
        ad.parse(text)


@pytest.mark.parametrize("text", ["Average(a, Parallel(a, b))", "Parallel(Parallel(a, b), a)"])
def test_a_parallel_stands_alone_or_in_a_stack(text):
    with pytest.raises(ValueError, match="stands alone or in a Stack"):
        ad.channels(ad.parse(text))


def test_wrong_names_and_sizes_are_said():
    model = filled(peer_base(), "seq_bn", "ab")
    for text, why in (
        ("Stack(a, z)", "no adapter is called z"),
        ("Fuse(a, b)", "call add_fusion_"),
        ("BatchSplit(a, b, sizes=[1, 1])", "sizes for 2 texts, and there are 4"),
        ("Split(a, b, sizes=[1, 1])", "sizes for 2 positions, and there are 7"),
    ):
        with pytest.raises(ValueError, match=why):
            composed_states(model, text)
    for name, kind, why in (
        ("a", "lora", "taken"),
        ("x", "mam", "is none of"),
        ("half", "lora", "no plain word"),
    ):
        with pytest.raises(ValueError, match=why):
            ad.add_(model, name, kind)
    with pytest.raises(ValueError, match="no sublayer has adapters called a, z"):
        ad.add_fusion_(model, ["a", "z"])


# The study.


def test_an_adapter_that_does_nothing_is_not_competitive():
    stored, claim = Study(paper("adapters")).runs(), paper("adapters").claim("competitive")
    idle = replaced(stored, f"{study.BEST}_score", "head_score")
    assert judge(claim, study.values(idle)["competitive"]).verdict == NOT_REPRODUCED


def test_rates_and_the_best_method_are_those_of_the_tuning_seed():
    runs, scores = Study(paper("adapters")).runs("TUNING"), {}
    for run in matching(runs, kind="rates"):
        for kind, rates in study.RATES[run["task"]].items():
            tried = dict(zip(rates, zip(run[f"{kind}_loss"], run[f"{kind}_score"]), strict=True))
            for beyond in matching(runs, kind=kind, task=run["task"]):
                tried[beyond["rate"]] = beyond["loss"], beyond["score"]
            best = min(tried, key=tried.get)
            assert min(tried) < best < max(tried), "a best rate at the edge is not tuned"
            assert best == study.TUNED[run["task"]][kind]
            scores.setdefault(kind, []).append(tried[best][1])
    assert {len(both) for both in scores.values()} == {len(study.SIZES)}
    del scores["full"]
    assert max(scores, key=lambda kind: sum(scores[kind])) == study.BEST


def test_the_rate_of_languages_is_the_best_for_french_on_the_tuning_seed():
    runs = matching(Study(paper("adapters")).runs("TUNING"), kind="languages")
    losses = {run["rate"]: run["french"][study.WORN.index("french")] for run in runs}
    assert min(losses, key=losses.get) == study.LANGUAGE_RATE


def test_a_language_adapter_knows_its_language_alone():
    """On a small model, and with other movie sentences in the place of the reviews."""
    tiny = study.pretrained("tiny-1m")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "pretrained", lambda name: tiny)
        patch.setattr(study, "READ", 40)
        patch.setattr(study, "load_task", lambda name: load_task("movies"))
        told = study.in_french(201, 1e-2, 12, 8)
    for language in ("english", "french"):
        own = study.WORN.index(language)
        assert min(told[language]) == told[language][own] < told[language][0] - 0.1
    assert len(told["movies"]) == len(told["reviews"]) == len(study.WORN)
    assert len(set(told["reviews"])) > 1, "the task adapter reads what the language adapter gave"


def test_both_tasks_count_alike():
    told = [study.run("all", 201, steps=1, judged=24, task=task) for task in study.SIZES]
    runs = [
        {"kind": "all", "task": task, "seed": 201} | row for task, row in zip(study.SIZES, told)
    ]
    (pair,) = study.within_margin(runs)
    means = [sum(row[f"{kind}_score"] for row in told) / 2 for kind in (study.BEST, "full")]
    assert pair.method == pytest.approx(means[0] + study.MARGIN)
    assert pair.baseline == pytest.approx(means[1])
    alone = study.run("full", 201, steps=1, judged=24)["score"]
    assert told[0]["full_score"] == alone
    encoded, labels, *_ = study.sentences_of(201, 24, "sts-b")
    assert labels.is_floating_point() and -0.5 <= labels.min() < labels.max() <= 0.5
    assert encoded.mask.shape[1] > study.WORDS  # two sentences are read


def test_the_best_rate_is_the_vertex_of_a_parabola():
    rates = (1e-3, 1e-2, 1e-1)
    assert study.best_rate([2, 1, 2], rates) == pytest.approx(-2)
    assert study.best_rate([1, 2, 3], rates) == pytest.approx(-3)
    curve = [(x + 2.2) ** 2 for x in (-3, -2, -1)]
    assert study.best_rate(curve, rates) == pytest.approx(-2.2)


def test_shared_numbers_are_learned_once_and_the_head_too():
    model = peer_base()
    METHODS["compacter"](model, reduction=4)
    names = study.learned(study.Classifier(model, 2))
    assert sum(name.endswith(".shared") for name in names) == 1
    assert {"head.weight", "head.bias"} < set(names)


WRONG = {
    "batch_split": [
        lambda functions, sizes, x, h: functions[0](x, h),
        lambda functions, sizes, x, h: exercises._batch_split(functions[::-1], sizes, x, h),
        lambda functions, sizes, x, h: exercises._batch_split(functions, sizes, h, h),
    ],
    "fused": [
        lambda query, keys, values: values.mean(0),
        lambda query, keys, values: exercises._fused(query / 2, keys, values),
        lambda query, keys, values: exercises._fused(query, values, values),
    ],
    "compacter_size": [
        lambda dim, rank, n, blocks: exercises._compacter_size(dim, rank, n, blocks) - n**3,
        lambda dim, rank, n, blocks: exercises._compacter_size(dim, rank, n, blocks // 2),
        lambda dim, rank, n, blocks: 4 * blocks * dim * rank,
    ],
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_answers_are_told(name, tells_right_from_wrong):
    tells_right_from_wrong(getattr(exercises, name), WRONG[name])
