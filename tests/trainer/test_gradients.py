"""The gradient at a last layer, against autograd's own on an unsharded layer."""

import pytest
import torch
from torch import nn

from tests.trainer.ranks import ranks
from trainer.gradients import LastLayer


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(5, 3), (4, 5)),
        (nn.Linear(5, 3, bias=False), (2, 3, 4, 5)),
        (nn.Conv2d(4, 6, 3, padding=1), (2, 4, 5, 7)),
        (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(2, 0), dilation=(1, 2), groups=2), (2, 4, 8, 7)),
    ],
)
def test_equals_autograd(layer, shape):
    x = torch.randn(shape, requires_grad=True)
    with LastLayer(layer) as last:
        y = layer(x.sin())
    losses = [y.square().mean(), y.tanh().sum()]
    norms = last.gradient_norms(losses)
    for loss, norm in zip(losses, norms, strict=True):
        (expected,) = torch.autograd.grad(loss, layer.weight, retain_graph=True)
        torch.testing.assert_close(last.weight_gradient(loss), expected)
        torch.testing.assert_close(norm, expected.norm())
    sum(losses).backward()  # the graph is whole still
    assert layer.weight.grad is not None and not norms.requires_grad


def global_norm_of_a_share(whole):
    layer = nn.Linear(5, 3)
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(-1, 1, 15).view(3, 5))
        layer.bias.zero_()
    part = whole.chunk(2)[torch.distributed.get_rank()]
    with LastLayer(layer) as last:
        y = layer(part)
    loss = y.square().sum() / len(whole)
    return last.gradient_norms([loss], scope="global").item(), last.gradient_norms([2 * loss]).item()


def test_global_scope_sums_gradients_before_the_norm_and_slice_scope_does_not():
    torch.manual_seed(0)
    whole = torch.randn(8, 5)
    weight = torch.linspace(-1, 1, 15).view(3, 5).requires_grad_()
    halves = [(half @ weight.T).square().sum() / 4 for half in whole.chunk(2)]
    each = [torch.autograd.grad(half, weight, retain_graph=True)[0] for half in halves]
    for rank, (over_all, over_slice) in enumerate(ranks(2).run(global_norm_of_a_share, whole)):
        assert over_all == pytest.approx(((each[0] + each[1]) / 2).norm().item(), rel=1e-5)
        assert over_slice == pytest.approx(each[rank].norm().item(), rel=1e-5)


def test_says_what_it_cannot_do():
    with pytest.raises(ValueError, match="LayerNorm"):
        LastLayer(nn.LayerNorm(3))
    with pytest.raises(ValueError, match="zero padding"):
        LastLayer(nn.Conv2d(1, 1, 3, padding_mode="circular"))
    layer = nn.Linear(2, 2)
    with LastLayer(layer) as last:
        y = layer(layer(torch.randn(1, 2)))
    with pytest.raises(ValueError, match="2 times"):
        last.gradient_norms([y.sum()])
