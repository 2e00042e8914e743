import torch
import transformers as hf

from lablib.data.tasks import Example, Splits
from lablib.peft.lora import lora_
from lablib.peft.on_glue import points_on

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
        "LoRA": (lambda model: lora_(model, ["query", "value"], 4), 1e-2),
        "all blocks": (None, 1e-3),
        "nothing": (lambda model: None, 0.0),
    }
    points = points_on(splits, ways, "minilm-l6-v2", steps=15, batch=8, length=12)
    assert points["LoRA"] > 90 and points["all blocks"] > 90
    assert points["nothing"] < 80
    again = points_on(splits, {"LoRA": ways["LoRA"]}, "minilm-l6-v2", 15, 8, 12)
    assert again["LoRA"] == points["LoRA"]  # others leave the encoder alone


def test_pairs_with_values_are_a_regression():
    words = ("cat", "dog", "car", "moon", "bread", "song")
    pairs = [Example(f"a {a}", 5.0 if a == b else 1.0, f"a {b}") for a in words for b in words]
    ways = {"LoRA": (lambda model: lora_(model, ["query", "value"], 4), 1e-2)}
    points = points_on(Splits(pairs, [], pairs), ways, "minilm-l6-v2", steps=30, length=12)
    assert points["LoRA"] > 50


def test_robertas_pairs_are_tuned_too(monkeypatch):
    from lablib.models.classifier import encoder
    from lablib.peft import on_glue

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    config = hf.RobertaConfig(**sizes, vocab_size=30522, num_hidden_layers=2)
    made = hf.RobertaModel(config).eval(), encoder("minilm-l6-v2")[1]
    monkeypatch.setattr(on_glue, "encoder", lambda name: made)
    texts = [Example(f"a {i}", i % 3, f"b {i}") for i in range(12)]  # three labels, as MNLI has
    ways = {"LoRA": (lambda m: lora_(m, ["query"], 2), 1e-3), "all blocks": (None, 1e-3)}
    points = points_on(Splits(texts, [], texts), ways, steps=2, length=12)
    assert all(0 <= value <= 100 for value in points.values()) and set(points) == set(ways)
