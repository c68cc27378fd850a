"""Training of CLIP (Radford et al. 2021, arXiv 2103.00020, section 2.3): of a batch's pictures and captions, each is to
find the other of its pair among all."""

from collections.abc import Mapping, Sequence
from math import log
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from data.batch import Batch
from data.buckets import Bucket
from trainer.distributed import gather_rows
from trainer.objectives.base import Losses, Objective, Phase, Published
from trainer.sampling import Picture


class Contrastive(Objective):
    """One phase. With unit embeddings x_i of pictures and y_i of their captions, and an inverse temperature s that is
    learned, the loss of a pair is

        (-log softmax_j(s x_i . y_j)[i] - log softmax_j(s y_i . x_j)[i]) / 2

    over all j of the global batch. Captions that are equal count as different.

    Networks: "clip" (trained).

    Args:
        largest_scale: s does not grow beyond this.
    """

    networks = ("clip",)
    phases = (Phase("contrast", ("clip",)),)
    scope = "global"
    draws_prompts = False

    def __init__(self, largest_scale: float = 100.0) -> None:
        if largest_scale <= 0:
            raise ValueError(f"objective.largest_scale is {largest_scale}; it must be positive")
        self.largest_scale = largest_scale

    def losses(self, phase: Phase, networks: Mapping[str, nn.Module], batch: Batch) -> Losses:
        """See the class. Logs s, and how often a picture finds its caption first, and a caption its picture."""
        x, y, scale = self._embedded(networks, batch)
        rank = dist.get_rank() if dist.is_initialized() else 0
        own = rank * len(batch) + torch.arange(len(batch), device=x.device)
        of_pictures, of_captions = scale * x @ gather_rows(y).T, scale * y @ gather_rows(x).T
        both = F.cross_entropy(of_pictures, own, reduction="none") + F.cross_entropy(of_captions, own, reduction="none")
        logs = {
            "scale": scale.detach().expand(len(batch)),
            "image_to_text": (of_pictures.argmax(1) == own).float(),
            "text_to_image": (of_captions.argmax(1) == own).float(),
        }
        return Losses(both / 2, logs=logs)

    def _embedded(self, networks: Mapping[str, nn.Module], batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Unit embeddings of pictures and captions, and s."""
        clip: Any = networks["clip"]
        tokens = clip.tokens(batch.captions).to(batch.images.device)
        x, y, logarithm = clip(clip.prepare(batch.images), tokens)
        scale = _HeldBelow.apply(logarithm, log(self.largest_scale)).exp()
        return F.normalize(x, dim=-1), F.normalize(y, dim=-1), scale

    def validation_losses(self, networks: Mapping[str, nn.Module], batch: Batch) -> Mapping[str, Tensor]:
        """Embeddings and tokens, and the logarithm of s, for `compare`."""
        x, y, scale = self._embedded(networks, batch)
        tokens = networks["clip"].tokens(batch.captions).to(x.device)  # type: ignore[operator]
        return {"images": x, "texts": y, "tokens": tokens, "scale": scale.expand(len(batch))[:, None]}

    def compare(self, rows: Mapping[str, Tensor]) -> Mapping[str, float]:
        """The loss among all held-out samples, and how often a caption finds a picture of such a caption first, a
        picture its caption, and `chance` would."""
        images, texts = rows["images"].double(), rows["texts"].double()
        caption = rows["tokens"].unique(dim=0, return_inverse=True)[1]
        same = caption[:, None] == caption[None]
        logits, own = rows["scale"][0].double() * images @ texts.T, torch.arange(len(images), device=images.device)
        return {
            "loss": ((F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2).item(),
            "text_to_image": same[own, logits.argmax(0)].double().mean().item(),
            "image_to_text": same[own, logits.argmax(1)].double().mean().item(),
            "chance": same.double().mean().item(),
        }

    def draw(
        self, networks: Mapping[str, nn.Module], pictures: Sequence[Picture], device: torch.device
    ) -> Sequence[Tensor]:
        """Each picture, and to the right of it the one of the pass that its caption finds first."""
        given = [picture.image for picture in pictures if picture.image is not None]
        assert len(given) == len(pictures), "a CLIP draws no prompts"
        clip: Any = networks["clip"]
        images = torch.stack(given)
        x, y, _ = clip(clip.prepare(images.to(device)), clip.tokens([one.prompt for one in pictures]).to(device))
        first = (F.normalize(y, dim=-1) @ F.normalize(x, dim=-1).T).argmax(1).cpu()
        return list(torch.cat([images, images[first]], dim=3))

    def publish(self, networks: Mapping[str, nn.Module], batches: Sequence[Batch]) -> Published:
        """The CLIP, as transformers opens it."""
        return Published("clip", "clip")

    def flops(self, networks: Mapping[str, nn.Module], shape: Bucket) -> float:
        """Forward and backward of both towers, three times their forward pass."""
        return 3.0 * networks["clip"].flops()  # type: ignore[operator]


class _HeldBelow(torch.autograd.Function):
    """A number, or the bound where it is above; there it takes no gradient that would lead further up. One that leads
    down passes, where a clamp's would be zero for good."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, bound: float) -> Tensor:
        ctx.above = value >= bound
        return value.clamp(max=bound)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone()
        if dist.is_initialized():
            dist.all_reduce(total)  # each rank has its samples' part, and all are to agree
        return torch.where(ctx.above & (total < 0), 0.0, gradient), None
