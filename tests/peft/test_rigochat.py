import copy
import math
from pathlib import Path

import pytest
import torch
import transformers as hf
from families_for_tests import MODELS as FAMILIES
from safetensors.torch import load_file
from torch.nn import functional as F

from lablib.evidence.claims import judge
from lablib.evidence.studies import Study
from lablib.exercises import rigochat as exercises
from lablib.models import anatomy, pretrained
from lablib.papers import paper
from lablib.peft import rigochat as rc
from lablib.peft.adapter import disabled, merge_, n_trainable, trainable
from lablib.peft.lora import lora_
from lablib.studies import rigochat as study

RECORDED = Path(__file__).with_name("rigochat_trl.safetensors")
MODELS = {name: FAMILIES[name] for name in ("gpt", "llama", "gpt2")}


class Letters:
    """A tokenizer: a token a letter."""

    def encode(self, text):
        return [ord(letter) % 60 for letter in text]


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    return MODELS[request.param]().eval()


def some_rows():
    pairs = [
        rc.Preference("Say:", "hola", "ola", "gl"),
        rc.Preference("Say it:", "si", "oui, yes", "fr"),
        rc.Preference("A:", "una palabra", "x", "en"),
    ]
    return rc.encode(Letters(), pairs)


def moved(model, seed=3):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


# The loss.


def test_loss_by_hand():
    policy, reference = torch.tensor([[-2.0, -5.0]]), torch.tensor([[-3.0, -4.0]])
    gap = (-2 + 3) - (-5 + 4)  # 2
    found = rc.dpo_loss(policy[:, 0], policy[:, 1], reference[:, 0], reference[:, 1], 0.5)
    assert found.item() == pytest.approx(-math.log(1 / (1 + math.exp(-0.5 * gap))))


def test_loss_is_log_two_at_the_start_and_steady_far_away():
    same, zero = torch.tensor([-7.0, -1.0]), torch.zeros(2)
    assert rc.dpo_loss(same, same - 3, same, same - 3).item() == pytest.approx(math.log(2))
    far = rc.dpo_loss(zero - 1e4, zero, zero, zero, 1.0)
    assert far.item() == pytest.approx(1e4)


def test_loss_and_all_gradients_are_those_of_trl():
    kept = load_file(RECORDED)
    sizes = {"vocab_size": 23, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
    config = hf.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)
    policy, reference = hf.LlamaForCausalLM(config), hf.LlamaForCausalLM(config)
    for name, model in (("policy", policy), ("reference", reference)):
        weights = {k.partition(".")[2]: v for k, v in kept.items() if k.startswith(name)}
        model.load_state_dict(weights)
    halves = [kept[key].chunk(2) for key in ("input_ids", "completion_mask")]
    tokens, mask = (torch.stack(half, 1) for half in halves)  # -> (pairs, 2, length)
    rows = rc.Rows(tokens, mask.bool())
    places = torch.arange(len(tokens))
    loss = rc.preference_loss(rows, rc.score(reference, rows), beta=0.3)(policy, places)
    torch.testing.assert_close(loss.detach(), kept["loss"][0], atol=1e-6, rtol=1e-6)
    loss.backward()
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(parameter.grad, kept[f"gradient.{name}"], atol=1e-6, rtol=1e-5)


def test_gradients_are_the_closed_form():
    ours, theirs = study.by_closed_form()
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    assert ours[1:].abs().max() > 1e-2


# Answers.


def test_an_answer_is_the_sum_of_its_tokens(model):
    rows = some_rows()
    tokens, is_answer = rows.tokens[0], rows.is_answer[0]
    found = rc.answer_log_probability(model, tokens, is_answer)
    for side in (0, 1):
        total = 0.0
        for place in is_answer[side].nonzero().flatten().tolist():
            logits = anatomy.logits(model, tokens[side : side + 1, :place])[0, -1]
            total += F.log_softmax(logits, -1)[tokens[side, place]].item()
        assert found[side].item() == pytest.approx(total, abs=1e-4)


