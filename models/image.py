"""Frozen encoders of pictures from transformers, as a conditioner takes them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from models.conditioner import Encoder
from models.given import Outputs
from models.hub import Dtype, device_of, load_part, load_weights

# Modules of a pair of encoders that pictures do not pass through.
_OF_TEXT = ("text_model", "text_projection", "logit_scale", "logit_bias")
_FILTERS: dict[int, Literal["bilinear", "bicubic"]] = {2: "bilinear", 3: "bicubic"}  # by Pillow's numbers


class ImageEncoder(Encoder):
    """A picture's embedding by CLIP, SigLIP and their like: one token to attend to, as retrieval-augmented diffusion
    (arXiv 2204.11824) and Stable Video Diffusion (arXiv 2311.15127) have it in the place of a caption's.

    The embedding is the model's own, not scaled to length one: projected into the space that it shares with captions,
    or, of a model of pictures alone (DINOv2), its pooled output. Pictures may be of any size, and are prepared as the
    folder's image processor says.

    Args:
        model: folder, or name on the Hugging Face hub, with safetensors weights.
        subfolder: of the weights, as in pipeline folders ("image_encoder").
        processor: folder or name of the image processor; the model's own by default.
        processor_subfolder: of the image processor ("feature_extractor").
        pooled: whether the embedding serves as the pooled vector as well.
        dtype: that the encoder computes in.

    Raises:
        ValueError: there are no such weights or image processor, or the processor does what is not known here.
    """

    reads = "images"
    length = 1

    def __init__(
        self,
        model: str,
        subfolder: str = "",
        processor: str | None = None,
        processor_subfolder: str = "",
        pooled: bool = True,
        dtype: Dtype = "float32",
    ):
        from transformers import AutoConfig, AutoImageProcessor, AutoModel, CLIPVisionModelWithProjection

        super().__init__()
        config = load_part(AutoConfig.from_pretrained, model, subfolder)
        told = load_part(AutoImageProcessor.from_pretrained, processor or model, processor_subfolder, backend="pil")
        self.preparation = Preparation.of(told, processor or model)
        kind = CLIPVisionModelWithProjection if config.model_type == "clip_vision_model" else AutoModel
        self.model = load_weights(kind, model, subfolder, dtype)
        for name in _OF_TEXT:
            if hasattr(self.model, name):
                delattr(self.model, name)
        self.width = embedding_width(config, model)
        self.pooled_width = self.width if pooled else 0

    def forward(self, inputs: Tensor) -> Outputs:
        assert inputs.shape[1] == 3, "pictures that were not read cannot be encoded"
        pixels = self.preparation(inputs.to(device_of(self.model)))
        embedding = embed(self.model, pixels.to(self.model.dtype)).float()
        return embedding[:, None], embedding[:, : self.pooled_width]

    def null(self) -> Outputs:
        device = device_of(self.model)
        return torch.zeros(1, 1, self.width, device=device), torch.zeros(1, self.pooled_width, device=device)

    def settings(self) -> dict[str, Any]:
        """See `Encoder.settings`."""
        return super().settings() | {"preparation": asdict(self.preparation)}


def embed(model: nn.Module, pixels: Tensor) -> Tensor:
    """(n, d) embeddings, of any length, of n prepared pictures by one of transformers' models."""
    if hasattr(model, "get_image_features"):
        return model.get_image_features(pixel_values=pixels).pooler_output  # type: ignore[operator]
    output = model(pixel_values=pixels)
    return output.image_embeds if "image_embeds" in output else output.pooler_output.flatten(1)


def embedding_width(config: Any, model: str) -> int:
    """Numbers in an embedding, as a model's configuration tells.

    Raises:
        ValueError: it tells of none.
    """
    if (projected := getattr(config, "projection_dim", None)) is not None:
        return projected
    own = getattr(config, "vision_config", config)
    if not isinstance(getattr(own, "hidden_size", None), int):
        raise ValueError(f"{model}: a {config.model_type!r} model has no embedding of pictures")
    return own.hidden_size


@dataclass(frozen=True)
class Preparation:
    """How a model wants pictures: what transformers' image processors do with Pillow, but for its rounding.

    Args:
        size: height and width after resizing, or the shorter side's length, which keeps the aspect ratio.
        crop: height and width of the part in the middle; None takes all.
        filter: of resizing, antialiased.
        mean, std: of each channel, from 0 to 1.
    """

    size: tuple[int, int] | int
    crop: tuple[int, int] | None
    filter: Literal["bilinear", "bicubic"]
    mean: Sequence[float]
    std: Sequence[float]

    @classmethod
    def of(cls, processor: Any, name: str) -> "Preparation":
        """What an image processor of transformers does.

        Raises:
            ValueError: another thing.
        """
        size = dict(processor.size)
        crop = dict(processor.crop_size) if getattr(processor, "do_center_crop", None) else None
        shorter = size.get("shortest_edge") if size.keys() == {"shortest_edge"} else None
        known = (
            processor.do_resize
            and processor.do_rescale
            and processor.do_normalize
            and abs(processor.rescale_factor * 255 - 1) < 1e-6
            and int(processor.resample) in _FILTERS
            and (shorter is not None or size.keys() == {"height", "width"})
            and (crop is None or crop.keys() == {"height", "width"})
        )
        if not known or (crop is not None and max(crop.values()) > (shorter or min(size.values()))):
            raise ValueError(
                f"{name}: its {type(processor).__name__} prepares pictures otherwise than by resizing, cropping the"
                " middle and normalizing"
            )
        return cls(
            size=shorter or (size["height"], size["width"]),
            crop=(crop["height"], crop["width"]) if crop is not None else None,
            filter=_FILTERS[int(processor.resample)],
            mean=tuple(processor.image_mean),
            std=tuple(processor.image_std),
        )

    def __call__(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) uint8 to (n, 3, *crop) float32."""
        height, width = images.shape[-2:]
        if isinstance(self.size, int):
            short, long = min(height, width), max(height, width)
            longer = self.size * long // short
            size = (self.size, longer) if height <= width else (longer, self.size)
        else:
            size = self.size
        resized = images.float()
        if size != (height, width):
            resized = interpolate(resized, size=size, mode=self.filter, antialias=True).clamp(0, 255)
        if self.crop is not None:
            top, left = (size[0] - self.crop[0]) // 2, (size[1] - self.crop[1]) // 2
            resized = resized[..., top : top + self.crop[0], left : left + self.crop[1]]
        mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (self.mean, self.std))
        return (resized / 255 - mean) / std
