"""The Inception network of the Fréchet inception distance: InceptionV3 (arXiv 1512.00567) with TensorFlow's weights of
2015-12-05, as Heusel et al. (arXiv 1706.08500) took them, under the names that PyTorch's ports of it share.

It is not torchvision's: average pools leave the padding out, the last block pools by maximum, there are 1,008 classes,
and pictures are resized as TensorFlow 1 did.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIDE = 299
WIDTH = 2048
CLASSES = 1008


class InceptionV3(nn.Module):
    """Pictures (n, 3, H, W) of any size, uint8, to the pooled features (n, 2048) that the distance is taken of."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3)
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3)
        self.Mixed_5b = InceptionA(192, 32)
        self.Mixed_5c = InceptionA(256, 64)
        self.Mixed_5d = InceptionA(288, 64)
        self.Mixed_6a = InceptionB(288)
        self.Mixed_6b = InceptionC(128)
        self.Mixed_6c = InceptionC(160)
        self.Mixed_6d = InceptionC(160)
        self.Mixed_6e = InceptionC(192)
        self.Mixed_7a = InceptionD(768)
        self.Mixed_7b = InceptionE(1280, "average")
        self.Mixed_7c = InceptionE(2048, "maximum")
        self.fc = nn.Linear(WIDTH, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = (resize(images.to(self.fc.weight.dtype), SIDE) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return x.mean((2, 3))


class Convolution(nn.Module):
    """A convolution, normalized, with ReLU."""

    def __init__(
        self, channels: int, out: int, size: int | tuple[int, int], stride: int = 1, padding: int | tuple[int, int] = 0
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, size, stride=stride, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def wide(channels: int, out: int, size: int) -> Convolution:
    """Of one row."""
    return Convolution(channels, out, (1, size), padding=(0, size // 2))


def tall(channels: int, out: int, size: int) -> Convolution:
    """Of one column."""
    return Convolution(channels, out, (size, 1), padding=(size // 2, 0))


class InceptionA(nn.Module):
    """Figure 5: 1x1, 5x5, two 3x3, and a pool, side by side."""

    def __init__(self, channels: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = Convolution(channels, 64, 1)
        self.branch5x5_1 = Convolution(channels, 48, 1)
        self.branch5x5_2 = Convolution(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = Convolution(channels, 64, 1)
        self.branch3x3dbl_2 = Convolution(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Convolution(96, 96, 3, padding=1)
        self.branch_pool = Convolution(channels, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, three, self.branch_pool(average(x))], 1)


class InceptionB(nn.Module):
    """Half the sides."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch3x3 = Convolution(channels, 384, 3, stride=2)
        self.branch3x3dbl_1 = Convolution(channels, 64, 1)
        self.branch3x3dbl_2 = Convolution(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Convolution(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), three, F.max_pool2d(x, 3, stride=2)], 1)


class InceptionC(nn.Module):
    """Figure 6: 7x7 as 1x7 and 7x1, once and twice."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.branch1x1 = Convolution(768, 192, 1)
        self.branch7x7_1 = Convolution(768, inner, 1)
        self.branch7x7_2 = wide(inner, inner, 7)
        self.branch7x7_3 = tall(inner, 192, 7)
        self.branch7x7dbl_1 = Convolution(768, inner, 1)
        self.branch7x7dbl_2 = tall(inner, inner, 7)
        self.branch7x7dbl_3 = wide(inner, inner, 7)
        self.branch7x7dbl_4 = tall(inner, inner, 7)
        self.branch7x7dbl_5 = wide(inner, 192, 7)
        self.branch_pool = Convolution(768, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        once = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        twice = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        twice = self.branch7x7dbl_5(self.branch7x7dbl_4(twice))
        return torch.cat([self.branch1x1(x), once, twice, self.branch_pool(average(x))], 1)


class InceptionD(nn.Module):
    """Half the sides again."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch3x3_1 = Convolution(channels, 192, 1)
        self.branch3x3_2 = Convolution(192, 320, 3, stride=2)
        self.branch7x7x3_1 = Convolution(channels, 192, 1)
        self.branch7x7x3_2 = wide(192, 192, 7)
        self.branch7x7x3_3 = tall(192, 192, 7)
        self.branch7x7x3_4 = Convolution(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        three = self.branch3x3_2(self.branch3x3_1(x))
        return torch.cat([three, self.branch7x7x3_4(seven), F.max_pool2d(x, 3, stride=2)], 1)


class InceptionE(nn.Module):
    """Figure 7: 3x3 as 1x3 beside 3x1."""

    def __init__(self, channels: int, pool: str) -> None:
        super().__init__()
        self.pool = pool
        self.branch1x1 = Convolution(channels, 320, 1)
        self.branch3x3_1 = Convolution(channels, 384, 1)
        self.branch3x3_2a = wide(384, 384, 3)
        self.branch3x3_2b = tall(384, 384, 3)
        self.branch3x3dbl_1 = Convolution(channels, 448, 1)
        self.branch3x3dbl_2 = Convolution(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = wide(384, 384, 3)
        self.branch3x3dbl_3b = tall(384, 384, 3)
        self.branch_pool = Convolution(channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        once, twice = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = average(x) if self.pool == "average" else F.max_pool2d(x, 3, stride=1, padding=1)
        branches = [
            self.branch1x1(x),
            *(self.branch3x3_2a(once), self.branch3x3_2b(once)),
            *(self.branch3x3dbl_3a(twice), self.branch3x3dbl_3b(twice)),
            self.branch_pool(pooled),
        ]
        return torch.cat(branches, 1)


def average(x: Tensor) -> Tensor:
    """The mean of 3x3 neighbours, those within the picture only."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def resize(images: Tensor, side: int) -> Tensor:
    """Bilinear as in TensorFlow 1: pixel i of the result lies at i * (old / new), without smoothing."""
    for dim in (-1, -2):
        old = images.shape[dim]
        if old == side:
            continue
        at = torch.arange(side, dtype=images.dtype, device=images.device) * (old / side)
        below = at.floor().clamp(max=old - 1)
        above = (below + 1).clamp(max=old - 1)
        share = (at - below).unsqueeze(-1) if dim == -2 else at - below
        first, second = (images.index_select(dim, index.long()) for index in (below, above))
        images = first + (second - first) * share
    return images
