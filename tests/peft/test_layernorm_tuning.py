import copy

import numpy as np
import pytest
import torch
import transformers as hf
from torch.nn import functional as F

from lablib.evidence.claims import NOT_REPRODUCED, REPRODUCED, judge
from lablib.exercises import layernorm_tuning as exercises
from lablib.experts.digits import NAMES
from lablib.models import GPT, GPTConfig, anatomy, pretrained, to_hf
from lablib.papers import paper
from lablib.peft import layernorm_tuning as ln
from lablib.peft.adapter import adapters, disabled, freeze_base_, remove_
from lablib.peft.subset import norms_
from lablib.studies import layernorm_tuning as study


def decoder():
    torch.manual_seed(0)
    return GPT(GPTConfig(60, 32, 3, 4, 2, init_std=0.2)).eval()


def seeing(decoder):
    torch.manual_seed(1)
    return ln.VisionLanguage(decoder, ln.RandomFeatures(4, 8)).eval()


def seen(n=3, length=7):
    random = torch.Generator().manual_seed(2)
    images = torch.rand(n, 8, 8, generator=random)
    tokens = torch.randint(60, (n, length), generator=random)
    return images, tokens, torch.ones(n, length).bool()


@torch.no_grad()
def logits(model, *given):
    given = given or seen()
    return model(*given).view(len(given[0]), -1, 60)


@pytest.fixture(scope="module")
def spoken():
    """Four scans' talk, in tokens of the house's tokenizer."""
    random = torch.Generator().manual_seed(3)
    images = torch.rand(4, 8, 8, generator=random)
    return ln.talk(images, [0, 7, 8, 3], pretrained("tiny-1m")[1])


# The model that sees.


def test_it_predicts_each_token_from_the_image_and_the_tokens_before():
    model, (images, tokens, asked) = seeing(decoder()), seen()
    before = logits(model, images, tokens, asked)
    changed = tokens.clone()
    changed[:, 4] = (tokens[:, 4] + 1) % 60
    after = logits(model, images, changed, asked)
    torch.testing.assert_close(after[:, :5], before[:, :5])
    assert (after[:, 5:] - before[:, 5:]).abs().max() > 1e-3
    other = logits(model, 1 - images, tokens, asked)
    assert (other - before).abs().amin(2).max() > 0 and not torch.allclose(
        other[:, 0], before[:, 0]
    )


def test_it_gives_what_is_asked_for():
    model, (images, tokens, _) = seeing(decoder()), seen()
    asked = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(4)) < 0.4
    torch.testing.assert_close(model(images, tokens, asked), logits(model)[asked])


def test_it_does_the_same_with_a_decoder_of_transformers(tmp_path):
    ours = decoder()
    to_hf(ours, tmp_path)
    theirs = hf.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(seeing(theirs)), logits(seeing(ours)), atol=1e-4, rtol=1e-4)


def test_rows_are_about_as_large_as_words():
    model, (images, _, _) = seeing(decoder()), seen()
    rows = model.connector(model.encoder(images))
    assert 0.2 < rows.std() / anatomy.embedding(model.decoder).weight.std() < 2


def test_the_encoder_is_drawn_once_and_never_trains():
    images = seen()[0]
    one, same, other = ln.RandomFeatures(seed=1), ln.RandomFeatures(seed=1), ln.RandomFeatures()
    assert torch.equal(one(images), same(images)) and not torch.equal(one(images), other(images))
    assert one(images).shape == (3, 16, 64) and not list(one.parameters())
    row = F.relu(one.weight[5] @ images[1].flatten() + one.bias[5])
    torch.testing.assert_close(one(images)[1, 5], row)


def test_states_end_where_the_norm_begins():
    model, tokens = decoder(), seen()[1]
    *_, last = ln.states(model, model.embedding(tokens))
    torch.testing.assert_close(model.head(model.norm(last)), model(tokens))


# What stage two trains.


