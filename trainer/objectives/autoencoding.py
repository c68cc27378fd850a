"""Training of first-stage autoencoders (Esser et al. 2021, arXiv 2012.09841; Rombach et al. 2022, arXiv 2112.10752,
appendix G): reconstruction under a learned distance, regularised latents, and a discriminator of patches."""

from collections.abc import Mapping, Sequence
from math import exp, prod
from typing import Literal

import torch
from torch import Tensor, nn

from data.batch import Batch
from data.buckets import Bucket
from models.autoencoder import Reconstruction
from models.image_quality import psnr, ssim
from trainer.distributed import all_reduce_sum
from trainer.gradients import LastLayer
from trainer.objectives.base import Losses, Objective, Phase, Published
from trainer.sampling import Picture

_MOST_WEIGHT = 1e4
_EPS = 1e-4


class Autoencoding(Objective):
    """Two phases. "autoencode" minimises, of an image x of d values and its reconstruction y,

        nll = |x - y| + lpips_weight * LPIPS(x, y)     (the first term averaged over the d values)
        nll = d * (nll / exp(log_variance) + log_variance)     with reduction "sum"
        nll + penalty_weight * penalty + adversarial_weight * w * (mean over patches of -D(y))

    where the penalty is the posterior's divergence or the codebook's loss, and w, at most 10,000, the ratio of the
    norms of the gradients of nll and of the last term at the decoder's last layer. "discriminate" trains D by the hinge
    loss.

    Batch norm in D, and w, are of a slice: what a GPU's batch was in the published training is here `batch / lanes`.

    Networks: "autoencoder" and "discriminator" (trained), "lpips" (frozen; none where its weight is 0).

    Args:
        reduction: "sum" over an image's values, as the published KL models, or "mean", as the VQ models.
        penalty_weight: 1e-6 in the published KL models, 1 in the VQ models.
        adversarial_weight: of the discriminator's term.
        adversarial_start: the step from which on there is a discriminator, and its phase.
        lpips_weight: of the learned distance.
        log_variance: with "sum". The published code calls it a parameter, but no optimiser has it: it stays 0.
        shift: measure, beside the latents' deviation, their mean, for a denoiser to subtract (Stable Diffusion 3).
    """

    scope = "slice"
    draws_prompts = False

    def __init__(
        self,
        reduction: Literal["sum", "mean"],
        penalty_weight: float,
        adversarial_weight: float,
        adversarial_start: int,
        lpips_weight: float = 1.0,
        log_variance: float = 0.0,
        shift: bool = False,
    ) -> None:
        if adversarial_start < 0:
            raise ValueError(f"objective.adversarial_start is {adversarial_start}; it must not be negative")
        self.reduction, self.penalty_weight, self.lpips_weight = reduction, penalty_weight, lpips_weight
        self.adversarial_weight, self.adversarial_start = adversarial_weight, adversarial_start
        self.log_variance, self.shift = log_variance, shift
        self.networks = ("autoencoder", "discriminator", *(("lpips",) if lpips_weight else ()))
        self.phases = (
            Phase("autoencode", ("autoencoder",)),
            Phase("discriminate", ("discriminator",), start=adversarial_start),
        )

    def losses(self, phase: Phase, networks: Mapping[str, nn.Module], batch: Batch) -> Losses:
        """See the class. Logs the terms, w, and of a codebook the perplexity of the slice's codes."""
        images = pixels(batch)
        if phase.name == "discriminate":
            return self._discriminate(networks, images, batch)
        autoencoder, judge = networks["autoencoder"], networks["discriminator"]
        with LastLayer(autoencoder.decoder.conv_out) as last:  # type: ignore[union-attr, arg-type]
            made: Reconstruction = autoencoder(images, latent_noise(autoencoder, batch))
        nll, logs = self._reconstruction(networks, images, made)
        loss = nll + self.penalty_weight * made.penalty
        if batch.draws.step >= self.adversarial_start:
            fooled = -judge(made.images).flatten(1).mean(1)
            nll_norm, norm = last.gradient_norms([nll.mean(), fooled.mean()])
            weight = (nll_norm / (norm + _EPS)).clamp(0, _MOST_WEIGHT)
            loss = loss + self.adversarial_weight * weight * fooled
            logs |= {"adversarial": fooled, "adaptive_weight": weight.expand(len(batch))}
        if made.codes is not None:
            logs["perplexity"] = perplexity(histogram(made.codes, codes_of(autoencoder)).mean(0)).expand(len(batch))
        return Losses(loss, logs=logs)

    def _discriminate(self, networks: Mapping[str, nn.Module], images: Tensor, batch: Batch) -> Losses:
        autoencoder, judge = networks["autoencoder"], networks["discriminator"]
        with torch.no_grad():
            made = autoencoder(images, latent_noise(autoencoder, batch)).images
        real, fake = judge(images).flatten(1), judge(made).flatten(1)
        loss = 0.5 * ((1 - real).relu().mean(1) + (1 + fake).relu().mean(1))
        return Losses(loss, logs={"real": real.mean(1), "fake": fake.mean(1)})

    def _reconstruction(
        self, networks: Mapping[str, nn.Module], images: Tensor, made: Reconstruction
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The nll of each image, and its terms by name."""
        absolute = (images - made.images).abs().flatten(1).mean(1)
        penalty = "divergence" if made.codes is None else "codebook"
        terms = {"l1": absolute, penalty: made.penalty}
        nll = absolute
        if self.lpips_weight:
            distance = networks["lpips"](images, made.images)
            nll = nll + self.lpips_weight * distance
            # A stand-in's distances are not to be taken for the real ones.
            stands_in = getattr(networks["lpips"], "stand_in", None) is not None
            terms["random_features" if stands_in else "lpips"] = distance
        if self.reduction == "sum":
            nll = images[0].numel() * (nll / exp(self.log_variance) + self.log_variance)
        return nll, terms

    def validation_losses(self, networks: Mapping[str, nn.Module], batch: Batch) -> Mapping[str, Tensor]:
        """The loss without the discriminator's term, its terms, PSNR and SSIM, of reconstructions from the latents'
        means; and how often each code is used."""
        images = pixels(batch)
        made: Reconstruction = networks["autoencoder"](images)
        nll, terms = self._reconstruction(networks, images, made)
        a, b = (images + 1) / 2, (made.images.clamp(-1, 1) + 1) / 2
        values = {"loss": nll + self.penalty_weight * made.penalty, "psnr": psnr(a, b), "ssim": ssim(a, b)} | terms
        if made.codes is not None:
            values["codes"] = histogram(made.codes, codes_of(networks["autoencoder"]))
        return values

    def summary(self, averages: Mapping[str, Tensor]) -> Mapping[str, float]:
        """Of the codebook: the share of its codes that is used at all, and the perplexity of their use."""
        codes = averages["codes"]
        return {"codebook_use": (codes > 0).double().mean().item(), "perplexity": perplexity(codes).item()}

    def draw(
        self, networks: Mapping[str, nn.Module], pictures: Sequence[Picture], device: torch.device
    ) -> Sequence[Tensor]:
        """Each picture, and its reconstruction to the right of it."""
        given = [picture.image for picture in pictures if picture.image is not None]
        assert len(given) == len(pictures), "an autoencoder draws no prompts"
        images = torch.stack(given)
        made = networks["autoencoder"](images.to(device).float() / 127.5 - 1).images
        drawn = ((made.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
        return list(torch.cat([images.cpu(), drawn], dim=3))

    def publish(self, networks: Mapping[str, nn.Module], batches: Sequence[Batch]) -> Published:
        """The autoencoder, its latents scaled to unit variance over the first batch, as in latent diffusion; where its
        configuration says how to scale them, they are scaled so."""
        autoencoder = networks["autoencoder"]
        component, config = str(autoencoder.component), {}
        sums = {"count": 0.0, "sum": 0.0, "square": 0.0}
        device = batches[0].images.device
        for batch in batches:
            latents = autoencoder(pixels(batch), latent_noise(autoencoder, batch)).latents.double()
            sums["count"] += latents.numel()
            sums["sum"] += latents.sum().item()
            sums["square"] += latents.square().sum().item()
        sums = all_reduce_sum(sums, device)
        mean = sums["sum"] / sums["count"]
        if autoencoder.config["scaling_factor"] is None:  # type: ignore[index]
            config["scaling_factor"] = (sums["square"] / sums["count"] - mean**2) ** -0.5
            if self.shift:
                config["shift_factor"] = mean
        return Published("autoencoder", component, config)

    def flops(self, networks: Mapping[str, nn.Module], shape: Bucket) -> float:
        """Of both phases, a backward pass through a trained network counting as two forward passes and one through a
        frozen network as one."""
        passes = {"autoencoder": 3 + 1, "discriminator": 2 + 2 * 3, "lpips": 2}
        return sum(passes[name] * networks[name].flops(shape.height, shape.width) for name in self.networks)  # type: ignore[operator]


def pixels(batch: Batch) -> Tensor:
    """The batch's images (n, 3, H, W), float32 in [-1, 1]."""
    return batch.images.float() / 127.5 - 1


def latent_noise(autoencoder: nn.Module, batch: Batch) -> Tensor:
    """What the batch's latents are sampled with."""
    f: int = autoencoder.downsampling  # type: ignore[assignment]
    height, width = batch.target_size
    return batch.draws.normal("latent", (autoencoder.latent_channels, height // f, width // f), batch.images.device)  # type: ignore[arg-type]


def codes_of(autoencoder: nn.Module) -> int:
    """How many codes its codebook has."""
    codes: int = autoencoder.config["num_vq_embeddings"]  # type: ignore[index, assignment]
    return codes


def histogram(codes: Tensor, count: int) -> Tensor:
    """(n, count) float32: the share of each code in each sample's codes (n, h, w)."""
    flat = codes.flatten(1)
    ones = torch.ones_like(flat, dtype=torch.float32)
    return torch.zeros(len(flat), count, device=flat.device).scatter_add_(1, flat, ones) / prod(codes.shape[1:])


def perplexity(shares: Tensor) -> Tensor:
    """exp of the entropy of shares (count,) that add up to one: how many codes, used alike, would be as varied."""
    return torch.special.entr(shares).sum().exp()
