"""LPIPS, against the lpips package with the linear weights that it ships and a VGG-16 of random weights."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models.initialization import initialize
from models.lpips import LPIPS
from tests.foreign import ask, install

# torchvision does not import beside torch's CPU build: its VGG-16 without it, for what lpips takes of it.
_THEIRS = """
import json, sys, types
import torch
from torch import nn

def vgg16(**_):
    layers, c_in = [], 3
    for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
        layers += [nn.Conv2d(c_in, width, 3, padding=1), nn.ReLU(inplace=True)] if width else [nn.MaxPool2d(2, 2)]
        c_in = width or c_in
    network = nn.Module()
    network.features = nn.Sequential(*layers)
    network.load_state_dict(torch.load(sys.argv[1]))
    return network

torchvision = types.ModuleType("torchvision")
torchvision.models = types.SimpleNamespace(vgg16=vgg16)
sys.modules["torchvision"] = torchvision
import lpips

pairs = torch.load(sys.argv[2])
distances = lpips.LPIPS(net="vgg", verbose=False).eval()(*pairs).flatten()
distances.sum().backward()
torch.save(pairs[1].grad, sys.argv[3])
print(json.dumps(distances.tolist()))
"""


def vgg_state() -> dict[str, torch.Tensor]:
    """Random weights of a VGG-16, as torchvision names them."""
    network = initialize(LPIPS(), seed=3)
    number, state = 0, {}
    for stage in network.stages:
        for convolution in stage:
            state[f"features.{number}.weight"] = convolution.weight.detach()
            state[f"features.{number}.bias"] = torch.randn_like(convolution.bias) * 0.05
            number += 2
        number += 1
    return state


def test_it_agrees_with_the_package_on_the_published_linear_weights(tmp_path: Path):
    package = install(tmp_path / "package", "lpips==0.1.4")
    torch.manual_seed(0)
    state = vgg_state()
    torch.save(state, tmp_path / "vgg16.pth")
    a = torch.rand(3, 3, 64, 48) * 2 - 1
    b = (a + torch.randn_like(a) * torch.tensor([0.0, 0.1, 1.0]).view(3, 1, 1, 1)).requires_grad_()
    torch.save([a, b], tmp_path / "pairs.pt")
    files = [str(tmp_path / name) for name in ("vgg16.pth", "pairs.pt", "gradient.pt")]
    theirs = torch.tensor(ask(package, _THEIRS, *files))

    linear = str(package / "lpips/weights/v0.1/vgg.pth")
    ours = initialize(LPIPS(vgg=files[0], linear=linear), seed=0).requires_grad_(False)
    assert ours.stand_in is None
    distances = ours(a, b)
    assert distances[0] == theirs[0] == 0 and distances[2] > distances[1] > 1e-3
    torch.testing.assert_close(distances, theirs, rtol=1e-5, atol=1e-7)
    distances[1:].sum().backward()
    gradient = torch.load(files[2])[1:]
    assert (b.grad[1:] - gradient).norm() / gradient.norm() < 1e-4

    save_file(state, tmp_path / "vgg16.safetensors")
    again = initialize(LPIPS(vgg=str(tmp_path / "vgg16.safetensors"), linear=linear), seed=0)
    assert torch.equal(again(a, b), distances)


def test_equal_images_have_a_finite_gradient():
    network = initialize(LPIPS(filters=4), seed=0)
    black = torch.zeros(1, 3, 32, 32, requires_grad=True)
    distance = network(black, torch.zeros(1, 3, 32, 32))
    distance.sum().backward()
    assert distance.item() == 0 and black.grad.isfinite().all()


def test_the_stand_in_says_what_it_is():
    for arguments in ({"vgg": "a"}, {"linear": "a"}):
        with pytest.raises(ValueError, match="both of them, or null for both"):
            LPIPS(**arguments)
    network = initialize(LPIPS(filters=4), seed=0)
    assert "random VGG-16" in network.stand_in
    a, b = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32)
    assert (network(a, b) > 0).all() and torch.allclose(network(a, b), network(b, a))


def test_files_of_something_else_are_named(tmp_path: Path):
    save_file({"weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    save_file(vgg_state(), tmp_path / "vgg.safetensors")
    for vgg, says in (("missing.pth", "missing.pth is no file"), ("other.safetensors", r"lacks features\.0\.weight")):
        with pytest.raises(ValueError, match=says):
            initialize(LPIPS(vgg=str(tmp_path / vgg), linear=str(tmp_path / "other.safetensors")), seed=0)
    linear = {f"lin{i}.model.1.weight": torch.ones(1, 7, 1, 1) for i in range(5)}
    save_file(linear, tmp_path / "linear.safetensors")
    with pytest.raises(ValueError, match=r"linear\.safetensors holds no weights of VGG-16.*\(7,\), not \(64,\)"):
        initialize(LPIPS(vgg=str(tmp_path / "vgg.safetensors"), linear=str(tmp_path / "linear.safetensors")), seed=0)
