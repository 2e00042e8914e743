"""One readable decoder: RMSNorm, rotary positions, SwiGLU, grouped-query attention.

It is what Llama-family checkpoints need and no more. A technique replaces a part
(`block.mlp = SwitchFFN(...)`, `block.attention = ...`) instead of adding an option here.
Sources: Llama (Touvron et al., 2023), rotary positions (Su et al., 2021), SwiGLU (Shazeer,
2020), grouped queries (Ainslie et al., 2023), RMSNorm (Zhang and Sennrich, 2019).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROPE_TYPES = ("default", "linear", "llama3")


@dataclass
class GPTConfig:
    """The sizes of a `GPT`.

    n_kv_heads: heads of keys and values; None gives as many as n_heads.
    head_dim: None gives dim / n_heads.
    ffn_dim: width of the SwiGLU layer; None gives 8/3 dim, rounded up to a multiple of 16.
    init_std: deviation of the normal weights. GPT-2's 0.02 leaves a small model near the unigram
        loss for all of a short run, so studies tune it; 0.06 is a good first try up to dim 256.
        Held-out nats at 0.02, 0.06 and dim**-0.5, each at the better of the rates 3e-3 and 1e-2 (2
        layers, 32 x 64 tokens of `lablib.data.mixture` a step, one seed): dim 16 5.53, 5.20, 5.45
        after 100 steps and 4.31, 4.27, 4.33 after 1,000; dim 64 5.21, 4.78, 4.90 after 100 and
        3.68, 3.59, 3.59 after 1,000; dim 256, where 0.06 is dim**-0.5, 4.89 and 4.47 after 100,
        3.13 and 3.17 after 1,000. A long run forgives 0.02: after 3,000 steps, at 0.02 and 0.06,
        dim 16 4.14 and 4.14, dim 64 3.25 and 3.27, dim 256 2.86 and 2.89.
    rope_scaling: None, or {"rope_type": "linear" | "llama3", "factor": ..., ...} as in
        transformers' configurations.
    Raises ValueError when heads don't divide, or for another rope_scaling.
    """

    vocab_size: int = 4096
    dim: int = 128
    n_layers: int = 4
    n_heads: int = 4
    n_kv_heads: int | None = None
    head_dim: int | None = None
    ffn_dim: int | None = None
    max_length: int = 1024
    rope_theta: float = 10_000.0
    rope_scaling: dict | None = None
    norm_eps: float = 1e-5
    init_std: float = 0.02
    qk_norm: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    tied: bool = True

    def __post_init__(self):
        self.n_kv_heads = self.n_kv_heads or self.n_heads
        if self.head_dim is None:
            if self.dim % self.n_heads:
                raise ValueError(f"dim {self.dim} is not a multiple of n_heads {self.n_heads}")
            self.head_dim = self.dim // self.n_heads
        self.ffn_dim = self.ffn_dim or 16 * math.ceil(8 * self.dim / 3 / 16)
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: rotary positions turn pairs")
        if self.rope_type not in ROPE_TYPES:
            raise ValueError(
                f"rope_scaling {self.rope_type!r} is unknown; known are {', '.join(ROPE_TYPES)}"
            )

    @property
    def rope_type(self) -> str:
        """How rotary frequencies are scaled, one of ROPE_TYPES."""
        scaling = self.rope_scaling or {}
        return scaling.get("rope_type", scaling.get("type", "default"))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, over the last axis."""

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}"


def rotary_frequencies(config: GPTConfig, device=None) -> Tensor:
    """Radians a position turns each pair of features: (head_dim / 2,), float32."""
    exponent = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponent  # theta_i = base^(-2i/d)
    if config.rope_type == "linear":
        return frequencies / config.rope_scaling["factor"]
    if config.rope_type == "llama3":
        return _llama3_frequencies(frequencies, config.rope_scaling)
    return frequencies


def _llama3_frequencies(frequencies: Tensor, scaling: dict) -> Tensor:
    """Slow turns are divided by the factor, fast ones kept, those between interpolated.

    Source: the Llama 3.1 release; transformers documents the same fields.
    """
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * frequencies + (1 - keep) * frequencies / scaling["factor"]


