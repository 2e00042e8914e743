from dataclasses import replace

import pytest
import torch
import transformers as hf
from test_on_glue import Heard

from lablib.data.packages import DataError
from lablib.models import pretrained
from lablib.models.classifier import Classifier, Encoded, encode
from lablib.peft import blob
from lablib.peft import on_questions as oq
from lablib.peft.adapter import adapters, trainable
from lablib.peft.lora import LoRALinear

SIZES = oq.Sizes(learned=8, asked=6, tokens=64, batch=8, cycles=1, draws=3)
THINGS = ("a cat", "rain", "iron", "a song", "bread", "the moon", "a shoe", "salt")


def row(place, named=oq.LETTERS):
    """As OpenBookQA has them."""
    texts = [THINGS[(place + step) % 8] for step in range(4)]
    choices = {"text": texts, "label": list(named)}
    stem = f"What lies in box {place}?"
    return {"question_stem": stem, "choices": choices, "answerKey": named[place * 3 % 4]}


def some(*places):
    return [oq.question(row(place)) for place in places]


def llama():
    """A small Llama of transformers, and a tokenizer with a token for each letter."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = hf.LlamaConfig(vocab_size=4096, **sizes, **heads)
    return hf.LlamaForCausalLM(config).eval(), pretrained("tiny-1m")[1]


def test_a_question_ends_where_a_letter_comes_next():
    example = oq.question(row(2))
    assert example.text == (
        "Question: What lies in box 2?\nA. iron\nB. a song\nC. bread\nD. the moon\nAnswer:"
    )
    assert example.label == 2
    assert oq.question(row(2, "1234")) == example  # the letters are ours
    with pytest.raises(ValueError, match="zip"):
        oq.question(row(2) | {"choices": {"text": ["iron"], "label": ["A"]}})


def test_a_question_that_would_be_cut_is_left_out():
    _, tokenizer = llama()
    short, other = some(1, 2)
    long = replace(other, text="Once more: " * 100 + other.text)
    assert oq.fitting(tokenizer, [short, long], SIZES.tokens) == [short]


def test_letters_are_single_tokens():
    _, tokenizer = llama()
    ids = oq.letters_of(tokenizer)
    assert [tokenizer.decode([each]) for each in ids] == [" A", " B", " C", " D"]

    class Cutter:
        def __call__(self, text, add_special_tokens):
            return {"input_ids": [1, 2]}

    with pytest.raises(ValueError, match="Cutter cuts a letter"):
        oq.letters_of(Cutter())


def test_the_reader_scores_the_letters_as_the_head_does():
    model, tokenizer = llama()
    encoded = encode(tokenizer, [e.text for e in some(1, 2, 3)])
    words = oq.letters_of(tokenizer)
    ours = oq.Reader(model, 4, "words", words=words)(encoded)
    theirs = Classifier(model, 4, "words", words=words)(encoded)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    half = oq.Reader(model.bfloat16(), 4, "words", words=words)(encoded)
    assert half.dtype == torch.float32 and not torch.equal(half, half.bfloat16().float())
    torch.testing.assert_close(half, theirs, atol=1e-2, rtol=0.1)


def test_both_ways_start_as_the_model_that_they_find():
    model, tokenizer = llama()
    encoded, words = encode(tokenizer, [e.text for e in some(1, 2, 3)]), oq.letters_of(tokenizer)
    before = oq.Reader(model, 4, "words", words=words)(encoded)
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    for way, kind in (("BLoB", blob.BayesianLoRA), ("LoRA", LoRALinear)):
        reader = oq.built(model, way, words, 1).eval()
        parts = adapters(model)
        assert len(parts) == 4 and {type(part) for part in parts.values()} == {kind}
        assert all(name.endswith(("q_proj", "v_proj")) for name in parts)
        assert torch.equal(reader(encoded), before)
        plain = {n.replace(".base.", "."): p for n, p in model.named_parameters()}
        assert all(torch.equal(plain[n], p) for n, p in base.items())
    first = {n: p.clone() for n, p in trainable(model).items()}
    oq.built(model, "LoRA", words, 1)
    assert all(torch.equal(p, first[n]) for n, p in trainable(model).items())


def test_both_ways_learn_see_the_same_questions_and_leave_no_trace(monkeypatch):
    model, tokenizer = llama()
    monkeypatch.setattr(oq, "RATE", 0.03)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    seen, at = [], Encoded.at
    recorder = lambda self, places: (seen.append(places), at(self, places))[1]  # noqa: E731
    monkeypatch.setattr(Encoded, "at", recorder)
    learned = some(*range(8))
    told = oq.answered(model, tokenizer, learned, learned, SIZES)
    assert list(told) == ["untrained", "LoRA", "BLoB, its mean", "BLoB, 3 draws"]
    nll = {way: scores[-1] for way, scores in told.items()}
    assert all(nll[way] < 0.9 * nll["untrained"] for way in told if way != "untrained")
    assert all(told[way][0] > 0.8 for way in told if way != "untrained")
    assert nll["BLoB, its mean"] != nll["BLoB, 3 draws"]
    steps = blob.cycle_length(8, SIZES.batch)
    batches = [places for places in seen if torch.is_tensor(places)]
    assert len(batches) == 2 * steps and all(len(places) == 8 for places in batches)
    assert all(map(torch.equal, batches[:steps], batches[steps:]))
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and not adapters(model)
    assert all(torch.equal(p, after[n]) for n, p in before.items())


def test_the_same_seed_tells_the_same_in_bfloat16_too():
    model, tokenizer = llama()
    model.bfloat16()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    few, sizes = (some(1, 2), some(3, 4)), SIZES._replace(batch=16)
    told = [oq.answered(model, tokenizer, *few, sizes) for _ in range(2)]
    assert told[0] == told[1] and told[0]["LoRA"] != told[0]["untrained"]
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_a_line_a_way_where_there_is_a_gpu_and_a_reason_where_there_is_none(monkeypatch, tmp_path):
    oq.say_answers(cpu := Heard("cpu"))
    assert cpu.said == ["That takes a GPU, so no question was asked here."]

    model, tokenizer = llama()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr("lablib.models.weights.pretrained_path", lambda name: tmp_path)
    given = []

    def hub_rows(name, repository, config, split, count):
        given.append((repository, config, split))
        return [row(place) for place in range(count)]

    monkeypatch.setattr(oq, "hub_rows", hub_rows)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    oq.say_answers(lab := Heard("gpu"), SIZES)
    head, *lines = lab.said
    assert given == [("allenai/openbookqa", "main", split) for split in ("train", "test")]
    assert head == f"{oq.NAME}: 8 questions to learn from, 6 others asked."
    ways = ["untrained", "LoRA", "BLoB, its mean", "BLoB, 3 draws"]
    assert [line.partition(":")[0] for line in lines] == ways
    assert all("% right, ECE " in line and line.endswith(" nats.") for line in lines)

    def away(*_):
        raise DataError("no hub")

    monkeypatch.setattr(oq, "hub_rows", away)
    oq.say_answers(again := Heard("gpu"), SIZES)
    assert again.said == ["no hub"]


def test_without_the_hub_there_is_a_reason(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    oq.say_answers(lab := Heard("gpu"))
    assert len(lab.said) == 1 and "Hugging Face hub" in lab.said[0]
