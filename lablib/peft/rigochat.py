"""RigoChat 2 (Santamaría Gómez et al., 2025): a chat model made better at Spanish, by DPO and LoRA.

Lab 710. Direct preference optimization (Rafailov et al., 2023) reads pairs of answers to a prompt,
a chosen and a rejected one, and widens the gap between their log-probabilities, measured from where
a frozen reference has it (its equation 7). With LoRA the reference is the same model with its
adapters switched off, so there is one copy of the weights; what it says of a fixed set of pairs
never changes, and is computed once.

The pairs here are translations of the same message: Spanish is chosen, a near language, or the
message untranslated, is rejected. The paper's own pairs are private.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lablib.data.tasks import parallel
from lablib.models import GPT, GPTConfig, anatomy
from lablib.modes import kept_modes
from lablib.peft.adapter import disabled, freeze_base_, n_trainable
from lablib.peft.lora import lora_

BETA = 0.1  # a choice of ours; the paper's was not found


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float = BETA,
) -> Tensor:
    """How little the policy prefers what was chosen, beyond the reference: log 2 where it is equal.

    All: (pairs,), log-probabilities of whole answers. Returns a mean over pairs, in nats.
    Source: equation 7 of Rafailov et al. (2023).
    """
    chosen = policy_chosen - reference_chosen  # log pi(y_w) / pi_ref(y_w)
    rejected = policy_rejected - reference_rejected  # log pi(y_l) / pi_ref(y_l)
    return -F.logsigmoid(beta * (chosen - rejected)).mean()


def answer_log_probability(model: nn.Module, rows: Tensor, is_answer: Tensor) -> Tensor:
    """log pi(answer | prompt) of each row, in nats: (batch,).

    rows: (batch, length) of prompt, answer, padding; is_answer: the same shape, bool.
    Padding on the right changes nothing under causal attention.
    """
    logits = anatomy.logits(model, rows[:, :-1]).float()  # -> (batch, length - 1, vocab)
    each = -F.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none")
    return (each * is_answer[:, 1:]).sum(1)  # sum over the answer of log p(token | all before)


class Preference(NamedTuple):
    """Two answers to a prompt. language: of the rejected one."""

    prompt: str
    chosen: str
    rejected: str
    language: str


class Rows(NamedTuple):
    """Encoded pairs: tokens (pairs, 2, length), chosen first; is_answer (pairs, 2, length) bool."""

    tokens: Tensor
    is_answer: Tensor

    def pick(self, places: Tensor) -> Rows:
        """Some of the pairs, without the padding that all of them have."""
        tokens, is_answer = self.tokens[places], self.is_answer[places]
        longest = int(is_answer.any(0).any(0).nonzero().max()) + 1
        return Rows(tokens[..., :longest], is_answer[..., :longest])


def encode(tokenizer, pairs: Sequence[Preference]) -> Rows:
    """Prompts with either answer, which ends with the line. Raises ValueError for none."""
    if not pairs:
        raise ValueError("there is no pair to encode")
    prompts = [tokenizer.encode(pair.prompt) for pair in pairs]
    answers = [[tokenizer.encode(f" {a}\n") for a in (p.chosen, p.rejected)] for p in pairs]
    longest = max(len(p) + len(a) for p, two in zip(prompts, answers) for a in two)
    tokens = torch.zeros(len(pairs), 2, longest, dtype=torch.long)
    is_answer = torch.zeros(len(pairs), 2, longest, dtype=torch.bool)
    for place, (prompt, two) in enumerate(zip(prompts, answers)):
        for side, answer in enumerate(two):
            end = len(prompt) + len(answer)
            tokens[place, side, :end] = torch.tensor(prompt + answer)
            is_answer[place, side, len(prompt) : end] = True
    return Rows(tokens, is_answer)


def log_probabilities(model: nn.Module, rows: Rows) -> Tensor:
    """log pi of both answers of each pair: (pairs, 2), chosen first."""
    flat = answer_log_probability(model, rows.tokens.flatten(0, 1), rows.is_answer.flatten(0, 1))
    return flat.view(-1, 2)


def score(model: nn.Module, rows: Rows, batch: int = 16) -> Tensor:
    """The same for many pairs, without gradients."""
    order = rows.is_answer.any(1).flip(-1).int().argmax(-1).argsort()  # pairs of a length together
    found = torch.empty(len(order), 2)
    with kept_modes(model), torch.no_grad():
        model.eval()
        for places in order.split(batch):
            found[places] = log_probabilities(model, rows.pick(places))
    return found


def reference_scores(model: nn.Module, rows: Rows, batch: int = 16) -> Tensor:
    """What the model said before its adapters, of both answers of each pair: (pairs, 2).

    No second copy of the weights: the adapters are switched off for as long as this takes.
    """
    with disabled(model):
        return score(model, rows, batch)


def preference_loss(rows: Rows, reference: Tensor, beta: float = BETA):
    """`dpo_loss` as a function of (model, places of pairs), for a loop that trains.

    reference: (pairs, 2), of `reference_scores`.
    """

    def loss(model: nn.Module, places: Tensor) -> Tensor:
        policy, fixed = log_probabilities(model, rows.pick(places)), reference[places]
        return dpo_loss(policy[:, 0], policy[:, 1], fixed[:, 0], fixed[:, 1], beta)

    return loss


def supervised_loss(rows: Rows):
    """Nats a token of the chosen answers, as a function of (model, places): the rival of DPO."""

    def loss(model: nn.Module, places: Tensor) -> Tensor:
        picked = rows.pick(places)
        said = answer_log_probability(model, picked.tokens[:, 0], picked.is_answer[:, 0])
        return -said.sum() / picked.is_answer[:, 0].sum()

    return loss


def adapt_(model: nn.Module, rank: int, seed: int = 0) -> None:
    """Put fresh adapters on all projections, that alone train. seed: of their first values."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        lora_(model, rank=rank)
    freeze_base_(model)


