"""Write merge.safetensors: what peft computes once a method's change is written into the weights.

For an environment with peft, of which 0.21.0 was run:
    python tests/peft/record_merge.py data/published/merge.safetensors
"""

import copy
import json
import sys

import peft
import torch
import transformers
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
WHERE = {"target_modules": ["q_proj", "v_proj"]}
METHODS = {
    "LoRA": peft.LoraConfig(r=3, lora_alpha=6, **WHERE),
    "DoRA": peft.LoraConfig(r=3, lora_alpha=6, use_dora=True, **WHERE),
    "VeRA": peft.VeraConfig(r=5, d_initial=0.1, **WHERE),
    "KronA": peft.LoKrConfig(r=16, alpha=16, decompose_both=False, **WHERE),  # factors are whole
}
OURS = {  # its names -> those of lablib
    "lora_A.default.weight": "down",
    "lora_B.default.weight": "up",
    "lora_magnitude_vector.default.weight": "magnitude",
    "vera_lambda_b.default": "b",
    "vera_lambda_d.default": "d",
    "lokr_w1.default": "a",
    "lokr_w2.default": "b",
}
SCALE = 0.3  # of what the weights of a method are moved by


def base() -> LlamaForCausalLM:
    """A Llama of two layers with weights of some size."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.3)).eval()


@torch.no_grad()
def merged(model: LlamaForCausalLM, tokens: torch.Tensor, config) -> dict[str, torch.Tensor]:
    """A method's weights, drawn anew; outputs before and after it is merged."""
    adapted, found = peft.get_peft_model(copy.deepcopy(model), config).eval(), {}
    for name, parameter in adapted.named_parameters():
        place, own = _parts(name)
        if own in OURS:
            parameter.add_(SCALE * torch.randn_like(parameter))
            found[f"{place}:{OURS[own]}"] = parameter.clone()
    if isinstance(config, peft.VeraConfig):
        found |= {"down": adapted.vera_A["default"], "up": adapted.vera_B["default"]}
    found["before"] = adapted(tokens).logits
    found["merged"] = adapted.merge_and_unload()(tokens).logits
    return found


def _parts(name: str) -> tuple[str, str]:
    """The layer that a parameter belongs to, and its own name."""
    place, proj, own = name.removeprefix("base_model.model.").partition("_proj")
    return place + proj, own.removeprefix(".")


def record(file: str) -> None:
    """All of it."""
    model = base()
    tokens = torch.randint(20, (3, 7), generator=torch.Generator().manual_seed(1))
    tensors = {f"base:{name}": p for name, p in model.state_dict().items()} | {"tokens": tokens}
    for seed, (kind, config) in enumerate(METHODS.items()):
        torch.manual_seed(seed)
        tensors |= {f"{kind}:{n}": t for n, t in merged(model, tokens, config).items()}
    tensors = {name: t.detach().contiguous().clone() for name, t in tensors.items()}
    versions = {"peft": peft.__version__, "transformers": transformers.__version__}
    header = {"versions": json.dumps(versions), "config": json.dumps(SIZES)}
    save_file(tensors, file, metadata=header)


if __name__ == "__main__":
    record(sys.argv[1])
