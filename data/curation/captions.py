"""Captions of pictures, written by a model."""

from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from data.curation.base import Failure, Filter, Media
from data.curation.pretrained import Device, Dtype, fingerprint, load_model, model_folder
from models.hub import load_part


class Writer:
    """An image-to-text model of transformers: BLIP and its like, whose text may go on from given words; chat models,
    which answer a request; and pairs of a picture encoder and a text decoder.

    Args:
        folder: of the model.
        dtype: that it computes in.
        device: that it runs on.
    """

    def __init__(self, folder: Path, dtype: Dtype, device: Device) -> None:
        from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

        self.model = load_model(AutoModelForImageTextToText, folder, dtype, device)
        self._processor = load_part(AutoProcessor.from_pretrained, folder)
        self._tokenizer = getattr(self._processor, "tokenizer", self._processor)
        self._chats = getattr(self._processor, "chat_template", None) is not None
        if not hasattr(self._processor, "image_processor"):  # it is a tokenizer alone
            self._processor = load_part(AutoImageProcessor.from_pretrained, folder, backend="pil")
        # Answers begin where the requests, of unequal numbers of image tokens, end.
        self._tokenizer.padding_side = "left"

    @torch.no_grad()
    def write(self, images: Sequence[np.ndarray], prompt: str, tokens: int) -> list[str]:
        """The most probable text, word by word, for each of n pictures (H, W, 3), uint8 RGB.

        Args:
            images: the pictures.
            prompt: the request to a chat model; for others the beginning of every text, which is kept.
            tokens: of the longest text.

        Raises:
            ValueError: the model has no positions for that many.
        """
        shown = [Image.fromarray(image) for image in images]
        if self._chats:
            inputs = self._request(shown, prompt)
        else:
            beginning = {"text": [prompt] * len(shown)} if prompt else {}
            inputs = self._processor(images=shown, return_tensors="pt", **beginning)
        inputs = inputs.to(self.model.device, self.model.dtype)
        self._check_length(inputs, tokens)
        before = inputs["input_ids"].shape[1] if self._chats and not self.model.config.is_encoder_decoder else 0
        written = self.model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=tokens)
        texts = self._tokenizer.batch_decode(written[:, before:], skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]

    def _check_length(self, inputs: Mapping[str, Any], tokens: int) -> None:
        text = self.model.config.get_text_config(decoder=True)
        given = inputs["input_ids"].shape[1] if "input_ids" in inputs and not text.is_encoder_decoder else 1
        positions = getattr(text, "max_position_embeddings", None)
        if positions is not None and given + tokens - 1 > positions:  # the last token is written, not read
            raise ValueError(
                f"tokens={tokens}, after {given} that the model is given, do not fit the {positions} positions of "
                f"{self.model.name_or_path}: at most {positions - given + 1}"
            )

    def _request(self, images: Sequence[Image.Image], prompt: str) -> Any:
        words = [{"type": "text", "text": prompt}] if prompt else []
        chat = [{"role": "user", "content": [{"type": "image"}, *words]}]
        text = self._processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        # A template may write the token that begins every sequence, which the tokenizer would add again.
        begun = self._tokenizer.bos_token is not None and text.startswith(self._tokenizer.bos_token)
        return self._processor(
            images=[[image] for image in images],
            text=[text] * len(images),
            padding=True,
            add_special_tokens=not begun,
            return_tensors="pt",
        )


@lru_cache(maxsize=1)
def _shared_writer(folder: Path, dtype: Dtype, device: Device) -> Writer:
    """The model that all filters of this process use."""
    return Writer(folder, dtype, device)


class Captioner(Filter):
    """`<column>`: a caption for each picture, by a model (SD3, arXiv 2403.03206, section 5.2: CogVLM). Training mixes
    columns of captions by weights: `data.sources.photos.caption={caption: 0.5, synthetic_caption: 0.5}`.

    Args:
        model: folder of an image-to-text model of transformers, or its name on the Hugging Face hub; safetensors.
        column: of the captions, also the name of the score file.
        prompt: the request to a chat model; for others the beginning of every caption.
        tokens: of the longest caption.
        batch: pictures at a time.
        dtype: that the model computes in.
        device: that it runs on, "auto": a GPU if there is one.

    Raises:
        ValueError: no such model.
    """

    media: ClassVar = "image"
    batched: ClassVar = True
    frames: ClassVar = ("middle",)

    def __init__(
        self,
        model: str,
        column: str = "synthetic_caption",
        prompt: str = "",
        tokens: int = 77,
        batch: int = 16,
        dtype: Dtype = "bfloat16",
        device: Device = "auto",
    ) -> None:
        if tokens < 1 or batch < 1:
            raise ValueError(f"{column}: tokens={tokens} and batch={batch} must be positive")
        self.name, self.columns = column, pa.schema({column: pa.string()})
        self.folder, self.prompt, self.tokens, self.batch = model_folder(model), prompt, tokens, batch
        self.dtype, self.device = dtype, device

    def settings(self) -> dict[str, Any]:
        return {
            "model": self._fingerprint,
            "prompt": self.prompt,
            "tokens": self.tokens,
            "batch": self.batch,
            "dtype": self.dtype,
        }

    def score(self, samples: Sequence[Media]) -> Sequence[Mapping[str, Any] | Failure]:
        writer = _shared_writer(self.folder, self.dtype, self.device)
        texts: list[str] = []
        for start in range(0, len(samples), self.batch):
            images = [sample.image for sample in samples[start : start + self.batch]]
            texts += writer.write(images, self.prompt, self.tokens)
        return [{self.name: text} if text else Failure("the model wrote nothing") for text in texts]

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self.folder)
