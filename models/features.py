"""What pictures are compared by: networks that give a vector of each picture, for distances between sets of them.

Each takes (n, 3, H, W) uint8 and gives (n, d) float32. Its `label` tells which network it is, with which weights:
figures of different labels cannot be compared.
"""

import hashlib
from abc import ABC, abstractmethod
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.hub import Dtype
from models.image import ImageEncoder
from models.inception import WIDTH, InceptionV3
from models.tensor_files import open_file

# How the published file's SHA-256 begins: both ports of it carry these digits in their names.
_PUBLISHED = "6726825d"
_COUNTED = "num_batches_tracked"


class Features(nn.Module, ABC):
    """The interface. Frozen, and always in evaluation mode.

    Attributes:
        num_features: numbers of a picture, d.
        label: which network, with which weights.
        stand_in: whether it only stands in for a trained network: its figures mean little, and are named so.
    """

    num_features: int
    label: str
    stand_in: bool = False

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor: ...


class InceptionFeatures(Features):
    """Those of FID, KID and most published precision and recall.

    Args:
        path: the weights of 2015-12-05 as torch-fidelity (`weights-inception-2015-12-05-6726825d.pth`) and pytorch-fid
            (`pt_inception-2015-12-05-6726825d.pth`) give them out, or the same names in a .safetensors file.

    Raises:
        ValueError: there is no such file, or it holds another network.
    """

    num_features = WIDTH

    def __init__(self, path: str | None) -> None:
        super().__init__()
        if path is None:
            raise ValueError(
                "features.path must name the weights of FID's Inception: conf/features/inception.yaml says where to"
                " have them from; features=vision takes a CLIP instead, features=random_stand_in tries without"
            )
        digest = _digest(Path(path))
        self.label = "inception_v3" if digest == _PUBLISHED else f"inception_v3_of_{digest}"
        self.network = InceptionV3()
        file = open_file(Path(path))
        state = {name: file.read(name) for name in file.names()}
        wanted = {name: tuple(tensor.shape) for name, tensor in self.network.state_dict().items()}
        found = {name: tuple(tensor.shape) for name, tensor in state.items()}
        # Batches counted in training, which the published file may lack.
        wrong = [name for name in wanted | found if not name.endswith(_COUNTED) and wanted.get(name) != found.get(name)]
        if wrong:
            raise ValueError(
                f"{path} is not FID's InceptionV3: {len(wrong)} of the weights differ, such as {wrong[0]}, of shape"
                f" {found.get(wrong[0])} there and {wanted.get(wrong[0])} in the network"
            )
        self.network.load_state_dict(state, strict=False)
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)


class VisionFeatures(Features):
    """The embeddings of CLIP (CLIP-FID), SigLIP, DINOv2 and their like, not scaled to length one.

    Args:
        model: folder, or name on the Hugging Face hub, of a model of transformers with safetensors weights.
        dtype: that it computes in.
    """

    def __init__(self, model: str, dtype: Dtype = "float32") -> None:
        super().__init__()
        self.encoder = ImageEncoder(model, dtype=dtype)
        self.num_features, self.label = self.encoder.width, model.rstrip("/")
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder(images)[1]


class RandomStandIn(Features):
    """Random convolutions, where there is no trained network at hand: for tests, and to see that all runs.

    Args:
        num_features: numbers of a picture.
        seed: of the weights.
    """

    label = "random_stand_in"
    stand_in = True

    def __init__(self, num_features: int = 64, seed: int = 0) -> None:
        super().__init__()
        self.num_features = num_features
        generator = torch.Generator().manual_seed(seed)
        shapes = [(32, 3, 3, 3), (64, 32, 3, 3), (num_features, 64, 3, 3)]
        self.weights = nn.ParameterList(
            nn.Parameter(torch.randn(shape, generator=generator) * (2 / (9 * shape[1])) ** 0.5, requires_grad=False)
            for shape in shapes
        )

    def forward(self, images: Tensor) -> Tensor:
        x = images.float() / 127.5 - 1
        for weight in self.weights:
            x = F.relu(F.conv2d(x, weight, stride=2, padding=1))
        return x.mean((2, 3))


def _digest(path: Path) -> str:
    if not path.is_file():
        raise ValueError(
            f"there is no file {path} with the weights of FID's Inception: conf/features/inception.yaml says where to"
            " have them from; features=random_stand_in tries without"
        )
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:8]
