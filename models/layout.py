"""What is where in a picture: boxes with labels, as tokens that a transformer reads.

Latent diffusion (arXiv 2112.10752, appendix E.2 and E.3.4; the tokens are those of arXiv 2105.06458) tells a layout in
92 tokens of a vocabulary of 8,192:

    label, top left corner, bottom right corner      of each of at most 30 objects
    8191, 8191, 8191                                 in the place of each object that is not there
    top left corner, bottom right corner             of the picture, in the whole that it was cropped from

A label is its own token, from 0. A corner (x, y), from 0 to 1, is one token, too: its place in a grid of 90 x 90, the
largest square below the vocabulary's size, round(89 y) * 90 + round(89 x). Labels and corners share the numbers; their
places in the sequence tell them apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt

import torch
from torch import Tensor

from models.given import Outputs
from models.token_transformer import TransformerEncoder

Corners = tuple[float, float, float, float]
"""Left, top, right and bottom, from 0 to 1."""

WHOLE: Corners = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True)
class Layout:
    """One picture's.

    Args:
        labels: of its objects, from 0.
        boxes: of each, within the picture.
        crop: the picture's place in the whole that it was cropped from.
    """

    labels: tuple[int, ...] = ()
    boxes: tuple[Corners, ...] = ()
    crop: Corners = WHOLE


class LayoutEncoder(TransformerEncoder):
    """Layouts by a transformer of their own, trained with the denoiser. Of more objects than there is room for, the
    first are taken. Nothing is a layout without objects.

    Args:
        field: of the samples, with a `Layout` each.
        classes: labels, from 0 to below this.
        objects: the most in a picture.
        vocabulary: tokens that there are.
        width, layers, heads, head_dim: of the transformer.
        folder: see `TransformerEncoder`.

    Raises:
        ValueError: the vocabulary is too small for the classes.
    """

    nothing = Layout()

    def __init__(
        self,
        field: str = "boxes",
        classes: int = 601,
        objects: int = 30,
        vocabulary: int = 8192,
        width: int = 512,
        layers: int = 16,
        heads: int = 8,
        head_dim: int = 64,
        folder: str | None = None,
    ) -> None:
        if classes >= vocabulary:
            raise ValueError(f"classes={classes}: a vocabulary of {vocabulary} has room for fewer")
        super().__init__(vocabulary, 3 * objects + 2, width, layers, heads, head_dim, folder)
        self.reads, self.classes, self.objects = field, classes, objects
        self.absent, self.grid = vocabulary - 1, isqrt(vocabulary)

    def forward(self, inputs: Sequence[Layout]) -> Outputs:
        tokens = torch.tensor([self.tokens(one) for one in inputs], device=self.device)
        return self.encode(tokens)

    def tokens(self, layout: Layout) -> list[int]:
        """The tokens of a layout, 3 * objects + 2 of them.

        Raises:
            ValueError: a label that is no class.
        """
        told: list[int] = []
        for label, box in list(zip(layout.labels, layout.boxes, strict=True))[: self.objects]:
            if not 0 <= label < self.classes:
                raise ValueError(f"a box has the label {label}, and there are {self.classes} classes")
            told += [label, *self._corners(box)]
        told += [self.absent] * (3 * self.objects - len(told))
        return [*told, *self._corners(layout.crop)]

    def _corners(self, box: Corners) -> list[int]:
        left, top, right, bottom = (round(value * (self.grid - 1)) for value in box)
        return [top * self.grid + left, bottom * self.grid + right]

    def blank_tokens(self, n: int) -> Tensor:
        """See `TransformerEncoder`."""
        return torch.full((n, self.length), self.absent, device=self.device)
