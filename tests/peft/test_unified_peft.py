import copy
from dataclasses import replace
from itertools import product

import pytest
import torch
import transformers as hf
from families_for_tests import SIZES, TOKENS
from torch.nn import functional as F

from lablib.evidence.claims import REPRODUCED, judge
from lablib.evidence.studies import study as stored
from lablib.exercises import Wrong
from lablib.exercises import unified_peft as exercises
from lablib.models import GPT, GPTConfig, anatomy
from lablib.papers import paper
from lablib.peft import unified_peft as unified
from lablib.peft.adapter import adapters, disabled, n_trainable, remove_, trainable
from lablib.peft.bottleneck import Bottleneck, HeadsBottleneck
from lablib.peft.lora import LoRALinear
from lablib.peft.prefix import Prefix, prefix_
from lablib.studies import unified_peft as study

MODELS = {
    "gpt": lambda: GPT(GPTConfig(60, 32, 2, 4, 2, ffn_dim=48)),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)),
}


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    return MODELS[request.param]().eval()


def every():
    """All choices of the four menus."""
    menus = ("relu", "softmax", "linear"), ("serial", "parallel"), unified.PLACES, unified.COMPOSE
    return [unified.Modification(*choice, rank=3) for choice in product(*menus)]


# A prefix is a gated adapter.


def test_by_hand():
    """One query, two keys that score 0, one row that scores ln 2: it takes half."""
    q, k = torch.tensor([[1.0]]), torch.zeros(2, 1)
    row, value = torch.tensor([[2.0]]).log(), torch.tensor([[7.0]])
    gate, delta = unified.prefix_as_adapter(q, k, row, value)
    torch.testing.assert_close(gate, torch.tensor([[0.5]]))
    torch.testing.assert_close(delta, value)


@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("causal", [False, True])
def test_it_is_attention_over_both_and_so_are_its_gradients(causal, length):
    torch.manual_seed(2)
    sizes = {"q": 5, "k": 6, "v": 6, "p_k": length, "p_v": length}
    parts = {n: torch.randn(2, 3, s, 8, requires_grad=True) for n, s in sizes.items()}
    mask = torch.ones(5, 6, dtype=torch.bool).tril(1) if causal else None
    gate, delta = unified.prefix_as_adapter(*(parts[n] for n in ("q", "k", "p_k", "p_v")), mask)
    h = F.scaled_dot_product_attention(*(parts[n] for n in "qkv"), attn_mask=mask)
    ours = (1 - gate) * h + gate * delta
    k, v = (torch.cat([parts[f"p_{n}"], parts[n]], 2) for n in "kv")
    seen = None if mask is None else F.pad(mask, (length, 0), value=True)
    theirs = F.scaled_dot_product_attention(parts["q"], k, v, attn_mask=seen)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    weight = torch.randn_like(ours)
    found, wanted = (torch.autograd.grad((x * weight).sum(), parts.values(), retain_graph=True)
                     for x in (ours, theirs))  # fmt: skip
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_large_scores_neither_overflow_nor_lose_the_gate():
    q, k = torch.full((1, 4), 100.0), torch.full((2, 4), 10.0)
    gate, _ = unified.prefix_as_adapter(q, k, k[:1], k[:1])
    torch.testing.assert_close(gate, torch.tensor([[1 / 3]]))


def test_gates_of_a_model_rebuild_its_heads():
    torch.manual_seed(0)
    model = MODELS["gpt"]().eval()
    before = anatomy.logits(model, TOKENS)
    prefix_(model, 3, std=0.5)
    found = unified.gates(model, TOKENS)
    assert found.shape == (2, 2, 4, 7) and ((found > 0) & (found < 1)).all()
    for prefix in (a for a in adapters(model).values() if isinstance(a, Prefix)):
        prefix.keys.data.fill_(0.0)
        prefix.values.data.fill_(0.0)
    model.blocks[0].attention.query.weight.data.zero_()  # all scores of block 0 are equal
    expected = 3 / (3 + torch.arange(1.0, 8.0))
    torch.testing.assert_close(unified.gates(model, TOKENS)[0], expected.expand(2, 4, -1))
    assert not any(m._forward_hooks for m in model.modules())
    remove_(model)
    with pytest.raises(ValueError, match="no prefix"):
        unified.gates(model, TOKENS)
    assert before.shape == anatomy.logits(model, TOKENS).shape


# The four menus.


