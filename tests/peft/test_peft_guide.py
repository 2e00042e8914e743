import copy

import pytest
import torch
from families_for_tests import MODELS, TOKENS, moved

from lablib.evidence.claims import NOT_REPRODUCED, REPRODUCED, judge
from lablib.evidence.studies import Study, matching, replaced
from lablib.exercises import peft_guide as exercises
from lablib.models import GPT, GPTConfig, anatomy
from lablib.papers import paper
from lablib.peft import peft_guide as guide
from lablib.peft import whole_table as whole
from lablib.peft.adapter import (
    adapters,
    disabled,
    freeze_base_,
    load_adapter,
    n_trainable,
    remove_,
    save_adapter,
    trainable,
)
from lablib.peft.catalogue import METHODS, put_
from lablib.peft.lora import lora_
from lablib.peft.subset import last_blocks_
from lablib.studies import peft_guide as study

ROWS = torch.randint(60, (8, 17), generator=torch.Generator().manual_seed(0))


def gpt(n_blocks=4, dim=32):
    torch.manual_seed(0)
    return GPT(GPTConfig(60, dim, n_blocks, 4, 2, init_std=0.2))


# Bytes.


def test_adam_in_mixed_precision_holds_sixteen_bytes_a_number():
    layer = torch.nn.Linear(40, 30).bfloat16()
    adam = guide.MixedAdam(layer.parameters(), 1e-2)
    layer(torch.randn(4, 40).bfloat16()).square().mean().backward()
    adam.step()
    n = 40 * 30 + 30
    assert adam.held() == {kind: size * n for kind, size in guide.ADAM.items()}
    assert guide.training_bytes(0, n) == sum(adam.held().values()) == 16 * n


def test_it_steps_as_adam_on_float32_and_rounds():
    torch.manual_seed(0)
    half = torch.nn.Linear(8, 8).bfloat16()
    whole = copy.deepcopy(half).float()
    adam, plain = (
        guide.MixedAdam(half.parameters(), 1e-3),
        torch.optim.AdamW(whole.parameters(), lr=1e-3, weight_decay=0.0),
    )
    for _ in range(30):  # steps far below the spacing of bfloat16
        for p, q in zip(half.parameters(), whole.parameters(), strict=True):
            p.grad = torch.ones_like(p)
            q.grad = torch.ones_like(q)
        adam.step()
        plain.step()
    for p, q in zip(half.parameters(), whole.parameters(), strict=True):
        assert torch.equal(p, q.bfloat16()) and p.grad is not None


def test_bytes_of_a_step_by_hand():
    assert guide.training_bytes(100, 10, 5) == 100 * 2 + 10 * 16 + 5
    assert guide.training_bytes(100, 10, 5, frozen_bits=4) == 100 / 2 + 10 * 16 + 5


# The four questions.


def test_a_gradient_passes_the_blocks_above_what_trains():
    model = gpt()
    last_blocks_(model, 1)
    freeze_base_(model)
    assert guide.reaches(model, ROWS) == [3]
    remove_(model)
    put_(model, "norms")  # the first norm is in the first block
    freeze_base_(model)
    assert guide.reaches(model, ROWS) == [0, 1, 2, 3]
    assert all(p.grad is None for p in model.parameters())
    assert not any(block._forward_hooks for block in model.blocks)


def test_a_ladder_needs_no_gradient_of_the_model():
    made = guide.table(gpt(), ROWS, ["ladder side", "LoRA", "serial adapter"])
    told = {
        name: [row[q] for q in ("storage", "memory", "backprop", "vanishes")]
        for name, row in made.items()
    }
    assert told["full tuning"] == [False, False, False, True]
    assert told["ladder side"] == [True, True, True, False]
    assert told["LoRA"] == [True, True, False, True]
    assert told["serial adapter"] == [True, True, False, False]


def test_the_table_leaves_the_model_as_it_was():
    model = gpt()
    before = {n: p.clone() for n, p in model.named_parameters()}
    made = guide.table(model, ROWS, ["LoRA"])
    assert not adapters(model) and made["LoRA"]["trained"] < made["full tuning"]["trained"]
    assert made["full tuning"]["trained"] == model.n_parameters()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_what_is_served_has_the_shapes_of_before_where_it_can():
    model = gpt()
    shapes = {n: p.shape for n, p in model.named_parameters()}
    lora_(model, rank=2)
    told = anatomy.logits(moved(model), ROWS)
    served = guide.ready_to_serve(model)
    assert {n: p.shape for n, p in served.named_parameters()} == shapes
    torch.testing.assert_close(anatomy.logits(served, ROWS), told, atol=1e-4, rtol=1e-4)
    other = gpt()
    put_(other, "serial adapter")
    assert adapters(guide.ready_to_serve(other))


