"""How well a picture fits its caption, or a reconstruction its original: means over pictures."""

import torch
from torch import Tensor

from data.curation.clip import Embedder
from data.curation.pretrained import Dtype, fingerprint, model_folder
from models.image_quality import psnr, ssim
from trainer.distributed import World
from trainer.evaluation.metric import Needs, PictureMetric, Seen, sum_of_ranks


class MeanMetric(PictureMetric):
    """A number of each picture, averaged over all.

    Args:
        name: of what it gives.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def place(self, world: World) -> None:
        self.world = world
        self._sums = torch.zeros(2, dtype=torch.float64, device=world.device)

    def of_each(self, seen: Seen) -> Tensor:
        """(n,) numbers; NaN where a picture has none, and does not count."""
        raise NotImplementedError

    def see(self, seen: Seen) -> None:
        values = self.of_each(seen).double().to(self._sums.device)
        counted = values[~values.isnan()]
        self._sums += torch.stack([counted.sum(), torch.tensor(float(len(counted)), device=counted.device).double()])

    def result(self) -> dict[str, float]:
        sum_of_ranks(self._sums)
        total, count = self._sums.tolist()
        self._sums.zero_()
        if not self.world.is_main:
            return {}
        return {self.name: total / count if count else float("nan")}


class ClipScore(MeanMetric):
    """The cosine of a picture's embedding and its caption's (arXiv 2104.08718), as papers' tables have it, from 0 to 1;
    torchmetrics gives 100 times as much. A picture without a caption does not count.

    Args:
        model: CLIP, SigLIP ... of transformers: a folder, or a name on the Hugging Face hub; safetensors.
        dtype: that it computes in.

    Raises:
        ValueError: there is no such model, or it embeds no captions.
    """

    needs: frozenset[Needs] = frozenset({"captions"})

    def __init__(self, model: str, dtype: Dtype = "float32") -> None:
        super().__init__("clip_score")
        self.folder, self.dtype, self.label = model_folder(model), dtype, model.rstrip("/")

    def place(self, world: World) -> None:
        super().place(world)
        self._embedder = Embedder(self.folder, self.dtype, "cpu")
        self._embedder.model.to(world.device)
        self._embedder.texts(["of this picture"])  # refuses models of pictures alone before anything is drawn

    def of_each(self, seen: Seen) -> Tensor:
        images = [image.permute(1, 2, 0).numpy() for image in seen.images.cpu()]
        pictures = torch.from_numpy(self._embedder.images(images))
        texts = torch.from_numpy(self._embedder.texts([caption or " " for caption in seen.captions]))
        told = torch.tensor([bool(caption.strip()) for caption in seen.captions])
        return torch.where(told, (pictures * texts).sum(1), torch.nan)

    def fingerprint(self) -> str:
        """Of the model's weights."""
        return fingerprint(self.folder)


class PeakSignalToNoise(MeanMetric):
    """PSNR of each reconstruction in decibels; the mean over pictures."""

    needs: frozenset[Needs] = frozenset({"originals"})

    def __init__(self) -> None:
        super().__init__("psnr")

    def of_each(self, seen: Seen) -> Tensor:
        assert seen.originals is not None
        return psnr(seen.images / 255, seen.originals / 255)


class StructuralSimilarity(MeanMetric):
    """SSIM of each reconstruction; the mean over pictures."""

    needs: frozenset[Needs] = frozenset({"originals"})

    def __init__(self) -> None:
        super().__init__("ssim")

    def of_each(self, seen: Seen) -> Tensor:
        assert seen.originals is not None
        return ssim(seen.images / 255, seen.originals / 255)
