"""Drawing codes one after the other from what an autoregressive network predicts."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.autoregressive import Cache


@dataclass(frozen=True)
class CodeSampler:
    """Draws each code from softmax(logits / temperature), of the likeliest codes alone.

    Args:
        temperature: below 1 likely codes become likelier.
        top_k: how many codes may be drawn at each place; None: all.
        top_p: so many of the likeliest codes as together have this probability may be drawn, one at least; 1: all.
        cached: keep keys and values of the codes so far. Without, each step computes all of them anew.
    """

    temperature: float = 1.0
    top_k: int | None = 256
    top_p: float = 1.0
    cached: bool = True

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature}: it must be above 0")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k}: at least one code")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: a probability above 0, at most 1")

    @torch.no_grad()
    def sample(
        self,
        network: Any,
        uniform: Tensor,
        context: Tensor | None = None,
        null_context: Tensor | None = None,
        scale: float = 1.0,
    ) -> Tensor:
        """Codes (n, T) of n pictures.

        Args:
            network: an `AutoregressiveTransformer`; called as often on every rank, with the same shapes.
            uniform: (n, T) numbers in [0, 1) that draw the codes.
            context: (n, L, C) that the codes are drawn under.
            null_context: the same of the unconditional prediction.
            scale: of guidance: logits = unconditional + scale (conditional - unconditional); 1 is none.
        """
        n, steps = uniform.shape
        guided = scale != 1 and null_context is not None
        if guided:
            assert context is not None
            context = torch.cat([context, null_context])  # type: ignore[list-item]
        tokens = torch.full((n, 1), network.start, device=uniform.device)
        cache = Cache(len(network.blocks), network.length) if self.cached else None
        for i in range(steps):
            seen = tokens[:, -1:] if cache is not None else tokens
            logits = network(seen.repeat(2, 1) if guided else seen, context, cache)[:, -1].float()
            if guided:
                conditional, unconditional = logits.chunk(2)
                logits = unconditional + scale * (conditional - unconditional)
            tokens = torch.cat([tokens, draw(self.filtered(logits), uniform[:, i])[:, None]], dim=1)
        return tokens[:, 1:]

    def filtered(self, logits: Tensor) -> Tensor:
        """Logits (n, Z) at the temperature, minus infinity where a code may not be drawn."""
        logits = logits / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k, dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.top_p < 1:
            ordered, order = logits.sort(dim=-1, descending=True)
            shares = ordered.softmax(dim=-1)
            beyond = shares.cumsum(dim=-1) - shares >= self.top_p  # what is likelier has that probability already
            logits = logits.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -torch.inf)
        return logits


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """The codes (n,) that uniform numbers (n,) draw from softmax(logits), (n, Z)."""
    upto = logits.double().softmax(dim=-1).cumsum(dim=-1)
    codes = torch.searchsorted(upto, (uniform.double() * upto[:, -1])[:, None], right=True)[:, 0]
    return codes.clamp(max=logits.shape[-1] - 1)
