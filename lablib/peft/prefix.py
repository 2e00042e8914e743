"""Prefix tuning (Li and Liang, 2021) and prompt tuning (Lester et al., 2021): rows that train.

Prefix: each block's attention gets `length` more keys and values, which no token wrote,
attention(q, [P_k; K], [P_v; V]). Prompt: `length` embeddings stand before those of the text.
Unlike LoRA, neither computes the base's function at the start.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lablib.models import anatomy
from lablib.models.gpt import rotary_table
from lablib.peft.adapter import Adapter, adapters, matrix, method


class Prefix(Adapter):
    """Key and value rows before those of one block's attention.

    The rows are keys as the attention compares them, so rotary positions don't turn them, and they
    stand in no cache: an attention adds them to whatever the cache returns.
    length: rows. width: features of all heads' keys. std: of the normal start.
    source: where the rows come from instead, as those of `block`.
    """

    def __init__(
        self,
        length: int,
        width: int,
        std: float = 0.02,
        source: PrefixMLP | None = None,
        block: int = 0,
    ):
        super().__init__()
        self.length = length
        self.source = None if source is None else (source, block)  # a tuple: no submodule
        if source is None:
            self.keys = nn.Parameter(std * torch.randn(length, width))  # P_k
            self.values = nn.Parameter(std * torch.randn(length, width))  # P_v

    def rows(self) -> tuple[Tensor, Tensor]:
        """P_k and P_v: each (length, width)."""
        if self.source is None:
            return self.keys, self.values
        source, block = self.source
        return source.rows(block)

    def look(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Before the attention runs: give it a cache that returns the rows too, and see them."""
        if not self.enabled:
            return None
        given = _by_name(module, args, kwargs)
        ours = "rotary" in given
        cache = "cache" if ours else "past_key_values"
        given[cache] = _Rows(self.rows(), given.get(cache))
        if not ours:
            mask = self._mask(module, given.get("attention_mask"), given["hidden_states"])
            given["attention_mask"] = mask
        return _first_by_place(given)

    def _mask(self, module: nn.Module, mask: Tensor | None, x: Tensor) -> Tensor | None:
        """The mask with columns for the rows, which every query sees."""
        new = x.shape[1]
        if mask is None:
            if new == 1 or not getattr(module, "is_causal", True):
                return None
            mask = torch.ones(1, 1, new, new, dtype=torch.bool, device=x.device).tril()
        seen = True if mask.dtype == torch.bool else 0.0  # numbers are added to the scores
        return F.pad(mask, (self.length, 0), value=seen)

    def take_out(self, model: nn.Module, name: str) -> None:
        """Delete the rows, and the hook that puts them before the keys."""
        _take_out(model, name, self)


