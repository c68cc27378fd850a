"""Latent diffusion's own transformer over tokens (arXiv 2112.10752, appendix E.2.1), and what is encoded with it.

    tokens -> embedding + learned position -> layers x [ x + attention(norm(x)),  x + mlp(norm(x)) ] -> norm

Every token attends to every other, padding included. It is trained with the denoiser. For text it has 32 layers of
width 1,280, over the tokens of BERT; for layouts 16 layers of width 512. Text's weights are those of diffusers'
`LDMBertModel`.
"""

from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.conditioner import LearnedEncoder
from models.given import Outputs
from models.pipeline_folder import TRANSFORMERS_STEM
from models.tensor_files import SafetensorsFiles, open_stem

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,-"


class TokenTransformer(nn.Module):
    """Tokens (n, length) to features (n, length, width).

    Args:
        vocabulary: tokens that there are.
        length: of a sequence.
        width: of a token's features.
        layers, heads, head_dim: of attention, which is heads * head_dim wide.
    """

    def __init__(self, vocabulary: int, length: int, width: int, layers: int, heads: int = 8, head_dim: int = 64):
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, width)
        self.embed_positions = nn.Embedding(length, width)
        self.layers = nn.ModuleList([TransformerLayer(width, heads, head_dim) for _ in range(layers)])
        self.layer_norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens) + self.embed_positions(torch.arange(tokens.shape[1], device=tokens.device))
        for layer in self.layers:
            x = layer(x)
        return self.layer_norm(x)


class TransformerLayer(nn.Module):
    """Attention and a perceptron, each behind a norm and around a residual."""

    def __init__(self, width: int, heads: int, head_dim: int):
        super().__init__()
        self.self_attn = SelfAttention(width, heads, head_dim)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.self_attn_layer_norm(x))
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))


