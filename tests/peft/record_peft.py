"""Write peft.safetensors: what peft computes with methods that the catalogue has, too.

For an environment with peft, of which 0.21.0 was run:
    python tests/peft/record_peft.py data/published/peft.safetensors
"""

import copy
import json
import sys

import peft
import torch
import transformers
from peft.optimizers import create_lorafa_optimizer
from record_merge import METHODS, SCALE, SIZES, WHERE, base
from record_merge import OURS as MERGED
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

ROWS = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
WRITTEN = {
    "encoder_reparameterization_type": "LSTM",
    "encoder_hidden_size": 5,
    "encoder_dropout": 0.0,
}
LEAVES = METHODS | {
    "LoRA-FA": peft.LoraConfig(r=3, lora_alpha=6, **WHERE),  # an optimizer freezes the half
    "AdaLoRA": peft.AdaLoraConfig(init_r=3, lora_alpha=6, total_step=10, **WHERE),
    "(IA)3": peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "norms": peft.LNTuningConfig(),
    "prompt": peft.PromptTuningConfig(**ROWS),
    "prefix": peft.PrefixTuningConfig(**ROWS),
    "P-tuning": peft.PromptEncoderConfig(**ROWS, **WRITTEN),
}
OURS = MERGED | {  # the end of its names -> lablib's
    "lora_B.default": "left",
    "lora_E.default": "values",
    "lora_A.default": "right",
    "ia3_l.default": "scale",
    "ln_tuning_layers.default.weight": "weight",
}
OF_A_PROMPT = {"embedding.weight": "rows"}
OF_P_TUNING = {"embedding.weight": "table", "lstm_head.": "lstm."}
OF_P_TUNING |= {"mlp_head.0.": "inner.", "mlp_head.2.": "outer."}


@torch.no_grad()
def leaf(model: LlamaForCausalLM, tokens: torch.Tensor, kind: str) -> tuple[dict, int]:
    """A method's weights, drawn anew, and its logits of the tokens; and how many numbers train."""
    adapted = peft.get_peft_model(copy.deepcopy(model), LEAVES[kind]).eval()
    if kind == "LoRA-FA":
        create_lorafa_optimizer(adapted, r=3, lora_alpha=6, lr=1e-3)
    trained = [p for n, p in adapted.named_parameters() if p.requires_grad and "ranknum" not in n]
    found = {}
    for name, parameter in adapted.named_parameters():
        if "ranknum" in name:
            parameter -= 1e-5  # which peft adds before it divides by the number of ranks
        elif "prompt_encoder" in name or any(name.endswith(f".{end}") for end in OURS):
            parameter.add_(SCALE * torch.randn_like(parameter))
            found |= named(kind, name, parameter)
    if kind == "VeRA":
        found |= {"down": adapted.vera_A["default"], "up": adapted.vera_B["default"]}
    if kind == "norms":
        found |= slopes(adapted, tokens)
    return found | {"output": logits(adapted, tokens, kind)}, sum(p.numel() for p in trained)


@torch.enable_grad()
def slopes(adapted: torch.nn.Module, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """ "slope of " and lablib's name -> the gradient of the next tokens' mean loss."""
    trained = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    made = adapted(tokens[:, :-1]).logits.transpose(1, 2)
    loss = torch.nn.functional.cross_entropy(made, tokens[:, 1:])
    found = torch.autograd.grad(loss, list(trained.values()))
    names = [next(iter(named("norms", name, p))) for name, p in trained.items()]
    return {f"slope of {name}": slope for name, slope in zip(names, found, strict=True)}


def named(kind: str, name: str, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """lablib's place and name -> its part of a parameter."""
    own = name.removeprefix("prompt_encoder.default.")
    if kind == "prefix":  # keys and values of each block, side by side
        parts = parameter.chunk(2 * SIZES["num_hidden_layers"], 1)
        of = ((i // 2, ("keys", "values")[i % 2]) for i in range(len(parts)))
        return {f"model.layers.{b}.self_attn.prefix:{n}": p for (b, n), p in zip(of, parts)}
    if own != name:
        for theirs, ours in (OF_P_TUNING if kind == "P-tuning" else OF_A_PROMPT).items():
            own = own.replace(theirs, ours)
        return {f"model.prompt:{own}": parameter}
    end = next(end for end in OURS if name.endswith(f".{end}"))
    place = name.removeprefix("base_model.model.").removesuffix(f".{end}")
    return {f"{place}:{OURS[end]}": parameter}


def logits(adapted: torch.nn.Module, tokens: torch.Tensor, kind: str) -> torch.Tensor:
    """Of the text's tokens alone, which begin at position 0 behind a prefix, as in lablib."""
    n, length = ROWS["num_virtual_tokens"], tokens.shape[1]
    if kind == "prefix":
        return adapted(tokens, position_ids=torch.arange(length).expand_as(tokens) - n).logits
    return adapted(tokens).logits[:, -length:]


def record(file: str) -> None:
    """All of it."""
    model, counts = base(), {}
    tokens = torch.randint(20, (3, 7), generator=torch.Generator().manual_seed(1))
    tensors = {f"base:{name}": p for name, p in model.state_dict().items()} | {"tokens": tokens}
    for seed, kind in enumerate(LEAVES):
        torch.manual_seed(seed)
        found, counts[kind] = leaf(model, tokens, kind)
        tensors |= {f"{kind}:{name}": tensor for name, tensor in found.items()}
    tensors = {name: t.detach().contiguous().clone() for name, t in tensors.items()}
    versions = {"peft": peft.__version__, "transformers": transformers.__version__}
    header = {"versions": versions, "config": SIZES, "counts": counts}
    save_file(tensors, file, metadata={key: json.dumps(value) for key, value in header.items()})


if __name__ == "__main__":
    record(sys.argv[1])