def test_table_1():
    kinds = {
        "prefix tuning": Prefix,
        "adapter": Bottleneck,
        "LoRA": LoRALinear,
        "parallel adapter": Bottleneck,
        "multi-head parallel adapter": HeadsBottleneck,
        "scaled parallel adapter": Bottleneck,
    }
    assert unified.table_1().keys() == kinds.keys()
    for name, row in unified.table_1(rank=3, scale=2.5).items():
        model = MODELS["gpt"]()
        unified.modify_(model, row)
        made = list(adapters(model).values())
        assert {type(a) for a in made} == {kinds[name]}
        if kinds[name] is Bottleneck:
            assert {a.insertion for a in made} == {row.insertion}
            assert {a.scale for a in made} == {2.5 if name.startswith("scaled") else 1.0}
        if kinds[name] is LoRALinear:
            assert {a.factor for a in made} == {2.5}
            assert all(n.endswith(("query", "value")) for n in adapters(model))


@pytest.mark.parametrize("m", every(), ids=str)
def test_every_choice_is_made_or_refused_with_its_reason(m):
    torch.manual_seed(0)
    model = MODELS["gpt"]().eval()
    before = anatomy.logits(model, TOKENS)
    if reason := unified.why_not(m):
        with pytest.raises(ValueError, match=reason[:20]):
            unified.modify_(model, m)
        assert not adapters(model)
        return
    unified.modify_(model, m)
    started = anatomy.logits(model, TOKENS)
    as_the_base = m.compose == "scale" or m.place in unified.WEIGHTS
    assert torch.allclose(started, before, atol=1e-6) is as_the_base
    torch.manual_seed(3)
    for parameter in trainable(model).values():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    assert (anatomy.logits(model, TOKENS) - before).abs().max() > 1e-3
    with disabled(model):
        assert torch.equal(anatomy.logits(model, TOKENS), before)


def test_choices_that_are_not_in_a_menu_are_said():
    with pytest.raises(ValueError, match="'everywhere' is none of attention"):
        unified.modify_(
            MODELS["gpt"](), unified.Modification("relu", "serial", "everywhere", "add", 2)
        )


def test_softmax_in_the_heads_without_a_gate_is_a_prefixs_delta():
    """The row "-gating" of Table 4: h + delta, with queries as keys' readers."""
    torch.manual_seed(0)
    model = MODELS["gpt"]().eval()
    unified.modify_(model, unified.Modification("softmax", "parallel", "heads", "add", 3))
    adapter = next(iter(adapters(model).values()))
    adapter.down.data.normal_()
    adapter.up.data.normal_()
    x, h = torch.randn(2, 7, 32), torch.zeros(2, 7, 32)
    q = model.blocks[0].attention.query(x).unflatten(-1, (4, 8)).transpose(1, 2)
    _, delta = unified.prefix_as_adapter(
        q * 8**0.5, q, adapter.down, adapter.up.mT
    )  # scores undivided
    by_hand = model.blocks[0].attention.output(delta.transpose(1, 2).flatten(2))
    torch.testing.assert_close(adapter(x, h), by_hand, atol=1e-5, rtol=1e-5)


# MAM and the counts.


def test_mam_is_a_prefix_and_a_scaled_parallel_adapter(model):
    unified.mam_(model, 3, 5, 4.0)
    made = list(adapters(model).values())
    assert [type(a) for a in made].count(Prefix) == 2
    parallel = [a for a in made if isinstance(a, Bottleneck)]
    assert len(parallel) == 2 and {(a.scale, a.insertion) for a in parallel} == {(4.0, "parallel")}
    assert not any(a.up.weight.any() for a in parallel)
    width = anatomy.projection(model, 0, "key").weight.shape[0]
    assert n_trainable(model) == 2 * (2 * 3 * width + 2 * 5 * 32 + 5 + 32)


def test_mam_with_an_mlp_trains_through_it(model):
    unified.mam_(model, 3, 5, mlp=7)
    anatomy.logits(model, TOKENS).square().mean().backward()
    assert model.prefix_mlp.table.grad.abs().sum() > 0


