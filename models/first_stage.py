"""Frozen first stages: what lies between images and what the denoiser sees.

A first stage has `channels` and a `downsampling` factor f, and takes images (n, 3, H, W) in [-1, 1] to latents
(n, channels, H/f, W/f) of about unit variance, and back.
"""

from abc import ABC, abstractmethod
from functools import cached_property

import torch
from torch import Tensor, nn

from models.autoencoder import AutoencoderKL
from models.fingerprint import fingerprint
from models.initialization import parameter_generator
from models.pretrained import ComponentFolder


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


class KLFirstStage(FirstStage):
    """The latents of an AutoencoderKL, shifted and scaled: (z - shift_factor) * scaling_factor.

    Args:
        autoencoder: the autoencoder, filled or not.
        folder: a diffusers component folder that `init_parameter` reads its weights from, so that an engine fills it
            like any network. None draws random ones (tests, dry runs).
    """

    def __init__(self, autoencoder: AutoencoderKL, folder: str | None = None) -> None:
        super().__init__()
        self.autoencoder = autoencoder.requires_grad_(False).eval()
        self.folder = folder
        self.channels, self.downsampling = autoencoder.latent_channels, autoencoder.downsampling

    def train(self, mode: bool = True) -> "KLFirstStage":
        """Stay in evaluation mode, whatever the mode."""
        return super().train(False)

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """See `FirstStage.encode`. Runs in the parameters' type; the sampling is in float32."""
        return self.sample(self.moments(images), noise)

    def moments(self, images: Tensor) -> Tensor:
        """What of images (n, 3, H, W) in [-1, 1] can be kept: mean and log variance of their latents, one after the
        other, (n, 2 channels, H/f, W/f) in the parameters' type, neither shifted nor scaled."""
        return torch.cat(self.autoencoder.encode(images.to(self._dtype)), dim=1)

    def sample(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Moments, in whatever type they were kept, to what `encode` gives of the images; needs no parameters."""
        mean, log_variance = moments.float().chunk(2, dim=1)
        latents = mean if noise is None else mean + torch.exp(0.5 * log_variance) * noise
        return (latents - self.autoencoder.shift_factor) * self.autoencoder.scaling_factor

    def fingerprint(self, seed: int, device: torch.device) -> str:
        """Of all that `moments` depends on. The first stage may be on the meta device.

        Args:
            seed, device: by which random weights are drawn.
        """
        unread = ("decoder", "post_quant_conv")
        return fingerprint(
            (name, self._first_value(name, parameter.shape, seed, device))
            for name, parameter in self.named_parameters()
            if name.removeprefix("autoencoder.").partition(".")[0] not in unread
        )

    def _first_value(self, name: str, shape: torch.Size, seed: int, device: torch.device) -> Tensor:
        value = torch.empty(shape, dtype=torch.float32, device=device)
        self.init_parameter(name, value, parameter_generator(seed, "first_stage", name, device))
        return value

    def decode(self, latents: Tensor) -> Tensor:
        """See `FirstStage.decode`. Runs in the parameters' type."""
        latents = latents.float() / self.autoencoder.scaling_factor + self.autoencoder.shift_factor
        return self.autoencoder.decode(latents.to(self._dtype)).float()

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

    @property
    def _dtype(self) -> torch.dtype:
        return self.autoencoder.encoder.conv_in.weight.dtype

    @cached_property
    def _weights(self) -> ComponentFolder:
        assert self.folder is not None
        weights = ComponentFolder(self.folder)
        weights.check(self.autoencoder)
        for key in ("scaling_factor", "shift_factor"):
            ours, theirs = self.autoencoder.config[key], weights.config.get(key, self.autoencoder.config[key])
            if ours != theirs:
                raise ValueError(
                    f"first_stage.autoencoder.{key} is {ours}, but {self.folder} was trained with {theirs}"
                )
        return weights
