"""The patch discriminator of VQGAN and latent diffusion (Isola et al. 2017, arXiv 1611.07004; Esser et al. 2021,
arXiv 2012.09841): a small convolutional network that judges each patch of an image for itself.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

from models.flops import forward_flops


class PatchDiscriminator(nn.Module):
    """Images to a logit for each patch: of about 70 pixels a side with three strided layers, 34 with two.

    Batch norm takes its statistics from the images of a call, in training and otherwise: real and reconstructed images
    are judged in calls of their own, and what a call holds together is the objective's scope. Parameters carry the
    names of the published ones.

    Args:
        in_channels: of the images.
        filters: channels of the first layer; they double from layer to layer, to 8 times as many at most.
        layers: strided layers.
    """

    def __init__(self, in_channels: int = 3, filters: int = 64, layers: int = 3) -> None:
        super().__init__()
        if layers < 1:
            raise ValueError(f"layers={layers}: at least 1")
        self.config = {"in_channels": in_channels, "filters": filters, "layers": layers}
        widths = [filters * min(2**i, 8) for i in range(layers + 1)]
        main: list[nn.Module] = [nn.Conv2d(in_channels, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i, (c_in, c_out) in enumerate(pairwise(widths)):
            main += [
                nn.Conv2d(c_in, c_out, 4, stride=2 if i < layers - 1 else 1, padding=1, bias=False),
                nn.BatchNorm2d(c_out, track_running_stats=False),
                nn.LeakyReLU(0.2),
            ]
        self.main = nn.Sequential(*main, nn.Conv2d(widths[-1], 1, 4, padding=1))

    def forward(self, images: Tensor) -> Tensor:
        """Images (n, in_channels, H, W) in [-1, 1] to logits (n, 1, h, w), large for real ones."""
        return self.main(images)

    def flops(self, height: int, width: int) -> float:
        """FLOPs of judging one image of H x W."""
        return forward_flops(type(self), self.config, (1, self.config["in_channels"], height, width))

    @torch.no_grad()
    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """First values: weights normal with deviation 0.02, around 1 in norms; biases as torch's own convolutions, but
        zero in norms."""
        layer = self.get_submodule(name.rpartition(".")[0])
        norm = isinstance(layer, nn.BatchNorm2d)
        if name.endswith("weight"):
            tensor.normal_(1.0 if norm else 0.0, 0.02, generator=generator)
        elif norm:
            tensor.zero_()
        else:
            assert isinstance(layer, nn.Conv2d)
            bound = (layer.in_channels * 16) ** -0.5
            tensor.uniform_(-bound, bound, generator=generator)

    def init_buffers(self) -> None:
        """There are none."""
