"""The objective of autoencoders, against its formulas written out, with autograd's own gradients at the last layer."""

import math

import pytest
import torch
from torch import nn

from data.batch import Batch
from data.draws import slice_draws
from models.autoencoder import AutoencoderKL
from models.discriminator import PatchDiscriminator
from models.initialization import initialize
from models.lpips import LPIPS
from models.vq import VQModel
from trainer.objectives.autoencoding import Autoencoding
from trainer.objectives.base import DrawsPictures, Publishes, Summarizes, Validates
from trainer.sampling import Picture

SMALL = {"block_out_channels": [8, 8], "norm_num_groups": 4, "latent_channels": 3}
KL = {"reduction": "sum", "penalty_weight": 1e-3, "adversarial_weight": 0.5, "adversarial_start": 2}
VQ = {"reduction": "mean", "penalty_weight": 1.0, "adversarial_weight": 0.75, "adversarial_start": 2}


def batch_at(step: int, n: int = 3, lane: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(7 + lane)
    return Batch(
        draws=slice_draws(0, step, lane, n),
        keys=["a"] * n,
        captions=[""] * n,
        images=torch.randint(0, 256, (n, 3, 32, 24), dtype=torch.uint8, generator=generator),
        original_size=torch.tensor([[32, 24]] * n),
        crop=torch.zeros(n, 2, dtype=torch.int64),
    )


def networks_of(kind: str, scaling_factor: float | None = None) -> dict[str, nn.Module]:
    autoencoder = (
        AutoencoderKL(**SMALL, scaling_factor=scaling_factor)
        if kind == "kl"
        else VQModel(**SMALL, num_vq_embeddings=11, scaling_factor=scaling_factor)
    )
    return {
        "autoencoder": initialize(autoencoder, 0),
        "discriminator": initialize(PatchDiscriminator(filters=4, layers=2), 1),
        "lpips": initialize(LPIPS(filters=4), 2).requires_grad_(False),
    }


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_the_loss_is_its_formula_and_the_adaptive_weight_that_of_autograd(kind):
    objective = Autoencoding(**(KL if kind == "kl" else VQ), lpips_weight=0.7, log_variance=0.3)
    networks = networks_of(kind)
    autoencode = objective.phases[0]
    for step in (1, 2):
        batch = batch_at(step)
        x = batch.images.float() / 127.5 - 1
        noise = batch.draws.normal("latent", (3, 16, 12))
        made = networks["autoencoder"](x, noise)
        y = made.images
        error = (x - y).abs() + 0.7 * networks["lpips"](x, y).view(-1, 1, 1, 1)  # as the published code broadcasts it
        if kind == "kl":
            mean, log_variance = networks["autoencoder"].encode(x)
            divergence = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum((1, 2, 3))
            nll = (error / math.exp(0.3) + 0.3).sum() / 3
            expected = nll + 1e-3 * divergence.sum() / 3
        else:
            nll = error.mean()
            expected = nll + made.penalty.mean()
        if step == 2:
            adversarial = -networks["discriminator"](y).mean()
            weight = networks["autoencoder"].decoder.conv_out.weight
            norms = [torch.autograd.grad(loss, weight, retain_graph=True)[0].norm() for loss in (nll, adversarial)]
            ratio = norms[0] / (norms[1] + 1e-4)
            expected = expected + objective.adversarial_weight * ratio * adversarial
        losses = objective.losses(autoencode, networks, batch)
        assert losses.per_sample.shape == (3,)
        torch.testing.assert_close(losses.per_sample.mean(), expected)
        assert ("adaptive_weight" in losses.logs) == (step == 2)
        if step == 2:
            torch.testing.assert_close(losses.logs["adaptive_weight"], ratio.expand(3), rtol=1e-4, atol=0)
            # The weight itself has no gradient.
            parameters = list(networks["autoencoder"].parameters())
            ours = torch.autograd.grad(losses.per_sample.mean(), parameters, allow_unused=True)
            fixed = expected - objective.adversarial_weight * (ratio - ratio.detach()) * adversarial
            theirs = torch.autograd.grad(fixed, parameters, allow_unused=True)
            for a, b in zip(ours, theirs, strict=True):
                assert (a is None) == (b is None)
                if a is not None:
                    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * expected.abs().item())
        assert "random_features" in losses.logs and "lpips" not in losses.logs
        assert ("perplexity" in losses.logs) == (kind == "vq")


def test_the_discriminator_has_the_hinge_loss_of_its_own_phase():
    objective = Autoencoding(**KL)
    networks = networks_of("kl")
    discriminate = objective.phases[1]
    assert (discriminate.name, discriminate.start) == ("discriminate", 2)
    batch = batch_at(2)
    x = batch.images.float() / 127.5 - 1
    y = networks["autoencoder"](x, batch.draws.normal("latent", (3, 16, 12))).images
    real, fake = networks["discriminator"](x), networks["discriminator"](y.detach())
    expected = 0.5 * (torch.relu(1 - real).mean() + torch.relu(1 + fake).mean())
    losses = objective.losses(discriminate, networks, batch)
    torch.testing.assert_close(losses.per_sample.mean(), expected)
    losses.per_sample.mean().backward()
    assert networks["autoencoder"].decoder.conv_out.weight.grad is None
    assert networks["discriminator"].main[0].weight.grad.any()


