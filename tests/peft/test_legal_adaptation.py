import random

import numpy as np
import pytest
import torch
import transformers as hf
from families_for_tests import MODELS, TOKENS

from lablib.data.tasks import with_near_copies
from lablib.evidence.claims import NOT_REPRODUCED, judge
from lablib.evidence.studies import Study, matching, replaced
from lablib.exercises import legal_adaptation as exercises
from lablib.models import anatomy
from lablib.papers import paper
from lablib.peft import legal_adaptation as legal
from lablib.peft.adapter import adapters, disabled, n_trainable, remove_
from lablib.peft.prefix import prefix_
from lablib.studies import legal_adaptation as study

ROWS = torch.randint(5, 9, (24, 9), generator=torch.Generator().manual_seed(2))


def adapted(model, steps=4, hidden=6, **options):
    losses = legal.adapt_(model, ROWS, 3, steps, 0.1, hidden=hidden, batch=4, seed=1, **options)
    return model.eval(), losses


# The first step: a prefix reads.


@pytest.mark.parametrize("hidden", [None, 6])
def test_only_the_prefix_learns_to_read(model, hidden):
    bits = {n: p.clone() for n, p in model.named_parameters()}
    before = anatomy.logits(model, TOKENS)
    _, losses = adapted(model, steps=30, hidden=hidden)
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    assert not hasattr(model, "prefix_mlp")
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], p) for name, p in bits.items())
    with disabled(model):
        assert torch.equal(anatomy.logits(model, TOKENS), before)
    assert (anatomy.logits(model, TOKENS) - before).abs().max() > 1e-3
    remove_(model)
    assert not adapters(model) and torch.equal(anatomy.logits(model, TOKENS), before)


def test_a_seed_repeats_and_another_does_not():
    torch.manual_seed(0)
    plain = MODELS["gpt"]().state_dict()

    def run(seed):
        model = MODELS["gpt"]()
        model.load_state_dict(plain)
        return legal.adapt_(model, ROWS, 3, 3, 0.05, hidden=6, batch=4, seed=seed)

    assert run(1) == run(1) != run(2)


def test_masked_tokens_are_asked_for_and_special_ones_never():
    torch.manual_seed(0)
    rows = torch.randint(5, 60, (400, 20))
    rows[:, 0], rows[:, -1] = 1, 2
    asked, shown = legal.masked(rows, 3, (1, 2), 0.15, 60)
    assert not asked[:, 0].any() and not asked[:, -1].any()
    assert asked[:, 1:-1].float().mean().item() == pytest.approx(0.15, abs=0.01)
    assert torch.equal(shown[~asked], rows[~asked])
    hidden = (shown[asked] == 3).float().mean().item()
    same = (shown[asked] == rows[asked]).float().mean().item()
    assert hidden == pytest.approx(0.8, abs=0.04) and same == pytest.approx(0.1, abs=0.04)


def test_one_token_at_least_is_masked():
    asked, _ = legal.masked(torch.tensor([[1, 9, 2]]), 3, (1, 2), 1e-12, 60)
    assert asked.tolist() == [[False, True, False]]
    with pytest.raises(ValueError, match="nothing can be masked"):
        legal.masked(torch.tensor([[1, 2]]), 3, (1, 2), 0.15, 60)


def test_a_model_that_fills_gaps_reads_by_filling_them():
    torch.manual_seed(0)
    model = MODELS["bert"]()
    loss = legal.masked_loss(3, (0, 1), 0.3)
    torch.manual_seed(4)
    asked, shown = legal.masked(ROWS, 3, (0, 1), 0.3, 60)
    chosen = anatomy.logits(model.eval(), shown).log_softmax(-1)[asked]
    by_hand = -chosen[torch.arange(len(chosen)), ROWS[asked]].mean()
    torch.manual_seed(4)
    torch.testing.assert_close(loss(model, ROWS), by_hand)
    _, losses = adapted(model, steps=60, loss=loss)
    assert np.mean(losses[-15:]) < np.mean(losses[:15])


# The second step: it starts a classifier.


def test_it_starts_where_the_reading_ended(model):
    plain = {n: p.clone() for n, p in model.state_dict().items()}
    adapted(model)
    read, prefix = anatomy.logits(model, TOKENS), legal.prefix_of(model)
    remove_(model)
    assert all(torch.equal(p, plain[n]) for n, p in model.state_dict().items())
    legal.start_(model, prefix)
    assert torch.equal(anatomy.logits(model, TOKENS), read)
    assert n_trainable(model) == prefix.numel()