def test_counts_are_those_of_modules_on_a_layer_of_two_matrices():
    """Table 10, on GPT-2, whose feed-forward layer has two matrices, as BART's."""
    config = hf.GPT2Config(vocab_size=60, n_embd=32, n_layer=1, n_head=4, n_positions=32)
    plain = hf.GPT2LMHeadModel(config)
    for name in ("prefix tuning", "adapter", "multi-head parallel adapter"):
        model, row = copy.deepcopy(plain), unified.table_1(rank=3)[name]
        unified.modify_(model, row)
        biases = sum(p.numel() for n, p in trainable(model).items() if n.endswith("bias"))
        assert n_trainable(model) - biases == unified.parameters(row, 32, 128)
    row = unified.Modification("linear", "parallel", "mlp weights", "scale", 3)
    assert unified.parameters(row, 32, 128) == 10 * 3 * 32
    assert unified.parameters(replace(row, place="attention weights"), 32, 128) == 4 * 3 * 32


def test_bart_large_has_as_many_parameters_as_is_said():
    with torch.device("meta"):
        config = hf.BartConfig()
        model = hf.BartForConditionalGeneration(config)
    assert config.d_model == unified.BART_LARGE["dim"]
    assert config.encoder_layers == config.decoder_layers == unified.BART_LARGE["layers"]
    assert sum(p.numel() for p in model.parameters()) == unified.BART_LARGE["total"]


def test_shares_of_table_12_are_recomputed():
    """Every share of the paper's table from its sizes, within its rounding."""
    places = {"attention": "attention", "feed-forward": "mlp"}
    rows = [row for row in unified.published() if row["table"] == "12"]
    assert len(rows) == 14
    for row in rows:
        method, _, place = row["method"].partition(", ")
        kind = {"prefix": "heads"}.get(method, places.get(place, "")) + (
            " weights" if method == "LoRA" else ""
        )
        m = unified.Modification("linear", "parallel", kind, "add", int(row["size"][2:]))
        assert 100 * unified.share_of_bart(m) == pytest.approx(float(row["share"]), abs=0.12)


# The study.


def test_methods_of_one_budget_have_as_many_parameters():
    for group, tolerance in ((study.LARGE, 0.03), (study.SMALL, 0.15)):
        counts = []
        for row in group.values():
            model = copy.deepcopy(study.base())
            unified.modify_(model, *row)
            counts.append(n_trainable(model))
        assert max(counts) <= (1 + tolerance) * min(counts)
    assert counts[0] <= counts[1], "heads have no more than what they are compared with"


def test_nothing_added_is_no_mam():
    """A planted defect: the method's runs are those of the untouched base."""
    runs = stored("unified-peft").runs()
    claim = paper("unified-peft").claim("mam")
    idle = [r | {"mam": r["start"]} if r["kind"] == "judged" else r for r in runs]
    assert judge(claim, study.values(idle)["mam"]).verdict != REPRODUCED


def test_held_out_windows_are_not_those_that_are_learned():
    both = study.texts()
    learn = {tuple(row.tolist()) for row in both["train"].unfold(0, 32, 1)}
    other = [tuple(row.tolist()) for row in both["held_out"].unfold(0, 32, 32)]
    assert sum(row in learn for row in other) / len(other) < 0.3


def test_a_group_trains_each_method_as_if_alone_and_seeds_as_if_apart():
    options = {"steps": 2, "batch": 2, "rows": 2, "rate": 1e-3}
    alone = [study.run("lora", seed, **options) for seed in (7, 8)]
    both = study.run("tried lower", 7, repeats=2, **options)
    assert both["lora"] == [run["loss"] for run in alone]
    assert both["start"] == [run["start"] for run in alone] and both["start"] != both["lora"]


def test_a_prefix_that_a_network_makes_trains_the_network():
    options = {"steps": 2, "batch": 2, "rows": 2, "rate": 1e-3}
    alone, made = (study.run(kind, 7, **options) for kind in ("prefix", study.BY_MLP))
    assert alone["start"] == made["start"] and alone["loss"] != made["loss"]
    assert made["learning"] > 4 * alone["learning"]


def test_only_the_french_part_of_a_message_has_a_loss():
    (rows, loss), (places, _) = study.lesson("french", 7, 6, 4)
    pairs, _ = study.messages()
    _, tokenizer = study.pretrained(study.MODEL)
    one = int(rows[0])
    said = tokenizer.decode(pairs.tokens[one, 0][pairs.is_answer[one, 0]].tolist())
    asked = tokenizer.decode(pairs.tokens[one, 0].tolist()).partition("French:")[2]
    assert asked.startswith(said) and said.endswith("\n")
    logits = study.base()(pairs.tokens[one, :1, :-1])[0].log_softmax(-1)
    each = -logits.gather(-1, pairs.tokens[one, 0, 1:, None])[:, 0]
    expected = each[pairs.is_answer[one, 0, 1:]].mean()
    torch.testing.assert_close(loss(study.base(), rows[:1]), expected, atol=1e-4, rtol=1e-5)
    assert len(rows) == 6 and len(places) == 4


