"""Write rigochat_trl.safetensors: DPO's loss and gradients as trl's own trainer computes them.

For an environment of its own (`pip install trl`): python tests/peft/record_rigochat.py FILE
"""

import copy
import sys
import tempfile

import torch
import transformers
import trl
from datasets import Dataset
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

BETA = 0.3
SIZES = {
    "vocab_size": 23,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
PAIRS = [
    ("w1 w2 w3", "w4 w5", "w6"),
    ("w7", "w8 w9 w10 w11", "w12 w13"),
    ("w2 w2", "w14", "w15 w16 w17"),
]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Twenty words and three marks."""
    words = {f"w{i}": i for i in range(20)} | {"[PAD]": 20, "[EOS]": 21, "[UNK]": 22}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = {"pad_token": "[PAD]", "eos_token": "[EOS]", "unk_token": "[UNK]"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **marks)


def trainer(folder: str) -> DPOTrainer:
    """A policy that differs from its reference, and three pairs in one batch."""
    torch.manual_seed(0)
    policy = LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.4))
    reference = copy.deepcopy(policy)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    rows = [{"prompt": p, "chosen": f" {c}", "rejected": f" {r}"} for p, c, r in PAIRS]
    options = DPOConfig(
        output_dir=folder,
        beta=BETA,
        per_device_train_batch_size=len(PAIRS),
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_dropout=True,
    )
    return DPOTrainer(
        model=policy,
        ref_model=reference,
        args=options,
        train_dataset=Dataset.from_list(rows),
        processing_class=word_tokenizer(),
    )


def record(file: str) -> None:
    """Weights, batch, loss and gradients; the first half of input_ids are chosen."""
    with tempfile.TemporaryDirectory() as folder:
        made = trainer(folder)
        batch = next(iter(made.get_train_dataloader()))
        policy = made.accelerator.unwrap_model(made.model)
        policy.zero_grad()
        loss = made.compute_loss(made.model, batch)
        loss.backward()
    found = {f"policy.{n}": p.detach() for n, p in policy.named_parameters()}
    found |= {f"reference.{n}": p.detach() for n, p in made.ref_model.named_parameters()}
    found |= {f"gradient.{n}": p.grad for n, p in policy.named_parameters()}
    found |= {key: batch[key] for key in ("input_ids", "completion_mask")}
    found["loss"] = loss.detach().view(1)
    header = {"trl": trl.__version__, "transformers": transformers.__version__, "beta": str(BETA)}
    save_file({n: t.contiguous().clone() for n, t in found.items()}, file, metadata=header)


if __name__ == "__main__":
    record(sys.argv[1])
