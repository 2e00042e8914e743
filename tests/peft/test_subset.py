import copy

import pytest
import torch
import transformers as hf
from families_for_tests import MODELS as FAMILIES
from families_for_tests import (
    SIZES,
    TOKENS,
    learns_alone,
    loads_again,
    moved,
    same_under_a_cache,
)

from lablib.models import anatomy
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
from lablib.peft.lora import lora_
from lablib.peft.subset import (
    attention_,
    biases_,
    head_only_,
    last_blocks_,
    norms_,
    only_,
)

T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 60}
MODELS = FAMILIES | {"t5": lambda: hf.T5EncoderModel(hf.T5Config(**T5))}
WAYS = {
    "norms": norms_,
    "biases": biases_,
    "attention": attention_,
    "last_blocks": last_blocks_,
    "only": lambda model: only_(model, ["*.0.*"]),
}


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    return MODELS[request.param]().eval()


def outputs(model):
    return anatomy.logits(model, TOKENS) if hasattr(model, "lm_head") else _first(model(TOKENS))


def _first(output):
    return output if torch.is_tensor(output) else output[0]


@pytest.mark.parametrize("way", WAYS)
def test_it_starts_as_the_base_is_disabled_and_removed_bit_for_bit(model, way):
    before = outputs(model)
    bits = {n: p.clone() for n, p in model.named_parameters()}
    WAYS[way](model)
    assert torch.equal(outputs(model), before)
    changed = outputs(moved(model))
    assert (changed - before).abs().max() > 1e-3
    with disabled(model):
        assert torch.equal(outputs(model), before)
    assert torch.equal(outputs(model), changed)
    remove_(model)
    assert not adapters(model)
    assert {n: p.shape for n, p in model.named_parameters()} == {
        n: p.shape for n, p in bits.items()
    }
    assert all(torch.equal(p, bits[n]) for n, p in model.named_parameters())
    assert torch.equal(outputs(model), before)


@pytest.mark.parametrize("way", WAYS)
def test_only_it_trains_as_it_would_in_place(model, way):
    plain = copy.deepcopy(model)
    WAYS[way](model)
    freeze_base_(model)
    asking = {id(p) for p in model.parameters() if p.requires_grad}
    assert asking == {id(p) for p in trainable(model).values()}
    assert n_trainable(model) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    outputs(model).square().mean().backward()
    outputs(plain).square().mean().backward()
    theirs = dict(plain.named_parameters())
    for name, parameter in trainable(model).items():
        if name in theirs:
            torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=1e-7, rtol=1e-5)
    added = set(trainable(model)) - set(theirs)
    assert not added or (way == "biases" and all(name.endswith(".bias") for name in added))


@pytest.mark.parametrize("way", WAYS)
def test_saved_and_loaded_is_the_same_and_another_base_is_refused(model, way, tmp_path):
    plain = copy.deepcopy(model)
    WAYS[way](model)
    changed = outputs(moved(model))
    save_adapter(model, tmp_path / "a.safetensors")
    other = copy.deepcopy(plain)
    load_adapter(other, tmp_path / "a.safetensors")
    assert torch.equal(outputs(other), changed)
    with torch.no_grad():
        next(iter(plain.parameters())).view(-1)[0] += 1
    with pytest.raises(ValueError, match=r"a.safetensors belongs to a base"):
        load_adapter(plain, tmp_path / "a.safetensors")


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_norm_tuning_is_that_of_peft(family):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    bert = hf.BertModel(hf.BertConfig(**SIZES))
    model = (MODELS["llama"]() if family == "llama" else bert).eval()
    where = None if family == "llama" else ["LayerNorm"]  # it knows no default for BERT
    config = peft.LNTuningConfig(target_modules=where)
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    norms_(model)
    freeze_base_(model)
    others = {
        n.removeprefix("base_model.model.").replace(".ln_tuning_layers.default", ""): p
        for n, p in theirs.named_parameters()
        if p.requires_grad
    }
    assert set(trainable(model)) == set(others) and len(others) >= 5
    assert n_trainable(model) == theirs.get_nb_trainable_parameters()[0]
    moved(model)
    with torch.no_grad():
        for name, parameter in trainable(model).items():
            others[name].copy_(parameter)
    mine, expected = _first(model(TOKENS)), _first(theirs(TOKENS))
    assert torch.equal(mine, expected)
    mine.square().mean().backward()
    expected.square().mean().backward()
    for name, parameter in trainable(model).items():
        torch.testing.assert_close(parameter.grad, others[name].grad, atol=1e-6, rtol=1e-5)


