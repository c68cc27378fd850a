"""What a denoiser is told of a sample: frozen encoders of captions and pictures, and the layout of their outputs.

Stable Diffusion 3 (arXiv 2403.03206, appendix B.3) reads two CLIP text encoders and T5. With n captions:

    CLIP-L  (n, 77, 768)  |  CLIP-bigG (n, 77, 1280)  |  zeros to 4096     sequence: side by side, zero-padded,
    T5      (n, 77, 4096)                                                  then one after the other: (n, 154, 4096)
    pooled CLIP-L (n, 768), pooled CLIP-bigG (n, 1280)                     pooled: (n, 2048)

Any subset, order and width of encoders is laid out by the same rule.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.fingerprint import fingerprint

Outputs = tuple[Tensor, Tensor]
"""A sequence (length, width) and a pooled vector (pooled_width,), or those of several samples, one a row."""


class Encoder(nn.Module, ABC):
    """One frozen encoder of what samples come with.

    Attributes:
        reads: what it is called with: n captions, or n pictures (n, 3, H, W) uint8 RGB.
        length: tokens of its sequence.
        width: features of a token.
        pooled_width: features of the vector for the whole; 0 where the encoder gives none.
        shares_positions: whether encoders of the kind, next to each other, lay their features side by side.
    """

    reads: Literal["captions", "images"] = "captions"
    length: int
    width: int
    pooled_width: int
    shares_positions: bool = False

    @abstractmethod
    def forward(self, inputs: Any) -> Outputs:
        """(n, length, width) and (n, pooled_width), float32, of n samples."""

    @abstractmethod
    def null(self) -> Outputs:
        """What it gives for nothing: (1, length, width) and (1, pooled_width), float32."""

    def settings(self) -> dict[str, Any]:
        """JSON values: what changes the outputs, beside weights."""
        return {"kind": type(self).__name__, "length": self.length, "pooled_width": self.pooled_width}

    def fingerprint(self) -> str:
        """Of all that the outputs depend on."""
        return fingerprint(self.state_dict().items(), self.settings())


class _Fixed(Encoder):
    """Knows what it gives for nothing, and nothing else."""

    sequence: Tensor
    pooled: Tensor

    def __init__(self, sequence: Tensor, pooled: Tensor):
        super().__init__()
        (self.length, self.width), self.pooled_width = sequence.shape, len(pooled)
        self.register_buffer("sequence", sequence.float()[None], persistent=False)
        self.register_buffer("pooled", pooled.float()[None], persistent=False)

    def null(self) -> Outputs:
        return self.sequence, self.pooled


class AbsentEncoder(_Fixed):
    """The place of an encoder that is not loaded: zeros, as if it were always dropped.

    Args:
        length, width, pooled_width: as the encoder's would be.
    """

    def __init__(self, length: int, width: int, pooled_width: int = 0):
        super().__init__(torch.zeros(length, width), torch.zeros(pooled_width))

    def forward(self, inputs: Sequence[str]) -> Outputs:
        n = len(inputs)
        return self.sequence.expand(n, -1, -1), self.pooled.expand(n, -1)


class StoredEncoder(_Fixed):
    """The place of an encoder whose outputs are read from where they are kept.

    Args:
        encoder: whose place it takes.
        sequence, pooled: what that gives for nothing, (length, width) and (pooled_width,).
    """

    def __init__(self, encoder: Encoder, sequence: Tensor, pooled: Tensor):
        super().__init__(sequence, pooled)
        assert (self.length, self.width) == (encoder.length, encoder.width)
        self.reads, self.shares_positions = encoder.reads, encoder.shares_positions

    def forward(self, inputs: Any) -> Outputs:
        raise AssertionError("an encoder that is not loaded cannot encode")


class Conditioner(nn.Module):
    """Samples' captions and pictures to a denoiser's conditions: "context" (n, context_length, context_dim) and
    "pooled" (n, pooled_dim).

    CLIP text encoders next to each other share token positions, their features side by side; every other encoder has
    positions of its own. All is zero-padded to `context_dim` features.

    An encoder may be dropped from a sample, in sequence and pooled vector. SD3 is trained with zeros in the place of a
    dropped encoder, which is what `dropped="zeros"` does, while its published pipelines sample with the encoding of ""
    as the unconditional one: `dropped="empty"`. For nothing, encoders of pictures give zeros in both cases.

    Args:
        encoders: in order; dropout addresses them by number.
        context_dim: features of the sequence; the widest part's by default. SD3: 4096.
        dropped: what stands in the place of a dropped encoder.

    Attributes:
        encoders: their number.
    """

    def __init__(
        self,
        encoders: list[Encoder],
        context_dim: int | None = None,
        dropped: Literal["zeros", "empty"] = "zeros",
    ):
        super().__init__()
        if not encoders:
            raise ValueError("a conditioner needs at least one encoder; AbsentEncoder stands for none")
        self.encoder_modules = nn.ModuleList(encoders)
        self.encoders = len(encoders)
        self.dropped = dropped
        self._parts = _group(encoders)
        widths = [sum(encoders[i].width for i in part) for part in self._parts]
        self.context_dim = context_dim or max(widths)
        if self.context_dim < max(widths):
            raise ValueError(f"context_dim is {context_dim}, but the encoders are up to {max(widths)} features wide")
        self.context_length = sum(encoders[part[0]].length for part in self._parts)
        self.pooled_dim = sum(encoder.pooled_width for encoder in encoders)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Encoders are frozen: they stay in evaluation mode."""
        return super().train(False)

    def numbered(self) -> list[Encoder]:
        """The encoders, by number."""
        return list(self.encoder_modules)  # type: ignore[arg-type]

    @property
    def stored(self) -> list[int]:
        """Numbers of the encoders whose outputs are worth keeping."""
        return [i for i, encoder in enumerate(self.numbered()) if not isinstance(encoder, AbsentEncoder)]

    @property
    def reads_images(self) -> bool:
        """Whether any of the encoders does."""
        return any(encoder.reads == "images" for encoder in self.numbered())

    def without_weights(self, nulls: Mapping[int, Outputs]) -> "Conditioner":
        """The same layout for outputs that are kept: no encoder of the numbers in `nulls` is loaded.

        Args:
            nulls: what each of these encoders gives for nothing: (length, width) and (pooled_width,).
        """
        encoders = [StoredEncoder(e, *nulls[i]) if i in nulls else e for i, e in enumerate(self.numbered())]
        return Conditioner(encoders, self.context_dim, self.dropped)

    @torch.no_grad()
    def forward(
        self,
        captions: Sequence[str],
        keep: Tensor | None = None,
        encoded: Mapping[int, Outputs] | None = None,
        images: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Conditions of n samples, float32.

        Args:
            captions: n captions.
            keep: (n, encoders) bool, False where an encoder is dropped from a sample; all are kept by default. With
                none kept this gives the unconditional conditions.
            encoded: by number of the encoder, its outputs of the samples where they are kept: (n, length, width) and
                (n, pooled_width). Such an encoder is not run on them.
            images: (n, 3, H, W) uint8. Without, encoders of pictures are as if dropped.
        """
        encoded = encoded or {}
        if keep is None:
            keep = torch.ones(len(captions), self.encoders, dtype=torch.bool)
        assert keep.shape == (len(captions), self.encoders), f"keep is {tuple(keep.shape)} for {len(captions)} captions"
        outputs: list[Outputs] = []
        for i, (encoder, kept) in enumerate(zip(self.numbered(), keep.cpu().unbind(1), strict=True)):
            given = captions if encoder.reads == "captions" else images
            if i in encoded:
                outputs.append(self._drop(encoder, encoded[i], kept))
            elif given is None:
                sequence, pooled = encoder.null()
                outputs.append((sequence.expand(len(captions), -1, -1), pooled.expand(len(captions), -1)))
            else:
                outputs.append(self._encode_one(encoder, given, kept))
        rows = [torch.cat([outputs[i][0] for i in part], dim=-1) for part in self._parts]
        context = torch.cat([F.pad(row, (0, self.context_dim - row.shape[-1])) for row in rows], dim=1)
        return {"context": context, "pooled": torch.cat([pooled for _, pooled in outputs], dim=-1)}

    def _encode_one(self, encoder: Encoder, given: Sequence[str] | Tensor, kept: Tensor) -> Outputs:
        if self.dropped == "empty" and encoder.reads == "captions":
            return encoder([caption if k else "" for caption, k in zip(given, kept.tolist(), strict=True)])
        # What is dropped costs nothing; but one is encoded anyway, as a sharded encoder must be called on every rank.
        rows = kept.nonzero().flatten().tolist() or [0]
        outputs = encoder(given[rows] if isinstance(given, Tensor) else [given[row] for row in rows])
        index = torch.tensor(rows, device=outputs[0].device)
        mask = kept.to(outputs[0].device)
        sequence, pooled = (
            output.new_zeros(len(kept), *output.shape[1:]).index_copy(0, index, output) for output in outputs
        )
        return sequence * mask[:, None, None], pooled * mask[:, None]

    def _drop(self, encoder: Encoder, encoded: Outputs, kept: Tensor) -> Outputs:
        """Outputs that are kept, with what stands for the dropped ones."""
        sequence, pooled = (output.float() for output in encoded)
        mask = kept.to(sequence.device)
        if self.dropped == "zeros":
            return sequence * mask[:, None, None], pooled * mask[:, None]
        null_sequence, null_pooled = encoder.null()
        return (
            torch.where(mask[:, None, None], sequence, null_sequence),
            torch.where(mask[:, None], pooled, null_pooled),
        )


def _group(encoders: Sequence[Encoder]) -> list[list[int]]:
    """Numbers of the encoders that share token positions."""
    parts: list[list[int]] = []
    for i, encoder in enumerate(encoders):
        before = encoders[i - 1] if i else None
        if before is not None and encoder.shares_positions and before.shares_positions:
            if encoder.length != before.length:
                raise ValueError(f"CLIP encoders side by side have lengths {before.length} and {encoder.length}")
            parts[-1].append(i)
        else:
            parts.append([i])
    return parts
