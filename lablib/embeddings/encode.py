"""One vector a text, out of any language model: which layer, which tokens, with which prompt.

    e = sum_t w_t h_t^(l) / sum_t w_t,    w_t >= 0 and zero on padding

h^(l) are the states after block l. A pooling is a choice of w; a prompt puts words around the text
before it is read. In a decoder token t sees only what comes before it, so the last token alone has
seen the whole text (`bidirectional` lifts that), and its first token, which sees nothing but
itself, carries a huge activation in the middle layers that spoils a plain mean.
Sources: Reimers and Gurevych (2019) for the mean, Muennighoff (2022) for position weights, Sun et
al. (2024) for the first token's massive activations.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lablib.models import anatomy
from lablib.models.classifier import Encoded, last_states
from lablib.models.gpt import GPT
from lablib.modes import kept_modes

DECODERS = ("GPT", "Llama", "GPT-2")
POOLINGS = ("mean", "mean-but-first", "weighted-mean", "last", "first")


def weights(mask: Tensor, pooling: str) -> Tensor:
    """What each token counts: mask (n, length) bool -> (n, length) float32, zero on padding.

    A text of one token is pooled from that token, whatever the pooling.
    Raises ValueError for another pooling than POOLINGS.
    """
    place = torch.arange(mask.shape[1], device=mask.device)
    last = mask.sum(1, keepdim=True) - 1
    if pooling == "mean":
        chosen = mask.float()
    elif pooling == "mean-but-first":
        chosen = (mask & ((place > 0) | (last == 0))).float()
    elif pooling == "weighted-mean":  # w_t = t, counted from 1
        chosen = mask * (place + 1.0)
    elif pooling == "last":
        chosen = (place == last).float()
    elif pooling == "first":
        chosen = mask * (place == 0).float()
    else:
        raise ValueError(f"{pooling!r} is no pooling: {', '.join(POOLINGS)}")
    return chosen


def pool(states: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """(..., n, length, dim) -> (..., n, dim); a text without a token gives zeros."""
    w = weights(mask, pooling)[..., None].to(states.dtype)
    return (w * states).sum(-2) / w.sum(-2).clamp(min=1)


class Prompt(NamedTuple):
    """Words around a text, spaces included."""

    before: str = ""
    after: str = ""


NO_PROMPT = Prompt()


def tokenize(
    tokenizer, texts: Sequence[str], prompt: Prompt = NO_PROMPT, max_length: int = 128
) -> Encoded:
    """Each text within its prompt, as tokens, padded to the right.

    A text too long loses its end, its prompt never: the last token stays the prompt's.
    The whole is tokenized at once, so that no word is cut where prompt and text meet.
    Raises ValueError without texts, or when the prompt alone has max_length tokens.
    """
    if not texts:
        raise ValueError("there is no text to encode")
    whole = [prompt.before + text + prompt.after for text in texts]
    made = tokenizer(whole, verbose=False)["input_ids"]
    for place, ids in enumerate(made):
        if len(ids) > max_length:
            made[place] = _shortened(tokenizer, texts[place], prompt, max_length)
    return pad(made)


def _shortened(tokenizer, text: str, prompt: Prompt, max_length: int) -> list[int]:
    """Its tokens with as many of the text's last letters left out as it takes."""
    low, high = 0, len(text)  # low letters fit, high + 1 are not known to
    fits = tokenizer(prompt.before + prompt.after)["input_ids"]
    if len(fits) > max_length:
        raise ValueError(f"the prompt has {len(fits)} tokens, and max_length is {max_length}")
    while low < high:
        middle = (low + high + 1) // 2
        ids = tokenizer(prompt.before + text[:middle].rstrip() + prompt.after)["input_ids"]
        if len(ids) <= max_length:
            low, fits = middle, ids
        else:
            high = middle - 1
    return fits


def pad(rows: Sequence[Sequence[int]]) -> Encoded:
    """Rows of tokens as one batch, padded to the right with token 0."""
    mask = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.bool)
    tokens = torch.zeros_like(mask, dtype=torch.int64)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
        mask[row, : len(ids)] = True
    return Encoded(tokens, mask)


def hidden_layers(model: nn.Module, encoded: Encoded, causal: bool = True) -> Tensor:
    """(n_layers + 2, n, length, dim): the embeddings, each block's output, the final norm's.

    BERT, whose blocks end with a norm, has its last twice. One pass; differentiable.
    """
    kept: list[Tensor] = []
    blocks = anatomy.blocks(model)
    with contextlib.ExitStack() as stack:
        for block in blocks:
            stack.callback(block.register_forward_hook(_keeping(kept)).remove)
        first = blocks[0].register_forward_pre_hook(_keeping_input(kept), with_kwargs=True)
        stack.callback(first.remove)
        last = states(model, encoded, causal=causal)
    return torch.stack([*kept, last])


def _keeping(kept: list[Tensor]):
    def keep(module, args, output):
        kept.append(output[0] if isinstance(output, tuple) else output)

    return keep


def _keeping_input(kept: list[Tensor]):
    def keep(module, args, kwargs):
        kept.append(args[0] if args else kwargs["hidden_states"])

    return keep


class _Reached(Exception):
    """The wanted block has run; what comes after it is not computed."""


