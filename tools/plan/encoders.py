"""Conditioners without their weights: encoders by their architecture, for what they hold and compute."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from conf.errors import ConfigError
from conf.schema import build, target
from models.conditioner import Conditioner, Encoder, StoredEncoder
from models.each import EachEncoder
from models.given import Outputs
from models.hub import load_part
from models.image import ImageEncoder, embed, embedding_width
from models.text import ClipEncoder, T5Encoder
from models.text_training import CaptionConditioner
from models.token_transformer import TransformerEncoder
from trainer.networks import conditioner_learns

# Architectures of published models, whose files a login node may not have. Of Stable Diffusion 3's encoders, see its
# paper (arXiv 2403.03206, appendix B.3); CLIP's are those of arXiv 2103.00020, table 20.
_VIT_L = {
    **{"hidden_size": 768, "intermediate_size": 3072, "projection_dim": 768},
    **{"num_hidden_layers": 12, "num_attention_heads": 12},
}
_VIT_BIG_G = {
    **{"hidden_size": 1280, "intermediate_size": 5120, "projection_dim": 1280, "hidden_act": "gelu"},
    **{"num_hidden_layers": 32, "num_attention_heads": 20},
}
_PUBLISHED: dict[tuple[str, str], dict[str, Any]] = {
    ("stabilityai/stable-diffusion-3-medium-diffusers", "text_encoder"): _VIT_L,
    ("stabilityai/stable-diffusion-3-medium-diffusers", "text_encoder_2"): _VIT_BIG_G,
    ("stabilityai/stable-diffusion-3-medium-diffusers", "text_encoder_3"): {
        **{"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24},
        **{"vocab_size": 32128, "feed_forward_proj": "gated-gelu"},
    },
    ("stable-diffusion-v1-5/stable-diffusion-v1-5", "text_encoder"): _VIT_L,
    ("stabilityai/stable-diffusion-2-1", "text_encoder"): {
        **{"hidden_size": 1024, "intermediate_size": 4096, "hidden_act": "gelu"},
        **{"num_hidden_layers": 23, "num_attention_heads": 16},
    },
    ("stabilityai/stable-diffusion-xl-base-1.0", "text_encoder"): _VIT_L,
    ("stabilityai/stable-diffusion-xl-base-1.0", "text_encoder_2"): _VIT_BIG_G,
    ("stabilityai/stable-diffusion-xl-refiner-1.0", "text_encoder_2"): _VIT_BIG_G,
    ("openai/clip-vit-large-patch14", ""): {
        **{"hidden_size": 1024, "intermediate_size": 4096, "projection_dim": 768, "patch_size": 14},
        **{"num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 224},
    },
}


class Skeleton(Encoder):
    """Stands for an encoder: runs its model on inputs that are all alike.

    Args:
        run: n to the outputs of n samples.
        model: that it runs, for its parameters.
        shape: length, width and width of the pooled vector.
    """

    def __init__(
        self,
        run: Callable[[int], Outputs],
        model: nn.Module,
        shape: tuple[int, int, int],
        reads: Literal["captions", "images"] = "captions",
        shares_positions: bool = False,
    ) -> None:
        super().__init__()
        self.run, self.model = run, model
        self.length, self.width, self.pooled_width = shape
        self.reads, self.shares_positions = reads, shares_positions

    def forward(self, inputs: Any) -> Outputs:
        return self.run(len(inputs))

    def null(self) -> Outputs:
        return torch.zeros(1, self.length, self.width), torch.zeros(1, self.pooled_width)


class PlannedConditioner(Conditioner):
    """A conditioner that knows no values: it encodes everything, also what is dropped."""

    def _encode_one(self, encoder: Encoder, inputs: Any, kept: Tensor) -> Outputs:
        if isinstance(encoder, TransformerEncoder):  # whose tokenizer is a file, too
            return encoder.encode(encoder.blank_tokens(len(inputs)))
        return encoder(inputs)


def planned_conditioner(config: Any, held: bool) -> PlannedConditioner:
    """The conditioner that a config describes, without reading weights or tokenizers; on the meta device if it is
    trained.

    Args:
        config: of a `Conditioner`.
        held: whether its encoders are there; False where their outputs are read from storage.

    Raises:
        ConfigError: an encoder's architecture is not at hand.
    """
    if conditioner_learns(config):
        with torch.device("meta"):
            learned = build(OmegaConf.merge(config, {"_target_": f"{__name__}.{PlannedConditioner.__name__}"}))
        for part in (*learned.numbered(), *learned.map_list()):
            part.folder = None
        return learned
    if issubclass(target(config["_target_"], "conditioner"), CaptionConditioner):  # type: ignore[arg-type]
        encoders: list[Encoder] = [_t5(_local_t5(config), config.length, pooled=True)]
        settings = {}
    else:
        encoders = [_encoder(node, f"conditioner.encoders.{i}") for i, node in enumerate(config.encoders)]
        settings = {key: config[key] for key in ("context_dim", "dropped") if key in config}
    settings |= {key: build(config[key]) for key in ("sizes", "maps") if config.get(key) is not None}
    if not held:
        encoders = [_stored(encoder) if isinstance(encoder, Skeleton) else encoder for encoder in encoders]
    return PlannedConditioner(encoders, **settings)


def _encoder(node: Any, path: str) -> Encoder:
    kind = target(node["_target_"], path)
    if kind is ClipEncoder:
        return _clip(_architecture(node, path, "CLIPTextConfig"), node.length, node.get("pooled", True))
    if kind is T5Encoder:
        return _t5(_architecture(node, path, "T5Config"), node.length, node.get("pooled", False))
    if kind is ImageEncoder:
        return _image(_architecture(node, path, "CLIPVisionConfig"), node.model, node.get("pooled", True))
    if kind is EachEncoder:
        return EachEncoder(_encoder(node.encoder, f"{path}.encoder"), node.k, node.field)
    return build(node)


def _architecture(node: Any, path: str, kind: str) -> Any:
    """The transformers configuration of an encoder: published, of that kind, or of its folder or the hub."""
    import transformers

    model, subfolder = node.model, node.get("subfolder", "")
    if (model, subfolder) in _PUBLISHED:
        return getattr(transformers, kind)(**_PUBLISHED[model, subfolder])
    # Pictures have encoders of many kinds.
    read = transformers.AutoConfig if kind == "CLIPVisionConfig" else getattr(transformers, kind)
    try:
        return load_part(read.from_pretrained, model, subfolder)
    except ValueError as error:
        raise ConfigError(
            f"{path}.model={model}: no configuration here or on the hub tells its size; give a local folder."
        ) from error


def _clip(config: Any, length: int, pooled: bool) -> Skeleton:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    model: Any = (CLIPTextModelWithProjection if pooled else CLIPTextModel)(config)

    def run(n: int) -> Outputs:
        output = model(torch.zeros(n, length, dtype=torch.long), output_hidden_states=True)
        states = output.hidden_states[-2].float()  # of the last layer's shape, too
        return states, output.text_embeds.float() if pooled else states[:, 0, :0]

    shape = (length, config.hidden_size, config.projection_dim if pooled else 0)
    return Skeleton(run, model, shape, shares_positions=True)


def _t5(config: Any, length: int, pooled: bool) -> Skeleton:
    from transformers import T5EncoderModel

    model: Any = T5EncoderModel(config)
    pooled_width = config.d_model if pooled else 0

    def run(n: int) -> Outputs:
        states = model(torch.zeros(n, length, dtype=torch.long)).last_hidden_state.float()
        return states, states.mean(1)[:, :pooled_width]

    return Skeleton(run, model, (length, config.d_model, pooled_width))


def _image(config: Any, name: str, pooled: bool) -> Skeleton:
    from transformers import AutoModel, CLIPVisionConfig, CLIPVisionModelWithProjection

    own = getattr(config, "vision_config", config)
    clip = isinstance(own, CLIPVisionConfig)
    model: Any = CLIPVisionModelWithProjection(own) if clip else AutoModel.from_config(own)
    width = embedding_width(config, name)
    pooled_width = width if pooled else 0

    def run(n: int) -> Outputs:
        embedding = embed(model, torch.zeros(n, 3, own.image_size, own.image_size, dtype=model.dtype)).float()
        return embedding[:, None], embedding[:, :pooled_width]

    return Skeleton(run, model, (1, width, pooled_width), reads="images")


def _local_t5(config: Any) -> Any:
    """Of a conditioner that is trained from captions, were they to fill its vocabulary."""
    from transformers import T5Config

    return T5Config(
        vocab_size=config.vocab_size,
        d_model=config.width,
        d_kv=config.width // config.heads,
        d_ff=2 * config.width,
        num_layers=config.layers,
        num_heads=config.heads,
        feed_forward_proj="gated-gelu",
    )


def _stored(encoder: Encoder) -> StoredEncoder:
    return StoredEncoder(encoder, torch.zeros(encoder.length, encoder.width), torch.zeros(encoder.pooled_width))
