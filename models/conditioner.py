"""What a denoiser is told of a sample: encoders of captions, pictures and fields, and the layout of their outputs.

Stable Diffusion 3 (arXiv 2403.03206, appendix B.3) reads two CLIP text encoders and T5. With n captions:

    CLIP-L  (n, 77, 768)  |  CLIP-bigG (n, 77, 1280)  |  zeros to 4096     sequence: side by side, zero-padded,
    T5      (n, 77, 4096)                                                  then one after the other: (n, 154, 4096)
    pooled CLIP-L (n, 768), pooled CLIP-bigG (n, 1280)                     pooled: (n, 2048)

Any subset, order and width of encoders is laid out by the same rule. Beside them stand what is not attended to: the
sizes of Stable Diffusion XL (arXiv 2307.01952, section 2.2), and maps that are laid beside the noisy latent, channel by
channel (latent diffusion, arXiv 2112.10752, section 3.3).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.fingerprint import fingerprint
from models.given import Given, Outputs


class Encoder(nn.Module, ABC):
    """One encoder of what samples come with.

    Attributes:
        reads: what it is called with: "captions", n of them; "images", n pictures (n, 3, H, W) uint8 RGB; or a field's
            name.
        learned: whether it is trained with the denoiser; else it is frozen.
        length: tokens of its sequence.
        width: features of a token.
        pooled_width: features of the vector for the whole; 0 where the encoder gives none.
        shares_positions: whether encoders of the kind, next to each other, lay their features side by side.
        nothing: what it reads in the place of nothing: the empty caption, a class of its own; None where its null
            outputs are zeros.
    """

    reads: str = "captions"
    learned: bool = False
    length: int
    width: int
    pooled_width: int
    shares_positions: bool = False
    nothing: Any = None

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


class SizeIds(nn.Module):
    """The sizes that SDXL is told, as numbers in pixels: "size_ids" (n, 6) float32, of each sample

        original height, original width, crop top, crop left, target height, target width.

    With `aesthetic`, those of its refiner: the score in the place of the target's two, (n, 5).

    Args:
        aesthetic: name of the field with the score; None is the base model.
        default_aesthetic: score of samples without one.
        negative_aesthetic: score of the unconditional prediction, in sampling.
    """

    def __init__(
        self, aesthetic: str | None = None, default_aesthetic: float = 6.0, negative_aesthetic: float = 2.5
    ) -> None:
        super().__init__()
        self.aesthetic, self.default_aesthetic = aesthetic, default_aesthetic
        self.negative_aesthetic = negative_aesthetic
        self.numbers = 5 if aesthetic is not None else 6

    def forward(self, given: Given) -> Tensor:
        """(n, 6) or (n, 5) float32."""
        size = torch.tensor([given.size] * len(given))
        original = size if given.original_size is None else given.original_size
        crop = torch.zeros_like(size) if given.crop is None else given.crop
        device = original.device
        if self.aesthetic is None:
            last = size if given.target_size is None else given.target_size
        else:
            score = given.fields.get(self.aesthetic)
            default = [self.default_aesthetic] * len(given)
            last = torch.as_tensor(default if score is None else score)[:, None]
        return torch.cat([original.float(), crop.to(device).float(), last.to(device).float()], dim=1)


class ConditionMap(nn.Module, ABC):
    """One condition with a place for everything: channels that are laid beside those of the noisy latent.

    Attributes:
        reads: names of what it needs: "images", "captions", or fields.
        channels: that it gives.
        learned: whether it has weights, trained with the denoiser.
        folder: with weights that it starts from; None: drawn.
        sampled_with: numbers that sampling takes for fields that are not given, where training draws them.
    """

    reads: tuple[str, ...]
    channels: int
    learned: bool = False
    folder: str | None = None
    sampled_with: Mapping[str, float] = MappingProxyType({})

    @abstractmethod
    def forward(self, given: Given) -> Tensor:
        """(n, channels, h, w) float32, of the latent's height and width (`given.first_stage.latent_shape`)."""

    def check_folder(self) -> None:
        """Whether `folder`, if there is one, holds such a map's weights.

        Raises:
            ValueError: it does not.
        """


