"""The encoder of pictures against transformers' own processors and models, tiny and of random weights."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models.conditioner import AbsentEncoder, Conditioner
from models.given import Given
from models.image import ImageEncoder
from tests.data.curation.tiny_models import SIDE, drop_weight, save_clip, save_siglip


def save_tower(folder: Path) -> Path:
    """The image side of a pipeline, as Stable Video Diffusion's folder has it."""
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPVisionConfig(**sizes, image_size=SIDE, patch_size=8, projection_dim=6)
    CLIPVisionModelWithProjection(config).save_pretrained(folder / "image_encoder")
    size = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    CLIPImageProcessorPil(**size).save_pretrained(folder / "feature_extractor")
    return folder


def save_dino(folder: Path) -> Path:
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    torch.manual_seed(4)
    sizes = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2}
    Dinov2Model(Dinov2Config(**sizes, image_size=SIDE, patch_size=8)).save_pretrained(folder)
    size = {"size": {"shortest_edge": SIDE + 8}, "crop_size": {"height": SIDE, "width": SIDE}}
    BitImageProcessorPil(**size).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_clip(folder / "clip")
    save_siglip(folder / "siglip")
    save_tower(folder / "tower")
    save_dino(folder / "dino")
    return folder


def encoder(folder: Path, kind: str, **options) -> ImageEncoder:
    if kind == "tower":
        options |= {"subfolder": "image_encoder", "processor_subfolder": "feature_extractor"}
    return ImageEncoder(str(folder / kind), **options).eval().requires_grad_(False)


def pictures(height: int, width: int, count: int = 3) -> torch.Tensor:
    """Smooth pictures, (n, 3, height, width) uint8."""
    made = []
    for seed in range(count):
        coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
        made.append(np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)))
    return torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("kind", ["clip", "siglip", "tower", "dino"])
@pytest.mark.parametrize("size", [(40, 64), (64, 40), (16, 20), (SIDE, SIDE)])
@torch.no_grad()
def test_embeddings_are_those_of_transformers_processor_and_model(folder: Path, kind: str, size: tuple[int, int]):
    from transformers import AutoImageProcessor, AutoModel, CLIPVisionModelWithProjection

    images = pictures(*size)
    of_processor = folder / kind / "feature_extractor" if kind == "tower" else folder / kind
    processor = AutoImageProcessor.from_pretrained(of_processor, backend="pil")
    pixels = processor([Image.fromarray(i.permute(1, 2, 0).numpy()) for i in images], return_tensors="pt").pixel_values
    ours = encoder(folder, kind)
    prepared = ours.preparation(images)
    step = 1 / 255 / min(processor.image_std)
    assert prepared.shape == pixels.shape
    assert (prepared - pixels).abs().max() < 2.1 * step and (prepared - pixels).abs().mean() < 0.4 * step  # rounding
    if kind == "tower":
        expected = CLIPVisionModelWithProjection.from_pretrained(folder / "tower/image_encoder")(pixels).image_embeds
    else:
        model = AutoModel.from_pretrained(folder / kind)
        whole = hasattr(model, "get_image_features")
        expected = (model.get_image_features if whole else model)(pixel_values=pixels).pooler_output
    sequence, pooled = ours(images)
    assert sequence.shape == (3, 1, ours.width) and ours.pooled_width == ours.width == expected.shape[1]
    assert torch.equal(sequence[:, 0], pooled)
    assert (pooled - expected).norm(dim=1).max() < 0.02 * (expected[0] - expected[1]).norm()


def test_only_what_pictures_pass_through_is_kept_in_any_type(folder: Path):
    whole = encoder(folder, "clip")
    assert not any("text" in name or "logit" in name for name in whole.state_dict())
    half = encoder(folder, "clip", dtype="bfloat16")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    close, exact = half(pictures(40, 40))[0], whole(pictures(40, 40))[0]
    assert close.dtype == torch.float32
    torch.testing.assert_close(close, exact, rtol=0.1, atol=0.1 * float(exact.std()))


