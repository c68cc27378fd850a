"""How close two images are, in closed form."""

import torch
import torch.nn.functional as F
from torch import Tensor

# SSIM's window and constants (Wang et al. 2004).
_WINDOW, _SIGMA, _K1, _K2 = 11, 1.5, 0.01, 0.03


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """(n,) peak signal-to-noise ratio in decibels of images (n, C, H, W) in [0, 1]; 100 where they are equal."""
    error = (a - b).square().flatten(1).mean(1)
    return -10 * error.clamp(min=1e-10).log10()


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """(n,) structural similarity (Wang et al. 2004, IEEE Transactions on Image Processing 13) of images (n, C, H, W) in
    [0, 1]: a Gaussian window of 11 pixels, where it fits in whole, averaged over places and channels.

    Raises:
        ValueError: images smaller than the window.
    """
    if min(a.shape[-2:]) < _WINDOW:
        raise ValueError(f"SSIM takes images of at least {_WINDOW} pixels a side, not {tuple(a.shape[-2:])}")
    places = torch.arange(_WINDOW, dtype=a.dtype, device=a.device) - _WINDOW // 2
    line = torch.exp(-(places**2) / (2 * _SIGMA**2))
    line = line / line.sum()
    channels = a.shape[1]
    across, down = (line.view(shape).expand(channels, *shape[1:]) for shape in ((1, 1, 1, -1), (1, 1, -1, 1)))

    def smooth(x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, across, groups=channels), down, groups=channels)

    mean_a, mean_b = smooth(a), smooth(b)
    var_a, var_b = smooth(a * a) - mean_a**2, smooth(b * b) - mean_b**2
    covariance = smooth(a * b) - mean_a * mean_b
    c1, c2 = _K1**2, _K2**2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return (luminance * (2 * covariance + c2) / (var_a + var_b + c2)).flatten(1).mean(1)
