"""SmolLM2 of 1.7 billion weights answers multiple-choice questions: lab 704's gpu tier.

LoRA and BLoB on queries and values learn from the same questions, and are asked others: how many
answers are right, and how far their probabilities can be believed. An answer is one of four words,
the letters " A" to " D", as the language model's own head scores them. The questions are
OpenBookQA's (Mihaylov et al., 2018), one of the paper's six sets. Rank, alpha and rates are those
of the authors' scripts for a decoder of 7 billion weights, and the sizes are ours; nothing is tuned
here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lablib.data.hub import hub_rows
from lablib.data.tasks import Example
from lablib.models import anatomy, pretrained, scores
from lablib.models.classifier import Classifier, Encoded, encode_examples, pooling, shortest_first
from lablib.peft import blob
from lablib.peft.adapter import remove_
from lablib.peft.lora import lora_
from lablib.peft.mixed import adapters_to_float32_, in_precision_of_base
from lablib.peft.on_gpu import Speaker, on_gpu
from lablib.peft.tuning import tune

NAME = "HuggingFaceTB/SmolLM2-1.7B-Instruct"
LETTERS = ("A", "B", "C", "D")
ROLES, RANK, ALPHA = ("query", "value"), 8, 16
RATE, KL_RATE = 1e-4, 0.01  # of all that trains, and of BLoB's divergence


class Sizes(NamedTuple):
    """Questions to learn from and to be asked, of so many tokens at most; questions a step.

    cycles: of the divergence's weights, which give the steps of both ways. draws: of BLoB.
    """

    learned: int = 500
    asked: int = 500
    tokens: int = 256
    batch: int = 8
    cycles: int = 2
    draws: int = 10


SIZES = Sizes()


@on_gpu("That takes a GPU, so no question was asked here.")
def say_answers(lab: Speaker, device: str, sizes: Sizes = SIZES) -> None:
    """A line a way, with its scores."""
    model, tokenizer = pretrained(NAME, torch.bfloat16 if device == "cuda" else torch.float32)
    learned, asked = questions("train", sizes.learned), questions("test", sizes.asked)
    learned, asked = (fitting(tokenizer, part, sizes.tokens) for part in (learned, asked))
    told = answered(model.to(device), tokenizer, learned, asked, sizes, device=device)
    lab.say(f"{NAME}: {len(learned)} questions to learn from, {len(asked)} others asked.")
    for way, (accuracy, ece, nll) in told.items():
        lab.say(f"{way}: {accuracy:.1%} right, ECE {ece:.3f}, cost {nll:.3f} nats.")


def questions(split: str, n: int) -> list[Example]:
    """The first questions of a split of OpenBookQA: "train", "validation" or "test".

    Raises DataError without `datasets`, or where the hub can't be reached.
    """
    rows = hub_rows("OpenBookQA", "allenai/openbookqa", "main", split, n)
    return [question(row) for row in rows]


def question(row: Mapping[str, Any]) -> Example:
    """A row of OpenBookQA as a text that ends where a letter comes next; label: the answer's."""
    choices = row["choices"]
    lines = [f"{letter}. {text}" for letter, text in zip(LETTERS, choices["text"], strict=True)]
    text = "\n".join([f"Question: {row['question_stem']}", *lines, "Answer:"])
    return Example(text, choices["label"].index(row["answerKey"]))


def fitting(tokenizer, examples: Sequence[Example], tokens: int) -> list[Example]:
    """Those that need not be cut, which would take away where the answer comes."""
    return [e for e in examples if len(tokenizer(e.text)["input_ids"]) <= tokens]


def letters_of(tokenizer) -> list[int]:
    """The token of each letter after a space. Raises ValueError where one has several."""
    ids = [tokenizer(f" {letter}", add_special_tokens=False)["input_ids"] for letter in LETTERS]
    if any(len(each) > 1 for each in ids):
        raise ValueError(f"{type(tokenizer).__name__} cuts a letter in several tokens")
    return [each[0] for each in ids]


class Reader(Classifier):
    """Scores words in float32, whatever the precision of the model that reads."""

    def forward(self, encoded: Encoded) -> Tensor:
        """(n, words) logits."""
        with in_precision_of_base(self.model):
            states = self.states(encoded)  # (n, length, dim)
        pooled = pooling(states, encoded.mask, self.pool)  # -> (n, dim)
        rows = anatomy.head(self.model).weight[self.words]  # (words, dim)
        return F.linear(pooled.float(), rows.float())


def answered(
    model: nn.Module,
    tokenizer,
    learned: Sequence[Example],
    asked: Sequence[Example],
    sizes: Sizes = SIZES,
    seed: int = 0,
    device: str = "cpu",
) -> dict[str, tuple[float, float, float]]:
    """Way -> its scores on what is asked: accuracy, calibration error, nats an answer.

    Both ways start from the same weights, to which the model is put back afterwards, and see the
    same questions in the same order.
    """
    lesson, labels = encode_examples(tokenizer, shortest_first(learned), sizes.tokens, device)
    unseen, truth = encode_examples(tokenizer, shortest_first(asked), sizes.tokens, device)
    words, shared = letters_of(tokenizer), {"batch": sizes.batch, "seed": seed}
    steps = sizes.cycles * blob.cycle_length(len(labels), sizes.batch)

    def judged(reader: Reader, draws: int = 0) -> tuple[float, float, float]:
        torch.manual_seed(seed)
        p = blob.averaged(blob.draws(reader, unseen, draws)).cpu()
        return tuple(score(p, truth.cpu()) for score in (scores.accuracy, scores.ece, scores.nll))

    plain = Reader(model, len(words), "words", words=words).to(device)
    told = {"untrained": judged(plain)}
    lora = built(model, "LoRA", words, seed).to(device)
    tune(lora, lesson, labels, steps, RATE, **shared)
    told["LoRA"] = judged(lora)
    bayes = built(model, "BLoB", words, seed).to(device)
    blob.tune_blob(bayes, lesson, labels, steps, RATE, KL_RATE, **shared)
    told["BLoB, its mean"] = judged(bayes)
    told[f"BLoB, {sizes.draws} draws"] = judged(bayes, sizes.draws)
    remove_(model)
    return told


def built(model: nn.Module, way: str, words: Sequence[int], seed: int) -> Reader:
    """The model with fresh adapters of a way, in place of those that it has, as a `Reader`."""
    remove_(model)
    torch.manual_seed(seed)
    put = {"LoRA": lora_, "BLoB": blob.blob_}[way]
    put(model, ROLES, RANK, ALPHA)
    adapters_to_float32_(model)
    torch.manual_seed(seed)  # what BLoB draws in training
    return Reader(model, len(words), "words", words=words)
