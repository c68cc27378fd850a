"""The conditions of latent diffusion's tasks (arXiv 2112.10752, sections 4.3 to 4.5) beside text and layouts: a class,
neighbours, and maps that are laid beside the noisy latent.

    class                a learned token to attend to
    neighbours           embeddings of pictures of a database, a token each (arXiv 2204.11824)
    semantic map         a learned colour for each label, averaged down to the latent's size
    super-resolution     the low-resolution picture, with or without noise
    inpainting           the latent of the picture without its hole, and where the hole is
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from models.conditioner import ConditionMap, Encoder, LearnedEncoder
from models.given import Given, Outputs
from models.pretrained import ComponentFolder


class ClassEncoder(LearnedEncoder):
    """One learned token for each class, trained with the denoiser, and one that stands for none.

    Args:
        classes: their number.
        width: features of a token.
        field: of the samples, with class numbers from 0.
        folder: with the tokens that it starts from, as `millrace import` writes them; where they have none for no
            class, it is zeros. None draws them at random.
    """

    length, pooled_width = 1, 0

    def __init__(self, classes: int = 1000, width: int = 512, field: str = "class", folder: str | None = None) -> None:
        super().__init__()
        self.reads, self.nothing, self.width, self.folder = field, classes, width, folder
        self.embedding = nn.Embedding(classes + 1, width)

    def forward(self, inputs: Tensor) -> Outputs:
        tokens = self.embedding(inputs)[:, None].float()
        return tokens, tokens.new_zeros(len(tokens), 0)

    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """From the folder if there is one; else standard normal, as torch's own embeddings, with which the paper's
        started.

        Raises:
            ValueError: the folder holds tokens of another number or width.
        """
        with torch.no_grad():
            if self.folder is None:
                tensor.normal_(generator=generator)
                return
            self.check_folder()
            kept = ComponentFolder(self.folder).read(name)
            tensor.zero_()[: len(kept)].copy_(kept)

    def check_folder(self) -> None:
        """See `LearnedEncoder.check_folder`."""
        if self.folder is not None:
            shapes = [(self.nothing + none, self.width) for none in (0, 1)]
            _check_shape(ComponentFolder(self.folder), "embedding.weight", shapes)


class NeighbourEncoder(Encoder):
    """The embeddings of a sample's neighbours as tokens, as they are (Blattmann et al. 2022, arXiv 2204.11824, section
    3.2). For nothing it gives zeros.

    Args:
        k: neighbours of a sample in training; in sampling there may be more, or fewer.
        width: numbers in an embedding; CLIP ViT-B/32 has 512.
        field: of the samples, with embeddings (n, k, width).
    """

    pooled_width = 0

    def __init__(self, k: int = 4, width: int = 512, field: str = "neighbours") -> None:
        super().__init__()
        if k < 1:
            raise ValueError(f"k={k}: at least one neighbour")
        self.reads, self.length, self.width = field, k, width
        self._make_null()

    def _make_null(self) -> None:
        self.register_buffer("nothing_given", torch.zeros(1, self.length, self.width), persistent=False)

    def forward(self, inputs: Tensor) -> Outputs:
        if inputs.ndim != 3 or inputs.shape[2] != self.width:
            raise ValueError(
                f"{self.reads!r} holds {tuple(inputs.shape[1:])} numbers a sample, and the model was made for"
                f" {(self.length, self.width)}: neighbours and numbers in an embedding"
            )
        return inputs.float(), inputs.new_zeros(len(inputs), 0, dtype=torch.float32)

    def null(self) -> Outputs:
        zeros: Tensor = self.nothing_given  # type: ignore[assignment]
        return zeros, zeros[:, 0, :0]

    def init_buffers(self) -> None:
        """Zeros."""
        self.nothing_given.zero_()  # type: ignore[operator]


class GuidedNeighbourEncoder(NeighbourEncoder, LearnedEncoder):
    """The same, but for nothing it gives a learned vector in every token's place, trained with the denoiser: the
    published code's choice where neighbours are dropped in training. A conditioner with it has `dropped="empty"`.

    Args:
        k, width, field: as in `NeighbourEncoder`.
    """

    nothing = math.nan  # which no embedding has

    def _make_null(self) -> None:
        self.nothing_given = nn.Parameter(torch.empty(self.width))

    def forward(self, inputs: Tensor) -> Outputs:
        tokens, pooled = super().forward(inputs)
        return torch.where(tokens.isnan(), self.nothing_given.float(), tokens), pooled

    def null(self) -> Outputs:
        return self(self.nothing_given.new_full((1, self.length, self.width), math.nan))

    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Standard normal."""
        with torch.no_grad():
            tensor.normal_(generator=generator)

    def init_buffers(self) -> None:
        """There are none."""


