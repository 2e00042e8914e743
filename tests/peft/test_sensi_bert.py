import copy

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st

from lablib.compression.structures import sliced
from lablib.evidence import Pair
from lablib.evidence.studies import Study
from lablib.exercises import sensi_bert as exercises
from lablib.models import GPT, GPTConfig, anatomy
from lablib.models.classifier import Classifier, Encoded
from lablib.papers import paper
from lablib.peft import sensi_bert as s
from lablib.peft.tuning import task_loss
from lablib.studies import sensi_bert as study

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.3,
}


def bert(n=2, **more):
    torch.manual_seed(0)
    model = hf.BertModel(hf.BertConfig(**(SIZES | more | {"num_hidden_layers": n}))).eval()
    with torch.no_grad():  # biases of units that go must not be missed
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    return model


def batches(n=3):
    torch.manual_seed(1)
    mask = torch.ones(6, 7, dtype=torch.bool)
    mask[::2, 5:] = False
    tokens = [torch.randint(60, (6, 7)) for _ in range(n)]
    return [(Encoded(t, mask), torch.randint(3, (6,))) for t in tokens]


def classifier(model=None):
    model = bert() if model is None else model
    torch.manual_seed(2)
    made = Classifier(model, 3)
    torch.nn.init.normal_(made.head.weight)
    return made.eval()


def loss_of(made):
    return lambda model, batch: task_loss(made(batch[0]), batch[1])


def keeping(model, share=0.5, seed=0):
    torch.manual_seed(seed)
    counts = s.units(model)
    return {p: torch.randperm(n)[: max(1, int(share * n))].sort().values for p, n in counts.items()}


def test_sensitivity_is_the_derivative_to_a_gate():
    """By central differences in float64, of every unit, batch by batch."""
    made = classifier(bert().double()).double()
    (batch,) = batches(1)
    felt = s.sensitivity(made.model, [batch], loss_of(made))
    for part, n in s.units(made.model).items():
        found = s.slopes(made.model, batch, loss_of(made), part, range(n))
        assert felt[part].tolist() == pytest.approx(list(found.values()), rel=1e-4, abs=1e-9)


def test_a_matrix_is_felt_as_its_scale_is():
    """By central differences in float64: the whole matrix, scaled up and down a little."""
    made = classifier(bert().double()).double()
    (batch,), loss, step = batches(1), loss_of(made), 1e-5
    felt = s.by_tensor(made.model, [batch], loss)
    assert len(felt) == 2 * 6
    for place in ((0, "query"), (1, "down")):
        weight, found = anatomy.projection(made.model, *place).weight, []
        for scale in (1 + step, (1 - step) / (1 + step)):
            with torch.no_grad():
                weight *= scale
                found.append(loss(made.model, batch).item())
        slope = (found[0] - found[1]) / (2 * step)
        assert felt[place] == pytest.approx(abs(slope), rel=1e-5)
        with torch.no_grad():
            weight /= 1 - step
    two = s.by_tensor(made.model, batches(2), loss)
    each = [s.by_tensor(made.model, [one], loss) for one in batches(2)]
    assert two[0, "up"] == pytest.approx((each[0][0, "up"] + each[1][0, "up"]) / 2)


def test_blocks_at_the_top_can_be_taken_out():
    learned, labels = study.drawn(3, 48, 16)[0]
    made = study.with_head(3, learned, labels)
    kept = study.trimming(made, learned, labels, "dropped", 0.4, "parameters", 16)
    s.trim_(made.model, kept.keep)
    study.drop_(made.model, kept)
    stay = [len(kept.keep[b, "neurons"]) > 1 for b in range(6)]
    assert len(anatomy.blocks(made.model)) == sum(stay) == 3 and stay[:3] == [True] * 3
    assert made(learned).shape == (48, 2)


def test_other_tasks_have_their_own_labels():
    row = {"way": "rank", "steps": 1, "train": 32, "test": 16, "felt_on": 16, "rate": 1e-4}
    pairs = study.run(seed=200, task="sts-b", **row)
    assert -100 <= pairs["points"] <= 100
    (_, labels), _ = study.drawn(200, 32, 16, "sts-b")
    assert labels.is_floating_point() and labels.abs().max() <= 1
    topics = study.run(seed=200, task="newsgroups", **row)
    assert 0 <= topics["points"] <= 100 and topics["start_nll"] > 1


