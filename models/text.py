"""The text side: frozen encoders from transformers, and the layout in which a denoiser reads their outputs.

Stable Diffusion 3 (arXiv 2403.03206, appendix B.3) reads two CLIP text encoders and T5. With n captions:

    CLIP-L  (n, 77, 768)  |  CLIP-bigG (n, 77, 1280)  |  zeros to 4096     sequence: side by side, zero-padded,
    T5      (n, 77, 4096)                                                  then one after the other: (n, 154, 4096)
    pooled CLIP-L (n, 768), pooled CLIP-bigG (n, 1280)                     pooled: (n, 2048)

Any subset, order and width of encoders is laid out by the same rule.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.fingerprint import fingerprint

Dtype = Literal["float32", "bfloat16", "float16"]
Encoded = tuple[Tensor, Tensor]  # a sequence and a pooled vector, of one caption or of several


class TextEncoder(nn.Module, ABC):
    """One frozen encoder of captions.

    Attributes:
        length: tokens of its sequence.
        width: features of a token.
        pooled_width: features of the vector for the whole caption; 0 where the encoder gives none.
        shares_positions: whether encoders of the kind, next to each other, lay their features side by side.
        tokenizer: of captions, where there is one.
    """

    length: int
    width: int
    pooled_width: int
    shares_positions: bool = False
    tokenizer: Any = None

    @abstractmethod
    def forward(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(n, length, width) and (n, pooled_width), float32, of n captions; longer captions are cut."""

    def settings(self) -> dict[str, Any]:
        """JSON values: what else changes the outputs, beside weights and tokenizer."""
        return {"kind": type(self).__name__, "length": self.length, "pooled_width": self.pooled_width}

    def fingerprint(self) -> str:
        """Of all that the outputs depend on."""
        vocabulary = sorted(self.tokenizer.get_vocab().items()) if self.tokenizer is not None else []
        return fingerprint(self.state_dict().items(), {"vocabulary": vocabulary, **self.settings()})