def test_padding_and_order_change_nothing(model):
    rows = some_rows()
    alone = torch.cat([rc.log_probabilities(model, rows.pick(torch.tensor([i]))) for i in range(3)])
    torch.testing.assert_close(rc.log_probabilities(model, rows), alone, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(rc.score(model, rows, batch=2), alone, atol=1e-4, rtol=1e-5)


def test_encoded_pairs_hold_prompt_answer_and_the_end_of_the_line():
    rows = some_rows()
    letters = Letters().encode("Say: hola\n")
    assert rows.tokens[0, 0, : len(letters)].tolist() == letters
    assert rows.is_answer[0, 0].nonzero().flatten().tolist() == list(range(4, 10))
    assert rows.pick(torch.tensor([0])).tokens.shape == (1, 2, len(letters))
    with pytest.raises(ValueError, match="no pair"):
        rc.encode(Letters(), [])


# The reference.


def test_the_reference_is_the_base_bit_for_bit(model):
    rows, before = some_rows(), copy.deepcopy(model)
    lora_(model, rank=2)
    moved(model)
    with disabled(model):
        mine = anatomy.logits(model, rows.tokens[:, 0])
    assert torch.equal(mine, anatomy.logits(before, rows.tokens[:, 0]))
    assert torch.equal(rc.reference_scores(model, rows), rc.score(before, rows))
    changed = rc.score(model, rows)
    assert (changed - rc.score(before, rows)).abs().max() > 1e-3
    merge_(model)
    assert torch.equal(rc.reference_scores(model, rows), rc.score(before, rows))


def test_a_step_prefers_what_was_chosen(model):
    rows = some_rows()
    rc.adapt_(model, 2)
    start = rc.reference_scores(model, rows)
    loss, places = rc.preference_loss(rows, start), torch.arange(3)
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.3)
    first = loss(model, places)
    assert first.item() == pytest.approx(math.log(2), abs=1e-5)
    for _ in range(5):
        optimizer.zero_grad()
        loss(model, places).backward()
        optimizer.step()
    assert loss(model, places) < first
    gap = (rc.score(model, rows) - start) @ torch.tensor([1.0, -1.0])
    assert gap.mean() > 0


def test_supervised_loss_reads_the_chosen_answers_alone(model):
    rows = some_rows()
    other = rc.Rows(rows.tokens.clone(), rows.is_answer)
    other.tokens[:, 1] = other.tokens[:, 1].flip(-1)
    places = torch.arange(3)
    mine = rc.supervised_loss(rows)(model, places)
    assert torch.equal(mine, rc.supervised_loss(other)(model, places))
    chosen = -rc.score(model, rows)[:, 0].sum() / rows.is_answer[:, 0].sum()
    torch.testing.assert_close(mine.detach(), chosen, atol=1e-4, rtol=1e-5)


def test_adapters_are_the_same_for_a_seed_and_leave_other_draws_alone():
    one, two = MODELS["gpt"](), MODELS["gpt"]()
    two.load_state_dict(one.state_dict())
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    for model in (one, two):
        rc.adapt_(model, 3, seed=5)
    assert torch.equal(torch.rand(3), expected)
    both = zip(trainable(one).values(), trainable(two).values(), strict=True)
    assert all(torch.equal(a, b) for a, b in both)
    asking = {n for n, p in one.named_parameters() if p.requires_grad}
    assert asking == set(trainable(one))


# Pairs and judge.


def test_no_message_is_on_both_sides_and_no_pair_is_a_tie():
    rows = rc.messages()
    train, held_out = rc.split(rows, 50, seed=1)
    assert len(held_out) == 50 and len(train) + 50 == len(rows)
    assert not {r["en"] for r in train} & {r["en"] for r in held_out}
    assert rc.split(rows, 50, seed=2)[1] != held_out
    pairs = rc.preferences(rows)
    assert all(p.chosen != p.rejected for p in pairs)
    assert {p.language for p in pairs} == set(rc.REJECTED)
    assert max(len(text) for row in rows for text in row.values()) <= rc.LONGEST


def test_curated_pairs_are_of_whole_phrases():
    def asked(curated, count):
        pairs, _ = study.drawn_pairs(0, count, curated, scored=20)
        assert len(pairs) == count
        return [
            len(p.prompt.removeprefix("English: ").removesuffix("\nSpanish:").split())
            for p in pairs
        ]

    assert min(asked(True, 128)) >= study.WORDS > min(asked(False, 512)) >= 2