def rotary_table(config: GPTConfig, start: int, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines of positions start .. start + length - 1, in like's dtype.

    Returns two (length, head_dim) tensors. The sine's first half is negative, so that
    `rotate` needs no sign of its own. Computed in float32: bfloat16 can't tell far positions.
    """
    positions = torch.arange(start, start + length, device=like.device).float()
    angles = torch.outer(positions, rotary_frequencies(config, like.device))
    cos, sin = angles.cos(), angles.sin()  # (length, head_dim / 2)
    return torch.cat([cos, cos], -1).to(like.dtype), torch.cat([-sin, sin], -1).to(like.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x_i, x_{i + d/2}) of each head by its position's angle.

    x: (batch, heads, length, head_dim); cos, sin: from `rotary_table`.
    """
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


class KVCache:
    """Keys and values of one block for the positions seen so far.

    Room for max_length positions is taken at the first append; appending more raises
    ValueError.
    """

    def __init__(self, max_length: int):
        self.max_length = max_length
        self.length = 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add (batch, heads, new, head_dim) keys and values; return all seen so far."""
        end = self.length + keys.shape[2]
        if end > self.max_length:
            raise ValueError(f"the cache has room for {self.max_length} positions, not {end}")
        if self.keys is None:
            batch, heads, _, dim = keys.shape
            self.keys = keys.new_empty(batch, heads, self.max_length, dim)
            self.values = values.new_empty(batch, heads, self.max_length, dim)
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_heads, self.n_kv_heads = config.n_heads, config.n_kv_heads
        self.head_dim = config.head_dim
        inner, kv_inner = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        self.query = nn.Linear(config.dim, inner, bias=config.qkv_bias)
        self.key = nn.Linear(config.dim, kv_inner, bias=config.qkv_bias)
        self.value = nn.Linear(config.dim, kv_inner, bias=config.qkv_bias)
        self.output = nn.Linear(inner, config.dim, bias=config.output_bias)
        if config.qk_norm:
            self.query_norm = RMSNorm(self.head_dim, config.norm_eps)
            self.key_norm = RMSNorm(self.head_dim, config.norm_eps)
        else:
            self.query_norm = self.key_norm = nn.Identity()

    def heads(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values: (batch, heads, length, head_dim), positions applied."""
        batch, length, _ = x.shape
        shape = batch, length, -1, self.head_dim
        q = self.query_norm(self.query(x).view(shape)).transpose(1, 2)  # (b, n_heads, l, head_dim)
        k = self.key_norm(self.key(x).view(shape)).transpose(1, 2)  # (b, n_kv_heads, l, head_dim)
        v = self.value(x).view(shape).transpose(1, 2)  # (b, n_kv_heads, l, head_dim)
        return rotate(q, *rotary), rotate(k, *rotary), v

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], cache: KVCache | None = None
    ) -> Tensor:
        """x: (batch, length, dim) -> (batch, length, dim)."""
        q, k, v = self.heads(x, rotary)
        if cache is not None:
            k, v = cache.append(k, v)  # l keys -> all seen so far
        y = F.scaled_dot_product_attention(
            q, k, v, **_causal(q, k), enable_gqa=self.n_heads != self.n_kv_heads
        )  # (b, n_heads, l, head_dim)
        return self.output(y.transpose(1, 2).flatten(2))  # heads side by side -> (b, l, dim)


def _causal(q: Tensor, k: Tensor) -> dict:
    """How attention is told that each of the last queries sees no later key.

    Branches, not comparisons passed on: torch.compile takes no symbolic bool as an argument.
    """
    new, seen = q.shape[2], k.shape[2]  # fewer queries than keys when a cache holds earlier ones
    if new == seen:
        return {"is_causal": True}
    if new == 1:
        return {}
    return {"attn_mask": torch.ones(new, seen, dtype=torch.bool, device=q.device).tril(seen - new)}


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))"""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.gate = nn.Linear(config.dim, config.ffn_dim, bias=config.mlp_bias)
        self.up = nn.Linear(config.dim, config.ffn_dim, bias=config.mlp_bias)
        self.down = nn.Linear(config.ffn_dim, config.dim, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., dim) -> (..., dim)."""
        return self.down(F.silu(self.gate(x)) * self.up(x))  # dim -> ffn_dim -> dim


class Block(nn.Module):
    """Attention, then the feed-forward layer, each normed before and added after.

    `attention` is called with (x, rotary, cache) and `mlp` with (x); either may be replaced
    by any module with that signature.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], cache: KVCache | None = None
    ) -> Tensor:
        """x: (batch, length, dim) -> (batch, length, dim)."""
        x = x + self.attention(self.attention_norm(x), rotary, cache)
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    """A decoder-only language model: tokens (batch, length) -> logits (batch, length, vocab)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embedding.weight
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Normal weights; those that write to the residual stream divided by sqrt(2 n_layers).

        Source: GPT-2 (Radford et al., 2019), section 2.3.
        """
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim == 2:
                residual = name.endswith(("output.weight", "down.weight"))
                scale = (2 * self.config.n_layers) ** -0.5 if residual else 1.0
                parameter.normal_(0.0, self.config.init_std * scale)

    def hidden_states(self, tokens: Tensor, cache: list[KVCache] | None = None) -> Tensor:
        """What the head reads: (batch, length) int64 -> (batch, length, dim), normed.

        With a cache (from `new_cache`) tokens continue those already in it.
        """
        start = cache[0].length if cache else 0
        x = self.embedding(tokens)  # (batch, length) -> (batch, length, dim)
        rotary = rotary_table(self.config, start, tokens.shape[1], x)
        for i, block in enumerate(self.blocks):
            x = block(x, rotary, cache[i] if cache else None)
        return self.norm(x)

    def forward(self, tokens: Tensor, cache: list[KVCache] | None = None) -> Tensor:
        return self.head(self.hidden_states(tokens, cache))  # dim -> vocab

    def new_cache(self, max_length: int | None = None) -> list[KVCache]:
        """An empty key-value cache, one a block, for up to max_length positions."""
        return [KVCache(max_length or self.config.max_length) for _ in self.blocks]

    def n_parameters(self, embeddings: bool = True) -> int:
        """How many parameters, each counted once; without embeddings and head if asked."""
        skip = () if embeddings else ("embedding.", "head.")
        return sum(p.numel() for n, p in self.named_parameters() if not n.startswith(skip))

    def generate(self, tokens, max_new_tokens: int, **options) -> Tensor:
        """Continue tokens; see `lablib.models.generation.generate` for the options."""
        from lablib.models.generation import generate

        return generate(self, tokens, max_new_tokens, **options)
