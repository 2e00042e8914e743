"""Prompted embeddings: the state before the one word, however texts are padded and shared."""

import math
from dataclasses import replace

import pytest
import torch
import transformers as hf
from scipy import stats

from lablib.data.tasks import load_task
from lablib.embeddings import evaluate, lexical
from lablib.embeddings import prompt_embeddings as pe
from lablib.embeddings.encode import Encoder, Prompt, hidden_layers, pad, pool, states
from lablib.evidence.claims import NOT_REPRODUCED, judge
from lablib.evidence.studies import Study, matching, replaced
from lablib.exercises import prompt_embeddings as exercises
from lablib.models import anatomy, pretrained
from lablib.models.hub import to_hf
from lablib.papers import paper
from lablib.peft.adapter import adapters
from lablib.studies import prompt_embeddings as study

TEXTS = ["In the beginning", "let there be light: and there was light", "God"]
SHOWN = [("A man eats an apple.", "Food"), ("It rains.", "Weather")]


@pytest.fixture(scope="module")
def tiny():
    return Encoder(*pretrained("tiny-1m"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory, tiny):
    """The same weights in transformers, which takes a mask."""
    folder = tmp_path_factory.mktemp("tiny")
    to_hf(tiny.model, folder)
    return hf.AutoModelForCausalLM.from_pretrained(folder).eval()


# The prompt.


def test_the_template_is_the_authors():
    """As their README has it, blanks written as underscores there."""
    given = 'This_sentence_:_"A_jockey_riding_a_horse."_means_in_one_word:"Equestrian".'
    given += 'This_sentence_:_"*sent_0*"_means_in_one_word:"'
    before, after = pe.with_demonstrations([("A jockey riding a horse.", "Equestrian")])
    assert before + "*sent_0*" + after == given.replace("_", " ").replace("sent 0", "sent_0")
    assert pe.with_demonstrations([]) == pe.IN_ONE_WORD


def test_demonstrations_come_in_order_and_in_any_prompt():
    before, after = pe.with_demonstrations([("x", "X"), ("y", "Y")], Prompt("<", ">="))
    assert (before, after) == ('<x>=X".<y>=Y".<', ">=")


def test_candidates_are_sentences_with_words():
    assert len(pe.CANDIDATES) == len({word for _, word in pe.CANDIDATES}) == 20
    for sentence, word in pe.CANDIDATES:
        assert sentence.endswith(".") and word.istitle() and word.lower() not in sentence.lower()


# The last state.


def test_last_states_with_padding_on_either_side():
    found = torch.arange(24.0).reshape(3, 4, 2)
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1], [1, 1, 1, 1]]).bool()
    assert torch.equal(pe.last_states(found, mask), found[[0, 1, 2], [1, 3, 3]])


def test_padding_moves_to_the_left():
    encoded = pe.padded_left(pad([[5, 6, 7], [8], [9, 4]]))
    assert encoded.inputs.tolist() == [[5, 6, 7], [0, 0, 8], [0, 9, 4]]
    assert encoded.mask.int().tolist() == [[1, 1, 1], [0, 0, 1], [0, 1, 1]]


def test_left_right_and_one_by_one_agree_in_transformers_and_here(tiny, llama):
    theirs = replace(tiny, model=llama)
    encoded = pe.prompted(tiny).tokens(TEXTS)
    left = pe.padded_left(encoded)
    with torch.no_grad():
        right = pe.embed(tiny, TEXTS)
        alone = torch.cat([pe.embed(tiny, [text]) for text in TEXTS])
        there = pe.embed(theirs, TEXTS)
        in_front = states(llama, left)[:, -1]  # what the authors' script takes
    for other in (alone, there, in_front):
        torch.testing.assert_close(other, right, atol=1e-5, rtol=1e-5)
    assert (
        states(llama, left._replace(mask=torch.ones_like(left.mask)))[:, -1] - right
    ).abs().max() > 0.1