def test_the_judge_tells_languages_it_has_not_read():
    train, held_out = rc.split(rc.messages(), 60, seed=0)
    known = rc.profiles({k: [row[k] for row in train] for k in ("es", "fr", "en")})
    long = [row for row in held_out if len(row["en"].split()) > 2]
    told = [rc.language_of(row[k], known) == k for row in long for k in known]
    assert len(told) > 20 and sum(told) / len(told) > 0.9


# Sizes.


def test_parameters_of_qwen():
    dim, ffn, head = 3584, 18_944, 4 * 128
    block = 2 * dim * dim + dim + 2 * (head * dim + head) + 3 * dim * ffn + 2 * dim
    assert rc.parameters() == 2 * 152_064 * dim + 28 * block + dim
    each = 2 * (dim + dim) + 2 * (dim + head) + 3 * (dim + ffn)
    assert rc.parameters(rank=4) == 4 * 28 * each


def test_a_reference_of_its_own_is_one_more_copy():
    model = MODELS["gpt"]()
    lora_(model, rank=2)
    one, two = (rc.gigabytes(1000, n_trainable(model), copies) for copies in (1, 2))
    assert two["reference"] == one["model"] and one["reference"] == 0
    assert sum(two.values()) - sum(one.values()) == pytest.approx(2 * 1000 / 1e9)


# The study.


def test_adapters_that_are_never_added_reproduce_nothing():
    own = Study(paper("rigochat"))
    idle = [
        run | {key.removeprefix("base_"): run[key] for key in run if key.startswith("base_")}
        for run in own.runs()
    ]
    for id in ("spanish", "spanish-loss"):
        claim = paper("rigochat").claim(id)
        assert len(study.values(own.runs())[id]) == len(study.REAL_SEEDS)
        with pytest.raises(ValueError, match="one and the same effect"):
            judge(claim, study.values(idle)[id])


def test_forgetting_is_read_where_the_preference_is_reached():
    trail = [[0.7, 0, 0, 2.0], [0.5, 0, 0, 2.2], [0.3, 0, 0, 2.4]]
    assert study.forgetting(trail, 0.4) == pytest.approx(15.0)
    assert study.forgetting(trail, 0.5) == pytest.approx(10.0)
    assert math.isnan(study.forgetting(trail, 0.2))


WRONG = {
    "answer_log_probability": [
        lambda x, t, m: x[:, :-1].log_softmax(-1).gather(-1, t[:, 1:, None])[..., 0].sum(1),
        lambda x, t, m: (x.log_softmax(-1).gather(-1, t[..., None])[..., 0] * m).sum(1),
        lambda x, t, m: (x[:, :-1].log_softmax(-1).gather(-1, t[:, 1:, None])[..., 0]
                         * m[:, 1:]).sum(1).round(decimals=2),
    ],
    "preference_loss": [
        lambda p, r, b: -F.logsigmoid(b * (p[:, 0] - p[:, 1])).mean(),
        lambda p, r, b: -F.logsigmoid((p - r)[:, 0] - (p - r)[:, 1]).mean(),
        lambda p, r, b: torch.relu(1 - b * ((p - r)[:, 0] - (p - r)[:, 1])).mean(),
    ],
    "pull": [
        lambda p, r, b: b * torch.sigmoid(-b * (p[:, 0] - p[:, 1])),
        lambda p, r, b: torch.full((len(p),), b / 2),
        lambda p, r, b: torch.sigmoid(-b * ((p - r)[:, 0] - (p - r)[:, 1])),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_answers_are_told(name, tells_right_from_wrong):
    tells_right_from_wrong(getattr(exercises, name), WRONG[name])


def test_an_answer_is_one_line_after_the_prompt():
    model, tokenizer = pretrained("tiny-1m")
    told = rc.answer(model, tokenizer, "Small\ninteger", 5)
    ids = tokenizer.encode(rc.prompt_of("Small integer"))
    longer = tokenizer.decode(model.generate(ids, 5, greedy=True)[len(ids) :])
    assert told == longer.strip().split("\n")[0]
    assert isinstance(rc.answer(model, tokenizer, "", 2), str)
