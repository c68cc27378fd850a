"""Frozen text encoders from transformers, as a conditioner takes them."""

from collections.abc import Sequence
from typing import Any, Literal

from models.conditioner import Encoder
from models.given import Outputs
from models.hub import Dtype, device_of, load_part, load_weights


class TextEncoder(Encoder):
    """One frozen encoder of captions; longer captions are cut.

    Attributes:
        tokenizer: of captions.
    """

    nothing = ""
    tokenizer: Any

    def null(self) -> Outputs:
        return self([""])

    def settings(self) -> dict[str, Any]:
        """See `Encoder.settings`."""
        return super().settings() | {"vocabulary": sorted(self.tokenizer.get_vocab().items())}


class ClipEncoder(TextEncoder):
    """A CLIP text encoder: hidden states of one of its last layers, and the projected pooled output.

    Args:
        model: folder, or name on the Hugging Face hub, with the safetensors weights of CLIP's text model.
        subfolder: of the weights, as in pipeline folders ("text_encoder").
        tokenizer: folder or name of the tokenizer; the model's own by default.
        tokenizer_subfolder: of the tokenizer ("tokenizer").
        length: tokens; 77 for every published CLIP.
        layer: "penultimate": what the last layer is given (SDXL, SD3); "last": what it gives, after the final norm
            (Stable Diffusion 1, and 2, whose folders leave out the layer that is not used).
        pooled: whether it gives a pooled vector; without, the folder needs no projection.
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
        layer: Literal["penultimate", "last"] = "penultimate",
        pooled: bool = True,
        dtype: Dtype = "float32",
    ):
        from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection

        super().__init__()
        self.tokenizer = load_part(AutoTokenizer.from_pretrained, tokenizer or model, tokenizer_subfolder)
        kind = CLIPTextModelWithProjection if pooled else CLIPTextModel
        self.model = load_weights(kind, model, subfolder, dtype)
        self.length, self.layer = length, layer
        self.width = self.model.config.hidden_size
        self.pooled_width = self.model.config.projection_dim if pooled else 0

    def forward(self, inputs: Sequence[str]) -> Outputs:
        # Padding is attended to, and told apart by CLIP's causal mask alone, as in Stable Diffusion.
        tokens = _tokenize(self.tokenizer, inputs, self.length)
        output = self.model(tokens.input_ids.to(device_of(self.model)), output_hidden_states=True)
        states = output.last_hidden_state if self.layer == "last" else output.hidden_states[-2]
        pooled = output.text_embeds if self.pooled_width else states[:, 0, :0]
        return states.float(), pooled.float()

    def settings(self) -> dict[str, Any]:
        """See `Encoder.settings`."""
        return super().settings() | ({"layer": self.layer} if self.layer != "penultimate" else {})


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
        self.tokenizer = load_part(AutoTokenizer.from_pretrained, tokenizer or model, tokenizer_subfolder)
        self.model = load_weights(T5EncoderModel, model, subfolder, dtype)
        self.length = length
        self.masked = masked
        self.width = self.model.config.d_model
        self.pooled_width = self.width if pooled else 0

    def forward(self, inputs: Sequence[str]) -> Outputs:
        tokens = _tokenize(self.tokenizer, inputs, self.length)
        ids, mask = tokens.input_ids.to(device_of(self.model)), tokens.attention_mask.to(device_of(self.model))
        states = self.model(ids, attention_mask=mask if self.masked else None).last_hidden_state.float()
        of_caption = states * mask[..., None]
        # The end-of-sequence token is there even in "", so no count is zero.
        mean = of_caption.sum(1) / mask.sum(1, keepdim=True)
        return of_caption if self.masked else states, mean[:, : self.pooled_width]

    def settings(self) -> dict[str, Any]:
        """See `Encoder.settings`."""
        return super().settings() | {"masked": self.masked}


def _tokenize(tokenizer: Any, captions: Sequence[str], length: int) -> Any:
    return tokenizer(list(captions), padding="max_length", max_length=length, truncation=True, return_tensors="pt")


def published_name(name: str) -> str:
    """The name in published files, which releases of transformers before 5.6 need, of a text encoder's tensor or
    module."""
    bare = name.startswith(("embeddings.", "encoder.layers.", "final_layer_norm."))
    return f"text_model.{name}" if bare else name
