import copy
import sys
import types

import numpy as np
import pytest
import torch
import transformers as hf
from test_on_glue import Heard

from lablib.data.packages import DataError
from lablib.data.tasks import Example
from lablib.models import anatomy, pretrained
from lablib.models.classifier import Encoded, last_states
from lablib.peft import on_episodes as oe
from lablib.peft.hypertuning import given, install_

SIZES = oe.Sizes(
    rows=30, steps=3, batch=2, shots=4, asked=2, words=6, read=48, prefix=2, blocks=1, width=32
)._replace(judged=2)


def pool(name, count=30):
    """Made-up rows of a task: what the label is shows in the first word."""
    source = (oe.SEEN | oe.UNSEEN)[name]
    labels = [place % len(source.words) for place in range(count)]
    pair = "and so on" if source.pair else ""
    return [Example(f"{'abcdef'[k]} number {i}", k, pair) for i, k in enumerate(labels)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small Llama of random weights, saved as the hub's models are."""
    torch.manual_seed(0)
    tokenizer, place = pretrained("tiny-1m")[1], tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    sizes |= {"num_hidden_layers": 2, "num_key_value_heads": 2, "tie_word_embeddings": True}
    sizes |= {"initializer_range": 0.2}
    hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, vocab_size=len(tokenizer))).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


@pytest.fixture
def small(folder, monkeypatch):
    """It, as ours and its tokenizer, in the place of what is fetched."""
    monkeypatch.setattr("lablib.models.weights.pretrained_path", {oe.MODEL: folder}.get)
    return pretrained(oe.MODEL)


def parts(tokenizer, sizes=SIZES, tasks=("sst2", "mnli", "rte", "emotion")):
    return oe.episodes_of({name: pool(name) for name in tasks}, tokenizer, sizes)


def test_no_unseen_task_and_no_label_word_of_one_is_in_training():
    assert not oe.SEEN.keys() & oe.UNSEEN.keys()
    words = [{w for one in tasks.values() for w in one.words} for tasks in (oe.SEEN, oe.UNSEEN)]
    assert not words[0] & words[1]
    assert all(len(one.words) > 1 for one in (oe.SEEN | oe.UNSEEN).values())


def test_an_episode_takes_classes_in_turn_and_asks_about_others():
    draw = np.random.default_rng(0)
    for name in ("sst2", "emotion"):
        for _ in range(20):
            examples, asked = oe.episode(pool(name), 6, 3, draw)
            counts = np.bincount([example.label for example in examples])
            assert sorted(counts) == ([3, 3] if name == "sst2" else [1] * 6)
            assert len({example.text for example in examples + asked}) == 9
    orders = {tuple(e.label for e in oe.episode(pool("sst2"), 4, 1, draw)[0]) for _ in range(30)}
    assert len(orders) > 3


def test_examples_fill_the_room_from_its_end():
    assert oe.filled([1, 2, 3], 7) == [3, 1, 2, 3, 1, 2, 3]
    assert oe.filled([1, 2, 3, 4], 2) == [3, 4] and oe.filled([1, 2], 2) == [1, 2]


def test_episodes_show_labels_and_ask_for_the_answer(small):
    tokenizer = small[1]
    train, seen, unseen = parts(tokenizer)
    assert [len(part.shown) for part in (train, seen, unseen)] == [6, 4, 4]
    for part in (train, seen, unseen):
        assert part.shown.shape == part.mixed.shape == (len(part.shown), 48)
        assert part.asked.shape[:2] == (len(part.shown), 2) == part.answer.shape[:2]
    for row, answer in zip(unseen.asked[0], unseen.answer[0], strict=True):
        text, word = tokenizer.decode(row[: answer.nonzero()[0]]), tokenizer.decode(row[answer])
        assert text.endswith(oe.UNSEEN["rte"].question) and "and so on" in text
        assert word == (" true" if text.startswith("a") else " false")
    told = tokenizer.decode(unseen.shown[0])
    assert told.endswith("\n\n") and told.count("true") + told.count("false") >= 2
    assert any((part.shown != part.mixed).any() for part in (seen, unseen))
    other = parts(tokenizer)
    assert all(torch.equal(a, b) for a, b in zip(train, other[0], strict=True))


def test_some_episodes_are_cut_after_their_last_answer(small):
    model, every = small[0], parts(small[1])[0]
    some = every.at(slice(1))
    assert some.answer[..., -1].any() and some.asked.shape[2] <= every.asked.shape[2]
    whole = oe.Episodes(*(part[:1] for part in every))
    torch.testing.assert_close(oe.plain_loss(model, some), oe.plain_loss(model, whole))


def test_texts_of_seen_tasks_are_judged_that_no_training_episode_has(small):
    train, seen, _ = parts(small[1], SIZES._replace(steps=40, judged=10), ("sst2", "rte"))
    numbers = [
        {text.split("number ")[1].split("\n")[0] for row in part.asked for text in
         (small[1].decode(one) for one in row)}
        for part in (train, seen)
    ]  # fmt: skip
    assert not numbers[0] & numbers[1] and max(map(int, numbers[0])) < 24


def test_h_starts_as_the_model_and_reads_what_stands_in_the_examples(small):
    model, tokenizer = small
    tuned = oe.built(model, SIZES, 0)["generated"]
    reader, tokens = tuned.hyper, parts(tokenizer)[0].shown[:2]
    assert len(anatomy.blocks(reader.text)) == 1 and len(anatomy.blocks(model)) == 2
    mine = dict(model.named_parameters())
    copied = dict(reader.text.named_parameters())
    assert copied.keys() < mine.keys()
    assert all(torch.equal(p, mine[n]) and p is not mine[n] for n, p in copied.items())
    cut = copy.deepcopy(model)
    del anatomy.blocks(cut)[1:]
    every = Encoded(tokens, torch.ones_like(tokens, dtype=torch.bool))
    assert torch.equal(last_states(reader.text, every), last_states(cut, every))
    phi = reader(tokens, torch.zeros_like(tokens))
    assert len(phi) == 2 and all(rows.shape == (2, 2, 16) for pair in phi.values() for rows in pair)
    assert all((keys[0] != keys[1]).any() for keys, _ in phi.values())