def test_a_batchs_sign_does_not_cancel_anothers():
    made, three = classifier(), batches()
    whole = s.sensitivity(made.model, three, loss_of(made))
    single = [s.sensitivity(made.model, [b], loss_of(made)) for b in three]
    for part, felt in whole.items():
        torch.testing.assert_close(felt, sum(one[part] for one in single) / 3)
    squared = s.fisher(made.model, three, loss_of(made))
    for part, felt in squared.items():
        torch.testing.assert_close(felt, sum(one[part].square() for one in single) / 3)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_trimmed_equals_masked(family, seed):
    model = bert()
    if family == "roberta":
        torch.manual_seed(0)
        model = hf.RobertaForMaskedLM(hf.RobertaConfig(**SIZES)).eval()
    keep, ((encoded, _), *_) = keeping(model, seed=seed), batches(1)
    arguments = {"input_ids": encoded.inputs, "attention_mask": encoded.mask.long()}

    def out(model):
        made = model(**arguments)
        return getattr(made, "logits", None) if family == "roberta" else made.last_hidden_state

    whole = out(model)
    with s.masked(model, keep):
        expected = out(model)
    assert torch.equal(out(model), whole) and (expected - whole).abs().max() > 1e-3
    smaller = s.trimmed(model, keep)
    torch.testing.assert_close(out(smaller), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(out(model), whole)
    gone = sum(
        (s.units(model)[p] - len(places)) * s.unit_sizes(model)[p] for p, places in keep.items()
    )
    assert s.n_encoder(model) - s.n_encoder(smaller) == gone
    assert s.units(smaller) == {p: len(places) for p, places in keep.items()}


def test_a_decoder_is_sliced_as_it_is_masked():
    torch.manual_seed(0)
    model = GPT(GPTConfig(60, 32, 2, 4, 4, init_std=0.3))
    keep, tokens = keeping(model), torch.randint(60, (2, 7))
    with s.masked(model, keep):
        expected = model(tokens)
    smaller = sliced(model, s.as_keep(model, keep))
    torch.testing.assert_close(smaller(tokens), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="structures"):
        s.trim_(model, keep)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 1000),
    st.floats(0.25, 1.0),
    st.sampled_from(sorted(s.ALLOCATIONS)),
    st.sampled_from(["parameters", "flops"]),
)
def test_a_budget_is_met_to_within_one_unit_and_never_exceeded(seed, budget, name, kind):
    model = s_model()
    torch.manual_seed(seed)
    scores = {p: torch.rand(n) * 10 ** torch.randn(()) for p, n in s.units(model).items()}
    costs = s.unit_sizes(model) if kind == "parameters" else s.unit_flops(model, 20)
    made = s.budgeted(scores, costs, budget, s.ALLOCATIONS[name])
    kept = sum(len(places) * costs[p] for p, places in made.keep.items())
    whole = budget * sum(len(score) * costs[p] for p, score in scores.items())
    assert kept <= whole + 1e-3
    full = all(len(places) == len(scores[p]) for p, places in made.keep.items())
    open_ = [costs[p] for p, places in made.keep.items() if len(places) < len(scores[p])]
    assert full or whole - kept < min(open_)
    for part, places in made.keep.items():
        assert len(places) >= 1
        rest = [u for u in range(len(scores[part])) if u not in places.tolist()]
        assert not rest or scores[part][places].min() >= scores[part][rest].max()


MODEL = []


def s_model():
    if not MODEL:
        MODEL.append(bert())
    return MODEL[0]


def test_the_rank_decides_and_the_score_does_not():
    sizes = {(0, "heads"): 100, (1, "heads"): 100, (0, "neurons"): 100, (1, "neurons"): 100}
    scores = {p: torch.tensor([10.0**i]) for i, p in enumerate(sizes)}
    shares = s.by_rank(scores, sizes, 0.5)
    assert list(shares.values()) == pytest.approx([0.2, 0.4, 0.6, 0.8])
    clipped = s.by_rank(scores, sizes, 0.7)
    assert list(clipped.values()) == pytest.approx([0.3, 0.6, 0.9, 1.0])
    assert s.by_score(scores, sizes, 0.5)[0, "heads"] < 0.01
    assert set(s.uniform(scores, sizes, 0.3).values()) == {0.3}


def test_a_budget_that_cannot_be_met_is_said():
    scores = {p: torch.rand(n) for p, n in s.units(s_model()).items()}
    for budget in (0.01, 1.1):
        with pytest.raises(ValueError, match=f"budget of {budget}"):
            s.budgeted(scores, s.unit_sizes(s_model()), budget)


def test_operations_are_those_that_a_counter_counts():
    from torch.utils.flop_counter import FlopCounterMode

    model, length = bert(), 7
    tokens = torch.randint(60, (1, length))
    model.set_attn_implementation("eager")

    def counted(model):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(tokens)
        return counter.get_total_flops()

    keep = keeping(model)
    smaller = s.trimmed(model, keep)
    costs = s.unit_flops(model, length)
    gone = sum((s.units(model)[p] - len(places)) * costs[p] for p, places in keep.items())
    assert counted(model) - counted(smaller) == length * gone


def test_sizes_are_all_of_the_encoder_that_can_go():
    model = bert()
    costs, counts = s.unit_sizes(model), s.units(model)
    rest = s.n_encoder(model) - sum(counts[p] * costs[p] for p in counts)
    fixed = 2 * (2 * 2 * 32 + 2 * 32)  # two norms, and the biases of what writes to the stream
    assert rest == fixed


def test_bert_bases_encoder_has_85_million():
    with torch.device("meta"):
        model = hf.BertModel(hf.BertConfig())
    assert s.n_encoder(model) == 85_054_464


