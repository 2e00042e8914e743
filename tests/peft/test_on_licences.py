import copy

import pytest
import torch
import transformers as hf
from test_on_glue import PEOPLE, Heard, sentences

from lablib.data.packages import DataError
from lablib.data.tasks import Document, Splits
from lablib.models.classifier import encoder
from lablib.peft import on_licences as ol
from lablib.peft.adapter import adapters, n_trainable
from lablib.peft.legal_adaptation import prefix_size

SIZES = ol.Sizes(reading=4, steps=3, batch=4, words=12, labels=4, held_out=6, judged=4)
TEXTS = [
    "Permission is hereby granted, free of charge, to any person obtaining a copy of it.",
    "Redistribution and use in source and binary forms, with or without modification.",
    "This program is distributed in the hope that it will be useful, without warranty.",
] * 3


def roberta(dim=32):
    """A small RoBERTa with its head, and a tokenizer that knows a mask."""
    torch.manual_seed(0)
    sizes = {"hidden_size": dim, "num_attention_heads": 4, "intermediate_size": 64}
    sizes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = hf.RobertaConfig(**sizes, vocab_size=30522, num_hidden_layers=2)
    return hf.RobertaForMaskedLM(config).eval(), encoder("minilm-l6-v2")[1]


def splits():
    return Splits(sentences(PEOPLE[:4]), [], sentences(PEOPLE[4:]))


def test_rows_are_whole_pieces_between_the_marks_of_their_ends():
    _, tokenizer = roberta()
    rows = ol.rows_of(tokenizer, TEXTS[:2], 8)
    assert rows.shape[1] == 8 and len(rows) > 2
    assert (rows[:, 0] == tokenizer.cls_token_id).all()
    assert (rows[:, -1] == tokenizer.sep_token_id).all()
    inner = rows[:, 1:-1]
    assert not torch.isin(inner, torch.tensor(tokenizer.all_special_ids)).any()
    assert tokenizer.decode(inner[0]) == "permission is hereby granted,"


def test_a_prefix_reads_and_all_weights_of_a_copy_do():
    model, tokenizer = roberta()
    before = {n: p.clone() for n, p in model.named_parameters()}
    readers = ol.read(model, tokenizer, TEXTS, TEXTS[:2], SIZES._replace(reading=40))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert not adapters(model) and readers.model is model
    assert readers.prefix.shape == (2, 2, ol.LENGTH, 32)
    assert readers.prefix.numel() == prefix_size(ol.LENGTH, 32, 2)
    told = readers.losses
    assert told["a prefix has read"] < told["untouched"]
    assert told["all weights have read"] < told["untouched"]
    moved = [n for n, p in readers.whole.named_parameters() if not torch.equal(p, before[n])]
    assert any("word_embeddings" in n for n in moved) and any("layer.1." in n for n in moved)
    again = ol.read(model, tokenizer, TEXTS, TEXTS[:2], SIZES._replace(reading=40))
    assert again.losses == told


def readers():
    model, tokenizer = roberta()
    return ol.read(model, tokenizer, TEXTS, TEXTS[:2], SIZES), tokenizer


def test_ways_start_as_they_say():
    made, _ = readers()
    plain = sum(p.numel() for p in made.model.parameters())
    starts = {way: ol.built(made, way, 2, 1) for way in ("prefix", "read, then prefix")}
    starts |= {way: ol.built(made, way, 2, 1) for way in ("full", "read, then full")}
    for way, classifier in starts.items():
        assert torch.equal(classifier.head.weight, starts["full"].head.weight)
        own = n_trainable(classifier.model)
        assert own == (made.prefix.numel() if way.endswith("prefix") else 0)
        assert sum(p.numel() for p in classifier.model.parameters()) == plain + own
    name = "roberta.encoder.layer.1.output.dense.weight"
    weights = {way: dict(c.model.named_parameters()) for way, c in starts.items()}
    assert torch.equal(weights["full"][name], dict(made.model.named_parameters())[name])
    assert torch.equal(weights["read, then full"][name], dict(made.whole.named_parameters())[name])
    prefixes = [ol.prefix_of(starts[way].model) for way in ("prefix", "read, then prefix")]
    assert torch.equal(prefixes[1], made.prefix) and not torch.equal(*prefixes)


def test_each_way_learns_a_made_up_task_and_readers_stay():
    made, tokenizer = readers()
    before = copy.deepcopy(made.whole.state_dict()), made.prefix.clone()
    points = ol.points_of(made, tokenizer, splits(), SIZES)
    assert list(points) == ["prefix", "read, then prefix", "full", "read, then full"]
    assert all(0 <= value <= 100 for value in points.values())
    assert ol.points_of(made, tokenizer, splits(), SIZES) == points
    assert torch.equal(made.prefix, before[1])
    assert all(torch.equal(p, before[0][n]) for n, p in made.whole.state_dict().items())


def test_with_more_steps_each_way_learns_the_texts_that_it_is_given(monkeypatch):
    made, tokenizer = readers()
    monkeypatch.setattr(ol, "RATES", {"prefix": 3e-2, "all": 3e-3})
    seen = splits().train
    sizes = SIZES._replace(steps=60, labels=12, judged=12)
    points = ol.points_of(made, tokenizer, Splits(seen, [], seen), sizes)
    assert all(value > 90 for value in points.values())


def test_a_line_a_task_where_there_is_a_gpu_and_a_reason_where_there_is_none(monkeypatch):
    ol.say_reading(cpu := Heard("cpu"), ["a"], lambda task: splits())
    assert cpu.said == ["That takes a GPU, so RoBERTa read nothing here."]

    monkeypatch.setattr(ol, "filler", roberta)
    documents = [Document(str(i), text) for i, text in enumerate(TEXTS)]
    monkeypatch.setattr(ol, "licence_texts", lambda: (documents, documents[:2]))
    for name in ("read", "points_of"):
        whole = getattr(ol, name)
        small = lambda *given, whole=whole, **more: whole(*given, SIZES, **more)  # noqa: E731
        monkeypatch.setattr(ol, name, small)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ol.say_reading(lab := Heard("gpu"), ["first", "second"], lambda task: splits())
    reading, *lines = lab.said
    assert reading.startswith("Nats a masked token of licences that were held out: untouched 10.")
    assert [line.split(":")[0] for line in lines] == ["first, % right", "second, % right"]
    assert all("read, then full" in line for line in lines)

    def away():
        raise DataError("no hub")

    monkeypatch.setattr(ol, "filler", away)
    ol.say_reading(again := Heard("gpu"), ["first"], lambda task: splits())
    assert again.said == ["no hub"]


def test_without_the_hub_there_is_a_reason(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match="Hugging Face hub"):
        ol.filler("FacebookAI/none-such")


def test_the_head_that_fills_gaps_is_loaded(monkeypatch, tmp_path):
    model, tokenizer = roberta()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr("lablib.models.weights.pretrained_path", lambda name: tmp_path)
    loaded, cutter = ol.filler("any")
    tokens = torch.arange(5, 15)[None]
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert cutter.mask_token_id == tokenizer.mask_token_id and not loaded.training
