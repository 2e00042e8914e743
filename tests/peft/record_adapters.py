"""Write adapters.safetensors: what the Adapters library computes, with weights that are not new.

For an environment of its own, since the library wants an older transformers:
    python -m venv peer && peer/bin/pip install adapters==1.3.0 transformers==4.57.6 torch
    peer/bin/python tests/peft/record_adapters.py data/published/adapters.safetensors
"""

import json
import sys

import adapters
import torch
import transformers
from adapters import composition as ac
from safetensors.torch import save_file
from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel

SIZES = {
    "vocab_size": 20,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 12,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
PREFIX = {"prefix_length": 3, "bottleneck_size": 8}
SMALL = {  # each method at a size for width 32
    "seq_bn": adapters.SeqBnConfig(reduction_factor=4),
    "double_seq_bn": adapters.DoubleSeqBnConfig(reduction_factor=4),
    "par_bn": adapters.ParBnConfig(reduction_factor=4),
    "seq_bn_inv": adapters.SeqBnInvConfig(reduction_factor=4),
    "compacter": adapters.CompacterConfig(reduction_factor=4),
    "lora": adapters.LoRAConfig(r=3, alpha=3),
    "ia3": adapters.IA3Config(),
    "prefix_tuning": adapters.PrefixTuningConfig(**PREFIX),
    "prompt_tuning": adapters.PromptTuningConfig(prompt_length=3),
    "mam": adapters.MAMConfig(
        adapters.PrefixTuningConfig(**PREFIX), adapters.ParBnConfig(reduction_factor=4)
    ),
    "unipelt": adapters.UniPELTConfig(
        adapters.PrefixTuningConfig(**PREFIX),
        adapters.SeqBnConfig(reduction_factor=4),
        adapters.LoRAConfig(r=3, alpha=2),
    ),
}
SCALE = 0.4  # of what the weights of an adapter are moved by
BLOCKS = {
    "Stack(a, b)": ac.Stack("a", "b"),
    "Fuse(a, b)": ac.Fuse("a", "b"),
    "Split(a, b, sizes=[3, 4])": ac.Split("a", "b", splits=[3, 4]),
    "BatchSplit(a, b, sizes=[1, 3])": ac.BatchSplit("a", "b", batch_sizes=[1, 3]),
    "Parallel(a, b)": ac.Parallel("a", "b"),
    "Stack(a, Parallel(b, a))": ac.Stack("a", ac.Parallel("b", "a")),
    # This version divides by the number of adapters after weighing, so twice the weights are given.
    "Average(a, b, weights=[0.75, 0.25])": ac.Average(
        "a", "b", weights=[1.5, 0.5], normalize_weights=False
    ),
    "its own Average(a, b)": ac.Average("a", "b"),
    "Parallel(Stack(a, b), b)": ac.Parallel(ac.Stack("a", "b"), "b"),
}
COMPOSED = ("seq_bn", "double_seq_bn", "lora")
NOT_IN_LORA = ("Fuse", "Split", "Stack", "Parallel(Stack")  # or something else there


def base(kind: str = "") -> BertModel:
    """A BERT of two layers with weights of some size, to hold a method of this kind."""
    torch.manual_seed(0)
    # In the fused attention, this version lets a prompt's rows see padding.
    attention = "eager" if kind == "prompt_tuning" else "sdpa"
    config = BertConfig(**SIZES, initializer_range=0.3, attn_implementation=attention)
    model = BertModel(config, add_pooling_layer=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    adapters.init(model)
    return model.eval()


def inputs() -> dict[str, torch.Tensor]:
    """Four texts of seven tokens, one of them padded."""
    mask = torch.ones(4, 7, dtype=torch.long)
    mask[2, 5:] = 0
    tokens = torch.randint(2, 20, (4, 7), generator=torch.Generator().manual_seed(1))
    return {"input_ids": tokens, "attention_mask": mask}


def own(model: torch.nn.Module, before: set[str]) -> dict[str, torch.nn.Parameter]:
    """The parameters that came since; one that lies in several places once."""
    return {n: p for n, p in model.named_parameters() if n not in before}


@torch.no_grad()
def moved(model: torch.nn.Module, before: set[str], seed: int) -> dict[str, torch.Tensor]:
    """The same, drawn anew."""
    torch.manual_seed(seed)
    made = own(model, before)
    for parameter in made.values():
        parameter.add_(SCALE * torch.randn_like(parameter))
    return made


@torch.no_grad()
def output(model: torch.nn.Module) -> torch.Tensor:
    """States of the texts' tokens after the last layer."""
    return model(**inputs()).last_hidden_state[:, -7:]


def methods() -> dict[str, torch.Tensor]:
    """Weights and outputs of each method."""
    found = {}
    for kind, config in SMALL.items():
        model = base(kind)
        before = {n for n, _ in model.named_parameters()}
        model.add_adapter("a", config=config)
        model.set_active_adapters("a")
        model.eval()
        found |= {f"{kind}:{n}": p for n, p in moved(model, before, 3).items()}
        found[f"{kind}:output"] = output(model)
    return found


def compositions() -> dict[str, torch.Tensor]:
    """Weights of two adapters and, once, a fusion; outputs of each composition."""
    found = {}
    for kind in COMPOSED:
        model = base()
        for seed, name in enumerate(("a", "b")):
            before = {n for n, _ in model.named_parameters()}
            model.add_adapter(name, config=SMALL[kind])
            found |= {f"{kind}:{name}:{n}": p for n, p in moved(model, before, seed).items()}
        if kind == "seq_bn":
            before = {n for n, _ in model.named_parameters()}
            model.add_adapter_fusion(ac.Fuse("a", "b"))
            found |= {f"{kind}:fusion:{n}": p for n, p in moved(model, before, 5).items()}
        for text, block in BLOCKS.items():
            lacks = text.startswith(NOT_IN_LORA) if kind == "lora" else False
            if lacks or (text.startswith("Fuse") and kind != "seq_bn"):
                continue
            model.set_active_adapters(block)
            model.eval()
            found[f"{kind}:{text}"] = output(model)
    return found


def counts() -> dict[str, int]:
    """Numbers that train at the library's own sizes, at the shapes of RoBERTa-base."""
    found = {}
    for kind in SMALL:
        model = RobertaModel(RobertaConfig(vocab_size=20), add_pooling_layer=False)
        adapters.init(model)
        model.add_adapter("a", config=kind)
        model.train_adapter("a")
        found[kind] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return found


def record(file: str) -> None:
    """All of it."""
    model = base()
    tensors = {f"base:{n}": p for n, p in model.named_parameters()}
    tensors |= inputs() | methods() | compositions()
    header = {
        "versions": {"adapters": adapters.__version__, "transformers": transformers.__version__},
        "config": SIZES,
        "counts": counts(),
    }
    tensors = {n: t.detach().contiguous().clone() for n, t in tensors.items()}
    save_file(tensors, file, metadata={key: json.dumps(value) for key, value in header.items()})


if __name__ == "__main__":
    record(sys.argv[1])
