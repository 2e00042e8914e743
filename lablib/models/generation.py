"""Continue a text: greedy, temperature, top-k and top-p (nucleus) sampling.

Source: top-k of Fan et al. (2018), nucleus sampling of Holtzman et al. (2020), section 3.1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lablib.modes import kept_modes

COLDEST = 1e-20  # a lower temperature draws the same, but its quotients could leave float32


def next_token_probabilities(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """The distribution that the next token is drawn from.

    logits: (..., vocab). Returns probabilities of the same shape, rows sum to 1.
    temperature: divides the logits; 0 puts all mass on the largest.
    top_k: keeps the k most probable tokens. top_p: keeps the smallest set of most probable
    tokens whose mass reaches top_p. With both, top_k comes first.
    Raises ValueError for a temperature that is negative or not finite, top_k below 1, top_p
    outside (0, 1], or a row whose largest logit is not finite.
    """
    _check_options(temperature, top_k, top_p)
    logits = logits.float()
    _check_finite(logits)
    if temperature == 0:
        return torch.zeros_like(logits).scatter(-1, logits.argmax(-1, keepdim=True), 1.0)
    probabilities = (logits / max(temperature, COLDEST)).softmax(-1)
    if top_k is not None:
        probabilities = _keep_top_k(probabilities, top_k)
    if top_p is not None and top_p < 1:  # at 1 a rounded sum would drop the last ones
        probabilities = _keep_top_p(probabilities, top_p)
    return probabilities


def _check_options(temperature: float, top_k: int | None, top_p: float | None) -> None:
    if temperature < 0:
        raise ValueError(f"temperature {temperature} is negative; 0 is greedy, 1 samples as is")
    if not math.isfinite(temperature):
        raise ValueError(f"temperature {temperature} is not finite; give 0 or more")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k {top_k} keeps no token; give 1 or more, or None for all")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p {top_p} is not in (0, 1]")


def _check_finite(logits: Tensor) -> None:
    largest = logits.amax(-1)  # nan where any logit is
    if not largest.isfinite().all():
        bad = largest[~largest.isfinite()][0].item()
        raise ValueError(
            f"the largest logit of a row is {bad}, so no token can be chosen; "
            "look for nan or infinity in the model's weights"
        )


def _keep_top_k(probabilities: Tensor, k: int) -> Tensor:
    kept, index = probabilities.topk(min(k, probabilities.shape[-1]), dim=-1)
    kept = kept / kept.sum(-1, keepdim=True)
    return torch.zeros_like(probabilities).scatter(-1, index, kept)


def _keep_top_p(probabilities: Tensor, p: float) -> Tensor:
    ordered, index = probabilities.sort(descending=True, dim=-1)
    before = ordered.cumsum(-1) - ordered  # mass of the more probable tokens
    ordered = ordered.masked_fill(before >= p, 0.0)
    ordered = ordered / ordered.sum(-1, keepdim=True)
    return torch.zeros_like(probabilities).scatter(-1, index, ordered)


@torch.no_grad()
def generate(
    model,
    tokens: Tensor | Sequence[int],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    greedy: bool = False,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    eos: int | None = None,
    use_cache: bool = True,
) -> Tensor:
    """Prompt and continuation: (batch, length + up to max_new_tokens), or 1-D for a 1-D prompt.

    tokens: (batch, length) or (length,) int64, or a list of ids; rows have one length.
    seed or generator: make the draw reproducible (a seed makes a generator of its own).
    eos: a row that has drawn it goes on with it; when all have, generation stops.
    use_cache: False runs the whole text again for every token: the same result, slower. A mixture
        of experts keeps that promise when it drops no token in eval mode, `TokenChoice`'s default;
        with an eval_capacity_factor, or experts that choose tokens, it can't.
    Raises ValueError for an empty prompt, a negative max_new_tokens, a text longer than the model's
    max_length, and as `next_token_probabilities` does, for logits that are nan among others.
    """
    prompt = torch.as_tensor(tokens, dtype=torch.long, device=model.embedding.weight.device)
    text = prompt.view(1, -1) if prompt.ndim == 1 else prompt
    end = text.shape[1] + max_new_tokens
    _check_lengths(text.shape[1], end, model.config.max_length)
    if generator is None and seed is not None:
        generator = torch.Generator(text.device).manual_seed(seed)
    temperature = 0.0 if greedy else temperature
    with kept_modes(model):
        model.eval()
        cache = model.new_cache(end) if use_cache else None
        new, done = text, torch.zeros(len(text), dtype=torch.bool, device=text.device)
        for _ in range(max_new_tokens):
            states = model.hidden_states(new if use_cache else text, cache)
            logits = model.head(states[:, -1])
            new = _draw(logits, temperature, top_k, top_p, generator)  # (batch, 1)
            if eos is not None:
                new = torch.where(done[:, None], eos, new)
                done |= new[:, 0] == eos
            text = torch.cat([text, new], 1)  # (batch, length + 1)
            if eos is not None and done.all():
                break
    return text[0] if prompt.ndim == 1 else text


def _check_lengths(prompt: int, end: int, max_length: int) -> None:
    if prompt == 0:
        raise ValueError("the prompt is empty; start from one token, for example the tokenizer's")
    if end < prompt:
        raise ValueError(f"max_new_tokens {end - prompt} is negative")
    if end > max_length:
        raise ValueError(
            f"{end} tokens are more than the model's max_length {max_length}; "
            "shorten the prompt or max_new_tokens"
        )


def _draw(logits, temperature, top_k, top_p, generator) -> Tensor:
    """One token a row: (batch, vocab) -> (batch, 1)."""
    if temperature == 0:
        _check_options(temperature, top_k, top_p)
        _check_finite(logits)
        return logits.argmax(-1, keepdim=True)
    probabilities = next_token_probabilities(logits, temperature, top_k, top_p)
    return torch.multinomial(probabilities, 1, generator=generator)
