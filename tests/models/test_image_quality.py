"""PSNR and SSIM against torchmetrics."""

import pytest
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from models.image_quality import psnr, ssim


def test_they_are_those_of_torchmetrics_image_by_image():
    torch.manual_seed(0)
    a = torch.rand(4, 3, 40, 33)
    b = (a + torch.randn_like(a) * torch.tensor([0.01, 0.05, 0.2, 1.0]).view(4, 1, 1, 1)).clamp(0, 1)
    theirs = peak_signal_noise_ratio(b, a, data_range=1.0, reduction="none", dim=(1, 2, 3))
    torch.testing.assert_close(psnr(a, b), theirs, rtol=1e-5, atol=1e-5)
    _, places = structural_similarity_index_measure(b, a, data_range=1.0, reduction="none", return_full_image=True)
    theirs = places[..., 5:-5, 5:-5].mean((1, 2, 3))  # where the window fits: it also averages over mirrored margins
    torch.testing.assert_close(ssim(a, b), theirs, rtol=1e-5, atol=1e-5)


def test_equal_images():
    a = torch.rand(2, 3, 16, 16)
    assert psnr(a, a).tolist() == [100, 100]
    torch.testing.assert_close(ssim(a, a), torch.ones(2))
    with pytest.raises(ValueError, match="at least 11 pixels"):
        ssim(a[..., :10], a[..., :10])
