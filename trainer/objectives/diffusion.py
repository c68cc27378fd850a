"""Plain diffusion: one network learns to undo noise, under any process."""

import math
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from data.batch import Batch
from data.buckets import Bucket
from data.encoded import MOMENTS, encoder_outputs
from models.conditioner import Given
from models.guidance import Guidance
from models.process import Process
from models.samplers import Course, Sampler
from trainer.objectives.base import Losses, Objective, Phase
from trainer.sampling import Picture, decode, draw_latents, draw_pass


class Diffusion(Objective):
    """One phase: a denoiser trained on noised (latent) images under what a conditioner makes of what samples come with.

    Networks: "denoiser" (trained), "conditioner" (trained with it or frozen) and "first_stage" (frozen).

    Args:
        process: noising path, parameterization, density of times and weight.
        sampler, guidance: how the run's sample grids are drawn.
        caption_dropout: probability with which each of the conditioner's encoders is dropped from a sample, of all
            independently; one number for all or one for each (SD3 drops each of three in 46.4 % of samples, arXiv
            2403.03206). Further numbers are for the conditioner's sizes and maps, which else are never dropped.
        error: of the prediction, "squared", or "absolute" (latent diffusion's L1).
        train_conditioner: whether the conditioner's weights are learned with the denoiser's.
        offset_noise: strength of a further noise that is one number for each of a sample's channels: then a network can
            learn to change a picture's brightness. SDXL: 0.05.
        bound_steps: of a discrete process whose variational bound is estimated in validation, as `val/bound`, in nats
            per element (LDM: 1000); None does not.
        validation_times: number of times t at which held-out samples are noised, the midpoints of as many equal parts
            of the times that are trained (SD3, section 5.3: eight, of [0, 1]).
    """

    networks = ("denoiser", "conditioner", "first_stage")
    phases = (Phase("denoise", ("denoiser",)),)
    reads_encodings = True
    draws_prompts = True

    def __init__(
        self,
        process: Process,
        sampler: Sampler,
        guidance: Guidance,
        caption_dropout: float | list[float] = 0.1,
        validation_times: int = 8,
        error: Literal["squared", "absolute"] = "squared",
        train_conditioner: bool = False,
        offset_noise: float = 0.0,
        bound_steps: int | None = None,
    ):
        if validation_times < 1:
            raise ValueError(f"objective.validation_times is {validation_times}; it must be at least 1")
        rates = caption_dropout if isinstance(caption_dropout, list) else [caption_dropout]
        if not all(0 <= rate <= 1 for rate in rates):
            raise ValueError(f"objective.caption_dropout is {caption_dropout}; it takes probabilities, from 0 to 1")
        if offset_noise < 0:
            raise ValueError(f"objective.offset_noise is {offset_noise}; it takes a number from 0")
        self.offset_noise, self.bound_steps = offset_noise, bound_steps
        self.process, self.sampler, self.guidance = process, sampler, guidance
        self.caption_dropout, self.validation_times, self.error = caption_dropout, validation_times, error
        self.phases = (Phase("denoise", ("denoiser", "conditioner") if train_conditioner else ("denoiser",)),)

    def losses(self, phase: Phase, networks: Mapping[str, nn.Module], batch: Batch) -> Losses:
        """Weighted error of the prediction, averaged over each sample's elements."""
        with torch.no_grad():
            x0 = latents(networks["first_stage"], batch)
        conditions = self.conditions(networks, batch)
        t = self.process.sample_t(batch.draws.uniform("time", device=x0.device))
        return self.losses_at(networks["denoiser"], x0, conditions, batch, t)

    def losses_at(
        self, denoiser: nn.Module, x0: Tensor, conditions: Mapping[str, Tensor], batch: Batch, t: Tensor
    ) -> Losses:
        """The loss of each sample at given times t (n,)."""
        noise = self._noise(batch, x0)
        x_t = self.process.add_noise(x0, noise, t)
        prediction = self._predict(denoiser, x_t, conditions, t)
        return Losses(per_sample=self._loss(prediction, self.process.target(x0, noise, t), t), t=t.detach())

    def _noise(self, batch: Batch, x0: Tensor) -> Tensor:
        noise = batch.draws.normal("noise", x0.shape[1:], x0.device)
        if self.offset_noise:
            noise += self.offset_noise * batch.draws.normal("offset noise", (x0.shape[1], 1, 1), x0.device)
        return noise

    def _predict(self, denoiser: nn.Module, x_t: Tensor, conditions: Mapping[str, Tensor], t: Tensor) -> Tensor:
        return denoiser(self.process.network_input(x_t, t), self.process.network_time(t), **conditions).float()

    def _loss(self, prediction: Tensor, target: Tensor, t: Tensor) -> Tensor:
        difference = prediction - target
        error = difference.square() if self.error == "squared" else difference.abs()
        return self.process.loss_weight(t) * error.flatten(1).mean(1)

    def validation_losses(self, networks: Mapping[str, nn.Module], batch: Batch) -> Mapping[str, Tensor]:
        """The loss at each of the fixed times, `loss_by_t/<i>`, and their mean, under all captions."""
        x0 = latents(networks["first_stage"], batch)
        conditions = self.conditions(networks, batch, dropout=False)
        noise = self._noise(batch, x0)
        by_time, bounds = {}, []
        for i, time in enumerate(self.process.validation_times(self.validation_times).to(x0.device)):
            t = time.expand(len(batch))
            x_t = self.process.add_noise(x0, noise, t)
            prediction = self._predict(networks["denoiser"], x_t, conditions, t)
            by_time[f"loss_by_t/{i}"] = self._loss(prediction, self.process.target(x0, noise, t), t)
            if self.bound_steps is not None:
                estimate = self.process.to_x0(prediction, x_t, t)
                bounds.append(self.bound_steps * self.process.bound(x0, estimate, t, self.bound_steps))
        means = {"loss": torch.stack(list(by_time.values())).mean(0)}
        if bounds:
            means["bound"] = torch.stack(bounds).mean(0)
        return means | by_time

    def draw(
        self, networks: Mapping[str, nn.Module], pictures: Sequence[Picture], device: torch.device
    ) -> Sequence[Tensor]:
        """Sample, and decode what was sampled.

        A denoiser of the least noisy times alone, as SDXL's refiner is, draws the pictures' own images anew, from as
        much noise as it knows and in as many steps as the sampler has.
        """
        if self.process.density.span[1] == 1 or any(picture.image is None for picture in pictures):
            return draw_pass(networks, self.process, self.sampler, self.guidance, pictures, device)
        last, sampler = self.process.span[1], copy(self.sampler)
        sampler.steps = math.ceil(self.sampler.steps / last)
        pictures = [replace(picture, start=picture.image) for picture in pictures]
        course = Course(start=last)
        return decode(networks, draw_latents(networks, self.process, sampler, self.guidance, pictures, device, course))

    def flops(self, networks: Mapping[str, nn.Module], shape: Bucket) -> float:
        """Forward and backward of the denoiser, three times its forward pass; encoders are not counted."""
        _, height, width = networks["first_stage"].latent_shape(shape.height, shape.width)  # type: ignore[operator]
        length: int = networks["conditioner"].context_length  # type: ignore[assignment]
        return 3.0 * networks["denoiser"].flops(height, width, length)  # type: ignore[operator]

    def conditions(self, networks: Mapping[str, nn.Module], batch: Batch, dropout: bool = True) -> Mapping[str, Tensor]:
        """What the conditioner makes of the batch, each part dropped at random unless `dropout` is False."""
        conditioner = networks["conditioner"]
        encoders, parts = conditioner.encoders, conditioner.parts
        assert isinstance(encoders, int) and isinstance(parts, int)
        keep = torch.ones(len(batch), parts, dtype=torch.bool)
        rates = self._rates(encoders, parts - encoders)
        if dropout and rates:
            keep[:, : len(rates)] = batch.draws.uniform("caption dropout", (len(rates),)) >= torch.tensor(rates)
        return conditioner(given_of(batch, networks["first_stage"]), keep)

    def check_encoders(self, encoders: int, others: int = 0) -> None:
        """Refuse dropout rates for another number of encoders, or of encoders and other parts."""
        self._rates(encoders, others)

    def _rates(self, encoders: int, others: int) -> Sequence[float]:
        """Of the encoders, or of all parts."""
        if isinstance(self.caption_dropout, list):
            if len(self.caption_dropout) not in (encoders, encoders + others):
                more = f" and {others} other parts" if others else ""
                raise ValueError(
                    f"objective.caption_dropout has {len(self.caption_dropout)} numbers for {encoders} encoders{more}"
                )
            return self.caption_dropout
        return [float(self.caption_dropout)] * encoders


def given_of(batch: Batch, first_stage: nn.Module) -> Given:
    """What a batch's samples come with, as a conditioner takes it."""
    return Given(
        captions=batch.captions,
        size=batch.target_size,
        images=batch.images,
        encoded=encoder_outputs(batch.fields),
        fields=batch.fields,
        original_size=batch.original_size,
        crop=batch.crop,
        first_stage=first_stage,  # type: ignore[arg-type]
        draws=batch.draws,
    )


def latents(first_stage: nn.Module, batch: Batch) -> Tensor:
    """The batch's images in the space that the denoiser works in, (n, C, h, w) float32: encoded, or of moments that
    were encoded before. The noise that samples them is the same."""
    shape = first_stage.latent_shape(*batch.target_size)  # type: ignore[operator]
    noise = batch.draws.normal("latent", shape, batch.images.device)
    if MOMENTS in batch.fields:
        return first_stage.sample(batch.fields[MOMENTS], noise)  # type: ignore[operator]
    return first_stage.encode(batch.images.float() / 127.5 - 1, noise)  # type: ignore[operator]
