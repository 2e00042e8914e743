"""SmolLM2-360M learns to say what is on photographs: lab 706's gpu tier.

As in the paper there are photographs and a trained encoder, CLIP's ViT-L/14; captions align a
connector first, then a part of the decoder is tuned. The decoder is a small one.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lablib.compression.recover import recover
from lablib.data.hub import hub_rows
from lablib.data.packages import DataError
from lablib.models import pretrained
from lablib.peft.layernorm_tuning import CONNECTOR, Talk, VisionLanguage, open_, talk_loss
from lablib.peft.on_gpu import Speaker, on_gpu

ENCODER = "openai/clip-vit-large-patch14"
DECODER = "HuggingFaceTB/SmolLM2-360M-Instruct"
PHOTOGRAPHS = "jxie/flickr8k"  # Hodosh et al., 2013: five captions each, of which one is taken
PROMPT = "A photo:"
WAYS = {"gains of norms": "norms", "LoRA, queries and values": "lora", "all weights": "full"}
RATES = {"connector": 1e-3, "norms": 3e-3, "lora": 1e-3, "full": 2e-5}  # nobody tuned them


class Sizes(NamedTuple):
    """How much is seen and learned: captions to train on and to judge on, steps of the two stages,
    captions a step, tokens a caption at most, and rows of a photograph: this number squared."""

    captions: int = 2000
    held_out: int = 200
    first: int = 200
    steps: int = 150
    batch: int = 16
    words: int = 24
    side: int = 4


SIZES = Sizes()


class Told(NamedTuple):
    """Nats a token of held-out captions, and how many numbers trained.

    own: after the caption's photograph; other: after another one, in its place.
    """

    own: float
    other: float
    trained: int


@on_gpu("That takes a GPU, so no photograph was looked at here.")
def say_captions(lab: Speaker, device: str, sizes: Sizes = SIZES) -> None:
    """A line a way, with what `losses_of` gives."""
    seeing, (decoder, tokenizer) = eye().to(device), pretrained(DECODER)
    pairs = [photographs("train", sizes.captions), photographs("test", sizes.held_out)]
    train, test = (
        spoken(features(seeing, images, sizes.side), captions, tokenizer, sizes.words)
        for images, captions in pairs
    )
    for who, (own, other, trained) in losses_of(decoder, train, test, sizes, device=device).items():
        lab.say(
            f"{who}, {trained:,} numbers trained: {own:.2f} nats a token of {len(test.kind)} new "
            f"captions, {other:.2f} with another photograph in the place of theirs."
        )


def eye(name: str = ENCODER) -> nn.Module:
    """The part of a CLIP-like model that sees, in evaluation mode, float32.

    Raises DataError where it can't be had.
    """
    from transformers import AutoModel

    from lablib.models.weights import pretrained_path

    model = AutoModel.from_pretrained(pretrained_path(name), dtype=torch.float32)
    return model.vision_model.eval().requires_grad_(False)


def photographs(split: str, count: int) -> tuple[list[Any], list[str]]:
    """The first images of a split, and a caption of each.

    Raises DataError where they can't be had, or opened.
    """
    try:
        rows = hub_rows("Flickr8k", PHOTOGRAPHS, None, split, count)
    except ImportError:
        raise DataError("Photographs are opened with Pillow: `pip install pillow` first.") from None
    return [row["image"] for row in rows], [row["caption_0"] for row in rows]


def pixels(image: Any, size: int) -> Tensor:
    """(3, size, size): the middle square of an image, as CLIP's encoders take it.

    image: Pillow's, or what else has `convert`.
    """
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    whole = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 255
    shape = [round(side * size / min(whole.shape[1:])) for side in whole.shape[1:]]
    small = F.interpolate(whole[None], shape, mode="bicubic", antialias=True)[0].clamp(0, 1)
    top, left = ((side - size) // 2 for side in shape)
    mean, std = (torch.tensor(of)[:, None, None] for of in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (small[:, top : top + size, left : left + size] - mean) / std


@torch.no_grad()
def features(seeing: nn.Module, images: Sequence[Any], side: int, batch: int = 32) -> Tensor:
    """(n, side * side, width), float16: what the encoder makes of images, once for each.

    The patches' states before the last block, as LLaVA takes them; neighbors are averaged until
    `side` by `side` are left, so that the decoder reads fewer rows.
    """
    device, parts = next(seeing.parameters()).device, []
    for start in range(0, len(images), batch):
        size = seeing.config.image_size
        seen = torch.stack([pixels(image, size) for image in images[start : start + batch]])
        states = seeing(seen.to(device), output_hidden_states=True).hidden_states[-2][:, 1:]
        grid = states.mT.unflatten(2, (size // seeing.config.patch_size, -1))  # (b, width, h, w)
        parts.append(F.adaptive_avg_pool2d(grid, side).flatten(2).mT.half())
    return torch.cat(parts)


class Seen(nn.Module):
    """In an encoder's place: its features are there already. width: of a row."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, images: Tensor) -> Tensor:
        """(batch, rows, width) -> the same, float32."""
        return images.float()


