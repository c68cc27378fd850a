"""Embeddings of pictures and captions by CLIP, SigLIP and their like."""

from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
from torch.nn import functional as F

from data.curation.base import Failure, Filter, Media
from data.curation.heads import Head
from data.curation.pretrained import Device, Dtype, fingerprint, load_model, model_folder
from models.hub import load_part
from models.image import embed, embedding_width


class Embedder:
    """A model of transformers that embeds pictures, and captions if it is a pair of encoders with one space for both.

    Pictures go through the model's own image processor, in Pillow's variant: the same whether or not torchvision is
    installed.

    Args:
        folder: of the model.
        dtype: that it computes in.
        device: that it runs on.
    """

    def __init__(self, folder: Path, dtype: Dtype, device: Device) -> None:
        from transformers import AutoImageProcessor, AutoModel

        self.folder = folder
        self.model = load_model(AutoModel, folder, dtype, device)
        self._processor = load_part(AutoImageProcessor.from_pretrained, folder, backend="pil")

    @property
    def width(self) -> int:
        """d, the numbers in an embedding."""
        return embedding_width(self.model.config, str(self.folder))

    @torch.no_grad()
    def images(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """(n, d) float32 embeddings, of length one, of n pictures (H, W, 3), uint8 RGB, each of any size."""
        prepared = self._processor(list(images), return_tensors="pt", input_data_format="channels_last")
        pixels = prepared.pixel_values.to(self.model.device, self.model.dtype)
        return _unit(embed(self.model, pixels))

    @torch.no_grad()
    def texts(self, captions: Sequence[str]) -> np.ndarray:
        """(n, d) float32 embeddings, of length one, of n captions; what is beyond the model's length is cut off.

        Raises:
            ValueError: the model embeds pictures only.
        """
        if not hasattr(self.model, "get_text_features"):
            raise ValueError(f"{self.folder} holds a {type(self.model).__name__}, which embeds no captions")
        # SigLIP was trained on captions padded to full length, with attention to the padding.
        padded = self.model.config.model_type.startswith("siglip")
        tokens = self._tokenizer(
            list(captions),
            padding="max_length" if padded else True,
            max_length=self.model.config.text_config.max_position_embeddings,
            truncation=True,
            return_attention_mask=not padded,
            return_tensors="pt",
        )
        features = self.model.get_text_features(**tokens.to(self.model.device)).pooler_output
        return _unit(features)

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return load_part(AutoTokenizer.from_pretrained, self.folder)


@lru_cache(maxsize=2)
def shared_embedder(folder: Path, dtype: Dtype, device: Device) -> Embedder:
    """The embedder that all filters of this process with the same model use."""
    return Embedder(folder, dtype, device)


def _unit(features: torch.Tensor) -> np.ndarray:
    return F.normalize(features.float(), dim=-1).cpu().numpy()


class Clip(Filter):
    """`<name>_embedding`: a picture's embedding of length one, in half precision; `<name>_similarity`: its cosine with
    the embedding of the caption, null without one; and a column for each head over the embedding. One forward pass
    serves all.

    Args:
        model: folder of a model of transformers (CLIP, SigLIP ...), or its name on the Hugging Face hub; safetensors. A
            model of pictures alone (DINOv2 ...) gives its pooled output, and no similarity. Copy-detection models that
            are distributed as TorchScript (SSCD) are pickled code, which is not read: they have to be converted to a
            class of transformers first.
        name: of the score file, and prefix of the columns.
        embedding: whether to write the embedding.
        similarity: whether to write the similarity.
        heads: by column. LAION's own predictions that came with the data keep their names (`aesthetic_score`,
            `punsafe`, `pwatermark`), so take others: `clip_aesthetic`, `clip_nsfw`, `clip_watermark`.
        dtype: that the model computes in.
        device: that it runs on, "auto": a GPU if there is one. Scores of a GPU differ by rounding, which does not make
            them due again.

    Raises:
        ValueError: no such model, or a head of other embeddings.
    """

    media: ClassVar = "image"
    batched: ClassVar = True
    needs = ("caption",)

    def __init__(
        self,
        model: str,
        name: str = "clip",
        embedding: bool = True,
        similarity: bool = True,
        heads: dict[str, Head] | None = None,
        dtype: Dtype = "float32",
        device: Device = "auto",
    ) -> None:
        from transformers import AutoConfig

        self.name, self.embedding, self.similarity, self.heads = name, embedding, similarity, heads or {}
        self.folder, self.dtype, self.device = model_folder(model), dtype, device
        width = embedding_width(load_part(AutoConfig.from_pretrained, self.folder), model)
        fields: dict[str, pa.DataType] = {}
        if embedding:
            fields[f"{name}_embedding"] = pa.list_(pa.float16(), width)
        if similarity:
            fields[f"{name}_similarity"] = pa.float32()
        for column, head in self.heads.items():
            if head.width != width:
                raise ValueError(f"{column}: the head takes embeddings of {head.width} numbers, {model} gives {width}")
            fields[column] = pa.float32()
        if not fields:
            raise ValueError(f"{name}: there is nothing to write without embedding, similarity and heads")
        self.columns = pa.schema(fields)

    def settings(self) -> dict[str, Any]:
        heads = {column: head.settings() for column, head in self.heads.items()}
        return {
            "model": self._fingerprint,
            "dtype": self.dtype,
            "embedding": self.embedding,
            "similarity": self.similarity,
            "heads": heads,
        }

    def score(self, samples: Sequence[Media]) -> Sequence[Mapping[str, Any] | Failure]:
        embedder = shared_embedder(self.folder, self.dtype, self.device)
        vectors = embedder.images([sample.image for sample in samples])
        values: list[Sequence[Any]] = []
        if self.embedding:
            values.append(list(vectors.astype(np.float16)))
        if self.similarity:
            values.append(_similarities(embedder, vectors, [sample.caption for sample in samples]))
        values += [head(vectors).tolist() for head in self.heads.values()]
        finite = np.isfinite(vectors).all(axis=1)
        return [
            dict(zip(self.columns.names, row, strict=True)) if good else Failure("the embedding is not finite")
            for row, good in zip(zip(*values, strict=True), finite, strict=True)
        ]

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self.folder)


def _similarities(embedder: Embedder, vectors: np.ndarray, captions: Sequence[str]) -> list[float | None]:
    """The cosine of each picture and its caption, None without one."""
    found: list[float | None] = [None] * len(captions)
    with_caption = [i for i, caption in enumerate(captions) if caption.strip()]
    if with_caption:
        texts = embedder.texts([captions[i] for i in with_caption])
        for i, cosine in zip(with_caption, (vectors[with_caption] * texts).sum(axis=1).tolist(), strict=True):
            found[i] = cosine
    return found
