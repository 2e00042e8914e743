import math
from collections import Counter

import pytest
import torch
import transformers as hf
from test_on_glue import Heard

from lablib.compression.calibration import token_losses
from lablib.data.tasks import Document
from lablib.models import GPT, pretrained
from lablib.models.hub import from_hf
from lablib.peft import on_spanish as osp
from lablib.peft import rigochat
from lablib.peft.adapter import adapters, trainable
from lablib.peft.qlora import NF4Linear, QLoRALinear
from lablib.studies import rigochat as study

SIZES = osp.Sizes(pairs=12, judged=6, batch=4, rank=2, rows=3, tokens=8)
WORDS = {
    "Save": ("Guardar", "Salvar"),
    "Yes": ("Sí", "Sim"),
    "The page": ("La página", "A página"),
    "Open it": ("Ábrelo", "Abra-o"),
    "A number": ("Un número", "Um número"),
    "Delete": ("Eliminar", "Excluir"),
}
PAIRS = [
    rigochat.Preference(rigochat.prompt_of(english), spanish, other, "pt")
    for english, (spanish, other) in WORDS.items()
]
TEXTS = ["In the beginning was the word, and the word was read by a very small model."] * 3


def qwen():
    """A small Qwen2 of transformers."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = hf.Qwen2Config(vocab_size=4096, **sizes, **heads, tie_word_embeddings=True)
    return hf.Qwen2ForCausalLM(config).eval()


def cutter():
    return pretrained("tiny-1m")[1]


def small(half=False):
    """The same as a `GPT` in 4 bits with adapters, and a tokenizer."""
    model = from_hf(qwen(), torch.bfloat16 if half else torch.float32).eval()
    osp.in_four_bits_(model, SIZES.rank)
    return model, cutter()


def kept(model):
    """All that must stay: codes, scales, biases, norms and the embedding."""
    own = set(trainable(model))
    return {n: t.clone() for n, t in model.state_dict().items() if n not in own}


def others(tokenizer):
    return {"a book": osp.pieces(tokenizer, TEXTS, SIZES)}


@pytest.mark.parametrize("half", [False, True])
def test_the_base_is_in_4_bits_and_adapters_alone_train_in_float32(half):
    model, _ = small(half)
    assert isinstance(model, GPT)
    parts = adapters(model)
    assert len(parts) == 2 * 7
    assert all(type(p) is QLoRALinear and type(p.base) is NF4Linear for p in parts.values())
    assert all(p.factor == 1 for p in parts.values())
    own = trainable(model)
    assert all(p.dtype == torch.float32 for p in own.values())
    asking = {n for n, p in model.named_parameters() if p.requires_grad}
    assert asking == set(own) and len(own) == 2 * len(parts)
    again, _ = small(half)
    assert all(torch.equal(p, trainable(again)[n]) for n, p in own.items())


@pytest.mark.parametrize("half", [False, True])
def test_spanish_gains_on_the_other_language_and_the_base_stays(monkeypatch, half):
    model, tokenizer = small(half)
    monkeypatch.setattr(osp, "RATE", 3e-2)
    base, start = kept(model), {n: p.detach().clone() for n, p in trainable(model).items()}
    train, sizes = PAIRS * 8, SIZES._replace(batch=6)
    before, after = osp.preferring(model, tokenizer, train, PAIRS, others(tokenizer), sizes)
    assert after.accuracy > before.accuracy and before.byte_loss > 0
    assert before.others.keys() == after.others.keys() == {"a book"}
    assert after.byte_loss != before.byte_loss and after.others != before.others
    now = model.state_dict()
    assert all(torch.equal(t, now[n]) for n, t in base.items())
    assert any(n.endswith("packed") for n in base) and "embedding.weight" in base
    assert all(not torch.equal(p, start[n]) for n, p in trainable(model).items())
    rows = rigochat.encode(tokenizer, PAIRS)
    with osp.in_precision_of_base(model):
        policy, reference = rigochat.score(model, rows), rigochat.reference_scores(model, rows)
    assert before.accuracy == study.accuracy(reference)
    assert rigochat.dpo_loss(*policy.T, *reference.T) < 0.95 * math.log(2)


def test_what_is_seen_is_what_the_study_sees():
    model, tokenizer = small()
    rows = others(tokenizer)["a book"]
    seen, _ = osp.preferring(model, tokenizer, PAIRS[:2], PAIRS, {"a book": rows}, SIZES)
    told, _ = study.looked(model, rigochat.encode(tokenizer, PAIRS), PAIRS, rows)
    assert seen.accuracy == pytest.approx(told["accuracy"])
    assert seen.byte_loss == pytest.approx(told["byte_loss"])
    assert seen.others["a book"] == pytest.approx(told["other"])
    assert seen.others["a book"] == pytest.approx(token_losses(model, rows).mean().item())


def test_the_reference_is_asked_once_and_each_pair_is_read_once(monkeypatch):
    model, tokenizer = small()
    asked, read, given = [], Counter(), rigochat.preference_loss
    whole = rigochat.reference_scores

    def reference_scores(model, rows, *more):
        asked.append(whole(model, rows, *more))
        return asked[-1]

    def preference_loss(rows, reference):
        assert reference is asked[0]
        exact = given(rows, reference)

        def loss(model, places):
            read.update(places.tolist())
            return exact(model, places)

        return loss

    monkeypatch.setattr(rigochat, "reference_scores", reference_scores)
    monkeypatch.setattr(rigochat, "preference_loss", preference_loss)
    train = PAIRS * 2
    start = rigochat.score(model, rigochat.encode(tokenizer, train))  # adapters are fresh
    osp.preferring(model, tokenizer, train, PAIRS, {}, SIZES)
    assert len(asked) == 1 and torch.equal(asked[0], start)
    assert read == Counter(range(12))


def test_pieces_are_whole_and_from_all_texts():
    tokenizer = cutter()
    rows = osp.pieces(tokenizer, ["one " * 40, "two " * 40, "six " * 40], SIZES)
    assert rows.shape == (3, 9)
    said = [tokenizer.decode(row) for row in rows]
    assert [next(w for w in ("one", "two", "six") if w in s) for s in said] == ["one", "two", "six"]


def test_lines_where_there_is_a_gpu_and_a_reason_where_there_is_none(monkeypatch, tmp_path):
    osp.say_spanish(cpu := Heard("cpu"), None)
    assert cpu.said == ["That takes a GPU, so Qwen learned nothing here."]

    qwen().save_pretrained(tmp_path)
    cutter().save_pretrained(tmp_path)
    monkeypatch.setattr("lablib.models.weights.pretrained_path", lambda name: tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    texts = {name: [Document(name, TEXTS[0])] for name in osp.OTHERS.values()}
    monkeypatch.setattr(osp, "corpora", lambda: ({}, texts))
    asked = []

    def pairs_of(seed, pairs, curated, judged):
        asked.append((seed, pairs, curated, judged))
        return PAIRS * 2, PAIRS

    osp.say_spanish(lab := Heard("gpu"), pairs_of, SIZES)
    assert asked == [(0, 12, False, 6)]
    first, second = lab.said
    assert first.startswith(f"{osp.NAME} in 4 bits, 12 pairs: Spanish wins in ")
    assert "% of 6 other pairs before and in" in first
    assert second.startswith("Nats a token of other text, before and after: Shakespeare ")
    assert second.count(";") == 3


def test_the_studys_pairs_fit():
    train, test = study.drawn_pairs(0, osp.SIZES.pairs, False, osp.SIZES.judged)
    assert len(train) == osp.SIZES.pairs and len(test) == osp.SIZES.judged
    assert not {p.prompt for p in train} & {p.prompt for p in test}


def test_without_the_hub_there_is_a_reason(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    osp.say_spanish(lab := Heard("gpu"), study.drawn_pairs)
    assert len(lab.said) == 1 and "Hugging Face hub" in lab.said[0]
