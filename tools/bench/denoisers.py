"""Our denoisers and their counterparts in diffusers as contestants of the step benchmark: same weights, same inputs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from models.initialization import initialize
from models.mmdit import MMDiT
from models.unet import UNet

CONTEXT = {"mmdit": 154, "unet": 77}
# SD3-medium, and SDXL's base.
SD3: dict[str, Any] = {"num_layers": 24, "num_attention_heads": 24, "pos_embed_max_size": 192}
SDXL: dict[str, Any] = {
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
}


def small_unet(name: Literal["sd", "sdxl"], width: int) -> dict[str, Any]:
    """Stable Diffusion 1's levels, or SDXL's with a depth of 1 and 2, from so many channels at the finest on."""
    if name == "sdxl":
        heads = [width // 64 * share for share in (1, 2, 4)]
        channels = [width, 2 * width, 4 * width]
        return SDXL | {
            **{"block_out_channels": channels, "attention_head_dim": heads},
            **{"transformer_layers_per_block": [1, 1, 2]},
        }
    return {
        "block_out_channels": [width, 2 * width, 4 * width, 4 * width],
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    }


@dataclass(frozen=True)
class Case:
    """A network and its input: what both contestants get.

    Args:
        kind: of network.
        config: its constructor's arguments.
        latents: side of the latents.
        batch: samples.
    """

    kind: Literal["mmdit", "unet"]
    config: dict[str, Any]
    latents: int
    batch: int
    device: torch.device
    dtype: torch.dtype

    def network(self) -> Any:
        """Ours, without values, on torch's default device."""
        return (MMDiT if self.kind == "mmdit" else UNet)(**self.config)

    def pair(self) -> tuple[Any, Any]:
        """Our network and diffusers', with the same random weights."""
        import diffusers

        with self.device:
            ours = initialize(self.network(), seed=0)
            config = ours.diffusers_config() if isinstance(ours, UNet) else ours.config
            theirs = getattr(diffusers, ours.diffusers_class)(
                **{k: v for k, v in config.items() if k not in ours.own_config}
            )
        with torch.no_grad():
            for parameter in ours.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
        state = {key: part for name, t in ours.state_dict().items() for key, part in ours.to_diffusers(name, t).items()}
        theirs.load_state_dict(state)
        return ours.to(self.dtype), theirs.to(self.dtype)

    def inputs(self, network: Any) -> dict[str, Tensor]:
        """Random ones, by our names."""

        def normal(*shape: int) -> Tensor:
            return torch.randn(self.batch, *shape, device=self.device).to(self.dtype)

        inputs = {
            "x": normal(network.in_channels, self.latents, self.latents),
            "timestep": torch.rand(self.batch, device=self.device) * 1000,
        }
        if self.kind == "unet":
            return inputs | {"context": normal(CONTEXT["unet"], network.config["cross_attention_dim"])}
        return inputs | {
            "context": normal(CONTEXT["mmdit"], network.config["joint_attention_dim"]),
            "pooled": normal(network.config["pooled_projection_dim"]),
        }

    def call_diffusers(self, network: Any, inputs: dict[str, Tensor]) -> Tensor:
        """Their prediction."""
        pooled = {"pooled_projections": inputs["pooled"]} if "pooled" in inputs else {}
        return network(
            inputs["x"],
            timestep=inputs["timestep"],
            encoder_hidden_states=inputs["context"],
            return_dict=False,
            **pooled,
        )[0]

    def blocks_of_diffusers(self, network: Any) -> Sequence[nn.Module]:
        """What corresponds to our blocks, the unit of compilation."""
        if self.kind == "mmdit":
            return list(network.transformer_blocks)
        kinds = ("ResnetBlock2D", "BasicTransformerBlock", "Downsample2D", "Upsample2D")
        return [module for module in network.modules() if type(module).__name__ in kinds]

    def flops(self) -> int:
        """Of one sample's forward pass."""
        with torch.device("meta"):
            return self.network().flops(self.latents, self.latents, CONTEXT[self.kind])
