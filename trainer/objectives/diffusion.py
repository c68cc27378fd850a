"""Plain diffusion: one network learns to undo noise, under any process."""

import math
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from data.batch import Batch
from models.guidance import Guidance
from models.process import Process
from models.samplers import Course, Sampler
from trainer.objectives.base import Losses, Phase
from trainer.objectives.conditioned import Conditioned, latents
from trainer.sampling import Picture, decode, draw_latents, draw_pass


class Diffusion(Conditioned):
    """One phase: a denoiser trained on noised (latent) images under conditions; see `Conditioned`.

    Args:
        process: noising path, parameterization, density of times and weight.
        sampler, guidance: how the run's sample grids are drawn.
        caption_dropout, dropout_apart, train_conditioner: see `Conditioned`.
        error: of the prediction, "squared", or "absolute" (latent diffusion's L1).
        offset_noise: strength of a further noise that is one number for each of a sample's channels: then a network can
            learn to change a picture's brightness. SDXL: 0.05.
        bound_steps: of a discrete process whose variational bound is estimated in validation, as `val/bound`, in nats
            per element (LDM: 1000); None does not.
        validation_times: number of times t at which held-out samples are noised, the midpoints of as many equal parts
            of the times that are trained (SD3, section 5.3: eight, of [0, 1]).
    """

    def __init__(
        self,
        process: Process,
        sampler: Sampler,
        guidance: Guidance,
        caption_dropout: float | list[float] = 0.1,
        dropout_apart: bool = False,
        validation_times: int = 8,
        error: Literal["squared", "absolute"] = "squared",
        train_conditioner: bool = False,
        offset_noise: float = 0.0,
        bound_steps: int | None = None,
    ):
        super().__init__("denoise", caption_dropout, dropout_apart, train_conditioner)
        if validation_times < 1:
            raise ValueError(f"objective.validation_times is {validation_times}; it must be at least 1")
        if offset_noise < 0:
            raise ValueError(f"objective.offset_noise is {offset_noise}; it takes a number from 0")
        if bound_steps is not None and process.path.steps is None:
            raise ValueError(
                f"objective.bound_steps={bound_steps} is of a discrete process, and {type(process.path).__name__} has"
                " no steps: leave it out, or take process=eps_linear"
            )
        if bound_steps is not None and bound_steps < 2:
            raise ValueError(f"objective.bound_steps is {bound_steps}; it must be at least 2")
        self.offset_noise, self.bound_steps = offset_noise, bound_steps
        self.process, self.sampler, self.guidance = process, sampler, guidance
        self.validation_times, self.error = validation_times, error

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
