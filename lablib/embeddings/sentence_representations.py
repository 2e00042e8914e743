"""Sentence representations in a frozen language model (Subramani and Suresh, 2020).

Lab 1006. A vector is sought that makes a language model say a given sentence, while none of the
model's own numbers changes. Source: the abstract; how the three places are defined in which a
vector enters, and the maps from and to them, was not found, so these are our reading.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lablib.models import anatomy
from lablib.models.gpt import GPT

SITES = ("embedding", "layers", "head")
IGNORED = -100  # the target where there is none: in front of a sentence, and after its end


def surprise(
    model: nn.Module,
    z: Tensor,
    before: Tensor,
    wanted: Tensor,
    where: str = "embedding",
    skip: int = 0,
) -> tuple[Tensor, Tensor]:
    """What sentences cost a model that is told z, which is to be minimized over z.

    z: (n, dim), a vector a sentence. before, wanted: (n, length), each token and the one after it,
    IGNORED where there is none. where, skip: as in `injected`.
    Returns (n,) nats, and at how many positions the model's first choice is right, (n,).
    """
    with injected(model, z, where, skip):
        logits = anatomy.logits(model, before)  # (n, length) -> (n, length, vocab)
    # -log p(x_t | x_<t, z), for all t
    nats = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none")
    right = logits.argmax(-1) == wanted
    return nats.view_as(wanted).sum(1), right.sum(1)


@contextlib.contextmanager
def injected(
    model: nn.Module, z: Tensor, where: str = "embedding", skip: int = 0
) -> Iterator[None]:
    """Add z to what a model computes at every position, inside the `with` block.

    z: (n, dim), one for each of n rows. where: "embedding", the tokens' vectors, "layers", what
    every block reads, "head", what the last projection reads, or several, as "embedding+head".
    skip: positions at the beginning that are left as they are. Raises ValueError for another place.
    """
    places = where.split("+")
    if unknown := set(places) - set(SITES):
        raise ValueError(f"{min(unknown)!r} is no place for z; there are {', '.join(SITES)}")

    def moved(x: Tensor) -> Tensor:
        later = x[:, skip:] + z[:, None]  # (n, length, dim) + (n, 1, dim): at all positions alike
        return torch.cat([x[:, :skip], later], 1) if skip else later

    def read(module: nn.Module, args: tuple) -> tuple:
        return moved(args[0]), *args[1:]

    readers = [*anatomy.blocks(model)] if "layers" in places else []
    readers += [anatomy.head(model)] if "head" in places else []
    handles = [module.register_forward_pre_hook(read) for module in readers]
    if "embedding" in places:
        hook = anatomy.embedding(model).register_forward_hook
        handles.append(hook(lambda module, args, vectors: moved(vectors)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Recovery:
    """What a search came to.

    z: (n, dim), a vector a sentence. solved: (n,), the step from which on the model's first choice
    is right at every position, so that greedy decoding says the sentence; -1 where there is none.
    hits: (steps + 1, n), at how many positions it was right. path: the z of every so many steps.
    """

    z: Tensor
    solved: Tensor
    hits: Tensor
    path: list[Tensor]


def recover(
    model: nn.Module,
    sentences: Sequence[Sequence[int]],
    steps: int,
    lr: float,
    dim: int | None = None,
    where: str = "embedding",
    init: float = 0.01,
    *,
    learned: bool = False,
    start: Sequence[int] = (0,),
    seed: int = 0,
    every: int = 10,
) -> Recovery:
    """Search a vector for each sentence with Adam, whose rate falls to a tenth along a cosine.

    The search runs where the model lies, and what comes back lies there, too.
    sentences: tokens of each. dim: numbers a sentence, if not as many as the model's states have;
    a random map makes states of them, fixed or `learned` by the sentences together. init: deviation
    of the numbers at first. start: tokens before the sentence, which are given; z comes in from the
    last of them on. every: steps from one z of the path to the next. A sentence's search ends when
    it is recovered; without a learned map they share nothing, and a batch finds what each would
    alone.
    Raises ValueError when there is no sentence, or an empty one.
    """
    width, device = anatomy.embedding(model).embedding_dim, _device(model)
    before, wanted = (part.to(device) for part in padded(sentences, start))
    place = (where, len(start) - 1)
    draw = torch.Generator().manual_seed(seed)
    code = init * torch.randn(len(wanted), dim or width, generator=draw).to(device)
    expand = torch.randn(dim, width, generator=draw).to(device) / math.sqrt(dim) if dim else None
    trains = [code, expand] if learned and dim else [code]
    adam = torch.optim.Adam([part.requires_grad_() for part in trains], lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, max(1, steps), lr / 10)
    z, lengths = torch.zeros(len(wanted), width, device=device), (wanted != IGNORED).sum(1)
    hits, solved, path = lengths.repeat(steps + 1, 1), torch.full_like(lengths, -1), []
    with frozen(model):
        for step in range(steps + 1):
            live = (solved < 0).nonzero().flatten()
            now = (code if expand is None else code @ expand)[live]  # numbers -> (live, dim)
            nats, hits[step, live] = surprise(model, now, before[live], wanted[live], *place)
            z[live] = now.detach()
            solved[live] = torch.where(hits[step, live] == lengths[live], step, -1)
            if step % every == 0 or step == steps or (solved >= 0).all():
                path.append(z.clone())
            if step == steps or (solved >= 0).all():
                break
            adam.zero_grad()
            nats.sum().backward()
            adam.step()
            schedule.step()
    return Recovery(z, solved, hits, path)


def _device(model: nn.Module) -> torch.device:
    """Where its embeddings lie."""
    return anatomy.embedding(model).weight.device


def padded(
    sentences: Sequence[Sequence[int]], start: Sequence[int] = (0,)
) -> tuple[Tensor, Tensor]:
    """What `surprise` compares, (n, length) each: tokens, and those that follow them.

    Raises ValueError as `recover` does.
    """
    if not sentences or not all(len(tokens) for tokens in sentences):
        raise ValueError("there is no sentence, or an empty one")
    rows = torch.full((len(sentences), len(start) + max(map(len, sentences))), IGNORED)
    for row, tokens in zip(rows, sentences):
        row[: len(start) + len(tokens)] = torch.tensor([*start, *tokens])
    before, wanted = rows[:, :-1].clamp(min=0), rows[:, 1:].clone()
    wanted[:, : len(start) - 1] = IGNORED  # what comes before the sentence is given
    return before, wanted


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No gradient for any of the model's own numbers, inside the `with` block."""
    asked = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asked:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)