def test_a_conditioner_lays_pictures_beside_captions_and_drops_them(folder: Path):
    image = encoder(folder, "clip")
    conditioner = Conditioner([AbsentEncoder(2, 12, 4), image, encoder(folder, "siglip", pooled=False)])
    assert (conditioner.context_length, conditioner.context_dim, conditioner.pooled_dim) == (4, 16, 14)
    assert conditioner.reads_images and conditioner.stored == [1, 2]
    images = pictures(40, 56)
    keep = torch.tensor([[True, True, False], [True, False, True], [True, True, True]])
    found = conditioner(Given(["", "", ""], images=images), keep)
    embeddings = image(images)[1] * keep[:, 1, None]
    torch.testing.assert_close(found["context"][:, 2, :10], embeddings, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["pooled"][:, 4:], embeddings, rtol=1e-5, atol=1e-6)
    assert found["context"][:, 3].any(dim=1).tolist() == [False, True, True]
    assert not found["context"][:, :2].any() and not found["context"][:, 2, 10:].any()
    for dropped in ("zeros", "empty"):
        nothing = Conditioner([AbsentEncoder(2, 12, 4), image], dropped=dropped)
        for given, kept in (
            (Given(["", "", ""], images=images), torch.zeros(3, 2, dtype=torch.bool)),
            (Given([""]), None),
        ):
            assert not any(value.any() for value in nothing(given, kept).values())


def test_kept_embeddings_take_the_place_of_the_encoder(folder: Path):
    conditioner = Conditioner([encoder(folder, "clip"), encoder(folder, "tower")], dropped="empty")
    images = pictures(40, 56)
    encoded = {i: one(images) for i, one in enumerate(conditioner.numbered())}
    sequence, pooled = conditioner.numbered()[0].null()
    bare = conditioner.without_weights({0: (sequence[0], pooled[0])})
    keep = torch.tensor([[True, False], [False, True], [True, True]])
    expected = conditioner(Given(["", "", ""], images=images), keep)
    kept = bare(Given(["", "", ""], encoded={0: encoded[0]}, images=images), keep)
    for name, value in expected.items():
        torch.testing.assert_close(kept[name], value, rtol=1e-5, atol=1e-6)
    assert len(list(bare.parameters())) < len(list(conditioner.parameters()))


def test_a_fingerprint_tells_weights_and_preparation_apart(folder: Path, tmp_path: Path):
    from transformers import CLIPImageProcessorPil

    other = {"size": {"shortest_edge": SIDE + 8}, "crop_size": {"height": SIDE, "width": SIDE}}
    CLIPImageProcessorPil(**other).save_pretrained(tmp_path / "larger")
    prints = [encoder(folder, "clip").fingerprint() for _ in range(2)]
    assert prints[0] == prints[1]
    prints += [encoder(folder, "clip", pooled=False).fingerprint(), encoder(folder, "siglip").fingerprint()]
    prints.append(encoder(folder, "clip", processor=str(tmp_path / "larger")).fingerprint())
    prints.append(ImageEncoder(str(save_clip(tmp_path / "clip", seed=7))).fingerprint())
    assert len(set(prints)) == 5


def test_what_cannot_be_loaded_is_named(folder: Path, tmp_path: Path):
    from transformers import CLIPImageProcessorPil

    with pytest.raises(ValueError, match="nowhere"):
        ImageEncoder(str(tmp_path / "nowhere"))
    save_clip(tmp_path / "clip")
    CLIPImageProcessorPil(do_resize=False).save_pretrained(tmp_path / "clip")
    with pytest.raises(ValueError, match=r"its CLIPImageProcessorPil prepares pictures otherwise"):
        ImageEncoder(str(tmp_path / "clip"))
    drop_weight(tmp_path / "clip", "visual_projection.weight")
    with pytest.raises(ValueError, match=r"lacks 1 of the weights of CLIPModel, such as visual_projection\.weight"):
        ImageEncoder(str(tmp_path / "clip"), processor=str(folder / "clip"))
