"""CLIP (Radford et al. 2021, arXiv 2103.00020): a tower for pictures and one for captions, with one space for both.

The towers are transformers', under its names, so that a trained network is a folder that `CLIPModel.from_pretrained`
opens.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.hub import load_part
from models.image import Preparation
from models.pipeline_folder import TRANSFORMERS_STEM
from models.tensor_files import SHARD_BYTES, Meta, write_stem
from models.text_training import train_clip_tokenizer

# Of an `eos_token_id` that published configurations have in error; their towers then look for the largest token.
_LEGACY_END = 2


class CLIP(nn.Module):
    """Both towers, the projections of what they give, and the logarithm of the inverse temperature.

    Args:
        vision_config, text_config: of transformers' CLIPVisionConfig and CLIPTextConfig; ViT-B/32 where left out.
        projection_dim: numbers in an embedding.
        logit_scale_init_value: logarithm of the first inverse temperature.
        tokenizer: folder, or name on the Hugging Face hub, of a CLIP tokenizer.
        learn_tokenizer: whether it is trained from a run's captions, where that folder does not hold it yet.

    Raises:
        ValueError: a configuration has keys that transformers' has not.
    """

    block_lists = ("vision_model.encoder.layers", "text_model.encoder.layers")

    def __init__(
        self,
        vision_config: dict[str, Any],
        text_config: dict[str, Any],
        projection_dim: int = 512,
        logit_scale_init_value: float = 2.6592,
        tokenizer: str = "openai/clip-vit-base-patch32",
        learn_tokenizer: bool = False,
    ) -> None:
        from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

        super().__init__()
        for key, given, kind in (
            ("vision_config", vision_config, CLIPVisionConfig),
            ("text_config", text_config, CLIPTextConfig),
        ):
            if unknown := sorted(set(given) - set(kind().to_dict())):
                raise ValueError(f"{key} has {', '.join(unknown)}, which transformers' {kind.__name__} has not")
        self.architecture: Any = CLIPConfig(
            # Told to each tower too, for its class "with projection".
            vision_config={"projection_dim": projection_dim, **vision_config},
            text_config={"projection_dim": projection_dim, **text_config},
            projection_dim=projection_dim,
            logit_scale_init_value=logit_scale_init_value,
        )
        model = CLIPModel(self.architecture)
        self.vision_model, self.visual_projection = model.vision_model, model.visual_projection
        self.text_model, self.text_projection = model.text_model, model.text_projection
        # One number in a vector: FSDP2 shards no scalars.
        self.logit_scale = nn.Parameter(torch.full((1,), logit_scale_init_value))
        self.tokenizer_source, self.learns_tokenizer = tokenizer, learn_tokenizer

    def forward(self, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings of any length, (n, d) each, of n pictures and m captions, and the logarithm of the inverse
        temperature, (1,).

        Args:
            pixels: (n, 3, side, side), see `prepare`.
            tokens: (m, length), see `tokens`.
        """
        pictures = self.visual_projection(self.vision_model(pixel_values=pixels).pooler_output)
        captions = self.text_projection(self.text_model(input_ids=tokens).pooler_output)
        return pictures, captions, self.logit_scale

    @cached_property
    def prepare(self) -> Preparation:
        """Makes pixels of pictures (n, 3, H, W) uint8 of any size: the shorter side scaled, the middle taken."""
        from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

        side = self.architecture.vision_config.image_size
        return Preparation(side, (side, side), "bicubic", tuple(OPENAI_CLIP_MEAN), tuple(OPENAI_CLIP_STD))

    def tokens(self, captions: Sequence[str]) -> Tensor:
        """(n, length) int64 on the CPU; longer captions are cut. Empty ones alone need no tokenizer."""
        text = self.architecture.text_config
        if not any(captions):
            row = [text.bos_token_id, *[text.eos_token_id] * (text.max_position_embeddings - 1)]
            return torch.tensor([row] * len(captions))
        length = text.max_position_embeddings
        told = self.tokenizer(
            list(captions), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        return told.input_ids

    @cached_property
    def tokenizer(self) -> Any:
        """Of captions.

        Raises:
            ValueError: there is none, or it is not one for this network.
        """
        from transformers import AutoTokenizer

        loaded = load_part(AutoTokenizer.from_pretrained, self.tokenizer_source, "")
        text = self.architecture.text_config
        if len(loaded) > text.vocab_size:
            raise ValueError(
                f"{self.tokenizer_source} has {len(loaded)} tokens, and text_config.vocab_size is {text.vocab_size}"
            )
        if text.eos_token_id not in (loaded.eos_token_id, _LEGACY_END):
            raise ValueError(
                f"{self.tokenizer_source} ends captions with {loaded.eos_token_id}, and text_config.eos_token_id is"
                f" {text.eos_token_id}"
            )
        return loaded

    def check_tokenizer(self) -> None:
        """See `tokenizer`."""
        _ = self.tokenizer

    def learn_tokenizer(self, captions: Callable[[], Iterable[str]]) -> None:
        """Train the tokenizer from captions, where it is one to be trained and not there yet."""
        folder = Path(self.tokenizer_source)
        if self.learns_tokenizer and not (folder / "tokenizer_config.json").exists():
            text = self.architecture.text_config
            train_clip_tokenizer(captions(), folder, text.vocab_size, text.max_position_embeddings)

    def save(
        self,
        folder: str | Path,
        tensors: Mapping[str, Tensor],
        dtype: torch.dtype | None = None,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        """Write a folder that transformers opens: the network with these weights, tokenizer and image processor."""
        from transformers import CLIPImageProcessorPil

        folder = Path(folder)
        self.architecture.architectures = ["CLIPModel"]
        self.architecture.save_pretrained(folder)
        scalar = {"logit_scale": tensors["logit_scale"].reshape(())}
        named = {name: scalar.get(name, tensors[name]) for name, _ in self.named_parameters()}
        layout = {name: Meta(dtype or tensor.dtype, tuple(tensor.shape)) for name, tensor in named.items()}
        write_stem(folder, TRANSFORMERS_STEM, layout, iter(named.items()), shard_bytes)
        self.tokenizer.save_pretrained(folder)
        side = self.architecture.vision_config.image_size
        size: dict[str, Any] = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
        CLIPImageProcessorPil(**size).save_pretrained(folder)

    def flops(self) -> float:
        """Of a forward pass of one picture and its caption: matrix products and attention."""
        vision, text = self.architecture.vision_config, self.architecture.text_config
        patches = (vision.image_size // vision.patch_size) ** 2
        patch = 2.0 * patches * vision.hidden_size * vision.num_channels * vision.patch_size**2
        projections = 2.0 * self.architecture.projection_dim * (vision.hidden_size + text.hidden_size)
        return patch + projections + _flops(vision, patches + 1) + _flops(text, text.max_position_embeddings)

    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """As transformers': normal, with deviations that follow from widths and depths."""
        with torch.no_grad():
            if name == "logit_scale":
                tensor.fill_(self.architecture.logit_scale_init_value)
            elif "norm" in name:
                tensor.fill_(name.endswith("weight"))
            elif name.endswith("bias"):
                tensor.zero_()
            else:
                tensor.normal_(0, self._deviation(name), generator=generator)

    def _deviation(self, name: str) -> float:
        of_pictures = name.startswith("vi")
        tower = self.architecture.vision_config if of_pictures else self.architecture.text_config
        width, branch = tower.hidden_size**-0.5, (2 * tower.num_hidden_layers) ** -0.5
        if "embedding" in name and not name.endswith("class_embedding"):
            return tower.initializer_range
        if name.endswith("fc1.weight"):
            return (2 * tower.hidden_size) ** -0.5
        into_branch = name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "fc2.weight"))
        return width * branch if into_branch else width

    def init_buffers(self) -> None:
        """Numbers of places."""
        for tower in (self.vision_model, self.text_model):
            ids = tower.embeddings.position_ids
            ids.copy_(torch.arange(ids.shape[-1], device=ids.device)[None])


def _flops(tower: Any, length: int) -> float:
    width, inner = tower.hidden_size, tower.intermediate_size
    of_layer = 2.0 * length * (4 * width**2 + 2 * width * inner) + 4.0 * length**2 * width
    return tower.num_hidden_layers * of_layer
