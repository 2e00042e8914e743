from dataclasses import replace

import numpy as np
import pytest
import torch

from lablib.embeddings import embedding_overview as overview
from lablib.embeddings.encode import Encoder, Prompt, states
from lablib.evidence.studies import Study, matching
from lablib.exercises import Wrong
from lablib.exercises import embedding_overview as exercises
from lablib.models import GPT, GPTConfig, pretrained
from lablib.papers import paper
from lablib.studies import embedding_overview as study

TEXTS = [
    "The dog barks.",
    "In the beginning God created the heavens",
    "No",
    "He said: go away, now!",
]


@pytest.fixture(scope="module")
def tokenizer():
    return pretrained("tiny-1m")[1]


@pytest.fixture(scope="module")
def small(tokenizer):
    torch.manual_seed(0)
    config = GPTConfig(len(tokenizer), 32, 2, 4, 2, ffn_dim=48, max_length=128, tied=True)
    return Encoder(GPT(config).eval(), tokenizer, max_length=48)


# Told twice.


@pytest.mark.parametrize("layer", [None, 1])
def test_the_first_copy_has_the_plain_vector(small, layer):
    one = Encoder(small.model, small.tokenizer, layer=layer, max_length=48)
    assert torch.allclose(overview.Echo(one, 1)(TEXTS), one(TEXTS), atol=1e-5)


def test_the_second_copy_is_the_mean_of_the_second_half_of_each_row(small):
    found = overview.echo(small, TEXTS)
    for text, vector in zip(TEXTS, found):
        ids = small.tokenizer(f"{text} {text}")["input_ids"]
        half = len(small.tokenizer(text)["input_ids"])
        encoded, _ = overview.told_twice(small, [text])
        assert encoded.inputs[0].tolist() == ids
        h = states(small.model, encoded)[0, half:].mean(0)
        assert torch.allclose(vector, h / h.norm(), atol=1e-5)


def test_the_second_copy_has_read_the_end(small):
    """Another last word changes what earlier words of the second copy say, not of the first."""
    (one, other), ends = (
        (overview.told_twice(small, [f"the dog {w}"]) for w in ("barks", "sleeps")),
        2,
    )
    a, b = (states(small.model, encoded)[0] for encoded, _ in (one, other))
    assert torch.allclose(a[:ends], b[:ends], atol=1e-6)
    assert not torch.allclose(a[one[1][1, 0]][0], b[other[1][1, 0]][0], atol=1e-3)


def test_copies_are_as_long_as_each_other_and_leave_the_prompt_out(small):
    asked = Encoder(small.model, small.tokenizer, prompt=Prompt("Say it again: "), max_length=48)
    encoded, copies = overview.told_twice(asked, TEXTS)
    before = len(small.tokenizer("Say it again: ")["input_ids"])
    assert not copies[:, :, : before - 1].any()
    assert (copies[0] & copies[1]).sum() == 0
    lengths = copies.sum(2)
    assert ((lengths[0] - lengths[1]).abs() <= 1).all() and lengths.min() > 0
    assert (copies.any(0) <= encoded.mask).all()


def test_a_long_text_loses_its_end_in_both_copies(small):
    encoded, copies = overview.told_twice(small, ["word " * 200])
    assert encoded.inputs.shape[1] <= small.max_length + 1
    assert copies[0].sum() == copies[1].sum() == small.max_length // 2


def test_echo_is_differentiable_and_order_is_kept(small):
    assert overview.echo(small, TEXTS).requires_grad
    found = overview.Echo(small)(TEXTS)
    assert torch.allclose(found[2], overview.Echo(small)(TEXTS[2:3])[0], atol=1e-5)


@pytest.mark.parametrize("copy", [0, 3])
def test_there_are_two_copies(small, copy):
    with pytest.raises(ValueError, match="copies 1 and 2"):
        overview.echo(small, TEXTS, copy)


def test_no_text_is_an_error(small):
    with pytest.raises(ValueError, match="no text"):
        overview.told_twice(small, [])


# A number a word.


def test_the_sparse_head_is_the_largest_over_tokens_without_padding(small):
    with torch.no_grad():
        found = overview.sparse_head(small, TEXTS)
        for text, row in zip(TEXTS, found):
            logits = small.model(small.tokens([text]).inputs)[0]
            assert torch.allclose(row, logits.relu().log1p().max(0).values, atol=1e-5)
    assert found.shape == (len(TEXTS), len(small.tokenizer))


@pytest.mark.parametrize("seed", range(3))
def test_an_inverted_index_scores_as_the_dense_product(seed):
    torch.manual_seed(seed)
    documents, queries = (overview.largest(torch.randn(n, 40), 5) for n in (7, 4))
    index = overview.inverted_index(documents)
    found = np.stack([overview.look_up(index, query, 7) for query in queries])
    assert np.allclose(found, (queries @ documents.T).numpy(), atol=1e-6)
    assert sum(map(len, index.values())) == int((documents > 0).sum())


def test_the_largest_weights_stay_and_none_is_negative():
    found = overview.largest(torch.tensor([[3.0, -9, 1, 2], [-1, -2, -3, 4]]), 2)
    assert found.tolist() == [[3, 0, 0, 2], [0, 0, 0, 4]]


def test_sparse_vectors_and_their_words(small):
    found = overview.sparse_vectors(small, TEXTS, keep=6)
    assert ((found > 0).sum(1) <= 6).all() and (found >= 0).all()
    words = overview.top_words(small, found[1], 3)
    assert words == sorted(words, key=lambda row: -row[1]) and len(words) == 3