@torch.no_grad()
def decode(
    model: nn.Module,
    z: Tensor,
    length: int,
    where: str = "embedding",
    start: Sequence[int] = (0,),
) -> Tensor:
    """What the model says by itself, always its first choice: z (n, dim) -> (n, length).

    where, start: as in `recover`. z lies where the model does.
    """
    text = torch.tensor([list(start)], device=z.device).repeat(len(z), 1)
    cache = model.new_cache(len(start) + length) if isinstance(model, GPT) else None
    if cache and len(start) > 1:
        model.hidden_states(text[:, :-1], cache)  # z is not in there
    for _ in range(length):
        with injected(model, z, where, 0 if cache else len(start) - 1):
            # with a cache, earlier positions are not computed again
            logits = model(text[:, -1:], cache) if cache else anatomy.logits(model, text)
        text = torch.cat([text, logits[:, -1:].argmax(-1)], 1)  # (n, length + 1)
    return text[:, len(start) :]


# Scores: of tokens said, beside those wanted.


def longest_prefix(said: Sequence[int], wanted: Sequence[int]) -> int:
    """How many tokens are right before the first wrong one."""
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(said, wanted))))


def scores(said: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]]) -> dict[str, float]:
    """Means over sentences of "exact", "tokens" right at their position, and "prefix", all shares,
    and "bleu", 0 to 100. What is said after the length that is wanted does not count.
    """
    pairs = [(list(s)[: len(w)], list(w)) for s, w in zip(said, wanted, strict=True)]
    tokens = [sum(a == b for a, b in zip(s, w)) / len(w) for s, w in pairs]
    prefixes = [longest_prefix(s, w) / len(w) for s, w in pairs]
    n = len(pairs)
    return {
        "exact": sum(s == w for s, w in pairs) / n,
        "tokens": sum(tokens) / n,
        "prefix": sum(prefixes) / n,
        "bleu": bleu(*zip(*pairs)),
    }


def bleu(said: Sequence[Sequence], wanted: Sequence[Sequence], order: int = 4) -> float:
    """BLEU of a corpus with one reference a sentence, 0 to 100, as sacrebleu computes it.

    said, wanted: tokens or words. An order without any match counts as half a match, the next such
    order as a quarter, and so on (sacrebleu's "exp"); one that no sentence is long enough for
    makes it 0. Source: Papineni et al. (2002); Post (2018).
    """
    made, needed = (sum(map(len, texts)) for texts in (said, wanted))
    logs, smoothed = 0.0, 1
    for n in range(1, order + 1):
        matches, total = map(sum, zip(*[_matches(s, w, n) for s, w in zip(said, wanted)]))
        if not total:
            return 0.0
        if not matches:
            smoothed *= 2
        logs += math.log((matches or 1 / smoothed) / total) / order
    shorter = min(0.0, 1 - needed / made)  # the brevity penalty's logarithm
    return 100 * math.exp(logs + shorter)


def _matches(said: Sequence, wanted: Sequence, n: int) -> tuple[int, int]:
    """How many n-grams of what is said are wanted, each as often as it is, and of how many."""
    ours, theirs = (
        Counter(tuple(text[at : at + n]) for at in range(len(text) - n + 1))
        for text in (said, wanted)
    )
    return (ours & theirs).total(), ours.total()


# What lies around a vector.


def between(first: Tensor, second: Tensor, shares: Sequence[float]) -> Tensor:
    """(len(shares), dim): on the line from the first z to the second, by the second's shares."""
    weight = torch.as_tensor(shares, dtype=first.dtype, device=first.device)[:, None]
    return (1 - weight) * first + weight * second


@torch.no_grad()
def survival(
    model: nn.Module,
    z: Tensor,
    sentences: Sequence[Sequence[int]],
    scales: Sequence[float],
    where: str = "embedding",
    *,
    draws: int = 4,
    start: Sequence[int] = (0,),
    seed: int = 0,
) -> list[float]:
    """The share of sentences that are still recovered when noise is added to their z.

    scales: length of the noise beside that of z; one share comes back for each. draws: directions
    that are tried, of each sentence.
    """
    before, wanted = (part.repeat(draws, 1).to(z.device) for part in padded(sentences, start))
    noise = torch.randn(len(wanted), z.shape[1], generator=torch.Generator().manual_seed(seed))
    here = z.repeat(draws, 1)
    away = F.normalize(noise.to(z.device)) * here.norm(dim=1, keepdim=True)
    lengths = (wanted != IGNORED).sum(1)
    kept = []
    for scale in scales:
        _, right = surprise(model, here + scale * away, before, wanted, where, len(start) - 1)
        kept.append(float((right == lengths).float().mean()))
    return kept