def test_what_is_learned_in_french_is_not_judged():
    learned, judged = (
        {tuple(row.tolist()) for row in part.tokens[:, 0]} for part in study.messages()
    )
    assert len(judged) > 100 and not learned & judged


@pytest.mark.parametrize("kind", study.MIDDLE)
def test_the_middle_budget_is_two_percent(kind):
    model = copy.deepcopy(study.base())
    unified.modify_(model, *study.MIDDLE[kind])
    assert n_trainable(model) / model.n_parameters() == pytest.approx(0.02, rel=0.1)


def test_each_seed_of_a_group_is_judged_once():
    runs = [{"kind": "middle", "seed": 0, "middle-mam": [1.0, 2.0]}]
    runs += [{"kind": "middle", "seed": 2, "middle-mam": 3.0}]
    runs += [{"kind": "network", "seed": 0, study.BY_MLP: 4.0, "prefix": 6.0}]
    runs += [{"kind": "judged", "seed": 0, "prefix": 5.0}]
    assert study.judged(runs, "middle-mam") == [1.0, 2.0, 3.0]
    assert study.judged(runs, study.BY_MLP) == [4.0] and study.judged(runs, "prefix") == [5.0]


def test_the_kit_has_every_possible_choice_once():
    possible = [m for m in every() if not unified.why_not(m)]
    kinds = {study.kind_of(m) for m in possible}
    assert len(kinds) == len(possible) == len(study.KIT) + len(study.LARGE) - 1  # MAM is two
    for m in possible:
        assert study.nearest(m) in study.TUNED
    with pytest.raises(KeyError, match="no run has"):
        study.kind_of(unified.Modification("relu", "serial", "heads", "add", 3))


# Exercises.


def test_exercises_agree_with_the_module():
    q, keys, rows = torch.randn(4), torch.randn(5, 4), torch.randn(3, 4)
    gate, _ = unified.prefix_as_adapter(2 * q[None], keys, rows, rows)  # undo the 1 / sqrt(4)
    ours = exercises.gate_of_head.reference(q, keys, rows)
    torch.testing.assert_close(ours, gate.squeeze())
    adapter = Bottleneck(6, 2, 3.0, insertion="parallel", start="bert", bias=False)
    x, h = torch.randn(5, 6), torch.randn(5, 6)
    theirs = exercises.parallel_adapter.reference(
        x, h, adapter.down.weight.T, adapter.up.weight.T, 3.0
    )
    torch.testing.assert_close(theirs, adapter(x, h))


@pytest.mark.parametrize("name", ["gate_of_head", "parallel_adapter", "added_parameters"])
def test_exercises_know_their_reference_and_refuse_a_constant(name):
    exercise = getattr(exercises, name)
    exercise.test(exercise.reference)
    with pytest.raises(Wrong):
        exercise.test(lambda *args: torch.tensor(0.4) if name == "gate_of_head" else 12)


def _softmax_share(q, keys, rows):
    """The share of every row, where one number a head is asked for."""
    return (torch.cat([keys, rows]) @ q).softmax(0)[len(keys) :]


WRONG = {
    "gate_of_head": [
        lambda q, keys, rows: 1 - exercises.gate_of_head.reference(q, keys, rows),
        _softmax_share,
        lambda q, keys, rows: torch.tensor(len(rows) / (len(rows) + len(keys))),
    ],
    "parallel_adapter": [
        lambda x, h, down, up, scale: h + scale * torch.relu(h @ down) @ up,
        lambda x, h, down, up, scale: h + torch.relu(x @ down) @ up,
        lambda x, h, down, up, scale: h + scale * (x @ down) @ up,
    ],
    "added_parameters": [
        lambda method, size, dim, ffn_dim: 2 * size * dim,
        lambda method, size, dim, ffn_dim: (
            size * (dim + ffn_dim) if "feed" in method else 2 * size * dim
        ),
    ],
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_answers_are_told(name, tells_right_from_wrong):
    tells_right_from_wrong(getattr(exercises, name), WRONG[name])