def spoken(images: Tensor, captions: Sequence[str], tokenizer, words: int) -> Talk:
    """Features of images, and a caption of each after a prompt; of one kind, and no digit named."""
    prompt = tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
    said = [tokenizer(f" {text}", add_special_tokens=False)["input_ids"] for text in captions]
    rows = [prompt + ids[:words] for ids in said]
    tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    answer = torch.zeros_like(tokens, dtype=torch.bool)
    for place, row in enumerate(rows):
        tokens[place, : len(row)] = torch.tensor(row)
        answer[place, len(prompt) : len(row)] = True
    named, kind = torch.zeros_like(answer), torch.zeros(len(rows), dtype=torch.long)
    return Talk(images, *(part.to(images.device) for part in (tokens, answer, named, kind)))


def losses_of(
    decoder: nn.Module,
    train: Talk,
    test: Talk,
    sizes: Sizes = SIZES,
    seed: int = 0,
    device: str = "cpu",
) -> dict[str, Told]:
    """Who -> `Told`: after stage one, the connector alone, and from there, after each of WAYS.

    All ways start from the same weights, and see the same captions in the same order.
    """
    torch.manual_seed(seed)
    aligned = VisionLanguage(decoder, Seen(train.images.shape[-1])).eval().to(device)
    learned(aligned, train, CONNECTOR, sizes.first, RATES["connector"], sizes.batch, seed)
    after = {"The connector alone": judged(aligned, test, CONNECTOR)}
    aligned.cpu()
    for name, way in WAYS.items():
        learner, names = opened(aligned, way, seed)
        learner.to(device)
        learned(learner, train, names, sizes.steps, RATES[way], sizes.batch, seed)
        after[f"Then {name}"] = judged(learner, test, names)
    return after


def opened(aligned: VisionLanguage, way: str, seed: int) -> tuple[VisionLanguage, list[str]]:
    """A copy of what stage one left, with a way's adapters, and the names of all that trains."""
    learner = copy.deepcopy(aligned)
    torch.manual_seed(seed)
    return learner, open_(learner, way)


def learned(
    learner: VisionLanguage,
    train: Talk,
    names: Collection[str],
    steps: int,
    rate: float,
    batch: int,
    seed: int,
) -> list[float]:
    """Train what is named, in place; the losses."""

    def loss(model: VisionLanguage, places: Tensor) -> Tensor:
        return talk_loss(model, train.at(places[:, 0]))

    places = torch.arange(len(train.kind))[:, None]
    options = {"batch": batch, "trainable": names, "seed": seed, "loss": loss}
    return recover(learner, places, steps, rate, **options)


def judged(learner: VisionLanguage, test: Talk, names: Collection[str]) -> Told:
    """What held-out captions cost, with their own photographs and with each other's."""
    parameters = dict(learner.named_parameters())
    swapped = test._replace(images=test.images.roll(1, 0))
    trained = sum(parameters[name].numel() for name in names)
    return Told(held_out_loss(learner, test), held_out_loss(learner, swapped), trained)


@torch.no_grad()
def held_out_loss(learner: VisionLanguage, test: Talk, batch: int = 32) -> float:
    """Nats a token of all answers, the same weight for each token."""
    total = 0.0
    for places in torch.arange(len(test.kind)).split(batch):
        part = test.at(places)
        total += talk_loss(learner, part).item() * int(part.answer.sum())
    return total / int(test.answer.sum())