class ClipEncoder(TextEncoder):
    """A CLIP text encoder: the hidden states before the last layer, and the projected pooled output.

    Args:
        model: folder, or name on the Hugging Face hub, with the safetensors weights of CLIP's text model.
        subfolder: of the weights, as in pipeline folders ("text_encoder").
        tokenizer: folder or name of the tokenizer; the model's own by default.
        tokenizer_subfolder: of the tokenizer ("tokenizer").
        length: tokens; 77 for every published CLIP.
        dtype: that the encoder computes in.

    Raises:
        ValueError: there are no such weights or tokenizer.
    """

    shares_positions = True

    def __init__(
        self,
        model: str,
        subfolder: str = "",
        tokenizer: str | None = None,
        tokenizer_subfolder: str = "",
        length: int = 77,
        dtype: Dtype = "float32",
    ):
        from transformers import AutoTokenizer, CLIPTextModelWithProjection

        super().__init__()
        self.tokenizer = _load(AutoTokenizer.from_pretrained, tokenizer or model, tokenizer_subfolder)
        self.model = _load_weights(CLIPTextModelWithProjection, model, subfolder, dtype)
        self.length = length
        self.width = self.model.config.hidden_size
        self.pooled_width = self.model.config.projection_dim

    def forward(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        # Padding is attended to, and told apart by CLIP's causal mask alone, as in Stable Diffusion.
        tokens = _tokenize(self.tokenizer, captions, self.length)
        output = self.model(tokens.input_ids.to(self.model.device), output_hidden_states=True)
        return output.hidden_states[-2].float(), output.text_embeds.float()


class T5Encoder(TextEncoder):
    """A T5 encoder: its last hidden states.

    Args:
        model, subfolder, tokenizer, tokenizer_subfolder, dtype: as in `ClipEncoder`.
        length: tokens; SD3 trains with 77, and samples with up to 256.
        masked: whether padding is hidden from attention and zero in the output. SD3 does neither.
        pooled: whether the mean over the caption's tokens serves as a pooled vector, for models without CLIP.

    Raises:
        ValueError: there are no such weights or tokenizer.
    """

    def __init__(
        self,
        model: str,
        subfolder: str = "",
        tokenizer: str | None = None,
        tokenizer_subfolder: str = "",
        length: int = 77,
        masked: bool = False,
        pooled: bool = False,
        dtype: Dtype = "float32",
    ):
        from transformers import AutoTokenizer, T5EncoderModel

        super().__init__()
        self.tokenizer = _load(AutoTokenizer.from_pretrained, tokenizer or model, tokenizer_subfolder)
        self.model = _load_weights(T5EncoderModel, model, subfolder, dtype)
        self.length = length
        self.masked = masked
        self.width = self.model.config.d_model
        self.pooled_width = self.width if pooled else 0

    def forward(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        tokens = _tokenize(self.tokenizer, captions, self.length)
        ids, mask = tokens.input_ids.to(self.model.device), tokens.attention_mask.to(self.model.device)
        states = self.model(ids, attention_mask=mask if self.masked else None).last_hidden_state.float()
        of_caption = states * mask[..., None]
        # The end-of-sequence token is there even in "", so no count is zero.
        mean = of_caption.sum(1) / mask.sum(1, keepdim=True)
        return of_caption if self.masked else states, mean[:, : self.pooled_width]

    def settings(self) -> dict[str, Any]:
        """See `TextEncoder.settings`."""
        return super().settings() | {"masked": self.masked}


class AbsentEncoder(TextEncoder):
    """The place of an encoder that is not loaded: zeros, as if it were always dropped.

    Args:
        length, width, pooled_width: as the encoder's would be.
    """

    sequence: Tensor
    pooled: Tensor

    def __init__(self, length: int, width: int, pooled_width: int = 0):
        super().__init__()
        self.length, self.width, self.pooled_width = length, width, pooled_width
        self.register_buffer("sequence", torch.zeros(1, length, width), persistent=False)
        self.register_buffer("pooled", torch.zeros(1, pooled_width), persistent=False)

    def forward(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        n = len(captions)
        return self.sequence.expand(n, -1, -1), self.pooled.expand(n, -1)


class StoredEncoder(TextEncoder):
    """The place of an encoder whose outputs are read from where they are kept: of itself it knows those of "" alone.

    Args:
        encoder: whose place it takes.
        sequence, pooled: its outputs of "", (length, width) and (pooled_width,).
    """

    sequence: Tensor
    pooled: Tensor

    def __init__(self, encoder: TextEncoder, sequence: Tensor, pooled: Tensor):
        super().__init__()
        self.length, self.width, self.pooled_width = encoder.length, encoder.width, encoder.pooled_width
        self.shares_positions = encoder.shares_positions
        self.register_buffer("sequence", sequence.float()[None], persistent=False)
        self.register_buffer("pooled", pooled.float()[None], persistent=False)

    def forward(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Of empty captions alone."""
        assert not any(captions), "an encoder that is not loaded cannot encode"
        n = len(captions)
        return self.sequence.expand(n, -1, -1), self.pooled.expand(n, -1)


class TextConditioner(nn.Module):
    """Captions to a denoiser's conditions: "context" (n, context_length, context_dim) and "pooled" (n, pooled_dim).

    CLIP encoders next to each other share token positions, their features side by side; every other encoder has
    positions of its own. All is zero-padded to `context_dim` features.

    An encoder may be dropped from a sample, in sequence and pooled vector. SD3 is trained with zeros in the place of a
    dropped encoder, which is what `dropped="zeros"` does, while its published pipelines sample with the encoding of ""
    as the unconditional one: `dropped="empty"`.

    Args:
        encoders: the text encoders. In order; dropout addresses them by number.
        context_dim: features of the sequence; the widest part's by default. SD3: 4096.
        dropped: what stands in the place of a dropped encoder.

    Attributes:
        encoders: their number.
    """

    def __init__(
        self,
        encoders: list[TextEncoder],
        context_dim: int | None = None,
        dropped: Literal["zeros", "empty"] = "zeros",
    ):
        super().__init__()
        if not encoders:
            raise ValueError("a text conditioner needs at least one encoder; AbsentEncoder stands for none")
        self.text_encoders = nn.ModuleList(encoders)
        self.encoders = len(encoders)
        self.dropped = dropped
        self._parts = _group(encoders)
        widths = [sum(encoders[i].width for i in part) for part in self._parts]
        self.context_dim = context_dim or max(widths)
        if self.context_dim < max(widths):
            raise ValueError(f"context_dim is {context_dim}, but the encoders are up to {max(widths)} features wide")
        self.context_length = sum(encoders[part[0]].length for part in self._parts)
        self.pooled_dim = sum(encoder.pooled_width for encoder in encoders)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Encoders are frozen: they stay in evaluation mode."""
        return super().train(False)

    def encode(self, captions: Sequence[str], keep: Tensor | None = None) -> dict[str, Tensor]:
        """Conditions of n captions, float32.

        Args:
            captions: n captions.
            keep: (n, encoders) bool, False where an encoder is dropped from a sample; all are kept by default. With
                none kept this gives the unconditional conditions.
        """
        return self(captions, keep)

    @property
    def stored(self) -> list[int]:
        """Numbers of the encoders whose outputs are worth keeping."""
        return [i for i, encoder in enumerate(self.text_encoders) if not isinstance(encoder, AbsentEncoder)]

    def without_weights(self, nulls: Mapping[int, Encoded]) -> "TextConditioner":
        """The same layout for outputs that are kept: no encoder of the numbers in `nulls` is loaded.

        Args:
            nulls: what each of these encoders gives for "": (length, width) and (pooled_width,).
        """
        encoders = [
            StoredEncoder(encoder, *nulls[i]) if i in nulls else encoder  # type: ignore[arg-type]
            for i, encoder in enumerate(self.text_encoders)
        ]
        return TextConditioner(encoders, self.context_dim, self.dropped)  # type: ignore[arg-type]

    @torch.no_grad()
    def forward(
        self,
        captions: Sequence[str],
        keep: Tensor | None = None,
        encoded: Mapping[int, Encoded] | None = None,
    ) -> dict[str, Tensor]:
        """As `encode`; a call of the module, so that sharded encoders are gathered.

        Args:
            encoded: by number of the encoder, its outputs of the captions where they are kept: (n, length, width) and
                (n, pooled_width). Such an encoder is not run on them.
        """
        encoded = encoded or {}
        if keep is None:
            keep = torch.ones(len(captions), self.encoders, dtype=torch.bool)
        assert keep.shape == (len(captions), self.encoders), f"keep is {tuple(keep.shape)} for {len(captions)} captions"
        outputs = [
            self._drop(encoder, encoded[i], kept) if i in encoded else self._encode_one(encoder, captions, kept)  # type: ignore[arg-type]
            for i, (encoder, kept) in enumerate(zip(self.text_encoders, keep.cpu().unbind(1), strict=True))
        ]
        rows = [torch.cat([outputs[i][0] for i in part], dim=-1) for part in self._parts]
        context = torch.cat([F.pad(row, (0, self.context_dim - row.shape[-1])) for row in rows], dim=1)
        return {"context": context, "pooled": torch.cat([pooled for _, pooled in outputs], dim=-1)}

    def _encode_one(self, encoder: TextEncoder, captions: Sequence[str], kept: Tensor) -> tuple[Tensor, Tensor]:
        if self.dropped == "empty":
            return encoder([c if k else "" for c, k in zip(captions, kept.tolist(), strict=True)])
        # Dropped captions cost nothing; but one is encoded anyway, as a sharded encoder must be called on every rank.
        rows = kept.nonzero().flatten().tolist() or [0]
        outputs = encoder([captions[row] for row in rows])
        index = torch.tensor(rows, device=outputs[0].device)
        mask = kept.to(outputs[0].device)
        sequence, pooled = (
            output.new_zeros(len(captions), *output.shape[1:]).index_copy(0, index, output) for output in outputs
        )
        return sequence * mask[:, None, None], pooled * mask[:, None]

    def _drop(self, encoder: TextEncoder, encoded: Encoded, kept: Tensor) -> Encoded:
        """Outputs that are kept, with what stands for the dropped ones."""
        sequence, pooled = (output.float() for output in encoded)
        mask = kept.to(sequence.device)
        if self.dropped == "zeros":
            return sequence * mask[:, None, None], pooled * mask[:, None]
        null_sequence, null_pooled = encoder([""])
        return (
            torch.where(mask[:, None, None], sequence, null_sequence),
            torch.where(mask[:, None], pooled, null_pooled),
        )


@contextmanager
def without_bars() -> Iterator[None]:
    """transformers shows no progress over tensors within; downloads, which take their time, still show theirs."""
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging

    if not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()  # the hub's as well
    enable_progress_bars()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def _group(encoders: Sequence[TextEncoder]) -> list[list[int]]:
    """Numbers of the encoders that share token positions."""
    parts: list[list[int]] = []
    for i, encoder in enumerate(encoders):
        before = encoders[i - 1] if i else None
        if before is not None and encoder.shares_positions and before.shares_positions:
            if encoder.length != before.length:
                raise ValueError(f"CLIP encoders side by side have lengths {before.length} and {encoder.length}")
            parts[-1].append(i)
        else:
            parts.append([i])
    return parts


def _tokenize(tokenizer: Any, captions: Sequence[str], length: int) -> Any:
    return tokenizer(list(captions), padding="max_length", max_length=length, truncation=True, return_tensors="pt")


def _load_weights(kind: Any, model: str, subfolder: str, dtype: Dtype) -> Any:
    # Safetensors only: weights in pickles could run code.
    return _load(kind.from_pretrained, model, subfolder, dtype=getattr(torch, dtype), use_safetensors=True)


def _load(load: Callable[..., Any], model: str, subfolder: str, **options: Any) -> Any:
    try:
        with without_bars():
            return load(model, subfolder=subfolder, **options)
    except OSError as error:
        where = f"{model}/{subfolder}" if subfolder else model
        raise ValueError(
            f"Could not load the text encoder or tokenizer {where!r}: give a local folder, or a name on the Hugging "
            f"Face hub that is reachable or already downloaded. {error}"
        ) from error
