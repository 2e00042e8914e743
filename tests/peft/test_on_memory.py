import copy

import pytest
import torch
import transformers as hf
from test_on_glue import Heard

from lablib.data.packages import DataError
from lablib.models import GPT, GPTConfig
from lablib.peft import on_memory as om
from lablib.peft.adapter import adapters, trainable
from lablib.peft.qlora import NF4Linear

SIZES = om.Sizes(rows=2, length=12, rank=2)
WAYS = om.on_bases(SIZES) | om.of_kinds()
LLAMA = {"vocab_size": 60, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
MODELS = {
    "gpt": lambda: GPT(GPTConfig(60, 64, 2, 8, 4, tied=False)),
    "llama": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(**LLAMA, num_attention_heads=8, num_key_value_heads=4)
    ),
}


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    return MODELS[request.param]().eval()


def bits(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_a_copy_is_equal_and_shares_nothing_but_the_ties_of_the_model():
    torch.manual_seed(0)
    model = GPT(GPTConfig(60, 64, 2, 8, 4, tied=True)).eval()
    made = om.copied(model, "cpu")
    tokens = om.rows_of(model, SIZES)
    assert torch.equal(made(tokens), model(tokens))
    ours, theirs = ({p.data_ptr() for p in m.parameters()} for m in (model, made))
    assert not ours & theirs and len(ours) == len(theirs)
    assert all(isinstance(p, torch.nn.Parameter) for p in made.parameters())


@pytest.mark.parametrize("way", [way for way in WAYS if way != "ladder side"])  # cut by weights
def test_what_a_way_brings_lies_where_the_model_lies(way):
    """The meta device stands for a GPU: it does not compute with what lies elsewhere."""
    made = om.copied(MODELS["gpt"](), "meta")
    WAYS[way](made)
    assert all(t.is_meta for t in [*made.parameters(), *made.buffers()])


@pytest.mark.parametrize("way", WAYS)
def test_what_must_train_trains_and_the_rest_stays(model, way):
    torch.manual_seed(0)
    rows = om.rows_of(model, SIZES)
    WAYS[way](model)
    before, base = bits(model), dict(model.named_buffers())
    base = {name: b.clone() for name, b in base.items()}
    om.accounted(model, rows)
    losses = om.stepped(model, rows)
    own = set(trainable(model)) or set(before)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved <= own and len(moved) > len(own) / 2
    assert all(torch.equal(b, base[name]) for name, b in model.named_buffers())
    assert losses[1] != losses[0]


def test_all_ways_read_the_same_rows_from_the_same_weights(model, monkeypatch):
    before, seen = bits(model), []
    stepped = om.stepped

    def watched(adapted, rows):
        named = dict(adapted.named_parameters())
        same = [torch.equal(named[n], p) for n, p in before.items() if n in named]
        seen.append((rows.clone(), all(same)))
        return stepped(adapted, rows)

    monkeypatch.setattr(om, "stepped", watched)
    ways = om.of_kinds() | {"LoRA over 4 bits": WAYS["LoRA over 4 bits"]}
    rows = om.rows_of(model, SIZES)
    told = [om.held(model, put, rows) for put in ways.values()]
    assert told == [om.held(model, put, rows) for put in ways.values()]
    assert all(torch.equal(read, rows) and same for read, same in seen)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert not adapters(model) and all(p.requires_grad for p in model.parameters())


def test_bytes_are_those_of_what_trains():
    model = MODELS["gpt"]().eval()
    n, rows = sum(p.numel() for p in model.parameters()), om.rows_of(model, SIZES)
    told = {way: om.held(model, put, rows).account for way, put in WAYS.items()}
    assert told["full tuning"]["parameters"] == 4 * n
    assert told["full tuning"]["gradients"] == 4 * n == told["full tuning"]["optimizer"] / 2
    small = [kinds for way, kinds in told.items() if way != "full tuning"]
    assert all(kinds["gradients"] < n for kinds in small)
    assert told["LoRA over 4 bits"]["parameters"] < told["LoRA"]["parameters"] / 2
    assert told["ladder side"]["saved"] < told["LoRA"]["saved"]


def test_the_bases_are_smaller():
    model = MODELS["gpt"]().eval()
    made = copy.deepcopy(model)
    WAYS["LoRA over 4 bits"](made)
    assert sum(isinstance(m, NF4Linear) for m in made.modules()) == 2 * 7
    WAYS["LoRA over a pruned base"](model)
    weight = next(iter(adapters(model).values())).base.weight
    assert (weight == 0).float().mean() == 0.5


def test_what_does_not_fit_is_said_and_the_next_way_goes_on(monkeypatch):
    def short(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = MODELS["gpt"]().eval()
    rows = om.rows_of(model, SIZES)
    with monkeypatch.context() as patch:
        patch.setattr(om, "stepped", short)
        step = om.held(model, WAYS["LoRA"], rows)
    assert step.peak is None and step.account["total"] > 0
    assert om.line("LoRA", step, "cuda").endswith("; this GPU has less.")
    with monkeypatch.context() as patch:
        patch.setattr(om, "copied", short)
        step = om.held(model, WAYS["LoRA"], rows)
    assert om.line("LoRA", step, "cuda") == "LoRA: more than this GPU has."
    assert om.held(model, WAYS["LoRA"], rows).account["total"] > 0


def test_a_line_has_both_numbers():
    kinds = {"parameters": 4e9, "gradients": 1e9, "optimizer": 2e9, "saved": 3e9, "total": 10e9}
    told = om.line("LoRA", om.Held(kinds, 9_500_000_000), "cuda")
    assert told == (
        "LoRA: 10.00 GB by account (weights 4.00, for what trains 3.00, for going back 3.00), "
        "at most 9.50 GB at once by CUDA's counter."
    )


def test_a_line_a_way_where_there_is_a_gpu_and_a_reason_where_there_is_none(monkeypatch):
    om.say_memory(cpu := Heard("cpu"), om.on_bases())
    assert cpu.said == ["That takes a GPU, so no step of a billion weights was made here."]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(om, "pretrained", lambda name: (MODELS["gpt"]().eval(), None))
    om.say_memory(lab := Heard("gpu"), ways := om.on_bases(SIZES), SIZES)
    assert [text.split(":")[0] for text in lab.said] == list(ways)
    assert all(text.endswith("; nobody counted here.") for text in lab.said)

    def away(name):
        raise DataError("no hub")

    monkeypatch.setattr(om, "pretrained", away)
    om.say_memory(again := Heard("gpu"), WAYS)
    assert again.said == ["no hub"]


def test_without_the_hub_there_is_a_reason(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(om, "NAME", "TinyLlama/none-such")
    om.say_memory(lab := Heard("gpu"), WAYS)
    (said,) = lab.said
    assert "Hugging Face hub" in said
