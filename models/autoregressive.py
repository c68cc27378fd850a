"""Transformers that predict a picture's codes one after the other, row by row, from those before and from a context:
RARM (Blattmann et al. 2022, arXiv 2204.11824), whose context are neighbours of the picture.

    tokens -> embedding + learned position
           -> blocks x [ x + causal attention(norm(x)),  x + attention(norm(x), context),  x + mlp(norm(x)) ]
           -> logits of the next code

In sampling a `Cache` keeps keys and values, so that each step computes one token.

Shapes: n samples, T tokens, L tokens of context, D width, Z codes.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MLP_RATIO = 4


class AutoregressiveTransformer(nn.Module):
    """Tokens to logits of the code that follows each. The last token that there is stands for the start.

    Args:
        codes: Z, that are predicted.
        tokens: that there are; None: the codes and two more, the start and one before it, which the published code
            keeps for masks.
        length: of the longest sequence, the start included: a picture's codes.
        num_layers: blocks.
        num_attention_heads, attention_head_dim: of attention; the width D is their product.
        cross_attention_dim: channels of the context; None: there is none.
        gated: MLPs gated by GELU (GEGLU), as RARM's, or plain with GELU, as GPT's.
        qkv_bias, final_norm, head_bias: RARM's are false, false and true; GPT's true, true and false.
    """

    block_lists: ClassVar[tuple[str, ...]] = ("blocks",)

    def __init__(
        self,
        codes: int = 16384,
        tokens: int | None = None,
        length: int = 256,
        num_layers: int = 18,
        num_attention_heads: int = 12,
        attention_head_dim: int = 64,
        cross_attention_dim: int | None = 512,
        gated: bool = True,
        qkv_bias: bool = False,
        final_norm: bool = False,
        head_bias: bool = True,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "codes": codes,
            "tokens": codes + 2 if tokens is None else tokens,
            "length": length,
            "num_layers": num_layers,
            "num_attention_heads": num_attention_heads,
            "attention_head_dim": attention_head_dim,
            "cross_attention_dim": cross_attention_dim,
            "gated": gated,
            "qkv_bias": qkv_bias,
            "final_norm": final_norm,
            "head_bias": head_bias,
        }
        for name, value in self.config.items():
            if isinstance(value, int) and not isinstance(value, bool) and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.config["tokens"] <= codes:
            raise ValueError(f"tokens={tokens}: more than the {codes} codes, for one that stands for the start")
        self.codes, self.length = codes, length
        self.start: int = self.config["tokens"] - 1
        width = num_attention_heads * attention_head_dim
        self.embed_tokens = nn.Embedding(self.config["tokens"], width)
        self.embed_positions = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(
            Block(width, num_attention_heads, cross_attention_dim, gated, qkv_bias) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(width) if final_norm else nn.Identity()
        self.head = nn.Linear(width, codes, bias=head_bias)

    def forward(self, tokens: Tensor, context: Tensor | None = None, cache: "Cache | None" = None) -> Tensor:
        """Logits (n, T, Z) of what follows each of the tokens (n, T), in the parameters' type.

        Args:
            tokens: the first is the start; with a cache, those that follow what it has seen.
            context: (n, L, cross_attention_dim).
            cache: of the tokens before, to which these are added.

        Raises:
            ValueError: more tokens than there are positions.
        """
        before = cache.taken if cache is not None else 0
        if before + tokens.shape[1] > self.length:
            raise ValueError(f"{before + tokens.shape[1]} tokens, and positions for {self.length}")
        positions = torch.arange(before, before + tokens.shape[1], device=tokens.device)
        x = self.embed_tokens(tokens) + self.embed_positions(positions)
        if context is not None:
            context = context.to(x.dtype)
        for i, block in enumerate(self.blocks):
            x = block(x, context, cache.at(i, positions) if cache is not None else None)
        if cache is not None:
            cache.taken += tokens.shape[1]
        return self.head(self.norm(x))

    def inputs(self, codes: Tensor) -> Tensor:
        """Codes (n, T) to the tokens that each is predicted from: the start, and all codes but the last."""
        return F.pad(codes[:, :-1], (1, 0), value=self.start)

    def flops(self, height: int, width: int, context_length: int) -> int:
        """FLOPs of one sample's forward pass: 2 per multiplication in linear layers and attention.

        Args:
            height, width: of the map of codes.
            context_length: L.
        """
        rows, columns = self.grid(height, width)
        t, d = rows * columns, self.head.in_features
        return 2 * (sum(block.products(t, context_length) for block in self.blocks) + t * d * self.codes)  # type: ignore[operator]

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of codes.

        Raises:
            ValueError: they are more than there are positions.
        """
        if height * width > self.length:
            raise ValueError(f"{height} x {width} codes are more than length={self.length}")
        return height, width

    def condition_keys(self, context_dim: int, pooled_dim: int) -> dict[str, int | None]:
        """Keys of the configuration that follow from what the conditioner gives, with the values that they need."""
        return {"cross_attention_dim": context_dim or None}

    @torch.no_grad()
    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """First values: torch's own, with which the paper's started; but biases are zero, positions of length one."""
        kind = name.rsplit(".", 2)[-2]
        if "norm" in kind:
            tensor.fill_(1.0 if name.endswith("weight") else 0.0)
        elif name.endswith("bias"):
            tensor.zero_()
        elif kind.startswith("embed"):
            tensor.normal_(std=tensor.shape[1] ** -0.5 if kind == "embed_positions" else 1.0, generator=generator)
        else:
            bound = tensor.shape[1] ** -0.5
            tensor.uniform_(-bound, bound, generator=generator)

    def init_buffers(self) -> None:
        """There are none."""


