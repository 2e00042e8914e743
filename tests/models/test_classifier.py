import pytest
import torch
import transformers as hf

from lablib.data.tasks import Example
from lablib.models import GPT, GPTConfig, anatomy, weights
from lablib.models.classifier import (
    Classifier,
    Encoded,
    cached_below,
    encode,
    encode_examples,
    encoder,
    last_states,
    pooling,
    predicted,
    shortest_first,
    upper_states,
)

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
MODELS = {
    "gpt": lambda: GPT(GPTConfig(60, 32, 3, 4, 2)),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)),
    "bert": lambda: hf.BertModel(hf.BertConfig(**SIZES)),
    "roberta": lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**SIZES)),
}
TEXTS = [[5, 6, 7, 8, 9], [10, 11, 12], [20]]


def padded(padding=0):
    tokens = torch.full((3, 5), padding)
    mask = torch.zeros(3, 5, dtype=torch.bool)
    for row, ids in enumerate(TEXTS):
        tokens[row, : len(ids)], mask[row, : len(ids)] = torch.tensor(ids), True
    return Encoded(tokens, mask)


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    return MODELS[request.param]().eval()


@pytest.mark.parametrize("pool", ["mean", "last"])
def test_a_text_is_classified_as_it_is_alone(model, pool):
    torch.manual_seed(1)
    classifier = Classifier(model, 4, pool).eval()
    torch.nn.init.normal_(classifier.head.weight)
    together = classifier(padded())
    for row, ids in enumerate(TEXTS):
        alone = Encoded(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool))
        torch.testing.assert_close(classifier(alone)[0], together[row], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(predicted(classifier, padded(), batch=2), together)


def test_a_pool_is_a_mean_or_the_last_token(model):
    states = torch.arange(30.0).view(3, 5, 2)
    mask = padded().mask
    assert pooling(states, mask, "mean")[1].tolist() == [12.0, 13.0]
    assert pooling(states, mask, "last")[1].tolist() == [14.0, 15.0]


def test_states_from_a_cached_half_are_the_models(model):
    whole = last_states(model, padded())
    if isinstance(model, hf.LlamaForCausalLM):
        with pytest.raises(ValueError, match="only GPT's, BERT's"):
            cached_below(model, padded(), 2)
        return
    for below in range(4):
        cached = cached_below(model, padded(), below, batch=2)
        states = upper_states(model, cached, below)
        there = padded().mask
        torch.testing.assert_close(states[there], whole[there], atol=1e-5, rtol=1e-5)


def test_only_blocks_above_get_gradients(model):
    if isinstance(model, hf.LlamaForCausalLM):
        return
    classifier = Classifier(model, 2, below=2)
    classifier(cached_below(model, padded(), 2)).square().sum().backward()
    grads = [any(p.grad is not None for p in b.parameters()) for b in anatomy.blocks(model)]
    assert grads == [False, False, True]


def test_words_are_read_from_the_head():
    torch.manual_seed(0)
    model = MODELS["gpt"]()
    logits = Classifier(model, 3, "words", words=[7, 1, 7])(padded())
    expected = model(padded().inputs)[1, 2]
    torch.testing.assert_close(logits[1], expected[[7, 1, 7]])


def test_wrong_pools_are_said():
    model = MODELS["gpt"]()
    with pytest.raises(ValueError, match="'max' is no pool"):
        Classifier(model, 2, "max")
    with pytest.raises(ValueError, match="1 words for 2 labels"):
        Classifier(model, 2, "words", words=[1])


def test_a_batch_is_cut_to_its_longest():
    part = padded().at(torch.tensor([2, 1]))
    assert part.inputs.tolist() == [[20, 0, 0], [10, 11, 12]] and part.mask.sum() == 4


@pytest.mark.skipif(not weights.is_ready("minilm-l6-v2"), reason="MiniLM is not set up")
def test_examples_are_encoded_with_their_pairs_and_labels():
    tokenizer = encoder()[1]
    examples = [Example("a text of some words", 1, "and its pair"), Example("one", 0)]
    encoded, labels = encode_examples(tokenizer, examples, length=9)
    plain = encode(tokenizer, ["a text of some words", "one"], ["and its pair", ""], 9)
    assert all(torch.equal(a, b) for a, b in zip(encoded, plain))
    assert labels.tolist() == [1, 0] and encoded.mask.shape == (2, 9)
    assert shortest_first(examples) == examples[::-1]


@pytest.mark.skipif(not weights.is_ready("minilm-l6-v2"), reason="MiniLM is not set up")
def test_minilm_puts_like_beside_like():
    model, tokenizer = encoder()
    texts = ["A cat sleeps on the sofa.", "The kitten naps on a couch.", "Rates rose again."]
    encoded = encode(tokenizer, texts)
    vectors = pooling(last_states(model, encoded), encoded.mask, "mean")
    similar = torch.nn.functional.cosine_similarity(vectors[:1], vectors[1:])
    assert similar[0] > 0.5 > 0.2 > similar[1]
    both = encode(tokenizer, ["one"], ["two"]).inputs
    assert (both == tokenizer.sep_token_id).sum() == 2
