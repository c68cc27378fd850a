"""What objectives share whose network predicts pictures under conditions: the conditions of a batch, with parts dropped
at random, and the latents of its pictures."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from data.batch import Batch
from data.buckets import Bucket
from data.encoded import MOMENTS, encoder_outputs
from models.given import Given
from trainer.objectives.base import Objective, Phase


class Conditioned(Objective):
    """One phase: a denoiser, trained on what a first stage makes of pictures under what a conditioner makes of what
    samples come with.

    Networks: "denoiser" (trained), "conditioner" (trained with it or frozen) and "first_stage" (frozen).

    Args:
        phase: its name.
        caption_dropout: probability with which the conditioner's encoders are dropped from a sample, all together; or
            a number for each, of all independently. Further numbers are for the conditioner's sizes and maps, which
            else are never dropped.
        dropout_apart: drop each encoder independently where there is one number, too (SD3 drops each of three in 46.4 %
            of samples, and so all in a tenth, arXiv 2403.03206).
        train_conditioner: whether the conditioner's weights are learned with the denoiser's.
    """

    networks = ("denoiser", "conditioner", "first_stage")
    reads_encodings = True
    draws_prompts = True

    def __init__(
        self, phase: str, caption_dropout: float | list[float], dropout_apart: bool, train_conditioner: bool
    ) -> None:
        rates = caption_dropout if isinstance(caption_dropout, list) else [caption_dropout]
        if not all(0 <= rate <= 1 for rate in rates):
            raise ValueError(f"objective.caption_dropout is {caption_dropout}; it takes probabilities, from 0 to 1")
        self.caption_dropout = caption_dropout
        self._drawn_apart = dropout_apart or isinstance(caption_dropout, list)
        self.phases = (Phase(phase, ("denoiser", "conditioner") if train_conditioner else ("denoiser",)),)

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
            drawn = batch.draws.uniform("caption dropout", (len(rates) if self._drawn_apart else 1,))
            keep[:, : len(rates)] = drawn >= torch.tensor(rates)
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
    """The batch's images in the space that the denoiser works in, (n, C, h, w) float32, or their codes (n, h, w):
    encoded, or of moments that were encoded before. The noise that samples them is the same."""
    shape = first_stage.latent_shape(*batch.target_size)  # type: ignore[operator]
    noise = batch.draws.normal("latent", shape, batch.images.device)
    if MOMENTS in batch.fields:
        return first_stage.sample(batch.fields[MOMENTS], noise)  # type: ignore[operator]
    return first_stage.encode(batch.images.float() / 127.5 - 1, noise)  # type: ignore[operator]
