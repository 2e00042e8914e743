import pytest
import torch
import transformers as hf

from lablib.models.classifier import Classifier, Encoded, cached_below, predicted
from lablib.models.scores import scored
from lablib.peft.adapter import trainable
from lablib.peft.lora import lora_
from lablib.peft.tuning import backbone_above, task_loss, tune

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def task():
    """A text is of the second class when token 9 is in it."""
    torch.manual_seed(0)
    tokens = torch.randint(10, 60, (64, 6))
    labels = torch.arange(64) % 2
    tokens[labels == 1, 3] = 9
    return Encoded(tokens, torch.ones(64, 6, dtype=torch.bool)), labels


def build(below=0, n_labels=2):
    torch.manual_seed(1)
    return Classifier(hf.BertModel(hf.BertConfig(**SIZES)).eval(), n_labels, below=below)


def test_adapters_and_head_learn_and_the_rest_stays():
    classifier, (encoded, labels) = build(), task()
    before = {n: p.clone() for n, p in classifier.named_parameters()}
    lora_(classifier.model, ["query", "value", "up", "down"], rank=4)
    losses = tune(classifier, encoded, labels, 60, 1e-2)
    assert scored(predicted(classifier, encoded), labels)["accuracy"] > 0.9
    assert losses[-1] < losses[0] / 2 and len(losses) == 60
    names = {n.replace(".base.", "."): p for n, p in classifier.named_parameters()}
    moved = {n for n, p in before.items() if not torch.equal(p, names[n])}
    assert moved == {"head.weight", "head.bias"}


def test_a_seed_repeats_and_another_does_not():
    def run(seed):
        classifier, (encoded, labels) = build(), task()
        return tune(classifier, encoded, labels, 5, 1e-3, seed=seed, trainable=["head.weight"])

    assert run(0) == run(0) != run(1)


def test_full_tuning_above_trains_those_blocks_and_the_head():
    classifier, (encoded, labels) = build(below=2), task()
    cached = cached_below(classifier.model, encoded, 2)
    names = backbone_above(classifier, 2)
    assert all(n.startswith(("model.encoder.layer.2.", "head.")) for n in names)
    losses = tune(classifier, cached, labels, 40, 1e-3, trainable=names)
    assert losses[-1] < losses[0] and not trainable(classifier)


def test_a_regression_is_squared_error():
    logits, truth = torch.tensor([[1.0], [3.0]]), torch.tensor([0.0, 1.0])
    assert task_loss(logits, truth).item() == pytest.approx(2.5)
    classifier, (encoded, labels) = build(n_labels=1), task()
    losses = tune(classifier, encoded, labels.float(), 20, 1e-2, trainable=["head.weight"])
    assert losses[-1] < losses[0]
