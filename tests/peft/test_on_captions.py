import copy
import sys
import types

import numpy as np
import pytest
import torch
import transformers as hf
from test_on_glue import Heard
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from lablib.data.packages import DataError
from lablib.models import pretrained
from lablib.models.hub import from_hf
from lablib.peft import on_captions as oc
from lablib.peft.adapter import adapters
from lablib.peft.layernorm_tuning import CONNECTOR, VisionLanguage, talk_loss

SIZES = oc.Sizes(captions=24, held_out=8, first=3, steps=3, batch=4, words=6, side=2)
COLORS = {"red": (250, 30, 30), "green": (30, 250, 30), "blue": (30, 30, 250)}


class Photograph:
    """What Pillow gives, as far as it is used. array: (height, width, 3) of bytes."""

    def __init__(self, array):
        self.array = array

    def convert(self, mode):
        assert mode == "RGB"
        return self.array


def photographs(split, count):
    """Walls of a color, not quite even, and what they show."""
    draw = np.random.default_rng(len(split))
    names = [list(COLORS)[place % len(COLORS)] for place in range(count)]
    walls = [
        np.full((20, 30, 3), COLORS[name]) - draw.integers(0, 30, (20, 30, 3)) for name in names
    ]
    return [Photograph(wall.astype(np.uint8)) for wall in walls], [f"a {n} wall" for n in names]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Two folders as the hub has them: a small CLIP of random weights, and a small Llama."""
    torch.manual_seed(0)
    part = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    seeing = {**part, "num_hidden_layers": 3, "image_size": 16, "patch_size": 4}
    reading = {**part, "num_hidden_layers": 1, "vocab_size": 60, "eos_token_id": 1}
    reading |= {"bos_token_id": 0}
    clip = hf.CLIPModel(hf.CLIPConfig(text_config=reading, vision_config=seeing, projection_dim=16))
    tokenizer = pretrained("tiny-1m")[1]
    sizes = {**part, "num_hidden_layers": 2, "num_key_value_heads": 2, "hidden_act": "silu"}
    llama = hf.LlamaForCausalLM(
        hf.LlamaConfig(**sizes, vocab_size=len(tokenizer), tie_word_embeddings=True)
    )
    folders = {name: tmp_path_factory.mktemp("model") for name in (oc.ENCODER, oc.DECODER)}
    clip.save_pretrained(folders[oc.ENCODER])
    llama.save_pretrained(folders[oc.DECODER])
    tokenizer.save_pretrained(folders[oc.DECODER])
    return folders


@pytest.fixture
def near(hub, monkeypatch):
    """With these in the place of what is fetched."""
    monkeypatch.setattr("lablib.models.weights.pretrained_path", hub.get)
    monkeypatch.setattr(oc, "photographs", photographs)
    return hub


def said(near, split="train", count=24):
    images, captions = photographs(split, count)
    return oc.spoken(oc.features(oc.eye(), images, 2), captions, pretrained(oc.DECODER)[1], 6)


def test_pixels_are_the_middle_square_as_clip_takes_it():
    flat = oc.pixels(Photograph(np.full((40, 20, 3), 51, dtype=np.uint8)), 8)
    mean, std = torch.tensor(OPENAI_CLIP_MEAN), torch.tensor(OPENAI_CLIP_STD)
    torch.testing.assert_close(flat, ((0.2 - mean) / std)[:, None, None].expand(3, 8, 8))
    stripes = np.zeros((8, 24, 3), dtype=np.uint8)
    stripes[:, 8:16] = 255  # nothing but this third stays
    assert (oc.pixels(Photograph(stripes), 8) > 1.5).all()
    assert oc.pixels(Photograph(np.zeros((37, 53, 3), dtype=np.uint8)), 16).shape == (3, 16, 16)


def test_features_are_means_of_the_encoders_patches(near):
    seeing = oc.eye()
    assert not seeing.training and not any(p.requires_grad for p in seeing.parameters())
    images, _ = photographs("train", 5)
    found = oc.features(seeing, images, 2, batch=2)
    assert found.shape == (5, 4, 32) and found.dtype == torch.float16
    pixels = torch.stack([oc.pixels(image, 16) for image in images])
    patches = seeing(pixels, output_hidden_states=True).hidden_states[-2][
        :, 1:
    ]  # without the first
    by_hand = patches.view(5, 2, 2, 2, 2, 32).mean((2, 4)).view(5, 4, 32)
    torch.testing.assert_close(found.float(), by_hand, atol=2e-3, rtol=2e-3)


def test_the_part_that_sees_is_loaded(near):
    whole = hf.CLIPModel.from_pretrained(near[oc.ENCODER]).eval()
    seen = torch.randn(1, 3, 16, 16)
    ours, theirs = (eye(seen).last_hidden_state for eye in (oc.eye(), whole.vision_model))
    assert torch.equal(ours, theirs)


def test_captions_are_answers_after_the_prompt(near):
    told, tokenizer = said(near), pretrained(oc.DECODER)[1]
    for row, answer, text in zip(
        told.tokens, told.answer, photographs("train", 24)[1], strict=True
    ):
        assert tokenizer.decode(row[answer]) == f" {text}"[: len(tokenizer.decode(row[answer]))]
        assert answer.sum() <= 6
    prompt = tokenizer(oc.PROMPT)["input_ids"]
    assert told.tokens[:, : len(prompt)].tolist() == [prompt] * 24
    assert not told.answer[:, : len(prompt)].any()


def test_a_way_trains_its_part_and_the_rest_stays_bit_for_bit(near):
    told = said(near)
    aligned = VisionLanguage(pretrained(oc.DECODER)[0], oc.Seen(32)).eval()
    before = {n: p.clone() for n, p in aligned.named_parameters()}
    start = talk_loss(aligned, told)
    for way in oc.WAYS.values():
        learner, names = oc.opened(aligned, way, 1)
        assert torch.equal(talk_loss(learner, told), start)  # all start from the same weights
        at_start = {n: p.clone() for n, p in learner.named_parameters()}
        oc.learned(learner, told, names, 3, 1e-2, 4, 0)
        moved = {n for n, p in learner.named_parameters() if not torch.equal(p, at_start[n])}
        assert moved and moved <= set(names)
        assert (moved & set(CONNECTOR) != set()) == (way == "full")
        assert moved == set(names) or way == "lora"  # of LoRA, A moves a step later
    assert not adapters(aligned)
    assert all(torch.equal(p, before[n]) for n, p in aligned.named_parameters())


def test_stage_one_trains_the_connector_alone_and_ways_see_the_same_captions(near, monkeypatch):
    train, test = said(near), said(near, "test", 8)
    seen, stages = [], []
    whole = oc.talk_loss

    def noted(model, part):
        if torch.is_grad_enabled():
            seen.append(part.tokens.clone())
        return whole(model, part)

    learned = oc.learned
    monkeypatch.setattr(oc, "talk_loss", noted)
    monkeypatch.setattr(oc, "learned", lambda *given: (stages.append(given[2]), learned(*given))[1])
    decoder = pretrained(oc.DECODER)[0]
    before = copy.deepcopy(decoder.state_dict())
    told = oc.losses_of(decoder, train, test, SIZES)
    assert all(torch.equal(p, before[n]) for n, p in decoder.state_dict().items())
    assert stages[0] == CONNECTOR and list(told) == [
        "The connector alone",
        *(f"Then {name}" for name in oc.WAYS),
    ]
    ways = [torch.stack(seen[start : start + 3]) for start in range(3, len(seen), 3)]
    assert len(ways) == 3 and all(torch.equal(ways[0], way) for way in ways)
    assert oc.losses_of(decoder, train, test, SIZES) == told
    sizes = [one.trained for one in told.values()]
    assert (
        sizes[0] == 33 * 32
        and sizes[1] == 5 * 32
        and sizes[3] == sizes[0] + sum(p.numel() for p in decoder.parameters())
    )


def test_with_more_steps_captions_are_learned_and_the_photograph_is_used(near, monkeypatch):
    monkeypatch.setattr(oc, "RATES", {"connector": 3e-2, "norms": 3e-2, "lora": 3e-2, "full": 1e-2})
    apart = torch.randn(3, 4, 32)  # what a trained encoder would make of three colors
    train, test = (
        part._replace(images=apart[torch.arange(len(part.kind)) % 3])
        for part in (said(near), said(near, "test", 9))
    )
    told = oc.losses_of(pretrained(oc.DECODER)[0], train, test, SIZES._replace(first=20, steps=40))
    first, *ways = told.values()
    assert all(way.own < first.own for way in ways)
    assert ways[-1].own + 0.5 < ways[-1].other


def test_the_loss_is_of_all_tokens_whatever_the_batch(near):
    test = said(near, "test", 8)
    model = VisionLanguage(pretrained(oc.DECODER)[0], oc.Seen(32)).eval()
    whole = talk_loss(model, test).item()
    assert oc.held_out_loss(model, test, 3) == pytest.approx(whole, rel=1e-4)


def test_ours_and_transformers_decoder_lose_the_same(near):
    theirs = hf.LlamaForCausalLM.from_pretrained(near[oc.DECODER]).eval()
    ours, told = from_hf(near[oc.DECODER]).eval(), said(near)
    losses = []
    for decoder in (ours, theirs):
        torch.manual_seed(0)
        losses.append(oc.held_out_loss(VisionLanguage(decoder, oc.Seen(32)).eval(), told))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_line_a_way_where_there_is_a_gpu_and_a_reason_where_there_is_none(near, monkeypatch):
    oc.say_captions(cpu := Heard("cpu"))
    assert cpu.said == ["That takes a GPU, so no photograph was looked at here."]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    oc.say_captions(lab := Heard("gpu"), SIZES)
    assert [line.split(", ")[0] for line in lab.said] == [
        "The connector alone",
        "Then gains of norms",
        "Then LoRA",
        "Then all weights",
    ]
    assert all("nats a token of 8 new captions" in line for line in lab.said)

    def away(split, count):
        raise DataError("no hub")

    monkeypatch.setattr(oc, "photographs", away)
    oc.say_captions(again := Heard("gpu"), SIZES)
    assert again.said == ["no hub"]


def test_without_the_hub_there_is_a_reason(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match="Hugging Face hub"):
        oc.eye("openai/none-such")


def test_photographs_come_with_a_caption_each_and_need_pillow(monkeypatch):
    rows = [{"image": i, "caption_0": f"one {i}", "caption_1": "x"} for i in range(5)]
    asked, lack = [], False

    def load_dataset(*given, **more):
        if lack:
            raise ImportError("To support decoding images, please install 'Pillow'.")
        asked.append((given, more))
        return iter(rows)

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert oc.photographs("test", 2) == ([0, 1], ["one 0", "one 1"])
    assert asked == [((oc.PHOTOGRAPHS, None), {"split": "test", "streaming": True})]
    lack = True
    with pytest.raises(DataError, match="pip install pillow"):
        oc.photographs("test", 2)
