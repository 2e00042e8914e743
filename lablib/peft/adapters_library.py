"""The methods of the Adapters library (Poth et al., 2023), with the sizes of its version 1.3.0.

Where it differs from the methods' own papers, the library is followed here:

    seq_bn          h + W_up ReLU(W_down norm(h + x)), with the sublayer's own norm
    double_seq_bn   h + W_up swish(W_down h), behind both sublayers
    ia3             scales the feed-forward layer ahead of its nonlinearity, not after it
    prompt_tuning   rows come behind the embeddings' positions and norm, not before
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from lablib.models import anatomy, sublayers
from lablib.models.hooks import drop_hooks_
from lablib.paths import data_dir
from lablib.peft.adapter import Adapter, matrix, method, trainable
from lablib.peft.bottleneck import Bottleneck, _free, parallel_
from lablib.peft.invertible import Invertible, _head
from lablib.peft.kronecker import compacter_
from lablib.peft.lora import lora_
from lablib.peft.prefix import PrefixMLP, _attentions, _by_name, _first_by_place, prefix_, prompt_
from lablib.peft.rescale import Rescaled
from lablib.peft.unipelt import Gate, GatedLoRA, GatedPrefix

FORMS = {"relu": F.relu, "swish": F.silu}


class Serial(Bottleneck):
    """h + W_up f(W_down z), with z = h, or z = norm(h + x) where the sublayer's norm is given.

    So "seq_bn" reads what the next sublayer would, and adds to h: in BERT, whose norms follow the
    sum. form: one of FORMS.
    """

    def __init__(self, dim: int, rank: int, form: str = "relu", norm: nn.Module | None = None):
        super().__init__(dim, rank, start="bert")
        self.form = FORMS[form]
        self.around = (norm,)  # a tuple: no submodule

    def reads(self, x: Tensor, h: Tensor) -> Tensor:
        """z."""
        norm = self.around[0]
        return h if norm is None else norm(h + x)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        """x, h: (batch, length, dim) -> (batch, length, dim)."""
        inner = self.form(self.down(self.reads(x, h)))  # dim -> rank
        return h + self.up(inner)  # rank -> dim


class GatedSerial(Serial):
    """h + g W_up f(W_down z), with a gate that reads z."""

    def __init__(self, dim: int, rank: int, form: str = "relu", norm: nn.Module | None = None):
        super().__init__(dim, rank, form, norm)
        self.gate = Gate(dim)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        """x, h: (batch, length, dim) -> (batch, length, dim)."""
        return h + self.gate(self.reads(x, h)) * (super().forward(x, h) - h)


@method
def serial_(
    model: nn.Module,
    reduction: int = 16,
    places: Sequence[str] = ("mlp",),
    form: str = "relu",
    normed: bool = True,
    gated: bool = False,
) -> None:
    """Put a `Serial` at each of the places of every block. reduction: of the width to the rank.

    normed: z is norm(h + x), in BERT and RoBERTa; other families' norms come first, so z is h.
    """
    weight, after = anatomy.embedding(model).weight, bool(anatomy.family(model).first_norm)
    for block in range(len(anatomy.blocks(model))):
        for place in places:
            norm = anatomy.part(model, block, f"{place}_norm") if normed and after else None
            kind = GatedSerial if gated else Serial
            adapter = kind(weight.shape[1], rank_of(model, reduction), form, norm).to(weight)
            sublayers.change_(model, block, place, adapter, _free(model, block, place))


def rank_of(model: nn.Module, reduction: int) -> int:
    """The bottleneck's width, at least one."""
    return max(1, anatomy.embedding(model).weight.shape[1] // reduction)


@method
def up_ia3_(model: nn.Module) -> None:
    """(IA)3 as the library has it: keys, values, and the feed-forward layer's first projection.

    The paper scales after the nonlinearity, as `ia3_` does.
    """
    fused = "query_key_value" in anatomy.family(model).projections  # queries come first
    roles = ["query_key_value"] if fused else ["key", "value"]
    for name, layer in anatomy.projections(model, *roles, "up").items():
        first = matrix(layer).shape[0] // 3 if fused and not name.endswith("fc") else 0
        anatomy.replace(model, name, Rescaled(layer, "output", first))


@method
def late_invertible_(model: nn.Module, reduction: int = 2) -> None:
    """An invertible adapter behind the embeddings, in BERT behind their positions and norm."""
    names_, weight = anatomy.family(model), anatomy.embedding(model).weight
    outer = names_.embedding.rpartition(".")[0] if names_.first_norm else names_.embedding
    model.invertible = Invertible(weight.shape[1], reduction, "bert").to(weight)
    model.get_submodule(outer).register_forward_hook(model.invertible.after_embedding)
    if (head := _head(model)) is not None:
        head.register_forward_pre_hook(model.invertible.before_head)


class LatePrompt(Adapter):
    """Rows before the states that the first block reads: no position, no norm."""

    def __init__(self, length: int, dim: int):
        super().__init__()
        self.rows = nn.Parameter(torch.empty(length, dim).uniform_(-0.5, 0.5))
        self.ends: tuple = ()  # the first and the last block, no submodules

    def look(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Ahead of a block: the rows, once, and columns of the mask for them."""
        if not self.enabled:
            return None
        given, length = _by_name(module, args, kwargs), len(self.rows)
        states = next(iter(given))
        if module is self.ends[0]:
            rows = self.rows.to(given[states].dtype).expand(len(given[states]), -1, -1)
            given[states] = torch.cat([rows, given[states]], 1)
        mask = given.get("attention_mask")
        if mask is not None:
            seen = True if mask.dtype == torch.bool else 0.0  # numbers are added to the scores
            mask = F.pad(mask, (length, 0), value=seen)
            if mask.shape[-2] > 1:
                mask = torch.cat([mask[..., :1, :].expand(*mask.shape[:-2], length, -1), mask], -2)
            given["attention_mask"] = mask
        return _first_by_place(given)

    def trim(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """Drop what the rows became."""
        return output[:, len(self.rows) :] if self.enabled else output

    def take_out(self, model: nn.Module, name: str) -> None:
        """Delete the rows and the hooks."""
        drop_hooks_(model, self)
        place, _, last = name.rpartition(".")
        delattr(model.get_submodule(place), last)


@method
def late_prompt_(model: nn.Module, length: int = 10) -> None:
    """Prompt tuning as the library has it in BERT and RoBERTa; `prompt_` elsewhere."""
    blocks, weight = anatomy.blocks(model), anatomy.embedding(model).weight
    prompt = LatePrompt(length, weight.shape[1]).to(weight)
    prompt.ends = blocks[0], blocks[-1]
    model.prompt = prompt
    for block in blocks:
        block.register_forward_pre_hook(prompt.look, with_kwargs=True)
    blocks[-1].register_forward_hook(prompt.trim)


@method
def gated_prefix_(model: nn.Module, length: int = 10, mlp: int = 512, rank: int = 8) -> None:
    """UniPELT's prefix, computed by an MLP, and its LoRA on queries and values, both gated."""
    weight, found = anatomy.embedding(model).weight, _attentions(model)
    source = PrefixMLP(length, next(iter(found.values())), mlp, len(found)).to(weight)
    for block, (name, width) in enumerate(found.items()):
        prefix = GatedPrefix(weight.shape[1], length, width).to(weight)
        del prefix.keys, prefix.values
        prefix.source = source, block  # a tuple: no submodule
        attention = model.get_submodule(name)
        attention.prefix = prefix
        attention.register_forward_pre_hook(prefix.look, with_kwargs=True)
    model.prefix_mlp = source
    for name, layer in anatomy.projections(model, *query_and_value(model)).items():
        anatomy.replace(model, name, GatedLoRA(layer, rank).to(weight))


def query_and_value(model: nn.Module) -> tuple[str, ...]:
    """Roles that the library's LoRA is on; GPT-2 has them in one matrix."""
    fused = "query_key_value"
    return (fused,) if fused in anatomy.family(model).projections else ("query", "value")


def union(*builders: Callable[[nn.Module], None]) -> Callable[[nn.Module], None]:
    """Several methods at once, one after another."""

    def build(model: nn.Module) -> None:
        for builder in builders:
            builder(model)

    return build


def _parallel(model: nn.Module, reduction: int = 2) -> None:
    parallel_(model, rank_of(model, reduction))


def _compacter(model: nn.Module, reduction: int = 32) -> None:
    compacter_(model, rank_of(model, reduction))


def _lora(model: nn.Module, rank: int = 8) -> None:
    lora_(model, query_and_value(model), rank=rank)


def _prompt(model: nn.Module, length: int = 10) -> None:
    (late_prompt_ if anatomy.family(model).first_norm else prompt_)(model, length)


def _invertible(model: nn.Module, reduction: int = 16) -> None:
    union(partial(serial_, reduction=reduction), late_invertible_)(model)


def _mam(model: nn.Module, reduction: int = 2, length: int = 30, mlp: int = 800) -> None:
    union(partial(prefix_, length=length, mlp=mlp), partial(_parallel, reduction=reduction))(model)


def _unipelt(
    model: nn.Module, reduction: int = 16, length: int = 10, mlp: int = 512, rank: int = 8
) -> None:
    prefix = partial(gated_prefix_, length=length, mlp=mlp, rank=rank)
    union(prefix, partial(serial_, reduction=reduction, gated=True))(model)


METHODS: dict[str, Callable[..., None]] = {  # the library's names, its default sizes
    "seq_bn": serial_,
    "double_seq_bn": partial(serial_, places=("attention", "mlp"), form="swish", normed=False),
    "par_bn": _parallel,
    "seq_bn_inv": _invertible,
    "compacter": _compacter,
    "lora": _lora,
    "ia3": up_ia3_,
    "prefix_tuning": partial(prefix_, length=30, mlp=512),
    "prompt_tuning": _prompt,
    "mam": _mam,
    "unipelt": _unipelt,
}


# The library's own tensors.

SPELLED = (  # its name -> ours, in BERT and RoBERTa
    (r"^shared_parameters\.\w+\.phm_rule", "shared"),
    (r"\.adapters\.\w+\.", ".adapter.change."),
    (r"adapter_(down|up)(\.0)?\.", r"\1."),
    (r"W_right", "left"),
    (r"W_left", "right"),
    (r"\.b$", ".bias"),
    (r"\.loras\.\w+\.lora_A", ".down"),
    (r"\.loras\.\w+\.lora_B", ".up"),
    (r"\.loras\.\w+\.gate", ".gate.score"),
    (r"prefix_tuning\.prefix_gates\.\w+", "prefix.gate.score"),
    (r"^.*prefix_tuning\.pool\.prefix_tunings\.\w+\.self_prefix\.", "prefix_mlp."),
    (r"wte\.weight", "table"),
    (r"control_trans\.0", "inner"),
    (r"control_trans\.2", "outer"),
    (r"change\.gate\.", "change.gate.score."),
    (r"^invertible_adapters\.\w+\.F", "invertible.first"),
    (r"^invertible_adapters\.\w+\.G", "invertible.second"),
    (r"^prompt_tuning\.prompt_tunings\.\w+\.prompt_embedding\.weight", "prompt.rows"),
)


@torch.no_grad()
def copy_from_library_(
    model: nn.Module, weights: Mapping[str, Tensor], name: str | None = None
) -> None:
    """Fill the model's adapter with tensors of the library, by the library's names.

    name: of a named adapter, or of a fusion, "a,b"; None fills an unnamed one.
    Raises ValueError when the model has other parameters than there are tensors.
    """
    own = {_plain(n, name): p for n, p in trainable(model).items() if _is_of(n, name)}
    given = {_spelled(n): _turned(n, tensor) for n, tensor in weights.items()}
    tied = {n for n in own if n.endswith(".shared")}
    if len(tied) and "shared" in given:
        own = {n: p for n, p in own.items() if n not in tied} | {"shared": own[min(tied)]}
    given = {n if n in own else re.sub(r"\.up$", ".scale", n): t for n, t in given.items()}
    if own.keys() != given.keys():
        raise ValueError(f"no match for {sorted(own.keys() ^ given.keys())}")
    for key, tensor in given.items():
        own[key].copy_(tensor.view_as(own[key]))


def _is_of(dotted: str, name: str | None) -> bool:
    return name is None or f".parts.{name}." in dotted or f".fusions.{name}." in dotted


def _plain(dotted: str, name: str | None) -> str:
    """A named adapter's parameter as an unnamed one's."""
    dotted = dotted.replace(f".named.change.parts.{name}.", ".adapter.change.")
    dotted = dotted.replace(".named.change.fusions.", ".adapter_fusion_layer.")
    dotted = dotted.replace(f".parts.{name}.", ".").replace(".compacter.", ".adapter.")
    return re.sub(r"\.adapter_\d+\.", ".adapter.", dotted)


def _spelled(dotted: str) -> str:
    for pattern, ours in SPELLED:
        dotted = re.sub(pattern, ours, dotted)
    return dotted


def _turned(dotted: str, tensor: Tensor) -> Tensor:
    """Its Kronecker factors are the transposes of ours."""
    return tensor.mT if re.search(r"phm_rule|W_left|W_right", dotted) else tensor


@lru_cache(maxsize=1)
def recorded() -> tuple[dict, dict[str, Tensor]]:
    """What the library computed once: versions, parameter counts, texts; and tensors.

    Written by tests/peft/record_adapters.py.
    """
    file = data_dir() / "published" / "adapters.safetensors"
    with safe_open(file, "pt") as opened:
        header = {key: json.loads(value) for key, value in opened.metadata().items()}
    return header, load_file(file)


RECORDED = {  # the sizes that were recorded, for a width of 32
    "seq_bn": {"reduction": 4},
    "double_seq_bn": {"reduction": 4},
    "par_bn": {"reduction": 4},
    "seq_bn_inv": {"reduction": 4},
    "compacter": {"reduction": 4},
    "lora": {"rank": 3},
    "ia3": {},
    "prefix_tuning": {"length": 3, "mlp": 8},
    "prompt_tuning": {"length": 3},
    "mam": {"reduction": 4, "length": 3, "mlp": 8},
    "unipelt": {"reduction": 4, "length": 3, "mlp": 8, "rank": 3},
}


def recorded_of(mark: str) -> dict[str, Tensor]:
    """Recorded tensors whose name starts so, without the start."""
    return {key[len(mark) :]: t for key, t in recorded()[1].items() if key.startswith(mark)}


def recorded_base() -> nn.Module:
    """The BERT of two layers that was recorded, without an adapter."""
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(**recorded()[0]["config"]), add_pooling_layer=False)
    model.load_state_dict(recorded_of("base:"))
    return model.eval()


@torch.no_grad()
def recorded_states(model: nn.Module) -> Tensor:
    """What a model makes of the texts that were recorded."""
    texts = {key: recorded()[1][key] for key in ("input_ids", "attention_mask")}
    return model(**texts).last_hidden_state


def compare_methods() -> dict[str, tuple[Tensor, Tensor]]:
    """Method -> our output and the library's, with its weights."""
    found = {}
    for kind, build in METHODS.items():
        model, given = recorded_base(), recorded_of(f"{kind}:")
        build(model, **RECORDED[kind])
        own = {n: t for n, t in given.items() if not {":", "("} & set(n) and n != "output"}
        copy_from_library_(model, own)
        found[kind] = recorded_states(model), given["output"]
    return found