def test_selected_numbers_vanish_where_the_model_has_them():
    for family, vanishes in {"gpt": (True, False), "bert": (True, True)}.items():
        for name, wanted in zip(("norms", "BitFit"), vanishes, strict=True):
            torch.manual_seed(0)
            model = MODELS[family]().eval()
            put_(model, name)
            told = anatomy.logits(moved(model), TOKENS)
            assert guide.mergeable(model) == wanted
            served = guide.ready_to_serve(model)
            assert bool(adapters(served)) != wanted
            torch.testing.assert_close(anatomy.logits(served, TOKENS), told)


def test_every_model_is_timed_as_often():
    calls = dict.fromkeys("ab", 0)
    models = {name: gpt(1) for name in calls}
    for name, model in models.items():
        model.register_forward_hook(lambda *args, name=name: calls.update({name: calls[name] + 1}))
    times = guide.inference_seconds(models, ROWS, repeats=3)
    assert calls == {"a": 4, "b": 4} and all(t > 0 for t in times.values())


# S4.


@pytest.mark.parametrize(
    ("n", "sizes"), [(4, [1, 1, 1, 1]), (6, [1, 2, 2, 1]), (12, [2, 4, 4, 2]), (30, [5, 10, 10, 5])]
)
def test_groups_are_a_spindle(n, sizes):
    groups = guide.spindle(n)
    assert [len(group) for group in groups] == sizes
    assert [i for group in groups for i in group] == list(range(n))


def test_three_blocks_are_too_few():
    with pytest.raises(ValueError, match="3 blocks are too few"):
        guide.spindle(3)


def test_each_group_has_its_methods_and_no_other():
    model = gpt(6)
    guide.s4_(model, rank=4, length=3)
    has = [
        {
            "adapter": any(type(a).__name__ == "Bottleneck" for _, a in found),
            "prefix": any(type(a).__name__ == "Prefix" for _, a in found),
            "LoRA": any(type(a).__name__ == "LoRALinear" for _, a in found),
            "biases": any(type(a).__name__ == "Tuned" for _, a in found),
        }
        for i in range(6)
        for found in [[(n, a) for n, a in adapters(model).items() if n.startswith(f"blocks.{i}.")]]
    ]
    groups = [0, 1, 1, 2, 2, 3]
    for i, group in enumerate(groups):
        assert {name for name, there in has[i].items() if there} == set(guide.GROUPS[group])


def deep(family):
    """A tiny model of a family, with four blocks."""
    import transformers as hf
    from families_for_tests import ROBERTA, SIZES, STILL

    sizes = SIZES | {"num_hidden_layers": 4}
    build = {
        "gpt": gpt,
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, num_key_value_heads=2)),
        "gpt2": lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(vocab_size=60, n_embd=32, n_layer=4, n_head=4, n_positions=32)
        ),
        "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**sizes, **STILL)),
        "roberta": lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**sizes, **STILL, **ROBERTA)),
    }
    torch.manual_seed(0)
    return build[family]().eval()


@pytest.mark.parametrize("family", MODELS)
def test_s4_learns_is_saved_and_leaves_no_trace(family, tmp_path):
    model = deep(family)
    plain, before = copy.deepcopy(model), anatomy.logits(model, TOKENS)
    guide.s4_(model, rank=4, length=3)
    freeze_base_(model)
    anatomy.logits(model, TOKENS).square().sum().backward()
    assert all(p.grad is not None for p in trainable(model).values())
    changed = anatomy.logits(moved(model), TOKENS)
    assert not torch.allclose(changed, before, atol=1e-3)
    with disabled(model):
        assert torch.equal(anatomy.logits(model, TOKENS), before)
    save_adapter(model, tmp_path / "s4.safetensors")
    load_adapter(plain, tmp_path / "s4.safetensors")
    torch.testing.assert_close(anatomy.logits(plain, TOKENS), changed)
    remove_(model)
    assert not adapters(model) and torch.equal(anatomy.logits(model, TOKENS), before)