def test_embed_is_the_encoder_without_normalizing(tiny):
    ours = pe.embed(replace(tiny, layer=2), TEXTS, SHOWN)
    maker = replace(pe.prompted(tiny, SHOWN), layer=2, normalize=False)
    torch.testing.assert_close(maker(TEXTS), ours.detach(), atol=1e-5, rtol=1e-5)
    ours.sum().backward()
    assert anatomy.embedding(tiny.model).weight.grad is not None
    tiny.model.zero_grad()


# Words.


def test_words_are_those_of_the_logits(tiny):
    asking = pe.prompted(tiny)
    encoded = asking.tokens(["God"])
    with torch.no_grad():
        likely = tiny.model(encoded.inputs)[0, -1].softmax(-1).topk(3)
    found = pe.one_words(asking, "God", 3)
    assert [word for word, _ in found] == [tiny.tokenizer.decode([i]) for i in likely.indices]
    # Another batch size rounds otherwise on some processors.
    assert [p for _, p in found] == pytest.approx(likely.values.tolist(), rel=1e-5)


def test_the_last_block_says_what_the_model_says(tiny):
    asking = pe.prompted(tiny)
    last = replace(asking, layer=len(anatomy.blocks(tiny.model)))
    final, below = (pe.one_words(e, "God") for e in (asking, last))
    assert [w for w, _ in below] == [w for w, _ in final]
    assert [p for _, p in below] == pytest.approx([p for _, p in final])
    assert pe.one_words(replace(asking, layer=1), "God") != final


# Layers.


@pytest.mark.parametrize("shown", [[], SHOWN])
@pytest.mark.parametrize("budget", [1, 60, 4096])
def test_every_layer_is_that_of_one_pass(tiny, shown, budget):
    asking = pe.prompted(tiny, shown)
    encoded = asking.tokens(TEXTS)
    wanted = hidden_layers(tiny.model, encoded)
    found = pe.every_layer(asking, TEXTS, ("last", "mean", "mean-but-first"), budget)
    for pooling, layers in found.items():
        pooled = pool(wanted, encoded.mask, pooling)
        torch.testing.assert_close(layers, pooled.detach(), atol=1e-4, rtol=1e-4)


def test_every_layer_of_transformers(tiny, llama):
    ours = pe.every_layer(pe.prompted(tiny), TEXTS, ("last",))["last"]
    theirs = pe.every_layer(pe.prompted(replace(tiny, model=llama)), TEXTS, ("last",))["last"]
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("rows", "start"),
    [
        ([[5, 6, 7], [5, 6, 8]], 2),
        ([[5, 6], [5, 6]], 1),  # a token of each is left
        ([[5], [5, 6]], 0),
        ([[4, 6], [5, 6]], 0),
        ([[5, 0, 7], [5]], 0),  # padding is no token
    ],
)
def test_what_texts_start_with(rows, start):
    assert pe.common_start(pad(rows)) == start


def test_what_texts_start_with_is_read_once(tiny):
    read = []
    hook = tiny.model.embedding.register_forward_hook(lambda m, a, o: read.append(a[0].numel()))
    pe.every_layer(pe.prompted(tiny, SHOWN), TEXTS, ("last",))
    hook.remove()
    encoded = pe.prompted(tiny, SHOWN).tokens(TEXTS)
    start = pe.common_start(encoded)
    assert start > 20 and read[0] == start
    assert sum(read[1:]) == len(TEXTS) * (encoded.mask.shape[1] - start)


# Demonstrations and fine-tuning.


def test_each_candidate_stands_in_front_once(tiny):
    a, b, gold = TEXTS, TEXTS[::-1], [1.0, 3.0, 2.0]
    found = pe.demonstration_search(tiny, SHOWN, a, b, gold)
    for candidate, score in zip(SHOWN, found, strict=True):
        before = pe.with_demonstrations([candidate])
        maker = replace(tiny, pooling="last", prompt=before)
        assert score == evaluate.sts(maker(a), maker(b), gold)["spearman"]
    (alone,) = pe.demonstration_search(tiny, [None], a, b, gold)
    maker = pe.prompted(tiny)
    assert alone == evaluate.sts(maker(a), maker(b), gold)["spearman"]