class LearnedEncoder(Encoder):
    """An encoder that is trained with the denoiser: built on the meta device, and filled by an engine.

    Attributes:
        folder: with weights that it starts from; None: drawn.
    """

    learned = True
    folder: str | None = None

    @abstractmethod
    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """See `models.initialization.Initializable`."""

    def init_buffers(self) -> None:
        """There are none, unless a class says otherwise."""

    def check_folder(self) -> None:
        """Whether `folder`, if there is one, holds such an encoder.

        Raises:
            ValueError: it does not.
        """

    def null(self) -> Outputs:
        """Of `nothing`."""
        return self(self._nothing())

    def _nothing(self) -> Any:
        device = next(self.parameters()).device
        return [self.nothing] if not isinstance(self.nothing, int) else torch.tensor([self.nothing], device=device)


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

    def init_buffers(self) -> None:
        """Zeros."""
        self.sequence.zero_()
        self.pooled.zero_()

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
    """What samples come with to a denoiser's conditions, of which it gives those that it has parts for:

        "context" (n, context_length, context_dim) and "pooled" (n, pooled_dim)      encoders
        "size_ids" (n, 6 or 5)                                                       sizes
        "concat" (n, concat_channels, h, w)                                          maps, one after the other

    CLIP text encoders next to each other share token positions, their features side by side; every other encoder has
    positions of its own. All is zero-padded to `context_dim` features.

    An encoder may be dropped from a sample, in sequence and pooled vector. SD3 is trained with zeros in the place of a
    dropped encoder, which is what `dropped="zeros"` does, while its published pipelines sample with the encoding of ""
    as the unconditional one: `dropped="empty"`. For nothing, encoders of pictures give zeros in both cases. Sizes and
    maps that are dropped are zeros.

    Its encoders and maps are all frozen, or all learned: then it is trained with the denoiser, as the objective says.
    Of frozen text encoders, adapters may be trained.

    Args:
        encoders: in order; dropout addresses them by number. Without any there is no context: unconditional.
        context_dim: features of the sequence; the widest part's by default. SD3: 4096.
        dropped: what stands in the place of a dropped encoder.
        sizes: of SDXL.
        maps: laid beside the noisy latent, in this order.

    Attributes:
        encoders: their number.
        parts: encoders, sizes and maps together, the number of what can be dropped.
        learned: whether it is trained.
        frozen_weights: names of buffers that are weights, beside which adapters are trained; see models/text_lora.py.
    """

    frozen_weights: tuple[str, ...] = ()

    def __init__(
        self,
        encoders: list[Encoder],
        context_dim: int | None = None,
        dropped: Literal["zeros", "empty"] = "zeros",
        sizes: SizeIds | None = None,
        maps: list[ConditionMap] | None = None,
    ):
        super().__init__()
        self.encoder_modules = nn.ModuleList(encoders)
        self.sizes = sizes
        self.maps = nn.ModuleList(maps or [])
        self.encoders = len(encoders)
        self.parts = self.encoders + (sizes is not None) + len(self.maps)
        self.dropped = dropped
        self._groups = _group(encoders)
        widths = [sum(encoders[i].width for i in group) for group in self._groups]
        self.context_dim = context_dim or max(widths, default=0)
        if self.context_dim < max(widths, default=0):
            raise ValueError(f"context_dim is {context_dim}, but the encoders are up to {max(widths)} features wide")
        self.context_length = sum(encoders[group[0]].length for group in self._groups)
        self.pooled_dim = sum(encoder.pooled_width for encoder in encoders)
        self.concat_channels = sum(one.channels for one in maps or [])
        self.learned = self._learned()
        self.requires_grad_(self.learned)
        self.train(self.learned)

    def train(self, mode: bool = True) -> Self:
        """Frozen encoders stay in evaluation mode, with adapters too."""
        super().train(mode and self.learned)
        for encoder in self.numbered():
            encoder.train(encoder.training and encoder.learned)
        return self

    def numbered(self) -> list[Encoder]:
        """The encoders, by number."""
        return list(self.encoder_modules)  # type: ignore[arg-type]

    def map_list(self) -> list[ConditionMap]:
        """The maps, in order."""
        return list(self.maps)  # type: ignore[arg-type]

    def _learned(self) -> bool:
        pieces = [*self.numbered(), *self.map_list()]
        learned = [type(one).__name__ for one in pieces if one.learned]
        frozen = [type(one).__name__ for one in pieces if not one.learned and any(True for _ in one.parameters())]
        if learned and frozen:
            raise ValueError(
                f"{', '.join(learned)} learn with the denoiser, {', '.join(frozen)} are frozen: a conditioner takes"
                " either"
            )
        return bool(learned)

    @property
    def stored(self) -> list[int]:
        """Numbers of the encoders whose outputs are worth keeping: of captions and pictures, by frozen weights."""
        return [
            i
            for i, encoder in enumerate(self.numbered())
            if encoder.reads in ("captions", "images") and not isinstance(encoder, AbsentEncoder | LearnedEncoder)
        ]

    @property
    def reads(self) -> set[str]:
        """Names of all that its parts read: "captions", "images", fields."""
        return {encoder.reads for encoder in self.numbered()} | {name for one in self.map_list() for name in one.reads}

    @property
    def reads_images(self) -> bool:
        """Whether any of its parts reads pictures."""
        return "images" in self.reads

    def without_weights(self, nulls: Mapping[int, Outputs]) -> "Conditioner":
        """The same layout for outputs that are kept: no encoder of the numbers in `nulls` is loaded.

        Args:
            nulls: what each of these encoders gives for nothing: (length, width) and (pooled_width,).
        """
        encoders = [StoredEncoder(e, *nulls[i]) if i in nulls else e for i, e in enumerate(self.numbered())]
        return Conditioner(encoders, self.context_dim, self.dropped, self.sizes, self.map_list())

    def unconditional(self, n: int) -> Tensor:
        """What is kept for an unconditional prediction, (n, parts) bool: sizes and maps, but no encoder."""
        return (torch.arange(self.parts) >= self.encoders).expand(n, -1)

    def bare(self, n: int) -> Tensor:
        """The same without maps: sizes alone, (n, parts) bool."""
        return (torch.arange(self.parts) < self.parts - len(self.maps)) & self.unconditional(n)

    def forward(self, given: Given, keep: Tensor | None = None) -> dict[str, Tensor]:
        """Conditions of n samples, float32.

        Args:
            given: what the samples come with.
            keep: (n, parts) bool, False where a part is dropped from a sample; all are kept by default.

        Raises:
            ValueError: a map has nothing to be made of.
        """
        if keep is None:
            keep = torch.ones(len(given), self.parts, dtype=torch.bool)
        assert keep.shape == (len(given), self.parts), f"keep is {tuple(keep.shape)} for {len(given)} samples"
        kept = keep.cpu().unbind(1)
        conditions: dict[str, Tensor] = {}
        with torch.set_grad_enabled(self.learned and torch.is_grad_enabled()):
            if self.encoders:
                conditions |= self._encode(given, kept[: self.encoders])
            if self.sizes is not None:
                ids = self.sizes(given)
                conditions["size_ids"] = ids * kept[self.encoders].to(ids.device)[:, None]
            if len(self.maps):
                drawn = [self._draw_map(one, given) for one in self.map_list()]
                rest = [k.to(m.device)[:, None, None, None] for k, m in zip(kept[-len(drawn) :], drawn, strict=True)]
                conditions["concat"] = torch.cat([m * k for m, k in zip(drawn, rest, strict=True)], dim=1)
        return conditions

    def _encode(self, given: Given, keep: Sequence[Tensor]) -> dict[str, Tensor]:
        outputs: list[Outputs] = []
        for i, (encoder, kept) in enumerate(zip(self.numbered(), keep, strict=True)):
            inputs = given.read(encoder.reads)
            if i in given.encoded:
                outputs.append(self._drop(encoder, given.encoded[i], kept))
            elif inputs is None:
                sequence, pooled = encoder.null()
                share = 1.0 if self.dropped == "empty" else 0.0
                outputs.append((sequence.expand(len(given), -1, -1) * share, pooled.expand(len(given), -1) * share))
            else:
                outputs.append(self._encode_one(encoder, inputs, kept))
        rows = [torch.cat([outputs[i][0] for i in group], dim=-1) for group in self._groups]
        context = torch.cat([F.pad(row, (0, self.context_dim - row.shape[-1])) for row in rows], dim=1)
        return {"context": context, "pooled": torch.cat([pooled for _, pooled in outputs], dim=-1)}

    def _encode_one(self, encoder: Encoder, inputs: Any, kept: Tensor) -> Outputs:
        if self.dropped == "empty" and encoder.nothing is not None:
            return encoder(_with_nothing(inputs, kept, encoder.nothing))
        # What is dropped costs nothing; but one is encoded anyway, as a sharded encoder must be called on every rank.
        rows = kept.nonzero().flatten().tolist() or [0]
        outputs = encoder(inputs[rows] if isinstance(inputs, Tensor) else [inputs[row] for row in rows])
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

    def _draw_map(self, one: ConditionMap, given: Given) -> Tensor:
        for name in one.reads:
            if given.read(name) is None:
                raise ValueError(f"{type(one).__name__} needs {name!r}, and the samples come with none")
        return one(given)

    @property
    def block_lists(self) -> tuple[str, ...]:
        """Of the learned encoders; see trainer/engines/networks.py."""
        return tuple(
            f"encoder_modules.{i}.{name}"
            for i, encoder in enumerate(self.numbered())
            for name in getattr(encoder, "block_lists", ())
        )

    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Fill one parameter of a learned part."""
        kind, number, inner = name.split(".", 2)
        self.get_submodule(f"{kind}.{number}").init_parameter(inner, tensor, generator)  # type: ignore[operator]

    def init_buffers(self) -> None:
        """Compute the buffers of learned parts anew."""
        for one in (*self.numbered(), *self.map_list()):
            if any(True for _ in one.buffers()):
                one.init_buffers()  # type: ignore[operator]


def _with_nothing(inputs: Any, kept: Tensor, nothing: Any) -> Any:
    """Inputs of n samples, with the one that stands for nothing in the place of those that are dropped."""
    if isinstance(inputs, Tensor):
        mask = kept.to(inputs.device).view(-1, *[1] * (inputs.ndim - 1))
        return torch.where(mask, inputs, torch.as_tensor(nothing, dtype=inputs.dtype, device=inputs.device))
    return [one if k else nothing for one, k in zip(inputs, kept.tolist(), strict=True)]


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
