"""The vector-quantised autoencoder of latent diffusion (van den Oord et al. 2017, arXiv 1711.00937; Esser et al. 2021,
arXiv 2012.09841; Rombach et al. 2022, arXiv 2112.10752, appendix G).

Encoder and decoder are those of the KL autoencoder; between them each latent vector gives way to the nearest of a
codebook. Denoisers work on the latents before that: the codebook is the first layer of the decoder. Modules carry the
names of diffusers' VQModel, so its weights are ours as they are.

Shapes: n samples, C channels of a code, f the downsampling factor, Z codes.
"""

from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.autoencoder import Autoencoder, Decoder, Encoder, Reconstruction, check_sides, levels


class Quantized(NamedTuple):
    """What a codebook makes of latents.

    Args:
        latents: (n, C, h, w), codes in the place of vectors; gradients pass to what was quantised as if nothing had
            been (straight through).
        loss: (n,) float32, averaged over each sample's latents.
        codes: (n, h, w) int64.
    """

    latents: Tensor
    loss: Tensor
    codes: Tensor


class VQModel(Autoencoder):
    """Images to latents and back. Keys, defaults and outputs are those of diffusers' VQModel.

    Args:
        in_channels, out_channels, block_out_channels, down_block_types, up_block_types, layers_per_block,
            norm_num_groups, mid_block_add_attention: see `models.autoencoder.AutoencoderKL`.
        latent_channels: channels that the encoder gives and the decoder takes.
        num_vq_embeddings: Z.
        vq_embed_dim: C, to which 1 x 1 convolutions lead and from which they lead back; None: latent_channels.
        scaling_factor: multiplies the latents for the denoiser (see models/first_stage.py); latent diffusion leaves
            those of VQ models as they are, 1. None where it is not known yet.
        beta: weight of one of the two terms of the codebook's loss: |code - sg(z)|^2, which draws codes to latents, and
            |sg(code) - z|^2, which commits latents to codes.
        legacy: beta weighs the first term, as in the published models (by an oversight that was kept); False: the
            second, as in the papers.
    """

    diffusers_class: str = "VQModel"
    component: ClassVar[str] = "vqvae"
    own_config: ClassVar[dict[str, Any]] = {"beta": 0.25, "legacy": True}

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: list[int] | None = None,
        layers_per_block: int = 1,
        latent_channels: int = 3,
        num_vq_embeddings: int = 256,
        norm_num_groups: int = 32,
        vq_embed_dim: int | None = None,
        scaling_factor: float | None = 0.18215,
        mid_block_add_attention: bool = True,
        down_block_types: list[str] | None = None,
        up_block_types: list[str] | None = None,
        beta: float = 0.25,
        legacy: bool = True,
    ) -> None:
        super().__init__()
        if num_vq_embeddings < 1:
            raise ValueError(f"num_vq_embeddings={num_vq_embeddings}: at least 1")
        widths, down, up = levels(block_out_channels, norm_num_groups, down_block_types, up_block_types)
        self.config = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "down_block_types": down,
            "up_block_types": up,
            "act_fn": "silu",
            "block_out_channels": widths,
            "layers_per_block": layers_per_block,
            "latent_channels": latent_channels,
            "num_vq_embeddings": num_vq_embeddings,
            "norm_num_groups": norm_num_groups,
            "vq_embed_dim": vq_embed_dim,
            "scaling_factor": scaling_factor,
            "norm_type": "group",
            "mid_block_add_attention": mid_block_add_attention,
            "lookup_from_codebook": False,
            "beta": beta,
            "legacy": legacy,
        }
        self.latent_channels = vq_embed_dim or latent_channels
        self.downsampling = 2 ** (len(widths) - 1)
        depth, groups, attention = layers_per_block, norm_num_groups, mid_block_add_attention
        self.encoder = Encoder(in_channels, latent_channels, widths, down, depth, groups, attention)
        self.quant_conv = nn.Conv2d(latent_channels, self.latent_channels, 1)
        self.quantize = VectorQuantizer(num_vq_embeddings, self.latent_channels, beta, legacy)
        self.post_quant_conv = nn.Conv2d(self.latent_channels, latent_channels, 1)
        self.decoder = Decoder(latent_channels, out_channels, widths, up, depth + 1, groups, attention)

    def forward(self, images: Tensor, noise: Tensor | None = None) -> Reconstruction:
        """Reconstructions of images, through codes. Nothing is random; the noise is not used."""
        latents = self.encode(images)
        quantized = self.quantize(latents)
        decoded = self.decoder(self.post_quant_conv(quantized.latents))
        return Reconstruction(decoded, latents.float(), quantized.loss, quantized.codes)

    def encode(self, images: Tensor) -> Tensor:
        """Images (n, in_channels, H, W) in [-1, 1] to latents (n, C, H/f, W/f), not yet quantised.

        Raises:
            ValueError: the sides are not multiples of f.
        """
        check_sides(images, self.downsampling)
        return self.quant_conv(self.encoder(images))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (n, C, H/f, W/f), which are quantised first, to images (n, out_channels, H, W), about in [-1, 1]."""
        return self.decoder(self.post_quant_conv(self.quantize(latents).latents))

    def decode_codes(self, codes: Tensor) -> Tensor:
        """Codes (n, H/f, W/f) to images (n, out_channels, H, W), about in [-1, 1]."""
        _, vectors = self.quantize.embedding(codes)
        return self.decoder(self.post_quant_conv(vectors.movedim(-1, 1)))

    @torch.no_grad()
    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """First values: as all autoencoders, codes uniform in +-1 / Z."""
        if name == "quantize.embedding.weight":
            tensor.uniform_(-1 / len(tensor), 1 / len(tensor), generator=generator)
        else:
            super().init_parameter(name, tensor, generator)


class VectorQuantizer(nn.Module):
    """The nearest code in the place of each latent vector."""

    def __init__(self, codes: int, channels: int, beta: float, legacy: bool) -> None:
        super().__init__()
        self.embedding = Codebook(codes, channels)
        self.to_codes, self.to_latents = (beta, 1.0) if legacy else (1.0, beta)

    def forward(self, latents: Tensor) -> Quantized:
        """Latents (n, C, h, w). Distances and losses are float32."""
        z = latents.float().movedim(1, -1)
        codes, vectors = self.embedding(z)
        vectors = vectors.float()
        error = self.to_codes * (vectors - z.detach()).square() + self.to_latents * (vectors.detach() - z).square()
        straight = z + (vectors - z).detach()
        return Quantized(straight.movedim(-1, 1).to(latents.dtype), error.flatten(1).mean(1), codes)


class Codebook(nn.Embedding):
    """Vectors by code, (Z, C). Its weight is used within `forward` alone, where engines have gathered it."""

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Vectors (..., C) to the nearest codes, (...) int64, and the codes' vectors (..., C). Codes, (...) int64, are
        taken as they are."""
        if not z.is_floating_point():
            return z, F.embedding(z, self.weight)
        with torch.no_grad():
            codes = torch.cdist(z.flatten(0, -2), self.weight.to(z.dtype)).argmin(1).view(z.shape[:-1])
        return codes, F.embedding(codes, self.weight)
