"""First stages, against what diffusers' pipelines do around an autoencoder."""

from pathlib import Path

import diffusers
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from models.autoencoder import AutoencoderKL
from models.first_stage import Identity, KLFirstStage
from models.initialization import initialize
from models.pretrained import save

CONF = Path(__file__).parents[2] / "conf" / "first_stage"
SMALL = {
    "block_out_channels": [8, 8],
    "norm_num_groups": 4,
    "latent_channels": 3,
    "scaling_factor": 1.5,
    "shift_factor": 0.06,
}


@pytest.fixture
def folder(tmp_path):
    save(initialize(AutoencoderKL(**SMALL), seed=4), tmp_path)
    return tmp_path


def filled_from(folder, **changes) -> KLFirstStage:
    """As an engine does it: built on the meta device, then filled parameter by parameter."""
    with torch.device("meta"):
        stage = KLFirstStage(AutoencoderKL(**SMALL | changes), str(folder))
    return initialize(stage.to_empty(device="cpu"), seed=0)


def test_latents_are_those_of_diffusers(folder):
    stage, theirs = filled_from(folder), diffusers.AutoencoderKL.from_pretrained(folder)
    images = torch.rand(2, 3, 8, 12) * 2 - 1
    assert stage.latent_shape(8, 12) == (3, 4, 6)
    noise = torch.randn(2, *stage.latent_shape(8, 12))
    posterior = theirs.encode(images).latent_dist
    scale, shift = theirs.config.scaling_factor, theirs.config.shift_factor
    assert torch.allclose(stage.encode(images), (posterior.mean - shift) * scale, atol=1e-6)
    latents = stage.encode(images, noise)
    assert torch.allclose(latents, (posterior.mean + posterior.std * noise - shift) * scale, atol=1e-5)
    assert torch.allclose(stage.decode(latents), theirs.decode(latents / scale + shift).sample, atol=1e-5)


def test_it_stays_frozen_and_lets_gradients_through(folder):
    stage = filled_from(folder).train()
    assert not any(module.training for module in stage.modules())
    assert not any(parameter.requires_grad for parameter in stage.parameters())
    latents = torch.randn(1, 3, 4, 4, requires_grad=True)
    stage.decode(latents).sum().backward()
    assert latents.grad.any()


def test_latents_are_float32_under_bfloat16_parameters(folder):
    exact, coarse = filled_from(folder), filled_from(folder).to(torch.bfloat16)
    images, noise = torch.rand(1, 3, 8, 8) * 2 - 1, torch.randn(1, 3, 4, 4)
    latents = coarse.encode(images, noise)
    assert latents.dtype == coarse.decode(latents).dtype == torch.float32
    assert torch.allclose(latents, exact.encode(images, noise), atol=0.05)


def test_another_autoencoders_folder_is_refused(folder):
    with pytest.raises(ValueError, match=r"scaling_factor is 2\.5, but .* 1\.5"):
        filled_from(folder, scaling_factor=2.5)
    with pytest.raises(ValueError, match=r"does not fit AutoencoderKL: .*quant_conv\.weight"):
        filled_from(folder, use_quant_conv=False)


def test_identity_is_the_pixels():
    stage = initialize(Identity(), seed=0)
    images = torch.rand(2, 3, 6, 5)
    assert stage.latent_shape(6, 5) == (3, 6, 5)
    assert torch.equal(stage.decode(stage.encode(images, torch.randn_like(images))), images)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("identity", (3, 64, 96)), ("kl_sd3", (16, 8, 12)), ("kl_sdxl", (4, 8, 12)), ("kl_tiny", (4, 16, 24))],
)
def test_shipped_configurations(name, shape):
    config = OmegaConf.load(CONF / f"{name}.yaml")
    if name != "identity":
        config.folder = None
    with torch.device("meta"):
        assert instantiate(config).latent_shape(64, 96) == shape