class SemanticMap(ConditionMap):
    """A map of labels as learned colours, trained with the denoiser: what one-hot labels give that are averaged down to
    the latent's size, then mapped to few channels linearly. Labels beyond the classes (void) are zeros.

    Args:
        classes: labels, from 0 to below this. COCO-Stuff has 182.
        channels: that each becomes.
        field: of the samples, with labels (n, H, W).
        folder: with the colours that it starts from, as `millrace import` writes them; None draws them at random.
    """

    learned = True

    def __init__(self, classes: int = 182, channels: int = 3, field: str = "map", folder: str | None = None) -> None:
        super().__init__()
        self.reads, self.channels, self.classes, self.folder = (field,), channels, classes, folder
        self.colours = nn.Embedding(classes, channels)

    def forward(self, given: Given) -> Tensor:
        labels = given.read(self.reads[0]).long()
        known = (labels >= 0) & (labels < self.classes)
        colours = self.colours(labels.where(known, 0)).float() * known[..., None]
        return _averaged(colours.permute(0, 3, 1, 2), given)

    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """From the folder if there is one; else uniform, as torch's own for a convolution of 1x1 from one-hot labels.

        Raises:
            ValueError: the folder holds colours of another number.
        """
        with torch.no_grad():
            if self.folder is not None:
                self.check_folder()
                tensor.copy_(ComponentFolder(self.folder).read(name))
                return
            bound = self.classes**-0.5
            tensor.uniform_(-bound, bound, generator=generator)

    def check_folder(self) -> None:
        """See `ConditionMap.check_folder`."""
        if self.folder is not None:
            _check_shape(ComponentFolder(self.folder), "colours.weight", [tuple(self.colours.weight.shape)])


class OneHotMap(ConditionMap):
    """A map of labels as it is, a channel for each, averaged down to the latent's size.

    Args:
        classes, field: as in `SemanticMap`.
    """

    def __init__(self, classes: int, field: str = "map") -> None:
        super().__init__()
        self.reads, self.channels = (field,), classes

    def forward(self, given: Given) -> Tensor:
        labels = given.read(self.reads[0]).long()
        places = torch.arange(self.channels, device=labels.device)[:, None, None]
        return _averaged((labels[:, None] == places).float(), given)


class PictureMap(ConditionMap):
    """A second picture, aligned with the first: its pixels from -1 to 1, or its latent.

    Args:
        field: of the samples, with pictures (n, 3, H, W) uint8.
        channels: 3 for pixels, which are averaged down to the latent's size; the first stage's for latents.
        encode: whether the first stage encodes it.
        scaled: whether latents are scaled like those that are denoised. Models that edit Stable Diffusion's pictures
            read them unscaled (InstructPix2Pix, arXiv 2211.09800).
    """

    def __init__(self, field: str, channels: int = 3, encode: bool = False, scaled: bool = True) -> None:
        super().__init__()
        self.reads, self.channels, self.encode, self.scaled = (field,), channels, encode, scaled

    def forward(self, given: Given) -> Tensor:
        pixels = given.read(self.reads[0]).float() / 127.5 - 1
        if not self.encode:
            return _averaged(pixels, given)
        latent = _encoded(pixels, given, self.channels)
        assert given.first_stage is not None
        return latent if self.scaled else given.first_stage.unscaled(latent)


