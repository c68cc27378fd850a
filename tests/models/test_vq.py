"""VQModel, against diffusers' class, and its codebook against brute force."""

import random

import diffusers
import pytest
import torch

from models.initialization import initialize
from models.vq import VectorQuantizer, VQModel
from tests.models.test_autoencoder import relative_error


def random_config(seed: int) -> dict:
    """A small configuration with every option drawn, but for the two that diffusers lacks."""
    draw = random.Random(seed)
    groups = draw.choice([2, 4])
    widths = [groups * draw.choice([2, 3, 4]) for _ in range(draw.randint(1, 3))]
    return {
        "in_channels": draw.randint(1, 4),
        "out_channels": draw.randint(1, 4),
        "block_out_channels": widths,
        "layers_per_block": draw.randint(1, 3),
        "latent_channels": draw.randint(2, 5),
        "num_vq_embeddings": draw.randint(3, 40),
        "norm_num_groups": groups,
        "vq_embed_dim": draw.choice([None, 2, 7]),
        "scaling_factor": draw.random(),
        "mid_block_add_attention": draw.random() < 0.7,
        "down_block_types": [draw.choice(["AttnDownEncoderBlock2D", "DownEncoderBlock2D"]) for _ in widths],
    }


@pytest.mark.parametrize("seed", range(8))
def test_outputs_losses_and_gradients_are_those_of_diffusers(seed):
    ours = initialize(VQModel(**random_config(seed)), seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.5 if name.startswith("quantize") else 0.1))
    theirs = diffusers.VQModel(**{key: value for key, value in ours.config.items() if key not in ours.own_config})
    theirs.load_state_dict(ours.state_dict())

    f = ours.downsampling
    images = torch.randn(2, ours.config["in_channels"], 4 * f, 3 * f)
    made = ours(images)
    encoded = theirs.encode(images).latents
    reference = theirs.decode(encoded)
    assert relative_error(made.latents, encoded) <= 1e-5
    assert relative_error(made.images, reference.sample) <= 1e-5
    assert relative_error(ours.decode(encoded), reference.sample) <= 1e-5
    assert relative_error(made.penalty.mean(), reference.commit_loss) <= 1e-5
    assert made.codes.unique().numel() > 1

    direction = torch.randn_like(made.images)
    for network, images_, loss in (
        (ours, made.images, made.penalty.mean()),
        (theirs, reference.sample, reference.commit_loss),
    ):
        ((images_ * direction).sum() + loss).backward()
        assert network.quantize.embedding.weight.grad.any()
    reference_gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        mine, other = parameter.grad, reference_gradients[name]
        assert relative_error(mine, other) <= 1e-4 or other.norm() < 1e-5, name


@pytest.mark.parametrize("legacy", [True, False])
def test_beta_weighs_the_codes_under_the_legacy_flag_and_the_commitment_without(legacy):
    quantizer = VectorQuantizer(2, 1, beta=0.25, legacy=legacy)
    with torch.no_grad():
        quantizer.embedding.weight.copy_(torch.tensor([[0.0], [10.0]]))
    z = torch.tensor([1.0, 7.0]).view(1, 1, 1, 2).requires_grad_()
    quantized = quantizer(z)
    assert quantized.codes.tolist() == [[[0, 1]]] and quantized.latents.flatten().tolist() == [0.0, 10.0]
    assert quantized.loss.item() == pytest.approx(1.25 * (1 + 9) / 2)
    quantized.loss.sum().backward()
    to_codes, to_latents = (0.25, 1.0) if legacy else (1.0, 0.25)
    # d/dcode of (code - z)^2 / 2, and the same of z.
    assert quantizer.embedding.weight.grad.flatten().tolist() == pytest.approx([to_codes * -1, to_codes * 3])
    assert z.grad.flatten().tolist() == pytest.approx([to_latents * 1, to_latents * -3])


def test_gradients_pass_straight_through_the_codebook():
    quantizer = VectorQuantizer(5, 3, beta=0.25, legacy=True)
    z = torch.randn(2, 3, 4, 4, requires_grad=True)
    direction = torch.randn(2, 3, 4, 4)
    (quantizer(z).latents * direction).sum().backward()
    assert torch.equal(z.grad, direction) and quantizer.embedding.weight.grad is None


def test_codes_are_the_nearest_by_brute_force():
    quantizer = VectorQuantizer(37, 4, beta=0.25, legacy=True)
    z = torch.randn(2, 4, 5, 6)
    vectors = z.movedim(1, -1)[..., None, :]
    nearest = (vectors - quantizer.embedding.weight).square().sum(-1).argmin(-1)
    assert torch.equal(quantizer(z).codes, nearest)


def test_first_codes_are_uniform_within_one_over_their_number():
    codes = initialize(VQModel(num_vq_embeddings=256, norm_num_groups=4, block_out_channels=[8]), 0).quantize.embedding
    shares = codes.weight * 256
    assert -1 <= shares.min() < -0.95 and 0.95 < shares.max() <= 1
    assert shares.mean().abs() < 0.1 and abs(shares.std() - 3**-0.5) < 0.03


def test_no_codes_are_refused():
    with pytest.raises(ValueError, match="num_vq_embeddings=0"):
        VQModel(num_vq_embeddings=0)
