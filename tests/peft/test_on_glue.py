import torch
import transformers as hf

from lablib.data.packages import DataError
from lablib.data.tasks import Example, Splits
from lablib.models.classifier import encoder
from lablib.peft import finegates, lorma, on_glue, sensi_bert
from lablib.peft.lora import lora_
from lablib.peft.on_glue import Way, named, points_on
from lablib.studies import sensi_bert as study

KIND, HARSH = (
    ("a wonderful film", "I loved it", "great fun"),
    ("a dull film", "I hated it", "a bore"),
)
PEOPLE = ("She", "He", "Anna", "The critic", "My aunt", "A friend")


def sentences(people):
    texts = [(f"{who}: {said}", label) for who in people
             for label, kind in enumerate((HARSH, KIND)) for said in kind]  # fmt: skip
    return [Example(text, label) for text, label in texts]


def test_ways_learn_a_made_up_task_and_a_way_that_learns_nothing_does_not():
    splits = Splits(sentences(PEOPLE[:4]), [], sentences(PEOPLE[4:]))
    ways = {
        "LoRA": Way(lambda model: lora_(model, ["query", "value"], 4), 1e-2),
        "all blocks": Way(None, 1e-3),
        "nothing": Way(lambda model: None, 0.0),
    }
    points = points_on(splits, ways, "minilm-l6-v2", steps=15, batch=8, length=12)
    assert points["LoRA"] > 90 and points["all blocks"] > 90
    assert points["nothing"] < 80
    again = points_on(splits, {"LoRA": ways["LoRA"]}, "minilm-l6-v2", 15, 8, 12)
    assert again["LoRA"] == points["LoRA"]  # others leave the encoder alone


def test_pairs_with_values_are_a_regression():
    words = ("cat", "dog", "car", "moon", "bread", "song")
    pairs = [Example(f"a {a}", 5.0 if a == b else 1.0, f"a {b}") for a in words for b in words]
    ways = {"LoRA": Way(lambda model: lora_(model, ["query", "value"], 4), 1e-2)}
    points = points_on(Splits(pairs, [], pairs), ways, "minilm-l6-v2", steps=30, length=12)
    assert points["LoRA"] > 50


def roberta(monkeypatch):
    """A small RoBERTa in the place of the one that is fetched."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    config = hf.RobertaConfig(**sizes, vocab_size=30522, num_hidden_layers=2)
    made = hf.RobertaModel(config).eval(), encoder("minilm-l6-v2")[1]
    monkeypatch.setattr(on_glue, "encoder", lambda name: made)


def test_robertas_pairs_are_tuned_too(monkeypatch):
    roberta(monkeypatch)
    texts = [Example(f"a {i}", i % 3, f"b {i}") for i in range(12)]  # three labels, as MNLI has
    ways = {"LoRA": Way(lambda m: lora_(m, ["query"], 2), 1e-3), "all blocks": Way(None, 1e-3)}
    points = points_on(Splits(texts, [], texts), ways, steps=2, length=12)
    assert all(0 <= value <= 100 for value in points.values()) and set(points) == set(ways)


class Heard:
    """What a lab of a tier says."""

    def __init__(self, tier):
        self.tier, self.said = tier, []

    def say(self, text):
        self.said.append(text)


def test_a_line_a_task_where_there_is_a_gpu_and_a_reason_where_there_is_none(monkeypatch):
    kinds = {"sst2": 1, "mrpc": 0, "stsb": 4.0, "mnli": 2}
    made = {
        k: [Example(f"a {i}", i % 2 * top, f"b {i}") for i in range(6)] for k, top in kinds.items()
    }
    monkeypatch.setattr(
        on_glue, "load_glue", lambda name, train: Splits(made[name], [], made[name])
    )
    seen = []
    monkeypatch.setattr(
        on_glue, "points_on", lambda splits, ways, **_: (seen.append(splits), {"x": 7.0})[1]
    )
    lab = Heard("gpu")
    on_glue.say_points(lab, {})
    assert lab.said == [f"{task}: x 7.0" for task in kinds] and [s.train for s in seen] == [
        *made.values()
    ]
    monkeypatch.setattr(on_glue, "points_on", lambda splits, ways, seed, **_: {"x": 7.0 + seed})
    on_glue.say_points(five := Heard("gpu"), {}, seeds=3)
    assert five.said == [f"{task}: x 8.0 (7.0 8.0 9.0)" for task in kinds]
    on_glue.say_points(cpu := Heard("cpu"), {})
    assert cpu.said == ["That takes a GPU, so nothing was tuned here."]

    def away(name, train):
        raise DataError("no hub")

    monkeypatch.setattr(on_glue, "load_glue", away)
    on_glue.say_points(again := Heard("gpu"), {})
    assert again.said == ["no hub"]


def test_what_the_labs_put_into_roberta(monkeypatch):
    roberta(monkeypatch)
    sizes = {}

    def cut(classifier, known, labels):
        keep = study.trimming(classifier, known, labels, "rank", 0.6, "parameters").keep
        sensi_bert.trim_(classifier.model, keep)
        sizes["cut"] = sum(p.numel() for p in classifier.model.encoder.parameters())

    def closed(model):
        sizes["closed"] = finegates.removed(model)
        finegates.compress_(model)

    penalties = []

    def penalty(model):
        penalties.append(finegates.penalty(model, 0.5))
        return penalties[-1]

    ways = named("MAM", "parallel adapter", "LoRA", "prefix", "(IA)3", "serial adapter", "norms")
    ways["rotated"] = Way(lambda model: lorma.lorma_(model, ["query", "value"], 8), 5e-4)
    ways["gates"] = Way(finegates.gate_, 0.5, penalty, last=closed)
    ways["cut"] = Way(None, 1e-3, first=cut)
    texts = [Example(f"a {i}", i % 2, f"b {i}") for i in range(12)]
    points = points_on(Splits(texts, [], texts), ways, steps=4, batch=4, length=12)
    assert set(points) == {*ways} and "all blocks" in ways
    assert sizes["closed"] > 0 and len(penalties) == 4  # a step each
    assert sizes["cut"] < 0.65 * 2 * (4 * 32 * 33 + 2 * 32 * 64 + 64 + 5 * 32)
