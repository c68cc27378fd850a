"""Conditions of latent diffusion's tasks, against closed forms and torch's own layers."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data.draws import slice_draws
from models.autoencoder import AutoencoderKL
from models.conditioner import Conditioner
from models.conditions import (
    ClassEncoder,
    GuidedNeighbourEncoder,
    LowResolution,
    MaskedPicture,
    NeighbourEncoder,
    OneHotMap,
    PictureMap,
    SemanticMap,
)
from models.first_stage import FirstStage, Identity, KLFirstStage
from models.given import Given
from models.initialization import initialize


def kl() -> KLFirstStage:
    autoencoder = AutoencoderKL(block_out_channels=[8, 8, 8], norm_num_groups=4, latent_channels=3)
    return initialize(KLFirstStage(autoencoder), seed=0)


def given(first_stage: FirstStage, n: int = 2, **fields) -> Given:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (n, 3, 16, 24), generator=generator, dtype=torch.uint8)
    return Given([""] * n, (16, 24), images, fields=fields, first_stage=first_stage, draws=slice_draws(0, 0, 0, n))


def labels() -> Tensor:
    return torch.randint(6, (2, 16, 24), generator=torch.Generator().manual_seed(1)).to(torch.int16)


def test_a_class_is_one_token_and_none_has_its_own():
    conditioner = initialize(Conditioner([ClassEncoder(5, 8)], dropped="empty"), seed=0)
    context = conditioner(Given([""] * 3, fields={"class": torch.tensor([4, 0, 2])}))["context"]
    weight = conditioner.encoder_modules[0].embedding.weight
    assert weight.shape == (6, 8) and torch.equal(context, weight[[4, 0, 2]][:, None])
    assert torch.equal(conditioner(Given(["", ""]))["context"], weight[[5, 5]][:, None])


def test_a_semantic_map_is_what_rescaled_one_hot_labels_and_a_convolution_give():
    """latent diffusion halves one-hot labels twice, bilinearly, then maps them by a convolution of 1x1."""
    conditioner = initialize(Conditioner([], maps=[SemanticMap(6, 3)]), seed=0)
    colours = conditioner.maps[0].colours.weight
    hot = F.one_hot(labels().long(), 6).permute(0, 3, 1, 2).float()
    halved = F.interpolate(F.interpolate(hot, scale_factor=0.5, mode="bilinear"), scale_factor=0.5, mode="bilinear")
    convolution = nn.Conv2d(6, 3, 1, bias=False)
    convolution.weight.data = colours.detach().T[:, :, None, None].clone()
    first_stage = kl()
    concat = conditioner(given(first_stage, map=labels()))["concat"]
    torch.testing.assert_close(concat, convolution(halved), rtol=1e-5, atol=1e-6)
    concat.square().sum().backward()
    assert colours.grad.abs().min() > 0
    one_hot = Conditioner([], maps=[OneHotMap(6)])(given(first_stage, map=labels()))["concat"]
    torch.testing.assert_close(one_hot, halved, rtol=1e-5, atol=1e-6)
    void = labels().fill_(255)
    assert not conditioner(given(first_stage, map=void))["concat"].any()


def test_a_second_picture_is_laid_beside_as_pixels_or_latent():
    first_stage, told = kl(), given(kl())
    second = told.images.flip(3)
    told = given(first_stage, depth=second)
    pixels, latent = Conditioner([], maps=[PictureMap("depth"), PictureMap("depth", encode=True)])(told)[
        "concat"
    ].split(3, dim=1)
    torch.testing.assert_close(pixels, F.avg_pool2d(second / 127.5 - 1, 4))
    torch.testing.assert_close(latent, first_stage.encode(second / 127.5 - 1))


def test_low_resolution_is_bicubic_and_noise_is_told():
    first_stage = kl()
    plain = Conditioner([], maps=[LowResolution(4)])
    told = given(first_stage)
    low = plain(told)["concat"]
    expected = F.interpolate(told.images.float(), size=(4, 6), mode="bicubic", antialias=True).clamp(0, 255).round()
    torch.testing.assert_close(low, expected / 127.5 - 1)
    given_low = expected.to(torch.uint8)
    torch.testing.assert_close(plain(given(first_stage, low_resolution=given_low))["concat"], low)
    assert plain.concat_channels == 3 and plain(given(Identity()))["concat"].shape == (2, 3, 16, 24)

    noisy = Conditioner([], maps=[LowResolution(4, noise=0.5)])
    n = 400
    many = Given([""] * n, (16, 24), told.images[:1].expand(n, -1, -1, -1), first_stage=first_stage)
    many = Given(many.captions, many.size, many.images, first_stage=first_stage, draws=slice_draws(0, 0, 0, n))
    picture, level = noisy(many)["concat"].split([3, 1], dim=1)
    assert noisy.concat_channels == 4 and (level.flatten(1).std(1) == 0).all()
    level = level[:, 0, 0, 0]
    assert 0 <= level.min() < 0.02 and 0.48 < level.max() <= 0.5 and 0.22 < level.mean() < 0.28
    residual = ((picture - low[:1]) / level.view(-1, 1, 1, 1)).flatten()
    assert abs(residual.mean()) < 0.02 and abs(residual.std() - 1) < 0.02
    again = noisy(many)["concat"]
    assert torch.equal(again[:, :3], picture)
    told = given(first_stage, noise_level=torch.tensor([0.0, 0.25]))
    fixed = noisy(told)["concat"]
    assert fixed[:, 3, 0, 0].tolist() == [0.0, 0.25]
    torch.testing.assert_close(fixed[0, :3], low[0])


def test_inpainting_sees_the_picture_without_its_hole_and_the_hole():
    first_stage = kl()
    mask = torch.zeros(2, 16, 24, dtype=torch.bool)
    mask[0, 4:12, 8:20] = True
    told = given(first_stage, mask=mask)
    conditioner = Conditioner([], maps=[MaskedPicture(3)])
    latent, hole = conditioner(told)["concat"].split([3, 1], dim=1)
    black = told.images.float() / 127.5 - 1
    black[0, :, 4:12, 8:20] = -1
    torch.testing.assert_close(latent, first_stage.encode(black))
    assert hole[1].unique().tolist() == [-1.0]
    assert torch.equal(hole[0, 0] == 1, mask[0, ::4, ::4])
    changed = told.images.clone()
    changed[0, :, 5:11, 9:19] = 0
    same = Given(told.captions, told.size, changed, fields=told.fields, first_stage=first_stage)
    assert torch.equal(conditioner(same)["concat"], conditioner(told)["concat"])


def test_what_conditions_lack_is_named():
    with pytest.raises(ValueError, match="MaskedPicture needs 'mask'"):
        Conditioner([], maps=[MaskedPicture(3)])(given(kl()))
    with pytest.raises(ValueError, match="first stage has 3 channels, and a condition of its latents 4"):
        Conditioner([], maps=[MaskedPicture(4)])(given(kl(), mask=torch.zeros(2, 16, 24, dtype=torch.bool)))
    with pytest.raises(ValueError, match="LowResolution needs 'low_resolution' or pictures"):
        Conditioner([], maps=[LowResolution()])(Given([""], (16, 24), first_stage=kl()))


def test_neighbours_are_tokens_as_they_are_and_zeros_where_they_are_dropped():
    conditioner = Conditioner([NeighbourEncoder(k=3, width=8)], context_dim=10)
    given = Given(["", ""], fields={"neighbours": torch.randn(2, 3, 8)})
    context = conditioner(given, torch.tensor([[True], [False]]))["context"]
    assert torch.equal(context[0, :, :8], given.fields["neighbours"][0])
    assert not context[0, :, 8:].any() and not context[1].any()
    assert not conditioner(Given([""]))["context"].any(), "without the field"
    assert conditioner.stored == [], "they are kept in the database"
    fewer = conditioner(Given([""], fields={"neighbours": torch.ones(1, 2, 8)}))["context"]
    assert fewer.shape == (1, 2, 10), "in sampling there may be fewer, or more"
    with pytest.raises(ValueError, match=r"holds \(3, 9\) numbers a sample, and the model was made for \(3, 8\)"):
        conditioner(Given([""], fields={"neighbours": torch.zeros(1, 3, 9)}))


def test_a_learned_vector_stands_for_neighbours_that_are_dropped():
    conditioner = initialize(Conditioner([GuidedNeighbourEncoder(k=3, width=8)], dropped="empty"), seed=0)
    vector = conditioner.encoder_modules[0].nothing_given
    assert vector.shape == (8,) and vector.requires_grad and vector.std() > 0.3
    given = Given(["", ""], fields={"neighbours": torch.randn(2, 3, 8)})
    context = conditioner(given, torch.tensor([[True], [False]]))["context"]
    assert torch.equal(context[0], given.fields["neighbours"][0])
    assert torch.equal(context[1], vector.expand(3, 8))
    assert torch.equal(conditioner(Given([""]))["context"], vector.expand(1, 3, 8)), "without the field"
    context.sum().backward()
    assert torch.equal(vector.grad, torch.full((8,), 3.0)), "of the dropped sample alone"