# A real model.


def test_the_whole_table_has_a_row_a_method_and_leaves_the_model_as_it_was():
    model = gpt()
    before = {n: p.clone() for n, p in model.named_parameters()}
    puts = whole.ways(model, study.METHODS, ROWS, reduction=2)
    assert set(puts) == {*study.METHODS, "FAR", "S4"}
    learnt = []
    rows = whole.whole_table(
        model, puts, ROWS, ["LoRA", "S4"], learnt.append, lambda model: 7.0, repeats=1
    )
    assert list(rows) == list(puts) and learnt == [model, model]
    for name, row in rows.items():
        assert row["n_trainable"] > 0 and row["total"] > row["parameters"] and row["step"] > 0
        assert row["held_out"] == (7.0 if name in ("LoRA", "S4") else None)
        merges = set(guide.areas(name)) <= {"reparametrization", "selection"} or name == "(IA)3"
        merges &= name not in ("BitFit", "norms")  # tuned copies, which need no product
        assert (row["merge_error"] is not None) == merges
        assert row["merge_error"] is None or row["merge_error"] < 1e-4
    assert rows["LoRA"]["merge_error"] == 0 < rows["DoRA"]["merge_error"]
    assert not adapters(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("family", ["gpt", "llama", "gpt2"])
def test_each_way_goes_into_a_decoder_and_out(family):
    model = MODELS[family]().eval()
    before = anatomy.logits(model, TOKENS)
    for put in whole.ways(model, ("FISH", "intrinsic SAID", "ladder side"), TOKENS, 2).values():
        put(model)
        assert n_trainable(model) > 0
        remove_(model)
    assert torch.equal(anatomy.logits(model, TOKENS), before)


# The map.


def test_every_method_lies_in_its_circles_and_in_no_other():
    places = guide.layout(METHODS)
    assert set(places) == set(METHODS) and len(set(places.values())) == len(places)
    for name, (x, y) in places.items():
        inside = {
            area
            for area, (cx, cy) in guide.CIRCLES.items()
            if (x - cx) ** 2 + (y - cy) ** 2 < guide.RADIUS**2
        }
        assert inside == set(guide.areas(name)), name


def test_a_hybrid_lies_where_circles_overlap():
    assert guide.areas("UniPELT") == ("addition", "reparametrization")
    assert guide.areas("S4") == ("addition", "reparametrization", "selection")
    assert guide.areas("MAM") == ("addition",)  # two kinds of additions


# What fits.


def test_a_large_models_numbers_are_counted_on_shapes():
    assert guide.trained_at("full tuning", "Llama 2, 7 billion") == 6_738_415_616
    lora = guide.trained_at("LoRA", "Llama 2, 7 billion")
    assert lora == 32 * 2 * 8 * (4096 + 4096)
    assert guide.trained_at("DoRA", "Llama 2, 7 billion") == lora + 32 * 2 * 4096


@pytest.mark.parametrize("name", study.METHODS)
def test_shapes_tell_what_a_real_model_has(name, monkeypatch):
    config = GPTConfig(60, 64, 3, 4, 4, ffn_dim=192)
    monkeypatch.setitem(guide.SIZES, "small", config)
    torch.manual_seed(0)
    model = GPT(config)
    put_(model, name, study.Probe(ROWS.split(4), study.language_loss))
    counted = guide.trained_at.__wrapped__(name, "small")
    assert counted == pytest.approx(n_trainable(model), rel=0.01)


def test_a_cost_adds_up():
    slope = (10.0, 4.0 * 100)  # bytes a token: a block's for each feature, and the rest
    small = guide.cost_at("LoRA", "Llama 2, 7 billion", slope, tokens=1000, vocab=100)
    a_token = 5 * 4096 * 32 + 400 * 320
    assert small.saved == 1000 * a_token and small.frozen == 2 * 6_738_415_616
    assert small.trained == 16 * small.file / 2
    assert small.step == small.frozen + small.trained + small.saved
    four = guide.cost_at("LoRA", "Llama 2, 7 billion", slope, 1000, 100, bits=4)
    assert four.frozen == small.frozen / 4
    full = guide.cost_at("full tuning", "Llama 2, 7 billion", slope, 1000, 100)
    assert full.frozen == 0 and full.trained == 16 * 6_738_415_616
    assert small.serving(10, merged=False) == small.model + 10 * small.file
    assert small.serving(10, merged=True) == 10 * small.model


def test_a_tokens_bytes_are_told_from_a_blocks():
    model, shorter = gpt(4), gpt(3)
    lora_(model, rank=2), lora_(shorter, rank=2)
    block, rest = guide.per_token(model, shorter, ROWS)
    saved = guide.step_bytes(model, ROWS)["saved"]
    assert 32 * block * 4 + rest == pytest.approx(saved / 128, rel=0.02)


# The study.


def test_its_verdict_turns_when_nobody_needs_less():
    stored, claim = Study(paper("peft-guide")).runs(), paper("peft-guide").claim("side")
    assert judge(claim, study.values(stored)["side"]).verdict == REPRODUCED
    same = replaced(stored, "ladder side bytes", "serial adapter bytes")
    assert judge(claim, study.values(same)["side"]).verdict == NOT_REPRODUCED


@pytest.mark.parametrize("id", ["norms-are-strong", "norms-movies", "norms-larger"])
def test_norms_that_do_nothing_are_not_strong(id):
    stored, claim = Study(paper("peft-guide")).runs(), paper("peft-guide").claim(id)
    idle = replaced(stored, "norms right", "base right")
    assert judge(claim, study.values(idle)[id]).verdict == NOT_REPRODUCED


TUNED = {
    "rates": study.TUNED,
    "movies rates": study.TUNED_ON_MOVIES,
    "larger rates": study.TUNED_ON_LARGER,
}


@pytest.mark.parametrize("kind", TUNED)
def test_all_methods_were_tuned_with_as_many_tries(kind):
    tried = {}
    for run in matching(Study(paper("peft-guide")).runs("TUNING"), kind=kind):
        for key in run:
            name, _, rate = key.rpartition(" ")
            if name in study.METHODS:
                tried.setdefault(name, []).append((run[key], float(rate)))
    assert set(tried) == set(study.METHODS)
    best = {}
    for name, found in tried.items():
        assert len(found) == len(study.RATES)
        best[name] = min(found)[1]
    assert best == TUNED[kind]


def test_a_larger_decoder_is_another_one_and_stays_as_it_is():
    few = {"steps": 2, "rows": 4}
    before = {n: p.clone() for n, p in study.tiny(study.LARGER)[0].named_parameters()}
    small, larger = (
        study.trained("LoRA", 201, 1e-2, **few, of=m) for m in (study.SMALL, study.LARGER)
    )
    assert larger["learning"] > small["learning"] and larger["nll"] != small["nll"]
    after = dict(study.tiny(study.LARGER)[0].named_parameters())
    assert all(torch.equal(after[name], p) for name, p in before.items())


@pytest.mark.parametrize("name", ["Compacter", "ladder side", "head"])
def test_on_movies_what_learns_is_the_method_and_the_new_layer(name, monkeypatch):
    monkeypatch.setattr(study, "MOVIES", {"steps": 2, "sentences": 8, "words": 8})
    before = {n: p.clone() for n, p in study.mini()[0].named_parameters()}
    first, again, slower = (study.on_movies(name, 201, rate) for rate in (1e-2, 1e-2, 1e-4))
    assert first == again != slower
    assert all(torch.equal(p, before[n]) for n, p in study.mini()[0].named_parameters())


# Exercises.

WRONG = {
    "kron_times": [
        lambda a, b, x: torch.kron(a, b) @ x,  # right, but large
        lambda a, b, x: torch.kron(b, a) @ x,
        lambda a, b, x: (a @ x.reshape(a.shape[1], b.shape[1]) @ b.T).T.flatten(),
    ],
    "step_gb": [
        lambda model, trained, bits, saved: (model * bits / 8 + 16 * trained) / 1e9 + saved,
        lambda model, trained, bits, saved: 16 * model / 1e9 + saved,
        lambda model, trained, bits, saved: exercises._step_gb(model, trained, bits, 0),
    ],
    "ia3_as_delta": [
        lambda weight, scale: scale[:, None] * weight,
        lambda weight, scale: (scale - 1) * weight,
        lambda weight, scale: torch.tensor([[0.0, 0.0], [27.0, 36.0]]),
    ],
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_answers_are_told(name, tells_right_from_wrong):
    tells_right_from_wrong(getattr(exercises, name), WRONG[name])