def test_its_size_is_the_formulas(model):
    prefix_(model, 5)
    blocks, both, length, width = legal.prefix_of(model).shape
    assert (both, length) == (2, 5)
    assert legal.prefix_size(5, width, blocks) == n_trainable(model)


def test_an_encoders_size_is_what_transformers_builds():
    sizes = {"vocab_size": 90, "max_position_embeddings": 40, "type_vocab_size": 1}
    sizes |= {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 3}
    built = hf.RobertaModel(hf.RobertaConfig(**sizes, num_attention_heads=4))
    assert legal.encoder_size(90, 40, 32, 80, 3) == sum(p.numel() for p in built.parameters())
    assert legal.encoder_size(50265, 514, 768, 3072, 12) == 124_645_632  # RoBERTa-base


def test_a_seeds_runs_are_one():
    runs = [{"kind": "all", "seed": 3, "n": n, f"head_{n}_accuracy": float(n)} for n in (8, 16)]
    runs += [{"kind": "own", "seed": 3, "n": 8, "scratch_own_accuracy": 5.0}]
    runs += [{"kind": "head", "seed": 3, "n": 8, "accuracy": 1.0}]
    (made,) = study.of_seeds(runs)
    told = made["head_8_accuracy"], made["head_16_accuracy"], made["scratch_own_accuracy"]
    assert told == (8.0, 16.0, 5.0)


def test_the_exercise_counts_as_torch_does():
    plain = study.tiny()[0]
    config = plain.config
    given = config.dim, config.n_heads, config.n_kv_heads, config.n_layers
    prefix = study.read("prefix", 3, 2).prefix
    assert exercises.prefix_numbers.reference(study.LENGTH, *given) == prefix.numel()


def test_another_models_prefix_is_refused(model):
    prefix_(model, 2)
    blocks, _, _, width = legal.prefix_of(model).shape
    remove_(model)
    for shape in ((blocks + 1, 2, 2, width), (blocks, 2, 2, width + 1)):
        with pytest.raises(ValueError, match="a prefix for"):
            legal.start_(model, torch.zeros(shape))
        remove_(model)
    with pytest.raises(ValueError, match="has no prefix"):
        legal.prefix_of(model)


def test_steps_until_a_level():
    assert legal.steps_until([4.0, 3, 2, 1, 0], 1.5, window=2) == 4  # (2 + 1) / 2
    assert legal.steps_until([4.0, 3, 2, 1, 0], 2.0, window=1) == 3
    assert legal.steps_until([4.0, 4, 4], 1.0, window=2) == 3
    with pytest.raises(ValueError, match="2 losses for a window of 5"):
        legal.steps_until([1.0, 1.0], 0.5)


# The study.


def test_ways_start_and_train_as_they_say():
    plain, tokens = study.tiny()[0], torch.arange(20)[None]
    sizes = {}
    for kind in study.TUNED:
        start = study.read(study.READERS.get(kind, "none"), 3, 2)
        classifier, names = study.built(kind, start, "notices", 3)
        sizes[kind] = n_trainable(classifier.model)
        trains = set(dict(classifier.named_parameters())) if names is None else set(names)
        assert any("head.weight" in name for name in trains)
        if kind in ("head", "read-head"):
            assert trains == {"head.weight", "head.bias"}
        same = torch.equal(plain(tokens), classifier.model(tokens))
        assert same == (kind in ("full", "head"))
    prefixes = {kind for kind, size in sizes.items() if size}
    assert prefixes == {"scratch", "adapted", "read-head"}
    assert len({sizes[kind] for kind in prefixes}) == 1


def test_a_prefix_that_reads_comes_nearer_to_licences():
    held = study.text_of(5, 40 * study.BATCH)[1]
    before = study.token_losses(study.tiny()[0], held, 32).mean().item()
    assert study.read("prefix", 5, 40).loss < before - 0.1


@pytest.mark.parametrize("task", study.TASKS)
def test_what_is_judged_is_balanced_and_near_no_training_text(task):
    splits = study.splits_of(task)
    test = study.texts(task, "test")
    counts = np.bincount([example.label for example in test])
    assert len(counts) == study.TASKS[task] and len(set(counts)) == 1
    few = study.few_shot(splits.train, 32, 0)
    seen = [study.Example(e.text[: study.SEEN], 0) for e in [*few, *test]]
    grouped = with_near_copies(seen)
    both = {e.source for e in grouped[: len(few)]} & {e.source for e in grouped[len(few) :]}
    assert not both