# Pairs of answers from parallel text.

SPANISH, ENGLISH = "es", "en"
REJECTED = ("pt", "pt_BR", "ca", "it", "fr", ENGLISH)  # the untranslated last
LANGUAGES = {
    "es": "Spanish",
    "pt": "Portuguese",
    "pt_BR": "Portuguese (Brazil)",
    "ca": "Catalan",
    "it": "Italian",
    "fr": "French",
    "en": "English",
}
LONGEST = 60  # letters of a message


def messages() -> list[dict[str, str]]:
    """Messages of Django and Wagtail in all of LANGUAGES: one {language: text} each.

    All catalogues of both programs; messages of two words and more, none longer than LONGEST.
    """
    codes = [language for language in LANGUAGES if language != ENGLISH]
    rows = [dict(zip((ENGLISH, *codes), row)) for part in parallel(codes) for row in part]
    return [row for row in rows if max(map(len, row.values())) <= LONGEST]


def prompt_of(message: str) -> str:
    """What is asked."""
    return f"English: {message}\nSpanish:"


def preferences(
    rows: Iterable[Mapping[str, str]], rejected: Sequence[str] = REJECTED
) -> list[Preference]:
    """Every pair of these messages, those left out whose two answers are the same."""
    return [
        Preference(prompt_of(row[ENGLISH]), row[SPANISH], row[language], language)
        for row in rows
        for language in rejected
        if row[language] != row[SPANISH]
    ]


def split(rows: Sequence, held_out: int, seed: int) -> tuple[list, list]:
    """Messages to train on and to hold out, so that no message is on both sides."""
    order = random.Random(seed).sample(range(len(rows)), len(rows))
    return [rows[i] for i in order[held_out:]], [rows[i] for i in order[:held_out]]


def answer(model: GPT, tokenizer, message: str, n: int = 12) -> str:
    """What a model puts a message into, the most probable token at each place, on one line."""
    ids = tokenizer.encode(prompt_of(" ".join(message.split())))
    new = model.generate(ids, n, greedy=True)[len(ids) :]
    return tokenizer.decode(new).strip().partition("\n")[0]


# A judge that needs no network.


def profiles(texts: Mapping[str, Iterable[str]]) -> dict[str, Counter]:
    """Language -> how often each run of three letters stands in its texts."""
    return {name: Counter(g for t in many for g in _trigrams(t)) for name, many in texts.items()}


def language_of(text: str, known: Mapping[str, Counter]) -> str:
    """The language under which a text's runs of three letters are most probable."""
    kinds = len(set().union(*known.values()))

    def likelihood(name: str) -> float:
        counts, total = known[name], known[name].total() + kinds  # one more of each: none is 0
        seen = torch.tensor([(counts[g] + 1) / total for g in _trigrams(text)])
        return float(seen.log().sum())

    return max(known, key=likelihood)


def _trigrams(text: str) -> list[str]:
    padded = f" {text.strip().lower()} "
    return [padded[i : i + 3] for i in range(len(padded) - 2)]


# What it takes to hold, at the paper's size.

QWEN = GPTConfig(
    vocab_size=152_064,
    dim=3584,
    n_layers=28,
    n_heads=28,
    n_kv_heads=4,
    ffn_dim=18_944,
    qkv_bias=True,
    tied=False,
)  # Qwen2.5-7B-Instruct's configuration


def parameters(config: GPTConfig = QWEN, rank: int = 0) -> int:
    """Of a model, or of LoRA on all its projections at a rank; no memory is taken."""
    with torch.device("meta"):
        model = GPT(config)
        if not rank:
            return model.n_parameters()
        lora_(model, rank=rank)
    return n_trainable(model)


def gigabytes(base: int, trained: int, copies: int) -> dict[str, float]:
    """What training holds beside activations, by account, in units of 1e9 bytes.

    base: parameters of the model, bfloat16; trained: how many numbers train, in float32 where they
    are adapters, each with a gradient and Adam's two means; where the base itself trains, a float32
    copy of it. copies: of the base, 2 with a reference of its own.
    """
    return {
        "model": 2 * base / 1e9,
        "reference": 2 * base * (copies - 1) / 1e9,
        "trained, float32": 4 * trained / 1e9,
        "gradients": 4 * trained / 1e9,
        "Adam's two means": 8 * trained / 1e9,
    }
