"""`python -m lablib bench training`: what `fit` and `GPT` cost, and a step of LoRA."""

import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
from torch import nn

from lablib.data import Batches
from lablib.models import GPT, GPTConfig, anatomy, pretrained, to_hf
from lablib.peft.adapter import freeze_base_
from lablib.peft.lora import lora_
from lablib.resources import measure
from lablib.training import adamw, fit, next_token_loss

SIZES = {
    "0.1M": GPTConfig(vocab_size=256, dim=64, n_layers=2, n_heads=4, max_length=64),
    "1M": GPTConfig(vocab_size=1024, dim=128, n_layers=4, n_heads=4, max_length=128),
}


def bare_loop(model: nn.Module, data: Batches, steps: int) -> float:
    """Seconds of the same training written out: AdamW, clipping, a schedule, the loss read."""
    optimizer = adamw(fused=True)(model)
    plan = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    losses = []
    start = time.perf_counter()
    for _, batch in zip(range(steps), data):
        loss = next_token_loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        plan.step()
        losses.append(loss.item())
    return time.perf_counter() - start


class _Logits(nn.Module):
    """transformers' model as a function of tokens to logits."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        self.model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.dim,
                intermediate_size=config.ffn_dim,
                num_hidden_layers=config.n_layers,
                num_attention_heads=config.n_heads,
                max_position_embeddings=config.max_length,
                tie_word_embeddings=config.tied,
            )
        )

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model(tokens, use_cache=False).logits


STEPS = {"0.1M": 150, "1M": 25}


def bench_training(repeats: int = 9, steps: int | None = None) -> dict[str, dict[str, float]]:
    """Time `fit`, a bare loop and transformers' Llama in the same bare loop, in turn, and print it.

    steps: of each run, the Trainer's start included; STEPS by size without it.
    Returns the median seconds a step of each size and way. What is compared takes turns, so that a
    busy machine slows all alike; a printed ratio is the median over rounds of the ratio within one.
    """
    table = {}
    for name, config in SIZES.items():
        data = Batches(torch.randint(config.vocab_size, (40_000,)), 16, config.max_length)
        ways: dict[str, Callable[[int], float]] = {
            "bare loop": lambda n, c=config, d=data: bare_loop(GPT(c), d, n),
            "fit": lambda n, c=config, d=data: fit(GPT(c), d, steps=n, progress=False).seconds,
            "transformers, bare loop": lambda n, c=config, d=data: bare_loop(_Logits(c), d, n),
        }
        for way in ways.values():
            way(3)
        times = {key: [] for key in ways}
        for _ in range(repeats):
            for key, way in ways.items():
                times[key].append(way(steps or STEPS[name]) / (steps or STEPS[name]))
        medians = {key: statistics.median(values) for key, values in times.items()}
        table[name] = medians
        for key, seconds in medians.items():
            pairs = zip(times[key], times["bare loop"])
            ratio = statistics.median(own / bare for own, bare in pairs)
            print(f"{name:5} {key:24} {1e3 * seconds:7.2f} ms a step, {ratio:5.2f} x bare")
    return table


ROLES = ("query", "value")
PEERS = ["q_proj", "v_proj"]  # the same by transformers' names


def bench_lora(
    name: str = "smollm2-135m-instruct", repeats: int = 5, rank: int = 8, length: int = 64
) -> dict[str, float]:
    """Time a training step with LoRA in turn: peft's and ours on transformers' Llama, ours on GPT.

    Two rows of so many tokens, query and value. Returns the median seconds of each; a printed ratio
    is the median over rounds of the ratio to peft's, where that package is installed.
    """
    rows = torch.randint(1000, (2, length + 1))
    steps = {way: _lora_step(model, rows) for way, model in _adapted(name, rank).items()}
    measure(steps, 1)
    times = measure(steps, repeats)
    first = next(iter(times))
    for way, seconds in times.items():
        ratio = statistics.median(own / peer for own, peer in zip(seconds, times[first]))
        print(f"LoRA  {way:26} {1e3 * statistics.median(seconds):7.1f} ms a step, {ratio:5.2f} x")
    return {way: statistics.median(seconds) for way, seconds in times.items()}


def _adapted(name: str, rank: int) -> dict[str, nn.Module]:
    from transformers import AutoModelForCausalLM

    ours, _ = pretrained(name)
    with tempfile.TemporaryDirectory() as folder:
        to_hf(ours, folder)
        theirs = [AutoModelForCausalLM.from_pretrained(folder).float() for _ in range(2)]
    models = {}
    if importlib.util.find_spec("peft") is not None:
        import peft

        config = peft.LoraConfig(r=rank, target_modules=PEERS)
        models["peft, transformers' Llama"] = peft.get_peft_model(theirs[0], config)
    for way, model in {"lora_, transformers' Llama": theirs[1], "lora_, GPT": ours}.items():
        lora_(model, ROLES, rank)
        freeze_base_(model)
        models[way] = model
    return models


def _lora_step(model: nn.Module, rows: torch.Tensor) -> Callable[[], None]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        logits = anatomy.logits(model, rows[:, :-1])
        nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).backward()
        optimizer.step()

    return step
