"""The gradient of a loss at one layer's weight, without asking autograd for it.

Adaptive weights of adversarial losses (VQGAN, arXiv 2012.09841, eq. 7; latent diffusion, arXiv 2112.10752) compare the
norms of two losses' gradients at the decoder's last layer. Autograd cannot give the gradient of a parameter that is
sharded: the tensor in the graph is not the parameter that the network shows. But the layer's input and the gradient
at its output determine it, and both are ordinary activations.
"""

from collections.abc import Sequence
from types import TracebackType
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight


class LastLayer:
    """Records a layer's input and output during a forward pass.

        with LastLayer(decoder.conv_out) as last:
            reconstruction = networks["decoder"](z)
        nll_norm, g_norm = last.gradient_norms([nll, g_loss])

    Args:
        layer: an `nn.Linear`, or an `nn.Conv2d` with zero padding given as numbers. It must run once inside the block.
    """

    def __init__(self, layer: nn.Module):
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            raise ValueError(
                f"the gradient at a {type(layer).__name__} is not implemented: give an nn.Linear or nn.Conv2d"
            )
        if isinstance(layer, nn.Conv2d) and (layer.padding_mode != "zeros" or isinstance(layer.padding, str)):
            raise ValueError(f"{layer}: only zero padding given as numbers")
        self.layer = layer
        self._calls: list[tuple[Tensor, Tensor]] = []

    def __enter__(self) -> "LastLayer":
        self._calls.clear()
        self._hook = self.layer.register_forward_hook(self._record)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._hook.remove()

    def _record(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._calls.append((inputs[0].detach(), output))

    def weight_gradient(self, loss: Tensor) -> Tensor:
        """Gradient of the scalar loss at the layer's weight, float32, of the weight's (whole) shape. The graph is kept.

        Raises:
            ValueError: the layer did not run exactly once inside the block.
        """
        if len(self._calls) != 1:
            raise ValueError(f"the last layer ran {len(self._calls)} times inside the block, not once")
        inputs, output = self._calls[0]
        (at_output,) = torch.autograd.grad(loss, output, retain_graph=True)
        return _weight_gradient(self.layer, inputs.float(), at_output.float())

    def gradient_norms(self, losses: Sequence[Tensor], scope: Literal["slice", "global"] = "slice") -> Tensor:
        """2-norms of each loss's gradient at the weight.

        Args:
            losses: scalars. With slice scope, means over the slice that this pass serves; with global scope, this
                rank's share of the mean over the global batch, whose gradients are summed over all ranks first.

        Returns:
            (len(losses),) float32, without gradient.
        """
        gradients = torch.stack([self.weight_gradient(loss) for loss in losses])
        if scope == "global":
            dist.all_reduce(gradients)
        return gradients.flatten(1).norm(dim=1)


@torch.no_grad()
def _weight_gradient(layer: nn.Module, inputs: Tensor, at_output: Tensor) -> Tensor:
    if isinstance(layer, nn.Linear):
        return at_output.reshape(-1, layer.out_features).T @ inputs.reshape(-1, layer.in_features)
    assert isinstance(layer, nn.Conv2d) and not isinstance(layer.padding, str)
    # The sharded weight may be empty or partial here; only its shape counts.
    shape = (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)
    return conv2d_weight(inputs, shape, at_output, layer.stride, layer.padding, layer.dilation, layer.groups)
