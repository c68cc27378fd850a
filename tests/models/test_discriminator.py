"""The patch discriminator, against its published shape."""

import pytest
import torch
from torch import nn

from models.discriminator import PatchDiscriminator
from models.initialization import initialize


@pytest.mark.parametrize(("layers", "parameters", "patches", "field"), [(3, 2_765_633, 30, 70), (2, 663_361, 62, 34)])
def test_shape_and_patches_are_the_published_ones(layers, parameters, patches, field):
    network = initialize(PatchDiscriminator(layers=layers), seed=0)
    assert sum(p.numel() for p in network.parameters()) == parameters
    images = torch.randn(1, 3, 256, 256, requires_grad=True)
    with torch.no_grad():
        assert network(images).shape == (1, 1, patches, patches)
    # Without norms, which join all places, a logit sees its patch alone.
    for module in network.main:
        if isinstance(module, nn.BatchNorm2d):
            module.forward = lambda x: x
    network(images)[0, 0, patches // 2, patches // 2].backward()
    seen = images.grad[0].abs().sum(0).nonzero()
    assert (seen.max(0).values - seen.min(0).values + 1).tolist() == [field, field]


def test_norms_are_of_the_images_of_a_call_in_training_and_otherwise():
    network = initialize(PatchDiscriminator(filters=4), seed=0)
    a, b = torch.randn(2, 3, 64, 64), torch.randn(2, 3, 64, 64)
    together = network(torch.cat([a, b]))
    assert not torch.allclose(together[:2], network(a), atol=1e-4)
    assert torch.equal(network.train()(a), network.eval()(a))
    assert not list(network.buffers())


def test_first_values():
    network = initialize(PatchDiscriminator(), seed=0)
    weights = torch.cat([m.weight.flatten() for m in network.modules() if isinstance(m, nn.Conv2d)])
    assert weights.std().item() == pytest.approx(0.02, rel=0.01)
    norms = torch.cat([m.weight for m in network.modules() if isinstance(m, nn.BatchNorm2d)])
    assert norms.mean().item() == pytest.approx(1, abs=0.01) and norms.std().item() == pytest.approx(0.02, rel=0.2)
    with pytest.raises(ValueError, match="layers=0"):
        PatchDiscriminator(layers=0)
