"""Several pictures or captions of a sample as one condition."""

from typing import Any

import torch
from torch import Tensor

from models.conditioner import Encoder
from models.given import Outputs


class EachEncoder(Encoder):
    """A frozen encoder of one picture or caption, called on each of the k that a field holds: the tokens of the first,
    then those of the second, and so on. With CLIP's encoder of pictures, k tokens, as retrieval-augmented diffusion's
    neighbours have (arXiv 2204.11824, section 3.2). Of what is missing (a picture of zeros, an empty caption), and for
    nothing, tokens are zeros. It gives no pooled vector.

    Args:
        encoder: of one.
        k: how many each sample has.
        field: of the samples, with pictures (n, k, 3, H, W) uint8, or n lists of k captions.
    """

    pooled_width = 0

    def __init__(self, encoder: Encoder, k: int = 4, field: str = "neighbours") -> None:
        super().__init__()
        if encoder.learned:
            raise ValueError(f"{type(encoder).__name__} learns with the denoiser: EachEncoder takes frozen encoders")
        self.encoder, self.k, self.reads = encoder, k, field
        self.length, self.width = k * encoder.length, encoder.width

    def forward(self, inputs: Any) -> Outputs:
        """See `Encoder.forward`.

        Raises:
            ValueError: samples do not have k.
        """
        if any(len(of_sample) != self.k for of_sample in inputs):
            raise ValueError(f"{self.reads!r} holds {len(inputs[0])} a sample, and the model was made for {self.k}")
        if isinstance(inputs, Tensor):
            each: Any = inputs.flatten(0, 1)
            there = each.flatten(1).any(1)
        else:
            each = [one for of_sample in inputs for one in of_sample]
            there = torch.tensor([bool(one) for one in each])
        sequence, _ = self.encoder(each)
        sequence = sequence * there.to(sequence.device)[:, None, None]
        return sequence.reshape(-1, self.length, self.width), sequence.new_zeros(len(inputs), 0)

    def null(self) -> Outputs:
        device = next(self.encoder.parameters()).device
        return torch.zeros(1, self.length, self.width, device=device), torch.zeros(1, 0, device=device)

    def settings(self) -> dict[str, Any]:
        """See `Encoder.settings`."""
        return super().settings() | {"encoder": self.encoder.settings()}
