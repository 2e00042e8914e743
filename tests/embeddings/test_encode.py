"""Vectors of texts from any model: layers, pools, prompts, both ways of looking."""

import copy
from dataclasses import replace

import pytest
import torch
import transformers as hf
from models_for_tests import models, sizes
from torch.nn import functional as F

from lablib.embeddings.encode import (
    POOLINGS,
    Encoder,
    Prompt,
    batches,
    bidirectional,
    hidden_layers,
    pad,
    pool,
    states,
    tokenize,
    weights,
)
from lablib.models import GPT, GPTConfig, anatomy
from lablib.models.classifier import encoder
from lablib.models.weights import pretrained

MODELS = models(3)
MODELS["llama-eager"] = lambda: hf.LlamaForCausalLM(
    hf.LlamaConfig(**sizes(3), num_key_value_heads=2, attn_implementation="eager")
)
ROWS = [[5, 6, 7, 8, 9, 10], [11, 12], [13, 14, 15, 16]]
ENCODED = pad(ROWS)


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    return MODELS[request.param]().eval()


@pytest.fixture(scope="module")
def tiny():
    return Encoder(*pretrained("tiny-1m"))


def test_weights_by_hand():
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    by_hand = {
        "mean": [[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]],
        "mean-but-first": [[0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]],
        "weighted-mean": [[1, 2, 3, 0], [1, 0, 0, 0], [0, 0, 0, 0]],
        "last": [[0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]],
        "first": [[1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]],
    }
    assert by_hand.keys() == set(POOLINGS)
    for pooling, wanted in by_hand.items():
        assert weights(mask, pooling).tolist() == wanted, pooling
    with pytest.raises(ValueError, match="'cls' is no pooling: mean"):
        weights(mask, "cls")


@pytest.mark.parametrize("pooling", POOLINGS)
def test_padding_counts_for_nothing(pooling):
    found = torch.randn(2, 3, 6, 8)  # two layers at once
    pooled = pool(found, ENCODED.mask, pooling)
    noisy = torch.where(ENCODED.mask[..., None], found, 1e6)
    torch.testing.assert_close(pool(noisy, ENCODED.mask, pooling), pooled)
    assert pooled.shape == (2, 3, 8)
    for row, ids in enumerate(ROWS):
        alone = pool(found[:, row : row + 1, : len(ids)], torch.ones(1, len(ids)).bool(), pooling)
        torch.testing.assert_close(alone[:, 0], pooled[:, row])
    assert pool(found[0, :1], torch.zeros(1, 6).bool(), pooling).eq(0).all()


def test_layers_are_those_of_transformers(model):
    found = hidden_layers(model, ENCODED)
    assert len(found) == len(anatomy.blocks(model)) + 2
    if not isinstance(model, GPT):
        given = {"attention_mask": ENCODED.mask.long(), "output_hidden_states": True}
        theirs = model.base_model(ENCODED.inputs, **given).hidden_states
        real = ENCODED.mask
        for ours, wanted in zip(found[:-2], theirs[:-1]):
            torch.testing.assert_close(ours[real], wanted[real])
        torch.testing.assert_close(found[-1][real], theirs[-1][real])
    else:
        torch.testing.assert_close(found[0], model.embedding(ENCODED.inputs))
        torch.testing.assert_close(model.norm(found[-2]), found[-1])


def test_one_layer_is_that_of_all_and_nothing_stays(model):
    before = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    every = hidden_layers(model, ENCODED)
    for causal in (True, False):
        every = hidden_layers(model, ENCODED, causal)
        for layer in range(len(every) - 1):
            assert torch.equal(states(model, ENCODED, layer, causal), every[layer])
        assert torch.equal(states(model, ENCODED, None, causal), every[-1])
    after = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    assert before == after
    for layer in (-1, 4):
        with pytest.raises(ValueError, match=f"layer {layer} is none of 0 .* to 3"):
            states(model, ENCODED, layer)


def test_blocks_above_the_layer_do_not_run(model):
    ran = []
    for place, block in enumerate(anatomy.blocks(model)):
        block.register_forward_hook(lambda *_, place=place: ran.append(place))
    states(model, ENCODED, 2)
    assert ran == [0, 1]


def test_both_ways_every_token_sees_every_other_and_no_padding(model):
    if anatomy.family(model).name == "BERT":
        pytest.skip("an encoder sees both ways anyway")
    changed = copy.copy(ROWS)
    changed[0] = [*ROWS[0][:-1], 20]  # the last token alone
    with torch.no_grad():
        one_way = states(model, ENCODED) - states(model, pad(changed))
        both = states(model, ENCODED, causal=False) - states(model, pad(changed), causal=False)
        assert one_way[0, :-1].abs().max() < 1e-6 < both[0].abs().amax(-1).min()
        assert both[1:].abs().max() < 1e-6
        for row, ids in enumerate(ROWS):
            alone = states(model, pad([ids]), causal=False)[0]
            torch.testing.assert_close(
                alone, states(model, ENCODED, causal=False)[row, : len(ids)], atol=1e-5, rtol=1e-5
            )


