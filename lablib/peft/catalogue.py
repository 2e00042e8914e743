"""Methods of efficient tuning by name: what each computes, its place in surveys, how it is built.

Labs 713 and 714 draw their maps from this list. Families are those of Xu et al. (2023), kinds those
of Lialin et al. (2023); a method may be of several kinds. What is not built here says why.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from lablib.models import anatomy
from lablib.peft import (
    bottleneck,
    intrinsic,
    kronecker,
    lora,
    lora_variants,
    p_tuning,
    prefix,
    propelt,
    reft,
    rescale,
    residual,
    side,
    sparse,
    subset,
    unified_peft,
    unipelt,
)

FAMILIES = ("additive", "partial", "reparameterized", "hybrid", "unified")
KINDS = (
    "adapters",
    "soft prompts",
    "other additions",
    "structured selection",
    "unstructured selection",
    "reparametrization",
)
DRAWN = (  # what does not start at the base's function
    "prefix",
    "prompt",
    "P-tuning",
    "MAM",
    "UniPELT",
    "Compacter",
    "ladder side",
    "threshold mask",
)


@dataclass(frozen=True)
class Probe:
    """What a method that chooses by data looks at: batches, and the loss of a model on one."""

    batches: Sequence
    loss: Callable[[nn.Module, object], Tensor]


@dataclass(frozen=True)
class Method:
    """One method.

    equation: LaTeX, what h or W becomes. put: puts it into a model, in place, at a size of about
    one percent of a block; given a `Probe` where `probes`. why_not: of one that is not built.
    """

    source: str
    family: str
    kinds: tuple[str, ...]
    equation: str
    put: Callable | None = None
    probes: bool = False
    why_not: str = ""


def _fish(model: nn.Module, probe: Probe) -> None:
    sparse.fish_(model, 0.01, _fisher(model, probe))


def _child(model: nn.Module, probe: Probe) -> None:
    sparse.child_d_(model, 0.1, _fisher(model, probe))


def _fisher(model: nn.Module, probe: Probe) -> dict[str, Tensor]:
    return sparse.fisher(model, probe.batches, probe.loss)


def _pair(model: nn.Module) -> tuple[str, ...]:
    fused = "query_key_value" in anatomy.family(model).projections
    return ("query_key_value",) if fused else ("query", "value")


def _lora(model: nn.Module) -> None:
    lora.lora_(model, _pair(model), rank=8)


def _lora_like(put: Callable, **options) -> Callable[[nn.Module], None]:
    return lambda model: put(model, _pair(model), **options)


METHODS: dict[str, Method] = {
    "serial adapter": Method(
        "Houlsby et al., 2019",
        "additive",
        ("adapters",),
        r"h \leftarrow h + W_{up}\, f(W_{down}\, h)",
        lambda model: bottleneck.houlsby_(model, 8),
    ),
    "Pfeiffer adapter": Method(
        "Pfeiffer et al., 2021",
        "additive",
        ("adapters",),
        r"h \leftarrow h + W_{up}\, f(W_{down}\, h)",
        lambda model: bottleneck.pfeiffer_(model, 16),
    ),
    "parallel adapter": Method(
        "He et al., 2022",
        "additive",
        ("adapters",),
        r"h \leftarrow h + s\, W_{up}\, f(W_{down}\, x)",
        lambda model: bottleneck.parallel_(model, 16),
    ),
    "residual adapter": Method(
        "Lin et al., 2020",
        "additive",
        ("adapters",),
        r"h \leftarrow h + W_{up}\, f(W_{down}\, \mathrm{LN}(h))",
        lambda model: residual.residual_(model, 16),
    ),
    "prompt": Method(
        "Lester et al., 2021",
        "additive",
        ("soft prompts",),
        r"x \leftarrow [P; x]",
        lambda model: prefix.prompt_(model, 20),
    ),
    "prefix": Method(
        "Li and Liang, 2021",
        "additive",
        ("soft prompts",),
        r"\mathrm{Attn}(q, [P_k; K], [P_v; V])",
        lambda model: prefix.prefix_(model, 16),
    ),
    "P-tuning": Method(
        "Liu et al., 2021",
        "additive",
        ("soft prompts",),
        r"x \leftarrow [P; x],\quad P = \mathrm{MLP}(\mathrm{LSTM}(E))",
        lambda model: p_tuning.p_tuning_(model, 20, hidden=8),
    ),
    "ladder side": Method(
        "Sung et al., 2022",
        "additive",
        ("other additions",),
        r"s_i = g_i(\mu_i s_{i-1} + (1 - \mu_i) D_i h_i)",
        lambda model: side.side_(model, 4),
    ),
    "(IA)3": Method(
        "Liu et al., 2022",
        "additive",
        ("other additions",),
        r"K \leftarrow l_k \odot K,\quad V \leftarrow l_v \odot V,\quad f \leftarrow l_f \odot f",
        rescale.ia3_,
    ),
    "LoReFT": Method(
        "Wu et al., 2024",
        "additive",
        ("other additions",),
        r"h \leftarrow h + R^T (W h + b - R h)",
        lambda model: reft.reft_(model, 8, everywhere=True, start="base"),
    ),
    "BitFit": Method(
        "Ben Zaken et al., 2022",
        "partial",
        ("structured selection",),
        r"b \leftarrow b + \delta",
        subset.biases_,
    ),
    "norms": Method(
        "Zhao et al., 2023",
        "partial",
        ("structured selection",),
        r"\gamma \leftarrow \gamma + \delta",
        subset.norms_,
    ),
    "FISH": Method(
        "Sung et al., 2021",
        "partial",
        ("unstructured selection",),
        r"W \leftarrow W + m \odot \delta,\quad m = \mathrm{top}_k\, \mathbb{E}\, g^2",
        _fish,
        probes=True,
    ),
    "child tuning": Method(
        "Xu et al., 2021",
        "partial",
        ("unstructured selection",),
        r"W \leftarrow W - \eta\, m \odot \nabla W",
        _child,
        probes=True,
    ),
    "threshold mask": Method(
        "Zhao et al., 2020",
        "partial",
        ("unstructured selection",),
        r"W \leftarrow W \odot 1[s > \tau]",
        _lora_like(sparse.masked_),
    ),
    "diff pruning": Method(
        "Guo et al., 2021",
        "partial",
        ("unstructured selection",),
        r"W \leftarrow W + z \odot \delta,\quad z \sim \text{hard concrete}",
        _lora_like(sparse.diff_pruning_),
    ),
    "intrinsic SAID": Method(
        "Aghajanyan et al., 2021",
        "reparameterized",
        ("reparametrization",),
        r"W_i \leftarrow W_i + \lambda_i\, (P\, v)_i",
        _lora_like(lambda model, roles: intrinsic.intrinsic_(model, 4000, roles, said=True)),
    ),
    "LoRA": Method(
        "Hu et al., 2021",
        "reparameterized",
        ("reparametrization",),
        r"W \leftarrow W + \tfrac{\alpha}{r} B A",
        _lora,
    ),
    "LoRA-FA": Method(
        "Zhang et al., 2023",
        "reparameterized",
        ("reparametrization",),
        r"W \leftarrow W + \tfrac{\alpha}{r} B A,\quad A\ \text{frozen}",
        _lora_like(lora_variants.lora_fa_, rank=16),
    ),
    "DoRA": Method(
        "Liu et al., 2024",
        "reparameterized",
        ("reparametrization",),
        r"W \leftarrow m\, (W + B A) / \lVert W + B A \rVert",
        _lora_like(lora_variants.dora_, rank=8),
    ),
    "VeRA": Method(
        "Kopiczko et al., 2024",
        "reparameterized",
        ("reparametrization",),
        r"W \leftarrow W + \Lambda_b B \Lambda_d A,\quad A, B\ \text{random, shared}",
        _lora_like(lora_variants.vera_, rank=256),
    ),
    "AdaLoRA": Method(
        "Zhang et al., 2023",
        "reparameterized",
        ("reparametrization",),
        r"W \leftarrow W + \tfrac{\alpha}{r} P \Lambda Q",
        _lora_like(lora_variants.adalora_, rank=12),
    ),
    "KronA": Method(
        "Edalati et al., 2022",
        "reparameterized",
        ("reparametrization",),
        r"W \leftarrow W + s\, A \otimes B",
        _lora_like(kronecker.krona_),
    ),
    "MAM": Method(
        "He et al., 2022",
        "hybrid",
        ("adapters", "soft prompts"),
        r"\text{prefix} + \text{parallel adapter}",
        lambda model: unified_peft.mam_(model, prefix=8, rank=8),
    ),
    "UniPELT": Method(
        "Mao et al., 2022",
        "hybrid",
        ("adapters", "soft prompts", "reparametrization"),
        r"g_L\, \text{LoRA},\ g_P\, \text{prefix},\ g_A\, \text{adapter}",
        lambda model: unipelt.unipelt_(model, rank=4, length=8, bottleneck=8),
    ),
    "Compacter": Method(
        "Karimi Mahabadi et al., 2021",
        "additive",
        ("adapters", "reparametrization"),
        r"W_{up},\ W_{down} = \textstyle\sum_i A_i \otimes (s_i t_i^T)",
        lambda model: kronecker.compacter_(model, 16),
    ),
    "ProPELT adapter": Method(
        "Zeng et al., 2023",
        "unified",
        ("adapters",),
        r"\theta_{block} = \theta \odot m_{block}",
        lambda model: propelt.propelt_adapter_(model, rank=32),
    ),
    "ProPELT LoRA": Method(
        "Zeng et al., 2023",
        "unified",
        ("reparametrization",),
        r"\theta_{block} = \theta \odot m_{block}",
        lambda model: propelt.propelt_lora_(model, _pair(model), rank=16, alpha=16, keep=0.5),
    ),
    "FAR": Method(
        "Vucetic et al., 2022",
        "partial",
        ("structured selection",),
        r"W_{rows} \leftarrow W_{rows} + \delta",
        why_not="its rows are chosen after a short run of full tuning: `reconfigure.far_`",
    ),
    "LT-SFT": Method(
        "Ansell et al., 2022",
        "partial",
        ("unstructured selection",),
        r"W \leftarrow W + m \odot \delta",
        why_not="its mask is chosen after full tuning: `sparse.lt_sft_`",
    ),
    "QLoRA": Method(
        "Dettmers et al., 2023",
        "reparameterized",
        ("reparametrization",),
        r"W \leftarrow \mathrm{NF4}(W) + \tfrac{\alpha}{r} B A",
        why_not="it changes the base too: `qlora.nf4_`, then `qlora.qlora_`",
    ),
    "AdapterDrop": Method(
        "Rücklé et al., 2021",
        "additive",
        ("adapters",),
        r"h_i \leftarrow h_i\ \text{for}\ i < n",
        why_not="it leaves adapters out of blocks at run time: `adapter_drop.without_lowest`",
    ),
    "AdapterFusion": Method(
        "Pfeiffer et al., 2021",
        "additive",
        ("adapters",),
        r"h + V \textstyle\sum_i a_i z_i",
        why_not="it needs several trained adapters: `fusion.Fusion`, lab 702",
    ),
    "Laplace-LoRA": Method(
        "Yang et al., 2024",
        "reparameterized",
        ("reparametrization",),
        r"p(BA \mid \text{data}) \approx \mathcal{N}",
        why_not="it comes after training, for confidence; over the head alone: lab 704",
    ),
    "SPoT": Method(
        "Vu et al., 2022",
        "additive",
        ("soft prompts",),
        r"P \leftarrow P_{other\ task}",
        why_not="it is a prompt with another task's start",
    ),
    "ATTEMPT": Method(
        "Asai et al., 2022",
        "additive",
        ("soft prompts",),
        r"P \leftarrow P + \textstyle\sum_j a_j P_j",
        why_not="it mixes prompts of six large tasks, which are not here",
    ),
    "AdapterSoup": Method(
        "Chronopoulou et al., 2023",
        "additive",
        ("adapters",),
        r"\theta = \textstyle\frac{1}{k} \sum_i \theta_i",
        why_not="a mean of trained adapters: `Average` in lab 702",
    ),
    "DyLoRA": Method(
        "Valipour et al., 2023",
        "reparameterized",
        ("reparametrization",),
        r"W \leftarrow W + B_{:, :b} A_{:b},\quad b\ \text{drawn each step}",
        why_not="LoRA trained for all ranks at once",
    ),
    "Delta-LoRA": Method(
        "Zi et al., 2023",
        "reparameterized",
        ("reparametrization",),
        r"W \leftarrow W + \lambda (B_{t+1} A_{t+1} - B_t A_t)",
        why_not="it changes the base's own weights, so nothing can be taken out again",
    ),
    "SparseAdapter": Method(
        "He et al., 2022",
        "hybrid",
        ("adapters", "unstructured selection"),
        r"W_{up}, W_{down} \leftarrow m \odot W",
        why_not="a wider adapter, pruned before training",
    ),
    "AdaMix": Method(
        "Wang et al., 2022",
        "unified",
        ("adapters",),
        r"\theta = \theta_{j},\ j\ \text{drawn each step; averaged at the end}",
        why_not="it trains several adapters with a penalty on their difference",
    ),
    "S4": Method(
        "Chen et al., 2023",
        "hybrid",
        ("adapters", "soft prompts", "structured selection", "reparametrization"),
        r"\text{four groups of blocks, each with methods of its own}",
        why_not="it needs four blocks and more: `peft_guide.s4_`, lab 714",
    ),
}
BUILT = tuple(name for name, method in METHODS.items() if method.put is not None)


def put_(model: nn.Module, name: str, probe: Probe | None = None) -> None:
    """Put a method of the list into a model.

    Raises KeyError for an unknown name, ValueError for one that is not built, or needs a probe, and
    for UniPELT in a decoder: its gates average over all positions, so they see what comes later.
    """
    method = METHODS[name]
    if method.put is None:
        raise ValueError(f"{name} is not built here: {method.why_not}")
    if method.probes and probe is None:
        raise ValueError(f"{name} chooses by data: give it a Probe")
    if name == "UniPELT" and anatomy.family(model).name not in ("BERT", "RoBERTa"):
        raise ValueError("UniPELT's gates read all positions, later ones too: not for a decoder")
    method.put(model, probe) if method.probes else method.put(model)


def upper(model: nn.Module, n_blocks: int) -> nn.Module:
    """A copy without its lowest blocks, for states that `cached_below` computed.

    A `Classifier` of it takes these with below=0, and a method is then in what trains alone. A
    prompt is not: what comes before the first block is not run.
    """
    small = copy.deepcopy(model)
    name = anatomy.family(small).blocks
    anatomy.replace(small, name, nn.ModuleList(list(anatomy.blocks(small))[n_blocks:]))
    return small
