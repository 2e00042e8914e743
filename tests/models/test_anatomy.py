import pytest
import torch
import transformers as hf
from torch import nn

from lablib.models import GPT, GPTConfig, anatomy

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MODELS = {
    "gpt": lambda: GPT(GPTConfig(60, 32, 2, 4, 2)),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**SIZES)),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    ),
}
BERT = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
T5 = {"vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
ENCODERS = {
    "bert": lambda: hf.BertModel(hf.BertConfig(**BERT)),
    "bert with a head": lambda: hf.BertForMaskedLM(hf.BertConfig(**BERT)),
    "roberta": lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**BERT)),
    "t5": lambda: hf.T5EncoderModel(hf.T5Config(**T5)),
    "t5 1.1": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(**T5, feed_forward_proj="gated-gelu")
    ),
}


@pytest.fixture(params=ENCODERS)
def encoder(request):
    torch.manual_seed(0)
    return ENCODERS[request.param]().eval()


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    return MODELS[request.param]().eval()


def test_every_matrix_of_the_blocks_is_a_projection(model):
    found = {id(m.weight) for m in anatomy.projections(model).values()}
    matrices = {id(p) for p in anatomy.blocks(model).parameters() if p.ndim == 2}
    assert found == matrices


def test_embedding_head_and_final_norm_make_the_logits(model):
    seen = {}
    norm = anatomy.final_norm(model)
    norm.register_forward_hook(lambda _, args, output: seen.update(states=output))
    tokens = torch.randint(60, (2, 7))
    logits = anatomy.logits(model, tokens)
    torch.testing.assert_close(anatomy.head(model)(seen["states"]), logits)
    assert anatomy.embedding(model).weight.shape == (60, 32)


def test_norms_are_two_a_block_and_the_last(model):
    norms = anatomy.norms(model)
    assert len(norms) == 5 and list(norms.values())[-1] is anatomy.final_norm(model)


def test_a_replaced_part_takes_effect(model):
    tokens = torch.randint(60, (1, 5))
    before = anatomy.logits(model, tokens)
    anatomy.replace_part(model, -1, "mlp", nn.Identity())
    assert isinstance(anatomy.part(model, 1, "mlp"), nn.Identity)
    assert not torch.allclose(before, anatomy.logits(model, tokens))


def test_one_projection_is_the_blocks_own(model):
    every = list(anatomy.projections(model, "up").values())
    assert anatomy.projection(model, 1, "up") is anatomy.projection(model, -1, "up") is every[1]
    anatomy.replace_part(model, 0, "mlp", nn.Identity())
    with pytest.raises(AttributeError):
        anatomy.projection(model, 0, "up")
    with pytest.raises(IndexError):
        anatomy.projection(model, 2, "up")


def test_an_unknown_model_or_role_is_named():
    with pytest.raises(ValueError, match="Linear has the layout of none"):
        anatomy.blocks(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="GPT has no projection 'q'; it has query"):
        anatomy.projections(MODELS["gpt"](), "q")
    with pytest.raises(ValueError, match="'ffn' is no part of a block"):
        anatomy.part(MODELS["gpt"](), 0, "ffn")


def test_every_matrix_of_an_encoders_blocks_is_a_projection(encoder):
    found = {id(m.weight) for m in anatomy.projections(encoder).values()}
    linear = [m for m in anatomy.blocks(encoder).modules() if isinstance(m, nn.Linear)]
    assert found == {id(m.weight) for m in linear} and len(found) in (12, 14)


def test_every_norm_of_an_encoder_is_found(encoder):
    kinds = (nn.LayerNorm, hf.models.t5.modeling_t5.T5LayerNorm)
    stack = encoder.encoder if hasattr(encoder, "shared") else encoder
    inside = {id(m) for n, m in stack.named_modules() if isinstance(m, kinds) and "cls" not in n}
    inside -= {id(m) for n, m in stack.named_modules() if n.startswith("lm_head")}
    norms = anatomy.norms(encoder)
    assert {id(m) for m in norms.values()} == inside and len(norms) == 5
    names = list(norms)
    assert anatomy.family(encoder).name.startswith("T5") or "mbedding" in names[0]


def test_what_an_encoder_lacks_is_said():
    bert = ENCODERS["bert"]()
    with pytest.raises(ValueError, match="BERT has no final norm"):
        anatomy.final_norm(bert)
    with pytest.raises(ValueError, match="BERT has no head"):
        anatomy.head(bert)
    with pytest.raises(ValueError, match="BERT has no mlp"):
        anatomy.part(bert, 0, "mlp")
    assert anatomy.head(ENCODERS["roberta"]()).out_features == 60
