"""LPIPS, a learned distance of images (Zhang et al. 2018, arXiv 1801.03924, version 0.1): differences of VGG-16's
features, weighed channel by channel.

Weights are files of others: torchvision's `vgg16` state dict, and the linear weights that the `lpips` package ships as
`weights/v0.1/vgg.pth`.
"""

from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.flops import forward_flops
from models.tensor_files import TensorSource, open_file

# Convolutions of VGG-16's stages, and their channels over those of the first stage (Simonyan & Zisserman 2015, arXiv
# 1409.1556, configuration D). Within torchvision's `features`, convolutions and their ReLUs count one each, and so does
# the pooling between stages.
STAGES = ((2, 1), (2, 2), (3, 4), (3, 8), (3, 8))
_EPS = 1e-10


class LPIPS(nn.Module):
    """The distance of pairs of images. It is only used, never trained.

    Args:
        vgg: file of torchvision's `vgg16` weights: safetensors, or torch's, of which nothing but tensors is read.
        linear: file of the linear weights, likewise.
        filters: channels of the first stage, 64 in VGG-16.

    Without files it compares the features of a VGG-16 with random weights, all channels alike: a stand-in, which says
    that it is one (`stand_in`), and whose distances are not LPIPS.

    Raises:
        ValueError: one file without the other.
    """

    def __init__(self, vgg: str | None = None, linear: str | None = None, filters: int = 64) -> None:
        super().__init__()
        if (vgg is None) != (linear is None):
            raise ValueError("lpips takes the files vgg and linear, both of them, or null for both: a random stand-in")
        self.vgg, self.linear, self.filters = vgg, linear, filters
        self.stages = nn.ModuleList()
        c_in = 3
        for depth, times in STAGES:
            stage = nn.ModuleList()
            for _ in range(depth):
                stage.append(nn.Conv2d(c_in, filters * times, 3, padding=1))
                c_in = filters * times
            self.stages.append(stage)
        self.weights = nn.ParameterList(nn.Parameter(torch.empty(filters * times)) for _, times in STAGES)
        # Of images in [-1, 1]: what remains of ImageNet's mean and deviation.
        self.register_buffer("mean", torch.empty(3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.empty(3, 1, 1), persistent=False)
        self.init_buffers()

    @property
    def stand_in(self) -> str | None:
        """What the distance is in truth, where it is not LPIPS."""
        return "distances of a random VGG-16's features in the place of LPIPS" if self.vgg is None else None

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """(n,) distances of images (n, 3, H, W) in [-1, 1], at least 16 pixels a side."""
        n = len(a)
        x = (torch.cat([a, b]) - self.get_buffer("mean")) / self.get_buffer("deviation")
        total = torch.zeros(n, device=x.device)
        for i, (stage, weight) in enumerate(zip(self.stages, self.weights, strict=True)):
            if i:
                x = F.max_pool2d(x, 2)
            for convolution in stage.children():
                x = convolution(x).relu()
            features = x.float()
            unit = features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + _EPS)
            difference = (unit[:n] - unit[n:]).square()
            total = total + (difference * weight.float().view(1, -1, 1, 1)).sum(1).mean((1, 2))
        return total

    def flops(self, height: int, width: int) -> float:
        """FLOPs of one distance of two images of H x W."""
        image = (1, 3, height, width)
        return forward_flops(type(self), {"filters": self.filters}, image, image)

    @torch.no_grad()
    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Fill one parameter from the files, or at random: Kaiming-normal weights, zero biases, linear weights of one
        over the channels.

        Raises:
            ValueError: a file that is not what it should be.
        """
        if self.vgg is not None:
            tensor.copy_(self._state[name])
        elif name.startswith("weights."):
            tensor.fill_(1 / len(tensor))
        elif name.endswith("bias"):
            tensor.zero_()
        else:
            nn.init.kaiming_normal_(tensor, nonlinearity="relu", generator=generator)

    def init_buffers(self) -> None:
        """The constants of the normalisation."""
        self.get_buffer("mean").copy_(torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1))
        self.get_buffer("deviation").copy_(torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1))

    @cached_property
    def _state(self) -> dict[str, Tensor]:
        """The files' tensors by our names."""
        assert self.vgg is not None and self.linear is not None
        vgg, linear = (_open(Path(path)) for path in (self.vgg, self.linear))
        found: dict[str, Tensor] = {}
        number = 0
        for i, (depth, _) in enumerate(STAGES):
            for j in range(depth):
                for kind in ("weight", "bias"):
                    found[f"stages.{i}.{j}.{kind}"] = _take(vgg, f"features.{number}.{kind}", self.vgg)
                number += 2
            number += 1
            found[f"weights.{i}"] = _take(linear, f"lin{i}.model.1.weight", self.linear).flatten()
        for name, parameter in self.named_parameters():
            if found[name].shape != parameter.shape:
                raise ValueError(
                    f"{self.linear if name.startswith('weights') else self.vgg} holds no weights of VGG-16: those of"
                    f" {name} are {tuple(found[name].shape)}, not {tuple(parameter.shape)}"
                )
        return found


def _open(path: Path) -> TensorSource:
    if not path.is_file():
        raise ValueError(f"{path} is no file: it should be torchvision's vgg16, or lpips' linear weights for it")
    return open_file(path)


def _take(file: TensorSource, name: str, path: str) -> Tensor:
    if name not in file.names():
        raise ValueError(f"{path} lacks {name}: it should be torchvision's vgg16, or lpips' linear weights for it")
    return file.read(name).float()
