import copy

import pytest
import torch
import transformers as hf
from torch import nn

from lablib.models import GPT, GPTConfig, anatomy, sublayers

BERT = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
MODELS = {
    "gpt": lambda: GPT(GPTConfig(60, 32, 2, 4, 2)),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**BERT)),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    ),
    "bert": lambda: hf.BertModel(hf.BertConfig(**BERT)),
    "roberta": lambda: hf.RobertaModel(hf.RobertaConfig(**BERT)),
    "t5": lambda: hf.T5EncoderModel(
        hf.T5Config(vocab_size=60, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    ),
}
TOKENS = torch.randint(2, 60, (2, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    return MODELS[request.param]().eval()


def out(model):
    made = model(TOKENS)
    for name in ("logits", "last_hidden_state"):
        made = getattr(made, name, made)
    return made


class Keep(nn.Module):
    def forward(self, x, h):
        self.x, self.h = x.detach(), h.detach()
        return h


class Plus(nn.Module):
    def __init__(self, dim=32):
        super().__init__()
        self.layer = nn.Linear(dim, dim)

    def forward(self, x, h):
        return h + self.layer(x)


@pytest.mark.parametrize("sublayer", sublayers.SUBLAYERS)
def test_input_and_output_are_those_of_the_sublayer(model, sublayer):
    keep = Keep()
    before = out(model)
    sublayers.change_(model, 0, sublayer, keep)
    assert torch.equal(out(model), before)
    names = anatomy.family(model)
    first = anatomy.projection(
        model, 0, next(r for r in names.projections if (r == "up") == (sublayer == "mlp"))
    )
    seen = {}
    first.register_forward_hook(lambda module, args, output: seen.update(x=args[0]))
    last = anatomy.projection(model, 0, "down" if sublayer == "mlp" else "output")
    last.register_forward_hook(lambda module, args, output: seen.update(h=output))
    out(model)
    assert torch.equal(seen["x"], keep.x) and torch.equal(seen["h"], keep.h)


def test_what_is_put_is_what_the_block_adds(model):
    """Adding the change of the last block by hand gives the same states."""
    dim, last = 32, len(anatomy.blocks(model)) - 1
    torch.manual_seed(2)
    plus = Plus(dim)
    before = out(model)
    name = sublayers.change_(model, last, "mlp", plus)
    changed = out(model)
    assert not torch.allclose(changed, before, atol=1e-4)
    with torch.no_grad():
        plus.layer.weight.zero_()
        plus.layer.bias.zero_()
    torch.testing.assert_close(out(model), before)
    sublayers.undo_(model, name)


def test_undone_leaves_neither_parameter_nor_hook(model):
    before, names = out(model), [n for n, _ in model.named_parameters()]
    for block in range(2):
        for sublayer in sublayers.SUBLAYERS:
            sublayers.change_(model, block, sublayer, Plus())
    sublayers.change_(model, 0, "mlp", Plus(), name="second")
    assert len(sublayers.changes(model)) == 5
    assert not torch.equal(out(model), before)
    sublayers.undo_(model)
    assert [n for n, _ in model.named_parameters()] == names
    assert torch.equal(out(model), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_copy_has_changes_of_its_own(model):
    sublayers.change_(model, 1, "mlp", Plus())
    expected = out(model)
    other = copy.deepcopy(model)
    assert torch.equal(out(other), expected)
    for change in sublayers.changes(other).values():
        change.enabled = False
    assert torch.equal(out(model), expected) and not torch.equal(out(other), expected)
    sublayers.undo_(other)
    assert torch.equal(out(model), expected) and not sublayers.changes(other)


def test_gradients_reach_a_change(model):
    name = sublayers.change_(model, 0, "attention", Plus())
    out(model).square().sum().backward()
    grad = model.get_submodule(name).change.layer.weight.grad
    assert grad.abs().sum() > 0


def test_wrong_places_are_said(model):
    with pytest.raises(ValueError, match="'ffn' is no sublayer"):
        sublayers.change_(model, 0, "ffn", Keep())
    sublayers.change_(model, 0, "mlp", Keep())
    with pytest.raises(ValueError, match="has a 'change' already"):
        sublayers.change_(model, 0, "mlp", Keep())
