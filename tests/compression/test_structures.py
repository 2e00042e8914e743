import numpy as np
import pytest
import torch

from lablib.compression import structures as s
from lablib.models import GPT, GPTConfig, anatomy, flops, to_hf


def small_model(tied=True, **options):
    torch.manual_seed(0)
    sizes = {"n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 24, "head_dim": 6}
    config = GPTConfig(vocab_size=50, dim=32, max_length=16, init_std=0.2, tied=tied)
    config = GPTConfig(**{**vars(config), **sizes, **options})
    model = GPT(config)
    with torch.no_grad():  # trained norms are not 1, biases not 0
        for norm in anatomy.norms(model).values():
            norm.weight.uniform_(0.5, 2)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
    return model.eval()


def theirs(model, tmp_path):
    from transformers import AutoModelForCausalLM

    to_hf(model, tmp_path)
    return AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.fixture
def tokens():
    torch.manual_seed(3)
    return torch.randint(50, (3, 9))


def draw(random, size, unequal=True):
    """Random blocks, heads, neurons, channels; alike in all blocks unless `unequal`."""

    def some(n, least=1):
        return sorted(random.choice(n, random.integers(least, n + 1), replace=False).tolist())

    def heads():
        share = size.heads // size.kv_heads
        groups, within = some(size.kv_heads), random.integers(1, share + 1)
        return [
            group * share + place
            for group in groups
            for place in random.choice(share, within, replace=False).tolist()
        ]

    one = heads(), some(size.neurons)
    each = [(heads(), some(size.neurons)) if unequal else one for _ in range(size.blocks)]
    return s.Keep(
        blocks=some(size.blocks),
        heads=[heads for heads, _ in each],
        neurons=[neurons for _, neurons in each],
        channels=some(size.channels, least=8),
    )


KINDS = {
    "plain": {},
    "biases": {"qkv_bias": True, "output_bias": True, "mlp_bias": True},
    "untied, norms in heads": {"tied": False, "qk_norm": True},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(8))
def test_a_sliced_model_computes_what_the_masked_one_does(kind, seed, tokens):
    model = small_model(**KINDS[kind])
    keep = draw(np.random.default_rng(seed), s.sizes(model))
    whole = model(tokens)
    with s.masked(model, keep):
        expected = model(tokens)
    small = s.sliced(model, keep)
    torch.testing.assert_close(small(tokens), expected, atol=1e-5, rtol=1e-5)
    assert small.n_parameters() == s.parameters_of(model, keep)
    assert torch.equal(model(tokens), whole)


@pytest.mark.parametrize("seed", range(4))
def test_so_does_a_smaller_llama(seed, tokens, tmp_path):
    model = theirs(small_model(), tmp_path)
    keep = draw(np.random.default_rng(seed), s.sizes(model), unequal=False)
    with s.masked(model, keep):
        expected = model(tokens).logits
    small = s.sliced(model, keep)
    torch.testing.assert_close(small(tokens).logits, expected, atol=1e-5, rtol=1e-5)
    assert small.num_parameters() == s.parameters_of(model, keep)
    small.save_pretrained(tmp_path / "small")
    again = type(model).from_pretrained(tmp_path / "small")
    torch.testing.assert_close(again(tokens).logits, expected, atol=1e-5, rtol=1e-5)


def test_both_families_generate_alike_when_sliced(tokens, tmp_path):
    model = small_model()
    keep = draw(np.random.default_rng(1), s.sizes(model), unequal=False)
    ours, hugging = s.sliced(model, keep), s.sliced(theirs(model, tmp_path), keep)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = hugging.generate(tokens[:1], **options)
    assert torch.equal(ours.generate(tokens[:1], 5, temperature=0), expected)


def test_masking_is_undone_to_the_bit_also_after_an_error(tokens):
    model = small_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    keep = s.Keep(blocks=[1], channels=range(9))

    def fail():
        assert not torch.equal(model.embedding.weight, before["embedding.weight"])
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), s.masked(model, keep):
        fail()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_block_that_goes_is_passed_by(tokens):
    model = small_model()
    blocks = [model.blocks[0], model.blocks[2]]
    with s.masked(model, s.Keep(blocks=[0, 2])):
        found = model(tokens)
    model.blocks = torch.nn.ModuleList(blocks)
    torch.testing.assert_close(found, model(tokens))


def test_what_stays_alone_matters(tokens):
    model = small_model()
    keep = draw(np.random.default_rng(0), s.sizes(model))
    small = s.sliced(model, keep)
    stays = s.remaining(model, keep)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if axes := stays.get(name):
                noise[torch.meshgrid(*axes, indexing="ij")] = 0
            parameter.add_(noise)
    torch.testing.assert_close(s.sliced(model, keep)(tokens), small(tokens))


def test_a_sliced_model_shares_nothing_and_trains(tokens):
    model = small_model()
    small = s.sliced(model, s.Keep(blocks=[0, 1]))
    before = model(tokens).detach()
    assert small.head.weight is small.embedding.weight
    small(tokens).square().mean().backward()
    with torch.no_grad():
        for parameter in small.parameters():
            assert parameter.grad is not None
            parameter.sub_(parameter.grad)
    assert torch.equal(model(tokens), before)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("length", [1, 16])
def test_flops_of_a_smaller_model_are_those_of_its_config(length):
    model = small_model(head_dim=8)
    assert s.flops_per_token(model, s.Keep(), length) == flops.flops_per_token(model.config, length)
    keep = s.Keep(blocks=[0, 2], heads=[[0, 2]] * 3, neurons=[range(5)] * 3, channels=range(20))
    small = s.sliced(model, keep)
    expected = flops.flops_per_token(small.config, length)
    assert s.flops_per_token(model, keep, length) == expected


def test_keeping_everything_is_keeping_all():
    model = small_model()
    assert s.full(model, s.Keep()) == s.everything(model)
    assert s.parameters_of(model, s.Keep()) == model.n_parameters()


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        (s.Keep(blocks=[0, 3]), "blocks to keep must be different ones of 0 to 2"),
        (s.Keep(channels=[1, 1]), "channels to keep"),
        (s.Keep(neurons=[[1]]), "1 entries for 3 blocks"),
        (s.Keep(heads=[[0, 1, 2]] * 3), r"keeps \[2, 1\] query heads"),
        (s.Keep(heads=[[]] * 3), "keeps no head"),
    ],
)
def test_what_cannot_be_kept_is_said(keep, words):
    with pytest.raises(ValueError, match=words):
        s.sliced(small_model(), keep)


def test_models_of_transformers_need_equal_blocks(tmp_path):
    keep = s.Keep(neurons=[range(4), range(4), range(5)])
    with pytest.raises(ValueError, match="blocks of equal size"):
        s.sliced(theirs(small_model(), tmp_path), keep)


def test_gpt2_has_no_heads_to_take():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=10))
    with pytest.raises(ValueError, match="GPT-2 has no separate queries"):
        s.sizes(model)
