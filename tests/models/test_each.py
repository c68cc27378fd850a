"""Several pictures or captions as one condition."""

import pytest
import torch

from models.conditioner import Conditioner
from models.conditions import ClassEncoder
from models.each import EachEncoder
from models.given import Given
from models.image import ImageEncoder
from models.text import ClipEncoder
from tests.data.curation.tiny_models import save_clip


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return str(save_clip(tmp_path_factory.mktemp("clip")))


def test_tokens_of_pictures_are_those_of_each_one_after_the_other(clip):
    one = ImageEncoder(clip, pooled=False)
    each = EachEncoder(one, k=3).eval()
    pictures = torch.randint(0, 256, (2, 3, 3, 30, 40), dtype=torch.uint8)
    pictures[1, 2] = 0  # there is no third neighbour
    with torch.no_grad():
        tokens, pooled = each(pictures)
        expected = torch.stack([one(pictures[:, i])[0][:, 0] for i in range(3)], dim=1)
    expected[1, 2] = 0
    assert tokens.shape == (2, 3, 10) and pooled.shape == (2, 0) and torch.allclose(tokens, expected, atol=1e-5)
    assert not each.null()[0].any() and each.null()[0].shape == (1, 3, 10)
    with pytest.raises(ValueError, match="'neighbours' holds 2 a sample, and the model was made for 3"):
        each(pictures[:, :2])


def test_tokens_of_captions_are_dropped_to_zeros_and_so_are_captions_that_are_missing(clip):
    one = ClipEncoder(clip, length=12, layer="last", pooled=False)
    conditioner = Conditioner([EachEncoder(one, k=2, field="near"), one]).eval()
    near = [["a red circle", ""], ["a cat", "two cats"], ["a", "b"]]
    given = Given(["x", "y", "z"], fields={"near": near})
    keep = torch.tensor([[True, True], [True, True], [False, True]])
    context = conditioner(given, keep)["context"]
    assert context.shape == (3, 36, 12)
    assert torch.allclose(context[:2, :12], one(["a red circle", "a cat"])[0], atol=1e-5)
    assert torch.allclose(context[1, 12:24], one(["two cats"])[0][0], atol=1e-5)
    assert not context[0, 12:24].any() and not context[2, :24].any() and context[2, 24:].any()


def test_only_frozen_encoders_are_taken():
    with pytest.raises(ValueError, match="ClassEncoder learns with the denoiser: EachEncoder takes frozen"):
        EachEncoder(ClassEncoder(classes=3, width=4))