def test_the_adaptive_weight_is_ten_thousand_at_most():
    """Of a discriminator whose gradient is lost."""
    networks = networks_of("kl")
    torch.nn.init.zeros_(networks["discriminator"].main[-1].weight)
    objective = Autoencoding(**KL)
    losses = objective.losses(objective.phases[0], networks, batch_at(2))
    assert losses.logs["adaptive_weight"].tolist() == [1e4] * 3


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_the_validation_loss_is_that_of_training_without_the_discriminator(kind):
    objective = Autoencoding(**(KL if kind == "kl" else VQ))
    with torch.no_grad():
        values = objective.validation_losses(networks_of(kind), batch_at(-1))
    nll = values["l1"] + values["random_features"]
    penalty = values["divergence"] * 1e-3 if kind == "kl" else values["codebook"]
    assert (penalty > 0).all()
    torch.testing.assert_close(values["loss"], nll * (3 * 32 * 24 if kind == "kl" else 1) + penalty)


def test_validation_is_of_means_and_tells_what_codes_are_used():
    objective = Autoencoding(**VQ)
    networks = networks_of("vq")
    with torch.no_grad():
        networks["autoencoder"].quantize.embedding.weight.normal_()
        values = objective.validation_losses(networks, batch_at(-1))
        made = networks["autoencoder"](batch_at(-1).images.float() / 127.5 - 1)
    assert {"loss", "psnr", "ssim", "l1", "codebook", "random_features"} < values.keys()
    assert values["codes"].shape == (3, 11) and values["codes"].sum(1).tolist() == pytest.approx([1, 1, 1])
    told = objective.summary({"codes": values["codes"].mean(0).double()})
    shares = torch.bincount(made.codes.flatten(), minlength=11).double() / made.codes.numel()
    assert told["codebook_use"] == made.codes.unique().numel() / 11 and made.codes.unique().numel() > 1
    assert told["perplexity"] == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares.tolist() if p)))
    mse = (made.images.clamp(-1, 1) - batch_at(-1).images.float().div(127.5).sub(1)).square().mean((1, 2, 3))
    assert values["psnr"].tolist() == pytest.approx([10 * math.log10(4 / m) for m in mse.tolist()], rel=1e-4)


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_latents_are_published_with_the_scale_that_makes_them_vary_by_one(kind):
    networks = networks_of(kind)
    batches = [batch_at(0, lane=0), batch_at(0, lane=1)]
    objective = Autoencoding(**(KL if kind == "kl" else VQ), shift=kind == "kl")
    with torch.no_grad():
        published = objective.publish(networks, batches)
        latents = []
        for batch in batches:
            z = networks["autoencoder"].encode(batch.images.float() / 127.5 - 1)
            latents.append(z.sample(batch.draws.normal("latent", (3, 16, 12))) if kind == "kl" else z)
        scale = 1 / torch.cat(latents).std(correction=0).item()
    assert (published.network, published.folder) == ("autoencoder", "vae" if kind == "kl" else "vqvae")
    assert published.config["scaling_factor"] == pytest.approx(scale, rel=1e-4)
    if kind == "kl":
        assert published.config["shift_factor"] == pytest.approx(torch.cat(latents).mean().item(), rel=1e-3)
    given = objective.publish(networks_of(kind, scaling_factor=0.5), batches)
    assert given.config == {}


def test_pictures_are_drawn_beside_their_reconstructions():
    networks = networks_of("kl")
    image = batch_at(0, n=1).images[0]
    with torch.no_grad():
        (drawn,) = Autoencoding(**KL).draw(networks, [Picture("", 0, 32, 24, image=image)], torch.device("cpu"))
        made = networks["autoencoder"](image[None].float() / 127.5 - 1).images[0]
    assert drawn.shape == (3, 32, 48) and torch.equal(drawn[..., :24], image)
    assert torch.equal(drawn[..., 24:], ((made.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8))


def test_it_does_what_protocols_ask_and_needs_no_lpips_that_weighs_nothing():
    objective = Autoencoding(**KL, lpips_weight=0.0)
    for protocol in (Validates, Summarizes, DrawsPictures, Publishes):
        assert isinstance(objective, protocol)
    networks = networks_of("kl")
    assert objective.networks == ("autoencoder", "discriminator")
    del networks["lpips"]
    losses = objective.losses(objective.phases[0], networks, batch_at(0))
    assert losses.logs.keys() == {"l1", "divergence"}
    with pytest.raises(ValueError, match="adversarial_start is -1"):
        Autoencoding(**KL | {"adversarial_start": -1})


def test_flops_are_those_of_convolutions_and_attention():
    from data.buckets import Bucket

    objective = Autoencoding(**KL)
    networks = networks_of("kl")
    per_image = [networks[name].flops(32, 24) for name in ("autoencoder", "discriminator", "lpips")]
    judge = networks["discriminator"]
    # Three strided or plain convolutions of 4 x 4 and the last.
    by_hand = 2 * 16 * (3 * 4 * 16 * 12 + 4 * 8 * 8 * 6 + 8 * 16 * 7 * 5 + 16 * 1 * 6 * 4)
    assert per_image[1] == by_hand and len(list(judge.parameters()))
    assert objective.flops(networks, Bucket(32, 24)) == pytest.approx(4 * per_image[0] + 8 * by_hand + 2 * per_image[2])