def test_both_ways_is_attention_without_a_mask():
    """By hand for one block of GPT: softmax(q k / sqrt d) v over all tokens."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(60, 32, 1, 4, 2, init_std=0.2)).eval()
    attention, seen = model.blocks[0].attention, {}
    attention.register_forward_hook(
        lambda m, args, out: seen.update(x=args[0], rotary=args[1], out=out)
    )
    states(model, pad([[3, 4, 5, 6]]), causal=False)
    q, k, v = attention.heads(seen["x"], seen["rotary"])
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    mixed = F.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, -1) @ v
    wanted = attention.output(mixed.transpose(1, 2).flatten(2))
    torch.testing.assert_close(seen["out"], wanted)


def test_a_decoder_is_the_old_one_after_looking_both_ways(model):
    before = anatomy.logits(model, ENCODED.inputs) if anatomy.family(model).head else None
    with pytest.raises(RuntimeError, match="halfway"), bidirectional(model, ENCODED.mask):
        raise RuntimeError("halfway")
    assert all("forward" not in vars(module) for module in model.modules())
    if before is not None:
        assert torch.equal(anatomy.logits(model, ENCODED.inputs), before)


def test_a_cache_is_refused_when_looking_both_ways():
    model = MODELS["gpt"]()
    with bidirectional(model), pytest.raises(ValueError, match="a cache holds only"):
        model(ENCODED.inputs, model.new_cache(8))


def test_gradients_reach_the_embeddings_both_ways(model):
    vectors = Encoder(model, None, causal=False).vectors(ENCODED)
    (vectors * torch.randn(32)).sum().backward()  # a norm's outputs sum to nothing
    assert anatomy.embedding(model).weight.grad[torch.tensor(ROWS[0])].abs().sum(1).min() > 0


def test_one_by_one_and_together_are_the_same(tiny):
    texts = ["In the beginning", "", "let there be light: and there was light " * 4, "God"]
    for encoder_ in (
        tiny,
        replace(tiny, causal=False, pooling="weighted-mean"),
        replace(tiny, prompt=Prompt('Verse: "', '" means'), pooling="last", layer=2),
        replace(tiny, normalize=False, pooling="mean-but-first"),
    ):
        filled = [text or "x" for text in texts] if not encoder_.prompt.before else texts
        together = encoder_(filled, batch_tokens=64)
        assert together.dtype == torch.float32 and not together.requires_grad
        for text, vector in zip(filled, together):
            torch.testing.assert_close(encoder_([text])[0], vector, atol=1e-5, rtol=1e-5)
        if encoder_.normalize:
            torch.testing.assert_close(together.norm(dim=1), torch.ones(len(texts)))


def test_a_long_text_loses_its_end_and_never_its_prompt(tiny):
    prompt = Prompt('This sentence : "', '" means in one word:')
    before = tiny.tokenizer(prompt.before)["input_ids"]
    text = "and the earth was without form, and void " * 20
    encoded = tokenize(tiny.tokenizer, [text, "short"], prompt, 40)
    ids = encoded.inputs[0].tolist()
    assert 36 <= int(encoded.mask[0].sum()) <= 40
    assert ids[: len(before) - 1] == before[:-1]
    assert tiny.tokenizer.decode(ids[: int(encoded.mask[0].sum())]).endswith("means in one word:")
    with pytest.raises(ValueError, match=f"the prompt has .* tokens, and max_length is {4}"):
        tokenize(tiny.tokenizer, [text], prompt, 4)
    with pytest.raises(ValueError, match="there is no text"):
        tiny([])


def test_minilm_gives_the_vectors_of_sentence_transformers():
    st = pytest.importorskip("sentence_transformers")
    from lablib.models.weights import pretrained_path

    theirs = st.SentenceTransformer(str(pretrained_path("minilm-l6-v2")), device="cpu")
    texts = ["Where is the bank?", "A river's bank.", "x", "long text " * 100, "Où est la gare ?"]
    ours = Encoder(*encoder("minilm-l6-v2"), max_length=theirs.max_seq_length)
    cut = [t for t in texts if len(t) < 500]  # they cut in the middle of a word, we at letters
    torch.testing.assert_close(
        ours(cut), torch.tensor(theirs.encode(cut, normalize_embeddings=True)), atol=1e-5, rtol=0
    )
    assert torch.cosine_similarity(
        ours(texts)[3], torch.tensor(theirs.encode(texts))[3], dim=0
    ) > 0.999  # fmt: skip


def test_modes_and_gradients_stay_as_they_were(tiny):
    tiny.model.train()
    tiny(["a", "b"])
    assert tiny.model.training
    tiny.model.eval()


@pytest.mark.parametrize("budget", [1, 7, 12, 1000])
def test_batches_hold_every_place_once_within_the_budget(budget):
    lengths = [3, 9, 1, 1, 5, 9, 2, 7, 0]
    made = batches(lengths, budget)
    assert sorted(place for group in made for place in group) == list(range(len(lengths)))
    for group in made:
        longest = max(lengths[place] for place in group)
        assert len(group) == 1 or len(group) * longest <= budget
