"""Autoregression: one network learns to predict each of a picture's codes from those before it (RARM: Blattmann et al.
2022, arXiv 2204.11824)."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data.batch import Batch
from models.code_sampler import CodeSampler
from models.guidance import Guidance
from trainer.objectives.base import Losses, Phase
from trainer.objectives.conditioned import Conditioned, latents
from trainer.sampling import Picture, decode, draw_codes


class Autoregression(Conditioned):
    """One phase: an autoregressive network trained by cross entropy on the codes of pictures under conditions; see
    `Conditioned`. The first stage gives codes.

    Args:
        sampler, guidance: how the run's sample grids are drawn.
        caption_dropout, dropout_apart, train_conditioner: see `Conditioned`.
    """

    def __init__(
        self,
        sampler: CodeSampler,
        guidance: Guidance,
        caption_dropout: float | list[float] = 0.0,
        dropout_apart: bool = False,
        train_conditioner: bool = False,
    ) -> None:
        super().__init__("predict", caption_dropout, dropout_apart, train_conditioner)
        self.sampler, self.guidance = sampler, guidance

    def losses(self, phase: Phase, networks: Mapping[str, nn.Module], batch: Batch) -> Losses:
        """Cross entropy in nats a code, averaged over each sample's codes."""
        return Losses(self._cross_entropy(networks, batch, dropout=True))

    def validation_losses(self, networks: Mapping[str, nn.Module], batch: Batch) -> Mapping[str, Tensor]:
        """The same under all conditions."""
        return {"loss": self._cross_entropy(networks, batch, dropout=False)}

    def _cross_entropy(self, networks: Mapping[str, nn.Module], batch: Batch, dropout: bool) -> Tensor:
        with torch.no_grad():
            codes = latents(networks["first_stage"], batch).flatten(1)
        conditions = self.conditions(networks, batch, dropout)
        network = networks["denoiser"]
        logits = network(network.inputs(codes), conditions.get("context"))  # type: ignore[operator]
        return F.cross_entropy(logits.float().transpose(1, 2), codes, reduction="none").mean(1)

    def draw(
        self, networks: Mapping[str, nn.Module], pictures: Sequence[Picture], device: torch.device
    ) -> Sequence[Tensor]:
        """Draw codes, and decode them."""
        return decode(networks, draw_codes(networks, self.sampler, self.guidance, pictures, device))