def test_what_each_way_trains():
    def trained(way, name):
        model = MODELS[name]()
        way(model)
        return set(trainable(model))

    norms = {f"blocks.{i}.{n}.weight" for i in (0, 1) for n in ("attention_norm", "mlp_norm")}
    assert trained(norms_, "gpt") == norms | {"norm.weight"}
    roles = ("query", "key", "value", "output")
    attention = {f"blocks.{i}.attention.{r}.weight" for i in (0, 1) for r in roles}
    assert trained(attention_, "gpt") == attention
    values = trained(lambda m: attention_(m, ["query", "value"]), "gpt")
    assert values == {n for n in attention if "query" in n or "value" in n}
    last = {n for n, _ in MODELS["gpt2"]().named_parameters() if n.startswith("transformer.h.1.")}
    assert trained(last_blocks_, "gpt2") == last
    body = {n for n, _ in MODELS["bert"]().named_parameters() if not n.startswith("cls.")}
    assert trained(biases_, "bert") == {n for n in body if n.endswith(".bias")}
    projections = anatomy.projections(MODELS["gpt"]())
    assert trained(biases_, "gpt") == {f"{name}.bias" for name in projections}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_trains_alone_as_it_would_in_place(family, tmp_path):
    torch.manual_seed(0)
    model = MODELS[family]().eval()
    plain, before = copy.deepcopy(model), anatomy.logits(model, TOKENS)
    embedding = anatomy.embedding(model).weight.clone()
    head_only_(model)
    learns_alone(model)
    assert torch.equal(anatomy.logits(model, TOKENS), before)
    anatomy.logits(model, TOKENS).square().mean().backward()
    own = anatomy.head(untied := copy.deepcopy(plain))
    for name, parameter in list(own.named_parameters()):  # no longer the embedding's, too
        setattr(own, name, torch.nn.Parameter(parameter.detach().clone()))
    anatomy.logits(untied, TOKENS).square().mean().backward()
    assert n_trainable(model) == sum(p.numel() for p in own.parameters())
    found = {n.rpartition(".")[2]: p for n, p in trainable(model).items()}
    for name, parameter in own.named_parameters():
        torch.testing.assert_close(found[name].grad, parameter.grad, atol=1e-7, rtol=1e-5)
    changed = anatomy.logits(moved(model), TOKENS)
    assert (changed - before).abs().max() > 1e-3
    assert torch.equal(anatomy.embedding(model).weight, embedding)
    with disabled(model):
        assert torch.equal(anatomy.logits(model, TOKENS), before)
    loads_again(model, plain, changed, tmp_path)
    remove_(model)
    assert not adapters(model) and torch.equal(anatomy.logits(model, TOKENS), before)
    for one, other in zip(model.parameters(), MODELS[family]().parameters(), strict=True):
        assert one.shape == other.shape


def test_a_head_goes_with_another_way_and_stays_what_it_was_when_tuned_before():
    torch.manual_seed(0)
    model = MODELS["gpt"]().eval()
    before = outputs(model)
    only_(model, ["embedding.weight"])
    changed, n = outputs(moved(model)), n_trainable(model)
    head_only_(model)
    assert torch.equal(outputs(model), changed) and n_trainable(model) == n
    lora_(model, ["query"], rank=2)
    remove_(model)
    assert torch.equal(outputs(model), before)
    assert model.head.weight is model.embedding.weight


def test_tied_places_train_one_copy():
    torch.manual_seed(0)
    model = MODELS["gpt"]()
    only_(model, ["embedding.weight"])
    assert model.head.weight is model.embedding.weight
    assert n_trainable(model) == model.embedding.weight.numel()
    moved(model)
    assert not torch.equal(model.head.weight, model.head.base.weight)
    assert torch.equal(outputs(model), model.hidden_states(TOKENS) @ model.embedding.weight.T)
    assert model.head.base.weight is model.embedding.base.weight


def test_a_second_way_adds_to_the_first_and_over_lora():
    torch.manual_seed(0)
    model = MODELS["gpt"]().eval()
    before = outputs(model)
    norms_(model)
    moved(model)
    n_norms, changed = n_trainable(model), outputs(model)
    last_blocks_(model, 1)
    last = sum(p.numel() for p in MODELS["gpt"]().blocks[-1].parameters())
    assert n_trainable(model) == n_norms + last - 2 * 32
    assert torch.equal(outputs(model), changed)
    lora_(model, ["query"], rank=2)
    biases_(model)
    added = sum(layer.weight.shape[0] for layer in anatomy.projections(model).values())
    assert n_trainable(model) == n_norms + last - 2 * 32 + 2 * 2 * (32 + 32) + added
    assert not torch.equal(outputs(moved(model)), changed)
    with disabled(model):
        assert torch.equal(outputs(model), before)
    remove_(model)
    assert torch.equal(outputs(model), before) and not adapters(model)


def test_lora_over_a_tuned_block_is_saved_and_loaded(model, tmp_path):
    plain = copy.deepcopy(model)
    last_blocks_(model)
    lora_(model, ["output", "up"], rank=2)
    biases_(model)
    changed = outputs(moved(model))
    save_adapter(model, tmp_path / "a.safetensors")
    load_adapter(plain, tmp_path / "a.safetensors")
    assert torch.equal(outputs(plain), changed)


def test_a_policy_and_its_reference_share_one_graph():
    model = MODELS["gpt"]()
    norms_(model)
    freeze_base_(model)
    policy = outputs(moved(model))
    with disabled(model), torch.no_grad():
        reference = outputs(model)
    (policy - reference).square().mean().backward()
    assert all(p.grad.abs().max() > 0 for p in trainable(model).values())


def test_bfloat16_and_a_cache_go_with_it():
    model = MODELS["gpt"]().to(torch.bfloat16).eval()
    norms_(model)
    biases_(moved(model))
    same_under_a_cache(model)
    head_only_(model)
    same_under_a_cache(model)


def test_what_does_not_exist_is_said():
    model = MODELS["gpt"]()
    with pytest.raises(ValueError, match="'blocks.7' fits no parameter of GPT"):
        only_(model, ["blocks.7"])
    with pytest.raises(ValueError, match="'down' is no projection of attention, which has query"):
        attention_(model, ["down"])
    with pytest.raises(ValueError, match="3 blocks of the last are wanted, and the model has 2"):
        last_blocks_(model, 3)
    with pytest.raises(ValueError, match="T5EncoderModel has no head"):
        head_only_(MODELS["t5"]())
    with pytest.raises(ValueError, match="BertModel has no head"):
        head_only_(hf.BertModel(hf.BertConfig(**SIZES)))
    with pytest.raises(ValueError, match="BertLMPredictionHead has modules below it"):
        only_(MODELS["bert"](), ["cls.predictions.bias"])
    assert not adapters(model)