def states(
    model: nn.Module, encoded: Encoded, layer: int | None = None, causal: bool = True
) -> Tensor:
    """(n, length, dim) of one layer, counted as in `hidden_layers`; None is the final norm's.

    Blocks above the layer don't run. causal: False lets each token see all others of its text.
    Raises ValueError for a layer that the model doesn't have.
    """
    blocks = anatomy.blocks(model)
    if layer is not None and not 0 <= layer <= len(blocks):
        raise ValueError(f"layer {layer} is none of 0 (embeddings) to {len(blocks)}")
    with contextlib.nullcontext() if causal else bidirectional(model, encoded.mask):
        return last_states(model, encoded) if layer is None else _until(model, encoded, layer)


def _until(model: nn.Module, encoded: Encoded, layer: int) -> Tensor:
    kept: list[Tensor] = []
    blocks = anatomy.blocks(model)

    def stop(module, args, result):
        kept.append(result[0] if isinstance(result, tuple) else result)
        raise _Reached

    def stop_before(module, args, kwargs):
        kept.append(args[0] if args else kwargs["hidden_states"])
        raise _Reached

    if layer:
        handle = blocks[layer - 1].register_forward_hook(stop)
    else:
        handle = blocks[0].register_forward_pre_hook(stop_before, with_kwargs=True)
    try:
        with contextlib.suppress(_Reached):
            last_states(model, encoded)
    finally:
        handle.remove()
    return kept[0]


@contextlib.contextmanager
def bidirectional(model: nn.Module, mask: Tensor | None = None) -> Iterator[None]:
    """Within it a decoder's tokens see all tokens of their text, later ones too.

    mask: (n, length) bool of the batch that is encoded within; None where nothing is padding.
    For GPT, and transformers' Llama-like models and GPT-2; encoders see both ways anyway. At the
    end the model is what it was. Generation with a cache has no place within it.
    """
    if isinstance(model, GPT):
        attentions = [block.attention for block in model.blocks]
        for attention in attentions:
            attention.forward = functools.partial(_both_ways, attention, mask)
        try:
            yield
        finally:
            for attention in attentions:
                del attention.forward
        return
    if anatomy.family(model).name not in DECODERS:
        yield
        return
    handle = model.base_model.register_forward_pre_hook(_open_mask(mask), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _both_ways(attention: nn.Module, mask: Tensor | None, x: Tensor, rotary, cache=None) -> Tensor:
    """`Attention.forward` without the causal mask: x (n, length, dim) -> (n, length, dim)."""
    if cache is not None:
        raise ValueError("a cache holds only what came before: generate outside `bidirectional`")
    q, k, v = attention.heads(x, rotary)
    seen = None if mask is None else mask[:, None, None]  # (n, 1, 1, length): keys alone
    y = F.scaled_dot_product_attention(
        q, k, v, attn_mask=seen, enable_gqa=attention.n_heads != attention.n_kv_heads
    )  # (n, n_heads, length, head_dim)
    return attention.output(y.transpose(1, 2).flatten(2))


def _open_mask(mask: Tensor | None):
    """A hook that gives transformers a mask of four axes, which it takes as it is."""

    def put(module, args, kwargs):
        tokens = args[0] if args else kwargs["input_ids"]
        seen = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        hidden = ~seen[:, None, None].expand(-1, 1, tokens.shape[1], -1)  # (n, 1, length, length)
        dtype = next(module.parameters()).dtype
        added = hidden.to(dtype) * torch.finfo(dtype).min  # to the scores
        return args, {**kwargs, "attention_mask": added}

    return put


@dataclass(frozen=True)
class Encoder:
    """A model with all that makes vectors of texts; called with texts, it gives (n, dim) float32.

    pooling: of POOLINGS. layer: as in `hidden_layers`; None is the final norm's. causal: False lets
    a decoder see both ways. normalize: vectors of length 1, so that a product is the cosine.
    max_length: in tokens, prompt included. `dataclasses.replace(encoder, layer=20)` changes one
    thing.
    """

    model: nn.Module
    tokenizer: object
    pooling: str = "mean"
    layer: int | None = None
    prompt: Prompt = NO_PROMPT
    causal: bool = True
    normalize: bool = True
    max_length: int = 128

    def tokens(self, texts: Sequence[str]) -> Encoded:
        """The texts within the prompt, as tokens, on the model's device."""
        made = tokenize(self.tokenizer, texts, self.prompt, self.max_length)
        device = anatomy.embedding(self.model).weight.device
        return Encoded(*(part.to(device) for part in made))

    def vectors(self, encoded: Encoded) -> Tensor:
        """(n, dim), float32; differentiable."""
        found = states(self.model, encoded, self.layer, self.causal)  # (n, length, dim)
        pooled = pool(found, encoded.mask, self.pooling).float()  # (n, dim)
        return F.normalize(pooled, dim=-1) if self.normalize else pooled

    def __call__(self, texts: Sequence[str], batch_tokens: int = 2048) -> Tensor:
        """(n, dim) float32 on the CPU, without gradients and dropout, in the order of the texts.

        batch_tokens: of a batch, padding included; texts of like length share one.
        """
        encoded = self.tokens(texts)
        found: list[Tensor] = [torch.empty(0)] * len(texts)
        with torch.inference_mode(), kept_modes(self.model):
            self.model.eval()
            for places in batches(encoded.mask.sum(1).tolist(), batch_tokens):
                for place, vector in zip(places, self.vectors(encoded.at(places)).cpu()):
                    found[place] = vector
        return torch.stack(found)


def batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Places of the texts by batch, long ones first: in each, texts x longest <= budget.

    A text longer than the budget is a batch of its own.
    """
    made: list[list[int]] = []
    longest = 0
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        if not made or (len(made[-1]) + 1) * longest > budget:
            made.append([])
            longest = max(1, lengths[place])
        made[-1].append(place)
    return made