def test_blocks_from_the_top_go_first():
    model = bert(4, intermediate_size=200)
    counts, costs = s.units(model), s.unit_sizes(model)
    scores = {p: torch.rand(n) for p, n in counts.items()}
    keep = s.budgeted(scores, costs, 0.6, s.from_below).keep
    heads, widths = ([len(keep[b, kind]) for b in range(4)] for kind in s.READERS)
    assert heads[:2] == [4, 4] and heads[3] == 1
    assert min(widths[:2]) > 180 and widths[2] < 100 and widths[3] == 1
    sizes = dict.fromkeys(counts, 100)
    shares = s.from_below(scores, sizes, 0.6)
    assert [shares[b, "heads"] for b in range(4)] == pytest.approx([1, 1, 0.4, 0])


def test_left_out_is_the_change_of_the_loss():
    made, three = classifier(), batches()
    exact = s.left_out(made.model, three, loss_of(made), [(0, "heads")])
    with torch.no_grad():
        whole = sum(loss_of(made)(None, b) for b in three) / 3
        keep = {(0, "heads"): torch.tensor([0, 1, 3])}
        smaller = Classifier(s.trimmed(made.model, keep), 3).eval()
        smaller.head = copy.deepcopy(made.head)
        without = sum(task_loss(smaller(b[0]), b[1]) for b in three) / 3
    assert exact[0, "heads"][2].item() == pytest.approx(abs(without - whole).item(), rel=1e-3)


def test_the_whole_model_is_left_as_it_was():
    made = classifier()
    before = {n: p.clone() for n, p in made.named_parameters()}
    s.sensitivity(made.model, batches(), loss_of(made))
    s.left_out(made.model, batches(1), loss_of(made), [(1, "heads")])
    assert all(torch.equal(p, before[n]) for n, p in made.named_parameters())
    assert anatomy.blocks(made.model)[0].attention.self.num_attention_heads == 4


# The study.


def test_each_budget_is_judged_on_its_own_runs():
    worth = {"rank": 3.0, "uniform": 1.0}
    runs = [p | {"points": worth.get(p["way"], 0.0) * p["share"]} for p in study.POINTS]
    found = study.values(runs)
    for id, share in (("uniform", 0.4), ("uniform-60", 0.6)):
        assert found[id] == [Pair(seed, 3 * share, share) for seed in study.SEEDS]


def test_units_at_random_are_other_ones_each_time_and_as_many():
    model = bert()
    torch.manual_seed(0)
    first, second = s.at_random(model), s.at_random(model)
    assert {part: len(drawn) for part, drawn in first.items()} == s.units(model)
    assert any(not torch.equal(first[part], second[part]) for part in first)
    torch.manual_seed(0)
    again = s.at_random(model)
    assert all(torch.equal(first[part], again[part]) for part in first)


def test_of_the_encoder_as_much_is_left_as_the_budget_says():
    runs = Study(paper("sensi-bert")).runs()
    whole = {run["kept"] for run in runs if run["way"] == "whole"}
    for run in runs:
        room = 0.02 if run["way"] == "dropped" else 0.01  # whose upper blocks leave not even norms
        assert run["kept"] / max(whole) == pytest.approx(run["share"], abs=room)


# Exercises.


def sizes_first(loss, weight, width):
    (g,) = torch.autograd.grad(loss, weight)
    return (g * weight).detach().abs().sum(0).unflatten(0, (-1, width)).sum(1)


def gradient_alone(loss, weight, width):
    (g,) = torch.autograd.grad(loss, weight)
    return g.sum(0).unflatten(0, (-1, width)).sum(1).abs()


def each_column(loss, weight, width):
    (g,) = torch.autograd.grad(loss, weight)
    return (g * weight).detach().sum(0).abs()


def same_for_all(felt, sizes, budget):
    return [budget] * len(felt)


def cut_and_left(felt, sizes, budget):
    ranks = [1 + sorted(felt).index(f) for f in felt]
    c = budget * sum(sizes) / sum(s * r for s, r in zip(sizes, ranks, strict=True))
    return [min(1.0, c * r) for r in ranks]


def best_is_first(felt, sizes, budget):
    return exercises.shares.reference([-f for f in felt], sizes, budget)


def without_attention(dim, heads, head_dim, neurons, length):
    return 2 * (4 * dim * heads * head_dim + 2 * dim * neurons)


def one_for_a_weight(dim, heads, head_dim, neurons, length):
    return exercises.flops.reference(dim, heads, head_dim, neurons, length) // 2


WRONG = {
    "sensitivity": [sizes_first, gradient_alone, each_column],
    "shares": [same_for_all, cut_and_left, best_is_first],
    "flops": [without_attention, one_for_a_weight],
}


@pytest.mark.parametrize("name", WRONG)
def test_exercises_tell_right_from_wrong(name, tells_right_from_wrong):
    tells_right_from_wrong(getattr(exercises, name), WRONG[name])
