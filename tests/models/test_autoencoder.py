"""AutoencoderKL, against diffusers' class and published sizes."""

import random
import re

import diffusers
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from conf.compose import ROOT
from conf.schema import build
from models.autoencoder import AutoencoderKL, DiagonalGaussian
from models.initialization import initialize


def random_config(seed: int) -> dict:
    """A small configuration with every option drawn."""
    draw = random.Random(seed)
    groups = draw.choice([2, 4])
    widths = [groups * draw.choice([2, 3, 4]) for _ in range(draw.randint(1, 4))]
    attends = [draw.random() < 0.4 for _ in widths]
    return {
        "in_channels": draw.randint(1, 4),
        "out_channels": draw.randint(1, 4),
        "block_out_channels": widths,
        "layers_per_block": draw.randint(1, 3),
        "latent_channels": draw.randint(1, 5),
        "norm_num_groups": groups,
        "scaling_factor": draw.random(),
        "shift_factor": draw.choice([None, 0.1]),
        "use_quant_conv": draw.random() < 0.5,
        "use_post_quant_conv": draw.random() < 0.5,
        "mid_block_add_attention": draw.random() < 0.7,
        "down_block_types": ["AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in attends],
        "up_block_types": draw.choice(
            [None, ["AttnUpDecoderBlock2D" if draw.random() < 0.4 else "UpDecoderBlock2D" for _ in widths]]
        ),
    }


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("seed", range(10))
def test_outputs_and_gradients_are_those_of_diffusers(seed):
    ours = initialize(AutoencoderKL(**random_config(seed)), seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs = diffusers.AutoencoderKL(**ours.config)
    theirs.load_state_dict(ours.state_dict())

    f = ours.downsampling
    images = torch.randn(2, ours.config["in_channels"], 4 * f, 3 * f, requires_grad=True)
    posterior, reference = ours.encode(images), theirs.encode(images).latent_dist
    assert relative_error(posterior.mean, reference.mean) <= 1e-5
    assert relative_error(posterior.log_variance, reference.logvar) <= 1e-5

    noise = torch.randn_like(posterior.mean)
    decoded = ours(images, noise).images
    their_decoded = theirs.decode(reference.mean + reference.std * noise).sample
    assert relative_error(decoded, their_decoded) <= 1e-5
    direction = torch.randn_like(decoded)
    assert relative_error(ours(images, noise).penalty, reference.kl()) <= 1e-5
    assert torch.equal(ours(images).latents, posterior.mean)
    ours_back, theirs_back = (torch.autograd.grad(out, images, direction)[0] for out in (decoded, their_decoded))
    assert relative_error(ours_back, theirs_back) <= 1e-4


def test_attention_is_told_by_the_types_of_the_levels():
    with torch.device("meta"):
        network = AutoencoderKL(
            block_out_channels=[8, 8],
            norm_num_groups=4,
            down_block_types=["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
        )
    assert network.config["up_block_types"] == ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"]
    for wrong, says in ((["DownEncoderBlock2D"], "has 1 levels"), (["CrossAttnDownBlock2D"] * 2, "not implemented")):
        with pytest.raises(ValueError, match=f"down_block_types.*{says}"):
            AutoencoderKL(block_out_channels=[8, 8], norm_num_groups=4, down_block_types=wrong)


@pytest.mark.parametrize("name", sorted(file.stem for file in (ROOT / "autoencoder").glob("*.yaml")))
def test_shipped_autoencoders_have_the_size_that_their_comment_tells_and_that_of_diffusers(name):
    text = (ROOT / "autoencoder" / f"{name}.yaml").read_text()
    with torch.device("meta"):
        ours = build(OmegaConf.create(text))
        config = {key: value for key, value in ours.config.items() if key not in ours.own_config}
        theirs = getattr(diffusers, ours.diffusers_class)(**config)
    sizes = [{name: tuple(t.shape) for name, t in network.state_dict().items()} for network in (ours, theirs)]
    assert sizes[0] == sizes[1]
    told = re.search(r"([\d,]+) parameters", text)
    if told:
        assert sum(p.numel() for p in ours.parameters()) == int(told[1].replace(",", ""))
    f = re.search(r"_f(\d+)", name)
    assert f is None or ours.downsampling == int(f[1])


@pytest.mark.parametrize(
    ("channels", "quant", "parameters", "tensors"), [(16, False, 83_819_683, 244), (4, True, 83_653_863, 248)]
)
def test_published_sizes(channels, quant, parameters, tensors):
    with torch.device("meta"):
        network = AutoencoderKL(
            block_out_channels=[128, 256, 512, 512],
            layers_per_block=2,
            latent_channels=channels,
            use_quant_conv=quant,
            use_post_quant_conv=quant,
        )
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert len(network.state_dict()) == tensors


def test_log_variance_is_clamped_and_noise_is_scaled_by_the_deviation():
    network = initialize(AutoencoderKL(block_out_channels=[8], norm_num_groups=4, latent_channels=1), seed=0)
    with torch.no_grad():
        network.quant_conv.weight.zero_()
        network.quant_conv.bias.copy_(torch.tensor([3.0, 1e3]))
    assert (network.encode(torch.randn(1, 3, 8, 8)).log_variance == 20).all()
    posterior = DiagonalGaussian(torch.tensor([2.0]), torch.tensor([4.0]).log())
    assert posterior.sample(torch.tensor([0.5])).item() == pytest.approx(3.0)


def test_sizes_that_do_not_fit_are_named():
    network = AutoencoderKL(block_out_channels=[8, 8, 8], norm_num_groups=4)
    with pytest.raises(ValueError, match=r"\(8, 10\) must be multiples of 4"):
        network.encode(torch.zeros(1, 3, 8, 10))
    with pytest.raises(ValueError, match="10 does not divide into norm_num_groups=4"):
        AutoencoderKL(block_out_channels=[8, 10], norm_num_groups=4)