def test_fine_tuning_moves_low_rank_changes_alone():
    encoder = pe.prompted(Encoder(*pretrained("tiny-1m")))
    before = {n: p.clone() for n, p in encoder.model.named_parameters()}
    losses = pe.tune_(encoder, [(t, t + "!") for t in TEXTS] * 2, 3, 1e-2, batch=3)
    changes = adapters(encoder.model)
    assert changes and {(len(a.down), a.dropout) for a in changes.values()} == {(64, 0.05)}
    assert {a.factor for a in changes.values()} == {16 / 64}
    for name, parameter in encoder.model.named_parameters():
        if name.endswith((".down", ".up")):
            continue
        assert torch.equal(parameter, before[name.replace(".base.", ".")]), name
    assert any(a.up.abs().sum() > 0 for a in changes.values())
    assert len(losses) == 3 and all(map(math.isfinite, losses))


def test_the_same_seed_trains_the_same():
    made = []
    for seed in (1, 1, 2):
        encoder = pe.prompted(Encoder(*pretrained("tiny-1m")))
        made.append(pe.tune_(encoder, [(t, t + "!") for t in TEXTS] * 2, 2, 1e-2, 3, seed))
    assert made[0] == made[1] != made[2]


# The paper's table.


def test_averages_are_those_that_the_table_prints():
    for size, mean in pe.averages().items():
        assert mean == pytest.approx(pe.published()[size]["average"], abs=0.0051)
    assert list(pe.published()) == [0.125, 0.35, 1.3, 2.7, 6.7, 13, 30, 66]
    assert pe.best_size() == 6.7


# The study.


def stored(points="POINTS"):
    return Study(paper("prompt-embeddings")).runs(points)


def is_best(task, name, kinds):
    """Whether no other layer, of these kinds, has a higher mean over the tuning draws."""
    runs = matching(stored("TUNING"), task=task, pairs=None)
    curves = {
        (kind, pooling): torch.tensor([run[f"{task} {kind} {pooling}"] for run in runs]).mean(0)
        for kind, pooling in kinds
    }
    *kind, layer = study.TUNED[task][name]
    return curves[tuple(kind)][layer] >= max(curve.max() for curve in curves.values())


@pytest.mark.parametrize("task", ["sts-b", "verses"])
def test_layers_are_the_best_of_the_tuning_draws(task):
    means = [("plain", pooling) for pooling in study.PLAIN if pooling != "last"]
    assert is_best(task, "mean", means)
    assert is_best(task, "last", [("plain", "last")])
    assert is_best(task, "prompt", [("prompt", "last")])


def test_the_demonstration_is_the_best_of_the_search():
    curves = {}
    for run in matching(stored("TUNING"), task="search"):
        curves |= {int(k.split()[1]): v for k, v in run.items() if isinstance(v, list)}
    assert sorted(curves) == list(range(len(pe.CANDIDATES)))
    number = max(curves, key=lambda n: max(curves[n]))
    assert {run.get("demonstration") for run in stored() if run["task"] == "texts"} == {number}
    layer = curves[number].index(max(curves[number]))
    assert study.TUNED["sts-b"]["shown"] == ("shown", "last", layer)


@pytest.mark.parametrize("prompted", [True, False])
def test_rates_are_the_best_of_the_tuning_runs_and_on_no_edge(prompted):
    runs = matching(stored("TUNING"), task="train", prompted=prompted)
    accuracies = dict.fromkeys(study.RATES, 0.0)
    for run in runs:
        accuracies[run["rate"]] += run["accuracy"]
    assert len(runs) == 2 * len(accuracies)
    rate = max(accuracies, key=accuracies.get)
    assert min(accuracies) < rate < max(accuracies)
    judged = matching(stored(), task="train", prompted=prompted)
    assert {run["rate"] for run in judged} == {rate} and len(judged) == len(study.FRESH)