class Block(nn.Module):
    """Attention to what came before, attention to the context if there is one, and an MLP; each behind a norm and
    around a residual.

    Args:
        width: D.
        heads: of attention.
        context_dim: channels of the context; None: there is none.
        gated: see `AutoregressiveTransformer`.
        bias: of queries, keys and values.
        causal: whether a token attends to those before it and itself only.
    """

    def __init__(
        self, width: int, heads: int, context_dim: int | None, gated: bool, bias: bool, causal: bool = True
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.own = Attention(width, width, heads, bias, causal)
        if context_dim is not None:
            self.norm2 = nn.LayerNorm(width)
            self.cross = Attention(width, context_dim, heads, bias)
        self.reads_context = context_dim is not None
        self.norm3 = nn.LayerNorm(width)
        self.mlp = MLP(width, gated)

    def forward(self, x: Tensor, context: Tensor | None = None, kept: "Kept | None" = None) -> Tensor:
        """(n, T, D) to (n, T, D); context (n, L, context_dim)."""
        normed = self.norm1(x)
        keys, values = self.own.project(normed)
        mask = None
        if kept is not None:
            keys, values, mask = kept.extend(keys, values)
        x = x + self.own(normed, keys, values, mask)
        if self.reads_context:
            assert context is not None, "a context is needed"
            x = x + self.cross(self.norm2(x), *self._context(context, kept))
        return x + self.mlp(self.norm3(x))

    def _context(self, context: Tensor, kept: "Kept | None") -> tuple[Tensor, Tensor]:
        if kept is None:
            return self.cross.project(context)
        if kept.context is None:
            kept.context = self.cross.project(context)
        return kept.context

    def products(self, t: int, length: int) -> int:
        """Multiplications of one sample's forward pass, with t tokens and `length` tokens of context."""
        d = self.norm1.normalized_shape[0]
        products = t * (4 * d * d + self.mlp.products) + 2 * t * t * d
        if self.reads_context:
            products += 2 * t * d * d + length * self.cross.to_kv.weight.numel() + 2 * t * length * d
        return products


class Attention(nn.Module):
    """Attention in heads, together as wide as the tokens are.

    Args:
        width: of tokens that attend.
        source: channels of what is attended to.
    """

    def __init__(self, width: int, source: int, heads: int, bias: bool, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.to_q = nn.Linear(width, width, bias=bias)
        self.to_kv = nn.Linear(source, 2 * width, bias=bias)
        self.to_out = nn.Linear(width, width)

    def project(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (n, heads, tokens, channels) of what is attended to, (n, tokens, source)."""
        keys, values = self.to_kv(source).chunk(2, dim=-1)
        return self._split(keys), self._split(values)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """(n, T, D) to (n, T, D).

        Args:
            mask: (T, tokens) bool, what each attends to; None: what came before if it is causal, or all.
        """
        causal = self.causal and mask is None
        attended = F.scaled_dot_product_attention(self._split(self.to_q(x)), keys, values, mask, is_causal=causal)
        return self.to_out(attended.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class MLP(nn.Module):
    """Two layers around GELU; gated, one half of the first's outputs gates the other (GEGLU, arXiv 2002.05202)."""

    def __init__(self, width: int, gated: bool) -> None:
        super().__init__()
        self.gated = gated
        self.up = nn.Linear(width, MLP_RATIO * width * (2 if gated else 1))
        self.down = nn.Linear(MLP_RATIO * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(n, T, D) to (n, T, D)."""
        hidden = self.up(x)
        if not self.gated:
            return self.down(F.gelu(hidden))
        hidden, gate = hidden.chunk(2, dim=-1)
        return self.down(hidden * F.gelu(gate))

    @property
    def products(self) -> int:
        """Multiplications of a token."""
        return self.up.weight.numel() + self.down.weight.numel()


class Kept:
    """What a block keeps: keys and values of the tokens so far, (n, heads, length, channels), and of the context.

    Args:
        length: of the longest sequence.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self.positions = torch.zeros(0, dtype=torch.int64)
        self.own: tuple[Tensor, Tensor] | None = None
        self.context: tuple[Tensor, Tensor] | None = None

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Add those of the tokens at `positions`; all, and which of them each of these tokens attends to."""
        if self.own is None:
            shape = (*keys.shape[:2], self.length, keys.shape[3])
            self.own = keys.new_zeros(shape), values.new_zeros(shape)
        for kept, new in zip(self.own, (keys, values), strict=True):
            kept.index_copy_(2, self.positions, new)
        mask = self.positions[:, None] >= torch.arange(self.length, device=keys.device)
        return *self.own, mask


class Cache:
    """What an `AutoregressiveTransformer` keeps of the tokens so far; of one size throughout, so that steps are alike.

    Args:
        layers: blocks.
        length: of the longest sequence.

    Attributes:
        taken: tokens that it has seen.
    """

    def __init__(self, layers: int, length: int) -> None:
        self.taken = 0
        self._kept = [Kept(length) for _ in range(layers)]

    def at(self, layer: int, positions: Tensor) -> Kept:
        """A block's, for tokens at these positions."""
        self._kept[layer].positions = positions
        return self._kept[layer]
