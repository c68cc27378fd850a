"""Feature networks of evaluations: FID's Inception against torch-fidelity's own, and what is told of the others."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models.features import InceptionFeatures, RandomStandIn, VisionFeatures
from models.inception import InceptionV3
from tests.data.curation.tiny_models import save_clip
from tests.foreign import ask, install

# The package's own front door needs torchvision, the network does not.
_THEIRS = """
import json, sys, types
import torch
package = types.ModuleType("torch_fidelity")
package.__path__ = [sys.argv[1] + "/torch_fidelity"]
sys.modules["torch_fidelity"] = package
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
torch.set_num_threads(1)
network = FeatureExtractorInceptionV3("theirs", ["2048"], feature_extractor_weights_path=sys.argv[2])
told = []
for images in torch.load(sys.argv[3]):
    with torch.no_grad():
        told.append(network(images)[0].tolist())
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights under which every layer's output has about unit variance, in the published file's layout."""
    torch.manual_seed(0)
    network = InceptionV3()
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.bias, std=0.3)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            module.running_mean.normal_(std=0.2)  # type: ignore[operator, union-attr]
            module.running_var.uniform_(0.5, 1.5)  # type: ignore[operator, union-attr]
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save(network.state_dict(), path, _use_new_zipfile_serialization=False)  # the published file is that old
    return path


@pytest.mark.slow
def test_inception_is_torch_fidelitys(weights: Path, tmp_path: Path):
    folder = install(tmp_path / "fidelity", "torch-fidelity")
    generator = torch.Generator().manual_seed(1)
    sizes = [(299, 299), (64, 40), (310, 500)]
    pictures = [torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8, generator=generator) for size in sizes]
    torch.save(pictures, tmp_path / "pictures.pt")
    theirs = ask(folder, _THEIRS, str(folder), str(weights), str(tmp_path / "pictures.pt"))
    network = InceptionFeatures(str(weights))
    for images, expected in zip(pictures, map(torch.tensor, theirs), strict=True):
        ours = network(images)
        assert ours.shape == (2, network.num_features) and expected.std() > 0.1
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_other_weights_are_named_and_files_of_another_network_refused(weights: Path, tmp_path: Path):
    label = InceptionFeatures(str(weights)).label
    assert label.startswith("inception_v3_of_") and len(label) == len("inception_v3_of_") + 8
    state = torch.load(weights)
    del state["Mixed_6b.branch1x1.conv.weight"]
    save_file(state, tmp_path / "cut.safetensors")
    with pytest.raises(ValueError, match=r"1 of the weights differ, such as Mixed_6b.branch1x1.conv.weight"):
        InceptionFeatures(str(tmp_path / "cut.safetensors"))
    with pytest.raises(ValueError, match=r"there is no file .*features=random_stand_in"):
        InceptionFeatures(str(tmp_path / "nothing.pth"))


def test_a_vision_tower_gives_transformers_own_embeddings(tmp_path: Path):
    from transformers import AutoImageProcessor, CLIPModel

    folder = save_clip(tmp_path / "clip")
    images = torch.randint(0, 256, (3, 3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    network = VisionFeatures(str(folder))
    prepared = AutoImageProcessor.from_pretrained(folder, backend="pil")(list(images), return_tensors="pt")
    expected = CLIPModel.from_pretrained(folder).eval().get_image_features(**prepared).pooler_output
    torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-5)
    assert network.num_features == 10 and network.label == str(folder) and not network.stand_in


def test_the_stand_in_is_one_network_for_all_and_says_what_it_is():
    images = torch.randint(0, 256, (4, 3, 20, 33), dtype=torch.uint8)
    first, again, other = RandomStandIn(), RandomStandIn(), RandomStandIn(seed=1)
    assert torch.equal(first(images), again(images)) and not torch.allclose(first(images), other(images))
    assert first(images).shape == (4, 64) and first.stand_in and first.label == "random_stand_in"