def test_the_loss_is_that_of_ordinary_prefixes_with_these_numbers(small):
    model, tokenizer = small
    train = parts(tokenizer)[0].at(slice(2))
    tuned = oe.built(model, SIZES, 0)["shared"]
    ours = oe.answer_loss(tuned, train, train.shown)
    other = copy.deepcopy(model)
    install_(other, tuned.hyper(train.shown, None))
    torch.testing.assert_close(ours, oe.plain_loss(other, train), atol=1e-5, rtol=1e-5)
    with given(tuned.frozen, {}):  # empty slots change nothing
        assert torch.equal(oe.plain_loss(tuned.frozen, train), oe.plain_loss(model, train))


def test_in_context_the_same_tokens_stand_before_each_text(small):
    model, tokenizer = small
    some = parts(tokenizer)[2].at(slice(2))
    found, by_hand = oe.plain_loss(model, some, context=True), []
    for shown, texts, answers in zip(some.shown, some.asked, some.answer, strict=True):
        for text, answer in zip(texts, answers, strict=True):
            chances = model(torch.cat([shown, text])[None])[0].log_softmax(-1)
            places = answer.nonzero()[:, 0]
            by_hand += [-chances[len(shown) + at - 1, text[at]] for at in places]
    torch.testing.assert_close(found, torch.stack(by_hand).mean(), atol=1e-5, rtol=1e-5)


def test_what_writes_trains_on_the_same_episodes_and_the_frozen_model_stays(small, monkeypatch):
    model, tokenizer = small
    before, once = copy.deepcopy(model.state_dict()), oe.written(model, *parts(tokenizer), SIZES)
    built, seen, kept, whole = oe.built, [], {}, oe.answer_loss

    def noted(tuned, episodes, shown):
        if torch.is_grad_enabled():
            seen.append(shown.clone())
        return whole(tuned, episodes, shown)

    monkeypatch.setattr(oe, "answer_loss", noted)
    monkeypatch.setattr(oe, "built", lambda *given: kept.setdefault("made", built(*given)))
    losses = oe.written(model, *parts(tokenizer), SIZES)
    assert len(seen) == 6 and all(torch.equal(seen[i], seen[i + 3]) for i in range(3))
    made, start = kept["made"], built(model, SIZES, 0)
    assert made["generated"].frozen is made["shared"].frozen
    moved = {kind: moved_of(made[kind], start[kind]) for kind in made}
    assert all(name.startswith("hyper.") for names in moved.values() for name in names)
    assert set(moved["shared"]) == set(made["shared"].learning())
    assert any(name.startswith("hyper.text.blocks.0") for name in moved["generated"])
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    assert [list(one) for one in losses.values()] == [
        ["no example", "a shared prefix", "a written prefix", "one from shuffled labels",
         "the examples themselves"]
    ] * 2  # fmt: skip
    assert losses == once


def moved_of(tuned, start):
    first = dict(start.named_parameters())
    return [n for n, p in tuned.named_parameters() if not torch.equal(p, first[n])]


def test_with_more_steps_both_learn_the_answers(small, monkeypatch):
    model, tokenizer = small
    monkeypatch.setattr(oe, "RATES", {"generated": 3e-3, "shared": 3e-1})
    sizes = SIZES._replace(steps=30, batch=4)
    losses = oe.written(model, *parts(tokenizer, sizes, ("sst2", "rte")), sizes)
    told = losses["other texts of seen tasks"]
    assert told["a written prefix"] < told["no example"] - 1
    assert told["a shared prefix"] < told["no example"] - 1


def test_a_line_for_seen_and_unseen_tasks_and_a_reason_without_a_gpu(small, monkeypatch):
    oe.say_episodes(cpu := Heard("cpu"))
    assert cpu.said == ["That takes a GPU, so SmolLM2 wrote no prefix for itself here."]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(oe, "examples_of", pool)
    oe.say_episodes(lab := Heard("gpu"), SIZES)
    assert [line.split(": ")[0] for line in lab.said] == [
        "Nats a token of answers, other texts of seen tasks",
        "Nats a token of answers, unseen tasks",
    ]
    assert all("the examples themselves" in line for line in lab.said)

    def away(name, count):
        raise DataError("no hub")

    monkeypatch.setattr(oe, "examples_of", away)
    oe.say_episodes(again := Heard("gpu"), SIZES)
    assert again.said == ["no hub"]


def test_without_the_hub_there_is_a_reason(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    oe.say_episodes(lab := Heard("gpu"), SIZES)
    assert len(lab.said) == 1 and "Hugging Face hub" in lab.said[0]


def test_rows_become_examples_and_one_class_alone_is_said(monkeypatch):
    rows = [{"premise": f"p {i}", "hypothesis": f"h {i}", "label": i % 3} for i in range(6)]
    rows = {"mnli": rows, "plain_text": [{"sms": "hello", "label": 0}] * 4}
    asked = []

    def load_dataset(repository, config, **more):
        asked.append((repository, config, more))
        return iter(rows[config])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert oe.examples_of("mnli", 2) == [Example("p 0", 0, "h 0"), Example("p 1", 1, "h 1")]
    assert asked == [("nyu-mll/glue", "mnli", {"split": "train", "streaming": True})]
    with pytest.raises(DataError, match="spam has one class alone"):
        oe.examples_of("spam", 4)