class SelfAttention(nn.Module):
    """Heads of `head_dim` features, together as wide as they are."""

    def __init__(self, width: int, heads: int, head_dim: int):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(width, heads * head_dim, bias=False)
        self.v_proj = nn.Linear(width, heads * head_dim, bias=False)
        self.out_proj = nn.Linear(heads * head_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class TransformerEncoder(LearnedEncoder):
    """A `TokenTransformer` as an encoder that is trained with the denoiser.

    Args:
        vocabulary, length, width, layers, heads, head_dim: of the transformer.
        folder: of diffusers' `LDMBertModel`, whose weights it starts from; None draws them at random.
    """

    block_lists = ("model.layers",)
    pooled_width = 0

    def __init__(
        self, vocabulary: int, length: int, width: int, layers: int, heads: int, head_dim: int, folder: str | None
    ) -> None:
        super().__init__()
        self.model = TokenTransformer(vocabulary, length, width, layers, heads, head_dim)
        self.length, self.width, self.folder = length, width, folder

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.model.layer_norm.weight.device

    def encode(self, tokens: Tensor) -> Outputs:
        """Of tokens (n, length)."""
        states = self.model(tokens).float()
        return states, states.new_zeros(len(states), 0)

    def ldm_bert_config(self) -> dict[str, Any]:
        """Of an `LDMBertModel` with these weights."""
        attention: Any = self.model.layers[0].self_attn
        inner, width = attention.q_proj.weight.shape
        return {
            "architectures": ["LDMBertModel"],
            "model_type": "ldmbert",
            "vocab_size": self.model.embed_tokens.num_embeddings,
            "max_position_embeddings": self.length,
            "encoder_layers": len(self.model.layers),
            "encoder_ffn_dim": 4 * width,
            "encoder_attention_heads": attention.heads,
            "head_dim": inner // attention.heads,
            "d_model": width,
            "activation_function": "gelu",
            "pad_token_id": 0,
        }

    @abstractmethod
    def blank_tokens(self, n: int) -> Tensor:
        """Tokens (n, length) of n samples that stand for none, made without reading anything."""

    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Fill one parameter, from the folder if there is one.

        Raises:
            ValueError: the folder holds another transformer.
        """
        kind = name.rsplit(".", 2)[-2]
        with torch.no_grad():
            if self.folder is not None:
                tensor.copy_(self._weights.read(name, tensor.shape))
            elif "norm" in kind:
                tensor.fill_(1.0 if name.endswith("weight") else 0.0)
            elif name.endswith("bias"):
                tensor.zero_()
            elif kind.startswith("embed"):
                tensor.normal_(std=0.02, generator=generator)
            else:  # torch's own for linear layers, with which the paper's started
                bound = tensor.shape[1] ** -0.5
                tensor.uniform_(-bound, bound, generator=generator)

    def check_folder(self) -> None:
        """See `LearnedEncoder.check_folder`."""
        for name, parameter in self.named_parameters() if self.folder is not None else ():
            self._weights.check(name, parameter.shape)

    @cached_property
    def _weights(self) -> "_BertFolder":
        assert self.folder is not None
        return _BertFolder(self.folder)


class BertTextEncoder(TransformerEncoder):
    """Captions by a transformer of their own, trained with the denoiser; nothing is the empty caption.

    Args:
        tokenizer: folder or name on the Hugging Face hub, with BERT's vocabulary; None takes single letters, for runs
            that only exercise the machinery.
        tokenizer_subfolder: as in pipeline folders ("tokenizer").
        length: tokens of a caption; longer captions are cut.
        vocabulary: tokens that there are; BERT's 30,522.
        width, layers, heads, head_dim: of the transformer.
        folder: see `TransformerEncoder`; of pipelines, the part "bert".
    """

    nothing = ""

    def __init__(
        self,
        tokenizer: str | None,
        tokenizer_subfolder: str = "",
        length: int = 77,
        vocabulary: int = 30522,
        width: int = 1280,
        layers: int = 32,
        heads: int = 8,
        head_dim: int = 64,
        folder: str | None = None,
    ) -> None:
        super().__init__(vocabulary, length, width, layers, heads, head_dim, folder)
        self._tokenizer, self._subfolder = tokenizer, tokenizer_subfolder

    def forward(self, inputs: Sequence[str]) -> Outputs:
        options: dict[str, Any] = {"padding": "max_length", "max_length": self.length, "truncation": True}
        return self.encode(self.tokenizer(list(inputs), return_tensors="pt", **options).input_ids.to(self.device))

    @cached_property
    def tokenizer(self) -> Any:
        """Read when it is first used: a plan of a run needs none.

        Raises:
            ValueError: there is no such tokenizer, or it has more tokens than the vocabulary.
        """
        from transformers import BertTokenizer

        from models.hub import load_part

        if self._tokenizer is None:
            pieces = [f"{joint}{letter}" for joint in ("", "##") for letter in _LETTERS]
            return BertTokenizer({piece: i for i, piece in enumerate([*_SPECIAL, *pieces])})
        loaded = load_part(BertTokenizer.from_pretrained, self._tokenizer, self._subfolder)
        if len(loaded) > (own := self.model.embed_tokens.num_embeddings):
            raise ValueError(f"the tokenizer {self._tokenizer!r} has {len(loaded)} tokens; vocabulary={own} is less")
        return loaded

    def blank_tokens(self, n: int) -> Tensor:
        """See `TransformerEncoder`."""
        return torch.zeros(n, self.length, dtype=torch.int64, device=self.device)


class _BertFolder:
    """The weights of an `LDMBertModel`, read one at a time."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.files: SafetensorsFiles = open_stem(Path(folder), TRANSFORMERS_STEM)
        self.names = set(self.files.names())

    def check(self, name: str, shape: torch.Size) -> None:
        """Whether there is a tensor of that name and shape."""
        if name not in self.names:
            raise ValueError(f"{self.folder!r} is no LDMBertModel: it lacks {name}")
        if (own := self.files.meta(name).shape) != tuple(shape):
            raise ValueError(f"{self.folder!r}: {name} is {own}, not {tuple(shape)}")

    def read(self, name: str, shape: torch.Size) -> Tensor:
        """The tensor of that name, which must have that shape."""
        self.check(name, shape)
        return self.files.read(name)