@pytest.mark.parametrize("way", ln.WAYS)
def test_a_way_trains_its_part_alone(way):
    model = seeing(decoder())
    before, outputs = {n: p.clone() for n, p in model.named_parameters()}, logits(model)
    names = ln.open_(model, way, rank=1)
    assert torch.equal(logits(model), outputs)
    named = dict(model.named_parameters())
    assert len(set(names)) == len(names) and set(names) <= set(named)
    beside = {n for n in names if n in ln.CONNECTOR}
    assert len(beside) == (0 if way in ln.ALONE else 2)
    words = [n for n in names if "embedding" in n or "head" in n]
    assert len(words) == (0 if way in ln.ALONE else 1)  # embedding and head are one here
    parts = {"norms": "norm", "layernorm": "norm", "attention": "attention", "mlp": "mlp"}
    rest = set(names) - beside - set(words)
    assert rest and all(parts.get(way, "") in name for name in rest)
    if way == "attention":
        assert {name.split(".")[-2] for name in rest} == {"query", "value"}
    with disabled(model):
        assert torch.equal(logits(model), outputs)
    remove_(model)
    assert not adapters(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_how_many_numbers_each_way_trains():
    counts = {}
    for way in ln.WAYS:
        model = seeing(decoder())
        counts[way] = study.count(model, ln.open_(model, way, 1))
    base = seeing(decoder())
    beside = sum(p.numel() for p in base.connector.parameters()) + 60 * 32
    assert counts["norms"] == 7 * 32
    assert counts["layernorm"] == 7 * 32 + beside
    assert counts["lora"] == 3 * (32 + 32 + 32 + 16)
    assert counts["full"] == sum(p.numel() for p in base.parameters())


def test_the_baseline_trains_more_numbers_than_the_norms():
    model = ln.VisionLanguage(pretrained("tiny-1m")[0], ln.RandomFeatures())
    other = copy.deepcopy(model)
    ours = study.count(model, ln.open_(model, "norms"))
    assert ours == 7 * 128
    assert ours <= study.count(other, ln.open_(other, "lora", 1)) < 2 * ours


# What is said.


def test_talk_says_what_the_image_shows(spoken):
    tokenizer = pretrained("tiny-1m")[1]
    assert len(spoken.kind) == 8 and spoken.kind.tolist() == [0] * 4 + [1] * 4
    for row, label in enumerate([0, 7, 8, 3] * 2):
        words = ln.facts(spoken.images[row], label)
        text = tokenizer.decode(spoken.tokens[row][spoken.answer[row]].tolist())
        name = tokenizer.decode(spoken.tokens[row][spoken.named[row]].tolist())
        assert name == f" {NAMES[label]}" == words["name"] and text.startswith(name)
        assert text == (f"{name}." if row < 4 else f"{name} on the{words['side']}.")
        first = spoken.answer[row].int().argmax()
        prompt = tokenizer.decode(spoken.tokens[row][:first].tolist())
        want = "What is this number? It is a" if row < 4 else f"The picture: a{words['ink']}"
        assert prompt == want


def test_facts_by_hand():
    left = torch.zeros(8, 8)
    left[:, 1] = 1.0
    assert ln.facts(left, 7) == {"name": " seven", "ink": " light", "side": " left"}
    full = torch.ones(8, 8)
    full[:, 0] = 0
    assert ln.facts(full, 0) == {"name": " zero", "ink": " dark", "side": " right"}


def test_about_half_of_the_scans_are_dark_and_on_the_right():
    (images, labels), _ = study.scans(0)
    words = [ln.facts(image, int(label)) for image, label in zip(images, labels)]
    for place, word in (("ink", " dark"), ("side", " right")):
        assert 0.4 < np.mean([w[place] == word for w in words]) < 0.6


def test_answers_are_those_of_greedy_decoding(spoken):
    model = ln.VisionLanguage(pretrained("tiny-1m")[0], ln.RandomFeatures()).eval()
    names = ln.open_(model, "norms")
    study.learned(model, spoken, names, 0.1, 25, 0)
    told = ln.answers(model, spoken, batch=3)
    assert told["named"].any() and not told["exact"].all()
    for row in torch.arange(8):
        part = spoken.at(row[None])
        start, wanted = int(part.answer[0].int().argmax()), part.tokens[part.answer]
        text = part.tokens[:, :start]
        for _ in wanted:
            longer = torch.cat([text, torch.zeros(1, 1, dtype=torch.long)], 1)
            asked = torch.zeros(longer.shape).bool()
            asked[:, -1] = True
            longer[:, -1] = model(part.images, longer, asked).argmax(-1)
            text = longer
        assert told["exact"][row] == torch.equal(text[0, start:], wanted)
    loss = ln.talk_loss(model, spoken)
    torch.testing.assert_close(told["loss"].sum() / told["count"].sum(), loss)


# Inside.


def test_a_gains_gradient_is_autograds():
    model = seeing(decoder())
    norms_(model.decoder)
    freeze_base_(model)
    caught = {}

    def catch(name):
        def hook(module, given, made):
            made.retain_grad()
            caught[name] = given[0].detach(), made

        return hook

    norms = anatomy.norms(model.decoder)
    for name, norm in norms.items():
        norm.register_forward_hook(catch(name))
    images, tokens, asked = seen()
    F.cross_entropy(model(images, tokens, asked), tokens[asked]).backward()
    for name, norm in norms.items():
        x, y = caught[name]
        found = ln.gain_gradient(x, y.grad, norm.eps)
        torch.testing.assert_close(found, norm.weight.grad, atol=1e-6, rtol=1e-4)


def test_similarity_by_hand(spoken):
    model = ln.VisionLanguage(pretrained("tiny-1m")[0], ln.RandomFeatures()).eval()
    with torch.no_grad():
        outputs = list(ln.states(model.decoder, model.rows(spoken.images, spoken.tokens)))
    right = exercises.neighbor_similarity.reference(outputs).item()
    assert ln.similarity(model, spoken) == pytest.approx(right, abs=1e-6)
    assert len(outputs) == 3 and 0 < right < 1


def test_variance_is_zero_of_one_batch_twice_and_asks_for_nothing_later(spoken):
    model = ln.VisionLanguage(pretrained("tiny-1m")[0], ln.RandomFeatures()).eval()
    model.requires_grad_(False)
    one, other = spoken.at(torch.arange(4)), spoken.at(torch.arange(4, 8))
    assert ln.gradient_variance(model, [one, one]) == 0
    assert ln.gradient_variance(model, [one, other]) > 0
    assert not any(p.requires_grad for p in model.parameters())


def test_gains_are_mixed_for_a_while():
    model = seeing(decoder())
    old = logits(model)
    norms_(model.decoder)
    with torch.no_grad():
        for gain in ln.gains(model.decoder).values():
            gain.mul_(1.5).add_(0.1)
    new, gains = logits(model), {n: g.clone() for n, g in ln.gains(model.decoder).items()}
    for share, wanted in ((0.0, old), (1.0, new)):
        with ln.mixed(model.decoder, share):
            assert torch.equal(logits(model), wanted)
    with ln.mixed(model.decoder, 0.5):
        for name, norm in anatomy.norms(model.decoder).items():
            torch.testing.assert_close(norm.weight, (norm.base.weight + gains[name]) / 2)
    assert torch.equal(logits(model), new) and not torch.equal(old, new)
    assert all(torch.equal(gain, gains[n]) for n, gain in ln.gains(model.decoder).items())


# Numbers.


def test_counts_are_those_of_transformers():
    config = hf.LlamaConfig(
        vocab_size=90, hidden_size=32, intermediate_size=56, num_hidden_layers=3
    )
    with torch.device("meta"):
        theirs = hf.LlamaForCausalLM(config)
        vision = hf.CLIPVisionModel(
            hf.CLIPVisionConfig(
                hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
                num_attention_heads=16, patch_size=14, projection_dim=768,
            )
        )  # fmt: skip
    counts = ln.llama_counts(32, 3, 56, vocab=90, seen=10)
    assert counts.total - counts.connector == sum(p.numel() for p in theirs.parameters())
    assert counts.connector == 10 * 32 + 32 and counts.words == 2 * 90 * 32
    assert counts.norms == sum(p.numel() for n, p in theirs.named_parameters() if "layernorm" in n)
    assert sum(p.numel() for p in vision.parameters()) == study.VISION


def test_published_shares_follow_from_the_shapes():
    assert study.share() == pytest.approx(3.78, abs=0.005)
    assert round(study.share(words=False), 3) == 0.004
    assert ln.llama_counts(5120, 40, 13_824).norms == 409_600


# Study and exercises.


def test_scans_are_held_out_and_stage_one_sees_half_of_the_classes():
    (train, _), (test, _) = study.scans(3)
    assert len(train) == study.TRAIN and len(train) + len(test) == 1797
    both = {tuple(image.flatten().tolist()) for image in train}
    assert not both & {tuple(image.flatten().tolist()) for image in test}


def planted(losses):
    """Runs of all ways in the larger model, five seeds, and those in the smaller one."""
    runs = []
    for seed in range(5):
        for name, point in study.IN_4M.items():
            worth = losses.get(name, 0.5) + 0.01 * seed * len(name)
            told = dict.fromkeys((*study.KEPT, "moved"), worth)
            runs.append(point | {"seed": seed} | told)
        both = {f"{way} loss": losses[way] + 0.01 * seed * len(way) for way in ("norms", "lora")}
        runs.append({"way": "every", "seed": seed} | both)
    return runs


def test_a_planted_defect_turns_the_verdict():
    claim, losses = paper("layernorm-tuning").claim("beats-lora"), {"norms": 0.3, "lora": 0.9}
    told = study.values(planted(losses))
    assert judge(claim, told["beats-lora"]).verdict == REPRODUCED
    never_added = study.values(planted(losses | {"norms": 5.0}))
    assert judge(claim, never_added["beats-lora"]).verdict == NOT_REPRODUCED


def test_a_seeds_runs_are_laid_side_by_side():
    made = study.by_seed(planted({"norms": 0.3, "lora": 0.9, "captions": 0.7}))
    assert [run["seed"] for run in made] == list(study.SEEDS)
    told = [made[2][f"{way} named"] for way in ("norms", "captions", "mlp")]
    assert told == pytest.approx([0.4, 0.86, 0.56])


def test_every_way_in_one_run_is_each_in_a_run_of_its_own():
    small = {"seed": 7, "steps": 1, "first": 1, "held_out": 4}
    every = study.run(way="every", **small)
    for name in ("lora", "none", "questions"):
        alone = study.run(**study.EVERY[name], **small)
        assert {key: every[f"{name} {key}"] for key in study.KEPT} == {
            key: alone[key] for key in study.KEPT
        }
    assert {name for name, part in study.EVERY.items() if part.get("rate")} >= {"norms", "full"}


def test_a_run_tells_the_same_twice_and_leaves_stage_one_alone():
    small = {"way": "norms", "seed": 7, "rate": 0.1, "steps": 2, "first": 1, "held_out": 4}
    one = study.run(**small)
    assert study.run(**small) == one
    assert one["training"] == 7 * 128 and len(one["moved"]) == 7 and min(one["moved"]) > 0
    untouched = study.run(**small | {"way": "none"})
    assert untouched["training"] == 0 and max(untouched["moved"]) == 0


def norms_are_a_bias(x, upstream, eps):
    return upstream.flatten(0, -2).sum(0)


WRONG = {
    "norm_share": [
        lambda dim, blocks, ffn, vocab: exercises.norm_share.reference(dim, blocks, ffn, vocab) / 2,
        lambda dim, blocks, ffn, vocab: 2 * dim * blocks,
        lambda dim, blocks, ffn, vocab: 0.004,
    ],
    "gain_gradient": [
        norms_are_a_bias,
        lambda x, upstream, eps: (upstream * x).flatten(0, -2).sum(0),
        lambda x, upstream, eps: (upstream * F.normalize(x, dim=-1)).flatten(0, -2).sum(0),
        lambda x, upstream, eps: ln.gain_gradient(x, upstream, 0.0),
    ],
    "neighbor_similarity": [
        lambda states: F.cosine_similarity(states[0], states[-1], dim=-1).mean(),
        lambda states: 1 - exercises.neighbor_similarity.reference(states),
        lambda states: torch.tensor(1.0),
    ],
    "most_moved": [
        lambda before, after: farthest(before, after, lambda old, new: (new - old).mean()),
        lambda before, after: farthest(before, after, lambda old, new: (new - old).abs().max()),
        lambda before, after: farthest(before, after, lambda old, new: (new - old).norm()),
        lambda before, after: farthest(before, after, lambda old, new: (new / old - 1).norm()),
        lambda before, after: farthest(before, after, lambda old, new: new.square().mean()),
        lambda before, after: 1,
    ],
}


def farthest(before, after, measure):
    return int(torch.stack([measure(*pair) for pair in zip(before, after, strict=True)]).argmax())


@pytest.mark.parametrize("name", WRONG)
def test_wrong_answers_are_told(name, tells_right_from_wrong):
    tells_right_from_wrong(getattr(exercises, name), WRONG[name])