def test_an_instruction_stands_before_the_query():
    told = overview.instruct("Find the function", "sorts a list")
    assert told == "Instruct: Find the function\nQuery: sorts a list"
    assert overview.instruction("Find the function").before + "sorts a list" == told


def test_several_prompts_are_their_mean(small):
    prompts = [Prompt(), Prompt("Say: ", "."), Prompt(after=" is")]
    made = [replace(small, prompt=prompt)(TEXTS) for prompt in prompts]
    mean = torch.stack(made).mean(0)
    found = overview.several(replace(small, normalize=False), TEXTS, prompts)
    torch.testing.assert_close(found, mean / mean.norm(dim=1, keepdim=True))
    torch.testing.assert_close(overview.several(small, TEXTS, prompts[:1]), made[0])


# The map.


@pytest.mark.parametrize("leaf", overview.TREE, ids=lambda leaf: f"{leaf.group}-{leaf.name}")
def test_each_leaf_is_there_or_says_that_it_is_not(leaf):
    assert leaf.about
    assert (leaf.function is None) == (leaf.where == "")


def test_leaves_have_places_of_their_own_by_branch():
    made = overview.on_a_map()
    assert len({*made.values()}) == len(made) == len(overview.TREE)
    assert all((a.branch == b.branch) == (made[a][0] == made[b][0]) for a in made for b in made)


# The study.


def test_scores_know_a_perfect_and_a_useless_ranking():
    assert study.score(np.eye(5), []) == 1
    assert study.score(-np.eye(5), []) < 0.5
    assert study.score(np.diag([1.0, 2, 3]), [0.1, 0.2, 0.9]) == 1


def test_judging_texts_are_none_of_those_to_choose_by():
    for name in study.TASKS:
        judged, tuned = (set(study.texts_of(name, seed, 40)[0]) for seed in (0, 100))
        assert len(judged & tuned) <= 1


def test_cells_are_sorted_by_row_and_task():
    runs = [{"seed": 0, "a | x": 1.0, "own prompts": 3.0}, {"seed": 1, "a | x": 2.0, "a | y": 4.0}]
    assert study.cells(runs) == {"a": {"x": [1.0, 2.0], "y": [4.0]}}


def test_rows_of_other_labs_are_on_every_task_and_draw():
    runs = Study(paper("embedding-overview")).runs()
    cells = study.cells(matching(runs, kind="more"))
    assert len(cells) == 5
    assert all(list(row) == list(study.TASKS) for row in cells.values())
    assert {len(scores) for row in cells.values() for scores in row.values()} == {5}
    assert not set(cells) & set(study.cells(matching(runs, kind="draw")))


def test_what_other_labs_train_is_on_all_tasks_and_draws():
    runs = Study(paper("embedding-overview")).runs()
    cells = study.cells(matching(runs, kind="theme"))
    for row in ("m-ST5", "tiny-4m, GRL", "DRAMA's student"):
        assert list(cells[row]) == list(study.ALL)
    both = study.cells([run for run in runs if run["kind"] in ("draw", "more", "theme")])
    whole = [row for row in both if all(task in both[row] for task in study.ALL)]
    assert len(whole) >= 18 and {len(both[row][task]) for row in whole for task in study.ALL} == {5}


def test_languages_are_asked_in_texts_that_its_encoder_of_bytes_has_not_seen():
    a, b, gold = study.texts_of("languages", 3, 60)
    split = study.lab_1001.drawn(3, study.lab_1001.LANGUAGES)
    seen = {" ".join(text.split()[:14]) for part in split["train"].values() for text in part}
    assert len(a) == len(b) == 60 and gold == [] and not seen & set(a)
    table = study.lab_1001.table_of("names", study.lab_1001.LANGUAGES)
    assert all(text in table[name][1:] for name, text in zip(a, b) if name in table)


def test_news_are_pairs_that_people_rated():
    a, b, gold = study.texts_of("news", 1, 30)
    assert len(gold) == 30 and 0 <= min(gold) < max(gold) <= 1
    assert all(x != y and len(x.split()) <= 40 for x, y in zip(a, b))
    assert study.texts_of("news", 2, 30)[0] != a


def test_leaves_of_the_map_have_rows_of_the_table():
    cells = study.cells(Study(paper("embedding-overview")).runs())
    assert set(study.ON_MAP) <= {leaf.name for leaf in overview.TREE if leaf.where}
    assert {study.PLAIN, *study.ON_MAP.values()} <= set(cells)


# Exercises.


def first_copy(states, offsets, length):
    return states[[0 < end <= length for _, end in offsets]].mean(0)


def second_half(states, offsets, length):
    return states[len(offsets) // 2 :].mean(0)


def by_start(states, offsets, length):
    return states[[start >= length + 1 for start, _ in offsets]].mean(0)


def with_padding(logits, mask):
    return np.log1p(np.maximum(logits, 0)).max(1)


def summed(logits, mask):
    return (np.log1p(np.maximum(logits, 0)) * mask[..., None]).sum(1)


def plain_mean(states, mask):
    return mask / mask.sum(1, keepdims=True)


def last_column(states, mask):
    return np.eye(mask.shape[1])[np.full(len(mask), -1)]


def by_batch(states, mask):
    places = mask * np.exp(states.mean((0, 2)))
    return places / places.sum(1, keepdims=True)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("echo_pool", first_copy),
        ("echo_pool", second_half),
        ("echo_pool", by_start),
        ("sparse", with_padding),
        ("sparse", summed),
        ("own_weights", plain_mean),
        ("own_weights", last_column),
        ("own_weights", by_batch),
    ],
)
def test_wrong_answers_fail(name, wrong):
    exercise = getattr(exercises, name)
    exercise.test(exercise.reference)
    with pytest.raises(Wrong):
        exercise.test(wrong)