class LowResolution(ConditionMap):
    """The picture at low resolution, for super-resolution: scaled down here, unless the samples come with one.

    With noise augmentation, Gaussian noise is added whose standard deviation is drawn for each sample between 0 and
    `noise`; a further channel tells it, so that the network knows how far to trust the picture (arXiv 2106.15282,
    section 4.2). Where the samples' field `level_field` holds a number, it is the standard deviation; in sampling it is
    0 unless said otherwise.

    Args:
        factor: that sides are divided by, bicubic and antialiased, in 256 levels as a picture's file has.
        noise: the largest standard deviation, where pixels go from -1 to 1; 0 adds none, and tells none.
        field: of the samples, with pictures (n, 3, h, w) uint8 at low resolution.
        level_field: of the samples, with standard deviations.
    """

    def __init__(
        self, factor: int = 4, noise: float = 0.0, field: str = "low_resolution", level_field: str = "noise_level"
    ) -> None:
        super().__init__()
        if factor < 1 or noise < 0:
            raise ValueError(f"a factor of at least 1 and no negative noise, not factor={factor}, noise={noise}")
        self.factor, self.noise, self.field, self.level_field = factor, noise, field, level_field
        self.reads, self.channels = (), 3 + (noise > 0)
        self.sampled_with = {level_field: 0.0} if noise else {}

    def forward(self, given: Given) -> Tensor:
        low = given.read(self.field)
        if low is None:
            low = self._scaled_down(given)
        low = _interpolated(low.float() / 127.5 - 1, given)
        if not self.noise:
            return low
        level = given.read(self.level_field)
        if level is None:
            assert given.draws is not None
            level = self.noise * given.draws.uniform("low resolution/level", device=low.device)
        level = torch.as_tensor(level, device=low.device).float().view(-1, 1, 1, 1)
        assert given.draws is not None
        noise = given.draws.normal("low resolution/noise", low.shape[1:], low.device)
        return torch.cat([low + level * noise, level.expand(-1, 1, *low.shape[2:])], dim=1)

    def _scaled_down(self, given: Given) -> Tensor:
        if given.images is None or given.images.shape[1] != 3:
            raise ValueError(f"LowResolution needs {self.field!r} or pictures, and the samples come with neither")
        height, width = given.size
        size = (height // self.factor, width // self.factor)
        low = interpolate(given.images.float(), size=size, mode="bicubic", antialias=True)
        return low.clamp(0, 255).round()


class MaskedPicture(ConditionMap):
    """What inpainting starts from: the latent of the picture without its hole, and where the hole is, scaled down to
    the latent's size without smoothing.

    Args:
        latent_channels: of the first stage.
        field: of the samples, with masks (n, H, W), true in the hole.
        form: "ldm": the latent of a picture with its hole in black, then a mask of -1, and 1 in the hole. "sd", Stable
            Diffusion's inpainting models: a mask of 0, and 1 in the hole, then the latent of one with its hole in grey.
    """

    def __init__(self, latent_channels: int = 3, field: str = "mask", form: Literal["ldm", "sd"] = "ldm") -> None:
        super().__init__()
        self.reads, self.channels, self.field, self.form = ("images", field), latent_channels + 1, field, form

    def forward(self, given: Given) -> Tensor:
        images, mask = given.images, given.read(self.field)[:, None]
        assert images is not None
        pixels = (images / 127.5 - 1).where(~mask, -1.0 if self.form == "ldm" else 0.0)
        latent = _encoded(pixels, given, self.channels - 1)
        hole = interpolate(mask.float(), size=latent.shape[2:], mode="nearest")
        return torch.cat([latent, hole * 2 - 1] if self.form == "ldm" else [hole, latent], dim=1)


def _check_shape(folder: ComponentFolder, name: str, shapes: Sequence[tuple[int, ...]]) -> None:
    """Whether a folder has a tensor of one of the shapes, in a ValueError that names it."""
    if name not in folder.names:
        raise ValueError(f"{folder.path} lacks {name}")
    if folder.shape(name) not in shapes:
        raise ValueError(f"{folder.path}: {name} is {folder.shape(name)}, not {' or '.join(map(str, shapes))}")


def _size(given: Given) -> tuple[int, int]:
    """Height and width of the latent."""
    assert given.first_stage is not None
    _, height, width = given.first_stage.latent_shape(*given.size)
    return height, width


def _averaged(maps: Tensor, given: Given) -> Tensor:
    """Scaled down to the latent's size by halves, each the mean of two by two."""
    size = _size(given)
    return maps if tuple(maps.shape[2:]) == size else interpolate(maps, size=size, mode="area")


def _interpolated(maps: Tensor, given: Given) -> Tensor:
    size = _size(given)
    return maps if tuple(maps.shape[2:]) == size else interpolate(maps, size=size, mode="bicubic")


@torch.no_grad()
def _encoded(pixels: Tensor, given: Given, channels: int) -> Tensor:
    """The most likely latent of pictures (n, 3, H, W) from -1 to 1."""
    assert given.first_stage is not None
    if pixels.shape[1] != 3:
        raise ValueError("a condition is made of the pictures, which were not read: leave out data.encoded")
    latent = given.first_stage.encode(pixels)
    if latent.shape[1] != channels:
        raise ValueError(f"the first stage has {latent.shape[1]} channels, and a condition of its latents {channels}")
    return latent.float()