def test_no_pair_is_in_two_draws():
    sizes = study.PAIRS | {"simlex": study.PAIRS["words"]}
    for task, size in sizes.items():
        rows = [pair for seed in study.SEEDS for pair in zip(*study.drawn(task, seed, None)[:2])]
        twice = task == "words"  # WordSim has one pair twice
        assert len(set(rows)) + twice == len(rows) == len(study.SEEDS) * size
    test = {(e.text, e.pair): e.label for e in load_task("sts-b")[2]}
    a, b, gold = study.drawn("sts-b", 3, None)
    assert [test[pair] for pair in zip(a, b)] == gold.tolist()


def test_a_method_that_adds_nothing_is_not_reproduced():
    idle = replaced(stored(), "sts-b shown", "sts-b prompt")
    idle = [
        run | {"sts-b shown": run["sts-b shown"] + 1e-9 * (run["seed"] - 2)}
        if "sts-b shown" in run
        else run
        for run in idle
    ]
    claim = paper("prompt-embeddings").claim("demonstration")
    assert judge(claim, study.values(idle)["demonstration"]).verdict == NOT_REPRODUCED


def test_a_prompt_without_its_training_is_not_reproduced():
    method = study.ROLES["trained"]["method"]
    untrained = [run | {"accuracy": run["untrained"]} for run in matching(stored(), **method)]
    others = [run for run in stored() if not matching([run], **method)]
    after = judge(
        paper("prompt-embeddings").claim("trained"), study.values(others + untrained)["trained"]
    )
    assert len(untrained) == len(study.FRESH) and after.verdict == NOT_REPRODUCED


def test_counts_of_words_are_those_of_each_pair():
    found = study.by_words("sts-b", 3)
    a, b, gold = study.drawn("sts-b", 3, None)
    one_by_one = [lexical.bm25(b)([x])[0, n] for n, x in enumerate(a)]
    wanted = stats.spearmanr(one_by_one, gold).statistic
    assert len(set(b)) == len(b) and found["BM25"] == pytest.approx(wanted, abs=1e-6)
    assert 0.3 < found["tf-idf"] < 0.9
    assert study.by_words("simlex", 0) == {"tf-idf": 0.0, "BM25": 0.0}  # no two words are the same
    verses = study.by_words("verses", 0)
    assert min(verses.values()) > 0.9 and max(verses.values()) <= 1


def test_another_prompt_is_another_run():
    point = {"task": "words", "model": "tiny-1m", "pairs": 5}
    asked, other = study.run(**point), study.run(**point, after='" means in one word:')
    same, changed = "words plain mean final", "words prompt last cosine"
    assert asked[same] == other[same] and asked[changed] != other[changed]


# Exercises.

WRONG = {
    "last_state": [
        lambda states, mask: states[:, -1],
        lambda states, mask: states[range(len(mask)), mask.sum(1) - 1],
        lambda states, mask: states[range(len(mask)), mask.argmax(1)],
    ],
    "spearman": [
        lambda x, y: float(exercises.np.corrcoef(x, y)[0, 1]),
        lambda x, y: float(exercises.np.corrcoef(*(exercises._in_order(v) for v in (x, y)))[0, 1]),
    ],
    "dictionary": [
        lambda functions: [(d.split(".")[0] + ".", n.capitalize()) for n, d in functions],
        lambda functions: exercises._dictionary(functions)[1:],
        lambda functions: [(w, s) for s, w in exercises._dictionary(functions)],
    ],
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_answers_are_told(name, tells_right_from_wrong):
    tells_right_from_wrong(getattr(exercises, name), WRONG[name])


def test_the_exercise_is_scipys_spearman():
    x, y = exercises.np.random.default_rng(0).integers(0, 5, (2, 40)).astype(float)
    assert exercises._spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
