"""Frozen first stages: what lies between images and what the denoiser sees.

A first stage has `channels` and a `downsampling` factor f, and takes images (n, 3, H, W) in [-1, 1] to latents
(n, channels, H/f, W/f) of about unit variance, and back.
"""

import inspect
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from models.autoencoder import AutoencoderKL
from models.fingerprint import fingerprint
from models.initialization import parameter_generator
from models.pretrained import ComponentFolder
from models.vq import VQModel


class FirstStage(nn.Module, ABC):
    """The interface. Its parameters are frozen, and it is always in evaluation mode."""

    channels: int
    downsampling: int

    @abstractmethod
    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Images (n, 3, H, W) in [-1, 1] to float32 latents (n, channels, H/f, W/f).

        Args:
            noise: standard normal, of the latents' shape; None takes the mean of what is random.
        """

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (n, channels, H/f, W/f) to float32 images (n, 3, H, W), unclamped. Gradients reach the latents."""

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """The shape of one latent of an image of H x W."""
        return self.channels, height // self.downsampling, width // self.downsampling

    def unscaled(self, latents: Tensor) -> Tensor:
        """Latents as they are before they are shifted and scaled."""
        return latents


class Identity(FirstStage):
    """Pixels: the denoiser sees the images themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.channels, self.downsampling = 3, 1

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """The images, in float32; the noise is not used."""
        return images.float()

    def decode(self, latents: Tensor) -> Tensor:
        """The latents, in float32."""
        return latents.float()

    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """There are none."""
        raise AssertionError(f"an identity has no parameter {name!r}")

    def init_buffers(self) -> None:
        """There are none."""


class AutoencoderFirstStage(FirstStage):
    """The latents of an autoencoder, shifted and scaled: (z - shift_factor) * scaling_factor.

    Args:
        autoencoder: the autoencoder, filled or not.
        folder: a diffusers component folder, or a pipeline's or a run's folder that holds one, from which
            `init_parameter` reads its weights, so that an engine fills it like any network, and its scaling factor
            where the autoencoder has None. Without a folder, weights are drawn (tests, dry runs).
    """

    unread: ClassVar[tuple[str, ...]] = ("decoder", "post_quant_conv")
    """Parts that `moments` does not depend on."""

    def __init__(self, autoencoder: AutoencoderKL | VQModel, folder: str | None = None) -> None:
        super().__init__()
        self.autoencoder: Any = autoencoder.requires_grad_(False).eval()
        self.folder = folder
        self.channels, self.downsampling = autoencoder.latent_channels, autoencoder.downsampling
        config = autoencoder.config
        self.scaling_factor: float = 1.0 if config["scaling_factor"] is None else config["scaling_factor"]
        self.shift_factor: float = config.get("shift_factor") or 0.0

    def train(self, mode: bool = True) -> "AutoencoderFirstStage":
        """Stay in evaluation mode, whatever the mode."""
        return super().train(False)

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """See `FirstStage.encode`. Runs in the parameters' type; the sampling is in float32."""
        return self.sample(self.moments(images), noise)

    @property
    @abstractmethod
    def moment_channels(self) -> int:
        """Channels of `moments`."""

    @abstractmethod
    def moments(self, images: Tensor) -> Tensor:
        """What of images (n, 3, H, W) in [-1, 1] can be kept, (n, moment_channels, H/f, W/f) in the parameters' type,
        neither shifted nor scaled."""

    @abstractmethod
    def sample(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Moments, in whatever type they were kept, to what `encode` gives of the images; needs no parameters."""

    def fingerprint(self, seed: int, device: torch.device) -> str:
        """Of all that `moments` depends on. The first stage may be on the meta device.

        Args:
            seed, device: by which random weights are drawn.
        """
        return fingerprint(
            (name, self._first_value(name, parameter.shape, seed, device))
            for name, parameter in self.named_parameters()
            if name.removeprefix("autoencoder.").partition(".")[0] not in self.unread
        )

    def _first_value(self, name: str, shape: torch.Size, seed: int, device: torch.device) -> Tensor:
        value = torch.empty(shape, dtype=torch.float32, device=device)
        self.init_parameter(name, value, parameter_generator(seed, "first_stage", name, device))
        return value

    def decode(self, latents: Tensor) -> Tensor:
        """See `FirstStage.decode`. Runs in the parameters' type."""
        return self.autoencoder.decode(self.unscaled(latents.float()).to(self._dtype)).float()

    def unscaled(self, latents: Tensor) -> Tensor:
        """See `FirstStage.unscaled`."""
        return latents / self.scaling_factor + self.shift_factor

    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Fill one parameter, from the folder if there is one.

        Raises:
            ValueError: the folder holds another autoencoder.
        """
        inner = name.removeprefix("autoencoder.")
        if self.folder is None:
            self.autoencoder.init_parameter(inner, tensor, generator)
        else:
            with torch.no_grad():
                tensor.copy_(self.autoencoder.from_diffusers(inner, self._weights.read))

    def init_buffers(self) -> None:
        """There are none."""

    def _scale(self, latents: Tensor) -> Tensor:
        return (latents - self.shift_factor) * self.scaling_factor

    @property
    def _dtype(self) -> torch.dtype:
        return self.autoencoder.encoder.conv_in.weight.dtype

    @cached_property
    def _weights(self) -> ComponentFolder:
        assert self.folder is not None
        folder = Path(self.folder)
        if (folder / self.autoencoder.component / "config.json").is_file():
            folder /= self.autoencoder.component
        elif (folder / "checkpoints").is_dir():
            raise ValueError(
                f"first_stage.folder={folder} is a run that has not ended, or trains another network: one that has"
                f" trained such an autoencoder to its last step holds {self.autoencoder.component}/"
            )
        weights = ComponentFolder(folder)
        weights.check(self.autoencoder)
        ours = self.autoencoder.config
        kind = inspect.signature(type(self.autoencoder)).parameters
        theirs = {
            key: weights.config.get(key, kind[key].default) for key in ("scaling_factor", "shift_factor") if key in ours
        }
        if ours["scaling_factor"] is None:
            self.scaling_factor, self.shift_factor = theirs["scaling_factor"], theirs.get("shift_factor") or 0.0
            ours |= theirs
        else:
            for key, value in theirs.items():
                if key in weights.config and ours[key] != value:
                    raise ValueError(
                        f"first_stage.autoencoder.{key} is {ours[key]}, but {weights.path} was trained with {value}"
                    )
        # What else the folder says of its weights goes out with them.
        self.autoencoder.config = {**weights.config, **ours}
        return weights


class KLFirstStage(AutoencoderFirstStage):
    """The latents of an AutoencoderKL, sampled from their posterior. See `AutoencoderFirstStage`."""

    def __init__(self, autoencoder: AutoencoderKL, folder: str | None = None) -> None:
        super().__init__(autoencoder, folder)

    @property
    def moment_channels(self) -> int:
        """Mean and log variance."""
        return 2 * self.channels

    def moments(self, images: Tensor) -> Tensor:
        """Mean and log variance of the latents, one after the other, (n, 2 channels, H/f, W/f)."""
        return torch.cat(self.autoencoder.encode(images.to(self._dtype)), dim=1)

    def sample(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """See `AutoencoderFirstStage.sample`."""
        mean, log_variance = moments.float().chunk(2, dim=1)
        return self._scale(mean if noise is None else mean + torch.exp(0.5 * log_variance) * noise)


class VQFirstStage(AutoencoderFirstStage):
    """The latents of a VQModel before they are quantised: `decode` quantises. See `AutoencoderFirstStage`."""

    unread = ("decoder", "post_quant_conv", "quantize")

    def __init__(self, autoencoder: VQModel, folder: str | None = None) -> None:
        super().__init__(autoencoder, folder)

    @property
    def moment_channels(self) -> int:
        """The latents themselves."""
        return self.channels

    def moments(self, images: Tensor) -> Tensor:
        """The latents (n, channels, H/f, W/f)."""
        return self.autoencoder.encode(images.to(self._dtype))

    def sample(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """See `AutoencoderFirstStage.sample`; nothing of it is random."""
        return self._scale(moments.float())


class CodesFirstStage(VQFirstStage):
    """The codes of a VQModel, int64 (n, H/f, W/f): what autoregressive networks predict, in the place of latents.

    Args:
        autoencoder, folder: see `AutoencoderFirstStage`.
    """

    @property
    def codes(self) -> int:
        """How many there are."""
        return self.autoencoder.config["num_vq_embeddings"]

    def sample(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """See `AutoencoderFirstStage.sample`; nothing of it is random."""
        codes, _ = self.autoencoder.quantize.embedding(moments.float().movedim(1, -1))
        return codes

    def decode(self, latents: Tensor) -> Tensor:
        """Codes to images; see `FirstStage.decode`."""
        return self.autoencoder.decode_codes(latents).float()