class _Rows:
    """Stands for a block's cache, of ours or of transformers' (or of none), and adds the rows."""

    def __init__(self, rows: tuple[Tensor, Tensor], cache):
        self.rows = rows
        self.cache = cache

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, heads, new, head_dim) -> (batch, heads, length + seen, head_dim)."""
        if self.cache is not None:
            keys, values = self.cache.append(keys, values)
        return self._before(keys, values)

    def update(self, keys: Tensor, values: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """As `append`, by the name that transformers calls."""
        if self.cache is not None:
            keys, values = self.cache.update(keys, values, *args, **kwargs)
        return self._before(keys, values)

    def _before(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        batch, heads, _, dim = keys.shape
        both = []
        for rows, there in zip(self.rows, (keys, values), strict=True):
            split = rows.to(there.dtype).view(-1, heads, dim).transpose(0, 1)
            both.append(torch.cat([split.expand(batch, -1, -1, -1), there], 2))
        return both[0], both[1]


class PrefixMLP(Adapter):
    """The rows of all blocks from a small table: P[i] = W_2 tanh(W_1 table[i]).

    Steadier to train than the rows themselves, and dropped afterwards (`drop_mlp_`).
    hidden: its width, 800 in He et al. (2022).
    """

    def __init__(self, length: int, width: int, hidden: int, n_blocks: int):
        super().__init__()
        self.table = nn.Parameter(torch.randn(length, width))
        self.inner = nn.Linear(width, hidden)
        self.outer = nn.Linear(hidden, n_blocks * 2 * width)

    def rows(self, block: int) -> tuple[Tensor, Tensor]:
        """P_k and P_v of one block: each (length, width)."""
        width = self.table.shape[1]
        its = slice(2 * width * block, 2 * width * (block + 1))
        hidden = self.inner(self.table).tanh()  # (length, width) -> (length, hidden)
        both = F.linear(hidden, self.outer.weight[its], self.outer.bias[its])  # -> 2 width
        return both[:, :width], both[:, width:]

    def take_out(self, model: nn.Module, name: str) -> None:
        """Delete it."""
        _take_out(model, name, self)


@method
def prefix_(model: nn.Module, length: int, mlp: int | None = None, std: float = 0.02) -> None:
    """Put `length` key and value rows before those of every block's attention.

    mlp: hidden width of a `PrefixMLP` that computes the rows; None trains them directly.
    std: of the rows' normal start, without an MLP.
    Raises ValueError for T5, whose attention adds a bias a position, and where a prefix is already.
    """
    places = _attentions(model)
    like = anatomy.embedding(model).weight
    source = None
    if mlp is not None:
        source = PrefixMLP(length, next(iter(places.values())), mlp, len(places)).to(like)
    for block, (name, width) in enumerate(places.items()):
        attention = model.get_submodule(name)
        if hasattr(attention, "prefix"):
            raise ValueError(f"{name} has a prefix already")
        prefix = Prefix(length, width, std, source, block).to(like)
        attention.prefix = prefix
        attention.register_forward_pre_hook(prefix.look, with_kwargs=True)
    if source is not None:
        model.prefix_mlp = source


@torch.no_grad()
def drop_mlp_(model: nn.Module) -> None:
    """Keep the rows that a prefix's MLP computes, and drop the MLP: the same outputs, less to save.

    Raises ValueError when there is none.
    """
    if not isinstance(getattr(model, "prefix_mlp", None), PrefixMLP):
        raise ValueError(f"{type(model).__name__} has no prefix with an MLP")
    for prefix in adapters(model).values():
        if isinstance(prefix, Prefix):
            keys, values = prefix.rows()
            prefix.keys, prefix.values = nn.Parameter(keys.clone()), nn.Parameter(values.clone())
            prefix.source = None
    del model.prefix_mlp
    for place, options in model.peft_methods:
        if place == f"{prefix_.__module__}:{prefix_.__name__}":
            options["mlp"] = None


def _attentions(model: nn.Module) -> dict[str, int]:
    """Dotted name of each block's attention -> features of all heads' keys."""
    names = anatomy.family(model)
    if names.name.startswith("T5"):
        raise ValueError("T5's attention takes no prefix here: it adds a bias a position")
    fused = "query_key_value" in names.projections
    found = anatomy.projections(model, "query_key_value" if fused else "key")
    return {
        name.rpartition(".")[0]: matrix(layer).shape[0] // (3 if fused else 1)
        for name, layer in found.items()
    }


class Prompt(Adapter):
    """Embeddings before those of the text, in a transformers backbone. rows: (length, dim).

    Positions of the text start at `length`; what the backbone returns is of the text alone.
    """

    def __init__(self, rows: Tensor):
        super().__init__()
        self.rows = nn.Parameter(rows.detach().clone())
        self.longer = False  # whether this pass carries the rows

    def put(self, model: nn.Module) -> None:
        """Watch the backbone, which is this prompt's parent."""
        name = _backbone(model)
        module = model.get_submodule(name)
        module.prompt = self
        module.register_forward_pre_hook(self.look, with_kwargs=True)
        module.register_forward_hook(self.trim)

    def look(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Tokens -> embeddings with the rows before them, unless the cache holds these already."""
        if not self.enabled:
            return None
        given, length = _by_name(module, args, kwargs), len(self.rows)
        if given.get("inputs_embeds") is None:
            given["inputs_embeds"] = module.get_input_embeddings()(given["input_ids"])
        given["input_ids"] = given["position_ids"] = None  # the backbone counts them itself
        if given.get("attention_mask") is not None:
            given["attention_mask"] = F.pad(given["attention_mask"], (length, 0), value=1)
        self.longer = not _seen(given.get("past_key_values"))
        if self.longer:
            given["inputs_embeds"] = _with_rows(self.rows, given["inputs_embeds"])
            if given.get("token_type_ids") is not None:
                given["token_type_ids"] = F.pad(given["token_type_ids"], (length, 0))
        return (), given

    def trim(self, module: nn.Module, args: tuple, output):
        """Drop what the rows became."""
        if self.enabled and self.longer:
            output.last_hidden_state = output.last_hidden_state[:, len(self.rows) :]
        return output

    def take_out(self, model: nn.Module, name: str) -> None:
        """Delete the rows and the hooks."""
        _take_out(model, name, self)


class GPTPrompt(Prompt):
    """The same for `lablib.models.GPT`, whose blocks are given the rotary table."""

    def put(self, model: nn.Module) -> None:
        """Watch the blocks and the final norm."""
        self.config = model.config
        model.prompt = self
        for block in model.blocks:
            block.register_forward_pre_hook(self.look, with_kwargs=True)
        model.norm.register_forward_hook(self.trim)

    def look(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Put the rows before the text at the first block, and lengthen every block's table."""
        if not self.enabled:
            return None
        given = _by_name(module, args, kwargs)
        x, table = given["x"], len(given["rotary"][0])
        if x.shape[1] == table and not _seen(given.get("cache")):
            given["x"] = x = _with_rows(self.rows, x)
        self.longer = x.shape[1] > table
        if self.longer:
            given["rotary"] = rotary_table(self.config, 0, x.shape[1], x)
        return _first_by_place(given)

    def trim(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """Drop what the rows became."""
        return output[:, len(self.rows) :] if self.enabled and self.longer else output


@method
def prompt_(model: nn.Module, length: int) -> None:
    """Put `length` embeddings before the text's; logits are of the text alone.

    They start as those of tokens drawn at random, as in Lester et al. (2021).
    Raises ValueError for T5, and where a prompt is already.
    """
    if anatomy.family(model).name.startswith("T5"):
        raise ValueError("T5 takes no prompt here: its encoder is no backbone of its own")
    if any(isinstance(a, Prompt) for a in adapters(model).values()):
        raise ValueError(f"{type(model).__name__} has a prompt already")
    weight = anatomy.embedding(model).weight
    rows = weight[torch.randint(len(weight), (length,), device="cpu").to(weight.device)]
    ours = anatomy.family(model).name == "GPT"
    (GPTPrompt if ours else Prompt)(rows).put(model)


def _backbone(model: nn.Module) -> str:
    """Dotted name of the transformers module that holds embedding and blocks alike."""
    names = anatomy.family(model)
    return names.blocks.split(".")[0] if names.blocks.split(".")[0] in names.embedding else ""


def _by_name(module: nn.Module, args: tuple, kwargs: dict) -> dict:
    """Name -> argument of a call of the module."""
    given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    rest = given.pop("kwargs", {})
    return given | rest


def _first_by_place(given: dict) -> tuple[tuple, dict]:
    """Arguments and keywords of the call, with the hidden states where other hooks look."""
    first = next(iter(given))
    return (given[first],), {name: value for name, value in given.items() if name != first}


def _seen(cache) -> int:
    """How many positions a cache holds, ours or transformers'."""
    if cache is None:
        return 0
    return cache.length if hasattr(cache, "length") else cache.get_seq_length()


def _with_rows(rows: Tensor, x: Tensor) -> Tensor:
    """(length, dim), (batch, n, dim) -> (batch, length + n, dim)."""
    return torch.cat([rows.to(x.dtype).expand(len(x), -1, -1), x], 1)


def _take_out(model: nn.Module, name: str, adapter: Adapter) -> None:
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            own = [k for k, hook in hooks.items() if getattr(hook, "__self__", None) is adapter]
            for key in own:
                del hooks[key]
                module._forward_hooks_with_kwargs.pop(key, None)
                module._forward_pre_hooks_with_kwargs.pop(key, None)
    place, _, last = name.rpartition(".")
    delattr(model.get_submodule(place), last)