@pytest.mark.parametrize("id", ["few-shot", "full", "comparable"])
def test_a_classifier_without_a_prefix_is_not_reproduced(id):
    stored, claim = Study(paper("legal-adaptation")).runs(), paper("legal-adaptation").claim(id)
    idle = replaced(stored, "adapted_8_accuracy", "head_8_accuracy")
    assert judge(claim, study.values(idle)[id]).verdict == NOT_REPRODUCED


def _no_replacement(labels, per_class, draw):
    """Draws with replacement."""
    own = {label: [p for p, other in enumerate(labels) if other == label] for label in labels}
    return [draw.choice(places) for places in own.values() for _ in range(per_class)]


def _in_order(labels, per_class, draw):
    kept = random.Random(draw.random())
    own = {label: [p for p, other in enumerate(labels) if other == label] for label in labels}
    return [p for label in sorted(own) for p in kept.sample(own[label], per_class)]


WRONG = {
    "prefix_numbers": [
        lambda length, dim, heads, kv_heads, blocks: 2 * length * dim * blocks,
        lambda length, dim, heads, kv_heads, blocks: length * dim // heads * kv_heads * blocks,
        lambda length, dim, heads, kv_heads, blocks: 2 * length * dim // heads * kv_heads,
    ],
    "balanced": [
        lambda labels, per_class, draw: draw.sample(range(len(labels)), 3 * per_class),
        _no_replacement,
        _in_order,
        lambda labels, per_class, draw: exercises._balanced(labels, per_class, random.Random(0)),
    ],
    "calibration_error": [
        lambda confidence, right, bins: abs(right.mean() - confidence.mean()),
        lambda confidence, right, bins: (right - confidence).mean(),
        lambda confidence, right, bins: exercises._calibration_error(confidence, right, 4),
    ],
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_answers_are_told(name, tells_right_from_wrong):
    tells_right_from_wrong(getattr(exercises, name), WRONG[name])


def test_a_layer_on_top_learns_and_the_model_stays():
    model, tokenizer = study.copy.deepcopy(study.tiny()[0]), study.tiny()[1]
    legal.adapt_(model, torch.randint(5, 90, (8, 9)), 3, 1, 0.1, hidden=4, batch=4)
    before = {n: p.clone() for n, p in model.named_parameters()}
    said = ("the king shall speak", "import numpy as np")
    texts = [study.Example(f"{said[n % 2]} {n}", n % 2) for n in range(12)]
    right = legal.right_on_top(model, tokenizer, texts, texts, steps=100, rate=3e-2)
    assert right == 100
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    wrong = [study.Example(text.text, 1 - text.label) for text in texts]
    assert legal.right_on_top(model, tokenizer, texts, wrong, steps=100, rate=3e-2) == 0


def test_a_copy_starts_from_a_prefix_and_the_model_has_none():
    model = study.tiny()[0]
    reader = study.copy.deepcopy(model)
    legal.adapt_(reader, torch.randint(5, 90, (8, 9)), 3, 1, 0.1, hidden=4, batch=4)
    made = legal.with_prefix(model, legal.prefix_of(reader))
    assert torch.equal(anatomy.logits(made, TOKENS), anatomy.logits(reader, TOKENS))
    assert not legal.parts(model) and not legal.parts(legal.with_prefix(model, None))


def test_the_larger_decoder_reads_and_every_way_has_its_own_best_rate():
    row = study.run("larger", 2, 200, tasks="kind", steps=1, reading=1)
    small = study.run("scratch", 2, 200, tasks="kind", steps=1, reading=1)
    assert row["scratch_larger_loss"] < small["loss"]  # it was trained for longer
    assert row["adapted_larger_loss"] != row["scratch_larger_loss"]
    assert row["full_larger_learning"] > 2 * row["adapted_larger_learning"] > 0
    tried = matching(Study(paper("legal-adaptation")).runs("TUNING"), kind="larger")
    for way, rates in study.TRIED_LARGER.items():
        right = {rates[run["place"]]: run[f"{way}_larger_accuracy"] for run in tried}
        best = max(right, key=right.get)
        assert len(right) == 5 and study.BEST_LARGER[way] == best
        assert min(right) < best < max(right)


def test_added_tasks_are_judged_apart():
    row = study.run("more", "2", 200, steps=1, reading=1)
    ours = [row[f"adapted_more2_{task}_accuracy"] for task in study.MORE]
    assert row["adapted_more2_accuracy"] == pytest.approx(sum(ours) / 2, abs=1e-3)
    told = study.of_seeds([{"kind": "more", "seed": 1, "a": 1}, {"kind": "all", "seed": 1, "b": 2}])
    assert told == [{"kind": "all", "seed": 1, "a": 1, "b": 2}]
